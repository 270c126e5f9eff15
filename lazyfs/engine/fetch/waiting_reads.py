"""Shares out among images how many reads of a mount may wait.

The kernel has a limited number of background requests of a mount under way. Reads that wait for the
repository must not take all of them, or reads of what is present would wait as well. Anybody may
read, and start any number of threads.
"""

DEFAULT = 16384
"""What is assumed if nobody says how many the kernel has under way. `daemon.py` does."""

FEW = 64
"""So many reads of an image may wait however many others do: as many as a VM has in flight."""


class WaitingReads:
    """Counts the reads of one mount that wait, by image. Trio thread only."""

    def __init__(self, queue: int = DEFAULT) -> None:
        """Leave an eighth of `queue`, the requests under way, for reads that do not wait.

        The eighth before is for images that have few reads waiting.
        """
        self._most = max(1, queue * 3 // 4)
        self._end = max(1, queue * 7 // 8)
        self._all = 0
        self._images: dict[object, int] = {}

    def may_wait(self, image: object) -> bool:
        """Return whether another read of an image may wait.

        An image may have all that is free while no other has reads waiting. Once all is taken,
        those that have more than their share get nothing more, and others still do.
        """
        mine = self._images.get(image, 0)
        if self._all < self._most:
            return True
        if self._all >= self._end:
            return False
        share = self._most // max(1, len(self._images) + (image not in self._images))
        return mine < min(FEW, share)

    def begin(self, image: object) -> None:
        """Count a read that waits."""
        self._all += 1
        self._images[image] = self._images.get(image, 0) + 1

    def end(self, image: object) -> None:
        """Count it no more."""
        self._all -= 1
        left = self._images[image] - 1
        if left:
            self._images[image] = left
        else:
            del self._images[image]
