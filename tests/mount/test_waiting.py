"""What one image, server, reader or disk makes wait, and what not."""

import ctypes
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import REAL, KiB, Lab, MiB, Nbdkit, die_with_parent, pread, wait_until

_libc = ctypes.CDLL(None, use_errno=True)

# linux/aio_abi.h; the numbers of the system calls on x86-64
IO_SETUP, IO_DESTROY, IO_GETEVENTS, IO_SUBMIT = 206, 207, 208, 209
IOCB = struct.Struct("=QIiHhIQQqQII")
IOCB_CMD_PREAD = 0


@contextmanager
def stopped(server: Nbdkit) -> Iterator[None]:
    """Let the repository hang."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


class LinuxAio:
    """One read with Linux AIO, as QEMU's aio=native makes it."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self._context = ctypes.c_ulong(0)
        assert _libc.syscall(IO_SETUP, 1, ctypes.byref(self._context)) == 0
        self._buffer = mmap.mmap(-1, length)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._iocb = ctypes.create_string_buffer(
            IOCB.pack(0, 0, 0, IOCB_CMD_PREAD, 0, fd, address, length, offset, 0, 0, 0)
        )

    def submit(self) -> int:
        pointer = ctypes.pointer(ctypes.c_void_p(ctypes.addressof(self._iocb)))
        return int(_libc.syscall(IO_SUBMIT, self._context, 1, pointer))

    def result(self) -> bytes:
        """Wait for the read, and return what it has read."""
        event = ctypes.create_string_buffer(32)  # struct io_event: data, obj, res, res2
        assert _libc.syscall(IO_GETEVENTS, self._context, 1, 1, event, None) == 1
        length = struct.unpack_from("=q", event.raw, 16)[0]
        _libc.syscall(IO_DESTROY, self._context)
        return bytes(self._buffer[:length])


def test_to_submit_a_direct_read_does_not_wait_for_the_repository(lab: Lab) -> None:
    """QEMU submits in its main loop, so its monitor would be mute meanwhile."""
    source = lab.image("a", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    fd = os.open(lab.mnt / "a", os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(fd, [mmap.mmap(-1, 4096)], 0)  # connects
        read = LinuxAio(fd, 2 * MiB, 4 * KiB)
        with stopped(server):
            submitted = threading.Thread(target=read.submit)
            submitted.start()
            submitted.join(10)
            assert not submitted.is_alive()
        assert read.result() == source.read_bytes()[2 * MiB :][: 4 * KiB]
    finally:
        os.close(fd)


_READERS = """
import mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
def read(i):
    try:
        os.preadv(fd, [mmap.mmap(-1, 1 << 20)], (i + 1) << 20)
    except OSError:
        pass
threading.stack_size(128 << 10)
threads = [threading.Thread(target=read, args=(i,)) for i in range(int(sys.argv[2]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@contextmanager
def readers(path: Path, count: int) -> Iterator[None]:
    """Let so many threads of another process read a MiB each."""
    command = [sys.executable, "-c", _READERS, str(path), str(count)]
    process = subprocess.Popen(command, preexec_fn=die_with_parent)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def waiting(lab: Lab) -> float:
    with urllib.request.urlopen(f"http://{lab.status()['metrics']}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    found = re.search(r'^lazyfs_queue_length{queue="readers"} (\S+)', text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def memory(lab: Lab) -> int:
    """Return the bytes of memory that the daemon has."""
    assert lab.daemon is not None
    text = Path(f"/proc/{lab.daemon_pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * KiB


def test_two_thousand_readers_of_a_repository_that_hangs(lab: Lab) -> None:
    """They stop no reader of what is cached, and cost less than 256 MiB."""
    source = lab.image("cached", 2 * MiB)
    lab.image("hanging", 2100 * MiB, {i * MiB: b"x" * 4096 for i in range(2100)})
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--no-passthrough", "--metrics", "127.0.0.1:0")
    assert (lab.mnt / "cached").read_bytes() == source.read_bytes()
    assert len(pread(lab.mnt / "hanging", 0, 4096)) == 4096
    wait_until(lambda: lab.image_status("cached")["state"] == "whole", "it is whole")
    before = memory(lab)
    with stopped(server), readers(lab.mnt / "hanging", 2048):
        wait_until(lambda: waiting(lab) >= 2000, "they wait")
        assert memory(lab) - before < 256 * MiB
        with (lab.mnt / "cached").open("rb") as cached:
            os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert (lab.mnt / "cached").read_bytes() == source.read_bytes()


def test_a_crowd_of_readers_of_one_image_stops_no_reader_of_another(lab: Lab) -> None:
    """Anybody may read, and start threads."""
    source = lab.image("cached", 2 * MiB)
    lab.image("hanging", 6000 * MiB, {i * MiB: b"x" * 4096 for i in range(6000)})
    server = lab.serve()
    options = ("--no-populate", "--no-passthrough", "--metrics", "127.0.0.1:0")
    lab.mount(server.uri, *options, "--io-timeout", "100")
    assert (lab.mnt / "cached").read_bytes() == source.read_bytes()
    assert len(pread(lab.mnt / "hanging", 0, 4096)) == 4096
    wait_until(lambda: lab.image_status("cached")["state"] == "whole", "it is whole")
    with stopped(server), readers(lab.mnt / "hanging", 4700):
        wait_until(lambda: waiting(lab) >= 4500, "they wait")
        with (lab.mnt / "cached").open("rb") as cached:
            os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert (lab.mnt / "cached").read_bytes() == source.read_bytes()
        assert waiting(lab) >= 4500, "it did not wait for them"
        assert server.process is not None
        server.process.send_signal(signal.SIGCONT)  # so that they can end


# -- unmounting


@contextmanager
def bound(lab: Lab) -> Iterator[Path]:
    """Show the mount at another place as well."""
    place = lab.folder / "bound"
    place.mkdir()
    subprocess.run(["mount", "--bind", lab.mnt, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=False, capture_output=True)


@contextmanager
def in_another_namespace(seen: Path, propagation: str = "private") -> Iterator[int]:
    """Let a process see a mount of now in a mount namespace of its own.

    It sees no mount of other tests, which would then be refused to be unmounted.
    """
    script = (
        "import re, subprocess, sys\n"
        "for line in open('/proc/self/mountinfo'):\n"
        "    place = line.split()[4]\n"
        "    if ' - fuse' in line and place != sys.argv[1]:\n"
        "        subprocess.run(['umount', '-l', place], check=False)\n"
        "print(flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = [
        "unshare",
        "-m",
        "--propagation",
        propagation,
        sys.executable,
        "-c",
        script,
        str(seen),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def test_umount_says_where_else_it_is_mounted_and_does_not_hang(lab: Lab) -> None:
    lab.image("a", MiB)
    lab.mount(lab.serve().uri)
    with bound(lab) as place:
        refused = lab.lazyfs("umount", lab.mnt, check=False)
        assert refused.returncode == 1
        assert refused.stderr == (
            f"lazyfs: {lab.mnt} is also mounted on {place}; unmount that first, or use --lazy\n"
        )
        lab.lazyfs("umount", place)  # as umount(8) does: the bind mount alone
        assert not place.is_mount()
    with in_another_namespace(lab.mnt) as pid:
        refused = lab.lazyfs("umount", lab.mnt, check=False)
        assert refused.returncode == 1
        assert f"in the mount namespace of python (pid {pid})" in refused.stderr
    lab.umount()


def test_umount_is_not_refused_for_a_namespace_from_which_it_goes_as_well(lab: Lab) -> None:
    """So it is with services of systemd that have a mount namespace, such as by PrivateTmp=."""
    lab.image("a", MiB)
    subprocess.run(["mount", "-t", "tmpfs", "none", lab.mnt], check=True)
    try:
        subprocess.run(["mount", "--make-shared", lab.mnt], check=True)
        inner = lab.mnt / "inner"
        inner.mkdir()
        uri = lab.serve().uri
        lab.lazyfs("mount", uri, inner, "--cache-dir", lab.folder / "cache", "--log-file", lab.log)
        with in_another_namespace(inner, "slave") as pid:
            assert f" {inner} " in Path(f"/proc/{pid}/mountinfo").read_text()
            lab.lazyfs("umount", inner)
            assert f" {inner} " not in Path(f"/proc/{pid}/mountinfo").read_text()
    finally:
        subprocess.run(["umount", "-l", lab.mnt / "inner"], check=False, capture_output=True)
        subprocess.run(["umount", "-l", lab.mnt], check=True)


def test_a_lazy_umount_leaves_the_daemon_to_those_who_have_it_mounted(lab: Lab) -> None:
    source = lab.image("a", MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    with bound(lab) as place:
        done = lab.lazyfs("umount", "--lazy", lab.mnt)
        assert f"It is still mounted on {place}" in done.stdout
        assert not lab.mnt.is_mount()
        assert (place / "a").read_bytes() == source.read_bytes()
        subprocess.run(["umount", place], check=True)
        assert lab.daemon is not None
        assert lab.daemon.wait(20) == 0
        lab.daemon = None


def test_sigterm_ends_the_daemon_however_often_it_is_mounted(lab: Lab) -> None:
    lab.image("a", MiB)
    lab.mount(lab.serve().uri)
    (lab.mnt / "a").read_bytes()
    with bound(lab), in_another_namespace(lab.mnt):
        assert lab.daemon is not None
        lab.daemon.terminate()
        assert lab.daemon.wait(20) == 0
        lab.daemon = None
    assert "it is mounted elsewhere" in lab.log_text()


def test_a_bind_mount_stands_for_the_mount(lab: Lab) -> None:
    server = lab.serve_with(
        "eval", "list_exports=echo team/a", "get_size=echo 4096", "pread=head -c $3 /dev/zero"
    )
    lab.mount(server.uri, "--no-populate")
    with bound(lab) as place:
        status = lab.lazyfs("status", place).stdout
        assert str(lab.mnt) in status
        lab.lazyfs("prefetch", place / "team" / "a", "--wait")
        assert lab.image_status("team/a")["state"] == "whole"
        shown = lab.status_of_all()
        assert str(place) not in shown
    inner = lab.folder / "inner"
    inner.mkdir()
    subprocess.run(["mount", "--bind", lab.mnt / "team", inner], check=True)
    try:
        assert '"name": "team/a"' in lab.lazyfs("status", "--json", inner / "a").stdout
    finally:
        subprocess.run(["umount", inner], check=True)


def test_umount_names_who_uses_it(lab: Lab) -> None:
    lab.image("a", MiB)
    lab.mount(lab.serve().uri)
    script = "import os, sys; os.chdir(sys.argv[1]); print(flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", script, str(lab.mnt)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        refused = lab.lazyfs("umount", lab.mnt, check=False)
        assert refused.returncode == 1
        assert f"is in use by python (pid {process.pid}); close what is open" in refused.stderr
        process.kill()
    lab.umount()


def test_mount_over_a_daemon_that_hangs_waits_for_the_next_one(lab: Lab) -> None:
    lab.image("a", MiB)
    server = lab.serve()
    lab.mount(server.uri)
    lab.signal_daemon(signal.SIGSTOP)
    try:
        refused = lab.lazyfs("mount", server.uri, lab.mnt, check=False)
    finally:
        lab.signal_daemon(signal.SIGCONT)
    assert refused.returncode == 1
    assert "is mounted on" in refused.stderr


def test_mount_over_a_keeper_that_hangs_says_so(lab: Lab) -> None:
    lab.image("a", MiB)
    server = lab.serve()
    lab.mount(server.uri)
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGSTOP)
    lab.signal_daemon(signal.SIGSTOP)
    try:
        refused = lab.lazyfs("mount", server.uri, lab.mnt, check=False)
    finally:
        lab.signal_daemon(signal.SIGCONT)
        lab.daemon.send_signal(signal.SIGCONT)
    assert refused.returncode == 1
    assert "does not answer in 10 s; end it with kill -9, then mount again" in refused.stderr


def test_who_may_not_unmount_is_told(lab: Lab) -> None:
    lab.image("a", MiB)
    lab.mount(lab.serve().uri)
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534); "
        "os.execv(sys.argv[1], [sys.argv[1], '-m', 'lazyfs', 'umount', sys.argv[2]])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script, sys.executable, str(lab.mnt)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"lazyfs: cannot unmount {lab.mnt}: ")
    assert lab.mnt.is_mount()


# -- looking


def test_file_and_head_of_each_image_fetch_next_to_nothing(lab: Lab) -> None:
    for i in range(4):
        lab.image(f"i{i}", 32 * MiB)
    lab.mount(lab.serve().uri, program=REAL)
    paths = sorted(lab.mnt.iterdir())
    subprocess.run(["file", *paths], check=True, capture_output=True)
    for path in paths:
        assert len(pread(path, 0, 512)) == 512
        assert len(pread(path, 32 * MiB - 4096, 4096)) == 4096
    lab.lazyfs("prefetch", lab.mnt / "i0", "--wait")
    images = {image["name"]: image for image in lab.status()["images"]}
    assert images.pop("i0")["state"] == "whole"
    for image in images.values():
        assert image["state"] == "partial"
        assert image["fetched_bytes"] <= 18 * MiB
        assert image["populated_bytes"] == image["last_used_ns"] == 0
    assert lab.status()["jobs"] == []
    assert pread(lab.mnt / "i1", 16 * MiB, 1)
    lab.wait_for_state("i1", "whole")


# -- one export


def test_one_export_that_hangs_holds_up_no_other(lab: Lab) -> None:
    """`ls -l` waits once in all, and only that export fails."""
    names = [f"img{i}" for i in range(60)]
    hang = lab.folder / "hang"
    hang.touch()
    listing = lab.folder / "names"
    listing.write_text("".join(f"{name}\n" for name in [*names, "bad"]))
    server = lab.serve_with(
        "eval",
        "thread_model=echo parallel",
        f"list_exports=cat {listing}",
        f'open=[ "$3" = bad ] && [ -e {hang} ] && exec sleep 30; exit 0',
        "get_size=echo 1048576",
        "pread=head -c $3 /dev/zero",
    )
    lab.mount(server.uri, "--no-populate", "--refresh", "1")
    listed = subprocess.run(
        ["ls", "-l", lab.mnt], capture_output=True, text=True, check=False, timeout=40
    )
    assert listed.stderr.count("\n") == 1
    assert "bad" in listed.stderr
    assert all((lab.mnt / name).stat().st_size == MiB for name in names)
    assert pread(lab.mnt / "img7", 0, 4096) == bytes(4096)
    listing.write_text("".join(f"{name}\n" for name in [*names, "bad", "new"]))
    wait_until(lambda: (lab.mnt / "new").exists(), "the list is followed")
    assert lab.status()["connected"]
    hang.unlink()
    wait_until(lambda: os.path.exists(lab.mnt / "bad"), "it answers")


def test_a_list_of_sizes_waits_once_for_a_server_that_hangs(lab: Lab) -> None:
    for number in range(10):
        lab.image(f"a{number}", MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--io-timeout", "4", "--refresh", "1000")
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        listed = subprocess.run(
            ["ls", "-l", lab.mnt], capture_output=True, text=True, check=False, timeout=30
        )
        assert listed.stderr.count("\n") == 10
        assert not lab.status()["connected"]
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_an_evicted_image_keeps_its_size_without_the_repository(lab: Lab) -> None:
    lab.image("a", MiB)
    server = lab.serve()
    lab.mount(server.uri)
    lab.lazyfs("prefetch", lab.mnt / "a", "--wait")
    server.kill()
    lab.lazyfs("evict", lab.mnt / "a")
    assert (lab.mnt / "a").stat().st_size == MiB
    assert lab.image_status("a")["state"] == "remote"


def test_the_reason_of_a_read_that_failed_names_the_export_that_is_gone(lab: Lab) -> None:
    source = lab.image("a", 32 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate", "--io-timeout", "3", "--refresh", "1000")
    with (lab.mnt / "a").open("rb", buffering=0) as file:
        file.read(4096)
        source.unlink()
        server.kill()
        server.start()
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(file.fileno(), 4096, 16 * MiB)
    wait_until(lambda: "the server refuses export" in lab.log.read_text(), "the log says so")


# -- other servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_debians_nbd_server_says_the_size_only_when_an_export_is_opened(lab: Lab) -> None:
    source = lab.image("a", 4 * MiB)
    config, pid, port = lab.folder / "nbd-server.conf", lab.folder / "pid", free_port()
    config.write_text(
        "[generic]\nallowlist=true\nuser=root\ngroup=root\n"
        f"listenaddr=127.0.0.1\nport={port}\n"
        f"[a]\nexportname={source}\nreadonly=true\n"
    )
    # It puts itself into the background; with -d it would serve one client only.
    subprocess.run(["nbd-server", "-C", config, "-p", pid], check=True)
    try:
        wait_until(lambda: pid.exists() and pid.read_text(), "it has started")
        lab.mount(f"nbd://127.0.0.1:{port}")
        assert (lab.mnt / "a").stat().st_size == 4 * MiB
        assert (lab.mnt / "a").read_bytes() == source.read_bytes()
        lab.wait_for_state("a", "whole")
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)


# -- connections


def test_status_says_since_when_the_repository_does_not_answer(lab: Lab) -> None:
    lab.image("a", 32 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "a", 0, 4096)
    assert lab.status()["message"] == ""
    with stopped(server), readers(lab.mnt / "a", 1):
        wait_until(lambda: "is not answering since " in lab.status()["message"], "it says so", 10)
        assert not lab.status()["connected"]
    wait_until(lambda: lab.status()["connected"], "it answers again")


def test_a_server_that_takes_one_connection_is_shared_by_readers_and_population(lab: Lab) -> None:
    """qemu-nbd serves one client at a time by default, and lets others wait."""
    source = lab.image("a", 48 * MiB)
    path = lab.folder / "one.sock"
    command = ["qemu-nbd", "-r", "-t", "-k", str(path), "-f", "raw", "-x", "a", str(source)]
    with subprocess.Popen(command, preexec_fn=die_with_parent) as server:
        try:
            wait_until(path.exists, "qemu-nbd answers")
            lab.mount(f"nbd+unix:///?socket={path}", "--refresh", "1")
            fd = os.open(lab.mnt / "a", os.O_RDONLY | os.O_DIRECT)
            try:
                buffer = mmap.mmap(-1, 4096)
                content = source.read_bytes()
                for i in range(200):
                    offset = i * 7919 % 12288 * 4096
                    assert os.preadv(fd, [buffer], offset) == 4096
                    assert buffer[:] == content[offset : offset + 4096]
                lab.wait_for_state("a", "whole")  # while it is open
            finally:
                os.close(fd)
            assert lab.status()["connected"]
        finally:
            server.terminate()


def test_a_server_that_takes_only_large_aligned_requests(lab: Lab) -> None:
    source = lab.image("a", 4 * MiB + 64 * KiB)
    server = lab.serve(
        "blocksize-policy",
        parameters=(
            "blocksize-minimum=64K", "blocksize-preferred=64K", "blocksize-error-policy=error",
        ),
    )  # fmt: skip
    lab.mount(server.uri, "--block-size", "4K")
    assert pread(lab.mnt / "a", 12345, 100) == source.read_bytes()[12345:12445]
    assert (lab.mnt / "a").read_bytes() == source.read_bytes()
    lab.wait_for_state("a", "whole")
    lab.umount()
    assert (lab.mnt / "a").read_bytes() == source.read_bytes()
    lab.mount(server.uri)
    lab.lazyfs("evict", lab.mnt / "a")
    lab.lazyfs("prefetch", lab.mnt / "a", "--wait")


def test_files_of_the_disk_at_its_root_are_no_strangers(lab: Lab) -> None:
    lab.image("a", MiB)
    (lab.mnt / "aquota.user").touch()
    (lab.mnt / ".nfs000000001").touch()
    (lab.mnt / ".Trash-0").mkdir()
    (lab.mnt / ".Trash-0" / "file").touch()
    lab.mount(lab.serve().uri)
    assert os.listdir(lab.mnt) == ["a"]


def test_a_folder_says_when_names_came(lab: Lab) -> None:
    lab.image("a", MiB)
    lab.mount(lab.serve().uri, "--refresh", "0.3")
    before = lab.mnt.stat()
    lab.image("b", MiB)
    wait_until(lambda: lab.mnt.stat().st_mtime_ns > before.st_mtime_ns, "its time changes")
    assert sorted(os.listdir(lab.mnt)) == ["a", "b"]
