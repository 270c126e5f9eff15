"""Mounts, and answers FUSE_INIT.

lazyfs opens /dev/fuse, mounts and answers FUSE_INIT itself. libfuse 3.14 and pyfuse3 offer no way
to set what a cache needs: background requests, readahead, passthrough and resend. The keeper does
this once. Each of its daemons has libfuse, which reads a made-up FUSE_INIT from the socket on which
the keeper sends requests; libfuse's answer to that goes no further.

All structures are native-endian, as in include/uapi/linux/fuse.h (protocol 7.40, Linux 6.9). Other
kernels say what they lack, and lazyfs does without that.
"""

import ctypes
import errno
import fcntl
import logging
import os
import signal
import socket
import struct
import subprocess
import threading

from lazyfs import errors
from lazyfs.host import mounts
from lazyfs.host.mounts import FS_TYPE
from lazyfs.units import KiB, MiB

logger = logging.getLogger(__name__)

# fuse.h: opcode and header sizes
FUSE_READ = 15
FUSE_INIT = 26
# fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, extlen, padding
IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")  # fuse_out_header: len, error, unique
# fuse_init_in: major, minor, max_readahead, flags, flags2, unused[11]
INIT_IN = struct.Struct("=5I44x")
INIT_IN_SHORT = struct.Struct("=4I")  # as kernels before 5.17 send it
# fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold,
# max_write, time_gran, max_pages, map_alignment, flags2, max_stack_depth, unused[6]
INIT_OUT = struct.Struct("=4IHHIIHHII24x")
BACKING_MAP = struct.Struct("=iIQ")  # fuse_backing_map: fd, flags, padding
MAJOR, MINOR = 7, 40
LIBFUSE_MINOR = 38  # what libfuse 3.14 speaks
OLDEST_MINOR = 31  # Linux 5.4; nothing older has been tried

# fuse.h: FUSE_INIT flags
ASYNC_READ = 1 << 0
# Without this a read with O_DIRECT through Linux AIO is a synchronous one: io_submit(2) waits.
ASYNC_DIO = 1 << 15
BIG_WRITES = 1 << 5
DO_READDIRPLUS = 1 << 13
PARALLEL_DIROPS = 1 << 18
ABORT_ERROR = 1 << 21
MAX_PAGES = 1 << 22
EXPLICIT_INVAL_DATA = 1 << 25
INIT_EXT = 1 << 30  # the flags from bit 32 on are in flags2
PASSTHROUGH = 1 << 37  # Linux 6.9
# Linux 6.9: another process may go on with the connection, and ask for what is unanswered.
HAS_RESEND = 1 << 39
BASIC = (
    ASYNC_READ
    | BIG_WRITES
    | DO_READDIRPLUS
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | ABORT_ERROR
    | MAX_PAGES
    | EXPLICIT_INVAL_DATA
)
WANTED = BASIC | INIT_EXT | PASSTHROUGH | HAS_RESEND

# fuse.h: ioctls of /dev/fuse, _IOW(229, 1, struct fuse_backing_map) and _IOW(229, 2, uint32_t)
FUSE_DEV_IOC_BACKING_OPEN = 0x4010E501
FUSE_DEV_IOC_BACKING_CLOSE = 0x4004E502

NOTIFY_RESEND = 7  # Linux 6.9
NOTIFY_INC_EPOCH = 8  # fuse.h: enum fuse_notify_code; Linux 6.16

# mount.h
MS_NOSUID, MS_NODEV, MS_NOATIME = 2, 4, 1024
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
"""The signals that unmount."""

MAX_READ = 1 * MiB
"""The longest read request: 256 pages, which is the most that the kernel takes."""
MAX_WRITE = 4 * KiB
"""Nothing is ever written. This is small because it also limits the kernel's idea of a request
buffer."""
MAX_BACKGROUND = 16384
"""The most requests for readahead and for direct reads (ASYNC_DIO) in flight for the whole mount.
All images share them, so readers of one image whose repository is gone must not use them up
(`engine.fetch.waiting_reads`). A request that waits takes the daemon 15 KiB, all of
them 240 MiB. For other users than root the kernel lowers it to
/sys/module/fuse/parameters/max_user_bgreq."""

MAX_STACK_DEPTH = 1
"""The plain files may be on a file system that is not itself stacked, as overlayfs is. This is
what FUSE_PASSTHROUGH means in fs/fuse/inode.c. With 2, nobody could put an overlayfs over our
mount."""

_INIT_BUFFER = 128 * KiB


def encode_init_in(flags: int) -> bytes:
    """Return the made-up FUSE_INIT request for libfuse."""
    body = INIT_IN.pack(MAJOR, LIBFUSE_MINOR, MAX_READ, flags & BASIC, 0)
    return IN_HEADER.pack(IN_HEADER.size + len(body), FUSE_INIT, 1, 0, 0, 0, 0, 0, 0) + body


def answer_init(request: bytes, wanted: int = WANTED) -> tuple[bytes, int]:
    """Return the reply to the kernel's FUSE_INIT, and the flags on which both sides agree (64
    bits).

    Raises:
        UserError: the kernel is too old.
    """
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != FUSE_INIT:
        raise errors.StateError(f"the kernel's first request has opcode {opcode}, not FUSE_INIT")
    major, minor, readahead, offered = INIT_IN_SHORT.unpack_from(request, IN_HEADER.size)
    if (major, minor) < (MAJOR, OLDEST_MINOR):
        raise errors.LastingError(
            f"the kernel speaks FUSE {major}.{minor}; "
            f"lazyfs needs {MAJOR}.{OLDEST_MINOR} (Linux 5.4)"
        )
    if offered & INIT_EXT and len(request) >= IN_HEADER.size + INIT_IN.size:
        offered |= INIT_IN.unpack_from(request, IN_HEADER.size)[4] << 32
    flags = offered & wanted
    body = INIT_OUT.pack(
        MAJOR, min(minor, MINOR), min(readahead, MAX_READ), flags & 0xFFFFFFFF,
        MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4, MAX_WRITE, 1, MAX_READ // (4 * KiB), 0,
        flags >> 32, MAX_STACK_DEPTH if flags & PASSTHROUGH else 0,
    )  # fmt: skip
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body, flags


class KernelSession:
    """Holds a FUSE connection that is mounted and negotiated.

    The keeper has the first one. A daemon has another one for the same connection, with a
    descriptor of its own.
    """

    def __init__(self, mountpoint: str, fd: int, device: str, flags: int) -> None:
        """Take over `fd`, the connection."""
        self.mountpoint = mountpoint
        self.fd = fd
        self.device = device
        """The device of the mount as "major:minor"."""
        self.flags = flags
        """The flags of FUSE_INIT on which both sides agree (64 bits)."""
        self.detached = device not in mounts.devices_at(mountpoint)
        """True if it was unmounted. Files that were open still work, and another file system may
        be mounted there."""
        self._unmounting = threading.Lock()

    def forget_names(self) -> bool:
        """Let the kernel ask again for every name when the name is next used.

        This takes no lock, and cannot block. A notification that one name is invalid would wait for
        the folder's lock, which may be held by a lookup that we have not answered. If the daemon
        were killed in that moment, it would not let go of its connection, and everybody who uses
        the mount would hang until somebody aborts it (`clear_away`).

        Every name becomes outdated, not just one. So /proc/PID/fd may show any open file as
        "(deleted)", and what is mounted on a path of this mount is detached when that path is next
        looked up. The name of an image changes only a few times in its life.

        Returns:
            False if the kernel cannot do this, because it is older than Linux 6.16.
        """
        try:
            os.write(self.fd, OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_INC_EPOCH, 0))
        except OSError as error:
            return error.errno != errno.EINVAL  # after any other error the mount is gone
        return True

    def resend(self) -> bool:
        """Let the kernel send again what was taken and is not answered.

        Returns:
            False if the kernel cannot do this, because it is older than Linux 6.9.
        """
        try:
            os.write(self.fd, OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0))
        except OSError as error:
            return error.errno != errno.EINVAL
        return True

    def open_backing(self, fd: int) -> int:
        """Register a plain file with the connection. Return its backing id, for OPEN replies.

        The file stays open in the kernel until `close_backing`, even if this process closes `fd` or
        ends.

        Raises:
            OSError: EPERM without CAP_SYS_ADMIN, or if passthrough was not negotiated. ELOOP if the
                file system of the file is stacked. EOPNOTSUPP or ENOTTY if the kernel was built
                without passthrough.
        """
        # With a bytearray, Python returns what the system call returned.
        backing_id: int = fcntl.ioctl(
            self.fd, FUSE_DEV_IOC_BACKING_OPEN, bytearray(BACKING_MAP.pack(fd, 0, 0))
        )
        return backing_id

    def close_backing(self, backing_id: int) -> None:
        """Undo `open_backing`.

        Every file that was opened with the id must have been released, because the kernel resolves
        the id only when it handles the OPEN reply.
        """
        fcntl.ioctl(self.fd, FUSE_DEV_IOC_BACKING_CLOSE, struct.pack("=I", backing_id))

    def unmount(self, lazy: bool) -> bool:
        """Unmount this mount. Thread-safe.

        File systems that are mounted below this one or over it are left alone. It is normal that a
        disk is mounted below the mountpoint.

        Args:
            lazy: unmount even if files are open.

        Returns:
            False if somebody has unmounted it already.

        Raises:
            OSError: EBUSY, because files are open, or because another file system is mounted over
                this one.
        """
        with self._unmounting:
            there = mounts.devices_at(self.mountpoint)
            if self.device in there:
                if there[-1] != self.device:
                    raise OSError(
                        errno.EBUSY, f"another file system is mounted over {self.mountpoint}"
                    )
                try:
                    unmount(self.mountpoint, lazy)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    there = []  # somebody has unmounted it meanwhile
            self.detached = True
            return self.device in there


def mount(mountpoint: str, source: str, passthrough: bool = True) -> KernelSession:
    """Mount at `mountpoint`, and answer FUSE_INIT. Blocks for a few milliseconds.

    The mount does not have MS_RDONLY, because then the kernel would refuse utime(2) and unlink(2)
    without asking us. `fuse_adapter.py` refuses what it must.

    If root mounts, the mount is open to all users, and the kernel checks permissions. If a user
    mounts, through fusermount3, it is open to that user only.

    Raises:
        UserError: it could not be mounted.
    """
    as_root = os.geteuid() == 0
    fd = _mount_as_root(mountpoint, source) if as_root else _mount_as_user(mountpoint, source)
    session = KernelSession(mountpoint, fd, mounts.devices_at(mountpoint)[-1], 0)
    try:
        # Passthrough is asked for only if it is used. It makes our file system a layer of a stack,
        # and a stack may have only two.
        wanted = WANTED if passthrough else WANTED & ~PASSTHROUGH
        reply, session.flags = answer_init(os.read(fd, _INIT_BUFFER), wanted)
        os.write(fd, reply)
    except BaseException:
        session.unmount(lazy=True)
        raise
    return session


def _mount_as_root(mountpoint: str, source: str) -> int:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise errors.UserError(
            f"cannot open /dev/fuse: {error.strerror}; load the fuse module"
        ) from error
    options = (
        f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,"
        f"max_read={MAX_READ}"
    )
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(source), os.fsencode(mountpoint)
    if libc.mount(*paths, FS_TYPE.encode(), MS_NOSUID | MS_NODEV | MS_NOATIME, options.encode()):
        code = ctypes.get_errno()
        os.close(fd)
        raise errors.UserError(f"cannot mount on {mountpoint}: {os.strerror(code)}")
    return fd


def _mount_as_user(mountpoint: str, source: str) -> int:
    """Mount with fusermount3, and return the connection.

    fusermount3 sends it over the socket that _FUSE_COMMFD names (libfuse, lib/mount.c).
    """
    subtype = FS_TYPE.partition(".")[2]
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = (
        f"rw,nosuid,nodev,noatime,default_permissions,max_read={MAX_READ},"
        f"subtype={subtype},fsname={name}"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", options, "--", mountpoint],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError as error:
            raise errors.UserError(
                "fusermount3 is missing: install the package fuse3, or mount as root"
            ) from error
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if done.returncode or not fds:
        raise errors.UserError(
            f"cannot mount on {mountpoint}: {done.stderr.strip() or 'fusermount3 failed'}"
        )
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(mountpoint: str, lazy: bool) -> None:
    """Unmount a FUSE file system, as root or with fusermount3.

    Args:
        mountpoint: where it is mounted.
        lazy: unmount even if files are open.

    Raises:
        OSError: EBUSY while files are open, EINVAL if nothing is mounted there, EPERM if this user
            may not.
    """
    if os.geteuid() != 0:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            message = done.stderr.strip().removeprefix("fusermount3: ")
            gone = "not found" in message or "not mounted" in message
            busy = errno.EBUSY if "busy" in message.lower() else errno.EPERM
            raise OSError(errno.EINVAL if gone else busy, message)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # Not through a symbolic link that somebody has put there since it was looked up.
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    if libc.umount2(os.fsencode(mountpoint), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def clear_away(mount: mounts.Mount) -> None:
    """Unmount what a killed daemon left, even if processes still wait for it.

    What is mounted below it or over it is left alone. The unmount is forced first, because a thread
    of the daemon that hangs in the kernel may keep the connection, and force ends that.

    Raises:
        OSError: EBUSY if another file system is mounted over it, or what fusermount3 reports.
    """
    place = mount.mountpoint
    if mounts.devices_at(place)[-1:] != [mount.device]:
        raise OSError(errno.EBUSY, f"another file system is mounted over {place}")
    flags = MNT_FORCE | UMOUNT_NOFOLLOW
    if os.geteuid() == 0 and not ctypes.CDLL(None).umount2(os.fsencode(place), flags):
        return
    try:
        if mounts.devices_at(place)[-1:] == [mount.device]:
            unmount(place, lazy=True)
    except OSError:
        if mount.device in mounts.devices_at(place):  # otherwise somebody has unmounted it
            raise
