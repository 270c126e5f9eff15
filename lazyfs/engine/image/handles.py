"""Defines handles, which are open images. `Image.open` returns one.

A handle serves reads until `aclose`, whatever becomes of the image:

    PartialHandle   reads through the cache file that is being filled, and fetches what is missing
    WholeHandle     reads from the plain file
    OrphanHandle    was open when a daemon ended, and its image is in no catalog any more
    LostHandle      was open when a daemon ended, and cannot be opened again
"""

import errno
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from lazyfs import errors
from lazyfs.core import looking
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.shown_file import ShownFile
from lazyfs.engine.image.filling import Filling, clip, nowait, read_file, read_now
from lazyfs.engine.interfaces import PlainFile, Source
from lazyfs.engine.totals import Read


class Handle(Protocol):
    """Represents an open image. Trio thread only."""

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Return what `read` would return if the host's page cache has all of it.

        Returns:
            None if it does not, or if anything is wrong.
        """
        ...

    async def read(self, offset: int, length: int, read: Read | None = None) -> bytes:
        """Return the bytes at `offset` of the file shown. At its end there are fewer than `length`.

        Args:
            offset: where to read.
            length: how many bytes to read.
            read: learns how it was served.

        Raises:
            RequestFailed, ExportChanged, UserError: a missing range cannot be fetched.
            OSError, CacheCorrupt: the cache file cannot be read.
        Cancellation: nothing is lost.
        """
        ...

    async def aclose(self) -> None:
        """Close the handle. May be repeated. No read of this handle may be under way.

        Cancellation: the handle counts as closed even if this is cancelled.
        """
        ...


class PartialHandle:
    """Represents an image that was opened before it was whole."""

    def __init__(
        self,
        shown: ShownFile,
        filling: Filling,
        closed: Callable[["PartialHandle"], Awaitable[None]],
        failed: Callable[[OSError], None],
    ) -> None:
        """Read through `filling`.

        Args:
            shown: the file that is shown on the mount.
            filling: the cache file.
            closed: called by the first `aclose`.
            failed: called when the cache's disk has failed a read.
        """
        self.filling = filling
        """The cache file. If this could not keep anything, and there is room again, the image
        replaces it."""
        self.on_meant: Callable[[], None] | None = None
        """Called once, when a read goes beyond the edges of the file. None if nobody wants to
        know, or if it has happened."""
        self.closed = trio.Event()
        """Set by `aclose`."""
        self._shown = shown
        self._closed = closed
        self._failed = failed
        self._open = True

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Read as `Handle.read_now` describes."""
        if self.on_meant is not None:
            self._look(offset)
        return read_now(self.filling, self._shown, offset, length)

    def _look(self, offset: int) -> None:
        if not looking.is_at_an_edge(self._shown, offset):
            self.mean()

    def mean(self) -> None:
        """Take it that the image is used, and not just looked at."""
        on_meant, self.on_meant = self.on_meant, None
        if on_meant is not None:
            on_meant()

    async def read(self, offset: int, length: int, read: Read | None = None) -> bytes:
        """Read as `Handle.read` describes."""
        if self.on_meant is not None:
            self._look(offset)
        wanted = self._shown.split(clip(self._shown, offset, length))
        try:
            parts = [
                part if isinstance(part, bytes) else await self._read_export(part, read)
                for part in wanted
            ]
        except OSError as error:
            self._failed(error)
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_export(self, wanted: ByteRange, read: Read | None) -> bytes:
        filling = self.filling  # which the image may replace meanwhile
        _check_trust(filling)
        data = None
        if not filling.table.present(wanted):

            def read_cache(part: ByteRange) -> bytes:
                return filling.store.read(part.start, part.length)

            data = await filling.reader.read_missing(wanted, read_cache, read)
        if data is None:
            data = await read_file(filling.store, wanted)
        # Again, because the disk may have lost what was read just now from the cache file.
        _check_trust(filling)
        return data

    async def aclose(self) -> None:
        """Close as `Handle.aclose` describes."""
        if self._open:
            self._open = False
            self.on_meant = None
            self.closed.set()
            await self._closed(self)


def _check_trust(filling: Filling) -> None:
    if (distrust := filling.table.distrust) is not None:
        raise distrust.again()


class WholeHandle:
    """Represents a whole image that was opened. It is read from its plain file."""

    def __init__(
        self,
        shown: ShownFile,
        file: PlainFile,
        closed: Callable[["WholeHandle"], Awaitable[None]],
        failed: Callable[[OSError], None],
    ) -> None:
        """Read from `file`.

        Args:
            shown: the file that is shown on the mount.
            file: the plain file.
            closed: called by the first `aclose`.
            failed: called when the disk has failed a read.
        """
        self.file = file
        """The plain file. All handles that were opened on the whole image share it."""
        self._shown = shown
        self._closed = closed
        self._failed = failed
        self._open = True

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Read as `Handle.read_now` describes."""
        wanted = clip(self._shown, offset, length)
        return nowait(self.file, wanted) if wanted.length else None

    async def read(self, offset: int, length: int, read: Read | None = None) -> bytes:
        """Read as `Handle.read` describes."""
        try:
            return await read_file(self.file, clip(self._shown, offset, length))
        except OSError as error:
            self._failed(error)
            raise

    async def aclose(self) -> None:
        """Close as `Handle.aclose` describes."""
        if self._open:
            self._open = False
            await self._closed(self)


class OrphanHandle:
    """Represents an image that was evicted or replaced, and then a daemon has ended.

    The keeper still reads what is present. The rest is read from the repository each time.
    """

    def __init__(
        self,
        shown: ShownFile,
        source: Source | None,
        io_timeout_s: float,
        closed: Callable[[], None],
    ) -> None:
        """Read what the keeper does not.

        Args:
            shown: the file that is shown on the mount.
            source: the export. None if it has another version now.
            io_timeout_s: how long a read waits before it fails.
            closed: called by the first `aclose`.
        """
        self._shown = shown
        self._source = source
        self._io_timeout_s = io_timeout_s
        self._closed: Callable[[], None] | None = closed

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Return None."""
        return None

    async def read(self, offset: int, length: int, read: Read | None = None) -> bytes:
        """Read as `Handle.read` describes."""
        parts = []
        for part in self._shown.split(clip(self._shown, offset, length)):
            parts.append(part if isinstance(part, bytes) else await self._fetch(part))
        return b"".join(parts)

    async def _fetch(self, wanted: ByteRange) -> bytes:
        if self._source is None:
            raise errors.RequestFailed("reading what the repository has no more", errno.EIO)
        data = bytearray(wanted.length)
        with trio.move_on_after(self._io_timeout_s):
            await self._source.pread(wanted.start, memoryview(data))
            return bytes(data)
        raise errors.TimedOut("reading", self._io_timeout_s, self._source.trouble)

    async def aclose(self) -> None:
        """Close as `Handle.aclose` describes."""
        closed, self._closed = self._closed, None
        if closed is not None:
            if self._source is not None:
                self._source.drop_connection()
            closed()


class LostHandle:
    """Represents a file that the kernel has open, and that a later daemon cannot open."""

    def __init__(self, reason: errors.LazyfsError | OSError) -> None:
        """Each read fails with `reason`."""
        self._reason = reason

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Return None: `read` says what is wrong."""
        return None

    async def read(self, offset: int, length: int, read: Read | None = None) -> bytes:
        """Fail as `Handle.read` describes."""
        if isinstance(self._reason, OSError):
            raise OSError(self._reason.errno, self._reason.strerror)
        raise self._reason.again()

    async def aclose(self) -> None:
        """Do nothing."""
