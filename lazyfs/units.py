"""Units of size, and the text forms of sizes such as "50M", "1GiB" and "64 KiB".

The text forms mean what they mean to qemu-img and dd: a bare letter and the -iB form are powers of
1024, and the -B form ("MB") is a power of 1000.
"""

import re
from fractions import Fraction

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

SECTOR = 512

_LETTERS = "KMGTPE"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTPE])(iB|B)?|B)?\s*", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` names.

    Raises:
        ValueError: `text` is not a size. The message says what is accepted.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a size; write bytes or a suffix, such as 65536, 64K, 50M or 1GiB"
        )
    number, letter, ending = match.groups()
    base = 1000 if (ending or "").upper() == "B" else 1024
    factor = base ** (_LETTERS.index(letter.upper()) + 1) if letter else 1
    return int(Fraction(number) * factor)


def format_size(size: int) -> str:
    """Return `size`, which is in bytes, as text for a person: "512 B", "1.5 GiB".

    The text has at most one decimal.
    """
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return (
        f"{value:.0f} {units[0]}"
        if value >= 100 or value == int(value)
        else f"{value:.1f} {units[0]}"
    )


def format_duration(seconds: float) -> str:
    """Return a remaining time as text for a person: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
