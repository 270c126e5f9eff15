"""A QMP server made of a function, for what real peers cannot be made to do: each client in a
thread of its own."""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lazyfs.core import qmp_wire

DEADLINE_S = 20.0

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
        "capabilities": [],
    }
}


class HangUp(Exception):
    """To be raised by an answer: the server ends."""


class Refuse(Exception):
    """To be raised by an answer: an error message."""


class ScriptedQmp:
    """Serves `answer(command, arguments)` on a UNIX socket until killed; notes what was asked in
    `commands`."""

    def __init__(
        self, path: Path, answer: Callable[[str, dict[str, Any]], object], greets: bool = True
    ) -> None:
        self.path = path
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self._answer = answer
        self._greets = greets
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(8)
        self._connections: list[socket.socket] = []
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._connections.append(connection)
                self._threads.append(
                    threading.Thread(target=self._serve, args=(connection,), daemon=True)
                )
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        decoder = qmp_wire.Decoder()
        try:
            with connection:
                if self._greets:
                    connection.sendall(qmp_wire.encode(GREETING))
                while data := connection.recv(65536):
                    for message in decoder.feed(data):
                        identity = {key: message[key] for key in message.keys() & {"id"}}
                        connection.sendall(qmp_wire.encode({**identity, **self._result(message)}))
        except (HangUp, OSError):
            pass  # as meant; and clients come and go
        except BaseException as error:
            self._failures.append(error)

    def _result(self, message: dict[str, Any]) -> dict[str, Any]:
        command, arguments = message["execute"], message.get("arguments", {})
        if command == "qmp_capabilities":
            return {"return": {}}
        self.commands.append((command, arguments))
        try:
            return {"return": self._answer(command, arguments)}
        except Refuse as error:
            return {"error": {"class": "GenericError", "desc": str(error)}}

    def kill(self) -> None:
        for one in (self._listening, *self._connections):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "an answer does not end"
        self._listening.close()
        assert not self._failures, self._failures


class ScriptedQemu:
    """A QEMU with `base` (raw) on `base-file`, as far as `pivot` can see; it does open and close
    the files.

        device disk --root-- base --file-- base-file

    `fails`: command -> how many times it is done right before it raises what `failure` is.
    """

    def __init__(self, path: Path, filename: Path, opened: Path, size: int) -> None:
        """It shows `filename` and has `opened` open, as if the name had led there."""
        self.filename = str(filename)
        self.size = size
        self.fds = {"base-file": os.open(opened, os.O_RDONLY)}
        self.child = "base-file"
        self.fails: dict[str, int] = {}
        self.failure: Callable[[], None] = lambda: None
        self.opens: Path | None = None
        self.keeps_files = False
        self.iothreads = 0
        self._kept: list[int] = []
        self.server = ScriptedQmp(path, self._answer)

    def _answer(self, command: str, arguments: dict[str, Any]) -> object:
        if command in self.fails:
            self.fails[command] -= 1
            if self.fails[command] < 0:
                self.failure()
        return getattr(self, "_" + command.replace("-", "_"))(arguments)

    def _query_named_block_nodes(self, arguments: dict[str, Any]) -> object:
        common = {"ro": True, "cache": {"direct": False, "no-flush": False}, "detect_zeroes": "off"}
        image = {"filename": self.filename, "virtual-size": self.size}
        files = [{"node-name": name, "drv": "file", "image": image, **common} for name in self.fds]
        return [{"node-name": "base", "drv": "raw", "image": image, **common}, *files]

    def _x_debug_query_block_graph(self, arguments: dict[str, Any]) -> object:
        names = ["base", *self.fds]
        nodes = [{"id": names.index(name), "type": "block-driver", "name": name} for name in names]
        nodes.append({"id": 99, "type": "block-backend", "name": "disk"})
        root = {"parent": 99, "name": "root", "child": 0}
        return {
            "nodes": nodes,
            "edges": [root, {"parent": 0, "name": "file", "child": names.index(self.child)}],
        }

    def _query_iothreads(self, arguments: dict[str, Any]) -> object:
        return [{"id": f"io{number}"} for number in range(self.iothreads)]

    def _blockdev_add(self, arguments: dict[str, Any]) -> object:
        self.fds[arguments["node-name"]] = os.open(self.opens or arguments["filename"], os.O_RDONLY)
        return {}

    def _blockdev_reopen(self, arguments: dict[str, Any]) -> object:
        self.child = arguments["options"][0]["file"]
        return {}

    def _blockdev_del(self, arguments: dict[str, Any]) -> object:
        fd = self.fds.pop(arguments["node-name"])
        if self.keeps_files:
            self._kept.append(fd)
        else:
            os.close(fd)
        return {}

    def close(self) -> None:
        self.server.kill()
        for fd in [*self.fds.values(), *self._kept]:
            os.close(fd)
