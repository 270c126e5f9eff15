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
        "KHMER VOWEL INHERENT AQ", "MONGOLIAN FREE VARIATION SELECTOR ONE",
    ],
)  # fmt: skip
def test_text_that_hides_is_escaped(name: str) -> None:
    character = {"LINE FEED": "\n", "ESCAPE": "\x1b"}.get(name) or unicodedata.lookup(name)
    shown = one_line(f"a{character}b")
    assert shown.isascii()
    assert shown.isprintable()
    assert shown not in ("ab", f"a{character}b")
