"""What readers were given already, on its way to the cache files.

A reader does not wait for the disk, nor for its bytes to be handed to a thread, which takes the
event loop 60 us: they lie here until the replies are sent, and go to a thread with what else has
come.
"""

import logging
from collections.abc import Callable

import trio

from lazyfs.units import MiB

logger = logging.getLogger(__name__)

MAX_WAITING = 16 * MiB
"""What may wait for a disk that is slower than the repository; the readers of what comes on top
wait with it. Measured, 1 GiB in order: 8 MiB let through a tenth less than 16 and 32."""


class WriteQueue:
    """The writes of one mount, one after the other: a file takes one at a time anyway. Trio thread
    only."""

    def __init__(self, nursery: trio.Nursery, limiter: trio.CapacityLimiter) -> None:
        """Work until `nursery` is cancelled; what waits then, or comes later, is written at once.

        Args:
            limiter: of the thread that writes. Nobody else may use it: a write must not wait behind
                readers of a disk that stalls.
        """
        self._limiter = limiter
        self._ended = False
        self._writes: list[tuple[int, Callable[[], None]]] = []
        self._some = trio.Event()
        self._waiting = 0
        nursery.start_soon(self._run)

    @property
    def full(self) -> bool:
        """Whether readers should wait until what they read is written."""
        return self._waiting >= MAX_WAITING

    def put(self, size: int, write: Callable[[], None]) -> None:
        """Have `write` called in a thread, soon. `size`: the bytes it keeps in memory."""
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
                await trio.lowlevel.checkpoint()  # the readers' turn
                self._some = trio.Event()
                batch, self._writes = self._writes, []
                size = sum(size for size, _ in batch)
                writes = [write for _, write in batch]
                del batch
                await self._write(writes)
                self._waiting -= size
        finally:
            # Whoever ends the daemon waits for them (`Fetcher.written`), also when a bug has ended
            # the nursery.
            self._ended = True
            _call([write for _, write in self._writes])

    async def _write(self, writes: list[Callable[[], None]]) -> None:
        """Call `writes` in a thread. They are called whatever happens: each ends a claim on blocks."""
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_call, writes, limiter=self._limiter)
        except Exception:
            logger.exception("no thread could be had; what was fetched is written without one")
            _call(writes)


def _call(writes: list[Callable[[], None]]) -> None:
    """Call them, and let go of each: what it wrote is in memory until then."""
    while writes:
        try:
            writes.pop(0)()
        except Exception:
            logger.exception("a write to the cache failed, a bug in lazyfs")
