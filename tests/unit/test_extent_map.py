"""Compares parse_block_status with a byte-by-byte reading of the reply, and ExtentMap with a
bytearray of grains."""

import errno
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core import extent_map
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.extent_map import GRAIN, STATE_HOLE, STATE_ZERO, WINDOW, ExtentMap
from lazyfs.errors import RequestFailed

# -- what a server may reply

lengths = st.one_of(st.integers(1, 40), st.integers(0, 40), st.integers(2**31, 2**64 - 1))
flags = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
replies = st.lists(st.tuples(lengths, flags), max_size=12).flatmap(
    lambda pairs: st.sampled_from(
        [[n for pair in pairs for n in pair], [n for pair in pairs for n in pair][:-1]]
    )
)
asks = st.builds(
    lambda start, length: ByteRange(start, start + length),
    st.integers(0, 2**40),
    st.integers(1, 150),
)


def read_reply(asked: ByteRange, entries: list[int]) -> list[bool] | None:
    """Return for each byte whether the reply says it is data; None if the reply is to be
    refused."""
    data: list[bool] = []
    for length, flag in zip(entries[::2], entries[1::2], strict=False):
        if len(data) == asked.length:
            break
        if length == 0:
            return None
        data += [not flag & STATE_ZERO] * min(length, asked.length - len(data))
    return data or None


@settings(max_examples=200)
@given(asks, replies)
def test_a_reply_is_read_byte_for_byte_or_refused(asked: ByteRange, entries: list[int]) -> None:
    expected = read_reply(asked, entries)
    if expected is None:
        with pytest.raises(RequestFailed) as failure:
            extent_map.parse_block_status(asked, entries, "disk")
        assert failure.value.code == errno.EPROTO
        return
    *data, reached = extent_map.parse_block_status(asked, entries, "disk")
    assert reached == (asked.start + len(expected), asked.start + len(expected))
    assert [offset for piece in data for offset in range(*piece)] == [
        asked.start + i for i, is_data in enumerate(expected) if is_data
    ]
    assert all(piece.length > 0 for piece in data)
    assert all(a.end < b.start for a, b in pairwise(data)), "not merged"


def test_only_the_zero_flag_makes_zeroes() -> None:
    entries = [10, 0, 10, STATE_HOLE, 10, STATE_ZERO, 10, STATE_HOLE | STATE_ZERO, 10, STATE_HOLE]
    assert extent_map.parse_block_status(ByteRange(0, 50), entries, "disk") == [
        (0, 20),
        (40, 50),
        (50, 50),
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "the server sent nothing"),
        ([7], "the server sent nothing"),
        ([0, 0], "the server sent an empty extent"),
        ([5, 0, 0, STATE_ZERO], "the server sent an empty extent"),
    ],
)
def test_a_reply_without_progress_is_refused(entries: list[int], message: str) -> None:
    with pytest.raises(RequestFailed, match=f"block status of team/disk: {message}"):
        extent_map.parse_block_status(ByteRange(100, 200), entries, "team/disk")


def test_nothing_is_read_past_what_was_asked() -> None:
    assert extent_map.parse_block_status(ByteRange(0, 10), [2**64 - 1, 0, 0, 0], "disk") == [
        (0, 10),
        (10, 10),
    ]


def test_asking_until_the_end_is_reached_learns_everything() -> None:
    asked = ByteRange(0, 100)
    server = [30, 0, 20, STATE_ZERO, 50, 0]
    learned: list[ByteRange] = []
    position = asked.start
    while position < asked.end:  # a server that answers with one extent at a time
        *data, reached = extent_map.parse_block_status(
            ByteRange(position, asked.end), server[:2], "disk"
        )
        learned += data
        position = reached.start
        del server[:2]
    assert learned == [(0, 30), (50, 100)]


# -- the map

WINDOW_GRAINS = WINDOW // GRAIN

# Where mistakes live: the edges of windows and of grains.
near_edges = st.builds(
    lambda window, grain, byte: max(0, window * WINDOW + grain * GRAIN + byte),
    st.integers(0, 3),
    st.integers(-3, 3),
    st.sampled_from([0, 0, 1, -1, GRAIN // 2]),
)
sizes = near_edges.filter(bool)


@st.composite
def pieces_in(draw: st.DrawFn, size: int) -> list[ByteRange]:
    """Draw ordered pieces of data, which lie apart, touch or are empty."""
    bounds = sorted(min(at, size) for at in draw(st.lists(near_edges, max_size=16)))
    return [ByteRange(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False)]


def grains_of(size: int, pieces: list[ByteRange]) -> bytearray:
    """Return one byte for each grain: 1 if any of its bytes is data."""
    grains = bytearray(-(-size // GRAIN))
    for piece in pieces:
        if piece.length:
            first, end = piece.start // GRAIN, -(-piece.end // GRAIN)
            grains[first:end] = b"\1" * (end - first)
    return grains


def learn_all(extents: ExtentMap, pieces: list[ByteRange]) -> None:
    whole = ByteRange(0, extents.size)
    while (window := extents.first_unknown(whole)) is not None:
        extents.learn(
            window, [clipped for p in pieces if (clipped := p.clip(window)).length or not p.length]
        )


def ranges_in(grains: bytearray, value: int, within: ByteRange) -> list[ByteRange]:
    first, end = within.start // GRAIN, -(-within.end // GRAIN)
    found = re.finditer(bytes([value]) + b"+", grains[first:end])
    return [
        ByteRange((first + m.start()) * GRAIN, (first + m.end()) * GRAIN).clip(within)
        for m in found
    ]


@given(st.data(), sizes)
def test_data_and_zeroes_are_as_in_the_model(data: st.DataObject, size: int) -> None:
    pieces = data.draw(pieces_in(size))
    extents = ExtentMap(size)
    learn_all(extents, pieces)
    grains = grains_of(size, pieces)
    for _ in range(3):
        start, end = sorted(min(data.draw(near_edges), size) for _ in range(2))
        if start < end:
            within = ByteRange(start, end)
            assert extents.data_ranges(within) == ranges_in(grains, 1, within)
            assert extents.zero_ranges(within) == ranges_in(grains, 0, within)


@given(st.data(), sizes)
def test_nothing_the_server_called_data_becomes_zero(data: st.DataObject, size: int) -> None:
    pieces = data.draw(pieces_in(size))
    extents = ExtentMap(size)
    learn_all(extents, pieces)
    zeroes = extents.zero_ranges(ByteRange(0, size))
    assert not any(piece.overlaps(zero) for piece in pieces for zero in zeroes)


@given(sizes, near_edges)
def test_windows_tile_the_image(size: int, offset: int) -> None:
    offset = min(offset, size - 1)
    window = ExtentMap(size).window_of(offset)
    assert window.start % WINDOW == 0
    assert window.start <= offset < window.end <= size
    assert window.length == WINDOW or window.end == size


@given(st.data(), sizes)
def test_the_first_unknown_window_is_asked_about_until_none_is_left(
    data: st.DataObject, size: int
) -> None:
    extents = ExtentMap(size)
    start, end = sorted(min(data.draw(near_edges), size) for _ in range(2))
    end = max(end, start + 1)
    within = ByteRange(start, min(end, size)) if start < size else ByteRange(size - 1, size)
    asked = []
    while (window := extents.first_unknown(within)) is not None:
        asked.append(window)
        extents.learn(window, [])
    assert [w.start // WINDOW for w in asked] == list(
        range(within.start // WINDOW, (within.end - 1) // WINDOW + 1)
    )
    assert extents.data_ranges(within) == []
    assert extents.zero_ranges(within) == [within]


@given(st.sets(st.integers(0, 3)), near_edges, near_edges)
def test_known_until_is_the_first_byte_nobody_asked_about(
    known: set[int], offset: int, limit: int
) -> None:
    offset, limit = sorted((offset, limit))
    extents = ExtentMap(5 * WINDOW)
    for window in known:
        extents.learn(extents.window_of(window * WINDOW), [])
    expected = offset
    while expected < limit and expected // WINDOW in known:
        expected = min((expected // WINDOW + 1) * WINDOW, limit)
    assert extents.known_until(offset, limit) == expected


def test_an_unknown_window_is_no_zeroes() -> None:
    extents = ExtentMap(2 * WINDOW)
    extents.learn(ByteRange(0, WINDOW), [])
    with pytest.raises(KeyError):
        extents.zero_ranges(ByteRange(WINDOW - 1, WINDOW + 1))


def test_data_on_both_sides_of_a_window_edge_is_one_range() -> None:
    extents = ExtentMap(2 * WINDOW)
    learn_all(extents, [ByteRange(WINDOW - GRAIN, WINDOW + GRAIN)])
    assert extents.data_ranges(ByteRange(0, 2 * WINDOW)) == [(WINDOW - GRAIN, WINDOW + GRAIN)]


def test_an_empty_piece_is_no_data() -> None:
    extents = ExtentMap(WINDOW)
    extents.learn(ByteRange(0, WINDOW), [ByteRange(GRAIN + 1, GRAIN + 1)])
    assert extents.data_ranges(ByteRange(0, WINDOW)) == []


def test_learning_again_replaces_what_was_known() -> None:
    extents = ExtentMap(WINDOW)
    extents.learn(ByteRange(0, WINDOW), [ByteRange(0, GRAIN)])
    extents.learn(ByteRange(0, WINDOW), [ByteRange(GRAIN, 2 * GRAIN)])
    assert extents.data_ranges(ByteRange(0, WINDOW)) == [(GRAIN, 2 * GRAIN)]
