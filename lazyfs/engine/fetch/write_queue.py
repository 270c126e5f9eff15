"""Queues what readers were already given until it is written to the cache files.

A reader waits neither for the disk nor for its bytes to be handed to a thread, which takes the
event loop 60 us. The bytes stay in this queue until the replies are sent. Then they go to a thread
together with whatever else has come.
"""

import logging
from collections.abc import Callable

import trio

from lazyfs.units import MiB

logger = logging.getLogger(__name__)

MAX_WAITING = 16 * MiB
"""How many bytes may wait for a disk that is slower than the repository. Readers of anything beyond
that wait with it. Measured by reading 1 GiB in order: 8 MiB let through a tenth less than 16 and
32."""


class WriteQueue:
    """Carries out the writes of one mount, one after the other. Trio thread only.

    A file takes only one write at a time anyway.
    """

    def __init__(self, nursery: trio.Nursery, limiter: trio.CapacityLimiter) -> None:
        """Work until `nursery` is cancelled. Writes that wait then, or come later, are carried out
        at once.

        Args:
            nursery: runs the queue.
            limiter: limits the thread that writes. Nobody else may use it, because a write must not
                wait behind readers of a disk that stalls.
        """
        self._limiter = limiter
        self._ended = False
        self._writes: list[tuple[int, Callable[[], None]]] = []
        self._some = trio.Event()
        self._waiting = 0
        nursery.start_soon(self._run)

    @property
    def full(self) -> bool:
        """True if readers should wait until what they have read is written."""
        return self._waiting >= MAX_WAITING

    def put(self, size: int, write: Callable[[], None]) -> None:
        """Call `write` in a thread, soon.

        Args:
            size: the bytes that `write` keeps in memory.
            write: writes to a cache file.
        """
        if self._ended:
            _call([write])
            return
        self._waiting += size
        self._writes.append((size, write))
        self._some.set()

    async def _run(self) -> None:
        try:
            while True:
                await self._some.wait()
                await trio.lowlevel.checkpoint()  # let the readers be answered first
                self._some = trio.Event()
                batch, self._writes = self._writes, []
                size = sum(size for size, _ in batch)
                writes = [write for _, write in batch]
                del batch
                await self._write(writes)
                self._waiting -= size
        finally:
            # Whoever ends the daemon waits for these writes (`DemandReader.written`), also when a
            # bug has ended the nursery.
            self._ended = True
            _call([write for _, write in self._writes])

    async def _write(self, writes: list[Callable[[], None]]) -> None:
        """Call `writes` in a thread.

        They are called whatever happens, because each of them ends a claim on blocks.
        """
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_call, writes, limiter=self._limiter)
        except Exception:
            logger.exception("no thread could be had; what was fetched is written without one")
            _call(writes)


def _call(writes: list[Callable[[], None]]) -> None:
    """Call the writes, and drop each afterwards, because it keeps what it wrote in memory."""
    while writes:
        try:
            writes.pop(0)()
        except Exception:
            logger.exception("a write to the cache failed, a bug in lazyfs")
