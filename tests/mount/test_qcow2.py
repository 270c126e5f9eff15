"""`--format qcow2`: the mount shows the finished qcow2 from the first open on, whatever is on
disk."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from lab import KiB, Lab, MiB, Nbdkit, pread, wait_until
from servers import requires

from lazyfs.core import qcow2_layout

SPARSE = {
    3 * MiB: os.urandom(300 * KiB),
    40 * MiB + 12 * KiB: os.urandom(4 * KiB),
    63 * MiB: os.urandom(1 * MiB),
}
QCOW2 = ("--format", "qcow2")


@pytest.fixture(autouse=True)
def _qemu() -> None:
    requires("qemu-img")
    requires("qemu-io")


def qemu(*command: str | Path) -> str:
    """Run one of QEMU's programs. It must succeed."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Pattern verification failed" not in done.stdout
    return done.stdout


def check(path: Path) -> dict[str, Any]:
    said = json.loads(qemu("qemu-img", "check", "--output=json", path))
    assert isinstance(said, dict)
    assert said["check-errors"] == 0
    assert not {"leaks", "corruptions"} & set(said)
    return said


def info(path: Path) -> dict[str, Any]:
    said = json.loads(qemu("qemu-img", "info", "--output=json", path))
    assert isinstance(said, dict)
    return said


def export_uri(server: Nbdkit, name: str) -> str:
    return f"nbd+unix:///{quote(name)}?socket={server.socket}"


def compare(server: Nbdkit, name: str, path: Path) -> None:
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", export_uri(server, name), path)


def shown(content: bytes, cluster_size: int = 64 * KiB) -> bytes:
    """Return the finished qcow2 of an export."""
    at = qcow2_layout.layout(len(content), cluster_size)
    return qcow2_layout.finished(at, 0, at.data_offset) + content.ljust(
        at.clusters * cluster_size, b"\0"
    )


def guest_read(disk: Path, offset: int, length: int) -> bytes:
    """Return what a guest reads. `offset` and `length` are multiples of 4 KiB."""
    target = disk.with_name(f"{disk.name}.read")
    # from the start
    place = ("bs=4K", f"skip={offset // (4 * KiB)}", f"count={(offset + length) // (4 * KiB)}")
    qemu("qemu-img", "dd", "-f", "qcow2", "-O", "raw", *place, f"if={disk}", f"of={target}")
    content = target.read_bytes()
    target.unlink()
    assert len(content) == length
    return content


def data_offset(size: int, cluster_size: int = 64 * KiB) -> int:
    return qcow2_layout.layout(size, cluster_size).data_offset


def partial_file(cache: Path) -> Path:
    """Return the one partial file of a cache."""
    (found,) = (cache / ".lazyfs/partial").glob("*.qcow2")
    return found


OWN_BLOCK = 4 * KiB
"""What ext4 counts besides the content of a file that lies in more than four pieces, in bytes."""


def same_space(first: os.stat_result, second: os.stat_result) -> bool:
    return abs(first.st_blocks - second.st_blocks) * 512 <= OWN_BLOCK


def bytes_in(path: Path, start: int) -> int:
    """Return what a file has from `start` on, without its holes."""
    total = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while True:
            try:
                start = os.lseek(fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no more of it
                    raise
                return total
            end = os.lseek(fd, start, os.SEEK_HOLE)
            total, start = total + end - start, end
    finally:
        os.close(fd)


@contextmanager
def stopped(lab: Lab) -> Iterator[None]:
    """Stop the daemon, so that it answers nothing meanwhile."""
    assert lab.daemon is not None
    lab.signal_daemon(signal.SIGSTOP)
    try:
        yield
    finally:
        lab.signal_daemon(signal.SIGCONT)


# -- while it is filled


def test_a_cold_image_is_a_finished_qcow2_to_qemu_before_anything_of_it_is_read(lab: Lab) -> None:
    source = lab.image("disk", 8 * MiB + 512)
    server = lab.serve()
    lab.mount(server.uri, *QCOW2, "--no-populate")
    assert os.listdir(lab.mnt) == ["disk.qcow2"]
    path = lab.mnt / "disk.qcow2"
    said = check(path)
    assert said["allocated-clusters"] == said["total-clusters"] == 129
    told = info(path)
    assert (told["format"], told["virtual-size"], told["cluster-size"]) == (
        "qcow2",
        8 * MiB + 512,
        64 * KiB,
    )
    assert "backing-filename" not in told
    assert path.stat().st_size == len(shown(source.read_bytes()))
    status = lab.image_status("disk")
    assert status["state"] == "partial"
    assert status["fetched_bytes"] < 4 * MiB, (
        "of the data no more than the kernel's readahead behind the tables"
    )
    compare(server, "disk", path)
    lab.wait_for_state("disk", "whole")
    assert path.read_bytes() == shown(source.read_bytes())


def test_qemu_uses_an_image_while_it_is_being_filled(lab: Lab) -> None:
    source = lab.image("disk", 12 * MiB)
    content = source.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, *QCOW2, "--fill-rate", "1M")
    path = lab.mnt / "disk.qcow2"
    overlay = lab.folder / "vm.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", path, overlay)
    assert info(overlay)["virtual-size"] == 12 * MiB
    wait_until(lambda: lab.image_status("disk")["populated_bytes"] > 0, "it is being filled")
    check(path)
    # Write in the overlay, and read what is under it: at 9 MiB, and around what was written.
    assert guest_read(overlay, 9 * MiB, 64 * KiB) == content[9 * MiB : 9 * MiB + 64 * KiB]
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 0xab 5M 4K", overlay)
    expected = bytearray(content[5 * MiB : 5 * MiB + 128 * KiB])
    expected[: 4 * KiB] = b"\xab" * 4 * KiB
    assert guest_read(overlay, 5 * MiB, 128 * KiB) == expected
    assert lab.image_status("disk")["state"] == "partial"
    check(overlay)
    compare(server, "disk", path)  # reads all of it: the fill is overtaken
    lab.wait_for_state("disk", "whole")
    assert guest_read(overlay, 5 * MiB, 128 * KiB) == expected


def test_random_parallel_reads_while_it_is_filled_are_those_of_the_final_file(lab: Lab) -> None:
    source = lab.image("disk", 16 * MiB + 777)
    server = lab.serve("rate", parameters=("rate=300M", "burstiness=0.1"))
    cache = lab.folder / "cache"
    lab.mount(server.uri, *QCOW2, "--cluster-size", "4K", "--cache-dir", cache)
    path = lab.mnt / "disk.qcow2"
    size = path.stat().st_size
    metadata = data_offset(16 * MiB + 777, 4 * KiB)

    def reader(seed: int) -> list[tuple[int, bytes]]:
        dice = random.Random(seed)
        fd = os.open(path, os.O_RDONLY)
        found = []
        try:
            for _ in range(60):
                offset = dice.choice(
                    [dice.randrange(size), dice.randrange(metadata + 64 * KiB), size - 5000]
                )
                found.append(
                    (
                        offset,
                        os.pread(fd, dice.choice([1, 512, 4 * KiB, 70 * KiB, 300 * KiB]), offset),
                    )
                )
        finally:
            os.close(fd)
        return found

    with ThreadPoolExecutor(6) as pool:
        reads = [read for reader_s in pool.map(reader, range(6)) for read in reader_s]
    lab.wait_for_state("disk", "whole")
    final = (cache / "disk.qcow2").read_bytes()
    assert len(final) == size
    for offset, content in reads:
        assert content == final[offset : offset + len(content)], offset
        assert content
    assert final == shown(source.read_bytes(), 4 * KiB)
    assert lab.bytes_fetched(server) == 16 * MiB + 777, "each byte once"


def test_the_file_on_disk_when_whole_is_byte_for_byte_what_the_mount_showed_before(
    lab: Lab,
) -> None:
    source = lab.image(
        "disk", 3 * MiB + 512, {0: os.urandom(1 * MiB), 2 * MiB + 4 * KiB: os.urandom(1 * MiB)}
    )
    cache = lab.folder / "cache"
    server = lab.serve()
    lab.mount(server.uri, *QCOW2, "--cache-dir", cache, "--fill-rate", "100K")
    path = lab.mnt / "disk.qcow2"
    metadata = data_offset(3 * MiB + 512)
    fd = os.open(path, os.O_RDONLY)
    first = os.pread(fd, metadata, 0)
    assert len(first) == metadata
    assert lab.image_status("disk")["state"] == "partial"
    before = first + os.pread(fd, 8 * MiB, metadata)
    lab.wait_for_state("disk", "whole")
    wait_until(lambda: path.stat().st_ino != os.fstat(fd).st_ino, "the name leads to the new inode")
    assert before == shown(source.read_bytes())
    assert (cache / "disk.qcow2").read_bytes() == before
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, len(before), 0) == before, "through the descriptor from before"
    os.close(fd)
    assert path.read_bytes() == before
    attributes = path.stat()
    check(path)
    lab.umount()
    plain = (cache / "disk.qcow2").stat()
    for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns"):
        assert getattr(plain, field) == getattr(attributes, field), field
    assert same_space(plain, attributes)
    assert not list((cache / ".lazyfs/partial").iterdir())
    check(cache / "disk.qcow2")
    compare(server, "disk", cache / "disk.qcow2")


def test_after_umount_it_is_a_plain_file_under_the_mountpoint(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, *QCOW2)
    path = lab.mnt / "disk.qcow2"
    assert path.read_bytes() == shown(source.read_bytes())
    lab.wait_for_state("disk", "whole")
    server.kill()
    lab.umount()
    assert path.read_bytes() == shown(source.read_bytes())
    check(path)


# -- sizes and clusters

SIZES = [0, 1, 512, 777, 64 * KiB - 512, 64 * KiB, 64 * KiB + 512, 5 * MiB + 512]


@pytest.mark.parametrize("cluster_size", [4 * KiB, 64 * KiB, 2 * MiB])
def test_sizes_that_are_no_multiple_of_anything(lab: Lab, cluster_size: int) -> None:
    sources = {f"s{size}": lab.image(f"s{size}", size) for size in SIZES}
    server = lab.serve()
    lab.mount(server.uri, *QCOW2, "--cluster-size", str(cluster_size))
    for name, source in sources.items():
        path = lab.mnt / f"{name}.qcow2"
        check(path)
        told = info(path)
        size = source.stat().st_size
        assert (told["virtual-size"], told["cluster-size"]) == (-(-size // 512) * 512, cluster_size)
        if size:
            compare(server, name, path)
        assert path.read_bytes() == shown(source.read_bytes(), cluster_size)
    wait_until(
        lambda: {image["state"] for image in lab.status()["images"]} == {"whole"}, "all are whole"
    )
    lab.umount()
    for name, source in sources.items():
        assert (lab.mnt / f"{name}.qcow2").read_bytes() == shown(source.read_bytes(), cluster_size)


@pytest.mark.parametrize("cluster_size", [4 * KiB, 256 * KiB])
def test_a_cluster_is_what_is_fetched(lab: Lab, cluster_size: int) -> None:
    source = lab.image("disk", 8 * MiB)
    server = lab.serve()
    lab.mount(server.uri, *QCOW2, "--cluster-size", str(cluster_size), "--no-populate")
    at = data_offset(8 * MiB, cluster_size)
    fd = os.open(lab.mnt / "disk.qcow2", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    assert (
        os.pread(fd, 10, at + 5 * MiB + 100) == source.read_bytes()[5 * MiB + 100 : 5 * MiB + 110]
    )
    os.close(fd)
    assert server.reads() == [(5 * MiB, cluster_size)]


def test_a_size_that_no_file_can_have_spoils_no_listing(lab: Lab) -> None:
    """The size comes from a stranger, and the metadata is needed as well."""
    server = lab.serve_with(
        "eval", "list_exports=echo fine; echo huge", "open=echo $3", f"get_size=[ $2 = fine ] && echo 512 || echo {2**63 - 1}",
        "pread=dd if=/dev/zero bs=$3 count=1 status=none",
    )  # fmt: skip
    lab.mount(server.uri, *QCOW2)
    for _ in range(2):
        assert {path.name: path.stat().st_size for path in lab.mnt.iterdir()} == {
            "fine.qcow2": len(shown(bytes(512))), "huge.qcow2": 2**63 - 1
        }  # fmt: skip
    with pytest.raises(OSError, match="Input/output error"):
        (lab.mnt / "huge.qcow2").open("rb")
    assert lab.image_status("huge")["error"] == "too large for lazyfs"
    check(lab.mnt / "fine.qcow2")


def test_two_tebibytes_sparse(lab: Lab) -> None:
    """With the default of 64 KiB this takes 20 s. component/test_qcow2_files.py tests the file
    itself."""
    cluster_size = 2 * MiB
    size = 2 * 1024 * 1024 * MiB
    data = {
        0: os.urandom(64 * KiB),
        size // 2 + 4 * KiB: os.urandom(8 * KiB),
        size - 4 * KiB: os.urandom(4 * KiB),
    }
    source = lab.image("disk", size, data)
    server = lab.serve()
    cache = lab.folder / "cache"
    lab.mount(
        server.uri,
        *QCOW2,
        "--cluster-size",
        str(cluster_size),
        "--cache-dir",
        cache,
        "--no-populate",
    )
    path = lab.mnt / "disk.qcow2"
    allocated = source.stat().st_blocks * 512
    at = data_offset(size, cluster_size)
    assert info(path)["virtual-size"] == size
    assert check(path)["allocated-clusters"] == size // cluster_size
    for place, content in data.items():
        assert pread(path, at + place, len(content)) == content
    assert pread(path, at + size // 4, 4 * KiB) == bytes(4 * KiB)
    fetched = lab.bytes_fetched(server)
    assert fetched <= allocated
    compared = server.bytes_read() - fetched
    lab.umount()
    lab.mount(server.uri, "--cache-dir", cache)
    lab.wait_for_state("disk", "whole")
    assert lab.bytes_fetched(server) - compared == allocated
    plain = cache / "disk.qcow2"
    assert bytes_in(plain, at) == allocated
    assert plain.stat().st_blocks * 512 <= allocated + at + OWN_BLOCK
    assert same_space(path.stat(), plain.stat())
    check(plain)
    for place, content in data.items():
        assert guest_read(plain, place, len(content)) == content
    assert guest_read(plain, size // 4, 4 * MiB) == bytes(4 * MiB)


# -- space


def test_holes_are_never_fetched_and_take_no_space_and_each_allocated_byte_comes_once(
    lab: Lab,
) -> None:
    source = lab.image("sparse", 64 * MiB, SPARSE)
    allocated = source.stat().st_blocks * 512
    server = lab.serve()
    cache = lab.folder / "cache"
    lab.mount(server.uri, *QCOW2, "--cache-dir", cache)
    path = lab.mnt / "sparse.qcow2"
    assert path.stat().st_blocks == 1
    metadata = data_offset(64 * MiB)
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    assert metadata // 512 <= os.fstat(fd).st_blocks <= (metadata + allocated) // 512
    assert path.read_bytes() == shown(source.read_bytes())
    os.close(fd)
    status = lab.wait_for_state("sparse", "whole")
    assert lab.bytes_fetched(server) == allocated == status["fetched_bytes"]
    assert status["present_bytes"] == allocated
    assert status["zero_bytes"] == 64 * MiB - allocated
    for offset, length in server.reads():
        assert any(start - 4 * KiB < offset and offset + length <= start + len(data) + 4 * KiB
                   for start, data in SPARSE.items()), (offset, length)  # fmt: skip
    plain = cache / "sparse.qcow2"
    assert bytes_in(plain, metadata) == allocated
    assert plain.stat().st_blocks * 512 <= allocated + metadata + OWN_BLOCK
    wait_until(lambda: path.stat().st_blocks * 512 == allocated + metadata, "du says so, too")
    assert path.stat().st_size == plain.stat().st_size == size
    check(plain)
    compare(server, "sparse", plain)


def test_size_and_blocks_are_the_same_before_whole_and_after(lab: Lab) -> None:
    lab.image("disk", 2 * MiB + 512)
    server = lab.serve()
    cache = lab.folder / "cache"
    lab.mount(server.uri, *QCOW2, "--cache-dir", cache, "--no-populate")
    path = lab.mnt / "disk.qcow2"
    metadata = data_offset(2 * MiB + 512)
    size = path.stat().st_size
    pread(path, metadata + 1 * MiB, 64 * KiB)
    wait_until(lambda: path.stat().st_blocks * 512 > metadata, "du has seen it")
    assert path.stat().st_blocks * 512 - metadata == lab.image_status("disk")["present_bytes"]
    partial = partial_file(cache).stat()
    assert path.stat().st_size == partial.st_size == size
    assert same_space(partial, path.stat())
    path.read_bytes()
    lab.wait_for_state("disk", "whole")
    plain = (cache / "disk.qcow2").stat()
    assert path.stat().st_size == plain.st_size == size
    wait_until(lambda: same_space(path.stat(), plain), "du is what the plain file takes")


@pytest.mark.slow
def test_a_full_cache_disk_fails_no_read_and_recovers(tmp_path: Path, lab: Lab) -> None:
    disk = tmp_path / "tiny"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        source = lab.image("disk", 12 * MiB)
        small = lab.image("small", 1 * MiB)
        late = lab.image("late", 1 * MiB)
        later = lab.image("later", 1 * MiB)
        server = lab.serve()
        lab.mount(server.uri, *QCOW2, "--cache-dir", disk / "cache")
        assert (lab.mnt / "small.qcow2").read_bytes() == shown(small.read_bytes())
        lab.wait_for_state("small", "whole")
        compare(server, "disk", lab.mnt / "disk.qcow2")
        assert (lab.mnt / "disk.qcow2").read_bytes() == shown(source.read_bytes())
        status = lab.image_status("disk")
        assert status["state"] == "partial"
        assert "full" in status["error"] or "full" in lab.status()["message"]
        # Not even room for metadata; it is served all the same.
        ballast = disk / "ballast"
        room = os.statvfs(disk)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize))
        held = (lab.mnt / "late.qcow2").open("rb")
        check(lab.mnt / "late.qcow2")
        assert held.read() == shown(late.read_bytes())
        assert os.fstat(held.fileno()).st_blocks == 1, "there is no cache file"
        assert (lab.mnt / "later.qcow2").read_bytes() == shown(later.read_bytes())
        assert (lab.mnt / "later.qcow2").stat().st_blocks == 1
        for name in ("disk", "late", "later"):
            assert "full" in lab.image_status(name)["error"], name
        assert not list((disk / "cache/.lazyfs/partial").glob("*.new"))
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
        assert lab.image_status("later")["error"] == "", "it would be kept now"
        for name in ("disk", "late"):
            lab.wait_for_state(name, "whole")
            check(disk / "cache" / f"{name}.qcow2")
            compare(server, name, disk / "cache" / f"{name}.qcow2")
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(held.fileno(), 2 * MiB, 0) == shown(late.read_bytes())
        held.close()
    finally:
        lab.close()
        subprocess.run(["umount", "-l", str(disk)], check=True)


# -- the handoff


@pytest.mark.skipif(os.geteuid() != 0, reason="passthrough needs CAP_SYS_ADMIN")
def test_a_whole_image_is_read_with_the_daemon_stopped_and_after_detach(lab: Lab) -> None:
    source = lab.image("disk", 3 * MiB + 512)
    expected = shown(source.read_bytes())
    cache = lab.folder / "cache"
    lab.mount(lab.serve().uri, *QCOW2, "--cache-dir", cache)
    path = lab.mnt / "disk.qcow2"
    path.read_bytes()
    lab.wait_for_state("disk", "whole")
    fd = os.open(path, os.O_RDONLY)
    with (cache / "disk.qcow2").open("rb") as plain:
        os.fsync(plain.fileno())
        os.posix_fadvise(plain.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with stopped(lab):
        assert os.pread(fd, len(expected), 0) == expected
    lab.lazyfs("detach", lab.mnt)
    assert not os.path.ismount(lab.mnt)
    assert os.pread(fd, len(expected), 0) == expected
    os.close(fd)
    check(cache / "disk.qcow2")


def test_detach_waits_for_an_overlay_s_image_and_the_plain_file_takes_its_place(lab: Lab) -> None:
    source = lab.image("disk", 6 * MiB)
    server = lab.serve("rate", parameters=("rate=40M", "burstiness=0.05"))
    lab.mount(server.uri, *QCOW2)
    path = lab.mnt / "disk.qcow2"
    overlay = lab.folder / "vm.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", path, overlay)
    with path.open("rb") as held:
        assert "waiting for" in lab.lazyfs("detach", lab.mnt, "--wait").stderr
        assert not os.path.ismount(lab.mnt)
        assert held.read() == path.read_bytes() == shown(source.read_bytes())
        check(path)
        qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, overlay)


# -- ends of the daemon

PROGRAM = """
import os, signal, sys
from lazyfs.cli import main as cli
from lazyfs.cache.store import cache_file, qcow2
{patch}
sys.exit(cli.main())
"""
DIE = "[os.kill(pid, signal.SIGKILL) for pid in (os.getppid(), os.getpid())]"  # as a host does
POINTS = {
    "with the tables finished and the old header": f"""
real = qcow2.write_all
def write_all(fd, data, offset):
    if offset == 0 and data[:4] == b"QFI\\xfb" and data[8:16] == bytes(8):
        {DIE}
    real(fd, data, offset)
qcow2.write_all = write_all
""",
    "with the header finished and no link": f"""
os.link = lambda *a, **k: {DIE}
""",
    "linked and not in the catalog": f"""
qcow2.Qcow2Store.finish = (lambda real: lambda self: (real(self), {DIE}))(qcow2.Qcow2Store.finish)
""",
    "whole in the catalog and not removed": f"""
qcow2.Qcow2Store.remove = lambda self: {DIE}
""",
    "created under another name": f"""
os.rename = lambda *a, **k: {DIE}
""",
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_bad_moment_it_goes_on_with_the_same_file(lab: Lab, point: str) -> None:
    source = lab.image("disk", 4 * MiB, {0: os.urandom(100 * KiB), 3 * MiB: os.urandom(300 * KiB)})
    allocated = source.stat().st_blocks * 512
    server = lab.serve()
    cache = lab.folder / "cache"
    program = ("-c", PROGRAM.format(patch=POINTS[point]))
    lab.mount(server.uri, *QCOW2, "--cache-dir", cache, program=program)
    path = lab.mnt / "disk.qcow2"
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    assert lab.daemon is not None
    assert lab.daemon.wait(30) == -signal.SIGKILL
    lab.daemon = None
    for one in [*cache.glob("*.qcow2"), *(cache / ".lazyfs/partial").glob("*.qcow2")]:
        check(one)
        compare(server, "disk", one)
    lab.mount(server.uri, "--cache-dir", cache)
    assert path.read_bytes() == shown(source.read_bytes())
    status = lab.wait_for_state("disk", "whole")
    assert (cache / "disk.qcow2").read_bytes() == shown(source.read_bytes())
    wait_until(lambda: not list((cache / ".lazyfs/partial").iterdir()), "nothing is left over")
    assert status["fetched_bytes"] == allocated
    assert allocated <= status["present_bytes"] <= allocated + OWN_BLOCK
    assert status["zero_bytes"] == 4 * MiB - status["present_bytes"]
    assert same_space(path.stat(), (cache / "disk.qcow2").stat())


@pytest.mark.slow
def test_kill_9_at_random_moments_never_shows_another_byte(lab: Lab) -> None:
    dice = random.Random(11)
    sources = {
        "dense": lab.image("dense", 12 * MiB),
        "sparse": lab.image(
            "sparse", 100 * MiB, {i * 9 * MiB: os.urandom(200 * KiB) for i in range(11)}
        ),
    }
    expected = {name: shown(path.read_bytes()) for name, path in sources.items()}
    server = lab.serve("rate", parameters=("rate=80M", "burstiness=0.05"))
    cache = lab.folder / "cache"
    resumed = 0
    for _round in range(4):
        lab.mount(server.uri, *QCOW2, "--cache-dir", cache)
        for name, content in expected.items():
            for _ in range(4):
                offset = dice.randrange(len(content))
                found = pread(lab.mnt / f"{name}.qcow2", offset, 100 * KiB)
                assert found == content[offset : offset + 100 * KiB], (name, offset)
        fetched = sum(image["fetched_bytes"] for image in lab.status()["images"])
        if _round % 2:  # die behind a checkpoint now and then
            present = sum(image["present_bytes"] for image in lab.status()["images"])
            lab.umount()
            resumed = max(resumed, present)
        else:
            wait_until(
                lambda: (
                    sum(i["fetched_bytes"] for i in lab.status()["images"]) > fetched  # noqa: B023 - it is awaited here
                    or all(i["state"] == "whole" for i in lab.status()["images"])
                ),
                "it goes on",
            )
            lab.kill_daemon()
        for one in (cache / ".lazyfs/partial").glob("*.qcow2"):
            alone = {
                "driver": "qcow2",
                "backing": None,
                "file": {"driver": "file", "filename": str(one)},
            }
            command = ["qemu-img", "check", f"json:{json.dumps(alone)}"]
            checked = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=False
            )
            assert checked.returncode in (0, 3), checked.stdout + checked.stderr  # at most leaks
    assert resumed > 0
    lab.mount(server.uri, "--cache-dir", cache)
    for name, content in expected.items():
        assert (lab.mnt / f"{name}.qcow2").read_bytes() == content
        lab.wait_for_state(name, "whole")
        assert (cache / f"{name}.qcow2").read_bytes() == content
        check(cache / f"{name}.qcow2")


def test_clean_restart_fetches_nothing_twice_and_shows_the_same_inode(lab: Lab) -> None:
    source = lab.image("disk", 4 * MiB)
    expected = shown(source.read_bytes())
    server = lab.serve()
    lab.mount(server.uri, *QCOW2, "--no-populate")
    path = lab.mnt / "disk.qcow2"
    pread(path, data_offset(4 * MiB) + 1 * MiB, 300 * KiB)
    inode, present = path.stat().st_ino, lab.image_status("disk")["present_bytes"]
    lab.umount()
    lab.mount(server.uri, "--no-populate")
    assert (path.stat().st_ino, lab.image_status("disk")["present_bytes"]) == (inode, present)
    assert path.read_bytes() == expected
    lab.wait_for_state("disk", "whole")
    assert lab.bytes_fetched(server) == 4 * MiB


@pytest.mark.slow
def test_the_partial_file_on_disk_is_a_qcow2_that_qemu_opens_without_lazyfs(lab: Lab) -> None:
    source = lab.image("disk", 8 * MiB + 512)
    server = lab.serve()
    cache = lab.folder / "cache"
    lab.mount(server.uri, *QCOW2, "--cache-dir", cache, "--no-populate")
    pread(lab.mnt / "disk.qcow2", data_offset(8 * MiB + 512) + 2 * MiB, 1 * MiB)
    partial = partial_file(cache)
    told = info(partial)
    assert told["backing-filename"] == export_uri(server, "disk")
    assert (told["virtual-size"], told["backing-filename-format"]) == (8 * MiB + 512, "raw")
    compare(server, "disk", partial)
    present = lab.image_status("disk")["present_bytes"]
    assert 1 * MiB <= present < 8 * MiB

    def allocated(path: Path) -> int:
        """Return how many bytes the qcow2 itself has."""
        found = json.loads(qemu("qemu-img", "map", "--output=json", path))
        return sum(one["length"] for one in found if one["depth"] == 0)

    wait_until(lambda: allocated(partial) == present, "a checkpoint")
    check(partial)
    lab.kill_daemon()
    check(partial)
    compare(server, "disk", partial)
    assert guest_read(partial, 2 * MiB, 2 * MiB) == source.read_bytes()[2 * MiB : 4 * MiB]


def test_qemu_alone_never_reads_a_mixture_of_two_versions_that_lazyfs_has_noticed(lab: Lab) -> None:
    source = lab.image("disk", 4 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    cache = lab.folder / "cache"
    lab.mount(server.uri, *QCOW2, "--cache-dir", cache, "--no-populate", "--refresh", "0.3")
    at = data_offset(4 * MiB)
    path = lab.mnt / "disk.qcow2"
    assert pread(path, at, 64 * KiB) == expected[: 64 * KiB]
    compare(server, "disk", partial_file(cache))
    changed = lab.folder / "changed"
    changed.write_bytes(os.urandom(5 * MiB))
    changed.replace(source)
    lab.wait_for_state("disk", "failed")

    def opened_alone() -> str:
        command = ["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", str(partial_file(cache))]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        ).stderr

    wait_until(
        lambda: "Could not open backing file" in opened_alone(), "it names no export any more"
    )
    assert pread(path, at, 64 * KiB) == expected[: 64 * KiB]
    lab.umount()
    lab.mount(server.uri, "--cache-dir", cache)
    assert pread(path, at, 64 * KiB) == expected[: 64 * KiB]
    assert "Could not open backing file" in opened_alone()


# -- formats side by side


def test_raw_and_qcow2_images_live_in_one_cache(lab: Lab) -> None:
    sources = {name: lab.image(name, 2 * MiB) for name in ("partial", "whole", "remote")}
    server = lab.serve()
    cache = lab.folder / "cache"
    lab.mount(server.uri, "--cache-dir", cache, "--no-populate")
    pread(lab.mnt / "partial", 1 * MiB, 64 * KiB)
    (lab.mnt / "whole").read_bytes()
    lab.wait_for_state("whole", "whole")
    inodes = {name: (lab.mnt / name).stat().st_ino for name in sources}
    lab.umount()

    sources["new"] = lab.image("new", 1 * MiB + 512)
    lab.mount(server.uri, *QCOW2, "--cluster-size", "128K", "--cache-dir", cache, "--no-populate")
    assert sorted(os.listdir(lab.mnt)) == ["new.qcow2", "partial", "remote", "whole"]
    for name, inode in inodes.items():
        assert (lab.mnt / name).stat().st_ino == inode
        assert (lab.mnt / name).read_bytes() == sources[name].read_bytes()
    pread(lab.mnt / "new.qcow2", data_offset(1 * MiB + 512, 128 * KiB), 4 * KiB)
    assert lab.image_status("new")["state"] == "partial"
    wait_until(lambda: lab.image_status("partial")["state"] == "whole", "filled by the read")
    lab.umount()

    sources["newer"] = lab.image("newer", 1 * MiB)
    lab.mount(server.uri, "--cache-dir", cache)  # raw again
    assert sorted(os.listdir(lab.mnt)) == ["new.qcow2", "newer", "partial", "remote", "whole"]
    assert (lab.mnt / "new.qcow2").read_bytes() == shown(sources["new"].read_bytes(), 128 * KiB)
    assert (lab.mnt / "newer").read_bytes() == sources["newer"].read_bytes()
    for name in ("new", "newer"):
        lab.wait_for_state(name, "whole")
    assert info(lab.mnt / "new.qcow2")["cluster-size"] == 128 * KiB
    formats = {image["name"]: image["format"] for image in lab.status()["images"]}
    assert formats == {
        "partial": "raw",
        "whole": "raw",
        "remote": "raw",
        "newer": "raw",
        "new": "qcow2",
    }
    lab.umount()
    for name in ("partial", "whole", "newer"):
        assert (cache / name).read_bytes() == sources[name].read_bytes()
    check(cache / "new.qcow2")


def test_names_of_both_formats_do_not_clash(lab: Lab) -> None:
    raw = lab.image("a.qcow2", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri)
    assert (lab.mnt / "a.qcow2").read_bytes() == raw.read_bytes()
    lab.wait_for_state("a.qcow2", "whole")
    lab.umount()
    qcow2 = lab.image("a", 1 * MiB)
    lab.mount(server.uri, *QCOW2)
    assert sorted(os.listdir(lab.mnt)) == ["%61.qcow2", "a.qcow2"]
    assert (lab.mnt / "a.qcow2").read_bytes() == raw.read_bytes()
    assert (lab.mnt / "%61.qcow2").read_bytes() == shown(qcow2.read_bytes())
    compare(server, "a", lab.mnt / "%61.qcow2")


def test_the_default_export_has_a_name_too(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    server = lab.serve_with("--filter=log", "file", f"{source}", f"logfile={lab.folder}/nbdkit.log")
    lab.mount(server.uri, *QCOW2)
    assert os.listdir(lab.mnt) == ["%00.qcow2"]
    compare(server, "", lab.mnt / "%00.qcow2")
    lab.wait_for_state("", "whole")
    assert (lab.mnt / "%00.qcow2").read_bytes() == shown(source.read_bytes())


def test_a_foreign_file_is_not_touched(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    server = lab.serve()
    cache = lab.folder / "cache"
    cache.mkdir()
    (cache / "disk.qcow2").write_text("mine")
    refused = lab.lazyfs("mount", server.uri, lab.mnt, *QCOW2, "--cache-dir", cache, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "'disk.qcow2', which lazyfs did not put there" in refused.stderr
    (cache / "disk.qcow2").unlink()
    lab.mount(server.uri, *QCOW2, "--cache-dir", cache)
    (cache / "disk.qcow2").write_text("mine")
    path = lab.mnt / "disk.qcow2"
    assert path.read_bytes() == shown(source.read_bytes())
    wait_until(lambda: "in the way" in lab.image_status("disk")["error"], "status says so")
    assert (cache / "disk.qcow2").read_text() == "mine"
    check(path)
    compare(server, "disk", path)


def test_a_plain_file_that_was_removed_or_changed_by_hand(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    expected = shown(source.read_bytes())
    server = lab.serve()
    lab.mount(server.uri, *QCOW2)
    path = lab.mnt / "disk.qcow2"
    path.read_bytes()
    lab.wait_for_state("disk", "whole")
    lab.umount()
    os.truncate(path, 1 * MiB)  # the size of the export, not of the file
    lab.mount(server.uri)
    assert "changed by hand" in lab.wait_for_state("disk", "failed")["error"]
    lab.umount()
    assert path.stat().st_size == 1 * MiB
    path.unlink()
    lab.mount(server.uri)
    assert lab.image_status("disk")["state"] == "remote"
    assert path.read_bytes() == expected
    lab.wait_for_state("disk", "whole")
    lab.umount()
    assert path.read_bytes() == expected


@pytest.mark.parametrize("whole", [True, False])
def test_on_change_replace_takes_the_new_version_as_a_new_inode(lab: Lab, whole: bool) -> None:
    source = lab.image("disk", 1 * MiB)
    old_content = source.read_bytes()
    server = lab.serve()
    cache = lab.folder / "cache"
    options = ("--on-change", "replace", "--refresh", "0.2", *(() if whole else ("--no-populate",)))
    lab.mount(server.uri, *QCOW2, "--cluster-size", "4K", "--cache-dir", cache, *options)
    path = lab.mnt / "disk.qcow2"
    old = os.open(path, os.O_RDONLY)
    metadata = data_offset(1 * MiB, 4 * KiB)
    assert os.pread(old, 64 * KiB, metadata) == old_content[: 64 * KiB]
    if whole:
        lab.wait_for_state("disk", "whole")
    size = path.stat().st_size
    new = os.urandom(2 * MiB + 512)
    fresh = source.with_name("disk.new")
    fresh.write_bytes(new)
    os.replace(fresh, source)
    wait_until(lambda: path.stat().st_size != size, "the new version")
    assert path.read_bytes() == shown(new, 4 * KiB)
    assert os.fstat(old).st_size == size
    os.posix_fadvise(old, 0, 0, os.POSIX_FADV_DONTNEED)
    assert (
        os.pread(old, metadata + 64 * KiB, 0) == shown(old_content, 4 * KiB)[: metadata + 64 * KiB]
    )
    os.close(old)
    lab.wait_for_state("disk", "whole")
    assert (cache / "disk.qcow2").read_bytes() == shown(new, 4 * KiB)
    check(cache / "disk.qcow2")
    wait_until(
        lambda: not list((cache / ".lazyfs/partial").iterdir()),
        "nothing is left of the old version",
    )


# -- the command


@pytest.mark.parametrize("foreground", [(), ("--foreground",)])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "raw", "--cluster-size", "64K"], "--block-size"),
        (["--format", "qcow2", "--block-size", "64K"], "--cluster-size"),
        (["--format", "qcow2", "--cluster-size", "4M"], "2M"),
        (["--format", "qcow2", "--cluster-size", "100K"], "power of two from 4K to 2M"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(
    tmp_path: Path, arguments: list[str], says: str, foreground: tuple[str, ...]
) -> None:
    command = [
        sys.executable,
        "-m",
        "lazyfs",
        "mount",
        "nbd+unix:///?socket=/nonexistent",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, *arguments, *foreground], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_status_of_a_qcow2_image(lab: Lab) -> None:
    lab.image("disk", 2 * MiB)
    lab.mount(lab.serve().uri, *QCOW2, "--no-populate")
    path = lab.mnt / "disk.qcow2"
    pread(path, data_offset(2 * MiB) + 1 * MiB, 64 * KiB)
    (image,) = json.loads(lab.lazyfs("status", path, "--json").stdout)["mounts"][0]["images"]
    assert (image["name"], image["path"], image["format"]) == ("disk", str(path), "qcow2")
    assert (image["size"], image["state"]) == (2 * MiB, "partial")
    assert 64 * KiB <= image["present_bytes"] == image["fetched_bytes"] < 2 * MiB
    assert "disk.qcow2" in lab.lazyfs("status", lab.mnt).stdout
    path.read_bytes()
    assert lab.wait_for_state("disk", "whole")["present_bytes"] == 2 * MiB
