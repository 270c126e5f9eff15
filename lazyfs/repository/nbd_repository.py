"""Implements the repository over NBD.

It lists the exports, and makes connections that come back after every loss.
"""

import logging
import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import nbd
import trio

from lazyfs import errors
from lazyfs.engine.interfaces import (
    Export,
    Filler,
    FillWork,
    RepositoryStatistics,
    Samples,
    Source,
    no_samples,
)
from lazyfs.engine.supervision import call_beside
from lazyfs.repository import nbd_connect, nbd_handle
from lazyfs.repository.describing import CONNECTIONS, LATE_S, Describing
from lazyfs.repository.fill_thread import FillConnection
from lazyfs.repository.nbd_connect import Attempt
from lazyfs.repository.nbd_filler import NbdFiller
from lazyfs.repository.nbd_source import NbdSource
from lazyfs.repository.sole_connection import SoleConnection
from lazyfs.units import MiB

logger = logging.getLogger(__name__)

MAX_EXPORTS = 100_000
"""If one server lists more names than this, the rest is dropped. Each takes 2.3 KiB of memory."""

STALL_S = 20.0
"""The longest time without any byte after which a connection is given up, however long readers
may wait. It is unmeasured: a server that needs longer for the first byte is asked again."""

MAX_LIST_S = 60.0
"""After so long each name of a list does not count as progress any more. A server could send one
name a second for a day. 100,000 names come in seconds over 10 Mbit/s."""

MAX_NAMES_LENGTH = 8 * MiB
"""The most characters that all names may have together: 84 for each of MAX_EXPORTS. A name may have
4 KiB (NBD protocol), and is in memory several times."""

T = TypeVar("T")


class NbdRepository:
    """Represents one NBD server with named exports. Implements `interfaces.Repository`."""

    def __init__(self, uri: str, nursery: trio.Nursery, io_timeout_s: float) -> None:
        """Do not connect before something is asked for. Tasks in `nursery` drive the
        connections.

        Args:
            uri: an NBD URI without an export name.
            nursery: runs the connections.
            io_timeout_s: how long a reader waits. A connection that makes no progress for a third
                of that is given up, so that a reader has two more attempts, but for STALL_S at
                most.
        """
        self.uri = uri
        self.connected = False
        self.trouble = ""
        """Why the last attempt to reach the repository failed. It is "" if it did not."""
        self.heard_at = -math.inf
        """When the latest byte has come that a reader or population has asked for, by
        `time.monotonic`."""
        self.listed_at = -math.inf
        """When the latest name of a list has come, by `time.monotonic`."""
        self.reconnects = 0
        self._failures = 0
        self._at_once = MAX_EXPORTS
        """How many exports the server describes on one connection. It is lowered when the server
        hangs up earlier."""
        self._sole = SoleConnection(uri)
        self._filling: weakref.WeakSet[FillConnection] = weakref.WeakSet()
        self._nursery = nursery
        self._stall_s = min(io_timeout_s / 3, STALL_S)
        self._io_timeout_s = io_timeout_s
        self._connect_s = max(1.0, io_timeout_s / 2)
        """How long one attempt to connect may take, if that is less than CONNECT_TIMEOUT_S: whoever
        waits for the repository must hear that it is lost."""
        # These are not trio's default limiter, because attempts that hang must not keep cache files
        # from being read.
        self._connects = trio.CapacityLimiter(64)
        self._fills = trio.CapacityLimiter(64)

    def statistics(self) -> RepositoryStatistics:
        """Return how well the repository can be reached."""
        return RepositoryStatistics(self.connected, self.reconnects, self._failures)

    async def list_exports(self) -> list[str]:
        """Return the names of all exports, as `interfaces.Repository.list_exports` does.

        A name that is not UTF-8 is left out, and logged.
        """
        self._sole.check_free()
        names, unreadable, dropped = await self._connecting(self._list)
        if unreadable:
            logger.warning(
                "%s lists %d exports whose names are not UTF-8; they are not shown",
                self.uri,
                unreadable,
            )
        if dropped:
            logger.warning(
                "%s lists %d exports more than lazyfs takes; they are not shown", self.uri, dropped
            )
        return names

    def _list(self, attempt: Attempt) -> tuple[list[str], int, int]:
        """Return the names, how many more could not be decoded, and how many were dropped."""
        handle = nbd_connect.connect(self.uri, attempt)
        names: list[str] = []
        length = dropped = 0

        def found(name: str, _description: str) -> int:
            nonlocal length, dropped
            if len(names) >= MAX_EXPORTS or length >= MAX_NAMES_LENGTH:
                dropped += 1  # this does not count as progress, so an endless list is cut off
                return 0
            if time.monotonic() < began + MAX_LIST_S:
                watchdog.progress()
            self.listed_at = time.monotonic()
            names.append(name)
            length += len(name)
            return 0

        began = time.monotonic()
        try:
            with nbd_connect.Watchdog(handle, self.uri, attempt) as watchdog:
                count = handle.opt_list(found)
                handle.opt_abort()
        except nbd.Error as error:
            if error.errnum in nbd_connect.REFUSED:
                # libnbd reports the same for a server that wants TLS first and for one that cannot
                # list.
                hint = "" if self.uri.startswith("nbds") else "; it may want TLS (nbds)"
                raise errors.Unsupported(
                    f"{self.uri} does not list its exports: {nbd_connect.reason(error)}{hint}"
                ) from error
            raise errors.ConnectionLost(self.uri, nbd_connect.reason(error)) from error
        return names, count - len(names) - dropped, dropped

    async def describe(self, names: Sequence[str]) -> dict[str, Export | str]:
        """Describe exports, as `interfaces.Repository.describe` does."""
        self._sole.check_free()
        asking = Describing(self.uri, list(dict.fromkeys(names)), self._at_once, self._connect_s)
        failures: list[errors.LazyfsError] = []
        first, ended = self.attempt(), trio.Event()

        async def ask(attempt: Attempt | None = None) -> None:
            try:
                await self._connecting(asking.ask, attempt, beside=attempt is None)
            except errors.LazyfsError as error:
                failures.append(error.again())
            finally:
                ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, first)
            answers = -1
            # To connect may take long, and is no answer that is late.
            while not ended.is_set() and not (
                first.greeted.is_set() and answers == len(asking.found)
            ):
                answers = len(asking.found) if first.greeted.is_set() else -1
                with trio.move_on_after(LATE_S):
                    await ended.wait()
            for _ in range(0 if ended.is_set() or asking.is_done else CONNECTIONS - 1):
                nursery.start_soon(ask)
        self._at_once = min(self._at_once, asking.at_once)
        failure = failures[0] if failures else asking.failure
        if failure is not None and not asking.some_answered:
            raise failure
        found = {
            name: asking.found.get(name, str(failure) if failure else "no answer") for name in names
        }
        for name, export in found.items():
            if isinstance(export, Export) and not export.size:
                found[name] = await self._asked_by_go(name)
        return found

    async def _asked_by_go(self, name: str) -> Export | str:
        """Describe an export by opening it.

        Debian's nbd-server 3.24 answers NBD_OPT_INFO with the size 0.
        """

        def opened(attempt: Attempt) -> Export:
            return nbd_connect.connect_export(self.uri, name, attempt)[1]

        try:
            return await self._connecting(opened)
        except errors.ConnectionLost as error:
            return error.reason

    def source(self, export: Export, samples: Samples = no_samples) -> Source:
        """Return a source, as `interfaces.Repository.source` does."""
        return NbdSource(self, export, samples)

    def filler(self, export: Export, samples: Samples = no_samples) -> Filler:
        """Return a filler, as `interfaces.Repository.filler` does."""
        connection = FillConnection(self.uri, export, self._stall_s)
        connection.on_progress = self._heard
        self._filling.add(connection)
        filler = NbdFiller(self, self._sole, connection, samples)
        self._sole.add_filler(filler)
        return filler

    async def connect_export(
        self, export: Export, samples: Samples = no_samples
    ) -> nbd_handle.NbdHandle:
        """Return a running connection to `export`. Raises what `connect` raises."""
        attempt = self.attempt()
        running = nbd_handle.NbdHandle(
            await call_beside(
                partial(self._sole.give_way, attempt),
                partial(self.connect, export, samples, attempt),
            ),
            self.uri,
            export.name,
            self._stall_s,
            self._io_timeout_s,
        )
        running.on_progress = self._heard
        self._sole.add_reader(export.name, running)
        self._nursery.start_soon(running.run)
        return running

    @property
    def waiting_since(self) -> float:
        """Since when the server owes an answer to population, by `time.monotonic`, or infinity."""
        return min((one.waiting_since for one in self._filling), default=math.inf)

    def _heard(self) -> None:
        self.heard_at = time.monotonic()

    def attempt(self) -> Attempt:
        """Return a new attempt to connect."""
        return Attempt(min(self._connect_s, nbd_connect.CONNECT_TIMEOUT_S))

    async def connect(self, export: Export, samples: Samples, attempt: Attempt) -> nbd.NBD:
        """Return a libnbd handle that is ready to read `export`.

        Args:
            export: what the server must have.
            samples: what it must have of the export's content.
            attempt: who wants it.

        Raises:
            ConnectionLost, Unsupported: as for `nbd_connect.connect_export`.
            ExportChanged: the server has another version. The connection is closed.
        """

        def connected(attempt: Attempt) -> nbd.NBD:
            handle, found = nbd_connect.connect_export(self.uri, export.name, attempt)
            export.check_same(found)
            if taken := samples():
                nbd_connect.compare(handle, self.uri, export.name, taken, attempt)
            return handle

        return await self._connecting(connected, attempt)

    async def write(self, write: Callable[[], None]) -> None:
        """Write to the cache in a thread."""
        await trio.to_thread.run_sync(write, limiter=self._fills)

    async def fill(
        self,
        connection: FillConnection,
        work: FillWork,
        duration_s: float,
        stop: threading.Event,
    ) -> None:
        """Run `connection` in a thread until all its claims have ended, or until `stop` is set."""
        call = partial(connection.run, work, duration_s)
        try:
            await _stoppable(
                stop, partial(trio.to_thread.run_sync, call, stop, limiter=self._fills)
            )
        except errors.ConnectionLost as error:
            self._note_loss(error)
            raise
        self._note_success()

    async def _connecting(
        self,
        call: Callable[[Attempt], T],
        attempt: Attempt | None = None,
        beside: bool = False,
    ) -> T:
        """Run `call`, which connects, in a thread.

        Args:
            call: makes the attempt.
            attempt: the attempt, if others look at it.
            beside: whether others ask the same meanwhile, so that its failure says little.

        Raises:
            Busy: the server takes one connection at a time, and readers have it.
        Cancellation: the thread goes on by itself, because libnbd resolves the host's name in a
            call that cannot be interrupted. What the thread connects is closed with its result.
        """
        attempt = attempt or self.attempt()
        try:
            result = await trio.to_thread.run_sync(
                _without_frames, partial(call, attempt),
                limiter=self._connects, abandon_on_cancel=True,
            )  # fmt: skip
        except errors.ConnectionLost as error:
            lost = error
        else:
            self._note_success()
            self._sole.note_connected()
            return result
        finally:
            attempt.abandoned.set()
        # Any other failure says something else than that the server has a client already.
        wordless = isinstance(lost, errors.Silent | errors.HungUp) and not attempt.greeted.is_set()
        if wordless and await self._sole.is_in_use():
            raise errors.Busy(self.uri)
        if not beside:
            self._note_loss(lost)
        raise lost.again()

    def _note_loss(self, error: errors.ConnectionLost) -> None:
        """Note that the repository cannot be reached, if that is what it means."""
        if isinstance(error, errors.ExportRefused | errors.Busy):
            return
        if self.connected or not self.trouble:
            logger.warning("repository lost: %s", error)
        self.connected, self.trouble = False, str(error)
        self._failures += 1

    def _note_success(self) -> None:
        """Note that the repository can be reached."""
        if not self.connected and self.trouble:
            self.reconnects += 1
            logger.info("repository %s is back", self.uri)
        self.connected, self.trouble = True, ""


def _without_frames(call: Callable[[], T]) -> T:
    """Return what `call` returns. If it fails, raise the same error without its frames.

    The frames hold the connection that has failed, and trio keeps an error that a thread has raised
    until the next collection of garbage. A server may take no other connection until then.
    """
    try:
        return call()
    except errors.LazyfsError as error:
        fresh = error.again()
    raise fresh


async def _stoppable(stop: threading.Event, call: Callable[[], Awaitable[T]]) -> T:
    """Await `call`, which runs a thread that cannot be cancelled.

    If this task is cancelled, set `stop`, and wait for the thread.
    """

    async def relay() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop.set()

    return await call_beside(relay, call)
