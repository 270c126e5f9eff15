"""Ends the daemon of a mount again and again while readers check every byte, and reports.

A partial raw image, a partial qcow2 and a whole image are read by eight processes, in part with
O_DIRECT, while population runs. Every byte is compared with the repository's file.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

MiB = 1024 * 1024
LENGTHS = (4096, 8192, 65536, 131072)
SLOW_S = 0.05
"""Reads that took longer are reported one by one, to find the stall that each end has caused."""
LONG_S = 2.0
"""A stall that is longer is shown with what the log says of that time."""
LAZYFS = [sys.executable, "-m", "lazyfs"]


@dataclass
class Report:
    """What one reader has seen."""

    reads: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    slow: list[tuple[float, float]] = field(default_factory=list)
    """When each slow read began, and how long it took."""


def read(
    shown: Path, source: Path, direct: bool, seed: int, ending: Event, reports: "Queue[Report]"
) -> None:
    """Read and compare until `ending` is set."""
    dice, report = random.Random(seed), Report()
    fd = os.open(shown, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    truth = os.open(source, os.O_RDONLY)
    size = os.fstat(truth).st_size
    data_offset = os.fstat(fd).st_size - size  # the metadata of a qcow2
    buffer = mmap.mmap(-1, max(LENGTHS))
    while not ending.is_set():
        length = dice.choice(LENGTHS)
        offset = dice.randrange(0, (size - length) // 4096) * 4096
        began = time.monotonic()
        try:
            got = os.preadv(fd, [memoryview(buffer)[:length]], data_offset + offset)
            if report.reads % 50 == 0:
                os.close(os.open(shown, os.O_RDONLY))
                os.stat(shown)
        except OSError as error:
            report.errors.append(f"{shown.name} at {offset}: {error.strerror}")
            continue
        took = time.monotonic() - began
        if took > SLOW_S:
            report.slow.append((began, took))
        report.reads += 1
        report.wrong += buffer[:got] != os.pread(truth, length, offset) or got != length
        if not direct and report.reads % 200 == 0:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    reports.put(report)


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[tuple[Path, Path]]:
    """Give a mount, and the folder of its repository."""
    repository, mountpoint = folder / "repository", folder / "mnt"
    repository.mkdir()
    mountpoint.mkdir()
    for name, size in (("raw", megabytes), ("qcow2", megabytes), ("whole", 64)):
        with (repository / name).open("wb") as file:
            for _ in range(size):
                file.write(os.urandom(MiB))
    socket = folder / "nbd.sock"
    command = ["nbdkit", "-f", "-r", "-U", str(socket), "file", f"dir={repository}"]
    # Started again when it ends: nbdkit 1.32 aborts now and then when a client vanishes.
    server = subprocess.Popen(
        ["sh", "-c", 'while :; do rm -f "$0"; "$@"; done', str(socket), *command],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not socket.exists():
            time.sleep(0.05)
        log = ["--log-file", str(folder / "log"), "--fill-rate", "4M", "--io-timeout", "60"]
        uri = f"nbd+unix:///?socket={socket}"
        subprocess.run([*LAZYFS, "mount", uri, str(mountpoint), *log], check=True)
        try:
            change = ["prefetch", "--format", "qcow2", str(mountpoint / "qcow2")]
            subprocess.run([*LAZYFS, *change], check=True, stdout=subprocess.DEVNULL)
            (mountpoint / "whole").read_bytes()
            while (state := images(mountpoint)["whole"]["state"]) != "whole":
                print("whole is", state, "...", file=sys.stderr)
                time.sleep(1)
            yield mountpoint, repository
        finally:
            if subprocess.run([*LAZYFS, "umount", str(mountpoint)], check=False).returncode:
                subprocess.run(["umount", "-l", str(mountpoint)], check=False)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def status(mountpoint: Path) -> dict[str, object]:
    """Return what `lazyfs status` says of the mount."""
    command = [*LAZYFS, "status", str(mountpoint), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout)["mounts"]
    assert isinstance(found, dict)
    return found


def images(mountpoint: Path) -> dict[str, dict[str, object]]:
    """Return what it says of each image, by the name of its export."""
    listed = status(mountpoint)["images"]
    assert isinstance(listed, list)
    return {image["name"]: image for image in listed}


def daemon_of(keeper: int) -> int:
    """Return the process ID of the daemon, or 0 while there is none."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    return int(children[-1]) if children else 0


def end_daemons(
    keeper: int, kind: str, times: int, dice: random.Random, mountpoint: Path
) -> list[float]:
    """End the daemon so often, at random moments; return when."""
    moments: list[float] = []
    while len(moments) < times:
        time.sleep(dice.uniform(0.3, 3.0) if kind != "hangs" else dice.uniform(2.0, 5.0))
        if kind == "upgrades":
            moments.append(time.monotonic())
            subprocess.run([*LAZYFS, "upgrade", str(mountpoint)], check=True)
            continue
        if not (daemon := daemon_of(keeper)):
            continue
        moments.append(time.monotonic())
        os.kill(daemon, signal.SIGSTOP if kind == "hangs" else signal.SIGKILL)
        while kind == "hangs" and daemon_of(keeper) == daemon:
            time.sleep(0.1)
        print(f"\r{kind}: {len(moments)}", end="", file=sys.stderr, flush=True)
    time.sleep(5.0)
    print(file=sys.stderr)
    return moments


def stalls(moments: list[float], reports: list[Report]) -> list[float]:
    """Return the longest read that each end of a daemon has made wait."""
    slow = [read for report in reports for read in report.slow]
    found = []
    for i, moment in enumerate(moments):
        until = moments[i + 1] if i + 1 < len(moments) else moment + 60.0
        held = [took for began, took in slow if began < until and began + took > moment]
        found.append(max(held, default=0.0))
    return found


def _around(log: str, at: time.struct_time, seconds: float) -> list[str]:
    """Return the lines of the log from a moment on, for so long."""
    first = time.strftime("%Y-%m-%d %H:%M:%S", at)
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.mktime(at) + seconds + 1))
    return [line for line in log.splitlines() if first <= line[:19] <= last]


def main() -> int:
    """Run one soak, and print what came out."""
    parser = argparse.ArgumentParser(prog="tools/soak", description=__doc__)
    parser.add_argument("kind", choices=("kills", "hangs", "upgrades"))
    parser.add_argument("--times", type=int, default=50, help="how often (default: 50)")
    parser.add_argument("--size", type=int, default=512, help="MiB of each partial image")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all dice")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="lazyfs-soak-") as made:
        with mounted(Path(made), options.size) as (mountpoint, repository):
            keeper = status(mountpoint)["pid"]
            assert isinstance(keeper, int)
            ending = multiprocessing.Event()
            queue: Queue[Report] = multiprocessing.Queue()
            names = [("raw", "raw"), ("qcow2.qcow2", "qcow2"), ("whole", "whole")]
            readers = [
                multiprocessing.Process(
                    target=read,
                    args=(
                        mountpoint / shown,
                        repository / name,
                        i % 2 == 0,
                        dice.randrange(2**32),
                        ending,
                        queue,
                    ),
                )
                for i, (shown, name) in enumerate((names * 3)[:8])
            ]
            for reader in readers:
                reader.start()
            try:
                moments = end_daemons(keeper, options.kind, options.times, dice, mountpoint)
            finally:
                ending.set()
                reports = [queue.get(timeout=90) for _ in readers]
                for reader in readers:
                    reader.join()
            restarts = status(mountpoint)["restarts"]
            found = images(mountpoint)
        log = (Path(made) / "log").read_text()
    held = stalls(moments, reports)
    errors = [error for report in reports for error in report.errors]
    print(
        f"{options.kind} {len(moments)}, daemons replaced {restarts}; "
        f"reads {sum(report.reads for report in reports):,}, "
        f"wrong {sum(report.wrong for report in reports)}, errors {len(errors)}; "
        f"stall: longest {max(held):.2f} s, median {statistics.median(held):.2f} s; "
        + ", ".join(f"{name} {image['state']}" for name, image in found.items())
    )
    for error in errors[:10]:
        print(error)
    for moment, stall in zip(moments, held, strict=True):
        if stall > LONG_S:
            at = time.localtime(time.time() - time.monotonic() + moment)
            print(f"a stall of {stall:.1f} s after {time.strftime('%H:%M:%S', at)}; the log then:")
            print("\n".join(_around(log, at, stall)))
    print("\n".join(line for line in log.splitlines() if "bug" in line or line.startswith("  |")))
    return 1 if errors or any(report.wrong for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
