"""Open images: what `Image.open` returns. A handle serves reads until `aclose`, whatever becomes of
the image.

PartialHandle   through the cache file that is being filled; missing ranges are fetched
WholeHandle     from the plain file
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from lazyfs.core.byte_range import ByteRange
from lazyfs.core.shown_file import ShownFile
from lazyfs.engine.image.filling import Filling, clip, nowait, read_file, read_now
from lazyfs.engine.interfaces import PlainFile
from lazyfs.engine.totals import Read


class Handle(Protocol):
    """An open image. Trio thread only."""

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Return what `read` would, if the host's page cache has all of it; None if not, or if
        anything is wrong."""
        ...

    async def read(self, offset: int, length: int, read: Read | None = None) -> bytes:
        """Return the bytes at `offset` of the file shown, fewer at its end.

        Args:
            read: learns how it was served.

        Raises:
            RequestFailed, ExportChanged, UserError: a missing range cannot be had.
            OSError, CacheCorrupt: the cache file cannot be read.
        Cancellation: nothing is lost.
        """
        ...

    async def aclose(self) -> None:
        """Close; may be repeated. No read of this handle may be under way.

        Cancellation: the handle counts as closed, also if this is cancelled.
        """
        ...


class PartialHandle:
    """An image that was opened before it was whole."""

    def __init__(
        self,
        shown: ShownFile,
        filling: Filling,
        closed: Callable[["PartialHandle"], Awaitable[None]],
    ) -> None:
        """`closed`: called by the first `aclose`."""
        self.filling = filling
        """The image gives it another when there is room to keep what had to be served without being
        kept."""
        self._shown = shown
        self._closed = closed
        self._open = True

    def read_now(self, offset: int, length: int) -> bytes | None:
        """As `Handle.read_now`."""
        return read_now(self.filling, self._shown, offset, length)

    async def read(self, offset: int, length: int, read: Read | None = None) -> bytes:
        """As `Handle.read`."""
        wanted = self._shown.split(clip(self._shown, offset, length))
        parts = [
            part if isinstance(part, bytes) else await self._read_export(part, read)
            for part in wanted
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_export(self, wanted: ByteRange, read: Read | None) -> bytes:
        table = self.filling.table
        if (distrust := table.distrust) is not None:
            raise distrust.again()
        if not table.present(wanted):
            data = await self.filling.reader.read_missing(wanted, self._read_cache, read)
            if data is not None:
                return data
        return await read_file(self.filling.store, wanted)

    def _read_cache(self, part: ByteRange) -> bytes:
        return self.filling.store.read(part.start, part.length)

    async def aclose(self) -> None:
        """As `Handle.aclose`."""
        if self._open:
            self._open = False
            await self._closed(self)


class WholeHandle:
    """A whole image: its plain file."""

    def __init__(
        self, shown: ShownFile, file: PlainFile, closed: Callable[["WholeHandle"], Awaitable[None]]
    ) -> None:
        """`closed`: called by the first `aclose`."""
        self.file = file
        """Shared by all who have the image open as a whole one."""
        self._shown = shown
        self._closed = closed
        self._open = True

    def read_now(self, offset: int, length: int) -> bytes | None:
        """As `Handle.read_now`."""
        wanted = clip(self._shown, offset, length)
        return nowait(self.file, wanted) if wanted.length else None

    async def read(self, offset: int, length: int, read: Read | None = None) -> bytes:
        """As `Handle.read`."""
        return await read_file(self.file, clip(self._shown, offset, length))

    async def aclose(self) -> None:
        """As `Handle.aclose`."""
        if self._open:
            self._open = False
            await self._closed(self)
