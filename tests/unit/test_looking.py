"""Where a read must begin to mean that an image is used."""

import pytest

from lazyfs.core import looking, shown_file
from lazyfs.units import GiB, KiB, MiB


@pytest.mark.parametrize(
    ("image_format", "size", "offset", "edge"),
    [
        ("raw", GiB, 0, True),
        ("raw", GiB, 8 * MiB - 1, True),
        ("raw", GiB, 8 * MiB, False),
        ("raw", GiB, GiB - 8 * MiB - 1, False),
        ("raw", GiB, GiB - 8 * MiB, True),
        ("raw", MiB, MiB - 1, True),
        ("raw", MiB, MiB // 2, False),
        ("raw", 16 * MiB, 4 * MiB, False),
        ("raw", 16 * MiB, 4 * MiB - 1, True),
        ("qcow2", GiB, 8 * MiB, True),  # its metadata lies before
        ("qcow2", GiB, 64 * MiB, False),
    ],
)
def test_the_edges(image_format: str, size: int, offset: int, edge: bool) -> None:
    shown = shown_file.of(image_format, size, 64 * KiB)
    assert looking.is_at_an_edge(shown, offset) == edge
