"""The `.map` file beside a partial raw image: which blocks of it are true. All numbers little-endian.

    page 0   header: magic, format version, CRC-32 of the rest of the header, the image it belongs to
    page 1   counters: CRC-32, mixed_zero_bytes (reporting only; a torn page reads as 0)
    page 2.. one byte per block (see `block_map.py`), 4096 blocks a page

The header is written once, before the first block is marked. A header that does not match the catalog
(other inode, size, block size or export) means the map says nothing about this image.
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
_BODY = struct.Struct(
    "<QQI32s32s"
)  # inode, size, block size, sha256 of export name, sha256 of identity
_COUNTERS = struct.Struct("<IQ")  # CRC-32 of what follows, mixed_zero_bytes


@dataclass(frozen=True, slots=True)
class MapHeader:
    """The image that a map belongs to."""

    inode: int
    size: int
    block_size: int
    export: str
    identity: str

    def encode(self) -> bytes:
        """Return page 0."""
        body = _BODY.pack(
            self.inode, self.size, self.block_size, _digest(self.export), _digest(self.identity)
        )
        return (_PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body).ljust(PAGE, b"\0")

    def check(self, page: bytes) -> None:
        """Compare with a page 0 read from disk.

        Raises:
            CacheCorrupt: it is damaged, of another version of lazyfs, or another image's.
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
    """Return the start of page 1."""
    body = struct.pack("<Q", mixed_zero_bytes)
    return struct.pack("<I", zlib.crc32(body)) + body


def decode_counters(page: bytes) -> int:
    """Return mixed_zero_bytes, 0 if the page is damaged."""
    if len(page) < _COUNTERS.size:
        return 0
    crc, mixed_zero_bytes = _COUNTERS.unpack_from(page)
    return int(mixed_zero_bytes) if zlib.crc32(page[4 : _COUNTERS.size]) == crc else 0


def page_offset(index: int) -> int:
    """Return where page `index` of the block states lies in the file."""
    return STATES_OFFSET + index * block_map.PAGE_BLOCKS


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
