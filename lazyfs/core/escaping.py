"""Escapes text of foreign origin, such as names of exports, for messages of one line."""

_INVISIBLE = frozenset(
    map(
        chr,
        (
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810)),
            *(0x3164, *range(0xFE00, 0xFE10), 0xFFA0, *range(0xE0100, 0xE01F0)),
        ),
    )
)
"""What Unicode calls letters or marks, and says is to be shown as nothing (the property
Default_Ignorable_Code_Point of Unicode 15, DerivedCoreProperties.txt)."""


def one_line(text: str) -> str:
    """Return `text` with escapes for characters that end the line, steer the terminal or hide.

    Besides control characters, those are the marks that change the direction of writing and the
    invisible ones (Unicode's categories C and Z, but for a space, and a few more). Letters of
    different scripts that look alike stay as they are.
    """
    return "".join(one if _is_shown(one) else _escape(one) for one in text)


def _is_shown(character: str) -> bool:
    return character.isprintable() and character not in _INVISIBLE


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
