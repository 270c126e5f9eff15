"""Which images are evicted."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.eviction import MAX_HEADROOM, Candidate, Limits, choose
from lazyfs.units import GiB, MiB

sizes = st.integers(0, 100)
candidates = st.lists(
    st.builds(
        Candidate,
        key=st.integers(1, 10**6),
        size=sizes,
        last_used_ns=st.integers(0, 20),
        opened=st.booleans(),
        pinned=st.booleans(),
        backing=st.booleans(),
        spared=st.booleans(),
    ),
    max_size=20,
    unique_by=lambda candidate: candidate.key,
)


def may_go(candidate: Candidate) -> bool:
    return candidate.size > 0 and not (
        candidate.opened or candidate.pinned or candidate.backing or candidate.spared
    )


@given(candidates, st.integers(-10, 500))
def test_the_choice(given: list[Candidate], wanted: int) -> None:
    chosen = choose(given, wanted)
    assert all(may_go(candidate) for candidate in chosen)
    assert len(set(chosen)) == len(chosen)
    # Least recently used first: whoever stays, and might have gone, was used later.
    uses = [candidate.last_used_ns for candidate in chosen]
    assert uses == sorted(uses)
    stay = [candidate for candidate in given if may_go(candidate) and candidate not in chosen]
    assert all(candidate.last_used_ns >= max(uses, default=0) for candidate in stay)
    # It stops at the mark: enough if that can be had, and not without the last of them.
    freed = sum(candidate.size for candidate in chosen)
    assert freed >= wanted or not stay
    assert not chosen or freed - chosen[-1].size < wanted


@given(candidates, st.integers(1, 500), st.data())
def test_the_choice_does_not_depend_on_the_order_given(
    given: list[Candidate], wanted: int, data: st.DataObject
) -> None:
    assert choose(data.draw(st.permutations(given)), wanted) == choose(given, wanted)


@pytest.mark.parametrize("reason", ["opened", "pinned", "backing", "spared"])
def test_each_reason_keeps_an_image(reason: str) -> None:
    one = Candidate(key=1, size=10, last_used_ns=1)
    other = Candidate(key=2, size=10, last_used_ns=2)
    assert choose([one, other], 5) == [one]
    assert choose([replace(one, **{reason: True}), other], 5) == [other]


def test_what_was_never_used_goes_first() -> None:
    never, once = Candidate(key=2, size=1, last_used_ns=0), Candidate(key=1, size=1, last_used_ns=5)
    assert choose([once, never], 1) == [never]


def test_limits() -> None:
    assert not Limits()
    assert Limits(max_cache=0)
    assert Limits(max_cache=100).left(30, 1000, 500) == 70
    assert Limits(max_cache=100).left(130, 1000, 500) == -30
    assert Limits(min_free=450).left(30, 1000, 500) == 50
    assert Limits(min_free_percent=10).free_bytes(1000) == 100
    assert Limits(min_free_percent=60).left(30, 1000, 500) == -100
    assert Limits(max_cache=100, min_free=450).left(30, 1000, 500) == 50
    assert Limits(max_cache=60, min_free=450).left(30, 1000, 500) == 30
    # The file system does not say how large it is.
    assert Limits(max_cache=60, min_free=450).left(30, 0, 0) == 30
    assert Limits(min_free=450).left(30, 0, 0) > 1000


@pytest.mark.parametrize(
    ("limits", "total", "headroom"),
    [
        (Limits(max_cache=64 * MiB), 0, MiB),
        (Limits(max_cache=100 * GiB), 0, MAX_HEADROOM),
        (Limits(min_free=GiB), 64 * MiB, MiB),
        (Limits(min_free_percent=10), 1024 * GiB, MAX_HEADROOM),
    ],
)
def test_headroom(limits: Limits, total: int, headroom: int) -> None:
    assert limits.headroom(total) == headroom
