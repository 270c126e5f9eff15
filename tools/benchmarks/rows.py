"""Defines the rows, one for each line of the table in doc/BENCHMARKS.md."""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.boot import BOOT_ROWS
from benchmarks.lab import Lab, MiB, Mount, cold_read, latencies, percentile
from benchmarks.measure import LAZYFS, Contenders, Notes, Row, Target
from benchmarks.processes import cpu_seconds, drop_caches, rss_mib, run, wait_until, wakeups

GiB = 1 << 30
KiB = 1 << 10

NBDCOPY, NBDFUSE, QSD, COW = (
    "nbdcopy --flush",
    "nbdfuse",
    "qemu-storage-daemon",
    "nbdkit cow + nbdfuse",
)
PLAIN = "plain file"


# -- population


@contextmanager
def _populate(data_of_four: int, lab: Lab, notes: Notes) -> Iterator[Contenders]:
    size = lab.size(4 * GiB, 512 * MiB)
    lab.image("disk", size, data_of_four)
    with lab.served() as uri:
        yield {
            LAZYFS: partial(_fill, lab, uri, ["disk"]),
            NBDCOPY: partial(_copy, lab, uri, ["disk"]),
            "qemu-img convert": partial(_convert, lab, uri, "raw"),
        }
    lab.forget("disk")


@contextmanager
def _populate_qcow2(lab: Lab, notes: Notes) -> Iterator[Contenders]:
    lab.image("disk", lab.size(2 * GiB, 512 * MiB))
    with lab.served() as uri:
        yield {
            LAZYFS: partial(_fill, lab, uri, ["disk.qcow2"], "--format", "qcow2"),
            NBDCOPY: partial(_copy, lab, uri, ["disk"]),
            "qemu-img convert -O qcow2": partial(_convert, lab, uri, "qcow2"),
        }
    lab.forget("disk")


@contextmanager
def _populate_eight(lab: Lab, notes: Notes) -> Iterator[Contenders]:
    names = [f"disk{number}" for number in range(8)]
    for name in names:
        lab.image(name, lab.size(512 * MiB, 96 * MiB))
    with lab.served() as uri:
        yield {LAZYFS: partial(_fill, lab, uri, names), NBDCOPY: partial(_copy, lab, uri, names)}
    lab.forget(*names)


def _fill(lab: Lab, uri: str, names: list[str], *options: object) -> float:
    with lab.lazyfs(uri, "--no-populate", *options) as mount:
        drop_caches()
        return mount.populate(names)


def _copy(lab: Lab, uri: str, names: list[str]) -> float:
    folder = lab.fresh("copies")
    began = time.perf_counter()
    for name in names:
        run("nbdcopy", "--flush", lab.export(uri, name), folder / name)
    took = time.perf_counter() - began
    shutil.rmtree(folder)
    return took


def _convert(lab: Lab, uri: str, image_format: str) -> float:
    out = lab.fresh("convert") / "disk"
    began = time.perf_counter()
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, lab.export(uri, "disk"), out)
    fd = os.open(out, os.O_RDONLY)  # it flushes by itself only with a cache mode that slows it down
    os.fsync(fd)
    os.close(fd)
    took = time.perf_counter() - began
    shutil.rmtree(out.parent)
    return took


# -- reads


def _fio(path: Path, *, pattern: str, block: str, jobs: int, size: int, seconds: int) -> float:
    """Return reads per second of cold data.

    Each job has a part of the file, and reads nothing twice.
    """
    share = size // jobs
    command = [
        "fio",
        "--name=read",
        f"--filename={path}",
        "--readonly",
        f"--rw={pattern}",
        f"--bs={block}",
    ]
    command += [
        f"--numjobs={jobs}",
        "--thread",
        "--group_reporting",
        f"--size={share}",
        f"--offset_increment={share}",
    ]
    command += [
        f"--runtime={seconds}",
        "--ioengine=psync",
        "--invalidate=0",
        "--output-format=json",
        "--randrepeat=0",
    ]
    found = json.loads(run(*command))
    return float(found["jobs"][0]["read"]["iops"])


@contextmanager
def _whole(pattern: str, block: str, lab: Lab, notes: Notes) -> Iterator[Contenders]:
    size = lab.size(2 * GiB, 512 * MiB)
    lab.image("disk", size)
    seconds = lab.size(5, 2)
    with lab.served() as uri, lab.lazyfs(uri, "--no-populate") as mount:
        mount.populate(["disk"])
        reads = partial(_fio, pattern=pattern, block=block, jobs=1, size=size, seconds=seconds)
        yield {
            LAZYFS: lambda: reads(mount.mnt / "disk"),
            PLAIN: lambda: reads(mount.cache / "disk"),
        }
    lab.forget("disk")


@contextmanager
def _present(jobs: int, lab: Lab, notes: Notes) -> Iterator[Contenders]:
    size = lab.size(GiB, 256 * MiB)
    lab.image("disk", 2 * size)
    reads = partial(
        _fio, pattern="randread", block="4k", jobs=jobs, size=size, seconds=lab.size(5, 2)
    )
    with ExitStack() as stack:
        uri = stack.enter_context(lab.served())
        mount = stack.enter_context(lab.lazyfs(uri, "--no-populate"))
        peers = {
            LAZYFS: mount.mnt / "disk",
            QSD: stack.enter_context(lab.qsd(uri, "disk")),
            COW: stack.enter_context(lab.nbdkit_cow(uri, "disk")),
        }
        for path in peers.values():
            cold_read(path, 0, size)
        plain = lab.fresh("plain") / "disk"
        shutil.copyfile(lab.repository / "disk", plain)
        peers[PLAIN] = plain
        yield {name: partial(reads, path) for name, path in peers.items()}
        notes.lines.append(f"lazyfs has {rss_mib(mount.pid):.0f} MiB in memory")
        plain.unlink()
    lab.forget("disk")


@contextmanager
def _missing_sequential(lab: Lab, notes: Notes) -> Iterator[Contenders]:
    size = lab.size(GiB, 256 * MiB)
    lab.image("disk", size)

    def speed(path: Path) -> float:
        return size / MiB / cold_read(path, 0, size)

    with lab.served() as uri:
        yield {
            LAZYFS: lambda: _on_lazyfs(lab, uri, speed),
            "lazyfs --no-populate": lambda: _on_lazyfs(lab, uri, speed, "--no-populate"),
            NBDFUSE: lambda: _on(lab.nbdfuse(uri, "disk"), speed),
            QSD: lambda: _on(lab.qsd(uri, "disk"), speed),
            COW: lambda: _on(lab.nbdkit_cow(uri, "disk"), speed),
        }
    lab.forget("disk")


def _on(server: AbstractContextManager[Path], work: Callable[[Path], float]) -> float:
    with server as path:
        drop_caches()
        return work(path)


def _on_lazyfs(lab: Lab, uri: str, work: Callable[[Path], float], *options: object) -> float:
    with lab.lazyfs(uri, *options) as mount:
        drop_caches()
        return work(mount.mnt / "disk")


@contextmanager
def _missing_latency(delay_ms: int, lab: Lab, notes: Notes) -> Iterator[Contenders]:
    size = GiB
    lab.image("disk", size)
    count = lab.size(200, 100) if delay_ms < 10 else lab.size(50, 25)

    def median(path: Path) -> float:
        offsets = random.Random(7).sample(range(1, size // MiB), count)
        fd = os.open(path, os.O_RDONLY)  # held: lazyfs drops its connection with the last close
        try:
            latencies(path, [0])  # the connection is there in all of them
            return percentile(latencies(path, [at * MiB for at in offsets]), 50) * 1e6
        finally:
            os.close(fd)

    with lab.far(delay_ms) as uri:
        yield {
            LAZYFS: lambda: _on_lazyfs(lab, uri, median, "--no-populate"),
            NBDFUSE: lambda: _on(lab.nbdfuse(uri, "disk"), median),
            QSD: lambda: _on(lab.qsd(uri, "disk"), median),
        }
    lab.forget("disk")


@contextmanager
def _during_population(lab: Lab, notes: Notes) -> Iterator[Contenders]:
    """Read missing blocks of 4 KiB over a link of 50 MB/s and 1 ms, while population runs.

    Population takes what it can get.
    """
    size, seconds = 2 * GiB, lab.size(8, 4)
    lab.image("disk", size)

    def tail(populates: bool) -> float:
        options = [] if populates else ["--no-populate"]
        with lab.lazyfs(uri, *options) as mount:
            fd = os.open(mount.mnt / "disk", os.O_RDONLY)  # begins population
            try:
                latencies(mount.mnt / "disk", [0])
                return percentile(_sample(mount, size, seconds, notes, populates), 99) * 1000
            finally:
                os.close(fd)

    with lab.far(1, limited=True) as uri:
        yield {LAZYFS: lambda: tail(True), "lazyfs, nothing populated": lambda: tail(False)}
    lab.forget("disk")


def _sample(mount: Mount, size: int, seconds: float, notes: Notes, populates: bool) -> list[float]:
    """Read at random places that are missing, and note what population does meanwhile.

    A read does not count if population has been faster. So it must have raised the bytes that were
    fetched on demand.
    """
    offsets = random.Random(7).sample(range(size // 2 // MiB, size // MiB), 1000)
    found, times, filled = [], [], []
    image = mount.image("disk")
    began = time.monotonic()
    for offset in offsets:
        now = time.monotonic() - began
        if now > seconds:
            break
        before = image["demand_bytes"]
        (latency,) = latencies(mount.mnt / "disk", [offset * MiB])
        image = mount.image("disk")
        filled.append((now, image["present_bytes"] / MiB))
        if image["demand_bytes"] > before:
            found.append(latency)
            times.append((now, latency * 1000))
        time.sleep(0.02)
    if populates:
        notes.series["latency of a missing 4 KiB, ms"] = times
        notes.series["populated, MiB"] = filled
        speed = (filled[-1][1] - filled[0][1]) / (filled[-1][0] - filled[0][0])
        notes.lines.append(f"{len(found)} reads, population at {speed:.0f} MiB/s")
    return found


@contextmanager
def _fetched_bytes(lab: Lab, notes: Notes) -> Iterator[Contenders]:
    """Let four readers each read everything in an order of their own, until the image is whole."""
    size = lab.size(GiB, 256 * MiB)
    source = lab.image("disk", size, 3)
    log = lab.memory / "stats"

    def fetched() -> float:
        with lab.served("stats", parameters=(f"statsfile={log}",)) as uri, lab.lazyfs(uri) as mount:
            readers = [
                threading.Thread(target=_wander, args=(mount.mnt / "disk", size, seed))
                for seed in range(4)
            ]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            mount.wait_whole("disk")
        (line,) = [line for line in log.read_text().splitlines() if line.startswith("read:")]
        return float(_bytes_of(line)) / MiB

    yield {LAZYFS: fetched, "allocated": lambda: source.stat().st_blocks * 512 / MiB}
    lab.forget("disk")


def _wander(path: Path, size: int, seed: int) -> None:
    offsets = list(range(0, size, 256 * KiB))
    random.Random(seed).shuffle(offsets)
    latencies(path, offsets, 256 * KiB)


def _bytes_of(line: str) -> float:
    """Return the bytes of a line such as "read: 1234 ops, 0.012 s, 1.00 GiB, ...".

    nbdkit-stats-filter(1) prints such lines.
    """
    for part in line.split(","):
        words = part.split()
        if len(words) == 2 and words[1] in _UNITS:
            return float(words[0]) * _UNITS[words[1]]
    raise RuntimeError(f"no size in {line!r}")


_UNITS = {"bytes": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB}


# -- many exports, nothing to do


def _ten_thousand(lab: Lab) -> Path:
    """Make a repository of 10,000 empty images. Return its folder."""
    folder = lab.memory / "many"
    folder.mkdir()
    for number in range(10_000):
        with (folder / f"image-{number:05}").open("wb") as file:
            file.truncate(GiB)
    return folder


@contextmanager
def _many(what: str, lab: Lab, notes: Notes) -> Iterator[Contenders]:
    folder = _ten_thousand(lab)

    def second_list() -> float:
        with lab.served(folder=folder) as uri, lab.lazyfs(uri) as mount:
            run("ls", "-l", mount.mnt)
            wait_until(
                lambda: run("stat", "-c", "%s", mount.mnt / "image-09999").strip() == str(GiB),
                "sizes are known",
            )
            began = time.perf_counter()
            run("ls", "-l", mount.mnt)
            took = time.perf_counter() - began
            if what == "list":
                return took
            if what == "memory":
                return rss_mib(mount.pid)
            time.sleep(3)
            before, cpu = wakeups(mount.pid), cpu_seconds(mount.pid)
            time.sleep(10)
            notes.lines.append(f"CPU in 10 s: {cpu_seconds(mount.pid) - cpu:.2f} s")
            return (
                sum(count - before.get(thread, 0) for thread, count in wakeups(mount.pid).items())
                / 10
            )

    yield {LAZYFS: second_list}
    shutil.rmtree(folder)


@contextmanager
def _start_up(lab: Lab, notes: Notes) -> Iterator[Contenders]:
    folder = _ten_thousand(lab)
    caches = lab.fresh("kept")

    def mounted(first: bool) -> float:
        if first:
            shutil.rmtree(caches)
            caches.mkdir()
        with lab.served(folder=folder) as uri:
            began = time.perf_counter()
            with lab.lazyfs(uri, cache=caches):
                return time.perf_counter() - began

    yield {LAZYFS: lambda: mounted(True), "lazyfs, mounted before": lambda: mounted(False)}
    shutil.rmtree(folder)


ROWS = [
    Row("populate-dense", "populate one image", "s", partial(_populate, 4), [Target(NBDCOPY, at_most=0.8)]),
    Row("populate-sparse", "populate one image, three quarters holes", "s", partial(_populate, 1),
        [Target(NBDCOPY, at_most=0.8)]),
    Row("populate-qcow2", "populate one image into a qcow2", "s", _populate_qcow2, [Target(NBDCOPY, at_most=0.8)],
        slow=True),
    Row("populate-eight", "populate eight images at once", "s", _populate_eight, [Target(NBDCOPY, at_most=0.9)]),
    Row("whole-sequential", "whole image, 1 MiB in order", "reads/s", partial(_whole, "read", "1M"),
        [Target(PLAIN, at_least=0.98)]),
    Row("whole-random", "whole image, 4 KiB at random", "reads/s", partial(_whole, "randread", "4k"),
        [Target(PLAIN, at_least=0.98)]),
    Row("present-1", "present part of a partial image, 4 KiB at random, 1 reader", "reads/s", partial(_present, 1),
        [Target(QSD, at_least=1.0)]),
    Row("present-8", "the same, 8 readers", "reads/s", partial(_present, 8), [Target(QSD, at_least=1.0)]),
    Row("missing-sequential", "missing part, 1 MiB in order", "MiB/s", _missing_sequential,
        [Target(NBDFUSE, at_least=1.0), Target(QSD, at_least=1.0)]),
    Row("missing-latency", "missing 4 KiB, first read, median", "us", partial(_missing_latency, 0),
        [Target(NBDFUSE, at_most=1.2)]),
    Row("missing-latency-1ms", "the same, 1 ms away", "us", partial(_missing_latency, 1),
        [Target(NBDFUSE, at_most=1.2)], slow=True),
    Row("missing-latency-20ms", "the same, 20 ms away", "us", partial(_missing_latency, 20),
        [Target(NBDFUSE, at_most=1.2)], slow=True),
    Row("during-population", "missing 4 KiB while population runs, p99, 50 MB/s and 1 ms away", "ms",
        _during_population, [Target("lazyfs, nothing populated", at_most=2.0)]),
    Row("fetched-bytes", "bytes fetched for four readers until whole", "MiB", _fetched_bytes,
        [Target("allocated", at_most=1.0)], rounds=3),
    *BOOT_ROWS,
    Row("list", "ls -l of 10,000 exports, second time", "s", partial(_many, "list"), [Target("", at_most=0.5)],
        rounds=3, slow=True),
    Row("memory", "memory of the daemon with 10,000 exports", "MiB", partial(_many, "memory"),
        [Target("", at_most=150)], rounds=3, slow=True),
    Row("idle", "wake-ups while nothing happens, 10,000 exports", "/s", partial(_many, "idle"), rounds=3, slow=True),
    Row("start-up", "mount of 10,000 exports, first time", "s", _start_up, rounds=3, slow=True),
]  # fmt: skip
