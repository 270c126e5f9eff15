"""What QEMU's command line says of its block nodes: options that no QMP command reports, and a reopen resets.

Of `-drive` and `-blockdev`, the words are read as dotted keys ("backing.file.aio"), as QEMU itself reads them. From
each node that a key names, the graph is followed downwards, and the options of a child are those below its role:

    vm                     l2-cache-size=64M        -drive file=vm.qcow2,node-name=vm,l2-cache-size=64M,\\
      | backing                                            backing.file.aio=native
    #block1 (or lazyfs-2)
      | file
    #block2 (or lazyfs-1)  aio=native

A node that was added later is not there, and then its options are not known; so are options that were changed since.
An option that is there and not in the tables below is told (`Known.strange`), so that no node is reopened without it.

Source: QEMU 7.2, util/keyval.c, blockdev.c (qemu_common_drive_opts, drive_new), qapi/block-core.json
(BlockdevOptionsQcow2, BlockdevOptionsFile, BlockdevOptionsRaw).
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazyfs.core.qemu_graph import NEW_NAMES, Graph, Known


@dataclass(frozen=True, slots=True)
class Disk:
    """One -drive or -blockdev."""

    kind: str
    options: Mapping[str, object]
    """By dotted keys. The values are words, or what JSON has."""

    def named(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each node that is named here, with what stands before its options: "backing." or ""."""
        for key, value in self.options.items():
            if isinstance(value, str) and (key == "node-name" or key.endswith(".node-name")):
                yield value, key.removesuffix("node-name")


def disks(words: Sequence[str]) -> list[Disk]:
    """Read the words of a command line; what is not understood is left out."""
    found = []
    for option, value in itertools.pairwise(words):
        kind = option.lstrip("-")
        if option.startswith("-") and kind in ("drive", "blockdev"):
            found.append(Disk(kind, _json(value) if value.startswith("{") else _pairs(value)))
    return found


def held(command_line: Sequence[Disk], names: Sequence[str]) -> set[str]:
    """Return which nodes the monitor is known to hold: each that is a -blockdev of its own, and those made by lazyfs.

    Those of blockdev-add are held, too, but nothing tells them from the children they were added with.
    """
    ours = {name for name in names if name.startswith(NEW_NAMES)}
    ours -= {name for disk in command_line for name, _ in disk.named()}
    tops = {
        name
        for disk in command_line
        if disk.kind == "blockdev"
        for name, prefix in disk.named()
        if not prefix
    }
    return (tops & set(names)) | ours


def known(command_line: Sequence[Disk], graph: Graph) -> Known:
    """Return the options of all nodes that can be found from the command line."""
    reader = _Reader(command_line, graph)
    for disk in command_line:
        for name, prefix in disk.named():
            reader.read(disk, name, prefix)
        for edge in graph.edges:
            if disk.kind == "drive" and edge.parent == disk.options.get("id"):
                reader.read(disk, edge.child, "")
    return Known(reader.options, reader.strange)


class _Reader:
    def __init__(self, command_line: Sequence[Disk], graph: Graph) -> None:
        self.options: dict[str, dict[str, Any]] = {}
        self.strange: dict[str, str] = {}
        self._graph = graph
        self._named = {
            name: (disk, prefix) for disk in command_line for name, prefix in disk.named()
        }

    def read(self, disk: Disk, name: str, prefix: str) -> None:
        """Take the options of node `name`, and of what is below it, that begin with `prefix`."""
        node = self._graph.nodes.get(name)
        if node is None:
            return
        table = _TABLES.get(node.driver)
        if table is not None:
            self._take(disk, name, prefix, table)
        for role, child in self._graph.children(name).items():
            key = prefix + role
            word = disk.options.get(key)
            if word is None or (
                disk.kind == "drive" and key == "file"
            ):  # there it is a file's name
                self.read(disk, child, f"{key}.")
            elif child.startswith(NEW_NAMES) and isinstance(word, str) and word in self._named:
                other, start = self._named[word]
                self.read(other, child, start)  # it was made in the place of that one

    def _take(self, disk: Disk, name: str, prefix: str, table: Mapping[str, "_Read"]) -> None:
        options = self.options.setdefault(name, {})
        if disk.kind == "drive" and table is _FILE and "aio" in disk.options:  # the whole chain's
            options.setdefault("aio", disk.options["aio"])
        for key, value in disk.options.items():
            own = key.removeprefix(prefix)
            if not key.startswith(prefix) or own.partition(".")[0] in _ROLES or own in _REPORTED:
                continue
            if disk.kind == "drive" and not prefix and _OF_DRIVES.fullmatch(own):
                continue
            try:
                read = table[own](value)
            except (KeyError, ValueError):
                self.strange.setdefault(name, own)
            else:
                folder, _, last = own.rpartition(".")
                (options.setdefault(folder, {}) if folder else options)[last] = read
        if (
            "encrypt" in options
        ):  # QMP wants the format; block/qcow2.c: a system emulator opens no other
            options["encrypt"].setdefault("format", "luks")


# -- options, and what QMP wants of their values

_Read = Callable[[object], Any]


def _flag(value: object) -> bool:
    """qapi/qapi-util.c, qapi_bool_parse."""
    if isinstance(value, bool):
        return value
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise ValueError(value)


def _number(value: object) -> int:
    """util/cutils.c, qemu_strtosz, without fractions."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (
        found := re.fullmatch(r"(\d+)([bkmgtpe]?)", value, re.ASCII | re.IGNORECASE)
    ):
        return int(found[1]) << 10 * max("bkmgtpe".find(found[2].lower()), 0)
    raise ValueError(value)


def _word(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(value)


def _discard(value: object) -> str:
    return {"unmap": "unmap", "on": "unmap", "ignore": "ignore", "off": "ignore"}[_word(value)]


_ROLES = frozenset({"file", "backing", "data-file"})
_REPORTED = frozenset(
    {
        "driver",
        "node-name",
        "filename",
        "read-only",
        "detect-zeroes",
        "cache",
        "cache.direct",
        "cache.no-flush",
    }
)
"""QEMU reports them, and what it reports is repeated."""

_COMMON: Mapping[str, _Read] = {"discard": _discard, "force-share": _flag, "auto-read-only": _flag}
_RAW: Mapping[str, _Read] = {**_COMMON, "offset": _number, "size": _number}
_FILE: Mapping[str, _Read] = {
    **_COMMON, "aio": _word, "aio-max-batch": _number, "locking": _word, "pr-manager": _word, "drop-cache": _flag,
    "x-check-cache-dropped": _flag,
}  # fmt: skip
_SECTIONS = (
    "main-header", "active-l1", "active-l2", "refcount-table", "refcount-block", "snapshot-table", "inactive-l1",
    "inactive-l2", "bitmap-directory",
)  # fmt: skip
_QCOW2: Mapping[str, _Read] = {
    **_COMMON, "lazy-refcounts": _flag, "pass-discard-request": _flag, "pass-discard-snapshot": _flag,
    "pass-discard-other": _flag, "discard-no-unref": _flag, "overlap-check": _word, "overlap-check.template": _word,
    **{f"overlap-check.{section}": _flag for section in _SECTIONS},
    "cache-size": _number, "l2-cache-size": _number, "l2-cache-entry-size": _number, "refcount-cache-size": _number,
    "cache-clean-interval": _number, "encrypt.format": _word, "encrypt.key-secret": _word,
}  # fmt: skip
_TABLES = {"raw": _RAW, "file": _FILE, "qcow2": _QCOW2}

_OF_DRIVES = re.compile(
    r"id|if|bus|unit|index|media|snapshot|format|aio|werror|rerror|readonly|copy-on-read|group|cache\.writeback|"
    r"stats-.*|throttling\..*|iops.*|bps.*|serial|addr|cyls|heads|secs|trans"
)
"""What is said of a -drive itself, not of its top node."""


# -- words


def _pairs(text: str) -> dict[str, object]:
    """`a=b,c=d`, where a comma in a value is doubled; the first may be a driver alone, others are switched on."""
    found: dict[str, object] = {}
    for number, pair in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = pair.replace("\0", ",").partition("=")
        if equals:
            found[key] = value
        elif number == 0:
            found["driver"] = key
        else:
            found[key] = "on"
    return found


def _json(text: str) -> dict[str, object]:
    try:
        return dict(_flat("", json.loads(text)))
    except (ValueError, RecursionError):
        return {}


def _flat(prefix: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [
            pair
            for key, below in value.items()
            for pair in _flat(f"{prefix}.{key}" if prefix else key, below)
        ]
    return [(prefix, value)]
