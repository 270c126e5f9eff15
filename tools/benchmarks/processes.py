"""Runs programs for a benchmark. They end with it, however it ends."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0

_PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run(*command: object, **options: Any) -> str:
    """Run a program to its end, and return what it printed.

    Raises:
        RuntimeError: it failed. The message has what it complained about.
    """
    words = [str(word) for word in command]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words, capture_output=True, text=True, check=False, preexec_fn=_die_with_parent, **options
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    return done.stdout


def start(*command: object, **options: Any) -> "subprocess.Popen[bytes]":
    """Start a program in the background. Stop it with `end`."""
    options.setdefault("stdout", subprocess.DEVNULL)
    options.setdefault("stderr", subprocess.DEVNULL)
    return subprocess.Popen([str(word) for word in command], preexec_fn=_die_with_parent, **options)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a program to end, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


@contextmanager
def running(
    *command: object, ready: Callable[[], object], **options: Any
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program in the background during the block, which begins when `ready` is true."""
    process = start(*command, **options)
    try:
        wait_until(ready, f"{command[0]} is ready", process)
        yield process
    finally:
        end(process)


@contextmanager
def kept_running(
    *command: object, ready: Callable[[], object], clear: Callable[[], object] = lambda: None
) -> Iterator[Callable[[], int]]:
    """Run a server until the block ends. If it crashes, start it again.

    nbdkit 1.32 aborts at times when a client disconnects. `clear` is called before each start.
    Yields a function that returns how often it has crashed.
    """
    starts = 0
    ending = threading.Event()
    current: list[subprocess.Popen[bytes]] = []

    def keep() -> None:
        nonlocal starts
        while not ending.is_set():
            starts += 1
            clear()
            current[:] = [start(*command)]
            started.set()
            current[0].wait()

    started = threading.Event()
    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        started.wait(DEADLINE_S)
        wait_until(ready, f"{command[0]} is ready")
        yield lambda: starts - 1
    finally:
        ending.set()
        while keeper.is_alive():  # it may just be starting the next
            end(current[0])
            keeper.join(0.1)


def wait_until(
    condition: Callable[[], object], what: str, process: "subprocess.Popen[bytes] | None" = None
) -> None:
    """Poll every few milliseconds. This is for preparations, never for what is measured."""
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with exit code {process.returncode}")
        if time.monotonic() > limit:
            raise RuntimeError(f"not in {DEADLINE_S:g} s: {what}")
        time.sleep(0.005)


@contextmanager
def fuse(
    command: Sequence[object], mountpoint: Path, shown: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program that mounts, until the block ends.

    It serves once the file `shown` is not empty.
    """
    process = start(*command)
    try:
        wait_until(
            lambda: shown.exists() and shown.stat().st_size > 0, f"{command[0]} serves", process
        )
        yield process
    finally:
        subprocess.run(["umount", str(mountpoint)], stderr=subprocess.DEVNULL, check=False)
        end(process)
        subprocess.run(["umount", "-l", str(mountpoint)], stderr=subprocess.DEVNULL, check=False)


def drop_caches() -> None:
    """Drop what the page cache holds of files on disks. What is on a tmpfs stays."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def rss_mib(pid: int) -> float:
    """Return how much memory a process has, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmRSS")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakeups(pid: int) -> dict[str, int]:
    """Return how often each thread of a process has given up the CPU voluntarily so far."""
    found = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                found[status.parent.name] = int(line.split()[1])
    return found
