"""Every pair of states: permitted as drawn, or a StateError."""

import itertools

import pytest

from lazyfs.core import lifecycle
from lazyfs.core.lifecycle import State
from lazyfs.errors import StateError

PERMITTED = {
    ("remote", "partial"),
    ("remote", "failed"),
    ("partial", "whole"),
    ("partial", "failed"),
    ("partial", "remote"),
    ("whole", "remote"),
    ("whole", "failed"),
    ("failed", "partial"),
    ("failed", "whole"),
    ("failed", "remote"),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_every_pair_of_states(old: State, new: State) -> None:
    if (old.value, new.value) in PERMITTED:
        assert lifecycle.check(old, new) is new
    else:
        with pytest.raises(StateError, match=f"cannot go from {old.value} to {new.value}"):
            lifecycle.check(old, new)


def test_an_image_is_fetched_before_it_is_whole() -> None:
    with pytest.raises(StateError):
        lifecycle.check(State.REMOTE, State.WHOLE)


def test_a_life_may_go_round() -> None:
    life = [
        State.REMOTE,
        State.PARTIAL,
        State.FAILED,
        State.PARTIAL,
        State.WHOLE,
        State.REMOTE,
        State.PARTIAL,
    ]
    for old, new in itertools.pairwise(life):
        assert lifecycle.check(old, new) is new
