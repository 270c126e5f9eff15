"""QEMU's monitor: connecting, with deadlines, and commands whose failures are told apart by what may be done then."""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from lazyfs import errors
from lazyfs.host import process_files
from lazyfs.units import MiB

CONNECT_S = 5.0
"""For connecting and the greeting. QEMU greets within milliseconds; it keeps a second client of one socket waiting for
ever, and other programs' sockets never greet."""

COMMAND_S = 30.0
"""For each command: blockdev-reopen waits for all requests in flight, so for the slowest disk of the VM."""

OWN_PACKAGE = "lazyfs"
"""What lazyfs's own control sockets say in their greeting."""

MAX_ANSWER = 64 * MiB
"""Bytes of the longest answer: about 1 KiB for each block node."""


class NoQemu(errors.UserError):
    """No QEMU is at the socket: nobody listens, or a program that does not speak its protocol."""


class StepFailed(errors.UserError):
    """QEMU refused one command, or a check of ours failed; QEMU goes on. The text begins with the step's name."""


class Lost(errors.UserError):
    """QEMU answers no more: nothing can be undone."""


class Monitor:
    """Runs QMP commands, with a deadline for each."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Return what the command returned. A debugging command that prints something has failed.

        Raises:
            StepFailed: QEMU refused.
            Lost: no answer.
        """
        from qemu.qmp import ExecuteError, QMPError

        try:
            async with asyncio.timeout(COMMAND_S):
                answer = await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise StepFailed(f"{command}: {error}") from error
        except TimeoutError:
            raise Lost(
                f"{command}: no answer in {COMMAND_S:g} s; run pivot again when QEMU answers"
            ) from None
        except (QMPError, OSError, EOFError) as error:
            raise Lost(f"{command}: QEMU hung up, or has ended") from error
        if command == "human-monitor-command" and answer:
            raise StepFailed(f"{command}: {str(answer).strip()}")
        return answer


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[tuple[Monitor, int]]:
    """Connect to a QMP socket; yield the monitor and the process that made the socket.

    Raises:
        UserError: there is no QMP server, or it is silent.
    """
    from qemu.qmp import QMPClient, QMPError

    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    client = QMPClient("pivot", readbuflen=MAX_ANSWER)
    with _connect(path) as connection:
        try:
            pid = process_files.peer_of(connection)
            async with asyncio.timeout(CONNECT_S):
                await client.connect(connection)
        except TimeoutError:
            raise errors.UserError(
                f"no QMP greeting in {CONNECT_S:g} s: no QEMU, one that hangs, or another client is connected"
            ) from None
        except (QMPError, OSError, EOFError, ValueError) as error:
            hung_up = isinstance(getattr(error, "exc", error), EOFError | OSError)
            reason = "it hung up" if hung_up else "it greets otherwise"
            raise NoQemu(f"this is no QMP server: {reason}") from error
        if _package(client) == OWN_PACKAGE:
            await _disconnect(client)
            raise NoQemu("this is lazyfs's own control socket; name the QMP sockets of QEMUs")
        try:
            yield Monitor(client), pid
        finally:
            await _disconnect(client)


async def _disconnect(client: Any) -> None:
    from qemu.qmp import QMPError

    with suppress(QMPError, OSError, EOFError, TimeoutError):
        async with asyncio.timeout(CONNECT_S):
            await client.disconnect()


def _package(client: Any) -> object:
    """Return what the greeting says of the program."""
    return client.greeting.QMP.version.get("package") if client.greeting else None


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(CONNECT_S)  # only so that a full queue is an error at once
        connection.connect(path)
    except OSError as error:
        connection.close()
        reason = error.strerror or str(error)
        if isinstance(error, ConnectionRefusedError):
            if is_socket(path):
                raise NoQemu("nobody listens: its QEMU has ended") from error
            reason = "this is no socket"
        elif isinstance(error, BlockingIOError):
            reason = "other clients wait for this QEMU already"
        raise errors.UserError(reason) from error
    return connection


def is_socket(path: str) -> bool:
    """Whether `path` names a UNIX socket."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
