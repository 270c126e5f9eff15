"""A reader of qcow2 files for tests, written only from the format's specification, not from lazyfs.

It says what `qemu-img check`, `map` and `compare` would say, but in a millisecond. A test compares
the two. Source: QEMU, docs/interop/qcow2.txt. It permits only what lazyfs may use: version 3 and
refcounts of 16 bits, but no compression, snapshots, encryption, external data or extended L2
entries.
"""

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MISSING, DATA, ZERO = "missing", "data", "zero"

_COPIED = 1 << 63
_OFFSET = 0x00FFFFFFFFFFFE00
_RESERVED_L1 = ~(_COPIED | _OFFSET) & (2**64 - 1)
_RESERVED_L2 = ~(_COPIED | _OFFSET | 1) & (2**64 - 1)
_END, _BACKING_FORMAT = 0, 0xE2792ACA


class NotQcow2(Exception):
    """QEMU would not open the file."""


@dataclass
class Finding:
    """Says what a file contains."""

    size: int
    cluster_size: int
    backing: str | None
    backing_format: str | None
    clusters: list[str] = field(default_factory=list)
    """MISSING, DATA or ZERO, for each cluster of the virtual disk."""
    offsets: list[int] = field(default_factory=list)
    """The offsets of the data clusters in the file; 0 for the other clusters."""
    corruptions: list[str] = field(default_factory=list)
    leaks: int = 0

    @property
    def present(self) -> set[int]:
        return {i for i, kind in enumerate(self.clusters) if kind != MISSING}

    @property
    def check_code(self) -> int:
        """The exit code of `qemu-img check`."""
        return 2 if self.corruptions else 3 if self.leaks else 0


def examine(image: bytes | bytearray) -> Finding:
    """Read a whole image.

    Raises:
        NotQcow2: the file cannot be opened.
    """
    found, refcount_table, l1 = _header(image)
    size = found.cluster_size
    used: Counter[int] = Counter([0])

    def use(offset: int, what: str) -> bool:
        """Count a cluster as used. Return False if the offset leads to no cluster."""
        if offset % size or offset == 0 or offset + size > len(image):
            found.corruptions.append(f"{what} at {offset:#x}")
            return False
        used[offset // size] += 1
        return True

    for offset in range(refcount_table[0], refcount_table[0] + refcount_table[1] * size, size):
        use(offset, "refcount table")
    for offset in range(l1[0], l1[0] + -(-l1[1] * 8 // size) * size, size):
        use(offset, "L1 table")
    copied: list[tuple[int, bool]] = []
    for i, l1_entry in enumerate(_numbers(image, l1[0], l1[1], 8)):
        if l1_entry & _RESERVED_L1:
            found.corruptions.append(f"L1 entry {i} is {l1_entry:#x}")
        l2_offset = l1_entry & _OFFSET
        entries: Iterator[int] = iter([0] * (size // 8))
        if l2_offset and use(l2_offset, f"L2 table {i}"):
            copied.append((l2_offset // size, bool(l1_entry & _COPIED)))
            entries = _numbers(image, l2_offset, size // 8, 8)
        for j, entry in enumerate(entries, i * (size // 8)):
            kind, offset = _l2_entry(found, j, entry)
            if offset and use(offset, f"cluster {j}"):
                copied.append((offset // size, bool(entry & _COPIED)))
            if j * size < found.size:
                found.clusters.append(kind)
                found.offsets.append(offset)
            elif entry:
                found.corruptions.append(f"L2 entry {j}, behind the end of the disk, is {entry:#x}")
    _compare(found, _refcounts(found, image, refcount_table, use), used, copied)
    return found


def _compare(
    found: Finding,
    refcounts: dict[int, int],
    used: Counter[int],
    copied: Iterable[tuple[int, bool]],
) -> None:
    """Note where the refcounts, or the flags that repeat them, differ from the uses."""
    for cluster in sorted({*used, *refcounts}):
        counted, there = refcounts.get(cluster, 0), used[cluster]
        if counted < there:
            found.corruptions.append(
                f"cluster {cluster} of the file has refcount {counted}, and {there} uses"
            )
        elif counted > there:
            found.leaks += 1
    for cluster, flag in copied:
        if flag != (refcounts.get(cluster) == 1):
            found.corruptions.append(f"cluster {cluster} of the file: COPIED is {flag}")
    if any(count > 1 for count in used.values()):
        found.corruptions.append("a cluster is used twice")


def differences(
    found: Finding, image: bytes | bytearray, disk: bytes, backing: bytes | None
) -> list[int]:
    """Return the clusters that do not read as `disk`.

    Behind the end of `disk` they must be zeroes. Missing clusters are read from `backing`, the
    content of the backing file.
    """
    size, wrong = found.cluster_size, []
    for i, (kind, offset) in enumerate(zip(found.clusters, found.offsets, strict=True)):
        length = min(size, found.size - i * size)
        if kind == DATA:
            content = bytes(image[offset : offset + length])
        elif kind == MISSING and backing is not None:
            content = backing[i * size : i * size + length].ljust(length, b"\0")
        else:
            content = bytes(length)
        if content != disk[i * size : i * size + length].ljust(length, b"\0"):
            wrong.append(i)
    return wrong


def _header(image: bytes | bytearray) -> tuple[Finding, tuple[int, int], tuple[int, int]]:
    """Return the header's values, with (offset, clusters) of the refcount table and (offset,
    entries) of the L1 table."""
    if len(image) < 104:
        raise NotQcow2("too short")
    (
        magic, version, backing_offset, backing_length, bits, size, crypt, l1_entries, l1_offset, table_offset,
        table_clusters, snapshots, _, incompatible, compatible, autoclear, order, length,
    ) = struct.unpack_from(">4sIQIIQIIQQIIQQQQII", image)  # fmt: skip
    if (magic, version, length, order) != (b"QFI\xfb", 3, 104, 4):
        raise NotQcow2(
            f"magic {magic!r}, version {version}, header of {length}, refcount order {order}"
        )
    if crypt or snapshots or incompatible or compatible or autoclear or not 9 <= bits <= 21:
        raise NotQcow2("features")
    cluster_size = 1 << bits
    if l1_entries < -(-size // (cluster_size * (cluster_size // 8))) or size % 512:
        raise NotQcow2(f"a disk of {size} bytes with an L1 table of {l1_entries} entries")
    for offset, entries, limit in (
        (l1_offset, l1_entries, 4 << 20),
        (table_offset, table_clusters, 1 << 10),
    ):
        if offset % cluster_size or entries > limit:
            raise NotQcow2(f"a table of {entries} at {offset:#x}")
    found = Finding(size, cluster_size, None, None)
    end = backing_offset or cluster_size
    position = length
    while position + 8 <= end:
        kind, extent = struct.unpack_from(">II", image, position)
        if kind == _END:
            break
        if position + 8 + extent > end:
            raise NotQcow2("an extension is too long")
        if kind == _BACKING_FORMAT:
            found.backing_format = bytes(image[position + 8 : position + 8 + extent]).decode()
        position += 8 + -(-extent // 8) * 8
    if backing_offset:
        if backing_length > min(1023, cluster_size - backing_offset):
            raise NotQcow2("the backing file's name is too long")
        name = bytes(image[backing_offset : backing_offset + backing_length]).partition(b"\0")[0]
        found.backing = name.decode() or None
    return found, (table_offset, table_clusters), (l1_offset, l1_entries)


def _l2_entry(found: Finding, cluster: int, entry: int) -> tuple[str, int]:
    """Return what an entry says, and the offset of the cluster that it uses."""
    offset = entry & _OFFSET
    if entry & _RESERVED_L2 or (offset == 0 and entry & _COPIED):
        found.corruptions.append(f"L2 entry {cluster} is {entry:#x}")
    if entry & 1:
        return ZERO, offset
    return (DATA, offset) if offset else (MISSING, 0)


def _refcounts(
    found: Finding, image: bytes | bytearray, table: tuple[int, int], use: object
) -> dict[int, int]:
    """Return the refcounts that are not 0, by cluster of the file."""
    assert callable(use)
    size = found.cluster_size
    counts = {}
    for i, offset in enumerate(_numbers(image, table[0], table[1] * size // 8, 8)):
        if offset and use(offset, f"refcount block {i}"):
            block = image[offset : offset + size]
            if any(block):
                for j, count in enumerate(_numbers(block, 0, size // 2, 2), i * (size // 2)):
                    if count:
                        counts[j] = count
    return counts


def _numbers(image: bytes | bytearray, offset: int, count: int, width: int) -> Iterator[int]:
    data = bytes(image[offset : offset + count * width]).ljust(count * width, b"\0")
    return iter(struct.unpack(f">{count}{'Q' if width == 8 else 'H'}", data))
