"""The arithmetic of qcow2, judged by a reader written from QEMU's docs/interop/qcow2.txt alone."""

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lazyfs.core import block_map, map_file, qcow2_layout
from lazyfs.core.block_map import CLAIMED, DATA, MISSING, ZERO
from lazyfs.core.qcow2_layout import COUNTERS_OFFSET, MAX_BACKING_NAME, Layout, layout
from lazyfs.engine.image.partial_cache import MAX_BLOCKS
from lazyfs.errors import CacheCorrupt
from lazyfs.units import GiB, KiB, MiB

TiB = 1024 * GiB
SECTOR = 512

cluster_sizes = st.sampled_from([4 * KiB << i for i in range(10)])
edges = st.builds(
    lambda base, off: max(base + off, 0),
    st.sampled_from(
        [0, 4 * KiB, 64 * KiB, 2 * MiB, 8 * MiB, 512 * MiB, 1 * GiB, 2 * TiB, 64 * TiB - 4 * KiB]
    ),
    st.sampled_from([-4096, -513, -512, -1, 0, 1, 511, 512, 513, 777, 4096]),
)
export_sizes = st.one_of(st.integers(0, 64 * TiB), st.integers(0, 64 * MiB), edges)
layouts = st.builds(layout, export_sizes, cluster_sizes)
small_layouts = st.builds(
    layout, st.integers(0, 3 * MiB), st.sampled_from([4 * KiB, 8 * KiB, 64 * KiB])
)


# -- a reader of qcow2 files, from the specification


@dataclass
class Read:
    """Holds what a file says. Offsets are those of clusters."""

    size: int
    cluster_size: int
    backing_offset: int
    backing_length: int
    extensions: list[tuple[int, bytes, int]]
    """The header's extensions: their type, their data, and the data's offset."""
    owners: Counter[int] = field(default_factory=Counter)
    """How often each cluster of the file is used, by its number."""
    refcounts: dict[int, int] = field(default_factory=dict)
    data: list[tuple[int, int]] = field(default_factory=list)
    """The host offset and the flags of the L2 entry of each guest cluster."""


def read_header(file: bytes) -> tuple[Read, dict[str, int]]:
    """Header, version 3, and its extensions."""
    assert file[:4] == b"QFI\xfb"
    names = "version backing_offset backing_length bits size crypt l1_size l1_offset rt_offset rt_clusters snapshots "
    names += "snapshots_offset incompatible compatible autoclear refcount_order header_length"
    at = dict(zip(names.split(), struct.unpack(">IQIIQIIQQIIQQQQII", file[4:104]), strict=True))
    assert at["version"] == 3
    assert at["header_length"] == 104
    assert 9 <= at["bits"] <= 21
    assert (at["crypt"], at["snapshots"], at["snapshots_offset"], at["refcount_order"]) == (
        0,
        0,
        0,
        4,
    )
    assert (at["incompatible"], at["compatible"], at["autoclear"]) == (0, 0, 0)
    assert at["size"] % SECTOR == 0
    extensions = []
    position = at["header_length"]
    while True:
        kind, length = struct.unpack_from(">II", file, position)
        if kind == 0:
            break
        data = file[position + 8 : position + 8 + length]
        assert len(data) == length
        extensions.append((kind, data, position + 8))
        position += 8 + -(-length // 8) * 8
        assert position + 8 <= (at["backing_offset"] or 1 << at["bits"])
    # "The backing file name must be in the remaining space between the end of the extensions and
    # the first cluster's."
    assert at["backing_offset"] + at["backing_length"] <= 1 << at["bits"]
    return Read(
        at["size"], 1 << at["bits"], at["backing_offset"], at["backing_length"], extensions
    ), at


def read_file(file: bytes, file_size: int) -> Read:
    """Read all metadata of a file of which `file` is the part before the data."""
    found, at = read_header(file)
    size = found.cluster_size
    found.owners[0] += 1

    def own(offset: int, clusters: int) -> int:
        assert offset % size == 0
        for number in range(offset // size, offset // size + clusters):
            found.owners[number] += 1
        return offset

    def entries(offset: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f">{count}Q", file, offset)

    own(at["rt_offset"], at["rt_clusters"])
    for i, block in enumerate(entries(at["rt_offset"], at["rt_clusters"] * size // 8)):
        if block:
            counts = struct.unpack_from(f">{size // 2}H", file, own(block, 1))
            found.refcounts.update(
                (i * size // 2 + j, count) for j, count in enumerate(counts) if count
            )
    guest_clusters = -(-found.size // size)
    assert at["l1_size"] * (size // 8) >= guest_clusters, "the L1 table is too small for the disk"
    own(at["l1_offset"], -(-at["l1_size"] * 8 // size))
    for entry in entries(at["l1_offset"], at["l1_size"]):
        assert entry >> 63 == 1
        assert entry & ~(1 << 63) & 0xFF000000000001FF == 0, "reserved bits"
        for l2 in entries(own(entry & 0x00FFFFFFFFFFFE00, 1), size // 8):
            assert l2 & 0x7F000000000001FE == 0, "compressed, or reserved bits"
            offset = l2 & 0x00FFFFFFFFFFFE00
            assert (l2 >> 63 == 1) == (offset != 0)
            if offset:
                assert offset + size <= file_size
                own(offset, 1)
            found.data.append((offset, l2 & 1))
    assert not any(offset for offset, _ in found.data[guest_clusters:]), (
        "clusters behind the end of the disk"
    )
    del found.data[guest_clusters:]
    assert max(found.owners) < file_size // size
    return found


# -- the layout


@given(export_sizes, cluster_sizes)
@settings(max_examples=300)
def test_every_cluster_of_the_file_has_one_use_and_every_table_covers_what_it_must(
    size: int, cluster: int
) -> None:
    at = layout(size, cluster)
    assert at.size % SECTOR == 0
    assert size <= at.size < size + SECTOR
    parts = [
        (0, 1),
        (at.refcount_table_offset, at.refcount_table_clusters),
        (at.refcount_blocks_offset, at.refcount_blocks),
        (at.l1_offset, at.l1_clusters),
        (at.l2_offset, at.l2_tables),
        (at.data_offset, at.clusters),
    ]
    position = 0
    for offset, clusters in parts:
        assert offset == position
        assert offset % cluster == 0
        position += clusters * cluster
    assert position == at.file_size
    total = at.file_size // cluster
    assert at.metadata_clusters == total - at.clusters
    assert (at.clusters - 1) * cluster < at.size <= at.clusters * cluster
    # Tables cover what they must, and no cluster of them is to spare.
    assert _fits(at.l2_tables, at.clusters * 8, cluster)
    assert _fits(at.l1_clusters, at.l2_tables * 8, cluster)
    assert _fits(at.refcount_blocks, total * 2, cluster)
    assert _fits(at.refcount_table_clusters, at.refcount_blocks * 8, cluster)


def _fits(clusters: int, needed: int, cluster_size: int) -> bool:
    return (clusters - 1) * cluster_size < needed <= clusters * cluster_size


@given(export_sizes, cluster_sizes)
def test_what_lazyfs_accepts_is_within_the_limits_of_qemu(size: int, cluster: int) -> None:
    assume(-(-size // cluster) <= MAX_BLOCKS)
    at = layout(size, cluster)
    assert at.l2_tables * 8 <= 32 * MiB  # QCOW_MAX_L1_SIZE
    assert at.refcount_table_clusters * cluster <= 8 * MiB  # QCOW_MAX_REFTABLE_SIZE
    assert at.file_size < 1 << 56  # L2 entries
    assert at.clusters < 1 << 31  # qemu-img check counts in int


def test_the_largest_image_of_each_cluster_size_is_within_the_limits_too() -> None:
    for bits in range(12, 22):
        at = layout(MAX_BLOCKS << bits, 1 << bits)
        assert at.l2_tables * 8 <= 32 * MiB
        assert at.refcount_table_clusters << bits <= 8 * MiB
        assert at.file_size < 1 << 56


@given(st.lists(export_sizes, min_size=2, max_size=2), cluster_sizes)
def test_a_larger_export_never_has_a_smaller_part(sizes: list[int], cluster: int) -> None:
    small, large = (layout(size, cluster) for size in sorted(sizes))
    for name in (
        "refcount_blocks_offset", "l1_offset", "l2_offset", "data_offset", "file_size", "l2_tables", "clusters"
    ):  # fmt: skip
        assert getattr(small, name) <= getattr(large, name), name


# -- finished


@given(layouts, st.data())
def test_any_entry_of_a_finished_file_is_what_the_specification_asks(
    at: Layout, data: st.DataObject
) -> None:
    """The largest files count, too, which no test could read completely."""

    def number(offset: int, width: int) -> int:
        return int.from_bytes(qcow2_layout.finished(at, offset, offset + width), "big")

    def index(count: int) -> int:
        return data.draw(st.integers(0, count - 1))

    size = at.cluster_size
    i = index(at.refcount_table_clusters * size // 8)
    assert number(at.refcount_table_offset + 8 * i, 8) == (
        at.refcount_blocks_offset + i * size if i < at.refcount_blocks else 0
    )
    i = index(at.refcount_blocks * size // 2)
    assert number(at.refcount_blocks_offset + 2 * i, 2) == (1 if i < at.file_size // size else 0)
    if at.clusters:
        i = index(at.l1_clusters * size // 8)
        assert number(at.l1_offset + 8 * i, 8) == (
            (at.l2_offset + i * size) | 1 << 63 if i < at.l2_tables else 0
        )
        i = index(at.l2_tables * size // 8)
        assert number(at.l2_offset + 8 * i, 8) == (
            (at.data_offset + i * size) | 1 << 63 if i < at.clusters else 0
        )
    found, header = read_header(qcow2_layout.finished(at, 0, size))
    assert (found.size, found.cluster_size, found.backing_offset, found.backing_length) == (
        at.size,
        size,
        0,
        0,
    )
    assert found.extensions == []
    assert (header["l1_size"], header["l1_offset"]) == (at.l2_tables, at.l1_offset)
    assert (header["rt_offset"], header["rt_clusters"]) == (
        at.refcount_table_offset,
        at.refcount_table_clusters,
    )


@settings(max_examples=30)
@given(small_layouts)
@example(layout(0, 4 * KiB))
@example(layout(512, 4 * KiB))
@example(layout(777, 2 * MiB))
@example(layout(9 * MiB + 1, 4 * KiB))
def test_a_finished_file_read_as_a_whole(at: Layout) -> None:
    found = read_file(qcow2_layout.finished(at, 0, at.data_offset), at.file_size)
    assert found.size == at.size
    assert found.data == [(at.data_offset + i * at.cluster_size, 0) for i in range(at.clusters)]
    assert (
        found.owners == found.refcounts == dict.fromkeys(range(at.file_size // at.cluster_size), 1)
    )


@given(small_layouts, st.lists(st.integers(0, 1 << 40), max_size=12))
def test_slices_joined_are_the_whole(at: Layout, cuts: list[int]) -> None:
    whole = qcow2_layout.finished(at, 0, at.data_offset)
    assert len(whole) == at.data_offset
    borders = [0, *sorted(cut % (at.data_offset + 1) for cut in cuts), at.data_offset]
    slices = [qcow2_layout.finished(at, start, end) for start, end in pairwise(borders)]
    assert b"".join(slices) == whole


@given(layouts, st.data())
def test_a_slice_anywhere_has_its_length_and_equals_its_bytes_one_by_one(
    at: Layout, data: st.DataObject
) -> None:
    near = st.sampled_from(
        [0, at.refcount_table_offset, at.refcount_blocks_offset, at.l1_offset, at.l2_offset]
    )
    start = data.draw(
        st.one_of(st.integers(0, at.data_offset), near.map(lambda at_: max(at_ - 7, 0)))
    )
    end = min(start + data.draw(st.integers(0, 40)), at.data_offset)
    one_by_one = [qcow2_layout.finished(at, i, i + 1) for i in range(start, end)]
    assert qcow2_layout.finished(at, start, end) == b"".join(one_by_one)
    assert all(len(one) == 1 for one in one_by_one)


# -- partial

OWN = map_file.MapHeader(17, 5 * MiB + 512, 64 * KiB, "team/disk", "build 1")
BACKING = "nbd://images.example.com/team/disk"


def draw_states(data: st.DataObject, count: int) -> bytes:
    """Draw states in runs, as they are on a real disk, or mixed."""
    states = b""
    while len(states) < count:
        states += data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=40).map(lambda raw: bytes(b % 4 for b in raw)),
                st.builds(
                    lambda s, n: bytes([s]) * n,
                    st.sampled_from([MISSING, DATA, ZERO]),
                    st.integers(1, 700),
                ),
            )
        )
    return states[:count]


@settings(max_examples=40)
@given(small_layouts, st.data())
def test_a_partial_file_is_a_valid_qcow2_in_any_state(at: Layout, data: st.DataObject) -> None:
    states = draw_states(data, at.clusters)
    disk = bytearray(at.data_offset)
    parts = [
        (0, qcow2_layout.partial_header(at, OWN, BACKING, 0)),
        *qcow2_layout.initial_tables(at),
    ]
    first = data.draw(st.integers(0, at.clusters))
    for start, end in [(0, first), (first, at.clusters)]:
        parts.append(qcow2_layout.encode_refcounts(at, start, states[start:end]))
        parts.append(qcow2_layout.encode_l2(at, start, states[start:end]))
    for offset, content in parts:
        disk[offset : offset + len(content)] = content
    assert len(disk) == at.data_offset
    found = read_file(bytes(disk), at.file_size)
    expected: dict[int, Callable[[int], tuple[int, int]]] = {
        MISSING: lambda offset: (0, 0),
        CLAIMED: lambda offset: (0, 0),
        DATA: lambda offset: (offset, 0),
        ZERO: lambda offset: (offset, 1),
    }
    assert found.data == [
        expected[s](at.data_offset + i * at.cluster_size) for i, s in enumerate(states)
    ]
    assert found.owners == found.refcounts
    assert (
        disk[found.backing_offset : found.backing_offset + found.backing_length] == BACKING.encode()
    )


@given(layouts, st.data())
def test_states_survive_the_disk(at: Layout, data: st.DataObject) -> None:
    count = min(at.clusters, data.draw(st.integers(0, 900)))
    first = data.draw(st.integers(0, at.clusters - count))
    states = draw_states(data, count)
    offset, table = qcow2_layout.encode_l2(at, first, states)
    assert (offset, len(table)) == (at.l2_offset + 8 * first, 8 * count)
    assert qcow2_layout.decode_l2(at, first, table) == states.replace(
        bytes([CLAIMED]), bytes([MISSING])
    )
    offset, counts = qcow2_layout.encode_refcounts(at, first, states)
    assert offset == at.refcount_blocks_offset + 2 * (at.metadata_clusters + first)
    assert struct.unpack(f">{count}H", counts) == tuple(
        int(state in (DATA, ZERO)) for state in states
    )


@given(
    layouts,
    st.binary(max_size=200).map(lambda raw: raw[: len(raw) // 8 * 8]),
    st.integers(0, 1 << 40),
)
@example(layout(1 * MiB, 64 * KiB), struct.pack(">Q", 1 << 63), 0)
@example(layout(1 * MiB, 64 * KiB), struct.pack(">Q", ZERO), 0)
@example(layout(1 * MiB, 64 * KiB), struct.pack(">Q", 1 << 62), 0)
@example(layout(1 * MiB, 64 * KiB), struct.pack(">Q", (1 << 64) - 1), 0)
def test_l2_entries_that_lazyfs_never_writes_are_corrupt(
    at: Layout, table: bytes, first: int
) -> None:
    states = None
    try:
        states = qcow2_layout.decode_l2(at, first, table)
    except CacheCorrupt:
        assert any(table)
    if states is not None:
        assert qcow2_layout.encode_l2(at, first, states)[1] == table


@given(st.data())
def test_one_wrong_bit_in_an_l2_table_is_corrupt_or_another_state(data: st.DataObject) -> None:
    at = layout(40 * MiB, 64 * KiB)
    states = draw_states(data, 100)
    table = bytearray(qcow2_layout.encode_l2(at, 7, states)[1])
    bit = data.draw(st.integers(0, len(table) * 8 - 1))
    table[bit // 8] ^= 0x80 >> bit % 8
    try:
        found = qcow2_layout.decode_l2(at, 7, bytes(table))
    except CacheCorrupt:
        return
    saved = states.replace(bytes([CLAIMED]), bytes([MISSING]))
    assert bit % 64 == 63, "only the zero flag leads from one valid entry to another"
    assert {found[bit // 64], saved[bit // 64]} == {DATA, ZERO}
    assert (
        found[: bit // 64] + found[bit // 64 + 1 :] == saved[: bit // 64] + saved[bit // 64 + 1 :]
    )


names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
    # bytes of argv, not UTF-8
    st.text(st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF), max_size=20),
    st.sampled_from(["x" * MAX_BACKING_NAME, "é" * 511 + "x", "nbd://h/" + "%25" * 300]),
)


@given(layouts, names, st.integers(0, 1 << 63))
def test_the_header_of_a_partial_file(at: Layout, name: str, mixed: int) -> None:
    cluster = qcow2_layout.partial_header(at, OWN, name, mixed)
    assert len(cluster) <= at.cluster_size
    cluster = cluster.ljust(at.cluster_size, b"\0")
    found, header = read_header(cluster)
    assert (found.size, found.cluster_size) == (at.size, at.cluster_size)
    assert (header["l1_size"], header["l1_offset"]) == (at.l2_tables, at.l1_offset)
    assert (header["rt_offset"], header["rt_clusters"]) == (
        at.refcount_table_offset,
        at.refcount_table_clusters,
    )
    backing = cluster[found.backing_offset : found.backing_offset + found.backing_length]
    assert backing == name.encode("utf-8", "surrogateescape")
    by_kind = {kind: (data, where) for kind, data, where in found.extensions}
    assert by_kind[0xE2792ACA][0] == b"raw"
    assert len(by_kind) == len(found.extensions) == 2
    (own,) = (entry for kind, entry in by_kind.items() if kind != 0xE2792ACA)
    assert own[0].startswith(b"LAZYFSMP")
    assert own[1] <= COUNTERS_OFFSET
    assert COUNTERS_OFFSET + len(qcow2_layout.counters(mixed)) <= min(own[1] + len(own[0]), SECTOR)
    assert qcow2_layout.check_partial_header(at, OWN, cluster) == mixed
    assert not qcow2_layout.is_finished_header(at, cluster)


@given(
    names.filter(lambda name: len(name.encode("utf-8", "surrogateescape")) <= 100),
    st.integers(924, 5000),
)
def test_a_backing_name_too_long_for_qcow2_becomes_one_that_cannot_be_opened(
    name: str, padding: int
) -> None:
    at = layout(1 * MiB, 4 * KiB)
    cluster = qcow2_layout.partial_header(
        at, OWN, "x" * (MAX_BACKING_NAME + 1 - 924 + padding) + name, 0
    )
    found, _ = read_header(cluster.ljust(at.cluster_size, b"\0"))
    backing = cluster[found.backing_offset : found.backing_offset + found.backing_length]
    assert backing.startswith(b"nbd:the-name")
    assert qcow2_layout.check_partial_header(at, OWN, cluster) == 0


@given(layouts, names, st.integers(0, 1 << 63))
def test_a_disowned_header_names_another_backing_file_and_is_the_same_image_s(
    at: Layout, name: str, mixed: int
) -> None:
    cluster = bytearray(
        qcow2_layout.partial_header(at, OWN, name, mixed).ljust(at.cluster_size, b"\0")
    )
    before = bytes(cluster)
    (there, new_name), (reference, changed) = qcow2_layout.disown()
    assert there >= 512 + MAX_BACKING_NAME, "the name that is in use meanwhile is left alone"
    assert reference + len(changed) <= SECTOR, "switched by one sector"
    cluster[there : there + len(new_name)] = new_name
    cluster[reference : reference + len(changed)] = changed
    found, header = read_header(bytes(cluster))
    assert cluster[found.backing_offset : found.backing_offset + found.backing_length] == new_name
    assert (found.size, found.extensions) == (at.size, read_header(before)[0].extensions)
    assert {**header, "backing_offset": 0, "backing_length": 0} == {
        **read_header(before)[1], "backing_offset": 0, "backing_length": 0
    }  # fmt: skip
    assert qcow2_layout.check_partial_header(at, OWN, bytes(cluster)) == mixed
    assert not qcow2_layout.is_finished_header(at, bytes(cluster))


def test_counters_are_rewritten_in_place() -> None:
    at = layout(1 * MiB, 4 * KiB)
    cluster = bytearray(qcow2_layout.partial_header(at, OWN, BACKING, 5))
    fresh = qcow2_layout.counters(70_000)
    cluster[COUNTERS_OFFSET : COUNTERS_OFFSET + len(fresh)] = fresh
    assert bytes(cluster) == qcow2_layout.partial_header(at, OWN, BACKING, 70_000)
    cluster[COUNTERS_OFFSET + 2] ^= 1  # torn: for reporting only
    assert qcow2_layout.check_partial_header(at, OWN, bytes(cluster)) == 0


@given(layouts, st.binary(max_size=600))
@example(layout(0, 4 * KiB), b"")
@example(layout(0, 4 * KiB), bytes(4096))
def test_a_garbage_header_is_corrupt_and_not_finished(at: Layout, garbage: bytes) -> None:
    for cluster in (garbage, garbage.ljust(at.cluster_size, b"\xff")):
        with pytest.raises(CacheCorrupt):
            qcow2_layout.check_partial_header(at, OWN, cluster)
        assert not qcow2_layout.is_finished_header(at, cluster)


@settings(max_examples=200)
@given(st.integers(0, 511), st.integers(1, 255))
def test_a_damaged_partial_header_is_corrupt_unless_it_only_tells_people(
    where: int, change: int
) -> None:
    at = layout(1 * MiB, 64 * KiB)
    cluster = bytearray(
        qcow2_layout.partial_header(at, OWN, BACKING, 5).ljust(at.cluster_size, b"\0")
    )
    cluster[where] ^= change
    own_end = 112 + 100
    length_of_backing_name, length_of_extension = range(16, 20), range(108, 112)
    if where < own_end and where not in length_of_backing_name and where not in length_of_extension:
        with pytest.raises(CacheCorrupt):
            qcow2_layout.check_partial_header(at, OWN, bytes(cluster))
    else:
        assert qcow2_layout.check_partial_header(at, OWN, bytes(cluster)) in (0, 5)
    assert not qcow2_layout.is_finished_header(at, bytes(cluster))


@given(layouts, layouts)
def test_the_header_of_another_layout_or_image_is_refused(at: Layout, other: Layout) -> None:
    cluster = qcow2_layout.partial_header(at, OWN, BACKING, 0).ljust(at.cluster_size, b"\0")
    stranger = map_file.MapHeader(17, 5 * MiB + 512, 64 * KiB, "team/disk", "build 2")
    with pytest.raises(CacheCorrupt, match="another image"):
        qcow2_layout.check_partial_header(at, stranger, cluster)
    if at != other:
        with pytest.raises(CacheCorrupt, match="not the header"):
            qcow2_layout.check_partial_header(other, OWN, cluster)
        assert not qcow2_layout.is_finished_header(
            other, qcow2_layout.finished(at, 0, at.cluster_size)
        )


@given(layouts, st.integers(0, 511))
def test_a_finished_header_is_known_by_its_first_sector(at: Layout, where: int) -> None:
    cluster = bytearray(qcow2_layout.finished(at, 0, at.cluster_size))
    assert qcow2_layout.is_finished_header(at, bytes(cluster))
    cluster[SECTOR:] = b"x" * (at.cluster_size - SECTOR)  # the old backing name, say
    assert qcow2_layout.is_finished_header(at, bytes(cluster))
    cluster[where] ^= 1
    assert not qcow2_layout.is_finished_header(at, bytes(cluster))
    assert not qcow2_layout.is_finished_header(at, b"")


def test_a_page_of_the_map_is_whole_sectors_of_the_tables() -> None:
    """Otherwise checkpoints of neighbouring pages could write one sector with different content."""
    at = layout(1 * GiB, 4 * KiB)
    states = bytes(block_map.PAGE_BLOCKS)
    for first in (0, block_map.PAGE_BLOCKS):
        offset, table = qcow2_layout.encode_l2(at, first, states)
        assert offset % SECTOR == len(table) % SECTOR == 0
