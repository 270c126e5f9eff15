"""Tells the service manager that the mount is ready, its status, that it lives, and that it stops.

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
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

SEND_S = 1.0
"""How long a message may wait for a service manager that does not receive. Nobody else waits for
the keeper's main thread for longer than that."""

STATUS_S = 30.0
"""How often the status is sent if it has changed and there is no watchdog."""


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """Names the service manager that started this process and expects messages from it."""

    address: str
    """The address of its socket: a path, or "@" and a name in the abstract namespace."""
    watchdog_s: float | None
    """It ends a process from which it has heard nothing for so many seconds. None means that it
    does not watch."""

    def tell(self, *lines: str, fds: Sequence[int] = ()) -> None:
        """Send `lines` as one message, with descriptors beside it.

        A failure is logged; later messages are sent all the same.
        """
        message = "\n".join(line.replace("\n", " ") for line in lines).encode(errors="replace")
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(SEND_S)
            try:
                sender.connect(address)
                socket.send_fds(sender, [message], list(fds))
            except OSError as error:
                level = logging.WARNING if "READY=1" in lines else logging.DEBUG
                logger.log(
                    level, "cannot send to the service manager at %s: %s", self.address, error
                )


class Attendance:
    """Reports the state of a mount to a service manager, or to nobody."""

    def __init__(
        self, manager: ServiceManager | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Report nothing before `ready`. `clock` returns seconds."""
        self._manager = manager
        self._clock = clock
        self._told = ""
        self._told_at = -math.inf
        self._ready = False
        self._kept: set[str] = set()

    @property
    def wanted(self) -> bool:
        """True if somebody waits for these messages."""
        return self._manager is not None

    def ready(self, status: str) -> None:
        """Say that the mount answers."""
        if self._manager is not None and not self._ready:
            self._ready, self._told, self._told_at = True, status, self._clock()
            self._manager.tell("READY=1", f"STATUS={status}")

    def lives(self, status: str) -> None:
        """Say that it lives, and how it is. To be called every second or so; most calls do
        nothing."""
        manager, now = self._manager, self._clock()
        if manager is None or not self._ready:
            return
        # Twice within the time allowed, as sd_watchdog_enabled(3) recommends.
        if now < self._told_at + (
            STATUS_S if manager.watchdog_s is None else manager.watchdog_s / 2
        ):
            return
        lines = [] if manager.watchdog_s is None else ["WATCHDOG=1"]
        if status != self._told:
            lines.append(f"STATUS={status}")
        self._told, self._told_at = status, now
        if lines:
            manager.tell(*lines)

    def keep(self, name: str, fd: int) -> None:
        """Let the service manager keep a descriptor, for the next process.

        It does so if the unit has FileDescriptorStoreMax=. One that is kept under this name already
        stays as well: `forget` it first.
        """
        if self._manager is not None:
            # FDPOLL: it would drop /dev/fuse when that has an error, and say nothing.
            self._manager.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])
            self._kept.add(name)

    def knows(self, names: Iterable[str]) -> None:
        """Note what an earlier process has let the service manager keep."""
        self._kept.update(names)

    def forget(self, name: str) -> None:
        """Undo `keep`."""
        if self._manager is not None:
            self._manager.tell("FDSTOREREMOVE=1", f"FDNAME={name}")
            self._kept.discard(name)

    def forget_all(self) -> None:
        """Undo every `keep`: nobody is to go on."""
        for name in list(self._kept):
            self.forget(name)

    def stops(self) -> None:
        """Say that it stops."""
        if self._manager is not None:
            self._manager.tell("STOPPING=1")


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
