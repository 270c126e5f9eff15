"""The types of the values that options take.

Each function checks the text that the user gave, and returns the value that it means. It raises
argparse.ArgumentTypeError if the text is wrong; the message says why. The same functions check the
values in a configuration file.
"""

import argparse

from lazyfs.core import digest, repository_uri, shown_file
from lazyfs.core.eviction import Limits
from lazyfs.core.qcow2_layout import MIN_CLUSTER_SIZE
from lazyfs.units import KiB, MiB, parse_size


def uri(text: str) -> str:
    """Return the NBD URI of a server. It must not name an export."""
    try:
        return repository_uri.parse(text).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(text: str) -> int:
    """Return a number of bytes, such as 20G."""
    try:
        found = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if found >= 2**63:
        raise argparse.ArgumentTypeError(f"{text:.40} is more than 8 EiB")
    return found


def image_digest(text: str) -> str:
    """Return the digest of an image in the form in which the catalog has it."""
    try:
        return digest.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def min_free(text: str) -> str:
    """Return the text itself: a size, or a percentage such as 10%."""
    free_limits(text)
    return text


def free_limits(text: str) -> Limits:
    """Return the limits that a value of --min-free means."""
    if not text.endswith("%"):
        return Limits(min_free=size(text))
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 100:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a percentage from 0% to less than 100%, nor a size"
        )
    return Limits(min_free_percent=percent)


def rate(text: str) -> int:
    """Return a number of bytes per second, at least 1."""
    found = size(text.removesuffix("/s"))
    if text.isdigit() and 0 < found < KiB:
        raise argparse.ArgumentTypeError(
            f"{text} is {found} bytes per second; write {text}M for MiB, or {text}B if it is meant"
        )
    if found < 1:
        raise argparse.ArgumentTypeError(
            "a rate is at least 1 byte per second; --no-populate turns population off"
        )
    return found


def rate_or_none(text: str) -> int:
    """Return a number of bytes per second. 0 means that there is no limit."""
    return 0 if text == "0" else rate(text)


def block_size(text: str) -> int:
    """Return the size of the blocks of raw images."""
    return _power_of_two(text, 4 * KiB, shown_file.MAX_BLOCK_SIZE[shown_file.RAW])


def cluster_size(text: str) -> int:
    """Return the size of the clusters of qcow2 images."""
    return _power_of_two(text, MIN_CLUSTER_SIZE, shown_file.MAX_BLOCK_SIZE[shown_file.QCOW2])


def _power_of_two(text: str, least: int, most: int) -> int:
    found = size(text)
    if not least <= found <= most or found & (found - 1):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a power of two from {least // KiB}K to {most // MiB}M"
        )
    return found


def owner(text: str) -> int:
    """Return the number of a user or a group."""
    # The last number means "leave it" to chown(2).
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a user or group number")
    return int(text)


def address(text: str) -> str:
    """Return "HOST:PORT", with an IPv6 address in brackets."""
    host, _, port = text.rpartition(":") if ":" in text else ("127.0.0.1", "", text)
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ADDRESS:PORT or PORT, with a port from 0 to 65535"
        )
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise argparse.ArgumentTypeError(
            f"{text!r} needs brackets around an IPv6 address: [::1]:9100"
        )
    if not host.strip("[]"):
        raise argparse.ArgumentTypeError(
            f"{text!r} has no address; 0.0.0.0:{int(port)} is every one of this host"
        )
    return f"{host}:{int(port)}"


def seconds(text: str) -> float:
    """Return a number of seconds, at least 0.1."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.1 <= found <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, at least 0.1")
    return found


def mode(text: str) -> int:
    """Return the mode of files. Write bits are only shown: the file system is read-only."""
    try:
        found = int(text, 8)
    except ValueError:
        found = -1
    if not 0 <= found <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal file mode such as 0444")
    return found
