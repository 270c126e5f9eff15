"""The map file's format is fixed to the byte, and a damaged header is never trusted."""

import hashlib
import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core import map_file
from lazyfs.core.block_map import PAGE_BLOCKS
from lazyfs.core.map_file import COUNTERS_OFFSET, PAGE, STATES_OFFSET, MapHeader
from lazyfs.errors import CacheCorrupt

HEADER = MapHeader(
    inode=7, size=10 << 40, block_size=65536, export="team/ubuntu", identity="etag-1"
)
USED = 16 + 84
"""The number of bytes of page 0 that have a meaning."""

u64 = st.integers(0, 2**64 - 1)
names = st.text(max_size=20)
headers = st.builds(MapHeader, u64, u64, st.integers(0, 2**32 - 1), names, names)


def test_the_format_on_disk_is_this_one() -> None:
    body = (
        (7).to_bytes(8, "little")
        + (10 << 40).to_bytes(8, "little")
        + (65536).to_bytes(4, "little")
        + hashlib.sha256(b"team/ubuntu").digest()
        + hashlib.sha256(b"etag-1").digest()
    )
    page = b"LAZYFSMP" + (1).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body
    assert HEADER.encode() == page + bytes(PAGE - len(page))
    assert (PAGE, COUNTERS_OFFSET, STATES_OFFSET) == (4096, 4096, 8192)


@given(headers)
def test_a_header_recognises_itself(header: MapHeader) -> None:
    page = header.encode()
    assert len(page) == PAGE
    header.check(page)
    header.check(page[:USED])


def test_an_export_name_need_not_be_valid_unicode() -> None:
    header = replace(HEADER, export="disk\udce9")
    header.check(header.encode())


@given(headers, headers)
def test_a_header_recognises_no_other(one: MapHeader, other: MapHeader) -> None:
    if one != other:
        with pytest.raises(CacheCorrupt, match="belongs to another image"):
            one.check(other.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"inode": 8},
        {"size": (10 << 40) + 1},
        {"block_size": 4096},
        {"export": "team/ubuntU"},
        {"identity": ""},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_fact_of_the_header_counts(change: dict[str, object]) -> None:
    with pytest.raises(CacheCorrupt, match="belongs to another image"):
        replace(HEADER, **change).check(HEADER.encode())  # type: ignore[arg-type]


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    for bit in range(8 * USED):
        page = bytearray(HEADER.encode())
        page[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheCorrupt):
            HEADER.check(bytes(page))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"", "cut short"),
        (HEADER.encode()[: USED - 1], "cut short"),
        (bytes(PAGE), "not a map"),
        (
            b"LAZYFSMP" + struct.pack("<I", 2) + HEADER.encode()[12:],
            "format version 2; this lazyfs knows version 1",
        ),
        (HEADER.encode()[:60] + bytes(PAGE - 60), "header is damaged"),
    ],
    ids=["empty", "short", "zeroes", "version", "torn"],
)
def test_the_reason_for_refusing_is_told(page: bytes, message: str) -> None:
    with pytest.raises(CacheCorrupt, match=message):
        HEADER.check(page)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=200).map(lambda tail: b"LAZYFSMP\1\0\0\0" + tail),
    )
)
def test_garbage_is_corrupt_and_nothing_else(page: bytes) -> None:
    with pytest.raises(CacheCorrupt):
        HEADER.check(page)


# -- counters


@given(u64, st.binary(max_size=50))
def test_counters_come_back(mixed_zero_bytes: int, rest: bytes) -> None:
    assert (
        map_file.decode_counters(map_file.encode_counters(mixed_zero_bytes) + rest)
        == mixed_zero_bytes
    )


@given(u64, st.integers(0, 95))
def test_damaged_counters_read_as_zero(mixed_zero_bytes: int, bit: int) -> None:
    page = bytearray(map_file.encode_counters(mixed_zero_bytes))
    page[bit // 8] ^= 1 << bit % 8
    assert map_file.decode_counters(bytes(page)) == 0


@pytest.mark.parametrize(
    "page", [b"", bytes(11), bytes(12), bytes(PAGE), map_file.encode_counters(5)[:11]]
)
def test_unwritten_or_short_counters_read_as_zero(page: bytes) -> None:
    assert map_file.decode_counters(page) == 0


# -- layout


def test_nothing_overlaps() -> None:
    assert USED <= COUNTERS_OFFSET
    assert COUNTERS_OFFSET + len(map_file.encode_counters(0)) <= STATES_OFFSET
    assert map_file.page_offset(0) == STATES_OFFSET
    assert map_file.page_offset(5) - map_file.page_offset(4) == PAGE_BLOCKS
    assert map_file.page_offset(1) % PAGE == 0
