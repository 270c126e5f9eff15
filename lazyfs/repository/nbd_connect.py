"""Connects libnbd handles. That is done in threads, because libnbd connects in blocking calls.

A handle serves one export. The export is chosen in option mode, so the URI stays that of the
repository.
"""

import errno
import hashlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from ctypes import c_int
from dataclasses import dataclass, field
from functools import partial

import nbd
import trio
from nbd import NBD

from lazyfs import errors
from lazyfs.core import repository_uri
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.repository_uri import UNIX, VSOCK, RepositoryUri
from lazyfs.engine.interfaces import Export, Sample
from lazyfs.repository import nbd_buffers, tls
from lazyfs.units import MiB

CONNECT_TIMEOUT_S = 15.0
"""The time for one attempt, including TLS and the negotiation of options. It is longer than
three lost SYNs take (1 + 2 + 4 s)."""

ATTEMPT_S = 0.25
"""How long one address of a name has before the next is tried as well, as RFC 8305 recommends."""

DEAD_S = 7
"""After so many seconds without an acknowledgement a TCP connection is given up. A link that loses
packets for a few seconds is not."""

_POLL_MS = 100
"""How late a connecting thread notices that nobody wants the connection any more."""

_MAX_PAYLOAD = 32 * MiB
"""What a server that states no maximum must accept (NBD protocol, "Block size constraints")."""

MAX_IDENTITY = 128
"""How many characters are kept of an export's description; of a longer one, its digest is kept.
100,000 exports may have 4 KiB each."""

LOST = frozenset({errno.ESHUTDOWN, errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET})
"""Completion codes which say that the connection ends, not that the request is bad."""

REFUSED = frozenset({errno.ENOTSUP, errno.EINVAL, errno.EPERM})
"""How libnbd reports that a server answered an option with NBD_REP_ERR_UNSUP, _INVALID or
_POLICY."""


def new_handle() -> NBD:
    """Return an unconnected handle with the settings that all uses here share."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.set_pread_initialize(False)
    return handle


@dataclass(frozen=True, slots=True)
class Attempt:
    """Connects those who want a connection with the thread that makes it."""

    limit_s: float = field(default_factory=lambda: CONNECT_TIMEOUT_S)
    """How long the server may be silent, or the negotiation may take."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when nobody wants the connection any more."""
    greeted: threading.Event = field(default_factory=threading.Event)
    """Set once the server has greeted, however it goes on."""


def connect(uri: str, attempt: Attempt, deadline: float | None = None) -> NBD:
    """Return a handle in option mode. Blocks, so call it in a thread that trio has started.

    Args:
        uri: the server.
        attempt: who wants it.
        deadline: when to give up, by `time.monotonic`, if that is not after the attempt's limit.

    Raises:
        ConnectionLost: it took longer than that, or nobody wants it any more, or the server does
            not prove itself as the URI demands.
        Unsupported: the server is too old to choose an export by name.
    """
    handle, server = new_handle(), repository_uri.parse(uri)
    deadline = deadline or time.monotonic() + attempt.limit_s
    try:
        if server.tls:
            tls.require(handle, server)
        _begin(handle, server, attempt, deadline)
        _poll_until_settled(handle, uri, deadline, attempt, errors.Silent)
    except errors.LastingError as error:
        raise errors.ConnectionLost(uri, str(error)) from error
    except nbd.Error as error:
        why = tls.why_not(server, reason(error)) if server.tls else reason(error)
        raise errors.ConnectionLost(uri, why) from error
    except errors.HungUp as error:
        if not server.tls:
            raise
        raise errors.ConnectionLost(uri, tls.why_not(server, "")) from error
    attempt.greeted.set()
    try:
        with socket.socket(fileno=os.dup(handle.aio_get_fd())) as connection:
            keep_alive(connection)
    except OSError as error:  # no descriptor is left, or the server has hung up already
        raise errors.ConnectionLost(uri, error.strerror or str(error)) from error
    if not handle.aio_is_negotiating() or handle.get_protocol() != "newstyle-fixed":
        raise errors.Unsupported(
            f"{uri} is a server without named exports (no fixed newstyle negotiation)"
        )
    return handle


def _begin(handle: NBD, uri: RepositoryUri, attempt: Attempt, deadline: float) -> None:
    """Begin to connect.

    trio tries the addresses of a name side by side (RFC 8305), while libnbd waits for one after the
    other, and an address that does not answer takes all the time there is. With certificates,
    libnbd connects by itself, because it compares the host's name only then.

    Raises:
        ConnectionLost: no address could be reached in that time.
        nbd.Error: libnbd cannot begin.
    """
    if uri.transport == UNIX:
        handle.aio_connect_unix(uri.socket)
    elif uri.transport == VSOCK:
        handle.aio_connect_vsock(int(uri.host), uri.port)
    elif uri.certificates:
        handle.aio_connect_tcp(uri.host, str(uri.port))
    else:
        handle.aio_connect_socket(_tcp_socket(uri, attempt, deadline - time.monotonic()))


def _tcp_socket(uri: RepositoryUri, attempt: Attempt, limit_s: float) -> int:
    """Return a socket that is connected to the server.

    Raises:
        ConnectionLost: no address could be reached in that time.
    """

    async def open_socket() -> int:
        with trio.fail_after(limit_s):
            stream = await trio.open_tcp_stream(uri.host, uri.port, happy_eyeballs_delay=ATTEMPT_S)
        return stream.socket.detach()  # for libnbd

    try:
        return trio.from_thread.run(open_socket)
    except trio.TooSlowError:
        raise errors.ConnectionLost(uri.text, f"no answer in {attempt.limit_s:g} s") from None
    except (OSError, ValueError) as error:
        raise errors.ConnectionLost(uri.text, _why_not(error)) from error
    except (trio.RunFinishedError, trio.Cancelled):
        raise errors.ConnectionLost(uri.text, "not wanted any more") from None


def _why_not(error: Exception) -> str:
    """Return the reason of the first attempt that failed, if there were several."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return f"connect: {reason}"


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out soon that the other side of a TCP connection is gone.

    A firewall may forget a connection without a word. The kernel asks after 3 s of silence, and
    gives up when nothing was acknowledged for DEAD_S.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 3),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, DEAD_S - 3),
        (socket.TCP_USER_TIMEOUT, DEAD_S * 1000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def connect_export(uri: str, name: str, attempt: Attempt) -> tuple[NBD, Export]:
    """Return a handle that is ready to read export `name`, and what the export is now.

    Blocks, so call it in a thread.

    Raises:
        ConnectionLost: the server cannot be reached, or does not have the export. The latter may be
            a passing state.
        Unsupported: as for `connect`.
    """
    deadline = time.monotonic() + attempt.limit_s
    handle = connect(uri, attempt, deadline)
    try:
        handle.set_export_name(name)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        refused: list[int] = []

        def answered(err: c_int) -> int:
            refused.append(err.value)
            return 1

        handle.aio_opt_go(answered)
        _poll_until_settled(handle, uri, deadline, attempt)
        if not handle.aio_is_ready():
            why = errno.errorcode.get(refused[0], str(refused[0])) if refused else "it hung up"
            raise errors.ExportRefused(uri, f"the server refuses export {name!r} ({why})")
        found = described(handle, name)
    except nbd.Error as error:
        raise errors.ConnectionLost(uri, reason(error)) from error
    if isinstance(found, str):
        raise errors.ExportRefused(uri, f"export {name!r}: {found}")
    return handle, found


def compare(handle: NBD, uri: str, name: str, samples: Sequence[Sample], attempt: Attempt) -> None:
    """Compare samples with what the server has. Blocks, so call it in a thread.

    What the server cannot read is left out.

    Raises:
        ContentChanged: some bytes differ.
        ConnectionLost: the connection is lost, or brings nothing within the attempt's limit.
    """
    codes: dict[int, int] = {}

    def completed(number: int, err: c_int) -> int:
        codes[number] = err.value
        return 0

    unit, size = alignment(handle), handle.get_size()
    asked = [
        ByteRange(one.offset, one.offset + len(one.data)).align_out(unit, size) for one in samples
    ]
    buffers = [nbd_buffers.take(span.length) for span in asked]
    try:
        cookies = [
            handle.aio_pread(buffer.target(0, span.length), span.start, partial(completed, number))
            for number, (span, buffer) in enumerate(zip(asked, buffers, strict=True))
        ]
        deadline = time.monotonic() + attempt.limit_s
        while len(codes) < len(samples):
            if handle.poll(_POLL_MS):  # a part of a long answer is progress as well
                deadline = time.monotonic() + attempt.limit_s
            _check_alive(handle, uri, deadline, attempt)
        ended = [codes[number] or retire(handle, cookie) for number, cookie in enumerate(cookies)]
        # Only now, because libnbd may write to the buffers before.
        found = [
            bytes(buffer.memory[sample.offset - span.start :][: len(sample.data)])
            for sample, span, buffer in zip(samples, asked, buffers, strict=True)
        ]
    except nbd.Error as error:
        raise errors.ConnectionLost(uri, reason(error)) from error
    finally:
        if len(codes) == len(samples):
            _give_back(buffers)
        else:  # libnbd may write to them until the handle is gone
            weakref.finalize(handle, _give_back, buffers)
    for sample, data, code in zip(samples, found, ended, strict=True):
        if code in LOST:
            raise errors.ConnectionLost(uri, "the server hung up")
        if not code:
            sample.check_same(name, data)


def _give_back(buffers: Sequence[nbd_buffers.NbdBuffer]) -> None:
    for buffer in buffers:
        nbd_buffers.give(buffer)


class Watchdog:
    """Limits the time of libnbd's blocking calls inside a `with` block, by cutting their
    connection.

    The calls that negotiate options wait for a server for ever. Their `aio_` forms would not, but
    these do not say why an option was refused.
    """

    def __init__(
        self,
        handle: NBD,
        uri: str,
        attempt: Attempt,
        limit_s: float | None = None,
    ) -> None:
        """Watch `handle`, which is connected.

        The connection is cut when nobody wants it any more, or when nothing comes in `limit_s`, or
        in the attempt's limit if that is None.
        """
        self._limit_s = attempt.limit_s if limit_s is None else limit_s
        self._uri = uri
        self._abandoned = attempt.abandoned
        self._connection = socket.socket(fileno=os.dup(handle.aio_get_fd()))
        self._done = threading.Event()
        self._cut = ""
        self._thread = threading.Thread(target=self._watch, name="nbd-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.progress()
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Raise ConnectionLost instead of the nbd.Error that cutting the connection has caused."""
        self._done.set()
        self._thread.join()
        self._connection.close()
        if self._cut and isinstance(error, nbd.Error):
            raise errors.ConnectionLost(self._uri, self._cut) from error

    def progress(self) -> None:
        """Note that something came. May be called in libnbd's callbacks."""
        self._deadline = time.monotonic() + self._limit_s

    def _watch(self) -> None:
        while not self._done.wait(_POLL_MS / 1000):
            if self._abandoned.is_set():
                self._cut = "not wanted any more"
            elif time.monotonic() > self._deadline:
                self._cut = f"no answer in {self._limit_s:g} s"
            if self._cut:
                with suppress(OSError):  # the server has closed it already
                    self._connection.shutdown(socket.SHUT_RDWR)
                return


def described(handle: NBD, name: str) -> Export | str:
    """Return what the handle was last told about an export, or what is wrong with that.

    Raises:
        nbd.Error: the handle cannot tell.
    """
    size = handle.get_size()
    if size < 0:  # the Python module of libnbd 1.14 takes the 64 bits for a signed number
        return "the server claims that it has 8 EiB or more"
    try:
        return Export(name, size, _identity(str(handle.get_export_description())))
    except (nbd.Error, UnicodeDecodeError):
        return Export(name, size, "")


def _identity(description: str) -> str:
    """Return what is kept of a description. It may have 4 KiB, for each of many exports."""
    if len(description) <= MAX_IDENTITY:
        return description
    digest = hashlib.sha256(description.encode(errors="surrogateescape")).hexdigest()
    return f"{description[: MAX_IDENTITY - 80]}... sha256:{digest}"


def max_payload(handle: NBD) -> int:
    """Return how many bytes the server of a connected handle may be asked for in one read."""
    return int(handle.get_block_size(nbd.SIZE_MAXIMUM)) or _MAX_PAYLOAD


def alignment(handle: NBD) -> int:
    """Return the unit of requests: the server's minimum block size (1 to 64 KiB)."""
    return int(handle.get_block_size(nbd.SIZE_MINIMUM)) or 1


def reason(error: nbd.Error) -> str:
    """Return libnbd's message without the name of its function, which means nothing to a user."""
    text = str(error.string)
    head, _, tail = text.partition(": ")
    return tail if head.startswith("nbd_") and tail else text


def _poll_until_settled(
    handle: NBD,
    uri: str,
    deadline: float,
    attempt: Attempt,
    too_late: type[errors.ConnectionLost] = errors.ConnectionLost,
) -> None:
    while not (handle.aio_is_negotiating() or handle.aio_is_ready()):
        _check_alive(handle, uri, deadline, attempt, too_late)
        handle.poll(_POLL_MS)


def _check_alive(
    handle: NBD,
    uri: str,
    deadline: float,
    attempt: Attempt,
    too_late: type[errors.ConnectionLost] = errors.ConnectionLost,
) -> None:
    if handle.aio_is_dead() or handle.aio_is_closed():
        raise errors.HungUp(uri, "the server hung up")
    if attempt.abandoned.is_set():
        raise errors.ConnectionLost(uri, "not wanted any more")
    if time.monotonic() > deadline:
        raise too_late(uri, f"no answer in {attempt.limit_s:g} s")


def retire(handle: NBD, cookie: int) -> int:
    """Let libnbd forget a command that has completed.

    Only this call reports that a read was answered without any data. The buffer then holds what it
    held before.

    Returns:
        The error number of the command, or 0.
    """
    try:
        handle.aio_command_completed(cookie)
    except nbd.Error as error:
        return int(error.errnum or errno.EIO)
    return 0
