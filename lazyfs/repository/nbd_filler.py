"""Fills one image, on a connection of its own where the server allows that."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

import nbd
import trio

from lazyfs import errors
from lazyfs.engine.interfaces import Export, FillWork, Samples
from lazyfs.repository import nbd_handle
from lazyfs.repository.fill_thread import REQUEST, FillConnection
from lazyfs.repository.nbd_connect import Attempt

logger = logging.getLogger(__name__)

SECOND_S = 5.0
"""How long population waits for a connection beside that of readers before it uses theirs."""


class Shares(Protocol):
    """What a filler needs of the connections to its server."""

    @property
    def seen(self) -> bool:
        """True while the server seems to take one connection only."""
        ...

    def note(self) -> None:
        """Note that the server seems to take one connection only."""
        ...

    def reader(self, export: str) -> nbd_handle.NbdHandle | None:
        """Return the demand connection of an export, if there is one that works."""
        ...


class Connects(Protocol):
    """What a filler needs of the repository."""

    def attempt(self) -> Attempt:
        """Return a new attempt to connect."""
        ...

    async def connect(self, export: Export, samples: Samples, attempt: Attempt) -> nbd.NBD:
        """Return a libnbd handle that is ready to read `export`.

        Raises:
            ConnectionLost, Unsupported, ExportChanged.
        """
        ...

    async def fill(
        self,
        connection: FillConnection,
        work: FillWork,
        duration_s: float,
        stop: threading.Event,
    ) -> None:
        """Run `connection` in a thread until all its claims have ended, or until `stop` is set."""
        ...

    async def write(self, write: Callable[[], None]) -> None:
        """Write to the cache in a thread."""
        ...


class NbdFiller:
    """Runs a fill connection in a thread for each turn."""

    def __init__(
        self,
        repository: Connects,
        shares: Shares,
        connection: FillConnection,
        samples: Samples,
    ) -> None:
        self._repository = repository
        self._shares = shares
        self._connection = connection
        self._samples = samples
        self._stop = threading.Event()
        self._gives_way = False
        self._running_turn = False

    async def run(self, work: FillWork, duration_s: float) -> None:
        """Work as `interfaces.Filler.run` describes.

        If the server takes no connection beside that of the readers, theirs is used.
        """
        shares, export = self._shares, self._connection.export
        self._stop = stop = threading.Event()
        self._gives_way = False
        if not self._connection.connected:
            readers = shares.reader(export.name)
            if readers is None:
                await self._connect(self._repository.attempt())
            elif shares.seen or not await self._connected_beside():
                shares.note()
                await self._share(readers, work, duration_s)
                return
        self._running_turn = True
        try:
            await self._repository.fill(self._connection, work, duration_s, stop)
        finally:
            self._running_turn = False
            if self._gives_way:
                self._connection.close()

    async def _connect(self, attempt: Attempt) -> None:
        handle = await self._repository.connect(self._connection.export, self._samples, attempt)
        self._connection.adopt(handle)

    async def _connected_beside(self) -> bool:
        """Connect, although readers have a connection; return whether the server allows that.

        Raises:
            ConnectionLost: it does, but does not give this export.
        """
        attempt = self._repository.attempt()
        lost: errors.ConnectionLost = errors.ExportRefused(
            "the repository", f"no answer about an export in {SECOND_S:g} s"
        )
        with trio.move_on_after(SECOND_S):
            try:
                await self._connect(attempt)
            except errors.ConnectionLost as error:
                logger.debug("no second connection: %s", error)
                lost = error
            else:
                return True
        if attempt.greeted.is_set():
            raise lost
        return False

    async def _share(
        self, readers: nbd_handle.NbdHandle, work: FillWork, duration_s: float
    ) -> None:
        """Fetch claims through the connection of the readers, one after the other."""
        until = trio.current_time() + duration_s
        while trio.current_time() < until:
            claim = work.claim(REQUEST)
            if claim is None:
                return
            if isinstance(claim, float):
                await trio.sleep(claim)
                continue
            error: Exception | None = None
            try:
                for part in claim.parts:
                    buffer = memoryview(bytearray(part.length))
                    await readers.pread(part.start, buffer)
                    await self._repository.write(partial(claim.write, part.start, buffer))
                claim.finish()
            except (errors.RequestFailed, errors.NoSpace, OSError) as failed:
                error = failed
            finally:
                claim.drop(error)

    @property
    def holds_connection(self) -> bool:
        """True if a reader may wait for the connection of this filler."""
        return self._connection.connected

    def give_way(self) -> None:
        """End the turn under way, and close the connection, so that a reader can have it."""
        self._gives_way = True
        self._stop.set()
        if not self._running_turn:
            self._connection.close()

    async def aclose(self) -> None:
        """Drop the connection."""
        self._connection.close()
