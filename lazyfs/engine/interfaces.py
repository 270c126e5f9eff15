"""What the engine needs of the world, as Protocols, and the records that cross the border.

`daemon.py` picks the concrete classes; `tests/fakes.py` has others, which pass the same contract
tests. Unless it says otherwise, everything here is called from the trio thread only.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lazyfs import errors
from lazyfs.core.block_map import BlockMap
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.image_record import ImageRecord


@dataclass(frozen=True, slots=True)
class FileAttributes:
    """How files are shown on the mount, and left behind as plain files."""

    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Export:
    """One named disk of the repository, as the server describes it."""

    name: str
    size: int
    identity: str
    """What tells two versions of an export of one size apart: the description the server gives, or
    ""."""

    def check_same(self, found: "Export") -> None:
        """Compare with what the server says now.

        Raises:
            ExportChanged: size or identity differ.
        """
        if found.size != self.size:
            raise errors.ExportChanged(self.name, f"{self.size} bytes", f"{found.size} bytes")
        if found.identity != self.identity:
            raise errors.ExportChanged(self.name, repr(self.identity), repr(found.identity))


class Claim(Protocol):
    """Blocks that population has taken upon itself to fetch. It ends with `finish` or `drop`. From
    any thread."""

    parts: tuple[ByteRange, ...]
    """The data in those blocks, in order; the rest of them reads as zeroes. May be empty."""

    @property
    def data_bytes(self) -> int:
        """How many bytes are to be fetched."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Write data of the claim to the cache file.

        Raises:
            NoSpace, OSError: the claim must be dropped.
        """
        ...

    def finish(self) -> None:
        """Everything in `parts` has been written."""
        ...

    def drop(self, error: Exception | None = None) -> None:
        """Give the blocks back: they could not be fetched or written, or nobody wants them now if
        `error` is None.

        Does nothing if the claim has ended.
        """
        ...


Answered = Callable[[errors.LazyfsError | None], None]
"""What is called when a request has ended: None if all went well."""


class Source(Protocol):
    """One export of the repository, for demand fetches. Safe for many tasks at once.

    `pread` and `block_status` reconnect for as long as it takes: the caller sets a time limit, and
    may cancel at any moment.
    """

    def submit(self, offset: int, buffer: memoryview, answered: Answered) -> bool:
        """Ask for the bytes at `offset` at once, without a task's turn; return whether that could
        be done.

        It cannot when there is no connection: `pread` makes one. In the trio thread; cannot be
        cancelled.

        Args:
            answered: called later, once, in the trio thread. The buffer is filled if it is given
                None. RequestFailed: as of `pread`. ConnectionLost: it was one attempt, `pread`
                makes more. It may not raise.
        """
        ...

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`.

        Nothing may be read from the buffer unless this returned. After cancellation the buffer may
        still be written to: give it to nobody else.

        Raises:
            RequestFailed: the server refused this request.
            ExportChanged: size or identity are no longer what they were.
        """
        ...

    async def block_status(self, window: ByteRange) -> list[ByteRange]:
        """Return the ranges of `window` that may hold anything but zeroes, in order.

        Raises:
            RequestFailed, ExportChanged: as for `pread`.
        """
        ...

    def drop_connection(self) -> None:
        """Close the connection, if there is one. A later call connects again. Does not block.

        A request under way loses it: what was submitted fails, `pread` and `block_status` connect
        again. When the last of them has ended, no connection is left open.
        """
        ...


class FillWork(Protocol):
    """One image as population's workers see it. Every method may be called from any thread."""

    export: Export

    def claim(self, limit: int) -> Claim | float | None:
        """Take the next missing blocks, at most `limit` bytes (or one block).

        Returns:
            A claim, which must end; or the seconds to wait before asking again (readers come first,
            or the rate is used up); or None when nothing is left to claim now.
        """
        ...


class Filler(Protocol):
    """Moves claims of one image from the repository to the cache, on a connection of its own."""

    async def run(self, work: FillWork, duration_s: float) -> None:
        """Work until nothing is left to claim, or about `duration_s` has passed.

        Every claim has ended when this returns or raises. Cancellation takes effect within about
        0.1 s.

        Raises:
            ConnectionLost, ExportChanged.
        """
        ...

    async def aclose(self) -> None:
        """Drop the connection."""
        ...


@dataclass(frozen=True, slots=True)
class RepositoryStatistics:
    """How well the repository can be reached."""

    connected: bool
    reconnects: int
    """Times that it was back after a loss."""
    failures: int
    """Connections that could not be made, or were lost while an image was filled."""


class Repository(Protocol):
    """Where images come from."""

    uri: str

    @property
    def connected(self) -> bool:
        """Whether the last attempt to reach the repository succeeded."""
        ...

    async def list_exports(self) -> list[str]:
        """Return the names of all exports.

        Raises:
            ConnectionLost, Unsupported (the server does not list).
        """
        ...

    async def describe(self, names: Sequence[str]) -> dict[str, Export | str]:
        """Return, for each name, the export, or why the server would not describe it. One
        connection for all.

        Raises:
            ConnectionLost.
        """
        ...

    def source(self, export: Export) -> Source:
        """Return a way to read `export` on demand; connects when first used."""
        ...

    def filler(self, export: Export) -> Filler:
        """Return a way to fill from `export`; connects when first used."""
        ...


class ImageFile(Protocol):
    """The cache file of one image, partial or whole, open for reading. Any thread may call any
    method."""

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Return bytes if the page cache has all of them, else None. Does not block. Trio thread
        only."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes. Raises OSError, CacheCorrupt (the file is too short)."""
        ...

    def remove(self) -> None:
        """Unlink what is ours of it (for a partial image: never the plain file). Stays readable
        until `close`."""
        ...

    def close(self) -> None:
        """Give up the file; what is on disk stays."""
        ...


class PlainFile(ImageFile, Protocol):
    """A whole image."""

    def fileno(self) -> int:
        """Return the open file's descriptor, for the kernel to read from."""
        ...

    def set_aside(self) -> None:
        """Free its path, so that the catalog may say that nothing is there; `restore` or `remove`
        comes next."""
        ...

    def restore(self) -> None:
        """Undo `set_aside`."""
        ...


class Store(ImageFile, Protocol):
    """The cache file of an image that is being filled, and its map. Sees whole blocks only.

    `write` and `checkpoint` block, and may run in several threads at the same time.
    """

    def load(self) -> BlockMap:
        """Open or create the files; return what they hold. Called once, first.

        Raises:
            CacheCorrupt: the files exist and are not this image's.
            NoSpace, OSError.
        """
        ...

    def write(self, offset: int, data: memoryview, keep: bool = True) -> None:
        """Write data; it is not durable before the next checkpoint. Raises NoSpace, OSError (also
        after `close`).

        `keep`: in memory, too, as somebody is about to read it.

        `close` may come at any moment, as population's threads cannot be cancelled in the middle of
        a write.
        """
        ...

    def checkpoint(self, pages: Iterable[tuple[int, bytes]], mixed_zero_bytes: int) -> None:
        """Make durable all data written before the call, then `pages` of the map, in this order.

        Raises:
            CacheCorrupt: data did not reach the disk; what was written since the last checkpoint
                must not be trusted.
            NoSpace, OSError: the data is safe, but the pages count as not saved.
        """
        ...

    def disown(self) -> None:
        """Let no other program that opens the file take what is missing from the export, which is
        another version now.

        Present ranges stay readable, and the image can still be filled and finished, by lazyfs. May
        be repeated.

        Raises:
            CacheCorrupt, OSError: perhaps not done.
        """
        ...

    def finish(self) -> None:
        """Make the complete, checkpointed cache file the plain file at the image's path, durably.

        Reads go on throughout. May be repeated, also by a later process. `remove` takes away what
        is left of the partial image; call it once the catalog says that the image is whole.

        Raises:
            UserError: something else lies at that path.
            NoSpace, OSError.
        """
        ...

    def unfinish(self) -> None:
        """Undo `finish`, before `remove`, for an image that is given up although the catalog was
        never told.

        Does nothing if the file at the image's path is another. Needs no `load`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Space:
    """A file system, in bytes."""

    total: int
    free: int
    """For this user."""


class Stores(Protocol):
    """The cache directory, as a maker of stores."""

    def partial(self, record: ImageRecord) -> Store:
        """Return the store of an image that is being filled."""
        ...

    def unkept(self) -> Store:
        """Return a store that keeps nothing, for when there is no room even for a map: every write
        is NoSpace."""
        ...

    def whole(self, record: ImageRecord) -> PlainFile:
        """Return the plain file of a whole image, read-only.

        Raises:
            CacheCorrupt: it is not there, or has another size.
        """
        ...

    def nearly_full(self) -> bool:
        """Whether the file system has so little room left that population should pause."""
        ...

    def space(self) -> Space:
        """Return how large the file system is, and how much of it is free."""
        ...


class Catalog(Protocol):
    """The records of all images. Each call is one transaction, blocks for an fsync, and may come
    from any thread."""

    def add(self, records: Sequence[ImageRecord]) -> list[ImageRecord]:
        """Insert records, whose `inode` is ignored; return them with the inode each was given."""
        ...

    def update(self, records: Sequence[ImageRecord]) -> None:
        """Replace the records with the same inodes."""
        ...

    def describe(self, described: Sequence[tuple[int, int, str]]) -> None:
        """Set (inode, size, identity) of images that are remote; leave those that are not any more
        as they are."""
        ...

    def note_uses(self, uses: Sequence[tuple[int, int]]) -> None:
        """Set (inode, last_used_ns), and nothing else: what an `update` under way says of the rest
        stays."""
        ...

    def replace(self, inode: int, record: ImageRecord) -> ImageRecord:
        """Forget an image and insert another in its place; return it with its inode."""
        ...

    def remove(self, inodes: Sequence[int]) -> None:
        """Forget images."""
        ...
