"""One QEMU with a guest of `guest_image`: it has its own overlay on a backing file that it is
given.

All nodes of the block graph have names, as a command line needs them for a later pivot:

    vm (qcow2) ---- vm-file (file)          the overlay
     | backing
    base (raw) ---- base-file (file)        the image on the lazyfs mount

The guest is emulated (`-accel tcg`), so it boots in a few seconds anywhere. A /dev/kvm that exists
may not work, and QEMU does not fall back then.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from block_qemu import make_overlay
from guest_image import GuestImage
from lab import die_with_parent

DEADLINE_S = 120.0
"""The deadline for each thing that is waited for. On a modest machine with nothing else to do, a
guest boots and reads in 5 s."""

_FAILURE = re.compile(r"LAZYFS-GUEST-FAIL.*|Kernel panic.*")


@dataclass(frozen=True, slots=True)
class BackingFile:
    """Names a file from which QEMU reads."""

    inode: int
    direct: bool
    """Whether reads go past the page cache."""


class VirtualMachine:
    """Runs a guest. Each wait for it fails at once when the guest fails or ends."""

    def __init__(
        self,
        folder: Path,
        name: str,
        guest: GuestImage,
        backing: Path,
        *,
        arguments: str = "",
        size: str | None = None,
        direct: bool = False,
        iothread: bool = False,
        backing_format: str = "raw",
    ) -> None:
        """Start the guest. Its files go to `folder`.

        Args:
            arguments: for the guest's kernel command line, such as "guest.loop=3".
            size: the size of the overlay; by default that of the backing file.
            direct: whether reads go past the host's page cache, as with `cache=none`.
            backing_format: the format of the backing file.
            iothread: whether the disk has a thread of its own instead of QEMU's main loop.
        """
        self.name = name
        self._own = str(folder / f"{name}.")
        self.overlay = folder / f"{name}.qcow2"
        self.qmp_socket = folder / f"{name}.qmp"
        self._serial = folder / f"{name}.serial"
        self._messages = folder / f"{name}.messages"
        make_overlay(self.overlay, backing, backing_format)
        if size is not None:
            subprocess.run(
                ["qemu-img", "resize", "-q", str(self.overlay), size],
                check=True,
                timeout=DEADLINE_S,
            )
        cmdline = f"{guest.cmdline.read_text().strip()} {arguments}"
        command = [
            "qemu-system-x86_64",
            "-name",
            name,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]
        command += ["-M", "q35", "-accel", "tcg", "-cpu", "qemu64", "-m", "256", "-no-reboot"]
        command += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", cmdline]
        for node in self._nodes(backing, backing_format, direct):
            command += ["-blockdev", json.dumps(node)]
        if iothread:
            command += ["-object", "iothread,id=disk-thread"]
        command += [
            "-device",
            "virtio-blk-pci,drive=vm" + (",iothread=disk-thread" if iothread else ""),
        ]
        command += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        command += ["-qmp", f"unix:{self.qmp_socket},server=on,wait=off"]
        with self._serial.open("wb") as serial, self._messages.open("wb") as messages:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=serial,
                stderr=messages,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )

    def _nodes(self, backing: Path, backing_format: str, direct: bool) -> list[dict[str, object]]:
        cache = {"cache": {"direct": direct}}
        return [
            {
                "driver": "file",
                "node-name": "base-file",
                "filename": str(backing),
                "read-only": True,
                **cache,
            },
            {
                "driver": backing_format,
                "node-name": "base",
                "file": "base-file",
                "read-only": True,
                **cache,
            },
            {"driver": "file", "node-name": "vm-file", "filename": str(self.overlay), **cache},
            {"driver": "qcow2", "node-name": "vm", "file": "vm-file", "backing": "base", **cache},
        ]

    # -- what it says

    def wait_for(self, marker: str) -> str:
        """Wait until the guest has said LAZYFS-GUEST-`marker`, and return the rest of that line."""
        self._wait(lambda text: f"LAZYFS-GUEST-{marker}" in text, f"says {marker}")
        (rest, *_) = re.findall(rf"LAZYFS-GUEST-{marker}(.*)", self._said())
        return str(rest).strip()

    def wait_for_cold_passes(self, count: int = 1) -> None:
        """Wait until the guest has read everything `count` times, in passes that begin after
        now."""
        goal = self.passes() + 1 + count  # the one under way began before
        self._wait(
            lambda text: text.count("LAZYFS-GUEST-PASS") >= goal, f"makes {count} more passes"
        )

    def passes(self) -> int:
        """Return how many times the guest has read everything."""
        return self._said().count("LAZYFS-GUEST-PASS")

    def finish(self) -> None:
        """Let the guest make one more pass, do the rest, and power off.

        Nothing may fail until then.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it was not told to wait for this, and has ended
        self.wait_for_the_end()

    def wait_for_the_end(self) -> None:
        """Wait until the guest has said that all is well and has powered itself off."""
        self.wait_for("OK")
        code = self._process.wait(DEADLINE_S)
        assert code == 0, self._explained(f"exit {code}")
        self._check(self._said())

    def wait_for_failure(self) -> str:
        """Wait until the guest reports a failure, and return it."""
        self._wait(lambda text: _FAILURE.search(text), "complains", may_fail=True)
        (complaint, *_) = _FAILURE.findall(self._said())
        return str(complaint).strip()

    # -- what it is

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def backing(self) -> BackingFile:
        """Return the one file that QEMU has open besides its own.

        It is found from fdinfo (proc(5); inode numbers since Linux 5.14), which asks no file
        system: the file system may be gone already.
        """
        found = []
        for fd in os.listdir(f"/proc/{self._process.pid}/fd"):
            target = os.readlink(f"/proc/{self._process.pid}/fd/{fd}")
            if target.startswith("/") and not target.startswith(("/dev/", self._own)):
                lines = Path(f"/proc/{self._process.pid}/fdinfo/{fd}").read_text().splitlines()
                fields = dict(line.split(":", 1) for line in lines if ":" in line)
                found.append(
                    BackingFile(int(fields["ino"]), bool(int(fields["flags"], 8) & os.O_DIRECT))
                )
        (one,) = found
        return one

    def said_lately(self) -> str:
        """Return the end of what QEMU and the guest printed, for people."""
        return f"{self._messages.read_text(errors='replace')[-2000:]}{self._said()[-3000:]}"

    def close(self) -> None:
        """End QEMU, whatever it is doing."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.qmp_socket.unlink(missing_ok=True)

    # -- within

    def _wait(self, condition: Callable[[str], object], what: str, may_fail: bool = False) -> None:
        end = time.monotonic() + DEADLINE_S
        while True:
            running = self.running  # asked first: then all that it said before it ended is there
            text = self._said()
            if not may_fail:
                self._check(text)
            if condition(text):
                return
            assert running, self._explained(
                f"QEMU ended (exit {self._process.returncode}) before the guest {what}"
            )
            assert time.monotonic() < end, self._explained(
                f"not in {DEADLINE_S:g} s: the guest {what}"
            )
            time.sleep(0.02)

    def _check(self, text: str) -> None:
        failure = _FAILURE.search(text)
        assert failure is None, self._explained(failure[0].strip() if failure else "")

    def _explained(self, what: str) -> str:
        return f"{self.name}: {what}\n{self.said_lately()}"

    def _said(self) -> str:
        return self._serial.read_text(errors="replace")
