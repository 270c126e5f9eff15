"""Real NBD servers on unix sockets, for the length of a `with`; and the promise that none outlives
its test.

Each is a child that dies with the test's process (PR_SET_PDEATHSIG), and is ended by its pid when
the `with` ends, however that ends.
"""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest

DEADLINE_S = 20.0

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def requires(program: str) -> None:
    """Skip the test if `program` is missing; fail it where everything is meant to be installed."""
    if shutil.which(program) is None:
        reason = f"{program} is not installed"
        if os.environ.get("LAZYFS_TEST_STRICT") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition, not for a time."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not in {deadline_s:g} s: {what}"
        time.sleep(0.01)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Server:
    """A server process that listens on a unix socket; can be killed and started again."""

    def __init__(self, path: Path, command: Sequence[str | Path]) -> None:
        """`path`: of the socket; the server's messages and, for nbdkit, its request log go beside
        it."""
        requires(str(command[0]))
        self.path = path
        self.command = [str(word) for word in command]
        self.messages = path.with_suffix(".messages")
        self.request_log = request_log_of(path)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={quote(str(self.path))}"

    def start(self) -> None:
        """Return when it answers."""
        assert self._process is None
        self.path.unlink(missing_ok=True)
        with self.messages.open("ab") as messages:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                preexec_fn=_die_with_parent,
            )
        wait_until(self._answers, f"{self.command[0]} answers")

    def kill(self) -> None:
        """End it, as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """End it for good. nbdkit's eval plugin gets the time to remove its folder in /tmp."""
        process = self._process
        if process is not None and "eval" in self.command:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        self.kill()

    def restart(self) -> None:
        self.kill()
        self.start()

    def reads(self, export: str | None = None) -> list[tuple[int, int]]:
        """(offset, length) of each read request, in order, of one export or all; needs nbdkit's log
        filter."""
        text = self.request_log.read_text() if self.request_log.exists() else ""
        exports: dict[str, str] = {}
        found = []
        for line in text.splitlines():
            if opened := re.search(r'connection=(\d+) Connect export=("?)(.*?)\2 tls=', line):
                exports[opened[1]] = opened[3]
            read = re.search(
                r"connection=(\d+) Read id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", line
            )
            if read and (export is None or exports.get(read[1]) == export):
                found.append((int(read[2], 16), int(read[3], 16)))
        return found

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.messages.read_text(errors="replace")[-3000:]
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.path))
            except OSError:
                return False
            # Nor does nbdkit like clients that are gone before it has greeted them.
            client.settimeout(DEADLINE_S)
            return client.recv(8) == b"NBDMAGIC"


def request_log_of(path: Path) -> Path:
    """Where `nbdkit(..., log=True)` writes the requests."""
    return path.with_suffix(".requests")


@contextmanager
def serving(path: Path, command: Sequence[str | Path]) -> Iterator[Server]:
    """Run `command`, which must listen on `path`."""
    server = Server(path, command)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def nbdkit(path: Path, *arguments: str | Path, log: bool = True) -> Iterator[Server]:
    """Serve read-only; `arguments`: filters, the plugin, parameters. The log filter is
    outermost."""
    command: list[str | Path] = [
        "nbdkit",
        "--foreground",
        "--exit-with-parent",
        "--readonly",
        "--unix",
        path,
    ]
    logging = (["--filter=log"], [f"logfile={request_log_of(path)}"]) if log else ([], [])
    with serving(path, [*command, *logging[0], *arguments, *logging[1]]) as server:
        yield server


@contextmanager
def qemu_nbd(path: Path, image: Path, *arguments: str | Path) -> Iterator[Server]:
    """Serve one raw image read-only to several clients at once; `arguments`: such as -x NAME, -D
    DESCRIPTION."""
    command: list[str | Path] = [
        "qemu-nbd",
        "--socket",
        path,
        "--persistent",
        "--shared=8",
        "--read-only",
    ]
    with serving(path, [*command, "--format=raw", *arguments, image]) as server:
        yield server


@contextmanager
def storage_daemon(path: Path, exports: Mapping[str, tuple[Path, str]]) -> Iterator[Server]:
    """Serve raw images read-only: export name -> (image, description)."""
    command: list[str | Path] = [
        "qemu-storage-daemon",
        "--nbd-server",
        f"addr.type=unix,addr.path={path}",
    ]
    for i, (name, (image, description)) in enumerate(exports.items()):
        command += ["--blockdev", f"driver=file,node-name=node{i},filename={image},read-only=on"]
        described = f",description={description}" if description else ""
        command += ["--export", f"type=nbd,id=export{i},node-name=node{i},name={name}{described}"]
    with serving(path, command) as server:
        yield server
