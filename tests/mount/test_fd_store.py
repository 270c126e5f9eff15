"""A keeper that is killed under a service manager, which keeps its descriptors for the next one."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import DEADLINE_S, KiB, Lab, MiB, die_with_parent, kill_both, wait_until

pytestmark = pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9), reason="resend came with Linux 6.9"
)

START = """
import os, sys
import fcntl
fds = [int(number) for number in sys.argv[1].split(",") if number]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in fds]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
os.closerange(3 + len(fds), 4096)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """Plays the service manager: hears messages, keeps descriptors, starts the service."""

    def __init__(self, lab: Lab, uri: str) -> None:
        self.lab = lab
        self.uri = uri
        self.kept: list[tuple[str, int]] = []
        self.ready = 0
        self._address = str(lab.folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._address)
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 4096, 16)
            except OSError:
                return
            lines = dict(line.partition("=")[::2] for line in data.decode().split("\n"))
            if "FDSTORE" in lines:
                self.kept += [(lines["FDNAME"], fd) for fd in fds]
            if "FDSTOREREMOVE" in lines:
                for name, fd in [one for one in self.kept if one[0] == lines["FDNAME"]]:
                    self.kept.remove((name, fd))
                    os.close(fd)
            self.ready += "READY" in lines

    def start(self) -> None:
        before = self.ready
        kept = list(self.kept)
        command = [
            sys.executable, "-c", START, ",".join(str(fd) for _, fd in kept),
            sys.executable, "-m", "lazyfs", "mount", self.uri, str(self.lab.mnt), "--foreground",
            "--no-populate", "--log-file", str(self.lab.log),
        ]  # fmt: skip
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": self._address,
            "LISTEN_FDS": str(len(kept)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in kept),
        }
        self.lab.daemon = subprocess.Popen(
            command,
            pass_fds=[fd for _, fd in kept],
            env=environment,
            preexec_fn=die_with_parent,
            text=True,
        )
        wait_until(lambda: self.ready > before, "the service is ready")

    def kill(self) -> None:
        """Kill all of the service, as a manager does when its main process has died."""
        assert self.lab.daemon is not None
        kill_both(self.lab.daemon)
        self.lab.daemon = None

    def close(self) -> None:
        self._socket.close()
        for _, fd in self.kept:
            os.close(fd)
        self.kept.clear()


@pytest.fixture
def manager(lab: Lab) -> Iterator[Manager]:
    lab.image("disk", 8 * MiB)
    lab.image("whole", MiB)
    made = Manager(lab, lab.serve().uri)
    yield made
    made.close()


def test_no_reader_notices_a_keeper_that_is_killed(manager: Manager, lab: Lab) -> None:
    content = (lab.repository / "disk").read_bytes()
    manager.start()
    (lab.mnt / "whole").read_bytes()
    lab.lazyfs("prefetch", lab.mnt / "whole", "--wait")
    ending, reads = threading.Event(), [0, 0]
    wrong: list[object] = []
    with (
        (lab.mnt / "disk").open("rb", buffering=0) as file,
        (lab.mnt / "whole").open("rb", buffering=0) as whole,
    ):

        def read(number: int) -> None:
            while not ending.is_set():
                offset = reads[number] * (7919 + number) * 4096 % (8 * MiB)
                try:
                    if os.pread(file.fileno(), 4096, offset) != content[offset : offset + 4096]:
                        wrong.append(offset)
                    if reads[number] % 20 == 0:
                        os.stat(lab.mnt / "disk")
                except OSError as error:
                    wrong.append(error)
                reads[number] += 1

        readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(3):
                time.sleep(0.5)
                before = reads[0]
                manager.kill()
                manager.start()
                wait_until(lambda: reads[0] > before, "reads go on")  # noqa: B023
        finally:
            ending.set()
            for reader in readers:
                reader.join(DEADLINE_S)
        assert wrong == []
        assert os.pread(whole.fileno(), MiB, 0) == (lab.repository / "whole").read_bytes()
        assert lab.image_status("disk")["open_count"] == 1
        assert lab.log_text().count("this one goes on") == 3
    wait_until(lambda: lab.image_status("disk")["open_count"] == 0, "it is closed")
    lab.umount()
    wait_until(lambda: not manager.kept, "nothing is left")


def test_what_is_left_of_a_mount_that_is_gone_is_not_used(manager: Manager, lab: Lab) -> None:
    manager.start()
    manager.kill()
    subprocess.run(["umount", "-f", str(lab.mnt)], check=True)
    manager.start()
    assert (lab.mnt / "disk").stat().st_size == 8 * MiB
    assert len({name for name, _ in manager.kept}) == len(manager.kept), "the old ones are gone"


def test_what_was_not_saved_is_not_fetched_again(manager: Manager, lab: Lab) -> None:
    manager.start()
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        os.pread(file.fileno(), MiB, 0)
        present = lab.image_status("disk")["present_bytes"]
        manager.kill()
        manager.start()
        assert lab.image_status("disk")["present_bytes"] >= present
        assert len(os.pread(file.fileno(), 64 * KiB, 0)) == 64 * KiB
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGTERM)
    assert lab.daemon.wait(DEADLINE_S) == 0
    lab.daemon = None


def test_the_lines_of_the_unit() -> None:
    unit = (Path(__file__).parents[2] / "lazyfs/data/lazyfs@.service").read_text()
    assert "FileDescriptorStoreMax=" in unit
