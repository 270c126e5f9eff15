"""Whole images are read by the kernel alone, on an inode of their own, and nothing is left
behind."""

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import KiB, Lab, MiB, pread, small_disk, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="passthrough needs CAP_SYS_ADMIN")


def whole_image(lab: Lab, *options: str | Path) -> bytes:
    """Mount, and make the image `disk` whole; its plain file is reachable at
    lab.folder/cache/disk."""
    source = lab.image("disk", 3 * MiB + 512)
    lab.mount(lab.serve().uri, "--cache-dir", lab.folder / "cache", *options)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    return source.read_bytes()


def drop_page_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
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


def test_a_whole_image_is_read_cold_with_the_daemon_stopped(lab: Lab) -> None:
    expected = whole_image(lab)
    assert lab.status()["passthrough"] is True
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    direct = os.open(lab.mnt / "disk", os.O_RDONLY | os.O_DIRECT)
    target = os.open(lab.folder / "copy", os.O_RDWR | os.O_CREAT, 0o600)
    drop_page_cache(lab.folder / "cache/disk")
    with stopped(lab):
        # First: Python asks for the size, and after a read the kernel asks the daemon for the
        # file's attributes.
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == expected
        assert os.pread(fd, len(expected), 0) == expected
        with mmap.mmap(-1, 1 * MiB) as aligned:
            assert os.preadv(direct, [aligned], 1 * MiB) == 1 * MiB
            assert aligned[:] == expected[1 * MiB : 2 * MiB]
        sent = 0
        while sent < len(expected):
            sent += os.sendfile(target, fd, sent, len(expected) - sent)
        assert os.pread(target, len(expected), 0) == expected
    for one in (fd, direct, target):
        os.close(one)


@pytest.mark.parametrize(
    "options",
    [("-i", "io_uring"), ("-i", "native", "-n"), ("-i", "io_uring", "-n"), ("-i", "threads", "-n")],
)
def test_qemu_reads_with_the_daemon_stopped(lab: Lab, options: tuple[str, ...]) -> None:
    expected = whole_image(lab)
    command = ["qemu-io", "-r", "-f", "raw", *options, str(lab.mnt / "disk")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as qemu_io:
        killer = threading.Timer(30, qemu_io.kill)
        killer.start()
        # io_uring asks the file for its readiness; the kernel learns once for a mount that we have
        # no FUSE_POLL.
        assert _dump(qemu_io, 0) == expected[:512]
        drop_page_cache(lab.folder / "cache/disk")
        with stopped(lab):
            for offset in (1 * MiB, 3 * MiB):
                assert _dump(qemu_io, offset) == expected[offset : offset + 512]
        qemu_io.communicate(b"quit\n")
        killer.cancel()


def _dump(qemu_io: "subprocess.Popen[bytes]", offset: int) -> bytes:
    """Let qemu-io read 512 bytes.

    Only one command is sent at a time, because qemu-io polls a pipe that it reads through a buffer.
    """
    assert qemu_io.stdin is not None
    assert qemu_io.stdout is not None
    qemu_io.stdin.write(b"read -v %d 512\n" % offset)
    qemu_io.stdin.flush()
    found = b""
    while len(found) < 512:
        line = qemu_io.stdout.readline().decode()
        assert line, "qemu-io ended"
        address, _, rest = line.removeprefix("qemu-io> ").partition(":  ")
        assert int(address, 16) == offset + len(found), line
        found += bytes.fromhex(rest[: 16 * 3])
    while b"ops/sec" not in qemu_io.stdout.readline():
        assert qemu_io.poll() is None
    return found


def test_an_image_that_becomes_whole_is_a_new_inode_and_old_files_go_on(lab: Lab) -> None:
    source = lab.image("disk", 6 * MiB)
    expected = source.read_bytes()
    server = lab.serve("rate", parameters=("rate=60M", "burstiness=0.05"))
    lab.mount(server.uri)
    path = lab.mnt / "disk"
    old = os.open(path, os.O_RDONLY)
    partial = os.fstat(old)
    assert os.pread(old, 4096, 0) == expected[:4096]
    lab.wait_for_state("disk", "whole")
    wait_until(lambda: path.stat().st_ino != partial.st_ino, "the name leads to the new inode")
    new = os.open(path, os.O_RDONLY)
    assert os.fstat(old).st_ino == partial.st_ino
    assert os.fstat(new).st_ino == path.stat().st_ino == lab.image_status("disk")["inode"]

    def reader(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(40):
            offset = dice.randrange(len(expected))
            length = dice.choice([1, 4 * KiB, 300 * KiB])
            assert (
                os.pread(dice.choice([old, new]), length, offset)
                == expected[offset : offset + length]
            )
            assert pread(path, offset, length) == expected[offset : offset + length]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(reader, range(6)))
    with (
        mmap.mmap(old, 0, prot=mmap.PROT_READ) as before,
        mmap.mmap(new, 0, prot=mmap.PROT_READ) as after,
    ):
        assert before[:] == after[:] == expected
    os.close(new)
    assert os.pread(old, 4096, 1 * MiB) == expected[1 * MiB : 1 * MiB + 4096]
    os.close(old)
    inode = path.stat().st_ino
    lab.umount()
    lab.mount(server.uri)
    assert path.stat().st_ino == inode, "both numbers are persistent"


@contextmanager
def lab_disk(lab: Lab) -> Iterator[Path]:
    """Make a file system that nobody else uses, where any file that is kept open takes space."""
    with small_disk(lab.folder / "small", "64m") as disk:
        try:
            yield disk
        finally:
            lab.close()


def _used(path: Path) -> int:
    room = os.statvfs(path)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def replace_file(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)


def test_ten_thousand_opens_leave_nothing_behind(lab: Lab) -> None:
    """A backing file that the kernel kept would be in no process.

    But it would keep its space when the image is replaced.
    """
    with lab_disk(lab) as disk:
        source = lab.image("disk", 8 * MiB)
        content = source.read_bytes()[4096:8192]
        empty = _used(disk)
        lab.mount(
            lab.serve().uri, "--cache-dir", disk / "c", "--on-change", "replace", "--refresh", "0.2"
        )
        (lab.mnt / "disk").read_bytes()
        lab.wait_for_state("disk", "whole")
        assert lab.daemon is not None
        fds = len(os.listdir(f"/proc/{lab.daemon_pid}/fd"))
        # half of the time another open keeps the backing id alive
        held = os.open(lab.mnt / "disk", os.O_RDONLY)
        for i in range(10_000):
            if i == 5_000:
                os.close(held)
            assert pread(lab.mnt / "disk", 4096, 4096) == content
        wait_until(lambda: lab.image_status("disk")["open_count"] == 0, "all closed")
        # Each refresh has a connection for a moment.
        folder = f"/proc/{lab.daemon_pid}/fd"
        wait_until(
            lambda: len(os.listdir(folder)) <= fds, "the daemon has no more files open than before"
        )
        replace_file(source, os.urandom(4096))
        wait_until(lambda: _used(disk) < empty + 1 * MiB, "the old version's space is free")
        lab.umount()


@pytest.mark.parametrize("option", [(), ("--no-passthrough",)])
def test_a_replaced_image_frees_its_space_with_the_last_close(
    lab: Lab, option: tuple[str, ...]
) -> None:
    with lab_disk(lab) as disk:
        source = lab.image("disk", 8 * MiB)
        old = source.read_bytes()
        empty = _used(disk)
        lab.mount(
            lab.serve().uri,
            "--cache-dir",
            disk / "c",
            "--on-change",
            "replace",
            "--refresh",
            "0.2",
            *option,
        )
        for _ in range(3):
            before_whole = os.open(lab.mnt / "disk", os.O_RDONLY)
            lab.wait_for_state("disk", "whole")
            fd = os.open(lab.mnt / "disk", os.O_RDONLY)
            assert os.pread(fd, 4096, 0) == old[:4096]
            size = len(old)
            old = os.urandom(size + 4096)
            replace_file(source, old)
            wait_until(
                lambda: (lab.mnt / "disk").stat().st_size != size,  # noqa: B023 - it is awaited here
                "the new version has the name",
            )
            assert len(os.pread(fd, 4096, 4096)) == 4096
            assert _used(disk) >= size
            os.close(fd)
            os.close(before_whole)
            wait_until(lambda: _used(disk) < empty + 2 * MiB, "the old version's space is free")
        lab.umount()


def test_closing_does_not_wait_for_the_daemon(lab: Lab) -> None:
    """FUSE_FLUSH would ask it, once for each mount."""
    whole_image(lab)
    program = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); print(flush=True); sys.stdin.read(); os.close(fd)"
    command = [sys.executable, "-c", program, str(lab.mnt / "disk")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        with stopped(lab):
            process.stdin.close()
            assert process.wait(30) == 0


def test_no_passthrough_reads_through_the_daemon(lab: Lab) -> None:
    expected = whole_image(lab, "--no-passthrough")
    status = lab.status()
    assert (status["passthrough"], status["passthrough_trouble"]) == (False, "turned off")
    path = lab.mnt / "disk"
    assert path.read_bytes() == expected
    assert pread(path, 4096, 1 * MiB) == expected[4096 : 4096 + 1 * MiB]
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with ExitStack() as resumed:
        resumed.enter_context(stopped(lab))  # the proof that the other tests prove something
        with subprocess.Popen(["cat"], stdin=fd, stdout=subprocess.PIPE) as cat:
            assert cat.stdout is not None
            wait_until(
                lambda: "request_wait_answer" in Path(f"/proc/{cat.pid}/wchan").read_text(),
                "cat waits",
            )
            resumed.close()
            assert cat.stdout.read() == expected
    os.close(fd)


def test_a_stacked_cache_falls_back_and_says_so(lab: Lab) -> None:
    layers = [lab.folder / name for name in ("lower", "upper", "work", "merged")]
    for layer in layers:
        layer.mkdir()
    lower, upper, work, merged = layers
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "-o", options, "overlay", str(merged)], check=False
    )
    if done.returncode:
        pytest.skip("no overlayfs on this file system")
    try:
        source = lab.image("disk", 1 * MiB)
        lab.mount(lab.serve().uri, "--cache-dir", merged / "cache")
        (lab.mnt / "disk").read_bytes()
        lab.wait_for_state("disk", "whole")
        assert "file system" in lab.status()["passthrough_trouble"]
        assert (lab.mnt / "disk").read_bytes() == source.read_bytes()
        lab.umount()
    finally:
        lab.close()
        subprocess.run(["umount", "-l", str(merged)], check=True)
