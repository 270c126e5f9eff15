"""Implements the repository over NBD.

It lists the exports, and makes connections that come back after every loss.
"""

import logging
import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
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
from lazyfs.repository.fill_thread import FillConnection
from lazyfs.repository.nbd_filler import NbdFiller
from lazyfs.repository.nbd_source import NbdSource
from lazyfs.units import MiB

logger = logging.getLogger(__name__)

MAX_EXPORTS = 1_000_000
"""If one server lists more names than this, the rest is dropped, because the server is broken or
hostile."""

STALL_S = 20.0
"""The longest time without any byte after which a connection is given up, however long readers
may wait. It is unmeasured: a server that needs longer for the first byte is asked again."""

GIVE_WAY_S = 1.0
"""After so long, a reader who cannot connect is given the connections of population."""

ALONE_S = 60.0
"""How long a server that takes one connection is not asked for another. All are unmeasured."""

DESCRIBE_S = 5.0
"""How long the description of one export may take. It is unmeasured: nbdkit and nbd-server answer
in milliseconds, and one that opens a remote disk in a second or two."""

DESCRIBING = 8
"""How many connections describe exports at the same time, once one has given no answer."""

MAX_NAMES_LENGTH = 64 * MiB
"""The most characters that all names may have together. With a million names of 4 KiB the list
alone would take 4 GiB."""

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
        """When the latest byte has come that a reader or population has asked for, by trio's clock.
        """
        self.listed_at = -math.inf
        """When the latest name of a list has come, by `time.monotonic`."""
        self.reconnects = 0
        self._failures = 0
        self._names_per_connection = MAX_EXPORTS
        """How many exports the server describes on one connection. It is lowered when the server
        hangs up earlier."""
        self._running: weakref.WeakValueDictionary[str, nbd_handle.NbdHandle] = (
            weakref.WeakValueDictionary()
        )
        self._fillers: weakref.WeakSet[NbdFiller] = weakref.WeakSet()
        self._alone_until = -math.inf
        self._listed: list[str] = []
        self._some_hang = False
        """True once an export has given no answer."""
        self._nursery = nursery
        self._stall_s = min(io_timeout_s / 3, STALL_S)
        self._io_timeout_s = io_timeout_s
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
        if self.alone and any(not one.broken for one in self._running.values()):
            return list(self._listed)  # that connection would have to be closed
        names, unreadable, dropped = await self._connecting(self._list)
        self._listed = list(names)
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

    def _list(self, abandoned: threading.Event) -> tuple[list[str], int, int]:
        """Return the names, how many more could not be decoded, and how many were dropped."""
        handle = nbd_connect.connect(self.uri, abandoned)
        names: list[str] = []
        length = dropped = 0

        def found(name: str, _description: str) -> int:
            nonlocal length, dropped
            if len(names) >= MAX_EXPORTS or length >= MAX_NAMES_LENGTH:
                dropped += 1  # this does not count as progress, so an endless list is cut off
                return 0
            watchdog.progress()
            self.listed_at = time.monotonic()
            names.append(name)
            length += len(name)
            return 0

        try:
            with nbd_connect.Watchdog(handle, self.uri, abandoned) as watchdog:
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
        """Describe exports, as `interfaces.Repository.describe` does.

        Once an export has given no answer, several connections are used at the same time, so that
        a few of that kind do not hold up the others.
        """
        names = list(dict.fromkeys(names))
        found: dict[str, Export | str] = {}
        failures: list[errors.LazyfsError] = []

        async def some(part: Sequence[str]) -> None:
            try:
                found.update(await self._connecting(partial(self._describe, part)))
            except errors.LazyfsError as error:
                failures.append(error.again())

        parts = DESCRIBING if self._some_hang else 1
        async with trio.open_nursery() as nursery:
            for number in range(min(parts, len(names))):
                nursery.start_soon(some, names[number::parts])
        if failures and not found:
            raise failures[0]
        for name in names:
            found.setdefault(name, str(failures[0]) if failures else "no answer")
        return found

    def _describe(
        self, names: Sequence[str], abandoned: threading.Event
    ) -> dict[str, Export | str]:
        """Describe exports on as few connections as the server allows.

        nbdkit 1.32 hangs up after 32 options on one connection. An export that gives no answer
        takes its connection with it.
        """
        found: dict[str, Export | str] = {}
        lost: errors.ExportRefused | None = None
        # A single export has more time: its caller waits for it, and for nothing else.
        limit_s = DESCRIBE_S if len(names) > 1 else None
        hung_up_after = 0
        while len(found) < len(names):
            before, asked = len(found), ""
            handle = nbd_connect.connect(self.uri, abandoned)
            try:
                with nbd_connect.Watchdog(handle, self.uri, abandoned, limit_s) as watchdog:
                    for asked in names[before : before + self._names_per_connection]:
                        found[asked] = _describe_one(handle, asked)
                        watchdog.progress()
                        if hung_up_after:  # that was not because of this export
                            self._names_per_connection = max(1, hung_up_after - 1)
                            hung_up_after = 0
                    handle.opt_abort()
            except errors.ConnectionLost as error:
                if abandoned.is_set() or len(found) == len(names):
                    raise
                self._some_hang = True
                found[asked] = error.reason
                lost = errors.ExportRefused(self.uri, f"export {asked!r}: {error.reason}")
            except nbd.Error as error:
                reason = nbd_connect.reason(error)
                if len(found) > before:  # it is asked first on the next connection
                    hung_up_after = len(found) - before
                else:
                    found[asked] = f"the server hangs up: {reason}"
                    lost = errors.ExportRefused(self.uri, f"export {asked!r}: {found[asked]}")
                    hung_up_after = 0
        if lost is not None and not any(isinstance(one, Export) for one in found.values()):
            raise lost
        return {
            name: self._asked_by_go(name, abandoned)
            if isinstance(export, Export) and not export.size
            else export
            for name, export in found.items()
        }

    def _asked_by_go(self, name: str, abandoned: threading.Event) -> Export | str:
        """Describe an export by opening it.

        Debian's nbd-server 3.24 answers NBD_OPT_INFO with the size 0.
        """
        try:
            return nbd_connect.connect_export(self.uri, name, abandoned)[1]
        except errors.ConnectionLost as error:
            return error.reason

    def source(self, export: Export, samples: Samples = no_samples) -> Source:
        """Return a source, as `interfaces.Repository.source` does."""
        return NbdSource(self, export, samples)

    def filler(self, export: Export, samples: Samples = no_samples) -> Filler:
        """Return a filler, as `interfaces.Repository.filler` does."""
        filler = NbdFiller(self, FillConnection(self.uri, export, self._stall_s), samples)
        self._fillers.add(filler)
        return filler

    async def _fillers_give_way(self) -> None:
        """After a while, close the connections of population, as the server may allow no other."""
        await trio.sleep(GIVE_WAY_S)
        holding = [filler for filler in self._fillers if filler.holds_connection]
        if holding:
            self.note_alone()
        for filler in holding:
            filler.give_way()

    async def connect_export(
        self, export: Export, samples: Samples = no_samples
    ) -> nbd_handle.NbdHandle:
        """Return a running connection to `export`. Raises what `connect` raises."""
        running = nbd_handle.NbdHandle(
            await call_beside(self._fillers_give_way, partial(self.connect, export, samples)),
            self.uri,
            export.name,
            self._stall_s,
            self._io_timeout_s,
        )
        running.on_progress = self._heard
        self._running[export.name] = running
        self._nursery.start_soon(running.run)
        return running

    def running(self, name: str) -> nbd_handle.NbdHandle | None:
        """Return the demand connection to an export, if there is one that works."""
        found = self._running.get(name)
        return None if found is None or found.broken else found

    def note_alone(self) -> None:
        """Note that the server seems to allow one connection only, as qemu-nbd does by default."""
        if not self.alone:
            logger.info("%s takes one connection at a time: readers share it", self.uri)
        self._alone_until = trio.current_time() + ALONE_S

    @property
    def alone(self) -> bool:
        """True while the server seems to allow one connection only."""
        return trio.current_time() < self._alone_until

    def _heard(self) -> None:
        self.heard_at = trio.current_time()

    async def connect(self, export: Export, samples: Samples = no_samples) -> nbd.NBD:
        """Return a libnbd handle that is ready to read `export`.

        Raises:
            ConnectionLost, Unsupported: as for `nbd_connect.connect_export`.
            ExportChanged: the server has another version. The connection is closed.
        """
        return await self._connecting(partial(self._connect, export, samples))

    def _connect(self, export: Export, samples: Samples, abandoned: threading.Event) -> nbd.NBD:
        handle, found = nbd_connect.connect_export(self.uri, export.name, abandoned)
        try:
            export.check_same(found)
            if taken := samples():
                nbd_connect.compare(handle, self.uri, export.name, taken, abandoned)
        except errors.LazyfsError:
            del handle  # otherwise the traceback of this error would keep the connection open
            raise
        return handle

    async def fill(
        self,
        connection: FillConnection,
        work: FillWork,
        duration_s: float,
        stop: threading.Event,
    ) -> None:
        """Run `connection` in a thread until all its claims have ended, or until `stop` is set."""
        call = partial(connection.run, work, duration_s)
        with self._noting():
            await _stoppable(
                stop, partial(trio.to_thread.run_sync, call, stop, limiter=self._fills)
            )

    async def _connecting(self, call: Callable[[threading.Event], T]) -> T:
        """Run `call`, which connects, in a thread. It is given an event that tells it to stop.

        Cancellation: the thread goes on by itself, because libnbd resolves the host's name in a
            call that cannot be interrupted. What the thread connects is closed with its result.
        """
        stop = threading.Event()
        try:
            with self._noting():
                return await trio.to_thread.run_sync(
                    call, stop, limiter=self._connects, abandon_on_cancel=True
                )
        finally:
            stop.set()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note whether the repository can be reached."""
        try:
            yield
        except errors.ExportRefused:
            raise  # this says nothing about whether the server can be reached
        except errors.ConnectionLost as error:
            if self.connected or not self.trouble:
                logger.warning("repository lost: %s", error)
            self.connected, self.trouble = False, str(error)
            self._failures += 1
            raise
        if not self.connected and self.trouble:
            self.reconnects += 1
            logger.info("repository %s is back", self.uri)
        self.connected, self.trouble = True, ""


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
