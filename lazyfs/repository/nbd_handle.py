"""Drives one connected libnbd handle from trio, for demand fetches.

What libnbd says (docs/libnbd.pod, 1.14), and what follows from that here:

- A callback runs while the handle is locked. So it calls no method of the handle, returns 1 to
  retire its command, and reads `err.value`. An exception in it would only be printed, and a failing
  assert would call abort().
- A failed read leaves the buffer unspecified.
- When a handle dies, every command in flight is completed with an error.
"""

import errno
import logging
from collections.abc import Callable
from ctypes import c_int
from functools import partial
from typing import Any

import nbd
import trio
from nbd import NBD

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.extent_map import parse_block_status
from lazyfs.engine.interfaces import Answered
from lazyfs.repository import nbd_buffers, nbd_connect
from lazyfs.units import KiB

logger = logging.getLogger(__name__)

SLOWEST = 64 * KiB
"""A request is not given up while bytes arrive, unless the link is slower than this many bytes
per second. It is unmeasured. On a slower link one block of the default size takes over a
second."""


class _Command:
    """Tracks a command in flight."""

    __slots__ = ("answered", "code", "cookie", "ended", "late_at", "retired")

    def __init__(self, ended: Callable[[], None], late_at: float) -> None:
        self.ended = ended
        """Called once, in the trio thread, when there is an answer or the connection is broken."""
        self.late_at = late_at
        """When the connection is given up if this command has not been answered by then, by
        trio's clock."""
        self.code = 0
        """The error number that libnbd reported, or 0."""
        self.cookie = 0
        self.answered = False
        """True if libnbd does not use the buffer any more."""
        self.retired = False
        """True if libnbd has forgotten the command. Before that it keeps the command and its
        callback, and passes over them whenever it looks for an answer."""


def _nothing() -> None:
    """Replace a callback that was called already, so that the command no longer refers to it."""


MAX_ENTRIES = 2 * 65536
"""The most numbers in an answer about block status, two for each range: as many as a window of
256 MiB has pieces of 4 KiB. libnbd takes up to 64 MiB, of which Python makes gigabytes."""


class NbdHandle:
    """Drives a connected handle, with many requests in flight at once.

    The task that runs `run` does the work.
    """

    def __init__(self, handle: NBD, uri: str, export: str, stall_s: float, answer_s: float) -> None:
        """Take over `handle`, from `connect_export`.

        Args:
            handle: the connected handle.
            uri: the repository, for messages.
            export: the name of the export.
            stall_s: if requests are in flight and nothing at all has arrived for so long, the
                connection counts as lost.
            answer_s: the connection also counts as lost if one request has had no answer for this
                time and the time that everything in flight takes at SLOWEST.
        """
        self._handle: NBD | Any = handle  # Any for the None that `run` leaves
        self._uri = uri
        self._export = export
        self._stall_s = stall_s
        self._answer_s = answer_s
        self._fd = handle.aio_get_fd()
        self._max_payload = nbd_connect.max_payload(handle)
        self._unit, self._size = nbd_connect.alignment(handle), handle.get_size()
        self._has_extents = bool(handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION))
        self._in_flight: dict[_Command, None] = {}
        """The commands in flight, the oldest first."""
        self._answered: list[_Command] = []
        """The commands whose callbacks libnbd has called. The callbacks themselves may not call
        libnbd."""
        self._some_in_flight = trio.Event()
        self._orphans: dict[_Command, nbd_buffers.NbdBuffer | None] = {}
        """Commands for which nobody waits any more, but which may still be answered, and the
        buffers into which libnbd reads them."""
        self._asked_bytes: dict[_Command, int] = {}
        self._last_progress = trio.current_time()
        self._want_write = trio.Event()
        self._scope = trio.CancelScope()
        self.on_progress: Callable[[], None] = lambda: None
        """Called when bytes have come."""
        self.broken = ""
        """Why the connection cannot be used any more. It is "" while it can."""

    async def run(self) -> None:
        """Move bytes until the connection breaks or `close` is called. Raises only Cancelled.

        Then every command that is in flight has ended, and the socket is closed.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read_loop)
                    nursery.start_soon(self._write_loop)
                    nursery.start_soon(self._watch)
        except* (nbd.Error, OSError) as group:
            self.broken = self.broken or _first_reason(group)
        except* Exception as group:
            logger.exception("a connection failed, a bug in lazyfs: export=%s", self._export)
            self.broken = self.broken or f"a bug in lazyfs: {_first_reason(group)}"
        finally:
            self.broken = self.broken or "closed"
            for command in list(self._in_flight):
                self._end_broken(command)
            # This is the last reference. libnbd closes the socket with the handle.
            self._handle = None
            orphans, self._orphans = self._orphans, {}
            for buffer in orphans.values():
                if buffer is not None:
                    nbd_buffers.give(buffer)

    def close(self, why: str = "closed") -> None:
        """Break the connection. Every request that waits raises ConnectionLost."""
        self.broken = self.broken or why
        self._scope.cancel()

    def submit(self, offset: int, buffer: memoryview, answered: Answered) -> bool:
        """Ask for bytes as `interfaces.Source.submit` describes."""
        span = self._aligned(offset, len(buffer))
        if self.broken or span.length > self._max_payload:
            return False
        skipped = offset - span.start
        try:
            bounce = nbd_buffers.take(span.length)
        except OSError:  # there is no memory, which `pread` will report
            return False

        def ended() -> None:
            if (error := self._outcome(command, f"reading {self._export} at {offset}")) is None:
                buffer[:] = bounce.memory[skipped : skipped + len(buffer)]
            self._forget(command, bounce)
            answered(error)

        try:
            command = self._start(
                partial(self._handle.aio_pread, bounce.target(0, span.length), span.start),
                ended,
                span.length,
            )
        except errors.LazyfsError:
            nbd_buffers.give(bounce)
            return False
        return True

    @property
    def idle(self) -> bool:
        """True if nothing has been asked for that is not answered yet."""
        return not self._in_flight and not self._orphans

    async def probe(self) -> None:
        """Find out whether the server answers on this connection, with a read of a few bytes.

        Raises:
            ConnectionLost, RequestFailed.
        """
        if self._size:
            await self.pread(0, memoryview(bytearray(min(self._size, 512))))

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` as `interfaces.Source.pread` does, but in one attempt
        only.

        Raises:
            ConnectionLost, RequestFailed.
        """
        what = f"reading {self._export} at {offset}"
        if self.broken:
            raise errors.ConnectionLost(self._uri, self.broken)
        for span in self._aligned(offset, len(buffer)).split(self._max_payload):
            try:
                bounce = nbd_buffers.take(span.length)
            except OSError as full:
                raise errors.RequestFailed(what, errno.ENOMEM) from full
            wanted = ByteRange(offset, offset + len(buffer)).clip(span)
            piece = buffer[wanted.start - offset : wanted.end - offset]
            submit = partial(self._handle.aio_pread, bounce.target(0, span.length), span.start)
            skipped = wanted.start - span.start
            await self._ask(submit, what, span.length, piece, bounce, skipped)

    def _aligned(self, offset: int, length: int) -> ByteRange:
        """Return the range to ask for, as the server takes only multiples of its unit."""
        wanted = ByteRange(offset, offset + length)
        if self._unit == 1 or wanted.end > self._size:  # the server refuses what is beyond the end
            return wanted
        return wanted.align_out(self._unit, self._size)

    async def block_status(self, window: ByteRange) -> list[ByteRange]:
        """Return the data ranges of `window` as `interfaces.Source.block_status` does.

        This is one attempt only.

        Raises:
            ConnectionLost, RequestFailed.
        """
        if not self._has_extents:
            return [window]
        data: list[ByteRange] = []
        position = window.start
        while position < window.end:
            asked = ByteRange(position, window.end)
            entries: list[int] = []

            def extent(
                metacontext: str,
                _offset: int,
                found: list[int],
                err: c_int,
                entries: list[int] = entries,
            ) -> int:
                if metacontext == nbd.CONTEXT_BASE_ALLOCATION and not err.value:
                    entries.extend(found[: MAX_ENTRIES + 2])
                return 0

            submit = partial(self._handle.aio_block_status, asked.length, asked.start, extent)
            await self._ask(submit, f"block status of {self._export}")
            if len(entries) > MAX_ENTRIES:
                self.close("it answers block status in more pieces than there can be")
                raise errors.Fragmented(self._uri, self.broken)
            *ranges, reach = parse_block_status(asked, entries, self._export)
            data.extend(ranges)
            position = reach.start
        return data

    async def _ask(
        self,
        submit: Callable[[Callable[[c_int], int]], int],
        what: str,
        length: int = 0,
        target: memoryview | None = None,
        bounce: nbd_buffers.NbdBuffer | None = None,
        skipped: int = 0,
    ) -> None:
        """Send a command, and wait for its answer, which is copied from `bounce` to `target`.

        The first `skipped` bytes are left out.

        Raises:
            ConnectionLost, RequestFailed.
        Cancellation: the command is forgotten. Its answer is thrown away when it comes.
        """
        done = trio.Event()
        try:
            command = self._start(submit, done.set, length)
        except BaseException:
            if bounce is not None:
                nbd_buffers.give(bounce)
            raise
        try:
            await done.wait()
            if (error := self._outcome(command, what)) is not None:
                raise error.again()  # a frame that has raised its own local is a cycle
            if target is not None and bounce is not None:
                target[:] = bounce.memory[skipped : skipped + len(target)]
        finally:
            self._forget(command, bounce)

    def _start(
        self,
        submit: Callable[[Callable[[c_int], int]], int],
        ended: Callable[[], None],
        length: int = 0,
    ) -> _Command:
        """Send a command that asks for `length` bytes.

        Raises:
            ConnectionLost, RequestFailed: it was not sent, and `ended` is not called.
        """
        if self.broken:
            raise errors.ConnectionLost(self._uri, self.broken)
        now = trio.current_time()
        queued = sum(self._asked_bytes.values()) + length
        command = _Command(ended, now + self._answer_s + queued / SLOWEST)

        def completed(err: c_int) -> int:
            command.code = err.value
            command.answered = True
            self._last_progress = trio.current_time()
            self._answered.append(command)
            orphaned = command in self._orphans
            bounce = self._orphans.pop(command, None)
            if bounce is not None:
                nbd_buffers.give(bounce)
            command.retired = orphaned or command.code != 0
            return int(command.retired)

        if not self._in_flight:
            self._last_progress = now
            self._some_in_flight.set()
        try:
            command.cookie = submit(completed)
            if self._answered:  # libnbd has noticed the end of the connection while it sent
                self.close("the server hung up")
            elif self._handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                self._want_write.set()
        except nbd.Error as error:
            if self._handle.aio_is_dead() or self._handle.aio_is_closed():
                self.close(nbd_connect.reason(error))
                raise errors.ConnectionLost(self._uri, self.broken) from error
            raise errors.RequestFailed(
                f"asking {self._uri} for {self._export}", error.errnum or errno.EIO
            ) from error
        self._in_flight[command] = None
        self._asked_bytes[command] = length
        return command

    def _end(self, command: _Command) -> None:
        if command in self._in_flight:  # otherwise nobody waits any more
            del self._in_flight[command]
            if command.code in nbd_connect.LOST and not self.broken:
                self.close("the server shuts down")
            # Without this the callback and the command would keep each other, and the data, in
            # memory.
            ended, command.ended = command.ended, _nothing
            ended()

    def _end_broken(self, command: _Command) -> None:
        """End a command that gets no answer any more. The others still have to end."""
        try:
            self._end(command)
        except Exception:
            logger.exception("a command failed, a bug in lazyfs: export=%s", self._export)

    def _outcome(self, command: _Command, what: str) -> errors.LazyfsError | None:
        """Return why a command that has ended has failed, or None if it has not."""
        if self.broken:
            return errors.ConnectionLost(self._uri, self.broken)
        code = command.code or self._retire(command)
        return errors.RequestFailed(what, code) if code else None

    def _retire(self, command: _Command) -> int:
        """Let libnbd forget an answered command. Return its error number, or 0."""
        if command.retired or self._handle is None:
            return 0
        command.retired = True
        return nbd_connect.retire(self._handle, command.cookie)

    def _forget(self, command: _Command, bounce: nbd_buffers.NbdBuffer | None) -> None:
        """Forget `command`, for which nobody waits any more.

        Its answer has been used, or will be thrown away.
        """
        self._in_flight.pop(command, None)
        self._asked_bytes.pop(command, None)
        if command.answered or self._handle is None:
            if command.answered:
                self._retire(command)
            if bounce is not None:
                nbd_buffers.give(bounce)
        else:
            self._orphans[command] = bounce

    async def _watch(self) -> None:
        """Break the connection when the server stops answering."""
        while not self.broken:
            oldest = next(iter(self._in_flight), None)
            if oldest is None:
                self._some_in_flight = trio.Event()
                await self._some_in_flight.wait()
                continue
            stalls_at, late_at = self._last_progress + self._stall_s, oldest.late_at
            if trio.current_time() >= stalls_at:
                self.close(f"no reply in {self._stall_s:g} s")
            elif trio.current_time() >= late_at:
                self.close(f"one request had no reply in {self._answer_s:g} s and more")
            else:
                await trio.sleep_until(min(stalls_at, late_at))

    async def _read_loop(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            self._last_progress = trio.current_time()  # a part of a long answer counts as well
            self.on_progress()
            direction = self._handle.aio_get_direction()
            if direction & nbd.AIO_DIRECTION_READ:
                self._handle.aio_notify_read()
            else:  # libnbd must write before it will read
                await trio.lowlevel.wait_writable(self._fd)
            self._end_answered()
            if direction & nbd.AIO_DIRECTION_WRITE:
                self._want_write.set()

    def _end_answered(self) -> None:
        answered, self._answered = self._answered, []
        for command in answered:
            self._end(command)
        if self._handle.aio_is_dead() or self._handle.aio_is_closed():
            self.close("the server hung up")

    async def _write_loop(self) -> None:
        while True:
            await self._want_write.wait()
            self._want_write = trio.Event()
            while self._handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                await trio.lowlevel.wait_writable(self._fd)
                if self._handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                    self._handle.aio_notify_write()
                    self._end_answered()


def _first_reason(group: BaseExceptionGroup[Any]) -> str:
    error = group.exceptions[0]
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return nbd_connect.reason(error) if isinstance(error, nbd.Error) else str(error)
