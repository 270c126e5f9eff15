"""The control socket: QMP clients in, calls of the daemon's commands out.

Each client has a task of its own and is served one command at a time, so one that never reads its answers
stops nobody but itself.
"""

import errno
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import trio

import lazyfs
from lazyfs import errors
from lazyfs.core import qmp_wire

logger = logging.getLogger(__name__)

MAX_CLIENTS = 64
"""A host has a handful of people and scripts that ask; the next is turned away."""

_UCRED = struct.Struct("=iII")  # unix(7): pid, uid, gid

Command = Callable[[dict[str, Any]], Awaitable[object]]


class ControlServer:
    """Serves `commands` on a UNIX socket."""

    def __init__(self, path: str, commands: Mapping[str, Command]) -> None:
        """Bind the socket, mode 0600. The caller holds the cache's lock, so a socket there is a dead daemon's.

        A command gets its arguments and returns what can be JSON, or raises qmp_wire.CommandError.

        Raises:
            UserError: the socket cannot be made.
        """
        self.path = path
        self._commands = {**commands, "query-commands": self._query_commands, "query-version": self._query_version}
        self._clients = 0
        self._answering = 0
        self._answered = trio.Event()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            with suppress(FileNotFoundError):
                os.unlink(path)
            old = os.umask(0o177)
            try:
                listening.bind(path)
            finally:
                os.umask(old)
            self._bound = os.stat(path)
            listening.listen(MAX_CLIENTS)
        except OSError as error:
            listening.close()
            raise errors.UserError(f"cannot make the control socket {path}: {error.strerror or error}") from error
        self._socket = trio.socket.from_stdlib_socket(listening)

    async def run(self) -> None:
        """Serve until cancelled, then remove the socket."""
        try:
            # It also waits for better times when no descriptor is left for a client.
            await trio.serve_listeners(self._serve, [trio.SocketListener(self._socket)])
        finally:
            self.close()

    async def all_answered(self) -> None:
        """Wait until no command is under way."""
        while self._answering:
            await self._answered.wait()

    def move(self, path: str) -> None:
        """Go on listening at another path: the present one may soon belong to another daemon.

        Raises:
            UserError: the socket is not there any more.
        """
        try:
            if not os.path.samestat(os.stat(self.path), self._bound):
                raise FileNotFoundError(errno.ENOENT, "it belongs to another daemon")
            os.rename(self.path, path)
        except OSError as error:
            raise errors.UserError(f"the control socket {self.path} is gone: {error.strerror}") from error
        self.path = path

    def close(self) -> None:
        """Remove the socket, if it is still ours."""
        self._socket.close()
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), self._bound):
                os.unlink(self.path)

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            if not _allowed(stream) or self._clients >= MAX_CLIENTS:
                return
            self._clients += 1
            try:
                await self._talk(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # clients come and go
            except Exception:
                logger.exception("a control client was dropped, a bug in lazyfs")
            finally:
                self._clients -= 1

    async def _talk(self, stream: trio.SocketStream) -> None:
        session = qmp_wire.ServerSession("lazyfs", _version())
        decoder = qmp_wire.Decoder()
        await stream.send_all(qmp_wire.encode(session.greeting()))
        async for data in stream:
            try:
                for message in decoder.feed(bytes(data)):
                    with self._under_way():
                        await stream.send_all(await self._answer(session, message))
            except qmp_wire.WireError as error:
                failure = qmp_wire.CommandError(f"JSON parse error, {error.desc}")
                await stream.send_all(qmp_wire.encode(qmp_wire.failed({}, failure)))
                return

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self._answering += 1
        try:
            yield
        finally:
            self._answering -= 1
            self._answered.set()
            self._answered = trio.Event()

    async def _answer(self, session: qmp_wire.ServerSession, message: dict[str, Any]) -> bytes:
        try:
            return qmp_wire.encode(qmp_wire.returned(message, await self._execute(session.command(message))))
        except qmp_wire.CommandError as error:
            failure = error
        except errors.LazyfsError as error:
            failure = qmp_wire.CommandError(str(error))
        except Exception:
            logger.exception("a control command failed, a bug in lazyfs")
            failure = qmp_wire.CommandError("the command failed, a bug in lazyfs; the log has the details")
        return qmp_wire.encode(qmp_wire.failed(message, failure))

    async def _execute(self, command: qmp_wire.Command) -> object:
        if command.name == "qmp_capabilities":
            return {}
        handler = self._commands.get(command.name)
        if handler is None:
            raise qmp_wire.CommandError(f"The command {command.name} has not been found", "CommandNotFound")
        return await handler(command.arguments)

    async def _query_commands(self, _arguments: dict[str, Any]) -> object:
        return [{"name": name} for name in sorted([*self._commands, "qmp_capabilities"])]

    async def _query_version(self, _arguments: dict[str, Any]) -> object:
        major, minor, micro = _version()
        return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "lazyfs"}


def _allowed(stream: trio.SocketStream) -> bool:
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    if uid in (0, os.geteuid()):
        return True
    logger.warning("a control client was turned away: pid=%d uid=%d", pid, uid)
    return False


def _version() -> tuple[int, int, int]:
    major, minor, micro = (int(part) for part in lazyfs.__version__.split("."))
    return major, minor, micro
