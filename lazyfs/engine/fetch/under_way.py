"""Limits how many bytes demand fetches have under way, so that an outage costs little memory.

A fetch needs memory for what it asks for, twice: a buffer for libnbd, and one for its readers. Two
thousand readers of 1 MiB that wait for a repository would take 4 GiB. So a fetch that has no room
waits in a queue, without memory. Each image may always have one fetch under way, so that images
whose repository hangs do not hold up the others.
"""

from collections import deque
from collections.abc import Callable

from lazyfs.units import MiB

MOST_OF_AN_IMAGE = 16 * MiB
"""More than a link of 1 GB/s and 10 ms has under way."""
MOST = 64 * MiB
"""For all images together, apart from the one fetch that each image may have. With the second
buffer it is half of the 256 MiB that an outage may cost."""


class UnderWay:
    """Counts what all images of a mount have under way. Trio thread only."""

    def __init__(self) -> None:
        """Begin with nothing under way."""
        self.total = 0


class ImageUnderWay:
    """Starts the fetches of one image in order, as soon as there is room. Trio thread only."""

    def __init__(self, mount: UnderWay) -> None:
        """Begin with nothing under way.

        Args:
            mount: what all images have under way.
        """
        self._mount = mount
        self._mine = 0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._starting = False

    def start(self, size: int, begin: Callable[[], None]) -> bool:
        """Call `begin` at once, or later when there is room for `size` bytes.

        `end` must be called for each fetch that was begun. `begin` may not raise.

        Returns:
            Whether it was called at once.
        """
        if not self._waiting and self._has_room(size):
            self._begin(size, begin)
            return True
        self._waiting.append((size, begin))
        return False

    def end(self, size: int) -> None:
        """Note that a fetch of `size` bytes has ended, and begin those that have room now."""
        self._mine -= size
        self._mount.total -= size
        if self._starting:
            return  # `begin` has ended a fetch at once; the loop below goes on
        self._starting = True
        try:
            while self._waiting and self._has_room(self._waiting[0][0]):
                self._begin(*self._waiting.popleft())
        finally:
            self._starting = False

    def _has_room(self, size: int) -> bool:
        within = self._mine + size <= MOST_OF_AN_IMAGE and self._mount.total + size <= MOST
        return within or not self._mine

    def _begin(self, size: int, begin: Callable[[], None]) -> None:
        self._mine += size
        self._mount.total += size
        begin()
