"""What is fetched for a read, and in what order images are filled."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core import fetch_plan
from lazyfs.core.block_map import CLAIMED, DATA, MISSING, ZERO, BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.fetch_plan import (
    FAR_S,
    MAX_FETCH,
    READAHEAD_MAX,
    READAHEAD_START,
    SMALL,
    STREAMS,
    UNIT_MAX,
    WAITS,
    Candidate,
    FillCursor,
    Readahead,
    ReadAround,
)
from lazyfs.units import GiB, KiB, MiB

BLOCK = 64 * KiB


def block_map(states: list[int], block_size: int = BLOCK, tail: int = 0) -> BlockMap:
    """A map in the given states, its last block short of `tail` bytes."""
    saved = bytes(MISSING if state == CLAIMED else state for state in states)
    blocks = BlockMap(len(states) * block_size - tail, block_size, saved)
    for i, state in enumerate(states):
        if state == CLAIMED:
            blocks.claim(BlockRun(i, i + 1))
    return blocks


# -- plan_read

state_runs = st.lists(
    st.tuples(st.sampled_from([MISSING, DATA, ZERO, CLAIMED]), st.integers(1, 24)), min_size=1
)
images = state_runs.map(lambda runs: [state for state, count in runs for _ in range(count)])


@given(
    images,
    st.sampled_from([4 * KiB, BLOCK, 2 * MAX_FETCH]),
    st.sampled_from([0, 0, READAHEAD_START, READAHEAD_MAX]),
    st.data(),
)
def test_a_plan_fetches_each_missing_block_once_in_order(
    states: list[int], block_size: int, readahead: int, data: st.DataObject
) -> None:
    blocks = block_map(states, block_size, tail=data.draw(st.integers(0, block_size - 1)))
    start = data.draw(st.integers(0, blocks.size - 1))
    wanted = ByteRange(start, data.draw(st.integers(start + 1, blocks.size)))
    plan = fetch_plan.plan_read(blocks, wanted, readahead)

    own = range(wanted.start // block_size, (wanted.end - 1) // block_size + 1)
    end = wanted.end
    if any(states[b] in (MISSING, CLAIMED) for b in own):
        end = min(wanted.end + readahead, blocks.size)
    reach = range(own.start, (end - 1) // block_size + 1)

    assert [b for run in plan for b in range(*run)] == [b for b in reach if states[b] == MISSING]
    for run in plan:
        assert run.first < run.end
        assert (run.end - run.first) * block_size <= MAX_FETCH or run.end - run.first == 1
        assert run.end <= own.stop or run.first >= own.stop, "the reader would wait for readahead"


def test_a_read_of_present_blocks_fetches_nothing_not_even_ahead() -> None:
    blocks = block_map([DATA, ZERO, MISSING, MISSING])
    assert fetch_plan.plan_read(blocks, ByteRange(0, 2 * BLOCK), READAHEAD_MAX) == []


def test_claimed_blocks_are_joined_not_fetched_again() -> None:
    blocks = block_map([MISSING, CLAIMED, MISSING])
    assert fetch_plan.plan_read(blocks, ByteRange(0, 3 * BLOCK), 0) == [(0, 1), (2, 3)]


def test_a_run_is_no_longer_than_needed() -> None:
    plan = fetch_plan.plan_read(block_map([MISSING] * 40), ByteRange(0, 40 * BLOCK), 0)
    assert plan == [(0, 16), (16, 32), (32, 40)]


def test_readahead_ends_at_the_end_of_the_image() -> None:
    blocks = block_map([MISSING] * 3, tail=100)
    assert fetch_plan.plan_read(blocks, ByteRange(0, 1), READAHEAD_MAX) == [(0, 1), (1, 3)]
    assert fetch_plan.plan_read(blocks, ByteRange(2 * BLOCK, blocks.size), READAHEAD_MAX) == [
        (2, 3)
    ]


# -- plan_rest


@given(
    images,
    st.sampled_from([4 * KiB, BLOCK, 2 * MAX_FETCH]),
    st.sampled_from([BLOCK, 4 * BLOCK, UNIT_MAX]),
    st.data(),
)
def test_the_rest_of_a_unit_is_what_is_missing_around_the_wanted_blocks(
    states: list[int], block_size: int, unit: int, data: st.DataObject
) -> None:
    blocks = block_map(states, block_size, tail=data.draw(st.integers(0, block_size - 1)))
    start = data.draw(st.integers(0, blocks.size - 1))
    wanted = ByteRange(start, data.draw(st.integers(start + 1, blocks.size)))
    unit = max(unit, block_size)
    rest = fetch_plan.plan_rest(blocks, wanted, unit)

    own = range(wanted.start // block_size, (wanted.end - 1) // block_size + 1)
    units = {b * block_size // unit for b in own}
    around = [b for b in range(blocks.blocks) if b not in own and b * block_size // unit in units]
    planned = [b for run in rest for b in range(*run)]
    assert sorted(planned) == [b for b in around if states[b] == MISSING]
    assert planned == [b for b in planned if b > own.start] + [
        b for b in planned if b < own.start
    ], "behind it first"
    assert all((run.end - run.first) * block_size <= max(MAX_FETCH, block_size) for run in rest)


# -- ReadAround


def test_a_near_repository_is_asked_for_what_is_wanted() -> None:
    around = ReadAround(BLOCK)
    for i in range(10 * WAITS):
        around.wanted_came(FAR_S / 2 if i % WAITS == 0 else 1.0, BLOCK)
        around.rest_came(0.0, 0.0)
        assert around.unit == BLOCK


def far(block_size: int = BLOCK) -> ReadAround:
    around = ReadAround(block_size)
    for _ in range(WAITS):
        assert around.unit == block_size
        around.wanted_came(0.02, BLOCK)
        around.wanted_came(0.0, SMALL + 1)  # says nothing
    return around


def test_the_unit_of_a_far_one_grows_while_the_rest_comes_soon_enough() -> None:
    around = far()
    units = [around.unit]
    for _ in range(5):
        around.rest_came(0.02, 0.02)
        units.append(around.unit)
    assert units == [2 * BLOCK, 4 * BLOCK, 8 * BLOCK, UNIT_MAX, UNIT_MAX, UNIT_MAX]
    around.wanted_came(0.02, BLOCK)
    assert around.unit == UNIT_MAX, "the rest decides"
    around.rest_came(0.02, 0.021)
    assert around.unit == UNIT_MAX // 2
    for _ in range(9):
        around.rest_came(0.02, 0.021)
    assert around.unit == BLOCK


def test_a_repository_that_comes_nearer_is_near_at_once() -> None:
    around = far()
    for _ in range(3):
        around.rest_came(0.02, 0.0)
    around.wanted_came(0.001, BLOCK)
    assert around.unit == BLOCK


def test_blocks_larger_than_the_largest_unit_stay_alone() -> None:
    around = far(4 * UNIT_MAX)
    for rest_s in (0.0, 0.0, 1.0):
        around.rest_came(0.02, rest_s)
        assert around.unit == 4 * UNIT_MAX


# -- Readahead


def read_on(readahead: Readahead, start: int, count: int, length: int = BLOCK) -> list[int]:
    return [
        readahead.window(ByteRange(start + i * length, start + (i + 1) * length))
        for i in range(count)
    ]


def test_the_window_doubles_while_reads_are_sequential() -> None:
    assert read_on(Readahead(), 5 * GiB, 7) == [
        0,
        128 * KiB,
        256 * KiB,
        512 * KiB,
        1 * MiB,
        2 * MiB,
        2 * MiB,
    ]


@given(st.lists(st.integers(0, 1000), unique=True, max_size=30))
def test_random_reads_cause_no_readahead(places: list[int]) -> None:
    readahead = Readahead()
    far = 4 * READAHEAD_MAX
    assert all(
        readahead.window(ByteRange(place * far, place * far + BLOCK)) == 0 for place in places
    )


@given(st.lists(st.integers(0, STREAMS - 1), max_size=100))
def test_interleaved_streams_are_told_apart(turns: list[int]) -> None:
    together = Readahead()
    alone = [Readahead() for _ in range(STREAMS)]
    position = [stream * GiB for stream in range(STREAMS)]
    for stream in turns:
        wanted = ByteRange(position[stream], position[stream] + BLOCK)
        position[stream] = wanted.end
        assert together.window(wanted) == alone[stream].window(wanted)


def test_the_stream_idle_for_longest_is_forgotten_first() -> None:
    readahead = Readahead()
    for stream in range(STREAMS + 1):
        read_on(readahead, stream * GiB, 1)
    assert readahead.window(ByteRange(1 * GiB + BLOCK, 1 * GiB + 2 * BLOCK)) > 0
    assert readahead.window(ByteRange(BLOCK, 2 * BLOCK)) == 0


def test_reads_slightly_out_of_order_continue_a_stream() -> None:
    readahead = Readahead()
    order = [0, 1, 3, 2, 5, 4, 7, 6]
    windows = [readahead.window(ByteRange(i * BLOCK, (i + 1) * BLOCK)) for i in order]
    assert windows[0] == 0
    assert all(a <= b for a, b in pairwise(windows))
    assert windows[-1] == READAHEAD_MAX


def test_a_reader_served_from_the_window_continues_where_it_ends() -> None:
    readahead = Readahead()
    position, windows = 0, []
    for _ in range(8):  # what the window covers is present, so the next miss lies behind it
        windows.append(readahead.window(ByteRange(position, position + BLOCK)))
        position += BLOCK + windows[-1]
    assert windows == [0, *(128 * KiB << i for i in range(5)), READAHEAD_MAX, READAHEAD_MAX]


def test_a_read_just_behind_does_not_pull_its_stream_back() -> None:
    readahead = Readahead()
    read_on(readahead, 0, 8)
    assert readahead.window(ByteRange(6 * BLOCK, 7 * BLOCK)) == READAHEAD_MAX
    reach = 8 * BLOCK + READAHEAD_MAX + READAHEAD_START
    assert readahead.window(ByteRange(reach, reach + BLOCK)) == READAHEAD_MAX


def test_a_read_far_behind_its_stream_starts_another() -> None:
    readahead = Readahead()
    read_on(readahead, 0, 8)
    behind = 8 * BLOCK - READAHEAD_START
    assert readahead.window(ByteRange(behind - 1, behind + 1)) == 0


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 40)), max_size=60))
def test_a_window_is_nothing_or_within_bounds(reads: list[tuple[int, int]]) -> None:
    readahead = Readahead()
    for first, count in reads:
        window = readahead.window(ByteRange(first * BLOCK, (first + count) * BLOCK))
        assert window == 0 or READAHEAD_START <= window <= READAHEAD_MAX


# -- FillCursor


def take(cursor: FillCursor, blocks: BlockMap, limit: int) -> BlockRun | None:
    """One step of population, whose request is under way afterwards."""
    run = cursor.peek(blocks, limit)
    if run is not None:
        cursor.jump(run.end)
        blocks.claim(run)
    return run


@given(
    images,
    st.sampled_from([1, BLOCK - 1, BLOCK, 3 * BLOCK, 3 * BLOCK + 1, MAX_FETCH]),
    st.lists(st.one_of(st.none(), st.integers(0, 500))),
)
def test_population_fetches_every_missing_block_exactly_once(
    states: list[int], limit: int, jumps: list[int | None]
) -> None:
    blocks = block_map(states)
    cursor = FillCursor()
    filled: list[int] = []
    for jump in jumps + [None] * len(states):  # readers interfere, then leave
        if jump is not None:
            cursor.jump(jump)
        run = take(cursor, blocks, limit)
        if run is None:
            break
        assert run.end - run.first == 1 or (run.end - run.first) * BLOCK <= limit
        filled += range(*run)
    assert take(cursor, blocks, limit) is None
    assert sorted(filled) == [i for i, state in enumerate(states) if state == MISSING]


@given(images, st.data())
def test_population_comes_back_to_what_failed(states: list[int], data: st.DataObject) -> None:
    blocks = block_map([MISSING if state == CLAIMED else state for state in states])
    cursor = FillCursor()
    failures = data.draw(st.integers(0, 5))
    while (run := take(cursor, blocks, 4 * BLOCK)) is not None:
        if failures:
            failures -= 1
            blocks.release(run)
        else:
            blocks.mark_present(run, blocks.bytes_of(run).length)
    assert blocks.complete


def test_population_goes_on_after_the_reader_then_round() -> None:
    blocks = block_map([MISSING] * 6)
    cursor = FillCursor()
    cursor.jump(4)
    order = []
    while (run := take(cursor, blocks, BLOCK)) is not None:
        order.append(run.first)
    assert order == [4, 5, 0, 1, 2, 3]


def test_looking_ahead_moves_nothing() -> None:
    blocks = block_map([DATA, MISSING, MISSING, DATA])
    cursor = FillCursor()
    assert cursor.peek(blocks) == (1, 2)
    assert cursor.peek(blocks, 8 * BLOCK) == (1, 3)
    assert take(cursor, blocks, BLOCK) == (1, 2)


def test_population_of_an_empty_image_is_over_at_once() -> None:
    assert FillCursor().peek(BlockMap(0, BLOCK), MAX_FETCH) is None


# -- choose_image

candidates = st.lists(
    st.builds(Candidate, st.integers(1, 20), st.booleans(), st.integers(0, 9), busy=st.booleans()),
    max_size=8,
    unique_by=lambda c: c.inode,
)


@given(candidates, st.integers(9, 20), st.randoms(use_true_random=False))
def test_the_choice_is_the_best_whatever_the_order(
    images: list[Candidate], turn: int, random: object
) -> None:
    chosen = fetch_plan.choose_image(images, turn)
    shuffled = list(images)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fetch_plan.choose_image(shuffled, turn) == chosen
    if not images:
        assert chosen is None
        return
    [best] = [c for c in images if c.inode == chosen]
    impatient = [c for c in images if not c.busy and turn - c.waits_since > fetch_plan.PATIENCE]
    if impatient:
        assert best in impatient
        assert best.waits_since == min(c.waits_since for c in impatient)
        return
    assert best.has_readers or not any(c.has_readers for c in images)
    rivals = [c for c in images if c.has_readers == best.has_readers]
    assert not best.busy or all(c.busy for c in rivals), "one that nobody works on comes first"
    assert best.waits_since == min(c.waits_since for c in rivals if c.busy == best.busy)


@pytest.mark.parametrize("has_readers", [False, True])
def test_equals_take_turns(has_readers: bool) -> None:
    served = dict.fromkeys([30, 10, 20], 0)
    order = []
    for turn in range(1, 7):
        chosen = fetch_plan.choose_image(
            [Candidate(inode, has_readers, last) for inode, last in served.items()], turn
        )
        assert chosen is not None
        served[chosen] = turn
        order.append(chosen)
    assert order == [10, 20, 30, 10, 20, 30]


def test_an_image_with_readers_goes_before_one_without() -> None:
    assert fetch_plan.choose_image([Candidate(1, False, 98), Candidate(2, True, 99)], 100) == 2


def test_images_without_readers_get_one_turn_of_five() -> None:
    served = {1: 0, 2: 0}
    order = []
    for turn in range(1, 21):
        images = [Candidate(1, True, served[1]), Candidate(2, False, served[2])]
        chosen = fetch_plan.choose_image(images, turn)
        assert chosen is not None
        served[chosen] = turn
        order.append(chosen)
    assert order == [1, 1, 1, 1, 2] * 4
