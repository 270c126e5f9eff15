"""`lazyfs detach` unmounts while files are open, and their users notice nothing."""

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from lab import DEADLINE_S, Lab, MiB, pread, wait_until

from lazyfs.host import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the readers of others are seen by root")


def slow_image(lab: Lab) -> bytes:
    """Mount a repository that needs a few seconds for the image `disk`."""
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
        with (
            (lab.mnt / "disk").open("rb") as file,
            subprocess.Popen(["sleep", "60"], stdin=file) as sleeper,
        ):
            refused = lab.lazyfs("detach", lab.mnt, check=False)
            sleeper.kill()
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert f"{lab.mnt}/disk is not whole and is open in " in refused.stderr
        assert f"sleep (pid {sleeper.pid})" in refused.stderr
        assert f"{lab.mnt}/mapped is not whole and is open in " in refused.stderr
        assert refused.stderr.count(f"(pid {os.getpid()})") == 2
    assert os.path.ismount(lab.mnt)
    assert lab.image_status("disk")["state"] == "partial"


def test_wait_has_images_populated_that_nothing_else_would(lab: Lab) -> None:
    expected = lab.image("disk", 4 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-populate")
    with (lab.mnt / "disk").open("rb") as file:
        lab.lazyfs("detach", lab.mnt, "--wait")
        assert not os.path.ismount(lab.mnt)
        assert file.read() == expected
    assert (lab.mnt / "disk").read_bytes() == expected


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

    status = lab.status_of_all()
    assert lab.daemon is not None
    assert f"detached, pid {lab.daemon.pid}" in status
    assert f"detached, pid {lab.daemon.pid}" in lab.lazyfs("status", lab.mnt).stdout
    for verb in ("detach", "umount"):
        again = lab.lazyfs(verb, lab.mnt, check=False)
        assert again.stderr == (
            f"lazyfs: {lab.mnt} is detached already; pid {lab.daemon.pid} ends with its last open file\n"
        )
    assert lab.daemon.poll() is None
    socket = Path(mounts.detached_socket_path(lab.daemon.pid))
    assert socket.exists()
    os.close(fd)
    assert daemon_ends(lab) == 0
    assert not socket.exists()
    assert f"{lab.mnt}  from" not in lab.status_of_all()


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
    # opened while partial, so it was the daemon's
    with pytest.raises(OSError, match="not connected"):
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


def test_a_replaced_image_that_is_open_and_not_whole_counts_and_its_readers_are_named(
    lab: Lab,
) -> None:
    source = lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate", "--refresh", "0.2", "--on-change", "replace")
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    os.pread(fd, 1, 0)
    os.truncate(source, 2 * MiB)
    wait_until(lambda: (lab.mnt / "disk").stat().st_size == 2 * MiB, "replaced")
    refused = lab.lazyfs("detach", lab.mnt, check=False)
    assert refused.returncode == 1
    assert f"{lab.mnt}/disk was replaced before it was whole and is open in " in refused.stderr
    assert f"(pid {os.getpid()})" in refused.stderr
    assert "disk (replaced)" in lab.lazyfs("status", lab.mnt).stdout
    refused = lab.lazyfs("detach", lab.mnt, "--wait", check=False)
    assert refused.returncode == 1
    assert "disk was replaced and will not become whole: close what has it open" in refused.stderr
    os.close(fd)
    lab.lazyfs("detach", lab.mnt)
    assert daemon_ends(lab) == 0


@contextmanager
def disk_below(lab: Lab) -> Iterator[None]:
    """Mount a file system of its own under the mountpoint, as on most hosts. It must never be
    unmounted."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "mode=755", "-o", "size=64m", "below", str(lab.mnt)],
        check=True,
    )
    try:
        yield
        assert _mounted(lab) == ["tmpfs"]
    finally:
        lab.close()
        if "tmpfs" in _mounted(lab):
            subprocess.run(["umount", "-l", str(lab.mnt)], check=True)


def _mounted(lab: Lab) -> list[str]:
    rows = [line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [row[row.index("-") + 1] for row in rows if row[4] == str(lab.mnt)]


def test_many_detaches_at_once_unmount_one_file_system(lab: Lab) -> None:
    with disk_below(lab):
        lab.image("disk", 1 * MiB)
        lab.mount(lab.serve().uri)
        (lab.mnt / "disk").read_bytes()
        lab.wait_for_state("disk", "whole")
        fd = os.open(lab.mnt / "disk", os.O_RDONLY)
        assert _mounted(lab) == ["tmpfs", "fuse.lazyfs"]
        command = [sys.executable, "-m", "lazyfs", "detach", str(lab.mnt)]
        many = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
        ends = [(one.communicate(timeout=DEADLINE_S)[1], one.returncode) for one in many]
        assert sorted(code for _, code in ends) == [0, 1, 1, 1]
        assert not any("bug" in said or "Traceback" in said for said, _ in ends), ends
        os.close(fd)
        assert daemon_ends(lab) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_unmounted_by_hand_leaves_what_is_below_alone(
    lab: Lab, number: signal.Signals
) -> None:
    with disk_below(lab):
        lab.image("disk", 1 * MiB)
        lab.mount(lab.serve().uri)
        with (lab.mnt / "disk").open("rb"):
            subprocess.run(["umount", "-l", str(lab.mnt)], check=True)
            assert _mounted(lab) == ["tmpfs"]
            assert lab.daemon is not None
            lab.daemon.send_signal(number)
            assert daemon_ends(lab) == 0


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("verb", ["umount", "mount"])
def test_clearing_away_a_killed_daemon_leaves_what_is_below_alone(
    lab: Lab, verb: str, opened: bool
) -> None:
    with disk_below(lab):
        lab.image("disk", 1 * MiB)
        server = lab.serve()
        lab.mount(server.uri, "--no-populate")
        fd = os.open(lab.mnt / "disk", os.O_RDONLY) if opened else -1
        try:
            assert lab.daemon is not None
            lab.daemon.kill()
            lab.daemon.wait()
            lab.daemon = None
            if verb == "umount":
                lab.lazyfs("umount", lab.mnt)
            else:
                lab.mount(server.uri, "--no-populate")
                assert (lab.mnt / "disk").stat().st_size == 1 * MiB
                lab.umount()
        finally:
            if opened:
                with suppress(OSError):  # the kernel tells of the dead connection here
                    os.close(fd)


def test_what_is_mounted_over_it_is_not_unmounted(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "over", str(lab.mnt)], check=True)
    try:
        refused = lab.lazyfs("detach", lab.mnt, check=False)
        assert refused.returncode == 1
        assert "another file system is mounted over" in refused.stderr
        assert _mounted(lab) == ["fuse.lazyfs", "tmpfs"]
    finally:
        subprocess.run(["umount", str(lab.mnt)], check=True)
    assert lab.status()["detached"] is False
    lab.lazyfs("detach", lab.mnt)
    assert daemon_ends(lab) == 0


HOLDERS = {
    "a working directory": "import os, sys; os.chdir(os.path.dirname(sys.argv[1])); print(flush=True); sys.stdin.read()",
    "a mapping": """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
fd = os.open(sys.argv[1], os.O_RDONLY)
address = libc.mmap(None, ctypes.c_size_t(4096), 1, 2, fd, ctypes.c_long(0))
os.close(fd)
print(flush=True)
sys.stdin.read()
assert len(ctypes.string_at(address, 4096)) == 4096
""",
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_holds_the_mount_without_an_open_file_does_not_hold_detach(
    lab: Lab, holder: str
) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    command = [sys.executable, "-c", HOLDERS[holder], str(lab.mnt / "disk")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        wait_until(lambda: lab.image_status("disk")["open_count"] == 0, "nothing is open")
        done = lab.lazyfs("detach", lab.mnt)
        assert lab.daemon is not None
        assert "something holds the mount" in done.stdout
        assert f"pid {lab.daemon.pid} ends with that" in done.stdout
        assert lab.daemon.poll() is None
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0
    assert daemon_ends(lab) == 0


def test_waiting_goes_on_when_another_image_is_opened_meanwhile(lab: Lab) -> None:
    expected = slow_image(lab)
    lab.image("other", 2 * MiB)
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    command = [sys.executable, "-m", "lazyfs", "detach", str(lab.mnt), "--wait"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waits:
        assert waits.stderr is not None
        assert "waiting for" in waits.stderr.readline()
        more = os.open(lab.mnt / "disk", os.O_RDONLY)
        assert waits.wait(DEADLINE_S) == 0
    assert os.pread(more, 4096, 8192) == os.pread(fd, 4096, 8192) == expected[8192:12288]
    for one in (fd, more):
        os.close(one)
    assert daemon_ends(lab) == 0


def test_with_the_cache_elsewhere_it_says_where_the_plain_files_are(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    cache = lab.folder / "cache"
    lab.mount(lab.serve().uri, "--cache-dir", cache)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    said = lab.lazyfs("detach", lab.mnt).stdout
    assert daemon_ends(lab) == 0
    command = f"mount --bind {cache} {lab.mnt}"
    assert command in said
    subprocess.run(command.split(), check=True)
    try:
        assert (lab.mnt / "disk").read_bytes() == source.read_bytes()
    finally:
        subprocess.run(["umount", str(lab.mnt)], check=True)


def test_where_it_is_mounted_besides_is_said(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri)
    besides = lab.folder / "besides"
    besides.mkdir()
    subprocess.run(["mount", "--bind", str(lab.mnt), str(besides)], check=True)
    try:
        said = lab.lazyfs("detach", lab.mnt).stdout
        assert f"It is still mounted on {besides}: unmount that, too." in said
        assert (besides / "disk").read_bytes() == source.read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(besides)], check=True)
    assert daemon_ends(lab) == 0


@pytest.mark.slow
def test_umount_of_a_daemon_that_hangs_waits_for_the_next_one(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri)
    lab.signal_daemon(signal.SIGSTOP)
    lab.umount()


def test_umount_and_detach_at_once_are_both_content_or_say_why(lab: Lab) -> None:
    for _ in range(3):
        lab.image("disk", 1 * MiB)
        lab.mount(lab.serve().uri)
        commands = [
            [sys.executable, "-m", "lazyfs", verb, str(lab.mnt)]
            for verb in ("detach", "umount") * 2
        ]
        many = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands
        ]
        said = [one.communicate(timeout=DEADLINE_S)[1] for one in many]
        assert not any("bug" in text or "Invalid argument" in text for text in said), said
        assert 0 in [one.returncode for one in many]
        assert daemon_ends(lab) == 0


def test_a_plain_file_that_is_removed_underneath_shows_in_status(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    cache = lab.folder / "cache"
    lab.mount(lab.serve().uri, "--cache-dir", cache)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    (cache / "disk").unlink()
    with pytest.raises(OSError, match="Input/output"):
        (lab.mnt / "disk").read_bytes()
    assert "the plain file is gone" in lab.image_status("disk")["error"]
    assert "mount anew" in lab.lazyfs("status", lab.mnt).stdout
    lab.umount()
    lab.mount(lab.serve().uri, "--cache-dir", cache)
    assert (lab.mnt / "disk").read_bytes() == source.read_bytes()


def test_a_plain_file_that_is_changed_underneath_has_to_be_removed_as_status_says(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB)
    cache = lab.folder / "cache"
    server = lab.serve()
    lab.mount(server.uri, "--cache-dir", cache)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    (cache / "disk").unlink()
    (cache / "disk").write_bytes(b"mine")
    with pytest.raises(OSError, match="Input/output"):
        (lab.mnt / "disk").read_bytes()
    assert "has 4 bytes" in lab.image_status("disk")["error"]
    assert "remove what is there, and mount anew" in lab.image_status("disk")["error"]
    (cache / "disk").unlink()
    lab.umount()
    lab.mount(server.uri, "--cache-dir", cache)
    assert (lab.mnt / "disk").read_bytes() == source.read_bytes()
