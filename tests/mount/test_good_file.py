"""An image is a file that other programs handle as they handle any file."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import Lab, MiB, pread, wait_until

QCOW2 = ("--format", "qcow2")


@pytest.mark.parametrize("state", ["remote", "partial", "whole"])
@pytest.mark.parametrize("options", [(), QCOW2])
def test_a_sparse_archive_of_an_image_has_its_bytes(
    lab: Lab, state: str, options: tuple[str, ...]
) -> None:
    """GNU tar takes a file without blocks for zeroes, and reads nothing of it."""
    lab.image("disk", 8 * MiB)
    lab.mount(lab.serve().uri, "--no-populate", *options)
    (name,) = os.listdir(lab.mnt)
    if state == "partial":
        pread(lab.mnt / name, 0, 4096)
    elif state == "whole":
        lab.lazyfs("prefetch", lab.mnt / name, "--wait")
    assert (lab.mnt / name).stat().st_blocks > 0
    archive = lab.folder / "archive.tar"
    subprocess.run(["tar", "-C", lab.mnt, "-cSf", archive, name], check=True)
    subprocess.run(["tar", "-C", lab.folder, "-xf", archive], check=True)
    assert (lab.folder / name).read_bytes() == (lab.mnt / name).read_bytes()


def test_an_image_that_is_known_to_be_zeroes_takes_no_blocks(lab: Lab) -> None:
    lab.image("zeroes", 8 * MiB, {})
    lab.image("empty", 0, {})
    lab.mount(lab.serve().uri)
    assert (lab.mnt / "empty").stat().st_blocks == 0
    assert (lab.mnt / "zeroes").stat().st_blocks == 1
    lab.lazyfs("prefetch", lab.mnt / "zeroes", "--wait")
    wait_until(lambda: (lab.mnt / "zeroes").stat().st_blocks == 0, "it takes none")


def test_copies_carry_nothing_of_lazyfs_along(lab: Lab) -> None:
    lab.image("disk", MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    copy = lab.folder / "copy"
    subprocess.run(["cp", "--preserve=all", lab.mnt / "disk", copy], check=True)
    assert os.listxattr(copy) == []
    assert os.listxattr(lab.mnt / "disk") == []
    state = ["getfattr", "--only-values", "-n", "user.lazyfs.state", str(lab.mnt / "disk")]
    assert subprocess.run(state, capture_output=True, check=True).stdout in (b"partial", b"whole")


def test_with_allow_evict_the_time_of_a_file_is_its_last_use(lab: Lab) -> None:
    lab.image("disk", MiB)
    lab.mount(lab.serve().uri, "--no-populate", "--allow-evict")
    disk = lab.mnt / "disk"
    before = disk.stat()
    time.sleep(0.02)
    for use in (lambda: os.utime(disk), lambda: pread(disk, 0, 1)):
        used_at = time.time_ns() - 10**8  # the kernel's clock for files ticks slower
        use()
        wait_until(lambda: disk.stat().st_mtime_ns >= used_at, "the use is shown")  # noqa: B023 - it is awaited here
    after = disk.stat()
    assert after.st_ctime_ns == before.st_ctime_ns
    os.utime(disk, ns=(5, 5))
    assert disk.stat().st_mtime_ns == before.st_ctime_ns, "never used means since it is known"


def test_write_bits_are_shown_and_writes_fail(lab: Lab) -> None:
    lab.image("disk", MiB)
    lab.mount(lab.serve().uri, "--mode", "0644")
    assert (lab.mnt / "disk").stat().st_mode & 0o777 == 0o644
    with pytest.raises(OSError, match="Read-only"):
        (lab.mnt / "disk").open("r+b")
    copy = lab.folder / "copy"
    subprocess.run(["cp", "--preserve=mode", lab.mnt / "disk", copy], check=True)
    assert copy.stat().st_mode & 0o777 == 0o644
    lab.lazyfs("prefetch", lab.mnt / "disk", "--wait")
    lab.umount()
    assert (lab.mnt / "disk").stat().st_mode & 0o777 == 0o444, "the plain file stays protected"


def qemu_io(image: Path) -> "subprocess.CompletedProcess[str]":
    command = ["qemu-io", "-f", "raw", "-c", "write -P 7 0 4k", str(image)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_nobody_writes_to_a_plain_file_under_a_reader_of_the_mount(lab: Lab) -> None:
    source = lab.image("disk", MiB)
    plain = lab.folder / "cache" / "disk"
    lab.mount(lab.serve().uri, "--cache-dir", plain.parent)
    lab.lazyfs("prefetch", lab.mnt / "disk", "--wait")
    with (lab.mnt / "disk").open("rb") as reader:
        done = qemu_io(plain)
        assert done.returncode == 1
        assert 'Failed to get "write" lock' in done.stderr
        check = ["qemu-img", "info", str(plain)]
        assert subprocess.run(check, capture_output=True, check=False).returncode == 0
        assert reader.read() == source.read_bytes()


def test_nor_under_one_who_has_opened_it_before_it_was_whole(lab: Lab) -> None:
    source = lab.image("disk", MiB)
    plain = lab.folder / "cache" / "disk"
    lab.mount(lab.serve().uri, "--cache-dir", plain.parent, "--no-populate")
    with (lab.mnt / "disk").open("rb") as reader:
        reader.read(4096)
        lab.lazyfs("prefetch", lab.mnt / "disk", "--wait")
        done = qemu_io(plain)
        assert done.returncode == 1
        assert 'Failed to get "write" lock' in done.stderr
        reader.seek(0)
        assert reader.read() == source.read_bytes()


_OVERLAID = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(len(os.pread(fd, 4096, 0)), flush=True)
sys.stdin.readline()
sys.stdout.buffer.write(os.pread(fd, 1 << 20, 0))
"""


def test_a_file_that_is_open_through_an_overlayfs_reads_on_when_it_becomes_whole(lab: Lab) -> None:
    source = lab.image("disk", MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    work, merged = lab.folder / "work", lab.folder / "merged"
    for folder in (work, merged):
        folder.mkdir()
    try:
        # The upper folder cannot be on every file system.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work], check=True)
        for name in ("u", "w"):
            (work / name).mkdir()
        options = f"lowerdir={lab.mnt},upperdir={work}/u,workdir={work}/w"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
        command = [sys.executable, "-c", _OVERLAID, str(merged / "disk")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            assert reader.stdin is not None
            assert reader.stdout.readline() == b"4096\n"
            lab.lazyfs("prefetch", lab.mnt / "disk", "--wait")
            reader.stdin.write(b"\n")
            reader.stdin.close()
            assert reader.stdout.read() == source.read_bytes()
        # For new opens the overlay must be mounted anew, as SEMANTICS says.
        subprocess.run(["umount", merged], check=True)
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
        assert (merged / "disk").read_bytes() == source.read_bytes()
    finally:
        for folder in (merged, work):
            subprocess.run(["umount", "-l", folder], check=False)


def test_a_lock_does_not_reach_those_who_open_an_image_after_it_became_whole(lab: Lab) -> None:
    """SEMANTICS says so: the kernel has its locks by inode, and a whole image has another one."""
    lab.image("disk", MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    lock = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", lock, str(lab.mnt / "disk")]
    hold = f"{lock}; print('locked', flush=True); sys.stdin.readline()".replace(
        "fcntl.flock(open(sys.argv[1])", "f = open(sys.argv[1]); fcntl.flock(f"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(lab.mnt / "disk")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
        lab.lazyfs("prefetch", lab.mnt / "disk", "--wait")
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
        holder.communicate(b"\n")
