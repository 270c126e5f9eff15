"""BlockMap against a dict of states, and what survives on disk against what was really there."""

import mmap
import re
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lazyfs.core.block_map import CLAIMED, DATA, MISSING, PAGE_BLOCKS, ZERO, BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange

BLOCK = 512
BLOCKS = 2 * PAGE_BLOCKS + 5

# Where mistakes live: both ends and the edges of pages.
edges = st.sampled_from([0, PAGE_BLOCKS, 2 * PAGE_BLOCKS, BLOCKS])
spots = st.builds(lambda edge, off: min(max(edge + off, 0), BLOCKS), edges, st.integers(-6, 6))
spans = st.builds(
    lambda first, length: BlockRun(first, min(first + length, BLOCKS)), spots, st.integers(0, 12)
)


def runs_of(states: list[int]) -> list[tuple[BlockRun, int]]:
    """Return the maximal runs of equal states, found the slow way."""
    found = []
    position = 0
    for state, group in groupby(states):
        end = position + len(list(group))
        found.append((BlockRun(position, end), state))
        position = end
    return found


class Model(RuleBasedStateMachine):
    """Does any sequence of fetches, zero marks, saves, failed saves and crashes."""

    @initialize(tail=st.integers(0, BLOCK - 1))
    def start(self, tail: int) -> None:
        self.size = BLOCKS * BLOCK - tail
        self.map = BlockMap(self.size, BLOCK)
        self.states: dict[int, int] = {}  # what is not here is MISSING
        self.mixed = 0
        self.claims: list[BlockRun] = []
        self.unsaved: set[int] = set()  # pages
        self.disk = bytearray(BLOCKS)

    # -- what the model knows

    def length(self, block: int) -> int:
        return min((block + 1) * BLOCK, self.size) - block * BLOCK

    def bytes_in(self, state: int) -> int:
        return sum(self.length(block) for block, s in self.states.items() if s == state)

    def missing_in(self, span: BlockRun) -> list[BlockRun]:
        states = [self.states.get(block, MISSING) for block in range(*span)]
        return [
            BlockRun(span.first + r.first, span.first + r.end)
            for r, state in runs_of(states)
            if state == MISSING
        ]

    def put(self, run: BlockRun, state: int) -> None:
        for block in range(*run):
            self.states[block] = state

    def touch(self, run: BlockRun) -> None:
        self.unsaved.update(block // PAGE_BLOCKS for block in range(*run))

    def saved(self) -> bytes:
        content = bytearray(BLOCKS)
        for block, state in self.states.items():
            content[block] = MISSING if state == CLAIMED else state
        return bytes(content)

    # -- what may happen

    @rule(span=spans)
    def claim(self, span: BlockRun) -> None:
        for run in self.missing_in(span):
            self.map.claim(run)
            self.put(run, CLAIMED)
            self.claims.append(run)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        run = self.claims.pop(data.draw(st.integers(0, len(self.claims) - 1)))
        length = sum(self.length(block) for block in range(*run))
        data_bytes = data.draw(st.one_of(st.just(0), st.just(length), st.integers(0, length)))
        self.map.mark_present(run, data_bytes)
        self.put(run, DATA if data_bytes else ZERO)
        self.mixed += length - data_bytes if data_bytes else 0
        self.touch(run)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        run = self.claims.pop(data.draw(st.integers(0, len(self.claims) - 1)))
        self.map.release(run)
        self.put(run, MISSING)

    @rule(span=spans)
    def mark_zero(self, span: BlockRun) -> None:
        runs = self.missing_in(span)
        self.map.mark_zero(span)
        for run in runs:
            self.put(run, ZERO)
            self.touch(run)

    @rule()
    def save(self) -> None:
        pages = self.map.take_dirty()
        assert [index for index, _ in pages] == sorted(self.unsaved)
        for index, content in pages:
            self.disk[index * PAGE_BLOCKS : index * PAGE_BLOCKS + len(content)] = content
        self.unsaved.clear()
        assert self.disk == self.saved()

    @rule(data=st.data())
    def save_in_part(self, data: st.DataObject) -> None:
        pages = self.map.take_dirty()
        failed = [index for index, _ in pages if data.draw(st.booleans())]
        for index, content in pages:
            if index not in failed:
                self.disk[index * PAGE_BLOCKS : index * PAGE_BLOCKS + len(content)] = content
        self.map.give_back(failed)
        self.unsaved = set(failed)

    @rule()
    def crash(self) -> None:
        self.map = BlockMap(self.size, BLOCK, bytes(self.disk))
        self.states = {block: state for block, state in enumerate(self.disk) if state != MISSING}
        self.mixed = 0  # the counters' page was lost
        self.claims.clear()
        self.unsaved.clear()

    @rule()
    def close_and_reopen(self) -> None:
        self.save()
        self.map = BlockMap(self.size, BLOCK, bytes(self.disk), self.map.mixed_zero_bytes)
        for run in self.claims:
            self.put(run, MISSING)
        self.claims.clear()

    @rule(span=spans, cut=st.tuples(st.integers(0, BLOCK - 1), st.integers(0, BLOCK - 1)))
    def ask(self, span: BlockRun, cut: tuple[int, int]) -> None:
        assert list(self.map.missing_runs(span)) == self.missing_in(span)
        if span.first == span.end:
            return
        within = self.map.bytes_of(span)
        wanted = ByteRange(
            within.start + cut[0], max(within.start + cut[0] + 1, within.end - cut[1])
        )
        touched = range(wanted.start // BLOCK, (wanted.end - 1) // BLOCK + 1)
        if wanted.end <= self.size:
            assert self.map.is_present(wanted) == all(
                self.states.get(b, MISSING) in (DATA, ZERO) for b in touched
            )

    # -- what always holds

    @invariant()
    def counts_agree(self) -> None:
        assert self.map.mixed_zero_bytes == self.mixed
        assert self.map.present_bytes == self.bytes_in(DATA) - self.mixed
        assert self.map.zero_bytes == self.bytes_in(ZERO) + self.mixed
        assert self.map.complete == (self.bytes_in(DATA) + self.bytes_in(ZERO) == self.size)
        assert self.map.dirty == bool(self.unsaved)

    @invariant()
    def states_agree(self) -> None:
        found = {
            block: state
            for run, state in self.map.runs()
            if state != MISSING
            for block in range(*run)
        }
        assert found == {block: state for block, state in self.states.items() if state != MISSING}

    @invariant()
    def disk_claims_nothing_untrue(self) -> None:
        assert all(
            self.states.get(m.start()) == m.group()[0] for m in re.finditer(rb"[^\0]", self.disk)
        )


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40)


# -- questions, on small maps of any content

states_lists = st.lists(
    st.tuples(st.sampled_from([MISSING, DATA, ZERO]), st.integers(1, 6)), max_size=8
).map(lambda runs: [state for state, count in runs for _ in range(count)])


def small_map(states: list[int], tail: int = 0) -> BlockMap:
    return BlockMap(max(len(states) * BLOCK - tail, 0), BLOCK, bytes(states))


@given(states_lists, st.integers(0, BLOCK - 1))
def test_runs_tile_the_image(states: list[int], tail: int) -> None:
    assert list(small_map(states, tail).runs()) == runs_of(states)


@given(states_lists, st.integers(0, 45), st.one_of(st.integers(1, 3), st.integers(1, 45)))
def test_next_missing_is_the_first_run_from_there(
    states: list[int], first: int, max_blocks: int
) -> None:
    expected = None
    for run, state in runs_of(states):
        if state == MISSING and run.end > first:
            start = max(run.first, first)
            expected = BlockRun(start, min(run.end, start + max_blocks))
            break
    assert small_map(states).next_missing(first, max_blocks) == expected


@given(st.integers(1, 20 * BLOCK), st.data())
def test_blocks_of_and_bytes_of_enclose_the_range(size: int, data: st.DataObject) -> None:
    blocks = BlockMap(size, BLOCK)
    start = data.draw(st.integers(0, size - 1))
    wanted = ByteRange(start, data.draw(st.integers(start + 1, size)))
    run = blocks.blocks_of(wanted)
    assert set(range(*run)) == {offset // BLOCK for offset in range(*wanted)}
    assert blocks.bytes_of(run) == wanted.align_out(BLOCK, size)


@given(st.integers(0, 20 * BLOCK), st.data())
def test_an_empty_range_has_no_blocks_and_is_present(size: int, data: st.DataObject) -> None:
    blocks = BlockMap(size, BLOCK)
    at = data.draw(st.integers(0, size))
    run = blocks.blocks_of(ByteRange(at, at))
    assert run.first == run.end
    assert blocks.is_present(ByteRange(at, at))


def test_an_empty_run_at_a_ragged_end_has_no_negative_length() -> None:
    blocks = BlockMap(BLOCK + 1, BLOCK)
    assert blocks.bytes_of(BlockRun(2, 2)).length == 0


def test_an_empty_image_is_complete() -> None:
    blocks = BlockMap(0, BLOCK)
    assert blocks.complete
    assert blocks.next_missing(0, 1) is None
    assert list(blocks.runs()) == []
    assert blocks.take_dirty() == []


# -- saved maps


@given(st.binary(max_size=60), st.integers(0, BLOCK - 1), st.integers(0, 100 * BLOCK))
def test_whatever_the_disk_says_is_read_as_states(saved: bytes, tail: int, mixed: int) -> None:
    size = max(len(saved) * BLOCK - tail, 0)
    blocks = BlockMap(size, BLOCK, saved, mixed)
    assert [blocks.state(i) for i in range(len(saved))] == [
        b if b in (DATA, ZERO) else MISSING for b in saved
    ]
    assert blocks.present_bytes >= 0
    assert blocks.zero_bytes >= 0
    assert blocks.present_bytes + blocks.zero_bytes <= size
    assert not blocks.dirty


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_saved_map_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a map of {length} blocks for an image of 2"):
        BlockMap(2 * BLOCK, BLOCK, bytes(length))


def test_claims_are_saved_as_missing() -> None:
    blocks = BlockMap(4 * BLOCK, BLOCK)
    blocks.claim(BlockRun(0, 3))
    assert not blocks.dirty
    blocks.mark_present(BlockRun(1, 2), BLOCK)
    assert blocks.take_dirty() == [(0, bytes([MISSING, DATA, MISSING, MISSING]))]


def test_taken_pages_are_copies() -> None:
    blocks = BlockMap(2 * BLOCK, BLOCK)
    blocks.mark_zero(BlockRun(0, 1))
    [(_, content)] = blocks.take_dirty()
    blocks.mark_zero(BlockRun(1, 2))
    assert content == bytes([ZERO, MISSING])
    assert blocks.take_dirty() == [(0, bytes([ZERO, ZERO]))]


def test_a_run_across_pages_dirties_each_of_them() -> None:
    blocks = BlockMap(BLOCKS * BLOCK, BLOCK)
    blocks.claim(BlockRun(PAGE_BLOCKS - 1, 2 * PAGE_BLOCKS + 1))
    blocks.mark_present(BlockRun(PAGE_BLOCKS - 1, 2 * PAGE_BLOCKS + 1), BLOCK)
    assert [(index, len(content)) for index, content in blocks.take_dirty()] == [
        (0, PAGE_BLOCKS),
        (1, PAGE_BLOCKS),
        (2, 5),
    ]


# -- misuse is our own bug

FORBIDDEN = [("claim", DATA), ("claim", ZERO), ("claim", CLAIMED)] + [
    (operation, state)
    for operation in ("release", "mark_present")
    for state in (MISSING, DATA, ZERO)
]


@pytest.mark.parametrize(("operation", "state"), FORBIDDEN)
def test_a_change_from_any_other_state_is_refused_and_changes_nothing(
    operation: str, state: int
) -> None:
    blocks = BlockMap(
        3 * BLOCK, BLOCK, bytes([MISSING, MISSING if state == CLAIMED else state, MISSING])
    )
    if state == CLAIMED:
        blocks.claim(BlockRun(1, 2))
    before = list(blocks.runs()), blocks.present_bytes, blocks.zero_bytes
    arguments = (BLOCK,) if operation == "mark_present" else ()
    with pytest.raises(AssertionError, match="not all in state"):
        getattr(blocks, operation)(BlockRun(1, 2), *arguments)
    assert (list(blocks.runs()), blocks.present_bytes, blocks.zero_bytes) == before
    assert not blocks.dirty


# -- memory that another process reads, and what a process knew that has ended


def map_of(states: list[int], tail: int = 0) -> BlockMap:
    return BlockMap(len(states) * BLOCK - tail, BLOCK, bytes(states))


states = st.lists(st.sampled_from([MISSING, DATA, ZERO, CLAIMED]), min_size=1, max_size=40)


@given(states, st.data(), st.integers(0, BLOCK - 1))
def test_taking_over_is_as_if_it_had_been_saved(
    saved: list[int], data: st.DataObject, tail: int
) -> None:
    known = data.draw(st.lists(st.sampled_from(range(5)), min_size=len(saved), max_size=len(saved)))
    taken = map_of(saved, tail)
    taken.take_over(bytes(known))
    absent = (MISSING, CLAIMED)
    both = [
        new if old in absent and new in (DATA, ZERO) else old
        for old, new in zip(saved, known, strict=True)
    ]
    expected = map_of(both, tail)
    assert list(taken.runs()) == list(expected.runs())
    assert (taken.present_bytes, taken.zero_bytes) == (expected.present_bytes, expected.zero_bytes)
    assert taken.dirty == (list(taken.runs()) != list(map_of(saved, tail).runs()))


def test_a_map_of_another_size_is_not_taken_over() -> None:
    with pytest.raises(ValueError, match="3 blocks"):
        map_of([MISSING, DATA]).take_over(bytes(3))


@given(states, states)
def test_it_is_the_same_in_other_memory(first: list[int], second: list[int]) -> None:
    here, there = map_of(first), map_of(first)
    with mmap.mmap(-1, len(first)) as memory:
        there.live_in(memory)
        for blocks in (here, there):
            for run in list(blocks.missing_runs(BlockRun(0, len(first)))):
                if second[run.first % len(second)] == DATA:
                    blocks.claim(run)
                    blocks.mark_present(run, blocks.bytes_of(run).length)
                elif second[run.first % len(second)] == ZERO:
                    blocks.mark_zero(run)
        assert list(here.runs()) == list(there.runs())
        assert here.take_dirty() == there.take_dirty()
        for block in range(len(first)):
            wanted = ByteRange(block * BLOCK, (block + 1) * BLOCK)
            assert here.is_present(wanted) == there.is_present(wanted)
            assert memory[block] == there.state(block)
            assert here.next_missing(block, 3) == there.next_missing(block, 3)
            assert here.next_data(block) == there.next_data(block)
        assert here.last_data() == there.last_data()
