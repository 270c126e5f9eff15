"""Digests as text: "sha256:9f86...", as the catalog, the command line and the control socket have them."""

import hashlib
import re

_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]+)")


def parse(text: str) -> str:
    """Return a digest in the form that is kept.

    Raises:
        ValueError: it is none; the message says what is accepted.
    """
    match = _DIGEST.fullmatch(text.lower())
    if match is None or len(match[2]) != 2 * hashlib.new(match[1]).digest_size:
        raise ValueError(
            f"{text[:200]!r} is not a digest such as sha256:9f86d0... with all its digits"
        )
    return match[0]
