"""Buffers for libnbd's `aio_pread`, which the whole process shares and uses again.

libnbd's Python module never releases the buffer of an `aio_pread`. (In version 1.14.2, each of 200
requests of 1 MiB takes 1 MiB for good, whether the buffer is its own or ours.) So buffers are not
freed but used again, and the view that a request was given is kept as well. Then all that a request
leaves behind is a reference count. This is also faster: memory that the process has not touched
before costs more than reading the bytes into it.
"""

import mmap
import threading

import nbd

from lazyfs.units import KiB

SMALLEST = 64 * KiB

MAX_FREE = 16
"""How many free buffers of one size keep their memory. A burst of readers can need more buffers;
their memory goes back to the system afterwards."""

MAX_VIEWS = 64
"""How many views of one buffer are kept, one for each length that its requests have had. Exports
with many small holes have more lengths. Then views are made anew, and each leaves 200 bytes
behind."""


class NbdBuffer:
    """Holds a piece of memory that libnbd reads into."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = memoryview(self._map)
        self._views: dict[tuple[int, int], memoryview] = {}

    def let_go(self) -> None:
        """Give the memory back to the system. The buffer stays usable and contains zeroes."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def target(self, start: int, end: int) -> nbd.Buffer:
        """Return the object that `aio_pread` accepts for the bytes from `start` to `end`."""
        view = self._views.get((start, end))
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            view = self._views[start, end] = self.memory[start:end]
        return nbd.Buffer.from_buffer(view)


_free: dict[int, list[NbdBuffer]] = {}
_lock = threading.Lock()


def take(size: int) -> NbdBuffer:
    """Return a buffer of at least `size` bytes. Thread-safe.

    Raises:
        OSError: there is not enough memory.
    """
    capacity = max(SMALLEST, 1 << (size - 1).bit_length())
    with _lock:
        free = _free.setdefault(capacity, [])
        if free:
            return free.pop()
    return NbdBuffer(capacity)


def give(buffer: NbdBuffer) -> None:
    """Give back a buffer to which no request under way writes. Thread-safe."""
    with _lock:
        free = _free[len(buffer.memory)]
        many = len(free) >= MAX_FREE
        if not many:
            free.append(buffer)
    if many:
        buffer.let_go()
        with _lock:
            free.insert(0, buffer)  # `take` uses this one last, because it has no memory.
