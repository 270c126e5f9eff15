"""Causes each row of the table of failures for real."""

import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from lab import KiB, Lab, MiB, die_with_parent, pread, small_disk, wait_until

OLD_KERNEL = (
    "-c",
    "from lazyfs.kernel.session import KernelSession\n"
    "KernelSession.forget_names = lambda self: False\n"
    "from lazyfs.__main__ import main\n"
    "raise SystemExit(main())",
)
"""How Linux before 6.16 does it: a notification that a name is invalid waits for the lookups under
way in its folder."""


def _waits_in(thread: int) -> str:
    """Return the function of the kernel in which a thread sleeps."""
    with suppress(FileNotFoundError):  # it has ended
        return Path(f"/proc/{thread}/wchan").read_text()
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("program", [("-m", "lazyfs"), OLD_KERNEL])
def test_a_daemon_killed_while_a_lookup_waits_and_names_change(
    lab: Lab, program: tuple[str, ...]
) -> None:
    """No process hangs, or the next mount ends that at the latest."""
    for name in ("one", "two"):
        lab.image(name, 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--cache-dir", lab.folder / "cache", program=program)
    lab.lazyfs("prefetch", lab.mnt / "one", "--wait")
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        stat = ["stat", "--format=%s", str(lab.mnt / "two")]
        with subprocess.Popen(stat, stderr=subprocess.PIPE, preexec_fn=die_with_parent) as waiting:
            wait_until(
                lambda: _waits_in(waiting.pid) == "request_wait_answer", "it waits for the size"
            )
            lab.lazyfs("evict", lab.mnt / "one")
            daemon = lab.daemon_pid
            if program is OLD_KERNEL:
                threads = Path(f"/proc/{daemon}/task")
                told = "fuse_reverse_inval_entry"
                wait_until(
                    lambda: told in [_waits_in(int(task.name)) for task in threads.iterdir()],
                    "it waits, too",
                )
            assert waiting.poll() is None
            lab.signal_daemon(signal.SIGKILL)
            server.process.send_signal(signal.SIGCONT)
            waiting.wait(30)
        # On an old kernel the daemon cannot end before the lookup does, so that is given up.
        assert waiting.returncode == (1 if program is OLD_KERNEL else 0)
        assert (lab.mnt / "two").stat().st_size == 1 * MiB
        assert lab.status()["restarts"] == 1
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_repository_dies_and_returns_while_readers_wait(lab: Lab) -> None:
    source = lab.image("dense", 16 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    assert pread(lab.mnt / "dense", 0, 64 * KiB) == expected[: 64 * KiB]
    server.kill()
    assert pread(lab.mnt / "dense", 0, 64 * KiB) == expected[: 64 * KiB]  # present: nobody notices
    with ThreadPoolExecutor(4) as pool:
        waiting = [
            pool.submit(pread, lab.mnt / "dense", i * 3 * MiB + 64 * KiB, 128 * KiB)
            for i in range(4)
        ]
        wait_until(lambda: not lab.status()["connected"], "status says the repository is gone")
        assert not any(read.done() for read in waiting)
        server.start()
        for i, read in enumerate(waiting):
            start = i * 3 * MiB + 64 * KiB
            assert read.result(30) == expected[start : start + 128 * KiB]
    wait_until(lambda: lab.status()["connected"], "status says it is back")


def test_repository_killed_again_and_again_in_the_middle_of_reads(lab: Lab) -> None:
    source = lab.image("dense", 16 * MiB)
    server = lab.serve("rate", parameters=("rate=100M", "burstiness=0.05"))
    lab.mount(server.uri)
    compare = subprocess.Popen(["cmp", source, lab.mnt / "dense"])
    for _ in range(5):
        time.sleep(0.1)  # somewhere in the middle
        server.kill()
        server.start()
    assert compare.wait(60) == 0
    lab.wait_for_state("dense", "whole")
    subprocess.run(["cmp", source, lab.mnt / "dense"], check=True)


def test_io_timeout_fails_that_read_alone_and_later_ones_work(lab: Lab) -> None:
    source = lab.image("dense", 4 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--io-timeout", "1")
    pread(lab.mnt / "dense", 0, 64 * KiB)
    server.kill()
    with pytest.raises(OSError, match="Input/output error") as failure:
        pread(lab.mnt / "dense", 2 * MiB, 4 * KiB)
    assert failure.value.errno == errno.EIO
    assert pread(lab.mnt / "dense", 0, 64 * KiB) == expected[: 64 * KiB]
    server.start()
    wait_until(lambda: _readable(lab.mnt / "dense", 2 * MiB), "works again")
    assert pread(lab.mnt / "dense", 2 * MiB, 4 * KiB) == expected[2 * MiB : 2 * MiB + 4 * KiB]


def test_server_that_accepts_and_never_answers(lab: Lab) -> None:
    lab.image("dense", 4 * MiB)
    lab.image("other", 1 * MiB)
    server = lab.serve("pause", parameters=(f"pause-control={lab.folder}/pause.sock",))
    lab.mount(server.uri, "--no-populate", "--io-timeout", "3")
    other = (lab.mnt / "other").read_bytes()
    _pause(lab.folder / "pause.sock", b"p")
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "dense", 0, 4 * KiB)
    assert (lab.mnt / "other").read_bytes() == other  # another image, present: unaffected
    _pause(lab.folder / "pause.sock", b"r")
    wait_until(lambda: _readable(lab.mnt / "dense"), "works again")


def _pause(path: Path, letter: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        client.sendall(letter)
        # Nothing: nbdkit 1.32 can abort on resuming requests whose client has gone; then it is
        # restarted, unpaused.
        assert client.recv(1) in (letter.upper(), b"" if letter == b"r" else letter.upper())


def _readable(path: Path, offset: int = 0) -> bool:
    try:
        pread(path, offset, 4 * KiB)
    except OSError:
        return False
    return True


def test_read_error_from_the_server_fails_that_read_and_keeps_nothing(lab: Lab) -> None:
    source = lab.image("dense", 4 * MiB)
    trigger = lab.folder / "trigger"
    trigger.touch()
    server = lab.serve(
        "error", parameters=("error-pread=EIO", "error-pread-rate=100%", f"error-file={trigger}")
    )
    lab.mount(server.uri)
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "dense", 0, 4 * KiB)
    wait_until(
        lambda: "Input/output error" in lab.image_status("dense")["error"], "status says why"
    )
    assert lab.image_status("dense")["present_bytes"] == 0
    trigger.unlink()
    wait_until(lambda: _readable(lab.mnt / "dense"), "works again")
    lab.wait_for_state("dense", "whole")
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()


@pytest.mark.slow
def test_one_dead_image_does_not_stop_readers_of_another(lab: Lab) -> None:
    """200 reads hang in the repository. Reads of another image's present range, and its readahead,
    go on."""
    lab.image("dead", 64 * MiB)
    lab.image("fine", 8 * MiB)
    server = lab.serve("pause", parameters=(f"pause-control={lab.folder}/pause.sock",))
    lab.mount(server.uri, "--no-populate", "--io-timeout", "8")
    fine = (lab.mnt / "fine").read_bytes()
    subprocess.run(["cp", lab.mnt / "fine", "/dev/null"], check=True)
    (lab.mnt / "dead").open("rb").close()
    _pause(lab.folder / "pause.sock", b"p")

    def hang(index: int) -> None:
        with pytest.raises(OSError, match="Input/output error"):
            pread(lab.mnt / "dead", index * 300 * KiB, 128 * KiB)

    threads = [threading.Thread(target=hang, args=(i,)) for i in range(200)]
    for thread in threads:
        thread.start()
    fd = os.open(lab.mnt / "fine", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.read(fd, 8 * MiB) == fine
    os.close(fd)
    assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_mount_with_the_repository_down(lab: Lab) -> None:
    whole = lab.image("whole", 1 * MiB)
    partial = lab.image("partial", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--fill-rate", "8M")
    assert (lab.mnt / "whole").read_bytes() == whole.read_bytes()
    lab.wait_for_state("whole", "whole")
    lab.umount()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "partial", 0, 64 * KiB)
    lab.umount()
    server.kill()

    lab.mount(server.uri, "--io-timeout", "1")
    assert sorted(os.listdir(lab.mnt)) == ["partial", "whole"]
    status = lab.status()
    assert status["connected"] is False
    assert "refused" in status["message"] or "No such file" in status["message"]
    assert (lab.mnt / "whole").read_bytes() == whole.read_bytes()
    assert pread(lab.mnt / "partial", 0, 64 * KiB) == partial.read_bytes()[: 64 * KiB]
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "partial", 2 * MiB, 1)
    server.start()
    lab.wait_for_state("partial", "whole")
    assert (lab.mnt / "partial").read_bytes() == partial.read_bytes()


def test_first_opens_wait_for_the_repository_like_reads_do(lab: Lab) -> None:
    """This also holds after another open has waited in vain."""
    source = lab.image("dense", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--io-timeout", "2")
    (lab.mnt / "dense").stat()
    server.kill()
    with pytest.raises(OSError, match="Input/output error"):
        (lab.mnt / "dense").open("rb")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit((lab.mnt / "dense").read_bytes)
        time.sleep(0.3)  # it waits now
        server.start()
        assert waiting.result(30) == source.read_bytes()


def test_an_export_that_is_refused_is_not_a_lost_repository(lab: Lab) -> None:
    lab.image("gone", 1 * MiB)
    other = lab.image("other", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--io-timeout", "2")
    (lab.mnt / "gone").stat()
    (lab.repository / "gone").unlink()
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "gone", 0, 1)
    assert lab.status()["connected"] is True
    assert (lab.mnt / "other").read_bytes() == other.read_bytes()


def test_first_mount_of_an_absent_repository_says_why(lab: Lab) -> None:
    refused = lab.lazyfs("mount", f"nbd+unix:///?socket={lab.folder}/none", lab.mnt, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "nothing of it is cached here" in refused.stderr
    assert not os.path.ismount(lab.mnt)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "tiny", "8m") as disk:
        yield disk


def test_full_cache_disk_fails_no_read_and_recovers(tiny_disk: Path, lab: Lab) -> None:
    source = lab.image("dense", 12 * MiB)
    small = lab.image("small", 1 * MiB)
    late = lab.image("late", 1 * MiB)
    server = lab.serve()
    ballast = tiny_disk / ".lazyfs"
    lab.mount(server.uri, "--cache-dir", tiny_disk / "cache")
    assert (lab.mnt / "small").read_bytes() == small.read_bytes()
    lab.wait_for_state("small", "whole")
    for _ in range(2):
        subprocess.run(["cmp", source, lab.mnt / "dense"], check=True)
        fd = os.open(lab.mnt / "dense", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    status = lab.image_status("dense")
    assert status["state"] == "partial"
    assert 0 < status["present_bytes"] < 8 * MiB
    assert "full" in status["error"] + lab.status()["message"]
    assert (lab.mnt / "late").read_bytes() == late.read_bytes()  # first opened with no room at all
    held = (lab.mnt / "late").open("rb")
    subprocess.run(["mount", "-o", "remount,size=32m", str(tiny_disk)], check=True)
    lab.wait_for_state("dense", "whole")
    assert lab.status()["message"] == ""
    lab.wait_for_state("late", "whole")  # without being opened again
    held.close()
    lab.umount()
    assert (tiny_disk / "cache" / "dense").read_bytes() == source.read_bytes()
    assert not ballast.exists()


# -- exports that change


def test_export_that_changes_while_partial(lab: Lab) -> None:
    source = lab.image("dense", 4 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--refresh", "0.3")
    assert pread(lab.mnt / "dense", 0, 64 * KiB) == expected[: 64 * KiB]
    _replace(source, os.urandom(5 * MiB))
    status = lab.wait_for_state("dense", "failed")
    assert "changed in the repository (was 4194304 bytes, now 5242880 bytes)" in status["error"]
    assert (lab.mnt / "dense").stat().st_size == 4 * MiB
    assert pread(lab.mnt / "dense", 0, 64 * KiB) == expected[: 64 * KiB]
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "dense", 2 * MiB, 1)
    # a third version, of the first one's size: it must not be mixed in
    _replace(source, os.urandom(4 * MiB))
    wait_until(
        lambda: lab.log.read_text().count("changed") and lab.status()["connected"], "refreshed"
    )
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "dense", 2 * MiB, 1)
    assert pread(lab.mnt / "dense", 0, 64 * KiB) == expected[: 64 * KiB]


def test_export_that_changes_while_partial_is_not_mixed_after_a_restart(lab: Lab) -> None:
    source = lab.image("dense", 4 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    assert pread(lab.mnt / "dense", 0, 64 * KiB) == expected[: 64 * KiB]
    lab.umount()
    _replace(source, os.urandom(5 * MiB))
    lab.mount(server.uri)
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "dense", 2 * MiB, 1)
    assert pread(lab.mnt / "dense", 0, 64 * KiB) == expected[: 64 * KiB]
    lab.wait_for_state("dense", "failed")


def overwrite(source: Path, content: bytes) -> None:
    """Rebuild an export in place, as a tool that writes to the same file does."""
    with source.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize("when", ["restart", "reconnect", "refresh"])
def test_an_export_that_was_rebuilt_with_the_same_size_is_noticed(lab: Lab, when: str) -> None:
    source = lab.image("dense", 16 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    refresh = "0.5" if when == "refresh" else "1000"
    lab.mount(server.uri, "--no-populate", "--refresh", refresh)
    with (lab.mnt / "dense").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), MiB, 0) == expected[:MiB]
        wait_until(lambda: lab.image_status("dense")["present_bytes"] >= MiB, "it is kept")
        if when == "restart":
            file.close()
            lab.umount()
        overwrite(source, os.urandom(16 * MiB))
        if when == "restart":
            lab.mount(server.uri)  # population finds it
        elif when == "reconnect":
            server.kill()
            server.start()
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), 4096, 12 * MiB)
        else:
            # Something must be fetched for the next look to compare.
            os.pread(file.fileno(), 4096, 9 * MiB)
        status = lab.wait_for_state("dense", "failed")
    assert "changed in the repository (bytes " in status["error"]
    assert pread(lab.mnt / "dense", 0, MiB) == expected[:MiB]
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "dense", 12 * MiB, 4096)
    lab.lazyfs("evict", lab.mnt / "dense")
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()


def test_what_is_compared_is_counted_apart_and_is_not_much(lab: Lab) -> None:
    lab.image("dense", 8 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    assert len(pread(lab.mnt / "dense", 0, 4 * MiB)) == 4 * MiB
    lab.umount()
    before = server.bytes_read()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "dense", 6 * MiB, 4096)
    status = lab.image_status("dense")
    assert 0 < status["sampled_bytes"] <= 512 * KiB
    spent = server.bytes_read() - before
    assert status["fetched_bytes"] + status["sampled_bytes"] == before + spent


def test_a_cache_belongs_to_a_repository(lab: Lab) -> None:
    source = lab.image("dense", MiB)
    lab.mount(lab.serve().uri)
    lab.lazyfs("prefetch", lab.mnt / "dense", "--wait")
    lab.umount()
    other = lab.serve()
    failed = lab.lazyfs("mount", other.uri, lab.mnt, check=False)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert f"belongs to the repository nbd+unix:///?socket={lab.folder}/nbd0.sock" in failed.stderr
    assert "1 image has something cached; mount with --moved" in failed.stderr
    lab.mount(other.uri, "--moved")
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
    lab.umount()
    lab.mount(other.uri)  # which it belongs to now
    lab.lazyfs("evict", lab.mnt / "dense")
    lab.umount()
    third = lab.serve()
    lab.mount(third.uri)  # nothing is cached, so nothing can be mixed
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()


def test_export_that_changes_while_whole_is_kept(lab: Lab) -> None:
    source = lab.image("dense", 1 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--refresh", "0.3")
    assert (lab.mnt / "dense").read_bytes() == expected
    lab.wait_for_state("dense", "whole")
    _replace(source, os.urandom(2 * MiB))
    wait_until(
        lambda: "changed in the repository" in lab.image_status("dense")["error"], "status says so"
    )
    assert lab.image_status("dense")["state"] == "whole"
    assert (lab.mnt / "dense").read_bytes() == expected
    lab.umount()
    assert (lab.mnt / "dense").read_bytes() == expected


@pytest.mark.parametrize("opened", [False, True])
def test_on_change_replace_takes_the_new_version_as_a_new_inode(lab: Lab, opened: bool) -> None:
    source = lab.image("dense", 1 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--on-change", "replace", "--refresh", "0.3")
    assert (lab.mnt / "dense").read_bytes() == expected
    lab.wait_for_state("dense", "whole")
    inode = (lab.mnt / "dense").stat().st_ino
    old = os.open(lab.mnt / "dense", os.O_RDONLY) if opened else None
    new = os.urandom(2 * MiB)
    _replace(source, new)
    wait_until(lambda: (lab.mnt / "dense").stat().st_ino != inode, "a new inode")
    assert (lab.mnt / "dense").read_bytes() == new
    if old is not None:
        os.posix_fadvise(old, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(old, 2 * MiB, 0) == expected
        os.close(old)
    lab.wait_for_state("dense", "whole")
    lab.umount()
    assert (lab.mnt / "dense").read_bytes() == new


def test_identity_tells_versions_of_one_size_apart(lab: Lab) -> None:
    """The description that the server gives an export counts as its version."""
    image = lab.image("v", 1 * MiB)
    script = lab.folder / "description"
    script.write_text("build 1")
    server = lab.serve_with(
        "eval",
        f"export_description=cat {script}",
        "get_size=echo 1M",
        f"pread=dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
        "list_exports=echo v",
    )
    lab.mount(server.uri, "--no-populate", "--refresh", "0.3")
    pread(lab.mnt / "v", 0, 4 * KiB)
    script.write_text("build 2")
    assert "was 'build 1', now 'build 2'" in lab.wait_for_state("v", "failed")["error"]
    script.write_text("build 1")  # published again, and known to be the same
    lab.wait_for_state("v", "partial")
    assert (lab.mnt / "v").read_bytes() == image.read_bytes()


def _replace(path: Path, content: bytes) -> None:
    """Publish a new version as a repository would: a new file under the old name."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.rename(path)
