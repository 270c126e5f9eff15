"""Mounts that are configured: by a file, through mount(8) and fstab, and as systemd starts them."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import servers
from lab import DEADLINE_S, Lab, MiB, Nbdkit, die_with_parent, wait_until

from lazyfs.cli import arguments

ROOT = Path(__file__).parents[2]
UNIT = Path(arguments.DATA_DIR) / "lazyfs@.service"


def write_config(lab: Lab, *lines: str) -> Path:
    path = lab.folder / "main.toml"
    path.write_text("\n".join([*lines, f'log-file = "{lab.log}"', "io-timeout = 20", ""]))
    return path


def places(lab: Lab, server: Nbdkit) -> tuple[str, str]:
    return f'repository = "{server.uri}"', f'mountpoint = "{lab.mnt}"'


def test_a_file_says_it_all_and_options_win(lab: Lab) -> None:
    source = lab.image("dense", 1 * MiB)
    config = write_config(
        lab,
        *places(lab, lab.serve()),
        "no-populate = true",
        'mode = "0400"',
        "uid = 12",
        "gid = 13",
    )
    lab.lazyfs("mount", "--config", config, "--gid", "14")
    try:
        look = (lab.mnt / "dense").stat()
        assert (look.st_mode & 0o777, look.st_uid, look.st_gid) == (0o400, 12, 14)
        assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
    finally:
        lab.lazyfs("umount", lab.mnt)


def test_what_config_prints_mounts_the_same(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    config = write_config(lab, *places(lab, lab.serve()), "uid = 12")
    saved = lab.folder / "saved.toml"
    saved.write_text(lab.lazyfs("config", config, "--mode", "0440").stdout)
    origins = json.loads(lab.lazyfs("config", saved, "--json").stdout)["keys"]
    assert {origins[key]["origin"] for key in ("uid", "mode", "refresh")} == {"file"}
    lab.lazyfs("mount", "--config", saved)
    try:
        look = (lab.mnt / "dense").stat()
        assert (look.st_mode & 0o777, look.st_uid) == (0o440, 12)
    finally:
        lab.lazyfs("umount", lab.mnt)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("fill-rate = ", 2, "main.toml: line 1: not TOML: Invalid value"),
        ("fil-rate = 1", 2, "main.toml: fil-rate: there is no such key; did you mean fill-rate?"),
        ("fill-rate = 'fast'", 2, "main.toml: fill-rate: 'fast' is not a size"),
        ("uid = 5", 2, "required: REPOSITORY, MOUNTPOINT"),
        (None, 1, "cannot read the configuration"),
    ],
)
def test_a_wrong_file_is_one_line(lab: Lab, text: str | None, code: int, says: str) -> None:
    config = lab.folder / "main.toml"
    if text is not None:
        config.write_text(text)
    for verb in (["mount", "--config"], ["config"]):
        if verb == ["config"] and says.startswith("required"):
            continue  # it shows what there is
        done = lab.lazyfs(*verb, config, check=False)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (code, 1, "")
        assert says in done.stderr
    assert not os.path.ismount(lab.mnt)


# -- mount(8)


@contextmanager
def helper_in_sbin(folder: Path) -> Iterator[str]:
    """Install mount.lazyfs for a type of file system that only this test has, and yield its name.

    mount(8) looks for helpers only in /sbin. The helper is that of fuse.lazyfs; it does not use its
    own name.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can write to /sbin")
    program = folder / "mount.lazyfs"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -P -m lazyfs.cli.mount_helper "$@"\n'
    )
    program.chmod(0o755)
    kind = f"fuse.lazyfs-test-{os.getpid()}"
    link = Path("/sbin") / f"mount.{kind}"
    link.symlink_to(program)
    try:
        yield kind
    finally:
        link.unlink()


def run(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*map(str, words)], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_mount_8_mounts(lab: Lab) -> None:
    servers.requires("mount")
    source = lab.image("dense", 1 * MiB)
    server = lab.serve()
    with helper_in_sbin(lab.folder) as kind:
        done = run(
            "mount", "-t", kind, server.uri, lab.mnt, "-o", f"mode=0400,noatime,log-file={lab.log}"
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pid = lab.status()["pid"]
        assert (lab.mnt / "dense").stat().st_mode & 0o777 == 0o400
        assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
        assert (run("umount", lab.mnt).returncode, os.path.ismount(lab.mnt)) == (0, False)
        wait_until(lambda: ended(pid), "the daemon has ended")
        for options, code, says in (
            ("frobnicate", 1, "not known"),
            ("config=/nonexistent.toml", 32, "cannot read"),
        ):
            done = run("mount", "-t", kind, server.uri, lab.mnt, "-o", options)
            assert (done.returncode, done.stderr.count("\n")) == (code, 1)
            assert says in done.stderr
            assert not os.path.ismount(lab.mnt)


def test_a_line_of_fstab_mounts(lab: Lab) -> None:
    servers.requires("mount")
    source = lab.image("dense", 1 * MiB)
    config = write_config(lab, 'mode = "0400"')
    fstab = lab.folder / "fstab"
    with helper_in_sbin(lab.folder) as kind:
        options = f"config={config},gid=14,_netdev,nofail,x-systemd.device-timeout=9"
        fstab.write_text(f"{lab.serve().uri} {lab.mnt} {kind} {options} 0 0\n")
        done = run("mount", "-T", fstab, lab.mnt)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        look = (lab.mnt / "dense").stat()
        assert (look.st_mode & 0o777, look.st_gid) == (0o400, 14)
        assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
    lab.lazyfs("umount", lab.mnt)


def ended(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"  # nobody may reap orphans in a container


# -- systemd


PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
_libc = ctypes.CDLL(None)


def _confine() -> None:
    """Serve as a preexec_fn that does what MemoryDenyWriteExecute= does.

    Before Linux 6.3 there is no such call, and it fails.
    """
    die_with_parent()
    _libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)


class Manager:
    """Does what systemd does with the unit, as far as that is possible without systemd.

    That is the command, its socket and its privileges.
    """

    def __init__(self, lab: Lab, config: Path, watchdog_s: float) -> None:
        self._lab = lab
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = str(lab.folder / "notify")
        self._socket.bind(address)
        self._socket.settimeout(DEADLINE_S)
        unit = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
        program, *words = unit["ExecStart"].replace("%i", str(config)).split()
        assert program == "lazyfs"
        command = [sys.executable, "-m", "lazyfs", *words]
        if os.geteuid() == 0:
            servers.requires("setpriv")
            allowed = [
                f"+{name.removeprefix('CAP_').lower()}"
                for name in unit["CapabilityBoundingSet"].split()
            ]
            command = [
                "setpriv",
                "--no-new-privs",
                f"--bounding-set=-all,{','.join(allowed)}",
                *command,
            ]
        lab.daemon = subprocess.Popen(
            command,
            env={
                **os.environ,
                "NOTIFY_SOCKET": address,
                "WATCHDOG_USEC": str(int(watchdog_s * 1e6)),
            },
            preexec_fn=_confine,
            text=True,
        )

    def hear(self) -> list[str]:
        while True:
            lines = self._socket.recv(4096).decode().split("\n")
            if not lines[0].startswith("FDSTORE"):  # tests/mount/test_fd_store.py hears these
                return lines

    def hear_until(self, start: str) -> list[str]:
        while True:
            lines = self.hear()
            if any(line.startswith(start) for line in lines):
                return lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def managed(lab: Lab) -> Iterator[tuple[Lab, Manager, Nbdkit]]:
    lab.image("dense", 1 * MiB)
    server = lab.serve()
    manager = Manager(lab, write_config(lab, *places(lab, server), "refresh = 0.1"), watchdog_s=0.5)
    yield lab, manager, server
    manager.close()


def test_the_service_is_ready_when_the_mount_answers_and_lives_as_long_as_it_is_heard(
    managed: tuple[Lab, Manager, Nbdkit],
) -> None:
    lab, manager, server = managed
    assert manager.hear() == ["READY=1", f"STATUS={server.uri} on {lab.mnt}"]
    assert len((lab.mnt / "dense").read_bytes()) == 1 * MiB
    assert manager.hear()[0] == manager.hear()[0] == "WATCHDOG=1"
    server.kill()
    assert f"STATUS={server.uri} on {lab.mnt}: " in manager.hear_until("STATUS=")[-1]
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGTERM)
    assert manager.hear_until("STOPPING") == ["STOPPING=1"]
    assert lab.daemon.wait(DEADLINE_S) == 0, lab.log_text()
    assert not os.path.ismount(lab.mnt)


def test_a_service_that_was_killed_starts_again_on_its_dead_mount(
    managed: tuple[Lab, Manager, Nbdkit],
) -> None:
    lab, manager, server = managed
    manager.hear_until("READY")
    lab.wait_for_state("dense", "remote")
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGABRT)  # what the watchdog does
    lab.daemon.wait(DEADLINE_S)
    assert os.path.ismount(lab.mnt)
    manager.close()
    (lab.folder / "notify").unlink()
    again = Manager(lab, lab.folder / "main.toml", watchdog_s=60)
    try:
        again.hear_until("READY")
        assert len((lab.mnt / "dense").read_bytes()) == 1 * MiB
        assert lab.status()["repository"] == server.uri
        lab.umount()
        assert again.hear_until("STOPPING") == ["STOPPING=1"]
    finally:
        again.close()
