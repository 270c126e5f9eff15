"""Digests as text, such as "sha256:9f86...".

The catalog, the command line and the control socket all use this form.
"""

import hashlib
import re

_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]+)")


def parse(text: str) -> str:
    """Return the digest in the form in which the catalog keeps it: in lower case.

    Raises:
        ValueError: `text` is not a digest. The message says what is accepted.
    """
    match = _DIGEST.fullmatch(text.lower())
    if match is None or len(match[2]) != 2 * hashlib.new(match[1]).digest_size:
        raise ValueError(
            f"{text[:200]!r} is not a digest such as sha256:9f86d0... with all its digits"
        )
    return match[0]
