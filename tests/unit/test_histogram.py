"""Histograms against a model that keeps every observation."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.core.histogram import Histogram

numbers = st.floats(min_value=-1e6, max_value=1e6)


@given(
    bounds=st.lists(numbers, min_size=1, max_size=30, unique=True).map(sorted),
    seen=st.lists(numbers),
)
@example(bounds=[1.0, 2.0], seen=[1.0, 2.0, 2.0000001, 0.0])
def test_each_bucket_counts_what_is_at_most_its_bound_and_above_the_one_before(
    bounds: list[float], seen: list[float]
) -> None:
    histogram = Histogram(bounds)
    for value in [
        *seen,
        *bounds,
    ]:  # what equals a bound belongs below it, as Prometheus has it (le)
        histogram.observe(value)
    found, below = histogram.statistics(), 0
    for i, bound in enumerate(bounds):
        below += found.counts[i]
        assert below == sum(value <= bound for value in [*seen, *bounds])
    assert found.bounds == tuple(bounds)
    assert found.count == len(seen) + len(bounds)
    assert found.counts[-1] == found.count - below
    assert found.total == pytest.approx(sum([*seen, *bounds]), abs=1e-3)


def test_statistics_do_not_change_afterwards() -> None:
    histogram = Histogram([1.0])
    before = histogram.statistics()
    histogram.observe(0.5)
    assert before.counts == (0, 0)
    assert histogram.statistics().counts == (1, 0)


@pytest.mark.parametrize("bounds", [[1.0, 1.0], [2.0, 1.0]])
def test_bounds_that_do_not_rise_are_our_bug(bounds: list[float]) -> None:
    with pytest.raises(AssertionError):
        Histogram(bounds)
