"""Defines the record of one image, as the catalog stores it, and how it changes.

A record is never edited. Each change is a method that returns a new record. It refuses a transition
that `lifecycle.py` does not permit.
"""

from dataclasses import dataclass, replace

from lazyfs.core import lifecycle, shown_file
from lazyfs.core.lifecycle import Cause, State


@dataclass(frozen=True, slots=True)
class FetchCounters:
    """Counts what one image has fetched since it was created."""

    demand_bytes: int
    populated_bytes: int
    requests: int

    @property
    def fetched_bytes(self) -> int:
        """All bytes that were fetched, for readers and in the background."""
        return self.demand_bytes + self.populated_bytes


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """Holds what the catalog stores about one image."""

    inode: int
    """The inode number, and the key. It is never given twice in one cache."""
    export: str
    path: str
    """Where the image is shown, relative to the mountpoint."""
    size: int | None
    """The size of the export. None until the repository was asked."""
    identity: str
    format: str
    """The format of the cache file and of the file shown: a key of `shown_file.SUFFIX`."""
    state: State
    error: str
    """Why the image has failed, or what an operator should know. It is "" if there is nothing."""
    block_size: int
    """The unit of the map. For a qcow2 it is the cluster size."""
    created_ns: int
    """When the image was first seen, in ns since the epoch. The times of the file show this."""
    present_bytes: int = 0
    """Bytes of data in the cache file, as of the last checkpoint."""
    demand_bytes: int = 0
    populated_bytes: int = 0
    requests: int = 0
    last_used_ns: int = 0
    """The last open, close or prefetch, in ns since the epoch. 0 means never."""
    pinned: bool = False
    """True if the image must not be evicted."""
    digest: str = ""
    """The digest that the export's bytes must have, such as "sha256:9f86...". It is "" if that
    is not known."""
    cause: Cause = Cause.NONE
    """What `error` says, in a form for decisions."""
    meant: bool = False
    """True if somebody has used the image, and not just looked at it (`core/looking.py`)."""

    @property
    def shown(self) -> shown_file.ShownFile:
        """The file on the mount. The size must be known."""
        assert self.size is not None
        return shown_file.of(self.format, self.size, self.block_size)

    @property
    def file_size(self) -> int | None:
        """The size of the file on the mount in bytes. None until the repository was asked."""
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
        """Return the record of the image when nothing of it is cached any more."""
        return replace(
            self, state=State.REMOTE, error="", cause=Cause.NONE,
            present_bytes=0, demand_bytes=0, populated_bytes=0, requests=0, meant=False,
        )  # fmt: skip

    def successor(
        self,
        created_ns: int,
        *,
        digest: str = "",
        path: str = "",
        image_format: str = "",
        block_size: int = 0,
        same_export: bool = False,
    ) -> "ImageRecord":
        """Return the record of the image that takes this one's name.

        Nothing of that image is cached. Arguments that are left out keep their old value, except
        for the digest. The catalog gives the image an inode of its own. With `same_export` the size
        is kept as well; otherwise the repository must be asked for it.
        """
        return replace(
            self.remote_again(), created_ns=created_ns, digest=digest,
            path=path or self.path, format=image_format or self.format,
            block_size=block_size or self.block_size,
            size=self.size if same_export else None,
            identity=self.identity if same_export else "",
        )  # fmt: skip

    def described(self, size: int, identity: str) -> "ImageRecord":
        """Return the record with what the repository says about the export."""
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

    def meant_to_be_used(self) -> "ImageRecord":
        """Return the record of an image that somebody uses."""
        return replace(self, meant=True)

    def with_pin(self, pinned: bool) -> "ImageRecord":
        """Return the record of an image that is pinned, or is not pinned any more."""
        return replace(self, pinned=pinned)

    def with_digest(self, digest: str) -> "ImageRecord":
        """Return the record with another digest. "" means that none is known."""
        return replace(self, digest=digest)

    def _in_state(self, state: State) -> "ImageRecord":
        if state is not self.state:
            lifecycle.check(self.state, state)
        return replace(self, state=state)
