"""The `.map` file beside a partial raw image, which says which blocks of that file hold data.

All numbers are little-endian.

    page 0   header: magic, format version, CRC-32 of the rest of the header, the image
    page 1   counters: CRC-32, mixed_zero_bytes (for reporting only; a torn page counts as 0)
    page 2.. one byte per block (see `block_map.py`), 4096 blocks a page

The header is written once, before the first block is marked. If the header does not match the
catalog (another inode, size, block size or export), the map is not this image's and cannot be used.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass

from lazyfs.core import block_map
from lazyfs.errors import CacheCorrupt

PAGE = 4096
STATES_OFFSET = 2 * PAGE
COUNTERS_OFFSET = PAGE

_MAGIC = b"LAZYFSMP"
_VERSION = 1
_PREFIX = struct.Struct("<8sII")  # magic, version, CRC-32 of what follows
# inode, size, block size, SHA-256 of the export's name, SHA-256 of its identity
_BODY = struct.Struct("<QQI32s32s")
_COUNTERS = struct.Struct("<IQ")  # CRC-32 of what follows, mixed_zero_bytes


@dataclass(frozen=True, slots=True)
class MapHeader:
    """Names the image that a map belongs to. `size` and `block_size` are in bytes."""

    inode: int
    size: int
    block_size: int
    export: str
    identity: str

    def encode(self) -> bytes:
        """Return the header as page 0 of the file."""
        body = _BODY.pack(
            self.inode, self.size, self.block_size, _digest(self.export), _digest(self.identity)
        )
        return (_PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body).ljust(PAGE, b"\0")

    def check(self, page: bytes) -> None:
        """Check that a page 0 which was read from disk is the header of this image.

        Raises:
            CacheCorrupt: the page is damaged, is of another format version, or belongs to another
                image.
        """
        if len(page) < _PREFIX.size + _BODY.size:
            raise CacheCorrupt("the map is cut short")
        magic, version, crc = _PREFIX.unpack_from(page)
        if magic != _MAGIC:
            raise CacheCorrupt("not a map")
        if version != _VERSION:
            raise CacheCorrupt(
                f"a map of format version {version}; this lazyfs knows version {_VERSION}"
            )
        if zlib.crc32(page[_PREFIX.size : _PREFIX.size + _BODY.size]) != crc:
            raise CacheCorrupt("the map's header is damaged")
        if page[: _PREFIX.size + _BODY.size] != self.encode()[: _PREFIX.size + _BODY.size]:
            raise CacheCorrupt("the map belongs to another image, size or version")


def encode_counters(mixed_zero_bytes: int) -> bytes:
    """Return the counters as the first bytes of page 1."""
    body = struct.pack("<Q", mixed_zero_bytes)
    return struct.pack("<I", zlib.crc32(body)) + body


def decode_counters(page: bytes) -> int:
    """Return mixed_zero_bytes, or 0 if the page is damaged."""
    if len(page) < _COUNTERS.size:
        return 0
    crc, mixed_zero_bytes = _COUNTERS.unpack_from(page)
    return int(mixed_zero_bytes) if zlib.crc32(page[4 : _COUNTERS.size]) == crc else 0


def page_offset(index: int) -> int:
    """Return the offset in the file of page `index` of the block states."""
    return STATES_OFFSET + index * block_map.PAGE_BLOCKS


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
