"""Reads one export on demand, over connections that come back after every loss."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.pacing import Backoff
from lazyfs.engine.interfaces import Answered, Export, Samples
from lazyfs.repository import nbd_handle

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Connects(Protocol):
    """What a source needs of the repository."""

    async def connect_export(self, export: Export, samples: Samples) -> nbd_handle.NbdHandle:
        """Return a running connection to `export`.

        Raises:
            ConnectionLost, Unsupported, ExportChanged.
        """
        ...


class NbdSource:
    """Reads one export on a demand connection.

    It is made when it is first used, and made again when it is lost.
    """

    def __init__(self, repository: Connects, export: Export, samples: Samples) -> None:
        self._repository = repository
        self._export = export
        self._samples = samples
        self._handle: nbd_handle.NbdHandle | None = None
        self._connecting = trio.Lock()
        self._backoff = Backoff()
        self._next_attempt = -math.inf
        self.trouble = ""
        """Why the latest attempt has failed, as `interfaces.Source.trouble` describes."""
        self._fragmented = False
        """True if the server's answers about data and holes are not to be asked for again."""
        self._calls: set[object] = set()
        """A token for each `pread` and `block_status` under way."""
        self._dropped: set[object] = set()
        """The tokens of those calls during which `drop_connection` was called. When the last of
        all calls ends, it closes what they have connected."""

    def submit(self, offset: int, buffer: memoryview, answered: Answered) -> bool:
        """Ask for bytes as `interfaces.Source.submit` describes."""
        return self._handle is not None and self._handle.submit(offset, buffer, answered)

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` as `interfaces.Source.pread` describes."""
        await self._retry(lambda handle: handle.pread(offset, buffer))

    async def compare(self) -> None:
        """Compare the samples as `interfaces.Source.compare` describes."""
        for sample in await trio.to_thread.run_sync(self._samples):
            theirs = bytearray(len(sample.data))
            try:
                await self.pread(sample.offset, memoryview(theirs))
            except errors.RequestFailed:
                continue  # the server cannot read it, which says nothing about its content
            sample.check_same(self._export.name, theirs)

    async def block_status(self, window: ByteRange) -> list[ByteRange]:
        """Return ranges of data as `interfaces.Source.block_status` describes."""
        if self._fragmented:
            return [window]
        try:
            return await self._retry(lambda handle: handle.block_status(window))
        except errors.Fragmented as error:
            logger.warning("not asked again: export=%s reason=%s", self._export.name, error.reason)
            self._fragmented = True
            return [window]  # as of a server that cannot tell

    def drop_connection(self) -> None:
        """Close the connection as `interfaces.Source.drop_connection` describes.

        An attempt to connect that is under way goes on for its caller, who still waits.
        """
        self._dropped |= self._calls
        self._close_handle()

    def _close_handle(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    async def _retry(self, attempt: Callable[[nbd_handle.NbdHandle], Awaitable[T]]) -> T:
        self._calls.add(call := object())
        try:
            while True:
                try:
                    result = await attempt(await self._connected())
                except errors.Fragmented:
                    raise
                except errors.ConnectionLost as error:
                    logger.debug(
                        "demand connection lost: export=%s reason=%s",
                        self._export.name,
                        error.reason,
                    )
                    self.trouble = error.reason
                    self._note_failure()
                    await trio.sleep_until(self._next_attempt)
                else:
                    self.trouble = ""
                    self._backoff.reset()
                    return result
        finally:
            self._calls.remove(call)
            if call in self._dropped:
                self._dropped.remove(call)
                if not self._calls:
                    self._close_handle()

    def _note_failure(self) -> None:
        """Put off the next attempt.

        This is done once for all callers that wait, so that twenty readers do not count as twenty
        failures.
        """
        if trio.current_time() >= self._next_attempt:
            self._next_attempt = trio.current_time() + self._backoff.next()

    async def _connected(self) -> nbd_handle.NbdHandle:
        async with self._connecting:
            if self._handle is None or self._handle.broken:
                self._handle = None
                # The task that had the lock before may have failed meanwhile. There is one attempt
                # at a time, for whichever task waits.
                await trio.sleep_until(max(self._next_attempt, trio.current_time()))
                try:
                    self._handle = await self._repository.connect_export(
                        self._export, self._samples
                    )
                except errors.ConnectionLost:
                    self._note_failure()
                    raise
            return self._handle
