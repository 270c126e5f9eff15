"""Buffers for libnbd's `aio_pread`, for the whole process: taken, given back, used again.

libnbd's Python module never lets go of the buffer of an `aio_pread` (1.14.2: each of 200 requests of 1 MiB takes 1 MiB
for good, with a buffer of its own or of ours). So buffers are not freed but used again, and the view that a request is
given is kept as well: then all that a request leaves behind is a reference count. It is also faster: memory that the
process has not touched yet costs more than the bytes that are read into it.
"""

import mmap
import threading
from typing import Any

import nbd

from lazyfs.units import KiB

SMALLEST = 64 * KiB

MAX_FREE = 16
"""Of one size that keep their memory; what a storm of readers needed beyond goes back to the system."""

MAX_VIEWS = 64
"""Of one buffer: the lengths that its requests have had. More come from exports with many small holes; then views are
made anew, and each leaves 200 bytes behind."""


class NbdBuffer:
    """Memory that libnbd reads into."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = memoryview(self._map)
        self._views: dict[tuple[int, int], memoryview] = {}

    def let_go(self) -> None:
        """Give the memory back to the system; the buffer stays, with zeroes in it."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def target(self, start: int, end: int) -> Any:
        """Return what `aio_pread` takes for the bytes from `start` to `end`."""
        view = self._views.get((start, end))
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            view = self._views[start, end] = self.memory[start:end]
        return nbd.Buffer.from_buffer(view)


_free: dict[int, list[NbdBuffer]] = {}
_lock = threading.Lock()


def take(size: int) -> NbdBuffer:
    """Return a buffer of at least `size` bytes. From any thread. Raises OSError if there is no memory."""
    capacity = max(SMALLEST, 1 << (size - 1).bit_length())
    with _lock:
        free = _free.setdefault(capacity, [])
        if free:
            return free.pop()
    return NbdBuffer(capacity)


def give(buffer: NbdBuffer) -> None:
    """Give back a buffer that no request under way writes to. From any thread."""
    with _lock:
        free = _free[len(buffer.memory)]
        many = len(free) >= MAX_FREE
        if not many:
            free.append(buffer)
    if many:
        buffer.let_go()
        with _lock:
            free.insert(0, buffer)  # taken again last
