"""A repository, a mount and a user, all real, for one test. At its end nothing is left behind."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lazyfs.host import mounts

PR_SET_PDEATHSIG = 1
DEADLINE_S = 60.0
KiB = 1024
MiB = 1024 * KiB

_libc = ctypes.CDLL(None)

REAL = ("-m", "lazyfs")
"""The program as users start it."""

USES = (
    "-c",
    "import sys; from lazyfs.core import looking; looking.EDGE = 0; looking.LOOK_S = 0.0; "
    "from lazyfs.__main__ import main; sys.exit(main())",
)
"""The program, for which each open of an image is a use. The images of most tests are smaller than
what programs read that only look at them."""


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Serve as a preexec_fn: the child gets a signal when the test's process ends, however that
    ends.

    The child also heeds SIGINT. A shell lets its background jobs ignore that signal, and the test's
    process may be such a job.
    """
    _libc.prctl(PR_SET_PDEATHSIG, number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until a condition holds, instead of for a fixed time."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not in {deadline_s:g} s: {what}"
        time.sleep(0.02)


def kill_both(keeper: "subprocess.Popen[str]") -> None:
    """Kill a keeper and its daemon (kill -9), so that neither does anything about the other."""
    if keeper.poll() is None:
        keeper.send_signal(signal.SIGSTOP)  # else it would start another one
        children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        keeper.kill()
        for child in children:
            wait_until(lambda pid=child: has_ended(int(pid)), "the daemon is dead")  # type: ignore[misc]
    keeper.wait()


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or only its parent does not know that yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Make `folder` a file system of its own of `size`, in the form that mount(8) takes.

    It is unmounted at the end, even if it is in use.
    """
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Nbdkit:
    """Runs nbdkit on a unix socket. It can be started again."""

    def __init__(self, socket: Path, *arguments: str, log: Path) -> None:
        self.socket = socket
        self.arguments = arguments
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def start(self) -> None:
        process = self._spawn()
        wait_until(self._answers, "nbdkit answers")
        threading.Thread(target=self._restart_if_it_crashes, args=(process,), daemon=True).start()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        self.socket.unlink(missing_ok=True)
        command = [
            "nbdkit",
            "--foreground",
            "--readonly",
            "--unix",
            str(self.socket),
            *self.arguments,
        ]
        with self.log.with_suffix(".stderr").open("ab") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, preexec_fn=die_with_parent)
        return self.process

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.with_suffix(".stderr").read_text()
        return self.socket.exists()

    def _restart_if_it_crashes(self, process: "subprocess.Popen[bytes]") -> None:
        """Start nbdkit again when it ends, as its service manager would.

        nbdkit 1.32 can abort when a client vanishes with requests in flight ("raw_send_socket:
        Assertion `sock >= 0' failed"). A killed daemon is such a client. This thread must not end
        before the process that it started, because PR_SET_PDEATHSIG takes the thread for the
        parent.
        """
        while True:
            process.wait()
            if self.process is not process:
                return
            process = self._spawn()

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """End it for good. The eval plugin gets the time to remove its folder in /tmp."""
        if self.process is not None and "eval" in self.arguments:
            process, self.process = self.process, None
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.kill()

    def reads(self, export: str | None = None) -> list[tuple[int, int]]:
        """Return (offset, length) of each read in the log filter's file, in order."""
        connections: dict[str, str] = {}
        found = []
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            if opened := re.search(r'connection=(\d+) .*?export="?([^" ]*)"?', line):
                connections.setdefault(opened[1], opened[2])
            read = re.search(
                r"connection=(\d+) Read id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", line
            )
            if read and (export is None or connections.get(read[1]) == export):
                found.append((int(read[2], 16), int(read[3], 16)))
        return found

    def bytes_read(self) -> int:
        return sum(length for _, length in self.reads())


class Lab:
    """Holds all that one test uses, in a temporary folder."""

    watchdog_s = 100.0
    """How long the test may take. A test that hangs inside a read of the mount cannot be
    interrupted, but its daemon can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        self.mnt = folder / "mnt"
        self.log = folder / "lazyfs.log"
        self.repository.mkdir()
        self.mnt.mkdir()
        self.daemon: subprocess.Popen[str] | None = None
        """The keeper: the process that users and signals know. Its child is the daemon itself."""
        self.notes: list[str] = []
        """What the latest mount told its user."""
        self._servers: list[Nbdkit] = []
        self._watchdog = threading.Timer(0, self.kill_daemon)
        self.allow(self.watchdog_s)

    def allow(self, seconds: float) -> None:
        """Give the test so much time from now on."""
        self._watchdog.cancel()
        self._watchdog = threading.Timer(seconds, self.kill_daemon)
        self._watchdog.daemon = True
        self._watchdog.start()

    # -- the repository

    def image(self, name: str, size: int, data: dict[int, bytes] | None = None) -> Path:
        """Make a sparse image with `data` at offsets.

        Without `data` it is random bytes all over.
        """
        path = self.repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if data is None:
                file.write(os.urandom(size))
            file.truncate(size)
            for offset, content in (data or {}).items():
                file.seek(offset)
                file.write(content)
        return path

    def serve(self, *filters: str, parameters: tuple[str, ...] = ()) -> Nbdkit:
        """Serve the repository folder, with the log filter on top."""
        log = self.folder / "nbdkit.log"
        arguments = [
            "--filter=log",
            *(f"--filter={name}" for name in filters),
            "file",
            f"dir={self.repository}",
        ]
        return self.serve_with(*arguments, f"logfile={log}", *parameters)

    def serve_with(self, *arguments: str) -> Nbdkit:
        server = Nbdkit(
            self.folder / f"nbd{len(self._servers)}.sock",
            *arguments,
            log=self.folder / "nbdkit.log",
        )
        self._servers.append(server)
        return server

    # -- the user

    def lazyfs(
        self, *arguments: str | Path, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the command as a user would."""
        command = [sys.executable, "-m", "lazyfs", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert not check or done.returncode == 0, (
            f"{arguments}: exit {done.returncode}\n{done.stderr}{self.log_text()}"
        )
        return done

    def mount(self, uri: str, *options: str | Path, program: tuple[str, ...] = USES) -> None:
        """Mount in the foreground, as a child that cannot outlive the test; return when it
        answers."""
        assert self.daemon is None
        read_fd, write_fd = os.pipe()
        command = [
            sys.executable,
            *program,
            "mount",
            uri,
            str(self.mnt),
            "--foreground",
            "--io-timeout",
            "20",
        ]
        command += [*map(str, options), "--ready-fd", str(write_fd), "--log-file", str(self.log)]
        self.daemon = subprocess.Popen(
            command, pass_fds=[write_fd], preexec_fn=die_with_parent, text=True
        )
        os.close(write_fd)
        with os.fdopen(read_fd) as answer:
            *self.notes, said = answer.read().splitlines() or [""]
        assert said == "ready", f"{said}\n{self.log_text()}"

    def umount(self) -> None:
        self.lazyfs("umount", self.mnt)
        assert self.daemon is not None
        assert self.daemon.wait(DEADLINE_S) == 0, self.log_text()
        self.daemon = None

    @property
    def daemon_pid(self) -> int:
        """The process ID of the daemon that the keeper has started last, or 0."""
        assert self.daemon is not None
        children = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children").read_text()
        return int((children.split() or ["0"])[-1])

    def signal_daemon(self, number: int) -> None:
        """Send a signal to the daemon, and not to the keeper."""
        pid = self.daemon_pid
        assert pid, "there is no daemon"  # 0 would be this process and all of its group
        os.kill(pid, number)

    def kill_daemon(self) -> None:
        """Kill the keeper and its daemon at once (kill -9), as a crash of the host does."""
        if self.daemon is not None:
            keeper, self.daemon = self.daemon, None
            kill_both(keeper)

    def status_of_all(self, *options: str) -> str:
        """Return what `status` says of all mounts of the machine.

        It fails if one of them does not answer, and that one may belong to another test.
        """
        return self.lazyfs("status", *options, check=False).stdout

    def status(self) -> dict[str, Any]:
        (mount,) = json.loads(self.lazyfs("status", self.mnt, "--json").stdout)["mounts"]
        assert isinstance(mount, dict)
        return mount

    def image_status(self, name: str) -> dict[str, Any]:
        (found,) = [image for image in self.status()["images"] if image["name"] == name]
        assert isinstance(found, dict)
        return found

    def bytes_fetched(self, server: Nbdkit) -> int:
        """Return how many bytes the server was asked for, without those that were compared.

        Only what this daemon has compared is left out.
        """
        compared = sum(image["sampled_bytes"] for image in self.status()["images"])
        return server.bytes_read() - int(compared)

    def wait_for_state(self, name: str, state: str) -> dict[str, Any]:
        wait_until(lambda: self.image_status(name)["state"] == state, f"{name} is {state}")
        return self.image_status(name)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""

    # -- the end

    def close(self) -> None:
        self._watchdog.cancel()
        daemon = self.daemon
        if daemon is not None and daemon.poll() is None:
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                kill_both(daemon)
        while str(self.mnt) in Path("/proc/self/mountinfo").read_text():
            subprocess.run(["umount", "-l", str(self.mnt)], check=True)
        Path(mounts.socket_path(str(self.mnt))).unlink(missing_ok=True)
        for server in self._servers:
            server.stop()


@contextmanager
def lab_in(folder: Path) -> Iterator[Lab]:
    """Give a Lab that is taken down whatever happens."""
    lab = Lab(folder)
    try:
        yield lab
    finally:
        lab.close()


def pread(path: Path, offset: int, length: int, flags: int = 0) -> bytes:
    """Read from a file with a descriptor of its own."""
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)
