"""Asks a server about many exports, on as few connections as that takes.

One connection is enough while the server answers. As soon as one answer is late, others ask about
the rest beside it, so that an export that hangs holds up nothing but its own connection.
"""

import threading
from collections import deque
from collections.abc import Sequence

import nbd

from lazyfs import errors
from lazyfs.engine.interfaces import Export
from lazyfs.repository import nbd_connect

LATE_S = 0.5
"""After so long without an answer, others ask beside. It is unmeasured: servers answer in
milliseconds, from afar in tenths of a second."""

DESCRIBE_S = 5.0
"""How long the description of one export of many may take. It is unmeasured: nbdkit and nbd-server
answer in milliseconds, and one that opens a remote disk in a second or two."""

CONNECTIONS = 8
"""How many ask at the same time, once one answer is late. It is unmeasured."""


class Describing:
    """Asks about some exports. `ask` runs in threads, several at the same time."""

    def __init__(self, uri: str, names: Sequence[str], at_once: int, limit_s: float) -> None:
        """Ask nothing yet.

        Args:
            uri: the server.
            names: the exports, each once.
            limit_s: how long each of several exports may take, if that is less than DESCRIBE_S.
            at_once: how many the server describes on one connection, as far as is known.
        """
        self.at_once = at_once
        """This is lowered when the server hangs up earlier. nbdkit 1.32 does so after 32 options.
        """
        self.found: dict[str, Export | str] = {}
        """What the server says of each export, or why it says nothing."""
        self.failure: errors.LazyfsError | None = None
        """Why nobody could be asked at all, or why an export has given no answer."""
        self._uri = uri
        self._limit_s = min(DESCRIBE_S, limit_s) if len(names) > 1 else None
        self._left = deque(names)
        self._hung_up: dict[str, int] = {}
        """At which exports a connection ended, and how many it had answered."""
        self._lock = threading.Lock()

    @property
    def is_done(self) -> bool:
        """True if all that is left is being asked about."""
        return not self._left

    def ask(self, attempt: nbd_connect.Attempt) -> None:
        """Ask about exports until none is left. Blocks.

        Raises:
            ConnectionLost, Unsupported: the server cannot be reached, or gives no answer about any.
        """
        while self._left:
            self._ask_on(nbd_connect.connect(self._uri, attempt), attempt)
        if self.failure is not None and not self.some_answered:
            raise self.failure.again()

    @property
    def some_answered(self) -> bool:
        """True if the server has described an export."""
        return any(isinstance(found, Export) for found in list(self.found.values()))

    def _next(self) -> str | None:
        with self._lock:
            return self._left.popleft() if self._left else None

    def _ask_on(self, handle: nbd.NBD, attempt: nbd_connect.Attempt) -> None:
        answered, asked = 0, None
        try:
            with nbd_connect.Watchdog(handle, self._uri, attempt, self._limit_s) as watchdog:
                while answered < self.at_once and (asked := self._next()) is not None:
                    found = _describe_one(handle, asked)
                    watchdog.progress()
                    self.found[asked] = found
                    self._note_limit(asked)
                    asked = None
                    answered += 1
                handle.opt_abort()
        except errors.ConnectionLost as error:
            if attempt.abandoned.is_set():
                raise
            if asked is not None:
                self._gave_no_answer(asked, error.reason)
        except nbd.Error as error:
            if asked is None:
                return  # it has answered all that it was asked
            if answered:  # perhaps it takes no more options; another connection asks again
                with self._lock:
                    self._left.appendleft(asked)
                    self._hung_up[asked] = answered
            else:
                reason = nbd_connect.reason(error)
                self._gave_no_answer(asked, f"the server hangs up: {reason}")

    def _note_limit(self, name: str) -> None:
        """Note how many exports a connection takes, if this one was one too many on another.

        Then the server has not hung up because of this export, as it answers now.
        """
        with self._lock:
            if limit := self._hung_up.pop(name, 0):
                self.at_once = min(self.at_once, limit)

    def _gave_no_answer(self, name: str, reason: str) -> None:
        self.found[name] = reason
        self.failure = errors.ExportRefused(self._uri, f"export {name!r}: {reason}")


def _describe_one(handle: nbd.NBD, name: str) -> Export | str:
    """Return the export, or why the server will not describe it.

    Raises:
        nbd.Error: the connection is lost.
    """
    try:
        handle.set_export_name(name)
        handle.opt_info()
        return nbd_connect.described(handle, name)
    except nbd.Error as error:
        if not handle.aio_is_negotiating():
            raise
        return nbd_connect.reason(error)
