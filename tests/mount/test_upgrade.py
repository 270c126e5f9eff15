"""An upgrade to another installed version, and back when that does not work."""

import os
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import KiB, Lab, MiB

import lazyfs

Install = Callable[[str, str], Path]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Install another version of the package, and return its interpreter.

    It has a virtual environment of its own, with a copy of the package, and a line more in
    `lazyfs/daemon.py`.
    """

    def installed(version: str, line: str = "") -> Path:
        folder = tmp_path / version
        package = folder / "lazyfs"
        shutil.copytree(
            Path(lazyfs.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
        )
        init = package / "__init__.py"
        init.write_text(init.read_text().replace(lazyfs.__version__, version))
        daemon = package / "daemon.py"
        daemon.write_text(f"{daemon.read_text()}\n{line}\n")
        environment = folder / "venv"
        command = ["/usr/bin/python3", "-m", "venv", "--without-pip", "--system-site-packages"]
        subprocess.run([*command, environment], check=True)
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "lazyfs.pth").write_text(f"{folder}\n{sysconfig.get_path('purelib')}\n")
        return environment / "bin" / "python"

    return installed


def upgrade(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "lazyfs", "upgrade", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_open_files_go_on_with_another_version(lab: Lab, install: Install) -> None:
    content = lab.image("disk", 8 * MiB).read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    keeper, daemon = lab.status()["pid"], lab.daemon_pid
    ending, reads = threading.Event(), 0
    wrong: list[object] = []
    with (lab.mnt / "disk").open("rb", buffering=0) as file:

        def read() -> None:
            nonlocal reads
            while not ending.is_set():
                offset = reads * 7919 * 4096 % (8 * MiB)
                try:
                    if os.pread(file.fileno(), 4096, offset) != content[offset : offset + 4096]:
                        wrong.append(offset)
                except OSError as error:
                    wrong.append(error)
                reads += 1

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for version in ("9.9.8", "9.9.9"):
                before = lab.status()["version"]
                done = upgrade(install(version, ""), lab.mnt)
                assert done.stdout == f"{lab.mnt}: version {before} -> {version}\n", done.stderr
                assert done.returncode == 0
        finally:
            ending.set()
            reader.join()
        assert wrong == []
        assert reads > 100
        status = lab.status()
        assert (status["version"], status["pid"], status["restarts"]) == ("9.9.9", keeper, 2)
        assert lab.daemon_pid != daemon
        assert lab.image_status("disk")["open_count"] == 1
    lab.umount()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("raise RuntimeError", "exit code 1"),
        ("import time; time.sleep(1000)", "did not answer in 10 s"),
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
    ],
    ids=["fails", "hangs", "crashes"],
)
def test_a_version_that_does_not_start(lab: Lab, install: Install, line: str, why: str) -> None:
    content = lab.image("disk", 4 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-populate")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        done = upgrade(install("9.9.9", line), lab.mnt)
        assert done.returncode == 1
        assert why in done.stderr
        assert f"by version {lazyfs.__version__} as before" in done.stderr
        assert done.stderr.count("\n") == 1
        assert os.pread(file.fileno(), 64 * KiB, MiB) == content[MiB : MiB + 64 * KiB]
    status = lab.status()
    assert status["version"] == lazyfs.__version__
    assert why in status["upgrade_trouble"]


def test_what_upgrade_is_asked_for(lab: Lab) -> None:
    lab.image("disk", MiB)
    lab.mount(lab.serve().uri)
    assert lab.lazyfs("upgrade", check=False).returncode == 2
    assert lab.lazyfs("upgrade", lab.mnt, "--all", check=False).returncode == 2
    assert "no lazyfs is mounted" in lab.lazyfs("upgrade", lab.folder, check=False).stderr
    assert lab.lazyfs("upgrade", lab.mnt).stdout.count(lazyfs.__version__) == 2
