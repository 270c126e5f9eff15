"""The servers that a component test talks to."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import servers
from scripted_server import Conversation, ScriptedServer


class Peers:
    """Starts servers for one test, on sockets of their own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._started = 0

    def nbdkit(self, *arguments: str | Path, log: bool = True) -> servers.Server:
        """As `servers.nbdkit`."""
        return self._enter(servers.nbdkit(self.socket(), *arguments, log=log))

    def qemu_nbd(self, image: Path, *arguments: str | Path) -> servers.Server:
        """As `servers.qemu_nbd`."""
        return self._enter(servers.qemu_nbd(self.socket(), image, *arguments))

    def storage_daemon(self, exports: dict[str, tuple[Path, str]]) -> servers.Server:
        """As `servers.storage_daemon`."""
        return self._enter(servers.storage_daemon(self.socket(), exports))

    def scripted(self, script: Callable[[Conversation], None]) -> ScriptedServer:
        """A server in Python that runs `script` with each client."""
        server = ScriptedServer(self.socket(), script)
        self._stack.callback(server.kill)
        return server

    def socket(self) -> Path:
        self._started += 1
        return self._folder / f"s{self._started}.sock"

    def _enter(self, server: AbstractContextManager[servers.Server]) -> servers.Server:
        return self._stack.enter_context(server)
