"""The messages between the keeper and its daemon: one JSON object each, with descriptors beside it.

A daemon asks, and the keeper does what it is asked at once. Only messages with an answer below are
answered. doc/ARCHITECTURE.md describes each of them; VERSION changes with them, because the two
processes may come from different versions of lazyfs.

Source: unix(7), SOCK_SEQPACKET and SCM_RIGHTS.
"""

import array
import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = 1
MAX_MESSAGE = 64 * 1024
MAX_FDS = 16

DESCRIPTOR = "LAZYFS_KEEPER"
"""The environment variable that tells a daemon the number of its end of the channel."""

OPENED = struct.Struct("=Qii")
"""An entry of the table of open files: inode, how many have it open, backing id or 0."""

Message = dict[str, Any]


class Gone(OSError):
    """The other process has ended."""


class Channel:
    """One end of the channel. Not thread-safe."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        """Return the descriptor, to wait for messages."""
        return self._end.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message. The descriptors stay open here.

        Raises:
            Gone: the other process has ended.
        """
        data = json.dumps(message).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._end.sendmsg([data], rights)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Gone(*error.args) from error

    def receive(self) -> tuple[Message, list[int]]:
        """Return the next message and its descriptors, which are not inherited.

        Raises:
            Gone: the other process has ended.
            OSError, ValueError: it is no message, or too few files may be open for it.
        """
        try:
            data, fds, flags, _ = socket.recv_fds(self._end, MAX_MESSAGE, MAX_FDS)
        except ConnectionResetError as error:
            raise Gone(*error.args) from error
        for fd in fds:
            os.set_inheritable(fd, False)
        if not data:
            raise Gone("the other process has ended")
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            for fd in fds:
                os.close(fd)
            raise OSError(errno.EMFILE, "a message or its descriptors did not fit")
        message = json.loads(data)
        assert isinstance(message, dict)
        return message, fds

    def close(self) -> None:
        """Close this end."""
        self._end.close()


@dataclass(frozen=True, slots=True)
class Shown:
    """Says which bytes of a file the keeper may read, and where they lie."""

    inode: int
    size: int
    """Of the whole file, in bytes."""
    data_offset: int = 0
    data_size: int = 0
    """The part of the file that lies in the cache file, at the same offsets."""
    block_shift: int = 0
    """The block size of the map, as a power of two."""


@dataclass(frozen=True, slots=True)
class Orphan:
    """Describes a file that is open and shown, and whose image has lost its name."""

    inode: int
    export: str
    size: int
    identity: str
    format: str
    block_size: int
    may_fetch: bool
    """False if the export has another version now."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Holds what a daemon needs to go on with the kernel's connection."""

    device: str
    flags: int
    fuse_fd: int
    relay_fd: int
    """Where the requests come from. pyfuse3's session."""
    done_fd: int
    """Memory in which the daemon notes what it has answered by itself."""
    counters_fd: int
    """Memory in which the keeper counts the reads that it has answered."""
    control_fd: int
    """The control socket, which listens already."""
    opened: list[tuple[int, int, int]] = field(default_factory=list)
    """What is open: inode, how many times, and the backing id or 0."""


class Keeper:
    """The daemon's end. Thread-safe. Each call takes a fraction of a millisecond."""

    def __init__(self, channel: Channel) -> None:
        """Greet the keeper.

        Raises:
            Gone: there is none any more.
        """
        self._channel = channel
        self._lock = threading.Lock()
        hello, _ = self._ask({"do": "hello", "version": VERSION})
        if hello["version"] != VERSION:
            raise OtherVersion(
                f"the keeper speaks version {hello['version']} of the channel, this is {VERSION}"
            )
        self.pid: int = hello["pid"]
        """The keeper's, which is the one to be signalled."""
        self.mounted: bool = hello["mounted"]
        """True if it is mounted already: this daemon goes on where another has ended."""
        self.mountpoint: str = hello["mountpoint"]
        self.cache_dir: str = hello["cache_dir"]
        self.restarts: int = hello["restarts"]
        _, (orphans_fd,) = self._ask({"do": "orphans"})
        with os.fdopen(orphans_fd, "rb") as file:
            file.seek(0)
            self.orphans = [Orphan(**one) for one in json.load(file)]
        """Files that earlier daemons have shown, and that no catalog knows any more."""
        self.upgrade_trouble: str = hello["upgrade_trouble"]
        """Why the latest upgrade has failed, or ""."""

    def _tell(self, message: Message, fds: Sequence[int] = ()) -> None:
        with self._lock:
            self._channel.send(message, fds)

    def _ask(self, message: Message, fds: Sequence[int] = ()) -> tuple[Message, list[int]]:
        with self._lock:
            self._channel.send(message, fds)
            answer, answered = self._channel.receive()
        if "failed" in answer:
            raise OSError(errno.EIO, f"the keeper cannot do it: {answer['failed']}")
        return answer, answered

    def keep(self, name: str, fd: int) -> None:
        """Leave a descriptor to the next daemon. It replaces one of the same name."""
        self._tell({"do": "keep", "name": name}, [fd])

    def take(self, name: str) -> int | None:
        """Return the descriptor that an earlier daemon has left, which the keeper keeps as well."""
        _, fds = self._ask({"do": "take", "name": name})
        return fds[0] if fds else None

    def mount(self) -> Connection:
        """Mount, if it is not yet, and take over the connection. Called once.

        Raises:
            CannotMount: the message says why.
        """
        answer, fds = self._ask({"do": "mount"})
        if "error" in answer:
            raise CannotMount(answer["error"])
        fuse_fd, relay_fd, done_fd, counters_fd, control_fd, opened_fd = fds
        with os.fdopen(opened_fd, "rb") as file:
            file.seek(0)
            opened = list(OPENED.iter_unpack(file.read()))
        return Connection(
            answer["device"],
            answer["flags"],
            fuse_fd,
            relay_fd,
            done_fd,
            counters_fd,
            control_fd,
            opened,
        )

    def show(self, shown: Shown, fd: int | None, map_fd: int | None) -> None:
        """Let the keeper read a file, as far as its map says that it is present.

        Args:
            shown: what lies where. A file that is shown under the same inode is withdrawn.
            fd: the cache file. None if there is none: then nothing is read, and all counts as data.
            map_fd: its map in memory. None if all of it is present.
        """
        fds = [one for one in (fd, map_fd) if one is not None]
        self._ask(  # or somebody who has just opened it could seek before it is shown
            {
                "do": "show",
                "inode": shown.inode,
                "size": shown.size,
                "data_offset": shown.data_offset,
                "data_size": shown.data_size,
                "block_shift": shown.block_shift,
                "has_file": fd is not None,
                "has_map": map_fd is not None,
            },
            fds,
        )

    def known_of(self, inode: int) -> tuple[int, int] | None:
        """Return what an earlier daemon has shown for an inode, or None.

        Returns:
            Descriptors of the map in memory, and of the cache file.
        """
        _, fds = self._ask({"do": "known", "inode": inode})
        return (fds[0], fds[1]) if fds else None

    def orphan(self, orphan: Orphan) -> None:
        """Let the next daemon know what a file was that is shown, until it is withdrawn."""
        self._tell({"do": "orphan", **asdict(orphan)})

    def keep_name(self, inode: int) -> None:
        """Undo `orphan`."""
        self._tell({"do": "keep name", "inode": inode})

    def withdraw(self, inode: int) -> None:
        """Let the keeper answer no read from a file any more. It has obeyed when this returns."""
        self._ask({"do": "withdraw", "inode": inode})

    def serving(self, notes: Sequence[str], io_timeout_s: float) -> None:
        """Say that requests are answered from now on.

        Args:
            notes: what the user should know although it is mounted.
            io_timeout_s: after so long a read fails, even if this daemon hangs.
        """
        self._tell({"do": "serving", "notes": list(notes), "io_timeout_s": io_timeout_s})

    def restored(self) -> None:
        """Say that everything is shown again that will be. What is not, is withdrawn."""
        self._tell({"do": "restored"})

    def alive(self, status: str) -> None:
        """Say that this daemon is alive, and how it is, in one line."""
        self._tell({"do": "alive", "status": status})

    def failed(self, kind: str, message: str) -> None:
        """Say why this daemon cannot begin.

        Args:
            kind: "user", or "lasting" if to try again does not help, or "usage".
            message: for the user.
        """
        self._tell({"do": "failed", "kind": kind, "message": message})

    def hand_over(self, program: Sequence[str]) -> None:
        """Say that this daemon ends, and that `program` is to be the next one.

        Args:
            program: the command before the words of `lazyfs mount`.
        """
        self._tell({"do": "handing over", "program": list(program)})

    def ending(self) -> None:
        """Say that this daemon ends because the mount does, and that no other is to be started."""
        self._tell({"do": "ending"})


class OtherVersion(Exception):
    """The keeper and this daemon do not understand each other."""


class CannotMount(Exception):
    """The keeper could not mount."""
