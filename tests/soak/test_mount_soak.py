"""Tests that a minute of everything leaves a mount's memory, descriptors and threads as before.

The same goes for its connections.
"""

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from lab import KiB, Lab, MiB, lab_in, wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(400)]

SECONDS = 60
WARM_UP_S = 15
MORE_MEMORY = 24 * MiB
"""How much more memory the daemon may take than after the warm-up. Its allocator keeps what
bursts have needed."""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    Lab.watchdog_s = SECONDS + WARM_UP_S + 120.0
    try:
        with lab_in(tmp_path) as made:
            yield made
    finally:
        Lab.watchdog_s = 100.0


class Held:
    """Describes what a daemon and its server hold."""

    def __init__(self, lab: Lab, server_pid: int) -> None:
        assert lab.daemon is not None
        self._pid = lab.daemon.pid
        self._server_pid = server_pid

    def descriptors(self) -> Counter[str]:
        """Descriptors by kind, because the number of a socket says nothing."""
        folder = Path(f"/proc/{self._pid}/fd")
        kinds: Counter[str] = Counter()
        for fd in folder.iterdir():
            with suppress(FileNotFoundError):
                kinds[os.readlink(fd).split("[")[0].split("/")[-1].rstrip("0123456789")] += 1
        return kinds

    def memory(self) -> int:
        status = Path(f"/proc/{self._pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * KiB

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self._pid}/task"))

    def connections(self) -> int:
        """The sockets of the server, without the one that listens."""
        links = []
        for fd in Path(f"/proc/{self._server_pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                links.append(os.readlink(fd))
        return sum(link.startswith("socket:") for link in links)


class Users:
    """Threads that use a mount until they are stopped.

    What fails by design is counted. All other failures are raised.
    """

    def __init__(self, lab: Lab, content: dict[str, bytes]) -> None:
        self._lab = lab
        self._content = content
        self._stop = threading.Event()
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        uses: list[Callable[[random.Random], None]] = [self.read, self.read, self.manage, self.list]
        self._threads = [
            threading.Thread(target=self._go_on, args=(use, number))
            for number, use in enumerate(uses)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _go_on(self, use: Callable[[random.Random], None], seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop.is_set():
            try:
                use(chance)
                self.done[use.__name__] += 1
            except OSError as error:  # of an image that is evicted just now, or refused
                self.done[f"{use.__name__}: {error.strerror}"] += 1
            except Exception as error:
                self.wrong.append(repr(error))
                return

    def read(self, chance: random.Random) -> None:
        name = chance.choice(sorted(self._content))
        fd = os.open(self._lab.mnt / name, os.O_RDONLY)
        try:
            for _ in range(chance.randrange(1, 8)):
                start = chance.randrange(len(self._content[name]) - 4 * KiB)
                got = os.pread(fd, 4 * KiB, start)
                assert got == self._content[name][start : start + 4 * KiB], f"{name} at {start}"
        finally:
            os.close(fd)

    def manage(self, chance: random.Random) -> None:
        name = self._lab.mnt / chance.choice(sorted(self._content))
        verb = chance.choice(["evict", "prefetch", "map", "verify", "pin", "unpin", "cancel"])
        self._lab.lazyfs(verb, name, check=False)

    def list(self, chance: random.Random) -> None:
        os.listdir(self._lab.mnt)
        self._lab.lazyfs("status", self._lab.mnt, check=False)
        time.sleep(chance.random() / 10)


def test_a_minute_of_everything(lab: Lab) -> None:
    content = {
        f"disk{number}": lab.image(f"disk{number}", 6 * MiB).read_bytes() for number in range(4)
    }
    trigger = lab.folder / "errors"
    server = lab.serve("error", parameters=(f"error-file={trigger}", "error-rate=5%"))
    lab.mount(server.uri, "--fill-rate", "20M", "--max-cache", "1G")
    assert server.process is not None
    held = Held(lab, server.process.pid)
    _use(lab, content, WARM_UP_S, trigger)
    _settle(lab, held)
    before = held.descriptors(), held.threads(), held.memory()
    users = _use(lab, content, SECONDS, trigger)
    _settle(lab, held)
    descriptors, threads, memory = held.descriptors(), held.threads(), held.memory()
    print(json.dumps(users.done), "memory", before[2], memory, "threads", before[1], threads)
    assert descriptors == before[0]
    assert threads <= before[1] + 2
    assert memory < before[2] + MORE_MEMORY
    assert sum(users.done.values()) > 500
    lab.umount()


def _use(lab: Lab, content: dict[str, bytes], seconds: float, trigger: Path) -> Users:
    """Let users go on for a while; now and then the repository refuses what it is asked for."""
    users = Users(lab, content)
    users.start()
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            trigger.touch()
            time.sleep(2)
            trigger.unlink()
            time.sleep(3)
    finally:
        users.stop()
    assert users.wrong == []
    return users


def _settle(lab: Lab, held: Held) -> None:
    """Until nothing is under way: nothing is cached, and no connection is open."""
    images = [lab.mnt / name for name in os.listdir(lab.mnt)]
    lab.lazyfs("unpin", *images)

    def evicted() -> bool:
        lab.lazyfs("evict", *images, check=False)
        return all(image["state"] == "remote" for image in lab.status()["images"])

    wait_until(evicted, "all is evicted")
    wait_until(lambda: held.connections() <= 1, "no connection is left")
    idle_s = 12  # trio's threads end after ten seconds without work
    time.sleep(idle_s)
