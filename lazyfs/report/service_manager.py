"""Tells the service manager how the daemon is: ready, its status, alive, stopping.

The messages are datagrams to the socket that NOTIFY_SOCKET names. There are libraries for that (sdnotify, without a
release since 2017; systemd-python, in C, needs libsystemd's headers), but the protocol is these few lines, which
systemd keeps stable for others to speak.

Source: sd_notify(3), "Notes"; sd_watchdog_enabled(3).
"""

import logging
import math
import os
import socket
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import trio

logger = logging.getLogger(__name__)

LAST_WORD_S = 1.0
"""How long the end of the daemon waits to say so. A service manager that does not listen need not know."""

STATUS_S = 30.0
"""How late the service manager hears of another status, where there is no watchdog."""


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """Who started this daemon and wants to know."""

    address: str
    """Of its socket: a path, or "@" and a name in the abstract namespace."""
    watchdog_s: float | None
    """It ends a daemon that it has not heard of for so long; None if it does not watch."""

    async def attend(self, answers: Callable[[], object], status: Callable[[], str]) -> None:
        """Say that the daemon is ready when `answers` returns, then how it is, until cancelled; then that it stops.

        Args:
            answers: called in a thread; returns once the daemon answers, raises OSError if it will not.
            status: one line for people.

        Cancellation: it is told that the daemon stops. A call of `answers` may go on in its thread.
        """
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            try:
                try:
                    await trio.to_thread.run_sync(answers, abandon_on_cancel=True)
                except OSError as error:  # unmounted already
                    logger.warning("the mount does not answer: %s", error)
                    return
                told = status()
                await self._send(sender, logging.WARNING, "READY=1", f"STATUS={told}")
                while True:
                    # Twice within the time allowed, as sd_watchdog_enabled(3) recommends.
                    await trio.sleep(STATUS_S if self.watchdog_s is None else self.watchdog_s / 2)
                    was, told = told, status()
                    lines = [] if self.watchdog_s is None else ["WATCHDOG=1"]
                    await self._send(
                        sender, logging.DEBUG, *lines, *([f"STATUS={told}"] if told != was else [])
                    )
            finally:
                with trio.move_on_after(LAST_WORD_S, shield=True):
                    await self._send(sender, logging.DEBUG, "STOPPING=1")

    async def _send(self, sender: trio.socket.SocketType, level: int, *lines: str) -> None:
        """Send what is not empty; a failure is logged at `level`, and the next message tried all the same."""
        if not lines:
            return
        message = "\n".join(line.replace("\n", " ") for line in lines).encode(errors="replace")
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        try:
            await sender.sendto(message, address)
        except OSError as error:
            logger.log(level, "the service manager at %s cannot be told: %s", self.address, error)


def from_environment(environment: MutableMapping[str, str], pid: int) -> ServiceManager | None:
    """Return who wants to hear of this process, if anybody; what it starts shall not speak in its name.

    Args:
        environment: its variables, from which those for this are removed.
        pid: of this process.
    """
    address = environment.pop("NOTIFY_SOCKET", "")
    interval_us = environment.pop("WATCHDOG_USEC", "")
    for_pid = environment.pop("WATCHDOG_PID", "")
    if len(address) < 2 or address[0] not in "/@":
        if address:
            logger.warning("NOTIFY_SOCKET is neither a path nor an abstract name: %s", address)
        return None
    watchdog_s = None
    if interval_us and for_pid in ("", str(pid)):
        try:
            watchdog_s = int(interval_us) / 1e6
        except ValueError:
            watchdog_s = math.nan
        if not watchdog_s > 0:
            logger.warning("WATCHDOG_USEC is not a time: %s", interval_us)
            watchdog_s = None
    return ServiceManager(address, watchdog_s)


def own() -> ServiceManager | None:
    """Return the service manager of this process, if one wants to hear of it."""
    return from_environment(os.environ, os.getpid())
