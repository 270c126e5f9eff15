"""What readers were given already, on its way to the cache files.

A reader does not wait for the disk, nor for its bytes to be handed to a thread, which takes the event loop 60 us: they
lie here until the replies are sent, and go to a thread with what else has come.
"""

from collections.abc import Callable

import trio

from lazyfs.units import MiB

MAX_WAITING = 16 * MiB
"""What may wait for a disk that is slower than the repository; the readers of what comes on top wait with it.
Measured, 1 GiB in order: 8 MiB let through a tenth less than 16 and 32."""


class WriteQueue:
    """The writes of one mount, one after the other: a file takes one at a time anyway. Trio thread only."""

    def __init__(self, nursery: trio.Nursery) -> None:
        """Work until `nursery` is cancelled; what waits then is not written."""
        self._writes: list[tuple[int, Callable[[], None]]] = []
        self._some = trio.Event()
        self._waiting = 0
        nursery.start_soon(self._run)

    @property
    def full(self) -> bool:
        """Whether readers should wait until what they read is written."""
        return self._waiting >= MAX_WAITING

    def put(self, size: int, write: Callable[[], None]) -> None:
        """Have `write` called in a thread, soon; it raises nothing. `size`: the bytes it keeps in memory."""
        self._waiting += size
        self._writes.append((size, write))
        self._some.set()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            await trio.lowlevel.checkpoint()  # the readers' turn
            self._some = trio.Event()
            writes, self._writes = self._writes, []
            await trio.to_thread.run_sync(_call, writes)
            self._waiting -= sum(size for size, _ in writes)


def _call(writes: list[tuple[int, Callable[[], None]]]) -> None:
    for _, write in writes:
        write()
