"""Sizes and times, to and from what a person writes."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import units
from lazyfs.units import GiB, KiB, MiB, TiB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("512B", 512),
        ("64K", 64 * KiB),
        ("64k", 64 * KiB),
        ("50M", 50 * MiB),
        ("1GiB", GiB),
        ("1gib", GiB),
        ("1GB", 10**9),
        ("64 KiB", 64 * KiB),
        ("  2T ", 2 * TiB),
        ("1P", 1024 * TiB),
        ("1E", 1024 * 1024 * TiB),
        ("1.5G", 3 * GiB // 2),
        ("0.5K", 512),
        ("1.001KB", 1001),
        ("0.1T", TiB // 10),
        ("1.9", 1),
    ],
)
def test_sizes_people_write(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "K",
        "-1",
        "+1",
        "1X",
        "1KK",
        "1iB",
        "1 0",
        "1.",
        ".5",
        "1e3",
        "0x10",
        "1,5G",
        "inf",
        "nan",
        "٣",
        "1\u212a",
    ],
)
def test_what_is_no_size_says_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write bytes or a suffix"):
        units.parse_size(text)


@given(
    st.one_of(
        st.text(), st.text(alphabet="0123456789.KMGTPEiB \t", max_size=12), st.integers(300, 6000)
    )
)
def test_any_text_is_a_size_or_a_value_error(text: str | int) -> None:
    if isinstance(text, int):
        text = "9" * text + ".5G"
    with contextlib.suppress(ValueError):
        assert units.parse_size(text) >= 0


@given(st.integers(0, 2**70), st.sampled_from("KMGTPE"))
def test_whole_numbers_are_exact(number: int, letter: str) -> None:
    power = "KMGTPE".index(letter) + 1
    assert units.parse_size(f"{number}") == number
    assert (
        units.parse_size(f"{number}{letter}")
        == units.parse_size(f"{number}{letter}iB")
        == number * 1024**power
    )
    assert units.parse_size(f"{number}{letter}B") == number * 1000**power


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (150 * KiB + 600, "151 KiB"),
        (10 * MiB, "10 MiB"),
        (3 * GiB // 2, "1.5 GiB"),
        (2 * TiB, "2 TiB"),
        (4096 * TiB, "4 PiB"),
    ],
)
def test_sizes_people_read(size: int, text: str) -> None:
    assert units.format_size(size) == text


@given(st.integers(0, 2**59))
def test_a_formatted_size_reads_back_nearly(size: int) -> None:
    text = units.format_size(size)
    assert len(text) <= 8
    assert units.parse_size(text) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (8.4, "8 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (100 * 3600, "100 h 0 min"),
    ],
)
def test_times_people_read(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text
