"""`lazyfs detach`: unmounted under its users, who notice nothing."""

import mmap
import os
import signal
import subprocess
from pathlib import Path

import pytest
from lab import DEADLINE_S, Lab, MiB, pread, wait_until

from lazyfs import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the readers of others are seen by root")


def slow_image(lab: Lab) -> bytes:
    """Mount a repository that takes a few seconds for the image `disk`."""
    source = lab.image("disk", 8 * MiB)
    server = lab.serve("rate", parameters=("rate=40M", "burstiness=0.05"))
    lab.mount(server.uri)
    return source.read_bytes()


def daemon_ends(lab: Lab) -> int:
    assert lab.daemon is not None
    code = lab.daemon.wait(DEADLINE_S)
    lab.daemon = None
    return code


def test_refused_while_an_open_image_is_not_whole_naming_its_readers(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.image("mapped", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    fd = os.open(lab.mnt / "mapped", os.O_RDONLY)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        os.close(fd)
        assert mapped[0] is not None
        with (lab.mnt / "disk").open("rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as sleeper:
            refused = lab.lazyfs("detach", lab.mnt, check=False)
            sleeper.kill()
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert f"{lab.mnt}/disk is not whole and open in " in refused.stderr
        assert f"sleep (pid {sleeper.pid})" in refused.stderr
        assert f"{lab.mnt}/mapped is not whole and open in " in refused.stderr
        assert refused.stderr.count(f"(pid {os.getpid()})") == 2
    assert os.path.ismount(lab.mnt)
    assert lab.image_status("disk")["state"] == "partial"


def test_wait_detaches_when_all_that_is_open_is_whole(lab: Lab) -> None:
    expected = slow_image(lab)
    path = lab.mnt / "disk"
    fd = os.open(path, os.O_RDONLY)
    inode = os.fstat(fd)
    done = lab.lazyfs("detach", lab.mnt, "--wait")
    assert f"waiting for {path} to become whole" in done.stderr
    assert "1 open file(s) are served by pid" in done.stdout
    assert not os.path.ismount(lab.mnt)
    assert path.read_bytes() == expected
    assert path.stat().st_dev != inode.st_dev, "a plain file now"
    assert os.pread(fd, len(expected), 0) == expected
    assert os.fstat(fd).st_ino == inode.st_ino

    status = lab.lazyfs("status").stdout
    assert lab.daemon is not None
    assert f"detached, pid {lab.daemon.pid}" in status
    assert lab.daemon.poll() is None
    socket = Path(mounts.detached_socket_path(lab.daemon.pid))
    assert socket.exists()
    os.close(fd)
    assert daemon_ends(lab) == 0
    assert not socket.exists()
    assert f"{lab.mnt}  from" not in lab.lazyfs("status").stdout


def test_nothing_open_ends_the_daemon_at_once(lab: Lab) -> None:
    expected = slow_image(lab)
    assert pread(lab.mnt / "disk", 0, 1 * MiB) == expected[: 1 * MiB]
    lab.lazyfs("detach", lab.mnt)  # partial, but nobody has it open
    assert lab.daemon is not None
    assert lab.daemon.poll() is not None or daemon_ends(lab) == 0
    lab.daemon = None
    assert not os.path.ismount(lab.mnt)
    assert os.listdir(lab.mnt) == [".lazyfs"]
    again = lab.lazyfs("detach", lab.mnt, check=False)
    assert (again.returncode, again.stderr) == (1, f"lazyfs: no lazyfs is mounted on {lab.mnt}\n")


def test_a_new_mount_waits_for_the_last_close_or_takes_another_cache(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri)
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    lab.lazyfs("detach", lab.mnt, "--wait")
    first = lab.daemon
    assert first is not None
    refused = lab.lazyfs("mount", server.uri, lab.mnt, check=False)
    assert refused.returncode == 1
    assert (
        f"in use by the lazyfs detached from {lab.mnt} (pid {first.pid}), which serves the files still open"
        in refused.stderr
    )

    lab.daemon = None
    lab.mount(server.uri, "--cache-dir", lab.folder / "cache")
    assert (lab.mnt / "disk").read_bytes() == source.read_bytes()
    first.send_signal(signal.SIGTERM)  # must not unmount what is mounted there now
    assert first.wait(DEADLINE_S) == 0
    assert os.path.ismount(lab.mnt)
    assert lab.status()["detached"] is False, "the new daemon's socket is still there"
    with pytest.raises(OSError, match="not connected"):  # opened while partial, so it was the daemon's
        os.pread(fd, 1 * MiB, 0)
    os.close(fd)
    lab.umount()
    lab.mount(server.uri)
    assert (lab.mnt / "disk").read_bytes() == source.read_bytes()


def test_a_file_opened_when_whole_outlives_even_a_killed_daemon(lab: Lab) -> None:
    source = lab.image("disk", 2 * MiB)
    server = lab.serve()
    lab.mount(server.uri)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    lab.lazyfs("detach", lab.mnt)
    lab.kill_daemon()
    assert os.pread(fd, 2 * MiB, 0) == source.read_bytes()
    with mmap.mmap(fd, 2 * MiB, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == source.read_bytes()
    os.close(fd)
    lab.mount(server.uri)
    assert (lab.mnt / "disk").read_bytes() == source.read_bytes()


def test_without_passthrough_the_daemon_serves_what_is_open(lab: Lab) -> None:
    source = lab.image("disk", 2 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-passthrough")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    fd = os.open(lab.mnt / "disk", os.O_RDONLY | os.O_DIRECT)
    lab.lazyfs("detach", lab.mnt)
    server.kill()
    with mmap.mmap(-1, 2 * MiB) as buffer:
        assert os.preadv(fd, [buffer], 0) == 2 * MiB
        assert buffer[:] == source.read_bytes()
    os.close(fd)
    assert daemon_ends(lab) == 0


def test_waiting_for_an_image_that_has_failed_ends_with_the_reason(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate", "--refresh", "0.2")
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    os.pread(fd, 1, 0)
    os.truncate(source, 2 * MiB)
    lab.wait_for_state("disk", "failed")
    done = lab.lazyfs("detach", lab.mnt, "--wait", check=False)
    assert done.returncode == 1
    assert f"{lab.mnt}/disk will not become whole: changed in the repository" in done.stderr
    assert os.path.ismount(lab.mnt)
    os.close(fd)


def test_a_replaced_image_that_is_open_and_not_whole_counts(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate", "--refresh", "0.2", "--on-change", "replace")
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    os.pread(fd, 1, 0)
    os.truncate(source, 2 * MiB)
    wait_until(lambda: (lab.mnt / "disk").stat().st_size == 2 * MiB, "replaced")
    refused = lab.lazyfs("detach", lab.mnt, check=False)
    assert refused.returncode == 1
    assert "open and not whole: disk" in refused.stderr
    os.close(fd)
    lab.lazyfs("detach", lab.mnt)
    assert daemon_ends(lab) == 0
