"""The counter that every write asks."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.engine.budget import Budget

steps = st.lists(
    st.tuples(st.sampled_from(["reader", "background", "keep", "give back", "count", "look"]), st.integers(0, 60)),
    max_size=60,
)


@given(steps)
def test_kept_and_reserved_never_exceed_the_limit(steps: list[tuple[str, int]]) -> None:
    limit, headroom, kept = 200, 20, 0
    reserved: list[int] = []
    seen = 0
    budget = Budget()
    calls: list[None] = []
    budget.on_low = lambda: calls.append(None)
    budget.begin_count()
    budget.set_left(limit, headroom)
    for what, amount in steps:
        if what in ("reader", "background"):
            left = limit - kept - sum(reserved)
            if budget.reserve(amount, what == "background") and amount:
                assert amount <= left
                assert what == "reader" or left >= headroom
                reserved.append(amount)
        elif what == "keep" and reserved:
            kept += reserved[-1]
            budget.keep(reserved.pop())
        elif what == "give back" and reserved:
            budget.give_back(reserved.pop())
        elif what == "count":  # what is kept between the sum and its use counts in neither or both
            budget.begin_count()
            seen = kept
        elif what == "look":
            budget.set_left(limit - seen, headroom)
            calls.clear()
            budget.begin_count()
            seen = kept
        assert kept + sum(reserved) <= limit
        assert len(calls) <= 1


def test_everything_goes_without_a_limit() -> None:
    budget = Budget()
    assert budget.reserve(1 << 60)
    assert budget.reserve(1 << 60, background=True)
    budget.keep(1 << 60)
    budget.give_back(1 << 60)
    assert not budget.tight


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
    assert budget.after(100)[1:] == (25, False)
    assert not budget.reserve(50)
    assert told == [1]
    assert budget.after(100) == (20, 50, True)
    budget.set_left(100, 30)
    assert budget.after(100) == (20, 0, False)
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
            if budget.reserve(1):
                kept[mine] += 1  # as the block map: counted before the budget is told
                budget.keep(1)
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
