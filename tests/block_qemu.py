"""A real QEMU with disks and no guest (it never starts its CPUs), whose disks are read over NBD.

It has two monitors: one for the `pivot` under test, one for the test itself. What a node reads is
asked with an NBD export on that node, so reads go the way of a guest's, in an I/O thread if wanted.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd
import servers

DEADLINE_S = 20.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class QmpError(Exception):
    """QEMU's answer was an error."""


def file_node(name: str, path: Path, **options: Any) -> dict[str, Any]:
    return {
        "driver": "file",
        "node-name": name,
        "filename": str(path),
        "read-only": True,
        **options,
    }


def raw_node(name: str, file: Any, **options: Any) -> dict[str, Any]:
    return {"driver": "raw", "node-name": name, "file": file, "read-only": True, **options}


def overlay_node(name: str, path: Path, backing: Any, **options: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": name, "file": file, "backing": backing, **options}


def blockdevs(*nodes: dict[str, Any]) -> list[str]:
    return [word for node in nodes for word in ("-blockdev", json.dumps(node))]


def make_overlay(path: Path, backing: Path, backing_format: str = "raw") -> Path:
    servers.requires("qemu-img")
    command = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        str(backing),
        "-F",
        backing_format,
        str(path),
    ]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    return path


class BlockQemu:
    """A QEMU that serves its block layer only."""

    def __init__(self, folder: Path, arguments: list[str], name: str = "vm") -> None:
        servers.requires("qemu-system-x86_64")
        self.socket = folder / f"{name}.qmp"
        self._own = folder / f"{name}.own"
        self._nbd = folder / f"{name}.nbd"
        self._exports = 0
        command = [
            "qemu-system-x86_64",
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-nodefaults",
            "-no-user-config",
            "-S",
        ]
        command += ["-display", "none", "-m", "32"]
        for path in (self.socket, self._own):
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        self.messages = folder / f"{name}.messages"
        with self.messages.open("wb") as messages:
            self.process = subprocess.Popen(
                command + arguments,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(DEADLINE_S)
        servers.wait_until(self._connects, "QEMU listens")
        self._lines = self._connection.makefile("rb")
        self._lines.readline()
        self.qmp("qmp_capabilities")

    def _connects(self) -> bool:
        assert self.process.poll() is None, self.messages.read_text()
        try:
            self._connection.connect(
                str(self._own)
            )  # the second that QEMU makes: so the first is there, too
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    @property
    def pid(self) -> int:
        return self.process.pid

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command on the test's own monitor; `_` in the names of arguments stands for `-`."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._connection.sendall(
            json.dumps({"execute": command, "arguments": words}).encode() + b"\n"
        )
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise QmpError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def nodes(self) -> set[str]:
        return {node["node-name"] for node in self.qmp("query-named-block-nodes", flat=True)}

    def node(self, name: str) -> dict[str, Any]:
        (found,) = [
            one
            for one in self.qmp("query-named-block-nodes", flat=True)
            if one["node-name"] == name
        ]
        assert isinstance(found, dict)
        return found

    def top(self) -> str:
        """The automatic name of the only disk's top node."""
        graph = self.qmp("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        (found,) = [names[edge["child"]] for edge in graph["edges"] if edge["name"] == "root"]
        assert isinstance(found, str)
        return found

    def files(self) -> set[tuple[int, int]]:
        """Device and inode of each file that it has open."""
        found = set()
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            path = f"/proc/{self.pid}/fd/{fd}"
            try:
                if os.readlink(path).startswith("/"):
                    stat = os.stat(path)
                    found.add((stat.st_dev, stat.st_ino))
            except OSError:
                pass  # closed meanwhile, or on a dead mount
        return found

    def address_space(self) -> int:
        """In bytes; a cache takes its room there before it is used."""
        (line,) = [
            line
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
            if "VmSize" in line
        ]
        return int(line.split()[1]) * 1024

    def has_open(self, path: Path) -> bool:
        stat = path.stat()
        return (stat.st_dev, stat.st_ino) in self.files()

    def export(self, node: str, **options: Any) -> "Disk":
        """Serve a node over NBD, read-only, and return a client."""
        if not self._exports:
            self.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(self._nbd)}})
        self._exports += 1
        name = f"export{self._exports}"
        self.qmp("block-export-add", type="nbd", id=name, name=name, node_name=node, **options)
        return Disk(f"nbd+unix:///{name}?socket={self._nbd}")

    def close(self) -> None:
        self._lines.close()
        self._connection.close()
        self.process.kill()
        self.process.wait(DEADLINE_S)


class Disk:
    """Reads an exported node."""

    def __init__(self, uri: str) -> None:
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)

    def read(self, offset: int = 0, length: int = 4096) -> bytes:
        return bytes(self.handle.pread(length, offset))


@contextmanager
def reading(disk: Disk, expected: bytes) -> Iterator[Callable[[], int]]:
    """Read a disk over and over, as a guest would; on leaving, fail unless every read was right.

    Yields a function that says how many reads were done; it is at least 1 by then.
    """
    stop = threading.Event()
    done = 0
    wrong: list[object] = []

    def read() -> None:
        nonlocal done
        offset = 0
        while not stop.is_set() and not wrong:
            try:
                if disk.read(offset, 4096) != expected[offset : offset + 4096]:
                    wrong.append(offset)
            except nbd.Error as error:
                wrong.append(error)
            offset = (offset + 4096) % len(expected)
            done += 1

    thread = threading.Thread(target=read)
    thread.start()
    try:
        servers.wait_until(lambda: done, "the first read")
        yield lambda: done
        seen = done
        servers.wait_until(lambda: done > seen + 3 or wrong, "reads go on")
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert not wrong, wrong
