"""Limits the memory that the maps of open images take together.

A map has a byte for each block, and the sizes of images are chosen by the repository. Maps exist as
long as somebody refers to them, so they are looked up and not counted.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from lazyfs import errors
from lazyfs.core.block_map import BlockMap
from lazyfs.units import GiB, format_size

LIMIT = 1 * GiB
"""As much as the maps of 64 TiB of images in blocks of 64 KiB take. It is unmeasured."""


class MapMemory:
    """Knows the maps of one mount. Trio thread only."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._maps: weakref.WeakSet[BlockMap] = weakref.WeakSet()
        self._reserved = 0
        """The blocks of maps that are being loaded."""

    @contextmanager
    def reserved(self, size: int, block_size: int) -> Iterator[None]:
        """Keep room for the map of another image, which is loaded and added inside.

        Raises:
            UserError: there is none. Nothing is wrong with the image.
        """
        used = self._reserved + sum(one.blocks for one in self._maps)
        blocks = -(-size // block_size)
        if used and used + blocks > self._limit:
            raise errors.UserError(
                f"the maps of images that are open or being filled take {format_size(used)} of "
                f"memory, and this one would take {format_size(blocks)}: more than "
                f"{format_size(self._limit)} is refused (--block-size makes maps smaller)"
            )
        self._reserved += blocks
        try:
            yield
        finally:
            self._reserved -= blocks

    def add(self, blocks: BlockMap) -> None:
        """Count a map from now on, until it is gone."""
        self._maps.add(blocks)
