"""Escapes text of foreign origin, such as names of exports, for messages of one line."""


def one_line(text: str) -> str:
    """Return `text` with escapes for characters that end the line, steer the terminal or hide.

    Besides control characters, those are the marks that change the direction of writing and the
    invisible ones, which make two names look alike (Unicode's categories C and Z, but for a space).
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
