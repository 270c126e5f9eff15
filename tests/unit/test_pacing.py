"""Rates and waits on a clock that only the test moves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.pacing import (
    BESIDE_READERS,
    QUEUE_S,
    RETRY_S,
    Backoff,
    DemandGate,
    RateMeter,
    RoundRate,
    TokenBucket,
)
from lazyfs.units import KiB, MiB

BURST_S = 0.1

rates = st.floats(10 * KiB, 2e10)
clocks = st.floats(0, 1e7)  # uptimes
pieces = st.lists(st.tuples(st.integers(1, 4 * MiB), st.floats(0, 2)), min_size=2, max_size=40)


@given(rates, clocks, st.integers(1, 4 * MiB))
def test_after_the_wait_the_next_piece_may_start(rate: float, now: float, amount: int) -> None:
    bucket = TokenBucket(rate)
    bucket.take(now, amount)
    wait = bucket.wait(now)
    assert wait == pytest.approx(amount / rate) or amount / rate < 1e-5
    # A clock that stands still between two looks, as a test's does, must not make a caller turn for
    # ever.
    assert bucket.wait(now + wait) == 0


@given(rates, clocks, pieces)
def test_no_interval_carries_more_than_rate_and_burst(
    rate: float, now: float, plan: list[tuple[int, float]]
) -> None:
    bucket = TokenBucket(rate, BURST_S)
    sent = []
    for amount, idle_s in plan:
        now += idle_s
        now += bucket.wait(now)
        assert bucket.wait(now) == 0
        bucket.take(now, amount)
        sent.append((now, amount))
    for i, (start, _) in enumerate(sent):
        total = 0
        for at, amount in sent[i:]:
            # The piece that starts at `at` may take the bucket into debt; those before it are paid
            # for.
            assert total <= rate * (at - start + BURST_S + 1e-5)
            total += amount


@given(rates, clocks, pieces)
def test_a_busy_sender_gets_the_whole_rate(
    rate: float, start: float, plan: list[tuple[int, float]]
) -> None:
    bucket = TokenBucket(rate, BURST_S)
    now = start
    for amount, _ in plan:
        now += bucket.wait(now)
        bucket.take(now, amount)
    # The last piece is still to be paid for.
    owed = sum(amount for amount, _ in plan[:-1])
    assert now - start == pytest.approx(owed / rate, rel=1e-3, abs=1e-4)


def test_idle_time_saves_up_one_burst_only() -> None:
    bucket = TokenBucket(1000.0, BURST_S)
    bucket.take(0.0, 1)
    assert bucket.wait(3600.0) == 0
    bucket.take(3600.0, 100)
    assert bucket.wait(3600.0) == 0
    bucket.take(3600.0, 500)
    assert bucket.wait(3600.0) == pytest.approx(0.5)


def test_no_limit_never_waits() -> None:
    bucket = TokenBucket(None)
    bucket.take(0.0, 1 << 60)
    assert bucket.wait(0.0) == 0


# -- DemandGate

BIG = 512 * KiB


def test_population_goes_freely_while_no_reader_is_about() -> None:
    gate = DemandGate()
    for _ in range(3):
        assert gate.wait(5.0) == 0
        assert gate.most(5.0) == math.inf
        gate.take(5.0, BIG)


@given(clocks, st.integers(1, 20))
def test_population_trickles_while_a_reader_waits(now: float, requests: int) -> None:
    gate = DemandGate(trickle_s=1.0)
    gate.reader_waits()
    start = now
    for _ in range(requests):
        while wait := gate.wait(now):
            assert now + wait > now, "a clock that stands still would never be let through"
            now += wait
        gate.take(now, BESIDE_READERS)
        assert gate.wait(now + 2.0) == RETRY_S, "one at a time, also on a link that takes long"
        gate.done(now, BESIDE_READERS, BESIDE_READERS)
    assert now - start == pytest.approx(requests - 1)


def test_the_gate_opens_a_little_when_the_last_reader_has_left_and_then_all_the_way() -> None:
    gate = DemandGate(trickle_s=1.0, linger_s=0.1)
    gate.reader_waits()
    gate.reader_waits()
    gate.take(0.0, BESIDE_READERS)
    gate.reader_leaves(0.2, 0)
    assert gate.wait(0.25) == 0.75
    gate.reader_leaves(0.25, 0)
    assert gate.wait(0.25) == RETRY_S, "one is under way"
    gate.done(0.26, BESIDE_READERS, BESIDE_READERS)
    assert gate.wait(0.26) == 0
    assert gate.most(0.26) == BESIDE_READERS
    gate.take(0.26, BESIDE_READERS)
    assert gate.wait(0.27) == RETRY_S
    assert gate.wait(0.35) == 0
    assert gate.most(0.35) == math.inf


@pytest.mark.parametrize(
    ("rate", "most"), [(1 * MiB, BESIDE_READERS), (1024 * MiB, 1024 * MiB * QUEUE_S)]
)
def test_beside_readers_a_fast_link_takes_more(rate: float, most: float) -> None:
    gate = DemandGate()
    now = 0.0
    for i in range(500):
        now += 0.01
        gate.reader_waits()
        moved = int(rate * 0.01)
        gate.take(now, moved)
        gate.done(now, moved, moved if i % 2 else 0)  # what failed says nothing of the link
        gate.reader_leaves(now, 0 if i % 2 else moved)
    assert gate.wait(now) == 0
    assert gate.most(now) == pytest.approx(most, rel=0.05)
    gate.take(now, int(gate.most(now)))
    assert gate.wait(now) == RETRY_S


# -- Backoff


def test_waits_double_up_to_the_limit_until_reset() -> None:
    backoff = Backoff(first=0.05, limit=1.0)
    waits = [backoff.next() for _ in range(7)]
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    backoff.reset()
    assert backoff.next() == 0.05


# -- RateMeter


@given(
    rate=st.floats(1 * MiB, 1e10),
    interval_s=st.floats(0.001, 0.05),
    start=clocks,
    count=st.integers(1, 300),
    horizon_s=st.floats(2, 5),
)
def test_steady_arrivals_are_measured_at_any_age(
    rate: float, interval_s: float, start: float, count: int, horizon_s: float
) -> None:
    meter = RateMeter(horizon_s)
    for i in range(count):
        meter.add(start + i * interval_s, round(rate * interval_s))
    age = (count - 1) * interval_s
    measured = meter.rate(start + age)
    if age < 0.1:
        assert measured == 0
    elif age > 0.11:
        # The first piece arrived without an interval before it: one too many, which shows while
        # young.
        assert (
            0.99 * rate
            < measured
            < 1.01 * rate * (1 + interval_s / horizon_s) * (1 + interval_s / age)
        )


def test_a_new_rate_takes_over_within_a_few_horizons() -> None:
    meter = RateMeter(3.0)
    for i in range(1000):
        meter.add(i * 0.01, 1000)
    for i in range(1000, 2500):
        meter.add(i * 0.01, 100)
    assert meter.rate(25.0) == pytest.approx(10_000, rel=0.1)


def test_a_rate_fades_when_nothing_arrives() -> None:
    meter = RateMeter(3.0)
    for i in range(100):
        meter.add(i * 0.1, 1 * MiB)
    seen = [meter.rate(10.0 + s) for s in range(0, 40, 4)]
    assert seen == sorted(seen, reverse=True)
    assert 0 <= seen[-1] < 100
    assert meter.rate(1e9) == 0


def test_looking_changes_nothing() -> None:
    looked, left_alone = RateMeter(), RateMeter()
    for i in range(50):
        for meter in (looked, left_alone):
            meter.add(i * 0.2, 5000)
        looked.rate(i * 0.2 + 0.1)
    assert looked.rate(10.0) == pytest.approx(left_alone.rate(10.0))


def test_a_meter_that_saw_nothing_reads_zero() -> None:
    meter = RateMeter()
    assert meter.rate(123.0) == 0
    meter.add(123.0, 1 << 40)
    assert meter.rate(123.0) == 0  # no time has passed: no rate yet


# -- rates of work in turns


def test_a_rate_is_averaged_over_a_whole_round_of_turns() -> None:
    rate = RoundRate()
    assert not rate.begun
    assert rate.rate(5.0, 0) == 0
    seen = []
    for turn in range(4):  # 2 s of work with 1,000 bytes, then 18 s of others
        rate.begin_turn(20.0 * turn, 1000 * turn)
        seen += [rate.rate(20.0 * turn + 2.0, 1000 * turn + 1000)]
    assert seen[0] == 500
    assert seen[1:] == pytest.approx([2000 / 22] * 3)
    assert rate.rate(80.0, 4000) == 2000 / 40


def test_a_pause_does_not_count_in_a_rate_of_turns() -> None:
    rate = RoundRate()
    rate.begin_turn(0.0, 0)
    rate.forget()
    assert not rate.begun
    rate.begin_turn(1000.0, 5000)
    assert rate.rate(1000.05, 5100) == 100  # as if it was all of the first second
    assert rate.rate(1001.0, 6000) == 1000
