"""Which processes have a file open, by descriptors and mappings, in this and other processes."""

import os
import subprocess
import sys
from pathlib import Path

from lazyfs.host import open_files


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
