"""A FUSE file system with one file that receives the kernel's request for the file's attributes and
never answers it.

The process that asked waits until this file system's process ends. Even SIGKILL does not end that
wait, as with a network file system whose server is gone. The file system runs in a process of its
own, because a process that uses its own file system would wait for itself.
"""

import ctypes
import errno
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyfs.kernel.session import FUSE_INIT, IN_HEADER, INIT_OUT, OUT_HEADER

SIZE = 1 << 20

# include/uapi/linux/fuse.h
_LOOKUP, _FORGET, _GETATTR, _OPEN, _STATFS, _RELEASE, _FLUSH = 1, 2, 3, 14, 17, 18, 25
_ROOT, _FILE = 1, 2
# nodeid, generation, entry_valid, attr_valid, and their nanoseconds
_ENTRY_OUT = struct.Struct("=QQQQII")
_ATTR_OUT = struct.Struct("=QII")  # attr_valid, its nanoseconds, dummy
_OPEN_OUT = struct.Struct("=QII")
_ATTR = struct.Struct("=6Q10I")

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class HangingFuse:
    """Runs such a file system, mounted with the type `kind` until `close`."""

    def __init__(self, mountpoint: Path, kind: str, valid_s: int = 3600) -> None:
        """`valid_s` is how long the kernel may keep the file's attributes."""
        self.mountpoint = mountpoint
        self.path = mountpoint / "file"
        self._process = subprocess.Popen(
            [sys.executable, __file__, mountpoint, kind, str(valid_s)],
            stdout=subprocess.PIPE,
            bufsize=0,
            preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"mounted\n"

    def detach(self) -> None:
        subprocess.run(["umount", "-l", self.mountpoint], check=True)

    def was_asked(self) -> bool:
        """Return whether the file system was asked for the attributes."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let it answer nothing at all meanwhile, not even that a file was closed."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the file system, so that processes which wait for it get an error."""
        self._process.kill()
        self._process.communicate()
        if str(self.mountpoint) in Path("/proc/self/mountinfo").read_text():
            self.detach()


def _serve(mountpoint: str, kind: str, valid_s: int) -> None:
    fd = os.open("/dev/fuse", os.O_RDWR)
    words = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    if _libc.mount(b"hanging", os.fsencode(mountpoint), kind.encode(), 0, words.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    print("mounted", flush=True)
    while True:
        request = os.read(fd, 1 << 20)
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        answer = _answer(opcode, node, valid_s)
        if answer is not None:
            error, body = answer
            with suppress(FileNotFoundError):  # the one who asked is gone
                os.write(fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body)


def _answer(opcode: int, node: int, valid_s: int) -> tuple[int, bytes] | None:
    if opcode == _STATFS:
        print("asked", flush=True)
        return None
    if opcode == FUSE_INIT:
        return 0, INIT_OUT.pack(7, 31, 0, 0, 16, 12, 1 << 17, 1, 0, 0, 0, 0)
    if opcode == _LOOKUP:
        return 0, _ENTRY_OUT.pack(_FILE, 0, 3600, valid_s, 0, 0) + _attributes(_FILE)
    if opcode == _GETATTR:
        return 0, _ATTR_OUT.pack(valid_s, 0, 0) + _attributes(node)
    if opcode == _OPEN:
        return 0, _OPEN_OUT.pack(1, 0, 0)
    if opcode in (_FLUSH, _RELEASE):
        return 0, b""
    return None if opcode == _FORGET else (errno.ENOSYS, b"")


def _attributes(node: int) -> bytes:
    mode = 0o040755 if node == _ROOT else 0o100644
    return _ATTR.pack(node, SIZE, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
