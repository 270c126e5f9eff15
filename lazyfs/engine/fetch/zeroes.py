"""Finds blocks of zeroes in what was fetched, so that they stay holes in the cache.

A server that does not report its zeroes, or reports only large ones, sends them as data.
"""

from collections import Counter
from collections.abc import Iterable

from lazyfs.units import KiB

_ZEROES = bytes(64 * KiB)

Piece = tuple[int, memoryview]
"""Bytes of an export, and where they begin."""


def is_zero(data: memoryview) -> bool:
    """Return whether all bytes are zero. Compares as memcmp does: 64 KiB in 4 us."""
    if bytes(data[:64]) != _ZEROES[: min(64, len(data))]:  # nearly all data ends here
        return False
    return all(
        bytes(data[start : start + len(_ZEROES)]) == _ZEROES[: len(data) - start]
        for start in range(0, len(data), len(_ZEROES))
    )


def without_zeroes(pieces: Iterable[Piece], block_size: int) -> tuple[list[Piece], Counter[int]]:
    """Return what must be written of `pieces`, and how many bytes of it are in each block.

    The part of a piece that lies in one block is left out if all of it is zero. Adjacent blocks
    stay one piece.
    """
    kept: list[Piece] = []
    blocks: Counter[int] = Counter()
    for offset, data in pieces:
        begun: int | None = None
        position = 0
        while position < len(data):
            block = (offset + position) // block_size
            end = min((block + 1) * block_size - offset, len(data))
            if not is_zero(data[position:end]):
                blocks[block] += end - position
                begun = position if begun is None else begun
            elif begun is not None:
                kept.append((offset + begun, data[begun:position]))
                begun = None
            position = end
        if begun is not None:
            kept.append((offset + begun, data[begun:]))
    return kept, blocks
