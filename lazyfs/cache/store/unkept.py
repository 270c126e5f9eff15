"""A store without files.

It serves an image that is read while the cache's disk has no space even for the image's map.
"""

from collections.abc import Iterable

from lazyfs import errors
from lazyfs.core.block_map import BlockMap


class UnkeptStore:
    """Replaces a store when there is no space even for its map.

    It keeps no data, so only zeroes can be present.
    """

    def fileno(self) -> int:
        """Return -1: there is no file."""
        return -1

    def load(self) -> BlockMap:
        """Raise StateError: this store is never loaded."""
        raise errors.StateError("not loaded")

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Return zeroes, because nothing else can be present."""
        return bytes(length)

    def read(self, offset: int, length: int) -> bytes:
        """Return zeroes, because nothing else can be present."""
        return bytes(length)

    def write(self, offset: int, data: memoryview, keep: bool = True) -> None:
        """Raise NoSpace: this store keeps nothing."""
        raise errors.NoSpace

    def checkpoint(self, pages: Iterable[tuple[int, bytes]], mixed_zero_bytes: int) -> None:
        """Do nothing, because there is nothing to save."""

    def disown(self) -> None:
        """Do nothing, because there is no file that another program could open."""

    def finish(self) -> None:
        """Raise NoSpace: this store never becomes complete."""
        raise errors.NoSpace

    def unfinish(self) -> None:
        """Do nothing, because `finish` never did anything."""

    def remove(self) -> None:
        """Do nothing, because there are no files."""

    def close(self) -> None:
        """Do nothing, because there are no files."""
