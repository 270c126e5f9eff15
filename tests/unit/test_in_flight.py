"""The in-flight table: every flight ends, every waiter is woken, and no block is fetched twice at
once."""

from itertools import accumulate

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from lazyfs.core.block_map import CLAIMED, DATA, MISSING, ZERO, BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.in_flight import Flight, InFlight, Purpose

BLOCK = 4096
SIZE = 40 * BLOCK - 512


class Reader:
    """Somebody who reads a range, and waits for one flight after the other until all of it is
    present."""

    def __init__(self, wanted: ByteRange, number: int = 0) -> None:
        self.number = number
        self.wanted = wanted
        self.waits_for: Flight | None = None


class Model(RuleBasedStateMachine):
    """Any order of plans, arrivals, failures, cancellations and population's claims."""

    flights = Bundle("flights")
    readers = Bundle("readers")

    @initialize(present=st.lists(st.integers(0, 39), max_size=20))
    def begin(self, present: list[int]) -> None:
        self.blocks = BlockMap(SIZE, BLOCK)
        for block in present:
            self.blocks.mark_zero(BlockRun(block, block + 1))
        self.table: InFlight[Reader] = InFlight(self.blocks)
        self.under_way: set[Flight] = set()
        self.ended: set[Flight] = set()
        self.waiting: set[Reader] = set()
        self.done: set[Reader] = set()
        self.readers_made = 0

    # -- what happens

    @rule(
        target=flights,
        start=st.integers(0, SIZE - 1),
        length=st.integers(1, 12 * BLOCK),
        ahead=st.sampled_from([0, 3 * BLOCK, SIZE]),
        unit=st.sampled_from([BLOCK, 4 * BLOCK, 16 * BLOCK]),
    )
    def read(self, start: int, length: int, ahead: int, unit: int) -> object:
        self.readers_made += 1
        reader = Reader(ByteRange(start, min(start + length, SIZE)), self.readers_made)
        self.waiting.add(reader)
        return multiple(*self._go_on(reader, ahead, unit))

    def _go_on(self, reader: Reader, ahead: int = 0, unit: int = BLOCK) -> list[Flight]:
        """As a reader does it: look, begin what is missing, wait for the first flight in the
        way."""
        if self.blocks.is_present(reader.wanted):
            self.waiting.remove(reader)
            self.done.add(reader)
            return []
        before = set(self.under_way)
        plan = self.table.plan(reader.wanted, ahead, unit)
        assert before.isdisjoint(plan.new)
        self.under_way |= set(plan.new)
        assert plan.joined, "something is missing, and nobody fetches it"
        assert set(plan.joined) <= self.under_way
        own = self.blocks.blocks_of(reader.wanted)
        for block in range(own.first, own.end):
            covered = any(flight.run.first <= block < flight.run.end for flight in plan.joined)
            assert covered or self.blocks.state(block) in (DATA, ZERO)
        if not any(flight.purpose is Purpose.DEMAND for flight in plan.new):
            assert not plan.new, "who joins others begins nothing around them"
        reader.waits_for = plan.joined[0]
        assert self.table.wait(plan.joined[0], reader)
        return list(plan.new)

    @rule(target=flights, limit=st.integers(1, 10 * BLOCK), known=st.integers(0, SIZE // BLOCK))
    def claim(self, limit: int, known: int) -> object:
        flight = self.table.claim(limit, lambda span: max(span.start, min(known * BLOCK, span.end)))
        if flight is None:
            return multiple()
        assert flight.purpose is Purpose.POPULATION
        assert self.blocks.bytes_of(flight.run).length <= max(limit, BLOCK)
        assert (
            flight.run.end * BLOCK <= max(known * BLOCK, 0) or flight.run.end == self.blocks.blocks
        )
        self.under_way.add(flight)
        return flight

    @rule(flight=consumes(flights), kept=st.booleans(), data=st.integers(0, 1 << 20))
    def end(self, flight: Flight, kept: bool, data: int) -> None:
        length = self.blocks.bytes_of(flight.run).length
        self._settle(flight, min(data, length) if kept else None)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.waiting:
            reader = data.draw(
                st.sampled_from(sorted(self.waiting, key=lambda reader: reader.number))
            )
            assert reader.waits_for is not None
            self.table.forget(reader.waits_for, reader)
            self.waiting.remove(reader)

    def _settle(self, flight: Flight, kept_bytes: int | None) -> None:
        waiters = self.table.settle(flight, self._by_block(flight, kept_bytes))
        self.under_way.remove(flight)
        self.ended.add(flight)
        assert set(waiters) == {reader for reader in self.waiting if reader.waits_for is flight}
        assert len(set(waiters)) == len(waiters)
        for reader in waiters:
            self._go_on(reader)

    def _by_block(self, flight: Flight, kept_bytes: int | None) -> dict[int, int] | None:
        """Return so many bytes from the beginning of the run, by block."""
        if kept_bytes is None:
            return None
        lengths = {b: self.blocks.bytes_of(BlockRun(b, b + 1)).length for b in range(*flight.run)}
        ends = accumulate(lengths.values())
        kept = {
            block: min(length, kept_bytes - (end - length))
            for (block, length), end in zip(lengths.items(), ends, strict=True)
        }
        return {block: amount for block, amount in kept.items() if amount > 0}

    # -- what always holds

    @invariant()
    def a_block_is_claimed_exactly_while_a_flight_has_it(self) -> None:
        if not hasattr(self, "table"):
            return
        fetched = [block for flight in self.under_way for block in range(*flight.run)]
        assert len(fetched) == len(set(fetched)), "two flights fetch one block"
        assert {
            block for block in range(self.blocks.blocks) if self.blocks.state(block) == CLAIMED
        } == set(fetched)
        assert set(self.table) == self.under_way
        assert len(self.table) == len(self.under_way)

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        for reader in getattr(self, "waiting", ()):
            assert reader.waits_for in self.under_way

    @invariant()
    def what_has_ended_cannot_be_waited_for(self) -> None:
        for flight in getattr(self, "ended", ()):
            assert not self.table.wait(flight, Reader(ByteRange(0, 1)))

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        for _ in range(1000):  # a waiting reader may begin another flight when one ends
            if not self.under_way:
                break
            self._settle(min(self.under_way, key=lambda flight: flight.run.first), 0)
        assert not self.waiting, "everything has come, and somebody waits"
        assert all(
            self.blocks.state(block) in (MISSING, DATA, ZERO) for block in range(self.blocks.blocks)
        )


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_flight_ends_once() -> None:
    table: InFlight[str] = InFlight(BlockMap(SIZE, BLOCK))
    (flight,) = table.plan(ByteRange(0, 10), 0, BLOCK).new
    table.wait(flight, "a")
    table.wait(flight, "b")
    table.forget(flight, "a")
    assert table.settle(flight, None) == ["b"]
    with pytest.raises(KeyError):
        table.settle(flight, None)


def test_population_goes_on_behind_a_reader() -> None:
    table: InFlight[str] = InFlight(BlockMap(SIZE, BLOCK))
    table.plan(ByteRange(10 * BLOCK, 11 * BLOCK), 0, BLOCK)
    claim = table.claim(2 * BLOCK, lambda span: span.end)
    assert claim is not None
    assert claim.run == (11, 13)
    assert table.next_missing(BLOCK) == (13, 14)
