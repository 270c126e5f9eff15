"""The record of one image, as the catalog keeps it, and how it changes.

A record is never edited: each change is a method that returns a new one, and refuses a transition that
`lifecycle.py` does not permit.
"""

from dataclasses import dataclass, replace

from lazyfs.core import lifecycle, shown_file
from lazyfs.core.lifecycle import Cause, State


@dataclass(frozen=True, slots=True)
class FetchCounters:
    """What one image has fetched in its life."""

    demand_bytes: int
    populated_bytes: int
    requests: int


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What the catalog keeps of one image."""

    inode: int
    """Also the key. Never given twice in one cache."""
    export: str
    path: str
    """Where it is shown, relative to the mountpoint."""
    size: int | None
    """Of the export; None until the repository was asked."""
    identity: str
    format: str
    """Of the cache file, and of what is shown: a key of `shown_file.SUFFIX`."""
    state: State
    error: str
    """Why it failed, or what an operator should know; "" if nothing."""
    block_size: int
    """Unit of the map; of a qcow2 the cluster size."""
    created_ns: int
    """When it was first seen, in ns since the epoch: the file's times."""
    present_bytes: int = 0
    """Data in the cache file, as of the last checkpoint."""
    demand_bytes: int = 0
    populated_bytes: int = 0
    requests: int = 0
    last_used_ns: int = 0
    """Last open, close or prefetch, in ns since the epoch; 0: never."""
    pinned: bool = False
    """Never evicted."""
    digest: str = ""
    """What the export's bytes must hash to, such as "sha256:9f86..."; "" if that is not known."""
    cause: Cause = Cause.NONE
    """What `error` says, for decisions."""

    @property
    def shown(self) -> shown_file.ShownFile:
        """The file on the mount. The size must be known."""
        assert self.size is not None
        return shown_file.of(self.format, self.size, self.block_size)

    @property
    def file_size(self) -> int | None:
        """Bytes of the file on the mount, None until the repository was asked."""
        return None if self.size is None else self.shown.size

    # -- how a record changes

    def begun(self) -> "ImageRecord":
        """Return the record of a remote image whose cache is begun."""
        return self._in_state(State.PARTIAL)

    def became_whole(self) -> "ImageRecord":
        """Return the record of an image whose plain file is in place."""
        return replace(self._in_state(State.WHOLE), error="", cause=Cause.NONE)

    def failed(self, cause: Cause, reason: str) -> "ImageRecord":
        """Return the record of an image of which nothing more is fetched."""
        return replace(self._in_state(State.FAILED), error=reason, cause=cause)

    def troubled(self, cause: Cause, reason: str) -> "ImageRecord":
        """Return the record with something that an operator should know, in the same state."""
        return replace(self, error=reason, cause=cause)

    def recovered(self) -> "ImageRecord":
        """Return the record of an image with which nothing is wrong any more."""
        state = State.PARTIAL if self.state is State.FAILED else self.state
        return replace(self._in_state(state), error="", cause=Cause.NONE)

    def remote_again(self) -> "ImageRecord":
        """Return the record of the image once nothing of it is cached any more."""
        return replace(
            self, state=State.REMOTE, error="", cause=Cause.NONE,
            present_bytes=0, demand_bytes=0, populated_bytes=0, requests=0,
        )  # fmt: skip

    def successor(
        self,
        created_ns: int,
        *,
        digest: str = "",
        path: str = "",
        image_format: str = "",
        block_size: int = 0,
    ) -> "ImageRecord":
        """Return the record of the image that takes this one's name: nothing of it is cached, nor
        known.

        What is left out stays as it is, but for the digest. The catalog gives it an inode of its
        own.
        """
        return replace(
            self.remote_again(), size=None, identity="", created_ns=created_ns, digest=digest,
            path=path or self.path, format=image_format or self.format, block_size=block_size or self.block_size,
        )  # fmt: skip

    def described(self, size: int, identity: str) -> "ImageRecord":
        """Return the record with what the repository says of the export."""
        return replace(self, size=size, identity=identity)

    def counted(self, present_bytes: int, counters: FetchCounters) -> "ImageRecord":
        """Return the record with how much is cached, and what was fetched."""
        return replace(
            self, present_bytes=present_bytes, demand_bytes=counters.demand_bytes,
            populated_bytes=counters.populated_bytes, requests=counters.requests,
        )  # fmt: skip

    def used(self, at_ns: int) -> "ImageRecord":
        """Return the record with its last use, in ns since the epoch."""
        return replace(self, last_used_ns=at_ns)

    def with_pin(self, pinned: bool) -> "ImageRecord":
        """Return the record of an image that is pinned, or not any more."""
        return replace(self, pinned=pinned)

    def with_digest(self, digest: str) -> "ImageRecord":
        """Return the record with another digest known; "" for none."""
        return replace(self, digest=digest)

    def _in_state(self, state: State) -> "ImageRecord":
        if state is not self.state:
            lifecycle.check(self.state, state)
        return replace(self, state=state)
