"""The control socket: takes QMP commands from clients, and calls the daemon's functions for them.

Each client has two tasks of its own. One executes the client's commands, one after the other. The
other writes answers and events. So a client that never reads stops nobody else. Its own commands
wait until it reads, and when too many events wait for it, it is dropped.
"""

import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import trio

import lazyfs
from lazyfs import errors
from lazyfs.core import control_schema, qmp_wire
from lazyfs.host import peer

logger = logging.getLogger(__name__)

MAX_CLIENTS = 64
"""How many clients there can be at the same time. A host has a handful of people and scripts that
ask. A client beyond this number is turned away."""

MAX_UNREAD = 1000
"""How many messages can wait for a client. A few hundred images that all change their states cause
about as many events. Each has about 200 bytes."""

Handler = Callable[[dict[str, Any]], Awaitable[object]]
Message = Sequence[bytes]
"""A message of the wire in pieces, which are written one after the other."""


class ControlServer:
    """Serves commands on a UNIX socket."""

    def __init__(
        self,
        path: str,
        listening: socket.socket,
        commands: Mapping[str, Handler],
        schema: Sequence[control_schema.Command] = control_schema.COMMANDS,
    ) -> None:
        """Serve what connects to `listening`.

        Args:
            path: where the socket lies now.
            listening: the socket, which others may listen on later, and which they remove.
            commands: the functions by the names of their commands. A function is given the
                command's arguments. It returns a value that JSON can represent, or raises
                qmp_wire.CommandError.
            schema: declares all commands, also those that this class answers itself.
        """
        self.path = path
        self._commands = {
            **commands,
            "qmp_capabilities": self._capabilities,
            "query-commands": self._query_commands,
            "query-qmp-schema": self._query_schema,
            "query-version": self._query_version,
        }
        self._schema = {command.name: command for command in schema}
        assert self._commands.keys() == self._schema.keys()
        self._clients: set[_Client] = set()
        self._answering = 0
        self._answered = trio.Event()
        self._socket = trio.socket.from_stdlib_socket(listening)
        self._made: os.stat_result | None = None
        with suppress(FileNotFoundError):
            self._made = os.stat(path)

    async def run(self) -> None:
        """Serve until cancelled."""
        # If no descriptor is left for a client, trio waits a moment and tries again.
        await trio.serve_listeners(self._serve, [trio.SocketListener(self._socket)])

    async def all_answered(self) -> None:
        """Wait until no command is under way."""
        while self._answering:
            await self._answered.wait()

    def move(self, path: str) -> None:
        """Move the socket to another path and go on listening there.

        A daemon that is detached does so, because another daemon may soon want the present path.

        Raises:
            UserError: the socket is no longer there.
        """
        try:
            if self._made is None or not os.path.samestat(os.stat(self.path), self._made):
                raise FileNotFoundError(errno.ENOENT, "it belongs to another daemon")
            os.rename(self.path, path)
        except OSError as error:
            raise errors.UserError(
                f"the control socket {self.path} is gone: {error.strerror}"
            ) from error
        self.path = path

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to every client.

        This does not wait. A client for which MAX_UNREAD messages wait already is dropped.
        """
        assert name in control_schema.EVENT_NAMES, name
        message = [qmp_wire.encode(qmp_wire.event(name, data, time.time_ns() // 1000))]
        for client in list(self._clients):
            client.send_nowait(message)

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            if not _allowed(stream) or len(self._clients) >= MAX_CLIENTS:
                return
            client = _Client(stream)
            self._clients.add(client)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client.write)
                    await self._talk(client)
                    await client.flushed()
                    nursery.cancel_scope.cancel()
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # The client has hung up, or was dropped.
            except* Exception:
                logger.exception("a control client was dropped, a bug in lazyfs")
            finally:
                self._clients.discard(client)

    async def _talk(self, client: "_Client") -> None:
        session = qmp_wire.ServerSession("lazyfs", _version())
        decoder = qmp_wire.Decoder()
        await client.send([qmp_wire.encode(session.greeting())])
        async for data in client.stream:
            try:
                for message in decoder.feed(bytes(data)):
                    with self._under_way():
                        answer = await self._answer(session, message)
                        client.listens = session.negotiated
                        await client.send(answer)
            except qmp_wire.WireError as error:
                failure = qmp_wire.CommandError(f"JSON parse error, {error.desc}")
                await client.send([qmp_wire.encode(qmp_wire.failed({}, failure))])
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

    async def _answer(self, session: qmp_wire.ServerSession, message: dict[str, Any]) -> Message:
        try:
            return qmp_wire.encode_in_pieces(
                qmp_wire.returned(message, await self._execute(session.command(message)))
            )
        except qmp_wire.CommandError as error:
            failure = error
        except (errors.LazyfsError, OSError) as error:
            failure = qmp_wire.CommandError(errors.said(error))
        except Exception:
            logger.exception("a control command failed, a bug in lazyfs")
            failure = qmp_wire.CommandError(
                "the command failed, a bug in lazyfs; the log has the details"
            )
        return [qmp_wire.encode(qmp_wire.failed(message, failure))]

    async def _execute(self, command: qmp_wire.Command) -> object:
        schema = self._schema.get(command.name)
        if schema is None:
            raise qmp_wire.CommandError(
                f"The command {command.name} has not been found", "CommandNotFound"
            )
        control_schema.check_arguments(schema, command.arguments)
        return await self._commands[command.name](command.arguments)

    async def _capabilities(self, _arguments: dict[str, Any]) -> object:
        return {}

    async def _query_commands(self, _arguments: dict[str, Any]) -> object:
        return [{"name": name} for name in sorted(self._commands)]

    async def _query_schema(self, _arguments: dict[str, Any]) -> object:
        return control_schema.introspection()

    async def _query_version(self, _arguments: dict[str, Any]) -> object:
        major, minor, micro = _version()
        return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "lazyfs"}


class _Client:
    """Holds one connection, and the messages that wait to be written to it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.listens = False
        """Whether the client gets events. It does after it has negotiated."""
        self._gone = False
        """Whether the connection has ended, so that nothing can be written to it."""
        self._unread: deque[Message] = deque()
        self._filled = trio.Event()
        self._emptied = trio.Event()

    async def send(self, message: Message) -> None:
        """Queue an answer, and wait until it and everything before it is written.

        Raises:
            BrokenResourceError: the client is gone.
        """
        self._put(message)
        await self.flushed()

    async def flushed(self) -> None:
        """Wait until everything is written.

        Raises:
            BrokenResourceError: the client is gone, so that will never be.
        """
        while self._unread and not self._gone:
            await self._emptied.wait()
        if self._gone:
            raise trio.BrokenResourceError

    def send_nowait(self, message: Message) -> None:
        """Queue an event if the client gets events. Drop the client if it does not read."""
        if not self.listens:
            return
        if len(self._unread) >= MAX_UNREAD:
            logger.warning("a control client that does not read was dropped")
            self._end()
            self.stream.socket.close()
            return
        self._put(message)

    def _put(self, message: Message) -> None:
        self._unread.append(message)
        self._filled.set()

    async def write(self) -> None:
        """Write what is queued, until cancelled or until the client is gone.

        If the client is gone, its command that is under way still goes on to its end.
        """
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await self._filled.wait()
                while self._unread:
                    for piece in self._unread[0]:
                        await self.stream.send_all(piece)
                    if self._unread:  # Otherwise the client was dropped meanwhile.
                        self._unread.popleft()
                self._filled = trio.Event()
                self._emptied.set()
                self._emptied = trio.Event()
        self._end()

    def _end(self) -> None:
        self._gone, self.listens = True, False
        self._unread.clear()
        self._emptied.set()


def _allowed(stream: trio.SocketStream) -> bool:
    """Return whether the client belongs to root or to the daemon's own user."""
    client = peer.of(stream.socket)
    if client.uid in (0, os.geteuid()):
        return True
    logger.warning("a control client was turned away: pid=%d uid=%d", client.pid, client.uid)
    return False


def _version() -> tuple[int, int, int]:
    major, minor, micro = (int(part) for part in lazyfs.__version__.split("."))
    return major, minor, micro
