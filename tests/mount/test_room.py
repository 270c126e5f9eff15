"""Limits of the cache, on a real and small disk."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from lab import KiB, Lab, MiB, pread, small_disk, wait_until

SIZE = 8 * MiB
OTHER = 512 * KiB
"""What du counts besides images: the catalog with its journal, folders, and the lock."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 48 MiB."""
    with small_disk(tmp_path / "disk", "48m") as made:
        yield made


def du(path: Path) -> int:
    done = subprocess.run(["du", "-s", "-B1", path], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0])  # files come and go meanwhile: not an error


@contextmanager
def watched(cache: Path) -> Iterator[Callable[[], int]]:
    """Measure all the time, and give the largest result."""
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, du(cache))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak
    finally:
        over.set()
        thread.join()


def use(lab: Lab, name: str) -> None:
    """Read an image completely. It is whole then, and closed."""
    assert (lab.mnt / name).read_bytes() == (lab.repository / name).read_bytes()
    lab.wait_for_state(name, "whole")


def states(lab: Lab) -> dict[str, str]:
    return {image["name"]: image["state"] for image in lab.status()["images"]}


def room(lab: Lab) -> dict[str, Any]:
    found = lab.status()["room"]
    assert isinstance(found, dict)
    return found


def images(lab: Lab, names: str) -> None:
    for name in names:
        lab.image(name, SIZE)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_max_cache(lab: Lab, disk: Path, image_format: str) -> None:
    """The limit is never exceeded, not even while images are filled at full speed."""
    images(lab, "abcde")
    server = lab.serve()
    lab.mount(
        server.uri, "--cache-dir", disk / "cache", "--max-cache", "20M", "--format", image_format
    )
    with watched(disk / "cache") as peak:
        for name in "abcde":
            path = lab.mnt / (name if image_format == "raw" else f"{name}.qcow2")
            path.read_bytes()
            lab.wait_for_state(name, "whole")
        assert 16 * MiB <= peak() <= 20 * MiB + OTHER
    assert states(lab) == {"a": "remote", "b": "remote", "c": "remote", "d": "whole", "e": "whole"}
    now = room(lab)
    assert 16 * MiB <= now["used"] <= 17 * MiB
    assert (now["max_cache"], now["min_free"], now["message"], now["total"]) == (
        20 * MiB,
        None,
        "",
        48 * MiB,
    )
    assert "evicted for room: image=a" in lab.log.read_text()
    lab.umount()
    assert {path.name for path in (disk / "cache").iterdir()} - {".lazyfs"} == {
        name if image_format == "raw" else f"{name}.qcow2" for name in "de"
    }


def test_many_at_once(lab: Lab, disk: Path) -> None:
    """Eight images, three times the limit, are read at the same time.

    All reads are right, and the limit is kept.
    """
    images(lab, "abcdefgh")
    server = lab.serve()
    lab.mount(server.uri, "--cache-dir", disk / "cache", "--max-cache", "21M")
    with watched(disk / "cache") as peak:
        for _ in range(2):
            compares = [
                subprocess.Popen(["cmp", lab.repository / name, lab.mnt / name])
                for name in "abcdefgh"
            ]
            assert [compare.wait(60) for compare in compares] == [0] * 8
        assert peak() <= 21 * MiB + OTHER
    wait_until(lambda: not room(lab)["message"], "there is room once all are closed")


def test_opens_and_reads_during_evictions(lab: Lab, disk: Path) -> None:
    """A process that opens an image in the moment of its eviction gets it, and nobody sees an
    error."""
    for name in "abcdef":
        lab.image(name, MiB)
    server = lab.serve()
    lab.mount(server.uri, "--cache-dir", disk / "cache", "--max-cache", "2500K")
    expected = {name: (lab.repository / name).read_bytes() for name in "abcdef"}
    failures: list[str] = []
    end = time.monotonic() + 60

    def read_again_and_again(names: str) -> None:
        while lab.log.read_text().count("evicted for room") < 12 and time.monotonic() < end:
            for name in names:
                try:
                    if (lab.mnt / name).read_bytes() != expected[name]:
                        failures.append(f"{name}: wrong bytes")
                except OSError as error:
                    failures.append(str(error))

    threads = [
        threading.Thread(target=read_again_and_again, args=(names,))
        for names in ("abcdef", "fbdace")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert lab.log.read_text().count("evicted for room") >= 12


def test_nothing_to_evict(lab: Lab, disk: Path) -> None:
    images(lab, "abc")
    server = lab.serve()
    lab.mount(server.uri, "--cache-dir", disk / "cache", "--max-cache", "20M")
    use(lab, "a")
    use(lab, "b")
    held = os.open(lab.mnt / "a", os.O_RDONLY)
    lab.lazyfs("pin", lab.mnt / "b")
    for _ in range(2):
        subprocess.run(["cmp", lab.repository / "c", lab.mnt / "c"], check=True)
        fd = os.open(lab.mnt / "c", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    assert states(lab) == {"a": "whole", "b": "whole", "c": "partial"}
    wait_until(lambda: "no room: the cache takes" in lab.status()["message"], "status says why")
    assert "nothing can be evicted" in room(lab)["message"]
    assert du(disk / "cache") <= 20 * MiB + OTHER
    os.close(held)
    lab.wait_for_state("c", "whole")
    assert states(lab) == {"a": "remote", "b": "whole", "c": "whole"}
    assert lab.status()["message"] == ""
    assert (lab.mnt / "c").read_bytes() == (lab.repository / "c").read_bytes()


def test_min_free(lab: Lab, disk: Path) -> None:
    images(lab, "abc")
    server = lab.serve()
    lab.mount(server.uri, "--cache-dir", disk / "cache", "--min-free", "50%")
    use(lab, "a")
    use(lab, "b")
    assert states(lab)["a"] == "whole"
    use(lab, "c")
    assert states(lab) == {"a": "remote", "b": "whole", "c": "whole"}
    space = os.statvfs(disk)
    assert space.f_bavail * space.f_frsize >= 24 * MiB
    assert room(lab)["min_free"] == 24 * MiB


@pytest.mark.slow
def test_overlays_protect(lab: Lab, disk: Path) -> None:
    images(lab, "abcd")
    vms = lab.folder / "vms"
    vms.mkdir()
    server = lab.serve()
    options: list[str | Path] = [
        "--cache-dir",
        disk / "cache",
        "--max-cache",
        "20M",
        "--overlays",
        vms,
    ]
    lab.mount(server.uri, *options)
    overlay = vms / "vm.qcow2"
    command: list[str | Path] = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        lab.mnt / "a",
        overlay,
    ]
    subprocess.run(command, check=True, timeout=30)
    for name in "abc":
        use(lab, name)
    assert states(lab) == {"a": "whole", "b": "remote", "c": "whole", "d": "remote"}
    # A folder that cannot be read protects everything.
    vms.rename(lab.folder / "away")
    subprocess.run(["cmp", lab.repository / "d", lab.mnt / "d"], check=True)
    wait_until(lambda: f"{vms} cannot be read" in room(lab)["message"], "the message says so")
    assert states(lab) == {"a": "whole", "b": "remote", "c": "whole", "d": "partial"}
    (lab.folder / "away").rename(vms)
    lab.wait_for_state("d", "whole")
    assert states(lab) == {"a": "whole", "b": "remote", "c": "remote", "d": "whole"}
    subprocess.run(
        ["qemu-img", "check", overlay], check=True, timeout=30, stdout=subprocess.DEVNULL
    )


NO_RESERVE = (
    "-c",
    "import sys; from lazyfs.cli import main as cli; from lazyfs.cache.store import cache_file; cache_file.RESERVE = -1 << 40; "
    "sys.exit(cli.main())",
)
"""A daemon that writes until the disk is full, as any daemon does if other programs fill the disk
at the same time."""


@pytest.mark.parametrize("program", [("-m", "lazyfs"), NO_RESERVE], ids=["reserve", "no reserve"])
def test_disk_full_in_the_middle_of_a_write(lab: Lab, disk: Path, program: tuple[str, ...]) -> None:
    """The disk's end is not the end of a block. Nothing is lost, no read fails, and it goes on when
    there is space."""
    source = lab.image("dense", 32 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    (disk / "ballast").write_bytes(b"x" * (25 * MiB - 100 * KiB))
    lab.mount(server.uri, "--cache-dir", disk / "cache", "--block-size", "256K", program=program)
    for _ in range(2):
        subprocess.run(["cmp", source, lab.mnt / "dense"], check=True)
        fd = os.open(lab.mnt / "dense", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    before = lab.image_status("dense")
    assert before["state"] == "partial"
    assert 20 * MiB < before["present_bytes"] < 24 * MiB
    lab.umount()
    server.kill()
    if program == NO_RESERVE:  # not even the catalog has room
        (disk / "ballast").unlink()
    lab.mount(server.uri, "--cache-dir", disk / "cache", "--io-timeout", "1")
    # Checkpoints had their room from the start: all of it is there.
    assert lab.image_status("dense")["present_bytes"] == before["present_bytes"]
    maps = json.loads(lab.lazyfs("map", lab.mnt / "dense", "--json").stdout)
    present = [entry for entry in maps if entry["present"]]
    assert sum(entry["length"] for entry in present) == before["present_bytes"]
    for entry in present:
        start, length = entry["start"], entry["length"]
        assert pread(lab.mnt / "dense", start, length) == expected[start : start + length]
    server.start()
    (disk / "ballast").unlink(missing_ok=True)
    lab.wait_for_state("dense", "whole")
    assert (lab.mnt / "dense").read_bytes() == expected


@pytest.mark.slow
def test_a_digest_is_compared_before_the_hand_off(lab: Lab) -> None:
    lab.image("dense", 4 * MiB)
    digest = subprocess.run(
        ["sha256sum", lab.repository / "dense"], capture_output=True, text=True, check=True
    ).stdout
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "dense", 0, 4 * KiB)
    lab.lazyfs("verify", lab.mnt / "dense", "--digest", f"sha256:{'0' * 64}", check=False)
    lab.lazyfs("prefetch", lab.mnt / "dense")
    status = lab.wait_for_state("dense", "failed")
    assert "do not have the digest sha256:000" in status["error"]
    lab.lazyfs("verify", lab.mnt / "dense", "--digest", f"sha256:{digest.split()[0]}", check=False)
    lab.wait_for_state("dense", "whole")
    assert lab.image_status("dense")["error"] == ""


def test_after_detach_nothing_is_evicted(lab: Lab, disk: Path) -> None:
    """Any process may have opened the plain files before."""
    images(lab, "ab")
    server = lab.serve()
    often = (
        "import sys; from lazyfs.cli import main as cli; from lazyfs.core import looking; "
        "from lazyfs.engine import room; looking.EDGE = 0; looking.LOOK_S = 0.0; "
        "room.WATCH_S = 0.2; sys.exit(cli.main())"
    )
    lab.mount(server.uri, "--cache-dir", disk / "cache", "--min-free", "28M", program=("-c", often))
    use(lab, "a")
    held = os.open(lab.mnt / "a", os.O_RDONLY)
    lab.lazyfs("detach", lab.mnt)
    (disk / "ballast").write_bytes(b"x" * 20 * MiB)
    wait_until(
        lambda: "nothing is evicted after detach" in lab.log.read_text(), "it noticed the disk"
    )
    assert (disk / "cache" / "a").read_bytes() == (lab.repository / "a").read_bytes()
    os.close(held)
    assert lab.daemon is not None
    assert lab.daemon.wait(30) == 0
    lab.daemon = None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--overlays", "mnt/vms"], "would be hidden by the mount"),
        (["--max-cache", "much"], "is not a size"),
        (["--min-free", "100%"], "is not a percentage from 0%"),
        (["--min-free", "x%"], "is not a percentage from 0%"),
        (["--min-free", "-1%"], "expected one argument"),
        (["--min-free", "some"], "is not a size"),
        (["--max-cache"], "expected one argument"),
    ],
)
def test_wrong_limits(lab: Lab, options: list[str], complaint: str) -> None:
    options = [option.replace("mnt", str(lab.mnt)) for option in options]
    refused = lab.lazyfs("mount", "nbd://host", lab.mnt, *options, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert complaint in refused.stderr


# -- a disk without a free byte


def fill(disk: Path) -> Path:
    """Leave no free byte on a disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(64 * KiB))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4 * KiB))
    return filler


def test_a_disk_without_a_free_byte(lab: Lab) -> None:
    """Evict works, the message says full, an existing cache mounts, and filling goes on."""
    for name in ("a", "b", "c"):
        lab.image(name, 20 * MiB)
    server = lab.serve()
    with small_disk(lab.folder / "disk", "96M") as disk:
        cache = disk / "cache"
        lab.mount(server.uri, "--cache-dir", cache, "--metrics", "0", "--no-populate")
        lab.lazyfs("prefetch", lab.mnt / "a", "--wait")
        lab.lazyfs("prefetch", lab.mnt / "b", "--wait")
        filler = fill(disk)
        assert os.statvfs(disk).f_bavail == 0
        assert "full" in lab.status()["message"]
        assert "full" in lab.status()["room"]["message"]
        lab.umount()
        lab.mount(server.uri, "--cache-dir", cache, "--no-populate")
        assert len((lab.mnt / "a").read_bytes()) == 20 * MiB
        lab.lazyfs("prefetch", lab.mnt / "c")  # there is not even room for its map
        lab.lazyfs("evict", lab.mnt / "a")
        assert lab.image_status("a")["state"] == "remote"
        lab.lazyfs("pin", lab.mnt / "b")
        filler.unlink()
        lab.wait_for_state("c", "whole")
        lab.umount()


def test_what_was_read_without_room_is_filled_when_there_is_room(lab: Lab) -> None:
    lab.image("a", 20 * MiB)
    server = lab.serve()
    with small_disk(lab.folder / "disk", "64M") as disk:
        lab.mount(server.uri, "--cache-dir", disk / "cache")
        filler = fill(disk)
        assert len((lab.mnt / "a").read_bytes()) == 20 * MiB
        assert lab.image_status("a")["present_bytes"] == 0
        filler.unlink()
        lab.wait_for_state("a", "whole")  # although nobody has it open
        lab.umount()
