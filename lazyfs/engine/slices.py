"""Cuts long work into slices, so that other tasks can run between them."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

SLICE = 5000
"""How many items are worked on in one go. What is done with each takes up to 10 us, so a reader
waits up to 50 ms."""


def slices(items: Sequence[T], size: int = SLICE) -> Iterator[Sequence[T]]:
    """Yield all items, some at a time. The caller lets others run after each slice."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
