"""Looks up the names of hosts, beside everything else.

A resolver that does not answer holds a thread for a minute. trio's default threads are for reads of
cached data (`engine/threads.py`), so look-ups have threads of their own.
"""

import socket
from functools import partial
from typing import Any

import trio

AT_ONCE = 64
"""How many look-ups there can be at once: as many as connections that are being made."""


class Resolver(trio.abc.HostnameResolver):
    """Implements trio's interface for look-ups with the C library."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(AT_ONCE)

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,  # noqa: A002 - the name is trio's
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """Return addresses as socket.getaddrinfo does.

        Cancellation: the thread goes on by itself.
        """
        return await trio.to_thread.run_sync(
            partial(socket.getaddrinfo, host, port, family, type, proto, flags),
            limiter=self._limiter, abandon_on_cancel=True,
        )  # fmt: skip

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        """Return the name of an address as socket.getnameinfo does."""
        return await trio.to_thread.run_sync(
            socket.getnameinfo, sockaddr, flags, limiter=self._limiter, abandon_on_cancel=True
        )
