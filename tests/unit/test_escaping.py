"""Tests how text of foreign origin is escaped for messages."""

import unicodedata

import pytest

from lazyfs.core.escaping import one_line


@pytest.mark.parametrize(
    "text", ["disk", "two words", "Größe", "日本", "a\N{COMBINING ACUTE ACCENT}"]
)
def test_text_that_is_shown_stays(text: str) -> None:
    assert one_line(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "LINE FEED", "ESCAPE", "NO-BREAK SPACE", "RIGHT-TO-LEFT OVERRIDE", "ZERO WIDTH SPACE",
        "SOFT HYPHEN", "HANGUL FILLER", "HALFWIDTH HANGUL FILLER", "HANGUL CHOSEONG FILLER",
        "COMBINING GRAPHEME JOINER", "VARIATION SELECTOR-16", "VARIATION SELECTOR-256",
        "BRAILLE PATTERN BLANK", "KHMER VOWEL INHERENT AQ", "MONGOLIAN FREE VARIATION SELECTOR ONE",
    ],
)  # fmt: skip
def test_text_that_hides_is_escaped(name: str) -> None:
    character = {"LINE FEED": "\n", "ESCAPE": "\x1b"}.get(name) or unicodedata.lookup(name)
    shown = one_line(f"a{character}b")
    assert shown.isascii()
    assert shown.isprintable()
    assert shown not in ("ab", f"a{character}b")


@pytest.mark.parametrize(
    "name",
    ["CYRILLIC SMALL LETTER A", "GREEK SMALL LETTER OMICRON", "FULLWIDTH LATIN SMALL LETTER A"],
)
def test_a_letter_that_looks_like_a_latin_one_is_escaped_among_those(name: str) -> None:
    letter = unicodedata.lookup(name)
    assert one_line(f"debi{letter}n-12") == f"debi\\u{ord(letter):04x}n-12"
    assert one_line(f"{letter}{letter} debian") == f"{letter}{letter} debian"


@pytest.mark.parametrize("text", ["образ", "εικόνα", "debian-образ", "Größe", "debian版"])
def test_words_of_one_script_stay(text: str) -> None:
    assert one_line(text) == text
