"""A cache file that is none: for an image that is read while the cache's disk has no room for its map."""

from collections.abc import Iterable

from lazyfs import errors
from lazyfs.core.block_map import BlockMap


class UnkeptStore:
    """Stands in for a store when there is no room even for its map: no data is kept, and so only zeroes are present."""

    def load(self) -> BlockMap:
        """Nothing to load."""
        raise errors.StateError("not loaded")

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Only zeroes can be present."""
        return bytes(length)

    def read(self, offset: int, length: int) -> bytes:
        """Only zeroes can be present."""
        return bytes(length)

    def write(self, offset: int, data: memoryview, keep: bool = True) -> None:
        """Nothing is kept."""
        raise errors.NoSpace

    def checkpoint(self, pages: Iterable[tuple[int, bytes]], mixed_zero_bytes: int) -> None:
        """Nothing to save."""

    def disown(self) -> None:
        """Nobody could open it."""

    def finish(self) -> None:
        """Never complete."""
        raise errors.NoSpace

    def unfinish(self) -> None:
        """Nothing to take back."""

    def remove(self) -> None:
        """Nothing to remove."""

    def close(self) -> None:
        """Nothing to close."""
