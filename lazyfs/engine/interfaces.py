"""Defines what the engine needs from outside, as Protocols, and the records that are exchanged.

`daemon.py` picks the concrete classes. `tests/fakes.py` has other implementations, which pass the
same contract tests. Unless a docstring says otherwise, everything here is called from the trio
thread only.
"""

# Longer than 500 lines: all that the engine asks of others is in one place.

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lazyfs import errors
from lazyfs.core.block_map import BlockMap
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.shown_file import ShownFile


@dataclass(frozen=True, slots=True)
class FileAttributes:
    """Describes how files appear on the mount, and how plain files are left behind."""

    mode: int
    uid: int
    gid: int


UNKNOWN = "not known (taken in without a catalog)"
"""The identity of an image of which only the plain file was left. The next list tells."""


@dataclass(frozen=True, slots=True)
class Export:
    """Describes one named disk of the repository, as the server describes it."""

    name: str
    size: int
    identity: str
    """What tells two versions of an export apart that have the same size: the description that the
    server gives, or ""."""

    def check_same(self, found: "Export") -> None:
        """Compare this export with what the server says now. UNKNOWN is the same as anything.

        Raises:
            ExportChanged: the size or the identity differs.
        """
        if found.size != self.size:
            raise errors.ExportChanged(self.name, f"{self.size} bytes", f"{found.size} bytes")
        if self.identity not in (UNKNOWN, found.identity):
            raise errors.ExportChanged(self.name, repr(self.identity), repr(found.identity))


class Claim(Protocol):
    """Holds blocks that population has claimed and will fetch. Thread-safe.

    A claim ends with `finish` or `drop`.
    """

    parts: tuple[ByteRange, ...]
    """The ranges of data in these blocks, in order. The rest of the blocks reads as zeroes. May be
    empty."""

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
        """End the claim. Everything in `parts` must have been written."""
        ...

    def drop(self, error: Exception | None = None) -> None:
        """Give the blocks back. Does nothing if the claim has ended.

        Args:
            error: why the blocks could not be fetched or written. None if they are merely not
                wanted any more.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """Holds some bytes of an export, as they are cached."""

    offset: int
    data: bytes

    def check_same(self, export: str, found: bytes | bytearray) -> None:
        """Compare these bytes with those that the server has now.

        Raises:
            ContentChanged: they differ.
        """
        if found != self.data:
            raise errors.ContentChanged(export, self.offset, self.offset + len(self.data))


Samples = Callable[[], Sequence[Sample]]
"""Returns what a new connection must find at the server, so that an export with other content is
noticed. Thread-safe. Blocks."""


def no_samples() -> Sequence[Sample]:
    """Return nothing to compare."""
    return ()


Answered = Callable[[errors.LazyfsError | None], None]
"""Called when a request has ended. The argument is None if all went well."""


class Source(Protocol):
    """Reads one export of the repository on demand. Many tasks may use it at once.

    `pread` and `block_status` reconnect for as long as it takes. The caller sets a time limit, and
    may cancel at any moment.
    """

    @property
    def trouble(self) -> str:
        """Why the latest attempt to connect or to read has failed, or "" if it did not."""
        ...

    def submit(self, offset: int, buffer: memoryview, answered: Answered) -> bool:
        """Ask for the bytes at `offset` at once, and return whether that could be done.

        It cannot be done while there is no connection. `pread` makes one. The call itself does not
        wait, and cannot be cancelled.

        Args:
            offset: where to read.
            buffer: it is filled if `answered` is given None.
            answered: called later, once, in the trio thread. It is given RequestFailed as `pread`
                raises it, or ConnectionLost. This was one attempt; `pread` makes more. It may not
                raise.
        """
        ...

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`.

        Nothing may be read from the buffer unless this has returned.

        Raises:
            RequestFailed: the server refused this request.
            ExportChanged: size or identity are no longer what they were.
        Cancellation: the buffer may still be written to afterwards, so it must not be used for
            anything else.
        """
        ...

    async def compare(self) -> None:
        """Compare the samples with what the server has now.

        Raises:
            ExportChanged: they differ, or size or identity are no longer what they were.
        """
        ...

    async def block_status(self, window: ByteRange) -> list[ByteRange]:
        """Return the ranges of `window` that may hold anything except zeroes, in order.

        Raises:
            RequestFailed, ExportChanged: as for `pread`.
        """
        ...

    def drop_connection(self) -> None:
        """Close the connection, if there is one. A later call connects again. Does not block.

        Requests that are under way lose the connection: what was submitted fails, while `pread` and
        `block_status` connect again. When the last of them has ended, no connection is left open.
        """
        ...


class FillWork(Protocol):
    """Shows one image to population's workers. Thread-safe."""

    export: Export

    def claim(self, limit: int) -> Claim | float | None:
        """Claim the next missing blocks: at most `limit` bytes, or one block.

        Returns:
            A claim, which must be ended.
            A number: the seconds to wait before asking again, because readers come first or the
                rate is used up.
            None: nothing is left to claim now.
        """
        ...


class Filler(Protocol):
    """Moves the claims of one image from the repository to the cache, on its own connection."""

    async def run(self, work: FillWork, duration_s: float) -> None:
        """Work until nothing is left to claim, or until about `duration_s` has passed.

        Every claim has ended when this returns or raises.

        Raises:
            ConnectionLost, ExportChanged.
        Cancellation: takes effect within about 0.1 s.
        """
        ...

    async def aclose(self) -> None:
        """Drop the connection."""
        ...


@dataclass(frozen=True, slots=True)
class RepositoryStatistics:
    """Describes how well the repository can be reached."""

    connected: bool
    reconnects: int
    """How often the repository was reached again after a loss."""
    failures: int
    """Connections that could not be made, and connections that were lost while an image was filled.
    """


class Repository(Protocol):
    """Provides the exports from which images are made."""

    uri: str

    @property
    def connected(self) -> bool:
        """True if the last attempt to reach the repository succeeded."""
        ...

    async def list_exports(self) -> list[str]:
        """Return the names of all exports.

        Raises:
            ConnectionLost: the repository cannot be reached.
            Unsupported: the server does not list its exports.
        """
        ...

    async def describe(self, names: Sequence[str]) -> dict[str, Export | str]:
        """Ask the server to describe the exports `names`, on one connection while it answers.

        Returns:
            By name: the export, or the reason why the server would not describe it.

        Raises:
            ExportRefused: the server is there, but describes none of them.
            ConnectionLost: the server cannot be reached.
        """
        ...

    def source(self, export: Export, samples: Samples = no_samples) -> Source:
        """Return a source that reads `export` on demand. It connects when it is first used.

        Each new connection is compared with `samples` before it is used.
        """
        ...

    def filler(self, export: Export, samples: Samples = no_samples) -> Filler:
        """Return a filler that reads `export`. It connects when it is first used.

        Each new connection is compared with `samples` before it is used.
        """
        ...


class ImageFile(Protocol):
    """Reads the cache file of one image, partial or whole, which is open. Thread-safe."""

    def fileno(self) -> int:
        """Return the descriptor of the open file, from which others may read. -1: none."""
        ...

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Return the bytes if the page cache has all of them, else None.

        Does not block. Trio thread only.
        """
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes.

        Raises:
            OSError: they cannot be read.
            CacheCorrupt: the file is too short.
        """
        ...

    def remove(self) -> None:
        """Unlink the files that belong to this object. For a partial image that is never the plain
        file.

        The content stays readable until `close`.
        """
        ...

    def close(self) -> None:
        """Close the file. What is on the disk stays."""
        ...


class PlainFile(ImageFile, Protocol):
    """Reads and moves the plain file of a whole image."""

    def set_aside(self) -> None:
        """Free the path durably, so that the catalog may record that nothing is there.

        The caller must call `restore` or `remove` next.

        Raises:
            OSError: it could not be done, and the file is where it was.
        """
        ...

    def restore(self) -> None:
        """Undo `set_aside`."""
        ...


class Store(ImageFile, Protocol):
    """Holds the cache file of an image that is being filled, and its map. It sees whole blocks
    only.

    `write` and `checkpoint` block, and may run in several threads at the same time.
    """

    def load(self) -> BlockMap:
        """Open or create the files, and return what they hold. Called once, before anything else.

        Raises:
            CacheCorrupt: the files exist and do not belong to this image.
            NoSpace, OSError.
        """
        ...

    def write(self, offset: int, data: memoryview, keep: bool = True) -> None:
        """Write data. It is not durable before the next checkpoint.

        `close` may be called at any moment, because population's threads cannot be cancelled during
        a write.

        Args:
            offset: where to write.
            data: whole blocks.
            keep: keep the data in memory as well, because somebody is about to read it.

        Raises:
            NoSpace, OSError: the data was not written, for instance because the file was closed.
        """
        ...

    def checkpoint(self, pages: Iterable[tuple[int, bytes]], mixed_zero_bytes: int) -> None:
        """Make durable all data that was written before the call, and then `pages` of the map.

        Raises:
            CacheCorrupt: data did not reach the disk. What was written since the last checkpoint
                must not be trusted.
            NoSpace, OSError: the data is safe, but the pages count as not saved.
        """
        ...

    def disown(self) -> None:
        """Keep other programs from reading the missing ranges from the export.

        The export is another version now. Present ranges stay readable, and lazyfs can still fill
        and finish the image. May be repeated.

        Raises:
            CacheCorrupt, OSError: it may not have been done.
        """
        ...

    def finish(self) -> None:
        """Make the cache file the plain file at the image's path, durably.

        It must be complete and checkpointed. Reads go on meanwhile. May be repeated, also by a
        later process. `remove` deletes what is left of the partial image; call it when the catalog
        says that the image is whole.

        Raises:
            UserError: something else is at that path.
            NoSpace, OSError.
        """
        ...

    def unfinish(self) -> None:
        """Undo `finish` for an image that is dropped before the catalog was told that it is whole.

        Call it before `remove`. It is durable when it returns. Does nothing if another file is at
        the image's path. Does not need `load`.
        """
        ...


class PresentReader(Protocol):
    """Reads what is present of images in the place of the engine: another process, the keeper.

    Trio thread only, except for `share`. None of it waits for a disk.
    """

    def share(self, inode: int, blocks: BlockMap, file: ImageFile) -> None:
        """Let a map live where the reader sees it, and take over what was known of it before.

        An earlier process may have marked blocks as present that are not saved. They are taken as
        present if `file` is the file that it had. Thread-safe.

        Raises:
            OSError: there is no memory for it.
        """
        ...

    def show(
        self, inode: int, shown: ShownFile, file: ImageFile | None, blocks: BlockMap | None
    ) -> None:
        """Let reads of `inode` be answered from `file`, as far as `blocks` are present.

        What was shown under this inode is withdrawn.

        Args:
            inode: by which the kernel reads it.
            shown: the file that the mount shows.
            file: the cache file. None if there is none, and then nothing is read.
            blocks: its map, which is shared. None if all of it is present.
        """
        ...

    def orphan(self, inode: int, record: ImageRecord, may_fetch: bool) -> None:
        """Note that the image of what is shown as `inode` is in no catalog any more.

        Args:
            inode: the number.
            record: the image.
            may_fetch: whether the export is still the same.
        """
        ...

    def keep_name(self, inode: int) -> None:
        """Undo `orphan`."""
        ...

    def withdraw(self, inode: int, *, distrusted: bool = False) -> None:
        """Let no read of `inode` be answered from now on. May be repeated.

        Args:
            inode: the number.
            distrusted: what its file has may be wrong, so that no later process may use it either.
        """
        ...


@dataclass(frozen=True, slots=True)
class Space:
    """Describes the size of a file system in bytes."""

    total: int
    """0 if the file system does not say. Some network file systems do not."""
    free: int
    """Bytes that this user may still write."""


class Stores(Protocol):
    """Makes the stores of images, which are in the cache directory."""

    def partial(self, record: ImageRecord) -> Store:
        """Return the store of an image that is being filled."""
        ...

    def unkept(self) -> Store:
        """Return a store that keeps nothing. Every write raises NoSpace.

        It is used when there is not even room for a map.
        """
        ...

    def whole(self, record: ImageRecord) -> PlainFile:
        """Return the plain file of a whole image, open for reading.

        Raises:
            CacheCorrupt: the file is missing, or has another size.
            OSError: it cannot be opened now.
        """
        ...

    def nearly_full(self) -> bool:
        """Return whether so little room is left on the file system that population should pause."""
        ...

    def space(self) -> Space:
        """Return how large the file system is, and how much of it is free."""
        ...


class Catalog(Protocol):
    """Stores the records of all images. Thread-safe.

    Each call is one transaction, and blocks for an fsync.
    """

    def setting(self, name: str) -> str:
        """Return what is stored under `name` for the whole cache, or ""."""
        ...

    def set_setting(self, name: str, value: str) -> None:
        """Store `value` under `name`."""
        ...

    def add(self, records: Sequence[ImageRecord]) -> list[ImageRecord]:
        """Insert records, and return them with their new inodes. Their own `inode` is ignored."""
        ...

    def update(self, records: Sequence[ImageRecord]) -> None:
        """Replace the records that have the same inodes."""
        ...

    def describe(self, described: Sequence[tuple[int, int, str]]) -> None:
        """Set the size and identity of images that are remote.

        Images that are not remote any more are left as they are.

        Args:
            described: (inode, size, identity) of each image.
        """
        ...

    def note_uses(self, uses: Sequence[tuple[int, int]]) -> None:
        """Set when images were last used.

        Nothing else is changed, so this does not overwrite what a concurrent `update` writes.

        Args:
            uses: (inode, last_used_ns) of each image.
        """
        ...

    def replace(self, inode: int, record: ImageRecord) -> ImageRecord:
        """Forget an image, insert another one in its place, and return that with its inode."""
        ...

    def remove(self, inodes: Sequence[int]) -> None:
        """Forget images."""
        ...
