"""Escapes text of foreign origin, such as names of exports, for messages of one line."""


def one_line(text: str) -> str:
    """Return `text` with escapes for the characters that would end the line or steer the terminal.

    Names can contain any bytes.
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
