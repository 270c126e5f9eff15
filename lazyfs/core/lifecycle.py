"""Defines the states of an image, and all transitions that are permitted.

    remote ──open, prefetch──> partial ──last byte kept, file in place──> whole
      ^                          │  ^                                       │
      │                          v  │ the cause is gone                     │
      │                         failed <── its plain file is not ours ──────┤
      └───────────────────── evicted, replaced, or the file was removed ────┘

A failed image still serves the bytes that it has. A whole image never leaves this state by itself.
`_NEXT` is the authority.
"""

import enum

from lazyfs.errors import StateError


class State(enum.Enum):
    """Says where an image is between the repository and a plain file."""

    REMOTE = "remote"
    PARTIAL = "partial"
    WHOLE = "whole"
    FAILED = "failed"


class Cause(enum.Enum):
    """Says why an image has failed, or what is wrong with it although it has not.

    The catalog stores it. The text beside it is for people. Nothing is decided by its words.
    """

    NONE = ""
    """Nothing is wrong."""
    EXPORT_CHANGED = "export-changed"
    """The export is not the one from which the cache was filled."""
    CONTENT_CHANGED = "content-changed"
    """The same, told by its bytes. An equal size or description proves nothing afterwards."""
    WRONG_DIGEST = "wrong-digest"
    """The bytes of the complete image do not have the digest that is known."""
    CHANGED_BY_HAND = "changed-by-hand"
    """Somebody has replaced or resized the plain file."""
    PLAIN_FILE = "plain-file"
    """The plain file cannot be opened."""
    HAND_OFF = "hand-off"
    """The complete image cannot become a plain file, because something is in the way."""
    OTHER = "other"
    """The cause was written by an older lazyfs, which stored no more than a text."""


CHANGED_BY_HAND = (
    "its plain file was changed by hand; remove that (and mount again) to have it fetched anew"
)
"""What is said of an image with the cause of that name."""

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
