"""The keeper: what readers notice of a daemon that dies, hangs or cannot start, which is nothing."""

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from lab import KiB, Lab, MiB, die_with_parent, pread, wait_until

from lazyfs.host import mounts

BLOCK = 64 * KiB

QUICK = (
    "-c",
    "import sys; from lazyfs import keeper; keeper.SILENT_TICKS = 3; keeper.START_TICKS = 10; "
    "keeper.STAND_IN_S = 1.0; keeper.MARGIN_S = 0.0; "
    "from lazyfs.core import looking; looking.EDGE = 0; looking.LOOK_S = 0.0; "
    "from lazyfs.__main__ import main; sys.exit(main())",
)
"""The program, with a keeper that does not wait long for its daemon."""


def kill(lab: Lab, number: int = signal.SIGKILL) -> None:
    """End the daemon, and wait until another one serves."""
    before = lab.daemon_pid
    lab.signal_daemon(number)
    wait_until(lambda: lab.daemon_pid not in (0, before), "another daemon")


def direct(path: Path, offset: int, length: int) -> bytes:
    """Read with O_DIRECT, so that no page cache helps."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, length)
        got = os.preadv(fd, [buffer], offset)
        return buffer[:got]
    finally:
        os.close(fd)


# -- while there is no daemon


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_what_is_present_is_read_without_a_daemon(lab: Lab, image_format: str) -> None:
    content = lab.image("disk", 4 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-populate", "--format", image_format)
    shown = lab.mnt / ("disk.qcow2" if image_format == "qcow2" else "disk")
    with shown.open("rb") as file:
        start = os.fstat(file.fileno()).st_size - 4 * MiB  # the metadata of a qcow2
        direct(shown, start, MiB)
        wait_until(lambda: lab.image_status("disk")["present_bytes"] >= MiB, "1 MiB is present")
        lab.signal_daemon(signal.SIGSTOP)
        try:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert (
                os.pread(file.fileno(), BLOCK, start + 5 * BLOCK) == content[5 * BLOCK : 6 * BLOCK]
            )
        finally:
            lab.signal_daemon(signal.SIGCONT)


def test_a_whole_image_without_passthrough_is_read_without_a_daemon(lab: Lab) -> None:
    content = lab.image("disk", 2 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-passthrough")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        lab.signal_daemon(signal.SIGSTOP)
        try:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), MiB, MiB) == content[MiB:]
        finally:
            lab.signal_daemon(signal.SIGCONT)


# -- a daemon that ends


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_open_files_go_on(lab: Lab, number: signal.Signals) -> None:
    content = lab.image("disk", 8 * MiB).read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), BLOCK, 0) == content[:BLOCK]
        before = lab.daemon_pid
        lab.signal_daemon(number)
        assert os.pread(file.fileno(), MiB, 4 * MiB) == content[4 * MiB : 5 * MiB], "a missing part"
        assert os.pread(file.fileno(), BLOCK, 0) == content[:BLOCK]
        assert lab.daemon_pid != before
        status = lab.status()
        assert (status["restarts"], status["daemon_pid"]) == (1, lab.daemon_pid)
        assert lab.image_status("disk")["open_count"] == 1
    wait_until(lambda: lab.image_status("disk")["open_count"] == 0, "it is closed")
    assert (lab.mnt / "disk").read_bytes() == content


def test_a_read_that_waits_for_the_repository_is_asked_for_again(lab: Lab) -> None:
    content = lab.image("disk", 4 * MiB).read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        os.pread(file.fileno(), 4096, 0)
        server.kill()
        got: list[bytes] = []
        reader = threading.Thread(
            target=lambda: got.append(os.pread(file.fileno(), BLOCK, 2 * MiB))
        )
        reader.start()
        time.sleep(0.3)
        kill(lab)
        assert not got
        server.start()
        reader.join(30)
        assert got == [content[2 * MiB : 2 * MiB + BLOCK]]


def test_nothing_is_fetched_again(lab: Lab) -> None:
    lab.image("disk", 16 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        for offset in range(0, 16 * MiB, MiB):
            os.pread(file.fileno(), BLOCK, offset)
        before = lab.image_status("disk")["present_bytes"]
        lab.signal_daemon(signal.SIGKILL)  # before a checkpoint, if it is quick
        os.stat(lab.mnt / "disk")
        assert lab.image_status("disk")["present_bytes"] >= before
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        asked = server.bytes_read()
        for offset in range(0, 16 * MiB, MiB):
            os.pread(file.fileno(), BLOCK, offset)
        assert server.bytes_read() - asked <= 64 * KiB, "only samples may be compared"


def test_what_the_map_in_memory_knew_is_saved_by_the_next_daemon(lab: Lab) -> None:
    content = lab.image("disk", 4 * MiB).read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        os.pread(file.fileno(), MiB, 0)
        wait_until(lambda: lab.image_status("disk")["present_bytes"] >= MiB, "it is written")
        kill(lab)
        os.stat(lab.mnt / "disk")
    lab.umount()
    server.kill()
    lab.mount(server.uri, "--no-populate")
    assert pread(lab.mnt / "disk", 0, MiB) == content[:MiB]


def test_a_whole_image_stays_open_in_passthrough(lab: Lab) -> None:
    content = lab.image("disk", 2 * MiB).read_bytes()
    lab.mount(lab.serve().uri)
    if not lab.status()["passthrough"]:
        pytest.skip("no passthrough here")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        for _ in range(3):
            kill(lab)
            assert (lab.mnt / "disk").read_bytes() == content, "opened again"
            assert os.pread(file.fileno(), MiB, 0) == content[:MiB]
        assert lab.image_status("disk")["open_count"] == 1
    wait_until(lambda: lab.image_status("disk")["open_count"] == 0, "it is closed")
    lab.lazyfs("evict", lab.mnt / "disk")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_evicted_image_that_is_open_is_read_on(lab: Lab, image_format: str) -> None:
    content = lab.image("disk", 8 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-populate", "--format", image_format)
    shown = lab.mnt / ("disk.qcow2" if image_format == "qcow2" else "disk")
    with shown.open("rb", buffering=0) as file:
        start = os.fstat(file.fileno()).st_size - 8 * MiB
        os.pread(file.fileno(), MiB, start)
        lab.lazyfs("evict", shown)
        for _ in range(2):
            kill(lab)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for offset in (0, MiB - 64 * KiB, 4 * MiB):  # present, in part, missing
                assert (
                    os.pread(file.fileno(), 128 * KiB, start + offset)
                    == content[offset : offset + 128 * KiB]
                )
    wait_until(lambda: lab.image_status("disk")["open_count"] == 0, "it is closed")
    assert "lost" not in lab.log_text()


def test_an_evicted_image_is_not_mixed_with_another_version(lab: Lab) -> None:
    image = lab.image("disk", 8 * MiB)
    content = image.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        os.pread(file.fileno(), MiB, 0)
        lab.lazyfs("evict", lab.mnt / "disk")
        server.kill()
        image.write_bytes(os.urandom(8 * MiB))
        server.start()
        kill(lab)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 64 * KiB, 0) == content[: 64 * KiB]
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.pread(file.fileno(), 64 * KiB, 4 * MiB)


def test_a_mount_from_inside_its_mountpoint_goes_on(lab: Lab) -> None:
    """The folder where daemons are started must not be looked for in the mount."""
    content = lab.image("disk", MiB).read_bytes()
    read_fd, write_fd = os.pipe()
    command = [
        sys.executable, "-m", "lazyfs", "mount", lab.serve().uri, ".", "--cache-dir", "../cache",
        "--log-file", "../lazyfs.log", "--foreground", "--ready-fd", str(write_fd),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    lab.daemon = subprocess.Popen(
        command,
        cwd=lab.mnt,
        pass_fds=[write_fd],
        env=environment,
        preexec_fn=die_with_parent,
        text=True,
    )
    os.close(write_fd)
    with os.fdopen(read_fd) as answer:
        assert answer.read() == "ready\n", lab.log_text()
    for _ in range(2):
        kill(lab)
        assert (lab.mnt / "disk").read_bytes() == content
    lab.umount()


def test_unmounted_while_the_next_daemon_starts(lab: Lab) -> None:
    lab.image("disk", MiB)
    server = lab.serve()
    lab.mount(server.uri)
    lab.signal_daemon(signal.SIGKILL)
    time.sleep(0.15)
    subprocess.run(["umount", str(lab.mnt)], check=True)
    assert lab.daemon is not None
    assert lab.daemon.wait(20) == 0
    lab.daemon = None
    lab.mount(server.uri)


def test_the_cache_stays_locked(lab: Lab) -> None:
    lab.image("disk", MiB)
    lab.mount(lab.serve().uri)
    lab.signal_daemon(signal.SIGKILL)
    other = lab.folder / "other"
    other.mkdir()
    done = lab.lazyfs("mount", "nbd://localhost:1", other, "--cache-dir", lab.mnt, check=False)
    assert done.returncode == 1


def test_pins_and_a_pause_last(lab: Lab) -> None:
    lab.image("disk", 4 * MiB)
    lab.mount(lab.serve().uri)
    lab.lazyfs("pause", lab.mnt)
    lab.lazyfs("pin", lab.mnt / "disk")
    kill(lab)
    assert lab.image_status("disk")["pinned"]
    assert "paused" in lab.lazyfs("status", lab.mnt).stdout


def test_population_goes_on(lab: Lab) -> None:
    content = lab.image("disk", 8 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--fill-rate", "4M")
    with (lab.mnt / "disk").open("rb") as file:
        file.read(4096)
        time.sleep(0.3)
        kill(lab)
    lab.wait_for_state("disk", "whole")
    assert (lab.mnt / "disk").read_bytes() == content


def test_the_reads_of_the_keeper_are_counted(lab: Lab) -> None:
    lab.image("disk", 4 * MiB)
    lab.mount(lab.serve().uri, "--no-populate", "--metrics", "127.0.0.1:0")
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        os.pread(file.fileno(), BLOCK, 0)
        time.sleep(0.2)
        for _ in range(10):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(file.fileno(), 4096, 0)
        script = (
            "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"
        )
        url = f"http://{lab.status()['metrics']}/metrics"
        text = subprocess.run(
            [sys.executable, "-c", script, url], capture_output=True, text=True
        ).stdout
        (line,) = [
            one
            for one in text.splitlines()
            if one.startswith("lazyfs_read_seconds_count") and "present" in one
        ]
        assert float(line.split()[-1]) >= 10


# -- a daemon that hangs, or cannot start


def test_a_daemon_that_hangs_is_replaced(lab: Lab) -> None:
    content = lab.image("disk", 4 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-populate", program=QUICK)
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        os.pread(file.fileno(), 4096, 0)
        lab.signal_daemon(signal.SIGSTOP)
        assert os.pread(file.fileno(), BLOCK, MiB) == content[MiB : MiB + BLOCK]
    assert "the daemon hangs" in lab.log_text()
    assert lab.status()["restarts"] == 1


def test_one_that_cannot_start_is_tried_again(lab: Lab) -> None:
    """What is present is read meanwhile, and `status` says what is wrong."""
    content = lab.image("disk", 4 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-populate", program=QUICK)
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        os.pread(file.fileno(), MiB, 0)
        wait_until(lambda: lab.image_status("disk")["present_bytes"] >= MiB, "1 MiB is present")
        catalog = Path(f"/proc/{lab.daemon_pid}/fd")
        (root,) = {
            os.readlink(one) for one in catalog.iterdir() if os.readlink(one).endswith("/.lazyfs")
        }
        folder = next(one for one in catalog.iterdir() if os.readlink(one) == root)
        held = os.open(folder, os.O_RDONLY)  # the folder beneath the mount
        try:
            for name in ("catalog.sqlite", "catalog.sqlite-wal"):
                os.rename(name, f"{name}.away", src_dir_fd=held, dst_dir_fd=held)
            os.mkdir("catalog.sqlite", dir_fd=held)
            lab.signal_daemon(signal.SIGKILL)
            wait_until(
                lambda: "not a plain file" in lab.lazyfs("status", lab.mnt, check=False).stdout,
                "why",
            )
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), BLOCK, BLOCK) == content[BLOCK : 2 * BLOCK]
            os.rmdir("catalog.sqlite", dir_fd=held)
            for name in ("catalog.sqlite", "catalog.sqlite-wal"):
                os.rename(f"{name}.away", name, src_dir_fd=held, dst_dir_fd=held)
        finally:
            os.close(held)
        assert os.pread(file.fileno(), BLOCK, 2 * MiB) == content[2 * MiB : 2 * MiB + BLOCK]
    answers = lambda: lab.lazyfs("status", lab.mnt, check=False).returncode == 0  # noqa: E731
    wait_until(answers, "status is well again")
    assert lab.status()["restarts"] >= 1


def test_a_configuration_that_became_wrong_is_named(lab: Lab) -> None:
    content = lab.image("disk", MiB).read_bytes()
    configuration = lab.folder / "lazyfs.toml"
    configuration.write_text("refresh = 30\n")
    lab.mount(lab.serve().uri, "--config", configuration, program=QUICK)
    configuration.write_text("refresh = never\n")
    lab.signal_daemon(signal.SIGKILL)
    wait_until(
        lambda: "lazyfs.toml" in lab.lazyfs("status", lab.mnt, check=False).stdout, "it is named"
    )
    configuration.write_text("refresh = 30\n")
    assert (lab.mnt / "disk").read_bytes() == content


def test_a_read_fails_in_time_although_the_daemon_hangs(lab: Lab) -> None:
    lab.image("disk", 4 * MiB)
    program = (QUICK[0], QUICK[1].replace("SILENT_TICKS = 3", "SILENT_TICKS = 100"))
    lab.mount(lab.serve().uri, "--no-populate", "--io-timeout", "2", program=program)
    with (lab.mnt / "disk").open("rb", buffering=0) as file:
        os.pread(file.fileno(), 4096, 0)
        lab.signal_daemon(signal.SIGSTOP)
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.pread(file.fileno(), 4096, 2 * MiB)
        finally:
            lab.signal_daemon(signal.SIGCONT)


# -- waiting can be interrupted


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_who_waits_for_a_lost_repository_can_be_ended(lab: Lab, flags: int, number: int) -> None:
    lab.image("disk", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--io-timeout", "60")
    pread(lab.mnt / "disk", 0, 4096)
    server.kill()
    script = (
        "import mmap, os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "fd = os.open(sys.argv[1], os.O_RDONLY | int(sys.argv[2])); print(flush=True); "
        "os.preadv(fd, [mmap.mmap(-1, 4096)], 2 << 20)"
    )
    command = [sys.executable, "-c", script, str(lab.mnt / "disk"), str(flags)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert reader.stdout is not None
    reader.stdout.readline()
    time.sleep(0.5)
    assert reader.poll() is None
    reader.send_signal(number)
    assert reader.wait(8) == -number
    reader.stdout.close()
    wait_until(lambda: lab.image_status("disk")["open_count"] == 0, "it is closed")


# -- the end


def test_sigterm_without_a_daemon_unmounts(lab: Lab) -> None:
    lab.image("disk", MiB)
    program = (
        QUICK[0],
        QUICK[1].replace(
            "import sys;",
            "import sys, os; os.environ.get('LAZYFS_KEEPER') and os.path.exists(sys.argv[-1] + '.broken') and sys.exit(7);",
        ),
    )
    lab.mount(lab.serve().uri, program=program)
    Path(f"{lab.log}.broken").touch()
    lab.signal_daemon(signal.SIGKILL)
    wait_until(lambda: "exit code 7" in lab.log_text(), "no daemon can start", 8)
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGTERM)
    assert lab.daemon.wait(20) == 0
    lab.daemon = None
    assert str(lab.mnt) not in Path("/proc/self/mountinfo").read_text()
    assert not Path(mounts.socket_path(str(lab.mnt))).exists()


def test_without_its_keeper_a_daemon_saves_and_ends(lab: Lab) -> None:
    lab.image("disk", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "disk", 0, MiB)
    assert lab.daemon is not None
    daemon = lab.daemon_pid
    lab.daemon.kill()
    lab.daemon.wait()
    lab.daemon = None
    wait_until(lambda: not Path(f"/proc/{daemon}").exists(), "the daemon has ended")
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.stat(lab.mnt / "disk")
    lab.mount(server.uri, "--no-populate")
    assert lab.image_status("disk")["present_bytes"] >= MiB


# -- SEEK_DATA and SEEK_HOLE


def test_programs_see_the_holes(lab: Lab) -> None:
    lab.image("disk", 64 * MiB, {0: os.urandom(MiB), 32 * MiB: os.urandom(MiB)})
    lab.mount(lab.serve().uri, "--no-populate")
    shown = lab.mnt / "disk"
    with shown.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 64 * MiB, "nothing is known yet"
        for offset in range(0, 64 * MiB, MiB):
            os.pread(file.fileno(), 4096, offset)
        wait_until(lambda: os.lseek(file.fileno(), 0, os.SEEK_HOLE) == MiB, "the hole is known")
        assert os.lseek(file.fileno(), MiB, os.SEEK_DATA) == 32 * MiB
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            os.lseek(file.fileno(), 33 * MiB, os.SEEK_DATA)
    command = ["qemu-img", "map", "--output=json", "-f", "raw", str(shown)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    data = [(one["start"], one["length"]) for one in json.loads(done.stdout) if one["data"]]
    assert data == [(0, MiB), (32 * MiB, MiB)]
    copy = lab.folder / "copy"
    subprocess.run(["cp", "--sparse=auto", shown, copy], check=True)
    assert copy.read_bytes() == (lab.repository / "disk").read_bytes()
    assert copy.stat().st_blocks * 512 < 4 * MiB
    (lab.mnt / "disk").read_bytes()
    with shown.open("rb") as file:  # in passthrough, if there is any
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == MiB
