"""The layout of the qcow2 files that lazyfs writes, in which every offset follows from the size.

Source: QEMU, docs/interop/qcow2.txt.

    cluster  0                 header (version 3), its extensions, the name of the backing file
             1 ...             refcount table                 8 bytes for each refcount block
             ...               refcount blocks                2 bytes for each cluster of the file
             ...               L1 table                       8 bytes for each L2 table
             ...               L2 tables                      8 bytes for each data cluster
    data_offset / cluster_size data cluster i is at data_offset + i * cluster_size

One layout has two kinds of metadata:

- *Finished* metadata: every data cluster is allocated, and there is no backing file. This metadata
  depends only on the size, so it can be computed at any moment. The mount shows it from the first
  open on, and it is what is on disk in the end. A cluster of zeroes is a hole in the file.
- *Partial* metadata: this is on disk while the image is filled. The L2 entry of a missing cluster
  is 0, so QEMU reads that cluster from the backing file, which is the export itself. An L2 entry is

        0                          missing                                     block_map.MISSING
        offset | COPIED            data                                        block_map.DATA
        offset | COPIED | ZERO     reads as zeroes, whatever the offset holds  block_map.ZERO

  The refcount is 1 for each cluster of metadata and for each data cluster that is not missing.

Partial files have a header extension of our own, `_OWN`, which says which image the file belongs
to, as the header of a `.map` file does. Finished files do not have it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lazyfs.core import block_map, map_file
from lazyfs.errors import CacheCorrupt
from lazyfs.units import KiB, MiB

COPIED = 1 << 63
"""A flag of an L1 or L2 entry: the refcount is exactly 1."""
ZERO = 1
"""A flag of an L2 entry: the cluster reads as zeroes."""

MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE = 4 * KiB, 2 * MiB
"""The cluster sizes that lazyfs accepts. QEMU accepts 512 bytes to 2 MiB, but clusters smaller than
a page of memory gain nothing."""

_MAGIC = 0x514649FB  # "QFI\xfb"
_VERSION = 3
_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">II")  # type and length; the data that follows is padded to 8 bytes
_END, _BACKING_FORMAT, _OWN = 0, 0xE2792ACA, 0x4C5A4653  # The last one, "LZFS", is ours.
_REFCOUNT_ORDER = 4  # Refcounts have 1 << 4 = 16 bits.

_OWN_SIZE = 100
"""The number of bytes that the extension takes from a `map_file.MapHeader`: its magic, version,
checksum and image."""
COUNTERS_OFFSET = _HEADER.size + _EXTENSION.size + 104
"""Where the counters of `map_file` lie in the file. They are in the first sector, which the disk
writes completely or not at all."""
_BACKING_NAME_OFFSET = 512
MAX_BACKING_NAME = 1023
"""The longest name of a backing file in bytes, as QEMU limits it."""
_BACKING_REFERENCE = struct.Struct(">QI")  # offset, length
_BACKING_REFERENCE_OFFSET = 8
_NO_BACKING_OFFSET, _NO_BACKING = 2048, b"nbd:the-export-is-not-the-one-that-this-was-filled-from"
"""A name that cannot be opened, and its offset. It lies behind the longest possible name of a real
backing file, so that the header refers to a complete name at every moment."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Says where each part of the file is. Offsets and sizes are in bytes."""

    size: int
    """The size of the virtual disk: the export's size, rounded up to sectors."""
    cluster_size: int
    clusters: int
    """The number of data clusters."""
    refcount_table_clusters: int
    refcount_blocks: int
    l1_clusters: int
    l2_tables: int

    @property
    def refcount_table_offset(self) -> int:
        """Return the offset of the refcount table, which follows the header."""
        return self.cluster_size

    @property
    def refcount_blocks_offset(self) -> int:
        """Return the offset of the refcount blocks, which follow one another."""
        return self.refcount_table_offset + self.refcount_table_clusters * self.cluster_size

    @property
    def l1_offset(self) -> int:
        """Return the offset of the L1 table."""
        return self.refcount_blocks_offset + self.refcount_blocks * self.cluster_size

    @property
    def l2_offset(self) -> int:
        """Return the offset of the L2 tables, which follow one another."""
        return self.l1_offset + self.l1_clusters * self.cluster_size

    @property
    def data_offset(self) -> int:
        """Return the offset of the data clusters, which is also the size of the metadata.

        Data clusters are in the order of the virtual disk.
        """
        return self.l2_offset + self.l2_tables * self.cluster_size

    @property
    def metadata_clusters(self) -> int:
        """Return the number of clusters before the first data cluster."""
        return self.data_offset // self.cluster_size

    @property
    def file_size(self) -> int:
        """Return the size of the file, which is a number of whole clusters.

        Behind the end of the virtual disk, the last cluster holds zeroes.
        """
        return self.data_offset + self.clusters * self.cluster_size


def layout(export_size: int, cluster_size: int) -> Layout:
    """Return the layout for an export of `export_size` bytes. `cluster_size` is a power of two."""
    size = _up(export_size, 512) * 512
    clusters = _up(size, cluster_size)
    l2_tables = _up(clusters * 8, cluster_size)
    l1_clusters = _up(l2_tables * 8, cluster_size)
    refcount_blocks = table_clusters = 1
    # The refcounts also count the clusters of their own tables. Both numbers only grow, and soon
    # grow no more.
    while True:
        total = 1 + table_clusters + refcount_blocks + l1_clusters + l2_tables + clusters
        needed = _up(total * 2, cluster_size)
        if (needed, _up(needed * 8, cluster_size)) == (refcount_blocks, table_clusters):
            break
        refcount_blocks, table_clusters = needed, _up(needed * 8, cluster_size)
    return Layout(
        size, cluster_size, clusters, table_clusters, refcount_blocks, l1_clusters, l2_tables
    )


# -- finished


def finished(at: Layout, start: int, end: int) -> bytes:
    """Return bytes `[start, end)` of the finished metadata.

    `end` must not exceed `at.data_offset`.
    """
    parts = []
    for begin, stop, width, first, step, count in _tables(at):
        low, high = max(start, begin), min(end, stop)
        if low < high:
            parts.append(_slice(low - begin, high - begin, width, first, step, count))
    if start < at.cluster_size:
        header = _header(at, 0, 0).ljust(at.cluster_size, b"\0")
        parts.insert(0, header[start : min(end, at.cluster_size)])
    return b"".join(parts)


def _tables(at: Layout) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Yield each table of the finished metadata.

    A table is (start, end, bytes of an entry, first entry, step, number of entries). What follows
    the entries is zero.
    """
    size, clusters = at.cluster_size, at.metadata_clusters + at.clusters
    yield (
        at.refcount_table_offset,
        at.refcount_blocks_offset,
        8,
        at.refcount_blocks_offset,
        size,
        at.refcount_blocks,
    )
    yield at.refcount_blocks_offset, at.l1_offset, 2, 1, 0, clusters
    yield at.l1_offset, at.l2_offset, 8, at.l2_offset | COPIED, size, at.l2_tables
    yield at.l2_offset, at.data_offset, 8, at.data_offset | COPIED, size, at.clusters


def _slice(start: int, end: int, width: int, first: int, step: int, count: int) -> bytes:
    """Return bytes `[start, end)` of a table, with offsets relative to the table's start."""
    low, high = min(start // width, count), min(_up(end, width), count)
    entries = _entries(width, first + low * step, step, high - low)
    return entries.ljust(end - low * width, b"\0")[start - low * width : end - low * width]


def _entries(width: int, first: int, step: int, count: int) -> bytes:
    if step == 0:
        return first.to_bytes(width, "big") * count
    return struct.pack(f">{count}Q", *range(first, first + count * step, step))


# -- partial


def initial_tables(at: Layout) -> list[tuple[int, bytes]]:
    """Return what a partial file contains besides its header when nothing is present yet.

    The result is a list of (offset, bytes).
    """
    table_end = at.refcount_table_offset + at.refcount_blocks * 8
    l1_end = at.l1_offset + at.l2_tables * 8
    return [
        (at.refcount_table_offset, finished(at, at.refcount_table_offset, table_end)),
        (at.refcount_blocks_offset, _entries(2, 1, 0, at.metadata_clusters)),
        (at.l1_offset, finished(at, at.l1_offset, l1_end)),
    ]


def partial_header(
    at: Layout, own: map_file.MapHeader, backing: str, mixed_zero_bytes: int
) -> bytes:
    """Return the header of a partial file. The rest of the header's cluster is zero.

    Args:
        own: the image that the file belongs to.
        backing: the export, as QEMU opens it. A name that is too long for a qcow2 is replaced by a
            name that cannot be opened: with no name at all, QEMU would show zeroes where data is
            missing.
        mixed_zero_bytes: as in `map_file`.
    """
    name = backing.encode("utf-8", "surrogateescape")
    if len(name) > MAX_BACKING_NAME:
        name = b"nbd:the-name-of-the-export-is-too-long-for-a-qcow2"
    extensions = _extension(
        _OWN,
        own.encode()[:_OWN_SIZE].ljust(104, b"\0") + map_file.encode_counters(mixed_zero_bytes),
    )
    extensions += _extension(_BACKING_FORMAT, b"raw") + _extension(_END, b"")
    header = _header(at, _BACKING_NAME_OFFSET, len(name)) + extensions
    return header.ljust(_BACKING_NAME_OFFSET, b"\0") + name


def counters(mixed_zero_bytes: int) -> bytes:
    """Return the bytes that lie at COUNTERS_OFFSET of a partial file."""
    return map_file.encode_counters(mixed_zero_bytes)


def disown() -> list[tuple[int, bytes]]:
    """Return the writes that make a partial file name a backing file which cannot be opened.

    The result is a list of (offset, bytes). The writes must be done in this order, and each must be
    on disk before the next begins. The last write lies in the first sector, so it happens
    completely or not at all.
    """
    reference = _BACKING_REFERENCE.pack(_NO_BACKING_OFFSET, len(_NO_BACKING))
    return [(_NO_BACKING_OFFSET, _NO_BACKING), (_BACKING_REFERENCE_OFFSET, reference)]


def check_partial_header(at: Layout, own: map_file.MapHeader, cluster: bytes) -> int:
    """Check that the first cluster of a file on disk is the header of this image.

    Returns:
        mixed_zero_bytes, as in `map_file`.

    Raises:
        CacheCorrupt: the header is damaged, or belongs to another image or another size.
    """
    # The name of the backing file may differ: the same repository may have been mounted by another
    # address, or the file may have been disowned.
    reference = slice(
        _BACKING_REFERENCE_OFFSET, _BACKING_REFERENCE_OFFSET + _BACKING_REFERENCE.size
    )
    backing_offset, length = _BACKING_REFERENCE.unpack(
        cluster[reference].ljust(_BACKING_REFERENCE.size, b"\0")
    )
    if (
        len(cluster) < _BACKING_NAME_OFFSET
        or backing_offset not in (_BACKING_NAME_OFFSET, _NO_BACKING_OFFSET)
        or cluster[: _HEADER.size] != _header(at, backing_offset, length)
    ):
        raise CacheCorrupt("not the header of a partial image of this size")
    if _EXTENSION.unpack_from(cluster, _HEADER.size)[0] != _OWN:
        raise CacheCorrupt("the header does not say which image it belongs to")
    try:
        own.check(cluster[_HEADER.size + _EXTENSION.size :][:_OWN_SIZE])
    except CacheCorrupt as error:  # Its message speaks of a map, which a qcow2 does not have.
        raise CacheCorrupt(
            "the header is damaged, or belongs to another image, size or version"
        ) from error
    return map_file.decode_counters(cluster[COUNTERS_OFFSET : COUNTERS_OFFSET + 12])


def is_finished_header(at: Layout, cluster: bytes) -> bool:
    """Return whether `cluster` is the first cluster of a finished file, without a backing file.

    Only the first sector is compared. What follows it can be older, because `Qcow2Store.finish`
    writes all of the metadata again.
    """
    return cluster[:_BACKING_NAME_OFFSET] == finished(at, 0, _BACKING_NAME_OFFSET)


def encode_refcounts(at: Layout, first: int, states: bytes) -> tuple[int, bytes]:
    """Return the refcounts of data clusters from `first` on, as (offset, bytes)."""
    counts = bytearray(2 * len(states))
    counts[1::2] = states.translate(_REFCOUNT_OF)
    return at.refcount_blocks_offset + 2 * (at.metadata_clusters + first), bytes(counts)


def encode_l2(at: Layout, first: int, states: bytes) -> tuple[int, bytes]:
    """Return the L2 entries of data clusters from `first` on, as (offset, bytes)."""
    count, where = len(states), at.l2_offset + 8 * first
    if count and states.count(states[0]) == count:
        return where, _l2_run(at, first, count, states[0])
    # Working by runs of equal states would be slower when there are many runs: this takes 0.3 ms
    # for 4096 states in any order, while 4096 runs took 5 ms.
    start, size = at.data_offset + first * at.cluster_size, at.cluster_size
    offsets = range(start, start + count * size, size)
    entries = [
        offset | _FLAGS[state] if _FLAGS[state] else 0
        for offset, state in zip(offsets, states, strict=True)
    ]
    return where, struct.pack(f">{count}Q", *entries)


def _l2_run(at: Layout, first: int, count: int, state: int) -> bytes:
    if not _FLAGS[state]:
        return bytes(8 * count)
    return _entries(
        8, (at.data_offset + first * at.cluster_size) | _FLAGS[state], at.cluster_size, count
    )


def decode_l2(at: Layout, first: int, table: bytes) -> bytes:
    """Return the states that were given to `encode_l2`. `table` holds their L2 entries.

    Raises:
        CacheCorrupt: an entry is not one that lazyfs writes.
    """
    count = len(table) // 8
    if not any(table):
        return bytes(count)
    for state in (block_map.DATA, block_map.ZERO):
        if table == _l2_run(at, first, count, state):
            return bytes([state]) * count
    states = bytearray(count)
    offset = at.data_offset + first * at.cluster_size
    for i, entry in enumerate(struct.unpack(f">{count}Q", table)):
        if entry:
            expected = (offset + i * at.cluster_size) | COPIED
            if entry & ~ZERO != expected:
                raise CacheCorrupt(f"the L2 entry of cluster {first + i} is {entry:#x}")
            states[i] = block_map.ZERO if entry & ZERO else block_map.DATA
    return bytes(states)


_FLAGS = [
    {block_map.DATA: COPIED, block_map.ZERO: COPIED | ZERO}.get(state, 0) for state in range(256)
]
"""The flags of an L2 entry, by the state of the cluster; 0 if the cluster has no entry."""
_REFCOUNT_OF = bytes(state in (block_map.DATA, block_map.ZERO) for state in range(256))


def _header(at: Layout, backing_offset: int, backing_length: int) -> bytes:
    """Return the header without extensions.

    In a finished file zeroes follow it, which are the extension that ends the list of extensions.
    """
    bits = at.cluster_size.bit_length() - 1
    return _HEADER.pack(
        _MAGIC, _VERSION, backing_offset, backing_length, bits, at.size, 0, at.l2_tables,
        at.l1_offset, at.refcount_table_offset, at.refcount_table_clusters, 0, 0, 0, 0, 0,
        _REFCOUNT_ORDER, _HEADER.size,
    )  # fmt: skip


def _extension(kind: int, data: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(data)) + data.ljust(_up(len(data), 8) * 8, b"\0")


def _up(value: int, unit: int) -> int:
    return -(-value // unit)
