"""Connecting libnbd handles: in threads, as libnbd connects and negotiates in blocking calls.

A handle serves one export. The export is chosen in option mode, so that the URI stays the repository's.
"""

import errno
import os
import socket
import threading
import time
from contextlib import suppress
from ctypes import c_int

import nbd
from nbd import NBD

from lazyfs import errors
from lazyfs.engine.interfaces import Export
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
