"""Every error lazyfs raises on purpose, sorted by what the one who catches it may do.

    LazyfsError
    ├── ConnectionLost      retry, on another connection or later
    │   └── ExportRefused   the same, but the server answers: it does not give this export now
    ├── RequestFailed       this request only; the connection and its neighbours go on
    │   └── TimedOut        nothing answered in time
    ├── Unsupported         never ask this server again
    ├── ExportChanged       the export is not the one we have cached: fetch nothing more
    ├── CacheCorrupt        what is on disk cannot be trusted: discard and fetch again
    │   └── PlainFileGone   a whole image's file is not there: somebody removed it
    ├── NoSpace             the cache's file system is full: serve without keeping
    │   └── OverLimit       the same, by --max-cache or --min-free
    ├── StateError          our own bug: an operation that the state does not permit
    └── UserError           one line for the user, exit 1
        └── UsageError      the same, exit 2
            └── WrongConfiguration  a file's text, not an argument

Facts are attributes; the message is built from them, once, here.
"""

import errno
import os
from typing import Self


class LazyfsError(Exception):
    """The root of the tree."""

    def again(self) -> Self:
        """Return a new error with the same facts, which has never been raised.

        An exception that was raised keeps every frame that it passed through, with their
        connections and buffers, and grows each time that it is raised. So an error that is to be
        remembered is stored as `error.again()`, and raised as `stored.again()`.
        """
        return type(self)(*self.args)


class ConnectionLost(LazyfsError):
    """The connection to the repository is gone, or could not be made."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri = uri
        self.reason = reason

    def __str__(self) -> str:
        return f"no connection to {self.uri}: {self.reason}"


class ExportRefused(ConnectionLost):
    """The server is there, but refuses this export, for now: it may be about to offer it."""


class RequestFailed(LazyfsError):
    """The repository answered one request with an error."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what, code)
        self.what = what
        self.code = code

    def __str__(self) -> str:
        return f"{self.what} failed: {os.strerror(self.code)}"


class TimedOut(RequestFailed):
    """No answer within the time the user allows (`--io-timeout`)."""

    def __init__(self, what: str, timeout_s: float, reason: str) -> None:
        super().__init__(what, errno.ETIMEDOUT)
        self.args = what, timeout_s, reason
        self.timeout_s = timeout_s
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what} had no answer in {self.timeout_s:g} s: {self.reason}"


class Unsupported(LazyfsError):
    """The server cannot do this, and will not later."""


class ExportChanged(LazyfsError):
    """The export is no longer the one that the cache was filled from."""

    def __init__(self, export: str, was: str, now: str) -> None:
        super().__init__(export, was, now)
        self.export = export
        self.was = was
        self.now = now

    def __str__(self) -> str:
        return f"changed in the repository (was {self.was}, now {self.now})"


class CacheCorrupt(LazyfsError):
    """A cache file is not what lazyfs wrote."""


class PlainFileGone(CacheCorrupt):
    """The plain file of a whole image is not there any more."""


class NoSpace(LazyfsError):
    """The file system that holds the cache is full."""

    def __str__(self) -> str:
        return "no space left for the cache"


class OverLimit(NoSpace):
    """The cache may not grow any more: `--max-cache`, `--min-free`."""

    def __str__(self) -> str:
        return "the cache has reached its limit (--max-cache, --min-free)"


class StateError(LazyfsError):
    """An operation that the present state does not permit: a bug in lazyfs."""


class UserError(LazyfsError):
    """Something only the user can mend. The text is one line: what is wrong, what to do."""

    exit_code = 1


class UsageError(UserError):
    """Wrong arguments."""

    exit_code = 2


class WrongConfiguration(UsageError):
    """A configuration file says something wrong."""

    def __init__(self, file: str, where: str, problem: str) -> None:
        """`where`: the key, or "line N"; "" for the file as a whole."""
        super().__init__(file, where, problem)
        self.file = file
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.where, self.problem) if part)
