"""Any range of the file on the mount equals the same range of a file that was made completely."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.core import qcow2_layout, shown_file
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.shown_file import QCOW2, RAW, ShownFile
from lazyfs.units import KiB, MiB

EXPORT = bytes(i * 7 % 251 + 1 for i in range(200 * KiB))
"""Content without any zero, so that zeroes in a file come from somewhere else."""


def content_of(parts: list[bytes | ByteRange]) -> bytes:
    """Return the bytes for which `parts` stand."""
    for part in parts:
        assert isinstance(part, bytes) or 0 <= part.start < part.end <= len(EXPORT)
    return b"".join(p if isinstance(p, bytes) else EXPORT[p.start : p.end] for p in parts)


def whole(image_format: str, size: int, cluster_size: int) -> tuple[ShownFile, bytes]:
    shown = shown_file.of(image_format, size, cluster_size)
    if image_format == RAW:
        return shown, EXPORT[:size]
    at = qcow2_layout.layout(size, cluster_size)
    data = EXPORT[:size].ljust(at.clusters * cluster_size, b"\0")
    return shown, qcow2_layout.finished(at, 0, at.data_offset) + data


sizes = st.one_of(
    st.integers(0, len(EXPORT)), st.sampled_from([0, 1, 511, 512, 777, 4095, 4096, 64 * KiB])
)


@given(
    st.sampled_from(shown_file.FORMATS),
    sizes,
    st.sampled_from([4 * KiB, 64 * KiB]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 300 * KiB)), max_size=10),
)
@example(QCOW2, 777, 64 * KiB, [(0.0, 300 * KiB * 2), (1.0, 1)])
@example(RAW, 0, 4 * KiB, [(0.0, 0)])
def test_any_range_is_what_the_whole_file_has_there(
    image_format: str, size: int, cluster_size: int, wanted: list[tuple[float, int]]
) -> None:
    shown, expected = whole(image_format, size, cluster_size)
    assert shown.size == len(expected)
    for where, length in wanted:
        start = round(where * shown.size)
        end = min(start + length, shown.size)
        parts = shown.split(ByteRange(start, end))
        limited = [
            p if isinstance(p, bytes) else ByteRange(p.start, min(p.end, size)) for p in parts
        ]
        assert limited == parts, "behind the end of the export"
        assert content_of(parts) == expected[start:end]
        assert len(parts) <= 3


@given(sizes, st.sampled_from([4 * KiB, 64 * KiB]), st.lists(st.integers(0, 1 << 30), max_size=20))
def test_pieces_joined_are_the_file(size: int, cluster_size: int, cuts: list[int]) -> None:
    shown, expected = whole(QCOW2, size, cluster_size)
    borders = [0, *sorted(cut % (shown.size + 1) for cut in cuts), shown.size]
    pieces = [content_of(shown.split(ByteRange(*pair))) for pair in pairwise(borders)]
    assert b"".join(pieces) == expected


@given(
    st.integers(0, 1 << 46),
    st.sampled_from([4 * KiB << i for i in range(10)]),
    st.floats(0, 1),
    st.integers(0, 64),
)
def test_the_largest_files_are_split_without_being_made(
    size: int, cluster: int, where: float, length: int
) -> None:
    shown = shown_file.of(QCOW2, size, cluster)
    start = min(int(where * shown.size), shown.size)
    wanted = ByteRange(start, min(start + length, shown.size))
    parts = shown.split(wanted)
    assert (
        sum(len(part) if isinstance(part, bytes) else part.length for part in parts)
        == wanted.length
    )
    ranges = [part for part in parts if isinstance(part, ByteRange)]
    assert len(ranges) <= 1
    for found in ranges:
        data = shown.metadata_size
        assert (found.start + data, found.end + data) == (
            max(start, data),
            min(wanted.end, data + size),
        )


def test_what_takes_room_besides_the_data() -> None:
    assert shown_file.of(RAW, 5 * MiB, 64 * KiB).metadata_size == 0
    shown = shown_file.of(QCOW2, 5 * MiB, 64 * KiB)
    assert shown.metadata_size == 5 * 64 * KiB
    assert shown.size == 5 * MiB + shown.metadata_size
    assert set(shown_file.SUFFIX) == set(shown_file.FORMATS)
