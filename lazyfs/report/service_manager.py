"""Tells the service manager that the daemon is ready, its status, that it lives, and that it stops.

The messages are datagrams to the socket that NOTIFY_SOCKET names. Libraries for this exist
(sdnotify, which has had no release since 2017; systemd-python, which is written in C and needs
libsystemd's headers). They are not used, because the protocol needs only these few lines, and
systemd keeps it stable for other implementations.

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
"""How long the daemon tries to report that it stops. If the service manager does not receive within
that time, the daemon ends without the message."""

STATUS_S = 30.0
"""How often the status is sent if it has changed and there is no watchdog."""


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """Names the service manager that started this daemon and expects messages from it."""

    address: str
    """The address of its socket: a path, or "@" and a name in the abstract namespace."""
    watchdog_s: float | None
    """It ends a daemon from which it has heard nothing for so many seconds. None means that it does
    not watch."""

    async def attend(self, answers: Callable[[], object], status: Callable[[], str]) -> None:
        """Report the state of the daemon until cancelled.

        The first message says that the daemon is ready, once `answers` has returned. The next ones
        report the status and that the daemon lives. The last one says that the daemon stops.

        Args:
            answers: is called in a thread. It returns once the mount answers, and raises OSError if
                the mount never will.
            status: returns one line for people.

        Cancellation: the last message is still sent. A call of `answers` may go on in its thread.
        """
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            try:
                try:
                    await trio.to_thread.run_sync(answers, abandon_on_cancel=True)
                except OSError as error:  # The mount has been unmounted already.
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
        """Send `lines` as one message, unless there are none.

        A failure is logged at `level`. Later messages are sent all the same.
        """
        if not lines:
            return
        message = "\n".join(line.replace("\n", " ") for line in lines).encode(errors="replace")
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        try:
            await sender.sendto(message, address)
        except OSError as error:
            logger.log(level, "cannot send to the service manager at %s: %s", self.address, error)


def from_environment(environment: MutableMapping[str, str], pid: int) -> ServiceManager | None:
    """Return the service manager that expects messages from this process, or None.

    Args:
        environment: the process's variables. Those for the service manager are removed, so that
            programs which this process starts do not send messages in its name.
        pid: the id of this process.
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
    """Return the service manager that expects messages from this process, or None."""
    return from_environment(os.environ, os.getpid())
