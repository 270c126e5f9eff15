"""Escapes text of foreign origin, such as names of exports, for messages of one line."""

import re
import unicodedata

_INVISIBLE = frozenset(
    map(
        chr,
        (
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810)),
            *(0x2800, 0x3164, *range(0xFE00, 0xFE10), 0xFFA0, *range(0xE0100, 0xE01F0)),
        ),
    )
)
"""What Unicode calls letters or marks, and says is to be shown as nothing (the property
Default_Ignorable_Code_Point of Unicode 15, DerivedCoreProperties.txt), and a sign for the blind
that has no dots."""

_LIKE_LATIN = (
    "CYRILLIC",
    "GREEK",
    "ARMENIAN",
    "CHEROKEE",
    "COPTIC",
    "LISU",
    "FULLWIDTH LATIN",
    "MATHEMATICAL",
)
"""How the names of letters begin that look like Latin ones."""

_WORD = re.compile(r"[^\W\d_]+")
_ASCII_LETTER = re.compile(r"[A-Za-z]")


def one_line(text: str) -> str:
    """Return `text` with escapes for characters that end the line, steer the terminal or hide.

    Besides control characters, those are the marks that change the direction of writing and the
    invisible ones (Unicode's categories C and Z, but for a space, and a few more). In a word with
    Latin letters, so are those of other scripts that look like Latin ones.
    """
    if not text.isascii():
        text = _WORD.sub(_without_look_alikes, text)
    return "".join(one if _is_shown(one) else _escape(one) for one in text)


def _without_look_alikes(word: re.Match[str]) -> str:
    if not _ASCII_LETTER.search(word[0]):
        return word[0]  # a word of another script
    return "".join(
        _escape(one) if unicodedata.name(one, "").startswith(_LIKE_LATIN) else one
        for one in word[0]
    )


def _is_shown(character: str) -> bool:
    return character.isprintable() and character not in _INVISIBLE


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
