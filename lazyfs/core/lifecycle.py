"""The states of an image, and every permitted transition.

    remote ──open, prefetch──> partial ──last byte kept, file in place──> whole
      ^                          │  ^                                       │
      │                          v  │ the cause is gone                     │
      │                         failed <── its plain file is not ours ──────┤
      └───────────────────── evicted, replaced, or the file was removed ────┘

A failed image still serves the bytes it has. A whole image never leaves by itself. `_NEXT` is the authority.
"""

import enum

from lazyfs.errors import StateError


class State(enum.Enum):
    """Where an image is between the repository and a plain file."""

    REMOTE = "remote"
    PARTIAL = "partial"
    WHOLE = "whole"
    FAILED = "failed"


CHANGED_BY_HAND = "its plain file was changed by hand; remove that (and mount again) to have it fetched anew"
"""The error of an image that has failed for that reason; the catalog keeps it."""

_NEXT = {
    State.REMOTE: {State.PARTIAL, State.FAILED},
    State.PARTIAL: {State.WHOLE, State.FAILED, State.REMOTE},
    State.WHOLE: {State.REMOTE, State.FAILED},
    State.FAILED: {State.PARTIAL, State.WHOLE, State.REMOTE},
}


def check(old: State, new: State) -> State:
    """Return `new`.

    Raises:
        StateError: an image in `old` cannot become `new`.
    """
    if new not in _NEXT[old]:
        raise StateError(f"an image cannot go from {old.value} to {new.value}")
    return new
