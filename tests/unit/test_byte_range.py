"""ByteRange against sets of offsets."""

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.byte_range import ByteRange

LIMIT = 60

ranges = st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)).map(
    lambda pair: ByteRange(*sorted(pair))
)


def offsets(of: ByteRange) -> set[int]:
    return set(range(of.start, of.end))


@given(ranges)
def test_length_counts_the_bytes(a: ByteRange) -> None:
    assert a.length == len(offsets(a))


@given(ranges, ranges)
def test_clip_is_the_intersection(a: ByteRange, b: ByteRange) -> None:
    clipped = a.clip(b)
    assert offsets(clipped) == offsets(a) & offsets(b)
    assert clipped.length >= 0
    assert b.start <= clipped.start <= clipped.end <= b.end


def test_clip_to_nothing_is_empty_at_the_nearer_end() -> None:
    assert ByteRange(0, 5).clip(ByteRange(10, 20)) == (10, 10)
    assert ByteRange(30, 40).clip(ByteRange(10, 20)) == (20, 20)


@given(ranges, ranges)
def test_overlaps_means_sharing_a_byte(a: ByteRange, b: ByteRange) -> None:
    assert a.overlaps(b) == bool(offsets(a) & offsets(b))
    assert a.overlaps(b) == b.overlaps(a)


def test_an_empty_range_overlaps_nothing() -> None:
    assert not ByteRange(5, 5).overlaps(ByteRange(0, 10))
    assert not ByteRange(0, 10).overlaps(ByteRange(5, 5))


@given(ranges, st.integers(1, 16), st.integers(0, 20))
def test_align_out_covers_whole_blocks_within_size(
    a: ByteRange, block_size: int, beyond: int
) -> None:
    size = a.end + beyond
    wide = a.align_out(block_size, size)
    assert wide.start % block_size == 0
    assert wide.end % block_size == 0 or wide.end == size
    assert wide.start <= a.start
    assert a.end <= wide.end <= size
    assert a.start - wide.start < block_size
    assert wide.end - a.end < block_size


@given(ranges, st.integers(1, 70))
def test_split_cuts_without_gap_or_overlap(a: ByteRange, limit: int) -> None:
    pieces = list(a.split(limit))
    assert [offset for piece in pieces for offset in range(*piece)] == list(range(*a))
    assert all(0 < piece.length <= limit for piece in pieces)
    assert all(piece.length == limit for piece in pieces[:-1])
