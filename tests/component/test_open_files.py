"""Which processes have a file open, by descriptors and mappings, in this and other processes."""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hanging_fuse import HangingFuse

from lazyfs.host import descriptors, mountinfo, open_files


def device_of(path: Path) -> str:
    """Return the device number as mountinfo shows it."""
    found = path.stat().st_dev
    return f"{os.major(found)}:{os.minor(found)}"


MAPS = "import mmap, sys; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=1); print(flush=True); sys.stdin.read()"


def test_descriptors_and_mappings_are_found(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("open", "mapped", "unused")]
    for path in paths:
        path.write_bytes(b"x" * 4096)
    opened, mapped, unused = (path.stat().st_ino for path in paths)
    command = [sys.executable, "-c", MAPS, str(paths[1])]
    with (
        paths[0].open("rb") as file,
        subprocess.Popen(["sleep", "60"], stdin=file) as sleeper,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as mapper,
    ):
        assert mapper.stdout is not None
        mapper.stdout.readline()
        found = open_files.readers(device_of(tmp_path), {opened, mapped, unused})
        sleeper.kill()
        mapper.kill()
    assert set(found) == {opened, mapped}
    assert open_files.Reader(sleeper.pid, "sleep") in found[opened]
    assert os.getpid() not in [reader.pid for reader in found[opened]], "who asks does not count"
    assert [reader.pid for reader in found[mapped]] == [mapper.pid]
    assert str(open_files.Reader(7, "qemu")) == "qemu (pid 7)"


def test_the_same_number_on_another_file_system_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.touch()
    with path.open("rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as sleeper:
        assert open_files.readers(device_of(tmp_path), {path.stat().st_ino})
        assert open_files.readers("0:99999", {path.stat().st_ino}) == {}
        sleeper.kill()


# -- Linux 5.4 to 5.13, whose fdinfo has no inode


def open_as_before_5_14(path: str, **how: Any) -> io.StringIO:
    with open(path, **how) as file:
        return io.StringIO("".join(line for line in file if not line.startswith("ino:")))


@pytest.fixture
def before_5_14(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "open", open_as_before_5_14, raising=False)


@pytest.mark.usefixtures("before_5_14")
def test_a_kernel_that_shows_no_inodes(tmp_path: Path) -> None:
    assert "ino" not in descriptors._fdinfo(os.getpid(), 0)
    test_descriptors_and_mappings_are_found(tmp_path)
    test_the_same_number_on_another_file_system_does_not_count(tmp_path)


ASK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_open_files import descriptors, open_as_before_5_14, open_files
descriptors.open = open_as_before_5_14
for found in open_files.readers(sys.argv[1], {{int(sys.argv[2])}}).values():
    print(*found)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_a_file_system_that_hangs_is_not_asked(tmp_path: Path) -> None:
    """The process that asks is another one, so that it can be killed if it does hang."""
    hanging = HangingFuse(tmp_path, "fuse.hanging", valid_s=0)
    try:
        (mount,) = [entry for entry in mountinfo.read() if entry.mountpoint == str(tmp_path)]
        fd = os.open(hanging.path, os.O_RDONLY)
        inode = os.fstat(fd).st_ino
        with subprocess.Popen(["sleep", "60"], stdin=fd) as sleeper:
            os.close(fd)
            command = [sys.executable, "-c", ASK, mount.device, str(inode)]
            try:
                with hanging.stopped():
                    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            finally:
                sleeper.kill()
        assert (done.stdout, done.stderr) == (f"sleep (pid {sleeper.pid})\n", "")
    finally:
        hanging.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a loop device")
def test_loop_devices_and_overlays_hold_files_without_a_process(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    (tmp_path / "other").mkdir()
    merged = tmp_path / "other" / "merged"
    merged.mkdir()
    lower = tmp_path / "in side"
    lower.mkdir()
    (lower / "image").write_bytes(bytes(1 << 20))
    assert open_files.holders_without_process(str(lower)) == []
    command = ["losetup", "--find", "--show", "--read-only", str(lower / "image")]
    loop = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        (tmp_path / "second").mkdir()
        layers = f"lowerdir={lower}:{tmp_path}/second"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", merged], check=True)
        try:
            assert open_files.holders_without_process(str(lower)) == [
                f"the loop device {loop} ({lower}/image)",
                f"the overlay file system on {merged}",
            ]
            assert open_files.holders_without_process(str(tmp_path / "other")) == []
        finally:
            subprocess.run(["umount", merged], check=True)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


def test_a_name_that_ends_lines_of_text_breaks_nothing() -> None:
    # On a tmpfs, because the device of a mapping is not always that of the file on an overlayfs.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        check_hostile_mappings(Path(folder))


def check_hostile_mappings(folder: Path) -> None:
    file = folder / "q\rz\x85"
    file.write_bytes(b"x" * 4096)
    other = folder / "other"
    other.write_bytes(b"x" * 4096)
    script = (
        "import ctypes, mmap, os, sys\n"
        "fds = [os.open(name, os.O_RDONLY) for name in sys.argv[1:]]\n"
        "maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in fds]\n"
        "ctypes.CDLL(None).prctl(15, b'\\x1b]0;pwn\\x07')\n"  # PR_SET_NAME
        "print(flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, file, other], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        at = os.stat(other)
        device = f"{os.major(at.st_dev)}:{os.minor(at.st_dev)}"
        found = open_files.readers(device, {at.st_ino})
        process.kill()
    (reader,) = found[at.st_ino]
    assert reader.pid == process.pid
    assert "\x1b" not in str(reader)
    assert "\\x1b]0;pwn" in str(reader)
