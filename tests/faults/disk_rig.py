"""A disk of real parts that can fail, and lose its power: ext4 on a loop device, on nbdfuse, on nbdkit.

    ext4 -- /dev/loopN -- a file of nbdfuse -- a socket -- nbdkit --filter=error file

A cut of the power is a copy of nbdkit's file while nbdkit is stopped: it has what the kernel has
written until then, and nothing else.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import servers
from lab import die_with_parent, wait_until


class DiskRig:
    """Holds the disk and its file system. A context manager."""

    def __init__(self, folder: Path, size: str = "256M") -> None:
        for program in ("nbdkit", "nbdfuse", "losetup", "mkfs.ext4"):
            servers.requires(program)
        self._folder = folder
        self._size = size
        self._fail = folder / "fail"
        self._stack = ExitStack()
        self._nbdkit: subprocess.Popen[bytes] | None = None
        self.root = folder / "root"
        """Where the file system is mounted."""
        self.device = ""
        self.image = folder / "image"

    def __enter__(self) -> "DiskRig":
        self._folder.mkdir()
        subprocess.run(["truncate", "-s", self._size, str(self.image)], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)
        try:
            self._plug_in()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.heal()
        self._stack.close()

    def _plug_in(self) -> None:
        socket, fuse = self._folder / "disk.sock", self._folder / "fuse"
        fuse.mkdir(exist_ok=True)
        self.root.mkdir(exist_ok=True)
        socket.unlink(missing_ok=True)
        self._nbdkit = self._start(
            "nbdkit", "--foreground", "--unix", socket, "--filter=error", "file", self.image,
            "error=EIO", "error-rate=100%", f"error-file={self._fail}",
        )  # fmt: skip
        wait_until(socket.exists, "nbdkit serves the disk")
        self._start("nbdfuse", fuse / "disk", f"nbd+unix:///?socket={socket}")
        self._stack.callback(_unmount, fuse)
        wait_until((fuse / "disk").exists, "nbdfuse shows the disk")
        self.device = subprocess.run(
            ["losetup", "--find", "--show", str(fuse / "disk")],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        self._stack.callback(subprocess.run, ["losetup", "-d", self.device], check=False)
        subprocess.run(["mount", self.device, str(self.root)], check=True)
        self._stack.callback(_unmount, self.root)

    def _start(self, *command: str | Path) -> "subprocess.Popen[bytes]":
        with (self._folder / f"{command[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                [*map(str, command)], stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        self._stack.callback(_end, process)
        return process

    # -- faults

    def fail(self) -> None:
        """Let every read and write of the disk fail with EIO from now on."""
        self._fail.touch()
        Path("/proc/sys/vm/drop_caches").write_text("3")

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Let every read and write wait inside the block."""
        assert self._nbdkit is not None
        Path("/proc/sys/vm/drop_caches").write_text("3")
        self._nbdkit.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._nbdkit.send_signal(signal.SIGCONT)

    def heal(self) -> None:
        """Undo `fail`."""
        self._fail.unlink(missing_ok=True)

    def cut(self) -> Path:
        """Return a copy of what the disk has at this moment. The disk goes on afterwards."""
        assert self._nbdkit is not None
        copy = self._folder / "cut"
        self._nbdkit.send_signal(signal.SIGSTOP)
        try:
            # The kernel stops a process at its next return to user mode.
            wait_until(lambda: _is_stopped(self._nbdkit), "nbdkit is stopped")
            shutil.copyfile(self.image, copy)
        finally:
            self._nbdkit.send_signal(signal.SIGCONT)
        return copy

    def boot(self, copy: Path) -> None:
        """Take the disk out, and put in what `cut` returned, as after a loss of power."""
        self._stack.close()
        copy.rename(self.image)
        self._plug_in()

    def again(self) -> None:
        """Mount the file system again, which repairs what a failure has left."""
        self.heal()
        _unmount(self.root)
        subprocess.run(["e2fsck", "-p", self.device], check=False, capture_output=True)
        subprocess.run(["mount", self.device, str(self.root)], check=True)


def _is_stopped(process: "subprocess.Popen[bytes] | None") -> bool:
    assert process is not None
    tasks = Path(f"/proc/{process.pid}/task")
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
    return all(state in "TtD" for state in states)


def _unmount(folder: Path) -> None:
    for _ in range(50):
        if not os.path.ismount(folder):
            return
        if (
            subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode
            == 0
        ):
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(folder)], check=False)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
        return
    process.kill()
    process.wait()
