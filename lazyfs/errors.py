"""Defines every error that lazyfs raises on purpose, sorted by what the one who catches it may
do.

    LazyfsError
    ├── ConnectionLost      retry, on another connection or later
    │   ├── Busy            the same: the server is there, and readers have its one connection
    │   ├── Silent          the same: it has accepted the connection, and says nothing
    │   ├── Fragmented      the same, but never ask for data and holes again
    │   ├── HungUp          the same: the server closed the connection without a word
    │   └── ExportRefused   the same, but the server answers: it does not give this export now
    ├── RequestFailed       concerns this request only; the connection and other requests go on
    │   └── TimedOut        nothing answered in time
    ├── Unsupported         never ask this server again
    ├── ExportChanged       the export is not the one that is cached: fetch nothing more
    │   └── ContentChanged  the same, told by its bytes
    ├── CacheCorrupt        what is on disk cannot be trusted: discard it and fetch again
    │   └── PlainFileGone   the file of a whole image is missing: somebody has removed it
    ├── NoSpace             the cache's file system is full: serve without keeping
    │   └── OverLimit       the same, because of --max-cache or --min-free
    ├── StateError          a bug in lazyfs: an operation that the state does not permit
    └── UserError           one line for the user, exit code 1
        ├── LastingError    the same, and to try again does not help
        └── UsageError      the same, exit code 2
            └── WrongConfiguration  the same, for the text of a file, not an argument

Facts are attributes. The message is built from them, here and only here.
"""

import errno
import os
from typing import Self


def said(error: Exception) -> str:
    """Return the message of an error for people. An OSError alone would begin with its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror}"


class LazyfsError(Exception):
    """The base class of all errors of lazyfs."""

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


class Busy(ConnectionLost):
    """The server is there, but takes one connection at a time, and readers have it."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri, "the server takes one connection at a time, and readers have it")
        self.args = (uri,)


class Silent(ConnectionLost):
    """The server has accepted a connection, and has not greeted in time."""


class Fragmented(ConnectionLost):
    """The server has answered a question about data and holes with an absurd number of pieces."""


class HungUp(ConnectionLost):
    """The server closed the connection without a word."""


class ExportRefused(ConnectionLost):
    """The server can be reached, but refuses this export for now. It may be about to offer it."""


class RequestFailed(LazyfsError):
    """The repository answered one request with an error."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what, code)
        self.what = what
        self.code = code

    def __str__(self) -> str:
        return f"{self.what} failed: {os.strerror(self.code)}"


class TimedOut(RequestFailed):
    """There was no answer within the time that the user allows (`--io-timeout`)."""

    def __init__(self, what: str, timeout_s: float, reason: str) -> None:
        super().__init__(what, errno.ETIMEDOUT)
        self.args = what, timeout_s, reason
        self.timeout_s = timeout_s
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what} had no answer in {self.timeout_s:g} s: {self.reason}"


class Unsupported(LazyfsError):
    """The server cannot do this, neither now nor later."""


class ExportChanged(LazyfsError):
    """The export is no longer the one from which the cache was filled."""

    def __init__(self, export: str, was: str, now: str) -> None:
        super().__init__(export, was, now)
        self.export = export
        self.was = was
        self.now = now

    def __str__(self) -> str:
        return f"changed in the repository (was {self.was}, now {self.now})"


class ContentChanged(ExportChanged):
    """The export has other bytes than those that are cached of it."""

    def __init__(self, export: str, start: int, end: int) -> None:
        super().__init__(export, "", "")
        self.args = export, start, end
        self.start = start
        self.end = end

    def __str__(self) -> str:
        return f"changed in the repository (bytes {self.start} to {self.end} differ from the cache)"


class CacheCorrupt(LazyfsError):
    """A cache file is not what lazyfs wrote."""


class PlainFileGone(CacheCorrupt):
    """The plain file of a whole image does not exist any more."""


class NoSpace(LazyfsError):
    """The file system that holds the cache is full."""

    def __str__(self) -> str:
        return "no space left for the cache"


class OverLimit(NoSpace):
    """The cache may not grow any more, because of `--max-cache` or `--min-free`."""

    def __str__(self) -> str:
        return "the cache has reached its limit (--max-cache, --min-free)"


class StateError(LazyfsError):
    """The present state does not permit this operation, which is a bug in lazyfs."""


class UserError(LazyfsError):
    """Something is wrong that only the user can repair.

    The text is one line. It says what is wrong and what to do.
    """

    exit_code = 1


class LastingError(UserError):
    """The same, and to try again does not help before somebody has mended something.

    A service manager is told so by exit code 6, "not configured" (systemd.exec(5), LSB).
    """

    service_exit_code = 6


class UsageError(UserError):
    """The arguments are wrong."""

    exit_code = 2


class WrongConfiguration(UsageError):
    """A configuration file says something wrong."""

    def __init__(self, file: str, where: str, problem: str) -> None:
        """Describe the mistake.

        Args:
            file: the path of the file.
            where: the key, or "line N". "" means the file as a whole.
            problem: what is wrong.
        """
        super().__init__(file, where, problem)
        self.file = file
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.where, self.problem) if part)
