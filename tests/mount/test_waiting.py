"""What one image, server, reader or disk makes wait, and what not."""

import ctypes
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import KiB, Lab, MiB, Nbdkit, die_with_parent, pread, wait_until

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
    text = Path(f"/proc/{lab.daemon.pid}/status").read_text()
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
