"""QEMU's monitor: connects to it, and runs commands, with a deadline for each.

The errors of a command say whether QEMU still answers, and so whether earlier commands can be
undone.
"""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from lazyfs import errors
from lazyfs.host import peer
from lazyfs.units import MiB

CONNECT_S = 5.0
"""The deadline for connecting and the greeting. QEMU greets within milliseconds. But it keeps a
second client of one socket waiting for ever, and the sockets of other programs never greet."""

COMMAND_S = 30.0
"""The deadline for each command. A blockdev-reopen waits for all requests in flight, and so for the
slowest disk of the VM."""

OWN_PACKAGE = "lazyfs"
"""The package that lazyfs's own control sockets name in their greeting."""

MAX_ANSWER = 4 * MiB
"""The longest accepted answer in bytes. An answer has about 1 KiB for each block node. A monitor
may be a stranger's program, and Python takes thirty times as much memory for what it reads."""


class NoQemu(errors.UserError):
    """No QEMU is at the socket.

    Either no process listens there, or it is a program that does not speak QEMU's protocol.
    """


class StepFailed(errors.UserError):
    """QEMU refused one command, or a check of ours failed. QEMU still answers.

    The message begins with the name of the step.
    """


class Lost(errors.UserError):
    """QEMU no longer answers, so nothing can be undone."""


class Monitor:
    """Runs QMP commands, with a deadline of COMMAND_S for each."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Run a command and return its result.

        A debugging command (human-monitor-command) that prints something counts as failed.

        Raises:
            StepFailed: QEMU refused the command.
            Lost: QEMU did not answer in time, or the connection has ended.
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
        except (ValueError, RecursionError) as error:
            raise Lost(f"{command}: the answer is too long, or is not QMP's") from error
        if command == "human-monitor-command" and answer:
            raise StepFailed(f"{command}: {str(answer).strip()}")
        return answer


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[tuple[Monitor, int]]:
    """Connect to the QMP socket at `path`, and disconnect at the end.

    Yields:
        The monitor, and the id of the process that made the socket.

    Raises:
        NoQemu: there is no QMP server, or it is lazyfs's own control socket.
        UserError: the server does not greet in time, or cannot be reached.
    """
    from qemu.qmp import QMPClient, QMPError

    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    client = QMPClient("pivot", readbuflen=MAX_ANSWER)
    client.events.names = {"none"}  # otherwise it keeps every event, and nobody reads them
    with _connect(path) as connection:
        try:
            pid = peer.of(connection).pid
            async with asyncio.timeout(CONNECT_S):
                await client.connect(connection)
        except TimeoutError:
            raise errors.UserError(
                f"no QMP greeting in {CONNECT_S:g} s: this is not a QEMU, or it hangs, "
                "or another client is connected"
            ) from None
        except (QMPError, OSError, EOFError, ValueError, RecursionError) as error:
            hung_up = isinstance(getattr(error, "exc", error), EOFError | OSError)
            reason = "it hung up" if hung_up else "its greeting is not QMP's"
            raise NoQemu(f"this is not a QMP server: {reason}") from error
        if _package(client) == OWN_PACKAGE:
            await _disconnect(client)
            raise NoQemu("this is lazyfs's own control socket; name the QMP sockets of QEMUs")
        try:
            yield Monitor(client), pid
        finally:
            await _disconnect(client)


async def _disconnect(client: Any) -> None:
    from qemu.qmp import QMPError

    # The last two say that an answer was too long or no JSON, which whoever waited has heard.
    with suppress(QMPError, OSError, EOFError, TimeoutError, ValueError, RecursionError):
        async with asyncio.timeout(CONNECT_S):
            await client.disconnect()


def _package(client: Any) -> object:
    """Return the package that the greeting names, or None."""
    return client.greeting.QMP.version.get("package") if client.greeting else None


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(CONNECT_S)  # With a timeout, connect() to a full queue fails at once.
        connection.connect(path)
    except OSError as error:
        connection.close()
        reason = error.strerror or str(error)
        if isinstance(error, ConnectionRefusedError):
            if is_socket(path):
                raise NoQemu("nobody listens: its QEMU has ended") from error
            reason = "this is not a socket"
        elif isinstance(error, BlockingIOError):
            reason = "other clients wait for this QEMU already"
        raise errors.UserError(reason) from error
    return connection


def is_socket(path: str) -> bool:
    """Return whether `path` is a UNIX socket itself, and no link to one.

    Who can write to a folder of sockets could lead root to any socket of the host.
    """
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False
