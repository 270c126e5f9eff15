"""Crashes and power cuts for tests of stores.

A crash (kill -9) loses nothing that was written: `kill_after` ends a child between two calls. A
power cut can lose any of what was written since the last sync: `Recorder` records what is done to
the files, and `states_after_power_cut` makes the states in which the disk can be then.
"""

import errno
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PARTIAL = ".lazyfs/partial"
SECTOR = 512


# -- crashes

CHANGING_CALLS = (
    "pwrite", "ftruncate", "posix_fallocate", "fdatasync", "fsync", "rename", "link", "unlink", "mkdir",
    "fchmod", "fchown", "utime",
)  # fmt: skip
"""The functions of `os` with which a store changes the disk."""

_SYNCS = ("fdatasync", "fsync")


def kill_after(calls: int, run: Callable[[], None]) -> bool:
    """Run `run` in a child that is killed (kill -9) after so many changes of the disk.

    Syncs count as changes, but nothing is synced, because the disk keeps its power. The result is
    False if the child ended before it was killed.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns if there are threads, such as trio's idle ones. The child takes none of
        # their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            _die_after(calls)
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed: see its traceback"
    return False


def _die_after(calls: int) -> None:
    left = calls

    def wrap(name: str, real: Callable[..., object]) -> None:
        def wrapped(*arguments: object, **named: object) -> object:
            nonlocal left
            result = real(*arguments, **named) if name not in _SYNCS else None
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, wrapped)

    for name in CHANGING_CALLS:
        wrap(name, getattr(os, name))


def without_syncs(patch: pytest.MonkeyPatch) -> None:
    """Turn syncs off, for copies that meet no power cut."""
    for name in _SYNCS:
        patch.setattr(os, name, lambda _fd: None)


class FullDisk:
    """Counts the calls that need space, and fails from one of them on, a write after part of it."""

    CALLS = (
        "pwrite",
        "posix_fallocate",
        "ftruncate",
        "mkdir",
        "link",
        "rename",
        "fdatasync",
        "fsync",
    )

    def __init__(
        self, patch: pytest.MonkeyPatch, fail_at: int, calls: tuple[str, ...] = CALLS
    ) -> None:
        """`fail_at` is the first call that fails, counted from 0."""
        self.calls = 0
        self._fail_at = fail_at
        for name in calls:
            self._wrap(patch, name, getattr(os, name))

    @property
    def met(self) -> bool:
        """Return whether any call failed."""
        return self.calls > self._fail_at

    def _wrap(self, patch: pytest.MonkeyPatch, name: str, real: Callable[..., object]) -> None:
        def wrapped(*arguments: object, **named: object) -> object:
            self.calls += 1
            if self.calls <= self._fail_at:
                return real(*arguments, **named)
            if self.calls == self._fail_at + 1 and name == "pwrite":
                fd, data, offset = arguments
                assert isinstance(data, (bytes, memoryview))
                if half := len(data) // 2 // SECTOR * SECTOR:
                    return real(fd, data[:half], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, name, wrapped)


# -- power cuts


NOT_OF_FILES = ("sync of names", "told")
"""The kinds of events whose name is not that of a file."""


@dataclass(frozen=True)
class Event:
    """Describes one change of a file or of its names, or a sync.

    A sync promises that the earlier changes of that file, or of the names in a folder, are on disk.

    kind            name                        offset, data
    write           the file's                  where, what
    size, grow      the file's                  the new size; the least size
    sync            the file's
    rename, link    the file's                  (target: its new or second name)
    sync of names   the folder's, "partial" or the last part of its path
    told            what was noted elsewhere, durably

    A file keeps the name under which it was first seen, so that a rename does not lose its track.
    """

    kind: str
    name: str
    offset: int = 0
    data: bytes = b""
    target: str = ""


class Recorder:
    """Records what is done to the partial files, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self._first_names: dict[str, str] = {}
        for name in ("pwrite", "ftruncate", "posix_fallocate", "fdatasync", "fsync"):
            self._wrap(patch, name, getattr(os, name))
        for name in ("rename", "link"):
            self._wrap_naming(patch, name, getattr(os, name))

    def _wrap(self, patch: pytest.MonkeyPatch, name: str, real: Callable[..., object]) -> None:
        def wrapped(fd: int, *arguments: object) -> object:
            result = real(fd, *arguments)
            path = os.readlink(f"/proc/self/fd/{fd}")
            if f"/{PARTIAL}/" in path:
                self._note(name, self._file(os.path.basename(path)), result, *arguments)
            elif os.path.isdir(path):
                self.events.append(Event("sync of names", os.path.basename(path)))
            return result

        patch.setattr(os, name, wrapped)

    def _note(self, call: str, name: str, result: object, *arguments: Any) -> None:
        match call, arguments:
            case "pwrite", (data, int(offset)):
                self.events.append(Event("write", name, offset, bytes(data)[: int(str(result))]))
            case "ftruncate", (int(length),):
                self.events.append(Event("size", name, length))
            case "posix_fallocate", (int(offset), int(length)):
                self.events.append(Event("grow", name, offset + length))
            case _:
                self.events.append(Event("sync", name))

    def _wrap_naming(
        self, patch: pytest.MonkeyPatch, kind: str, real: Callable[..., object]
    ) -> None:
        def wrapped(
            old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int, **named: object
        ) -> None:
            real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **named)
            name, target = _name(src_dir_fd, old), _name(dst_dir_fd, new)
            self.events.append(Event(kind, self._file(name), target=target))
            if kind == "rename":
                self._first_names[target] = self._file(name)

        patch.setattr(os, kind, wrapped)

    def _file(self, name: str) -> str:
        return self._first_names.get(name, name)


def _name(folder_fd: int, name: str) -> str:
    """Return the name of a file as events have it."""
    folder = os.readlink(f"/proc/self/fd/{folder_fd}")
    return name if folder.endswith(f"/{PARTIAL}") else f"{os.path.basename(folder)}/{name}"


@dataclass
class Disk:
    """Holds what is on the disk: the files of a cache directory."""

    files: dict[str, bytearray]
    names: dict[str, str] = field(default_factory=dict)
    """The files by their names. A name with a "/" is a path in the cache directory; any other is
    the name of a partial file."""

    @property
    def key(self) -> tuple[tuple[str, str, bytes], ...]:
        """Return what makes this state differ from another."""
        return tuple(
            sorted((name, file, bytes(self.files[file])) for name, file in self.names.items())
        )

    def write(self, folder: Path) -> None:
        """Make the cache directory `folder` equal to this state; it may have another state now."""
        partial = folder / PARTIAL
        partial.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("*/*"), *partial.iterdir()]:
            if not path.is_dir():
                path.unlink()
        made: dict[str, Path] = {}
        for name, file in self.names.items():
            path = folder / name if "/" in name else partial / name
            path.parent.mkdir(exist_ok=True)
            if file in made:
                path.hardlink_to(made[file])
            else:
                path.write_bytes(self.files[file])
                made[file] = path


def apply(content: bytearray, event: Event) -> None:
    if event.kind == "write":
        if len(content) < event.offset + len(event.data):
            content.extend(bytes(event.offset + len(event.data) - len(content)))
        content[event.offset : event.offset + len(event.data)] = event.data
    elif event.kind == "grow":
        content.extend(bytes(max(0, event.offset - len(content))))
    elif event.kind == "size":
        del content[event.offset :]
        content.extend(bytes(event.offset - len(content)))


def torn(event: Event, dice: random.Random) -> list[Event]:
    """Return writes of only some of the sectors of a write."""
    if event.kind != "write":
        return [event]
    pieces = []
    start = 0
    while start < len(event.data):
        # a sector of the disk is written whole or not at all
        end = start + SECTOR - (event.offset + start) % SECTOR
        pieces.append(Event("write", event.name, event.offset + start, event.data[start:end]))
        start = end
    return [piece for piece in pieces if dice.random() < 0.5]


LUCK = ("all", "none", "some", "some", "torn", "torn")
"""What can happen to writes that were not synced."""


def states_after_power_cut(
    before: dict[str, bytes],
    events: list[Event],
    dice: random.Random,
    lucks: tuple[str, ...] = LUCK,
) -> Iterator[tuple[int, Disk]]:
    """Yield, for a cut after each event, (number of events, state of the disk).

    A state has what was synced, and any part of the rest. The file system keeps the order of
    changes of size, as a journal does. It keeps, loses or tears writes. A change of a name that was
    not synced in each folder that it concerns may be lost, alone or with others.
    """
    for cut in range(len(events) + 1):
        for luck in lucks:
            disk = Disk({name: bytearray(content) for name, content in before.items()})
            disk.names = {
                name: name
                for name in [*before, *(e.name for e in events if e.kind not in NOT_OF_FILES)]
            }
            for name in disk.names:
                mine = [
                    event
                    for event in events[:cut]
                    if event.name == name and event.kind not in ("rename", "link")
                ]
                _replay(disk.files.setdefault(name, bytearray()), mine, luck, dice)
            _replay_names(disk.names, events[:cut], luck, dice)
            yield cut, disk


def _replay(content: bytearray, events: list[Event], luck: str, dice: random.Random) -> None:
    synced = max((i + 1 for i, event in enumerate(events) if event.kind == "sync"), default=0)
    for event in events[:synced]:
        apply(content, event)
    sizes_lost = False
    for event in events[synced:]:
        lost = luck == "none" or (luck == "some" and dice.random() < 0.5)
        if event.kind in ("size", "grow"):
            sizes_lost = sizes_lost or lost
            lost = sizes_lost
        if lost:
            continue
        for piece in torn(event, dice) if luck == "torn" else [event]:
            if not sizes_lost:
                apply(content, piece)


def _replay_names(
    names: dict[str, str], events: list[Event], luck: str, dice: random.Random
) -> None:
    for i, event in enumerate(events):
        if event.kind not in ("rename", "link"):
            continue
        synced = {later.name for later in events[i:] if later.kind == "sync of names"}
        concerned = {_folder(event.target)}
        if event.kind == "rename":
            concerned.add(_folder(event.name))
        durable = concerned <= synced
        if not durable and (luck == "none" or (luck != "all" and dice.random() < 0.5)):
            continue
        if event.kind == "rename":
            names.pop(event.name, None)
        names[event.target] = event.name


def _folder(name: str) -> str:
    """Return the folder of a name, as an event of kind "sync of names" calls it."""
    return os.path.basename(os.path.dirname(name)) if "/" in name else "partial"


def present_in(folder: Path) -> dict[str, bytes]:
    """Return what is in the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
