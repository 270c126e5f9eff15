"""One libnbd handle: connecting it, and driving it from trio for demand fetches.

How libnbd wants it (docs/libnbd.pod, 1.14), and what follows here:

- a handle serves one export; the export is chosen in option mode, so that the URI stays the
  repository's;
- a callback runs under the handle's lock: it calls no method of the handle, returns 1 to retire its
  command, and reads `err.value`. An exception in it would only be printed, a failing assert
  abort();
- a failed read leaves the buffer unspecified;
- when a handle dies, every command in flight is completed with an error.
"""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ctypes import c_int
from functools import partial
from typing import Any

import nbd
import trio
from nbd import NBD

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.extent_map import parse_block_status
from lazyfs.engine.interfaces import Answered, Export
from lazyfs.repository import nbd_buffers
from lazyfs.units import MiB

CONNECT_TIMEOUT_S = 15.0
"""For one attempt, TLS and option haggling included. Longer than three lost SYNs (1 + 2 + 4 s)."""

_POLL_MS = 100
"""How late a connecting thread notices that nobody wants it any more."""

_MAX_PAYLOAD = 32 * MiB
"""What a server that states no maximum must accept (NBD protocol, "Block size constraints")."""

LOST = frozenset({errno.ESHUTDOWN, errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET})
"""Completion codes that say the connection ends, not that the request is bad."""

REFUSED = frozenset({errno.ENOTSUP, errno.EINVAL, errno.EPERM})
"""How libnbd reports that a server answered an option with NBD_REP_ERR_UNSUP, _INVALID or
_POLICY."""


def new_handle() -> NBD:
    """Return an unconnected handle with the settings every use here shares.

    TLS follows from the URI: `nbds` requires it. Local files (certificates, PSK) may be named in
    the URI, as the URI comes from the administrator.
    """
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.set_uri_allow_local_file(True)
    handle.set_pread_initialize(False)
    return handle


def connect(uri: str, abandoned: threading.Event) -> NBD:
    """Return a handle in option mode. Blocks; meant for a thread.

    Raises:
        ConnectionLost: not in CONNECT_TIMEOUT_S, or `abandoned` was set.
        Unsupported: the server is too old to choose an export by name.
    """
    handle = new_handle()
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    try:
        handle.aio_connect_uri(uri)
        _poll_until_settled(handle, uri, deadline, abandoned)
    except nbd.Error as error:
        raise errors.ConnectionLost(uri, reason(error)) from error
    if not handle.aio_is_negotiating() or handle.get_protocol() != "newstyle-fixed":
        raise errors.Unsupported(
            f"{uri} is a server without named exports (no fixed newstyle negotiation)"
        )
    return handle


def connect_export(uri: str, name: str, abandoned: threading.Event) -> tuple[NBD, Export]:
    """Return a handle ready to read export `name`, and what the export is now. Blocks; meant for a
    thread.

    Raises:
        ConnectionLost: also if the server does not have the export, as it may be about to.
        Unsupported.
    """
    handle = connect(uri, abandoned)
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    try:
        handle.set_export_name(name)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        refused: list[int] = []

        def answered(err: c_int) -> int:
            refused.append(err.value)
            return 1

        handle.aio_opt_go(answered)
        _poll_until_settled(handle, uri, deadline, abandoned)
        if not handle.aio_is_ready():
            why = errno.errorcode.get(refused[0], str(refused[0])) if refused else "it hung up"
            raise errors.ExportRefused(uri, f"the server refuses export {name!r} ({why})")
        found = described(handle, name)
    except nbd.Error as error:
        raise errors.ConnectionLost(uri, reason(error)) from error
    if isinstance(found, str):
        raise errors.ExportRefused(uri, f"export {name!r}: {found}")
    return handle, found


class Watchdog:
    """Bounds libnbd's blocking calls inside a `with`, by cutting the connection under them.

    The calls that negotiate options wait for a server for ever; their `aio_` forms do not say why
    one was refused.
    """

    def __init__(self, handle: NBD, uri: str, abandoned: threading.Event) -> None:
        """Watch `handle`, which is connected: until `abandoned` is set, or nothing comes in
        CONNECT_TIMEOUT_S."""
        self._uri = uri
        self._abandoned = abandoned
        self._connection = socket.socket(fileno=os.dup(handle.aio_get_fd()))
        self._done = threading.Event()
        self._cut = ""
        self._thread = threading.Thread(target=self._watch, name="nbd-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.progress()
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Raises ConnectionLost in the place of the nbd.Error that cutting the connection led
        to."""
        self._done.set()
        self._thread.join()
        self._connection.close()
        if self._cut and isinstance(error, nbd.Error):
            raise errors.ConnectionLost(self._uri, self._cut) from error

    def progress(self) -> None:
        """Something came. May be called in libnbd's callbacks."""
        self._deadline = time.monotonic() + CONNECT_TIMEOUT_S

    def _watch(self) -> None:
        while not self._done.wait(_POLL_MS / 1000):
            if self._abandoned.is_set():
                self._cut = "not wanted any more"
            elif time.monotonic() > self._deadline:
                self._cut = f"no answer in {CONNECT_TIMEOUT_S:g} s"
            if self._cut:
                with suppress(OSError):  # the server was faster
                    self._connection.shutdown(socket.SHUT_RDWR)
                return


def described(handle: NBD, name: str) -> Export | str:
    """Return what the handle was last told about an export, or what is wrong with that. Raises
    nbd.Error."""
    size = handle.get_size()
    if size < 0:  # libnbd 1.14's Python takes 64 bits for a signed number
        return "the server claims that it has 8 EiB or more"
    try:
        return Export(name, size, str(handle.get_export_description()))
    except (nbd.Error, UnicodeDecodeError):
        return Export(name, size, "")


def max_payload(handle: NBD) -> int:
    """Return how many bytes the server of a connected handle gives in answer to one read."""
    return int(handle.get_block_size(nbd.SIZE_MAXIMUM)) or _MAX_PAYLOAD


def reason(error: nbd.Error) -> str:
    """Return libnbd's message without the name of its function, which says nothing to a user."""
    text = str(error.string)
    head, _, tail = text.partition(": ")
    return tail if head.startswith("nbd_") and tail else text


def _poll_until_settled(handle: NBD, uri: str, deadline: float, abandoned: threading.Event) -> None:
    while not (handle.aio_is_negotiating() or handle.aio_is_ready()):
        if handle.aio_is_dead() or handle.aio_is_closed():
            # libnbd keeps it to itself that a server has refused TLS.
            hint = ", or does not do TLS" if uri.startswith("nbds") else ""
            raise errors.ConnectionLost(uri, f"the server hung up{hint}")
        if abandoned.is_set():
            raise errors.ConnectionLost(uri, "not wanted any more")
        if time.monotonic() > deadline:
            raise errors.ConnectionLost(uri, f"no answer in {CONNECT_TIMEOUT_S:g} s")
        handle.poll(_POLL_MS)


def retire(handle: NBD, cookie: int) -> int:
    """Let libnbd forget a command that has completed; return its error, 0 for none.

    Only here does it say that a read was answered without any data: the buffer holds what it held
    before.
    """
    try:
        handle.aio_command_completed(cookie)
    except nbd.Error as error:
        return int(error.errnum or errno.EIO)
    return 0


class _Command:
    """A command in flight."""

    __slots__ = ("code", "cookie", "ended", "retired", "sent")

    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended
        """Called once, in the trio thread, when there is an answer or the connection is broken."""
        self.sent = trio.current_time()
        self.code = 0
        self.cookie = 0
        self.retired = False
        """libnbd has done with it, and with its buffer."""


def _nothing() -> None:
    """Has been called."""


class NbdHandle:
    """A connected handle, many requests in flight at once, driven by the task that runs `run`."""

    def __init__(self, handle: NBD, uri: str, export: str, stall_s: float, answer_s: float) -> None:
        """Take over `handle`, from `connect_export`.

        Args:
            stall_s: when requests are in flight and the server has completed none for so long, the
                connection counts as lost.
            answer_s: so it does when one request has had no answer for so long.
        """
        self._handle: NBD | Any = handle  # Any for the None that `run` leaves
        self._uri = uri
        self._export = export
        self._stall_s = stall_s
        self._answer_s = answer_s
        self._fd = handle.aio_get_fd()
        self._max_payload = max_payload(handle)
        self._has_extents = bool(handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION))
        self._in_flight: dict[_Command, None] = {}
        """Oldest first."""
        self._answered: list[_Command] = []
        """By libnbd's callbacks, which may not call its methods."""
        self._some_in_flight = trio.Event()
        self._orphans: dict[_Command, nbd_buffers.NbdBuffer] = {}
        """Reads that nobody waits for any more, and that may still be answered, with what they are
        read into."""
        self._last_progress = trio.current_time()
        self._want_write = trio.Event()
        self._scope = trio.CancelScope()
        self.broken = ""
        """Why the connection is of no more use; "" while it is."""

    async def run(self) -> None:
        """Move bytes until the connection breaks or `close` is called. Raises nothing but
        Cancelled."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read_loop)
                    nursery.start_soon(self._write_loop)
                    nursery.start_soon(self._watch)
        except* (nbd.Error, OSError) as group:
            self.broken = self.broken or _first_reason(group)
        finally:
            self.broken = self.broken or "closed"
            for command in list(self._in_flight):
                self._end(command)
            # The last reference: libnbd closes the socket with the handle.
            self._handle = None
            for buffer in self._orphans.values():
                nbd_buffers.give(buffer)

    def close(self, why: str = "closed") -> None:
        """Break the connection; every waiting request raises ConnectionLost."""
        self.broken = self.broken or why
        self._scope.cancel()

    def submit(self, offset: int, buffer: memoryview, answered: Answered) -> bool:
        """As `interfaces.Source.submit`."""
        if self.broken or len(buffer) > self._max_payload:
            return False
        try:
            bounce = nbd_buffers.take(len(buffer))
        except OSError:  # no memory; `pread` says so
            return False

        def ended() -> None:
            if (error := self._outcome(command, f"reading {self._export} at {offset}")) is None:
                buffer[:] = bounce.memory[: len(buffer)]
            self._give_back(bounce, command)
            answered(error)

        try:
            command = self._start(
                partial(self._handle.aio_pread, bounce.target(0, len(buffer)), offset), ended
            )
        except errors.LazyfsError:
            nbd_buffers.give(bounce)
            return False
        return True

    async def pread(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; as `interfaces.Source.pread`, but one attempt only.

        Raises:
            ConnectionLost, RequestFailed.
        """
        for piece in ByteRange(0, len(buffer)).split(self._max_payload):
            try:
                bounce = nbd_buffers.take(piece.length)
            except OSError as full:
                raise errors.RequestFailed(
                    f"reading {self._export} at {offset}", errno.ENOMEM
                ) from full
            command, done = None, trio.Event()
            try:
                target = bounce.target(0, piece.length)
                command = self._start(
                    partial(self._handle.aio_pread, target, offset + piece.start), done.set
                )
                await done.wait()
                if (
                    error := self._outcome(command, f"reading {self._export} at {offset}")
                ) is not None:
                    raise error
                buffer[piece.start : piece.end] = bounce.memory[: piece.length]
            finally:
                if command is None:
                    nbd_buffers.give(bounce)
                else:
                    self._give_back(bounce, command)

    async def block_status(self, window: ByteRange) -> list[ByteRange]:
        """Return the data ranges of `window`; as `interfaces.Source.block_status`, but one attempt
        only.

        Raises:
            ConnectionLost, RequestFailed.
        """
        if not self._has_extents:
            return [window]
        data: list[ByteRange] = []
        position = window.start
        while position < window.end:
            entries: list[int] = []
            asked = ByteRange(position, window.end)

            def extent(
                context: str,
                _offset: int,
                found: list[int],
                _err: object,
                into: list[int] = entries,
            ) -> int:
                if context == nbd.CONTEXT_BASE_ALLOCATION:
                    into.extend(found)
                return 0

            done = trio.Event()
            command = self._start(
                partial(self._handle.aio_block_status, asked.length, asked.start, extent), done.set
            )
            await done.wait()
            if (error := self._outcome(command, f"block status of {self._export}")) is not None:
                raise error
            *ranges, reach = parse_block_status(asked, entries, self._export)
            data.extend(ranges)
            position = reach.start
        return data

    def _start(
        self, submit: Callable[[Callable[[c_int], int]], int], ended: Callable[[], None]
    ) -> _Command:
        """Send a command. Raises ConnectionLost, RequestFailed: it was not sent, and `ended` is not
        called."""
        if self.broken:
            raise errors.ConnectionLost(self._uri, self.broken)
        command = _Command(ended)

        def completed(err: c_int) -> int:
            command.code = err.value
            command.retired = True
            self._last_progress = trio.current_time()
            self._answered.append(command)
            if (orphaned := self._orphans.pop(command, None)) is not None:
                nbd_buffers.give(orphaned)
                return 1
            return 0

        if not self._in_flight:
            self._last_progress = command.sent
            self._some_in_flight.set()
        try:
            command.cookie = submit(completed)
            if self._answered:  # libnbd has met the end of the connection
                self.close("the server hung up")
            elif self._handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                self._want_write.set()
        except nbd.Error as error:
            if self._handle.aio_is_dead() or self._handle.aio_is_closed():
                self.close(reason(error))
                raise errors.ConnectionLost(self._uri, self.broken) from error
            raise errors.RequestFailed(
                f"asking {self._uri} for {self._export}", error.errnum or errno.EIO
            ) from error
        self._in_flight[command] = None
        return command

    def _end(self, command: _Command) -> None:
        if command in self._in_flight:  # else nobody waits any more
            del self._in_flight[command]
            if command.code in LOST and not self.broken:
                self.close("the server shuts down")
            ended, command.ended = (
                command.ended,
                _nothing,
            )  # or the two would keep each other, and the data, in memory
            ended()

    def _outcome(self, command: _Command, what: str) -> errors.LazyfsError | None:
        """Return what has become of a command that has ended; None if it did what it should."""
        if self.broken:
            return errors.ConnectionLost(self._uri, self.broken)
        code = command.code or retire(self._handle, command.cookie)
        return errors.RequestFailed(what, code) if code else None

    def _give_back(self, bounce: nbd_buffers.NbdBuffer, command: _Command) -> None:
        self._in_flight.pop(command, None)
        if command.retired or self._handle is None:
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
            stalls_at, late_at = self._last_progress + self._stall_s, oldest.sent + self._answer_s
            if trio.current_time() >= stalls_at:
                self.close(f"no reply in {self._stall_s:g} s")
            elif trio.current_time() >= late_at:
                self.close(f"one request had no reply in {self._answer_s:g} s")
            else:
                await trio.sleep_until(min(stalls_at, late_at))

    async def _read_loop(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            direction = self._handle.aio_get_direction()
            if direction & nbd.AIO_DIRECTION_READ:
                self._handle.aio_notify_read()
            else:  # it must write before it will read
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
    return reason(error) if isinstance(error, nbd.Error) else str(error)
