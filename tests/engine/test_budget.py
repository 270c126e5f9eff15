"""Tests the counter that is asked before every write."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.engine.budget import Budget, BudgetDemand, Reservation

steps = st.lists(
    st.tuples(
        st.sampled_from(["reader", "background", "keep", "release", "shrink", "count", "look"]),
        st.integers(0, 60),
    ),
    max_size=60,
)


@given(steps)
def test_kept_and_reserved_never_exceed_the_limit(steps: list[tuple[str, int]]) -> None:
    limit, headroom, kept = 200, 20, 0
    reserved: list[tuple[int, Reservation]] = []
    seen = 0
    budget = Budget()
    calls: list[None] = []
    budget.on_low = lambda: calls.append(None)
    budget.begin_count()
    budget.set_left(limit, headroom)
    for what, amount in steps:
        if what in ("reader", "background"):
            left = limit - kept - sum(size for size, _ in reserved)
            if (reservation := budget.reserve(amount, what == "background")) and amount:
                assert amount <= left
                assert what == "reader" or left >= headroom
                reserved.append((amount, reservation))
        elif what == "keep" and reserved:
            size, reservation = reserved.pop()
            kept += size
            reservation.keep()
            reservation.release()  # it has ended
        elif what == "release" and reserved:
            reserved.pop()[1].release()
        elif what == "shrink" and reserved:
            size, reservation = reserved.pop()
            reservation.shrink(min(size, amount))
            reserved.append((min(size, amount), reservation))
        elif what == "count":  # what is kept between the sum and its use counts in neither or both
            budget.begin_count()
            seen = kept
        elif what == "look":
            budget.set_left(limit - seen, headroom)
            calls.clear()
            budget.begin_count()
            seen = kept
        assert kept + sum(size for size, _ in reserved) <= limit
        assert len(calls) <= 1


def test_everything_goes_without_a_limit() -> None:
    budget = Budget()
    reservation, other = budget.reserve(1 << 60), budget.reserve(1 << 60, background=True)
    assert reservation is not None
    assert other is not None
    reservation.keep()
    other.shrink(1)
    other.release()
    assert not budget.tight


def test_a_reservation_that_is_not_kept_is_released_with_its_block() -> None:
    budget = Budget()
    budget.begin_count()
    budget.set_left(100, 0)
    with pytest.raises(OSError, match="full"), budget.reserve(100) or pytest.fail("refused"):
        raise OSError("full")
    with budget.reserve(60) or pytest.fail("refused") as reservation:
        reservation.keep()
    assert budget.demand(100) == BudgetDemand(40, 0, refused_reader=False)


def test_headroom_is_for_readers() -> None:
    budget = Budget()
    budget.begin_count()
    budget.set_left(100, 30)
    assert budget.reserve(60, background=True)
    assert budget.reserve(20, background=True)  # begun above the mark
    assert not budget.reserve(1, background=True)
    assert budget.reserve(20)
    assert not budget.reserve(1)


def test_it_tells_once_when_it_runs_low_and_what_was_refused() -> None:
    budget, told = Budget(), []
    budget.on_low = lambda: told.append(1)
    budget.begin_count()
    budget.set_left(100, 30)
    assert budget.reserve(60)
    assert told == []
    assert budget.reserve(20)
    assert told == [1]
    assert not budget.reserve(25, background=True)
    assert budget.demand(100) == BudgetDemand(20, 25, refused_reader=False)
    assert not budget.reserve(50)
    assert told == [1]
    assert budget.demand(100) == BudgetDemand(20, 50, refused_reader=True)
    budget.set_left(100, 30)
    assert budget.demand(100) == BudgetDemand(20, 0, refused_reader=False)
    assert not budget.reserve(50)
    assert told == [1, 1]


def test_nothing_for_nothing() -> None:
    budget = Budget()
    budget.begin_count()
    budget.set_left(0, 0)
    assert budget.reserve(0)
    assert not budget.reserve(1)


def test_threads_that_reserve_and_keep_while_somebody_counts() -> None:
    budget, limit = Budget(), 20_000
    budget.begin_count()
    budget.set_left(limit, 0)
    kept = [0] * 4

    def work(mine: int) -> None:
        refused = 0
        while refused < 2000:
            if reservation := budget.reserve(1):
                kept[mine] += 1  # as the block map: counted before the budget is told
                reservation.keep()
            else:
                refused += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        budget.begin_count()
        budget.set_left(limit - sum(kept), 0)
    for thread in threads:
        thread.join()
    assert limit - 100 <= sum(kept) <= limit
