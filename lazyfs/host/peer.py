"""The process at the other end of a UNIX socket. Source: unix(7), SO_PEERCRED."""

import socket
import struct
from dataclasses import dataclass
from typing import Protocol

_UCRED = struct.Struct("=iII")
"""pid, uid and gid of struct ucred."""


class _Connected(Protocol):
    """A connected UNIX socket of the standard library or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """Describes the process that connected, or, to a client, the one that made the listening
    socket.

    The kernel noted these facts at that time. The process may have ended since.
    """

    pid: int
    """0 if the process is in a pid namespace that cannot be seen from here."""
    uid: int
    gid: int


def of(connected: _Connected) -> Peer:
    """Return the process at the other end of the socket."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer(*_UCRED.unpack(credentials))
