"""The backing file that a qcow2 overlay names, and the paths which that name can mean.

The bytes that are parsed here can be anything. A file that is not a qcow2 which QEMU would open
counts as a file without a backing file.

Source: QEMU, docs/interop/qcow2.txt, "Header" and "Header extensions". Version 1 has the name at
the same place (block/qcow.c). How QEMU reads a name: block.c, path_has_protocol(), path_combine(),
parse_json_protocol(), bdrv_parse_filename_strip_prefix().
"""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lazyfs.core.qcow2_layout import MAX_BACKING_NAME

HEADER_SIZE = 4096
"""The number of bytes to read of a file at first. They contain the header, its extensions and, in
most files, the name that follows them."""

_MAGIC = b"QFI\xfb"
# magic, version, offset and length of the name, cluster bits (from version 2 on)
_START = struct.Struct(">4sIQII")
_EXTENSION = struct.Struct(">II")
_VERSION_2_LENGTH = 72
_LENGTH_OFFSET = 100  # of the field header_length, in version 3
_BACKING_FORMAT = 0xE2792ACA
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class NameAt:
    """Says where in the file the name of the backing file is, in bytes, and which format it has."""

    offset: int
    length: int
    format: str
    """The format that the header gives for the backing file, such as "raw". If it is "", QEMU
    probes the backing file to find out."""


def find_name(header: bytes) -> NameAt | None:
    """Return where a file names its backing file, or None if it names none.

    Args:
        header: the first HEADER_SIZE bytes of the file, or all of a shorter file.
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
        # The first bytes of a guest's disk can look like this header, but no file is so large.
        if offset + length >= 1 << 63:
            return None
        return NameAt(offset, length, "")
    # QEMU requires the name to lie in the first cluster, which has 512 bytes to 2 MiB.
    if not 9 <= cluster_bits <= 21 or offset + length > 1 << cluster_bits:
        return None
    return NameAt(offset, length, _backing_format(header, version, offset))


def _backing_format(header: bytes, version: int, end: int) -> str:
    """Return the backing format from the extensions, which lie between the header and the name."""
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
    """Return the paths of the local files that the name of a backing file can mean.

    A path is absolute, or relative to the overlay's folder. A name that leads to something else
    than a local file (nbd:, rbd:, https:) has no paths. In a `json:` name every file name counts,
    also the names of the backing file's own backing files.

    QEMU resolves names inside `json:` and behind `file:` against its working directory, which
    cannot be known later. They are returned as if that directory were the overlay's folder.
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
    """Return whether a colon stands before the first slash, as in path_has_protocol()."""
    colon, slash = text.find(":"), text.find("/")
    return colon >= 0 and (slash < 0 or colon < slash)


def _file_names(options: Any, depth: int) -> Iterator[str]:
    """Yield every file name in `options`.

    These are the values of "filename", whether it is nested or flattened ("file.filename"), and
    the values of "backing" and "file", which are short forms of it.
    """
    if not isinstance(options, dict) or depth == 0:
        return
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _file_names(value, depth - 1)
        elif isinstance(value, str) and key.rpartition(".")[2] in ("filename", "backing", "file"):
            # A surrogate that stands for no byte cannot be part of a file's name.
            with suppress(UnicodeEncodeError):
                yield from paths_of(value.encode("utf-8", "surrogateescape"))
