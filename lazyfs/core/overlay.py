"""The backing file that a qcow2 names, and the paths that this may mean.

Source: QEMU, docs/interop/qcow2.txt, "Header" and "Header extensions" (version 1 has the name at the same place,
block/qcow.c); how a name is read: block.c, path_has_protocol(), path_combine(), parse_json_protocol(),
bdrv_parse_filename_strip_prefix().

Every byte here may be anything: what is not a qcow2 that QEMU would open has no backing file.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lazyfs.core.qcow2_layout import MAX_BACKING_NAME

HEADER_SIZE = 4096
"""Bytes to read of a file at first: the header, its extensions, and as a rule the name behind them."""

_MAGIC = b"QFI\xfb"
_START = struct.Struct(
    ">4sIQII"
)  # magic, version, offset and length of the name, (version 2 on) cluster bits
_EXTENSION = struct.Struct(">II")
_VERSION_2_LENGTH = 72
_LENGTH_OFFSET = 100  # of header_length, in version 3
_BACKING_FORMAT = 0xE2792ACA
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class NameAt:
    """Where in the file the backing file's name is, in bytes, and what the header says of its format."""

    offset: int
    length: int
    format: str
    """Such as "raw"; "" if QEMU would look at the file itself."""


def find_name(header: bytes) -> NameAt | None:
    """Return where a file, of which these are the first bytes, names its backing file; None if it does not.

    `header`: HEADER_SIZE bytes, or all.
    """
    if len(header) < _START.size:
        return None
    magic, version, offset, length, cluster_bits = _START.unpack_from(header)
    if (
        magic != _MAGIC
        or version not in (1, 2, 3)
        or offset == 0
        or not 0 < length <= MAX_BACKING_NAME
    ):
        return None
    if version == 1:
        if (
            offset + length >= 1 << 63
        ):  # a guest's disk may begin like that, and no file reaches so far
            return None
        return NameAt(offset, length, "")
    # QEMU: the name lies in the first cluster, of 512 bytes to 2 MiB.
    if not 9 <= cluster_bits <= 21 or offset + length > 1 << cluster_bits:
        return None
    return NameAt(offset, length, _backing_format(header, version, offset))


def _backing_format(header: bytes, version: int, end: int) -> str:
    """Walk the extensions, which lie between the header and the name."""
    at = _VERSION_2_LENGTH
    if version >= 3:
        if len(header) < _LENGTH_OFFSET + 4:
            return ""
        (at,) = struct.unpack_from(">I", header, _LENGTH_OFFSET)
    while at + _EXTENSION.size <= min(end, len(header)):
        kind, length = _EXTENSION.unpack_from(header, at)
        at += _EXTENSION.size
        if kind == 0:
            break
        if kind == _BACKING_FORMAT:
            return header[at : at + length].decode("ascii", "replace")
        at += -(-length // 8) * 8
    return ""


def paths_of(name: bytes) -> list[str]:
    """Return the local files that a backing file's name may mean, absolute or relative to the overlay's folder.

    A name that leads somewhere else (nbd:, rbd:, https:) means none. In a `json:` name every file name counts, also
    those of its own backing files. Those in it, and behind `file:`, QEMU takes relative to its working directory,
    which nobody knows later; they count as if that was the overlay's folder.
    """
    text = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    if text.startswith("json:"):
        try:
            options = json.loads(text[len("json:") :])
        except (ValueError, RecursionError):
            return []
        return list(dict.fromkeys(_file_names(options, _MAX_DEPTH)))
    if text.startswith("file:"):
        text = text[len("file:") :]
    elif _has_protocol(text):
        return []
    return [text] if text else []


def _has_protocol(text: str) -> bool:
    """A colon before the first slash, as path_has_protocol() has it."""
    colon, slash = text.find(":"), text.find("/")
    return colon >= 0 and (slash < 0 or colon < slash)


def _file_names(options: Any, depth: int) -> Iterator[str]:
    """Yield the values of "filename", nested or flattened ("file.filename"), and of what is shorthand for them."""
    if not isinstance(options, dict) or depth == 0:
        return
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _file_names(value, depth - 1)
        elif isinstance(value, str) and key.rpartition(".")[2] in ("filename", "backing", "file"):
            with suppress(
                UnicodeEncodeError
            ):  # a lone surrogate that is no byte: no name of a file
                yield from paths_of(value.encode("utf-8", "surrogateescape"))
