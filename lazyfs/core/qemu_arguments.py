"""Reads what QEMU's command line says of its block nodes.

This is needed for options which no QMP command reports, and which a reopen sets back to their
defaults.

The words of `-drive` and `-blockdev` are read as dotted keys ("backing.file.aio"), as QEMU itself
reads them. Each key that names a node gives a start in the graph. From there the graph is followed
downwards, and the options of a child are those whose keys begin with the child's role:

    vm                     l2-cache-size=64M        -drive file=vm.qcow2,node-name=vm,\\
      | backing                                            l2-cache-size=64M,\\
    #block1 (or lazyfs-2)                                  backing.file.aio=native
      | file
    #block2 (or lazyfs-1)  aio=native

The command line does not have nodes that were added later, so their options are not known. Nor are
options known that were changed since QEMU started. If the command line gives a node an option which
the tables below do not have, `Known.strange` names it, so that no node is reopened without it.

Source: QEMU 7.2, util/keyval.c, blockdev.c (qemu_common_drive_opts, drive_new),
qapi/block-core.json (BlockdevOptionsQcow2, BlockdevOptionsFile, BlockdevOptionsRaw).
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
    """Holds one -drive or -blockdev option of the command line."""

    kind: str
    options: Mapping[str, object]
    """The options by their dotted keys. The values are words, or what JSON has."""

    def named(self) -> Iterator[tuple[str, str]]:
        """Yield (name, prefix) for each node that is named here.

        The keys of the node's options begin with the prefix, such as "backing." or "".
        """
        for key, value in self.options.items():
            if isinstance(value, str) and (key == "node-name" or key.endswith(".node-name")):
                yield value, key.removesuffix("node-name")


def disks(words: Sequence[str]) -> list[Disk]:
    """Return the disks that the words of a command line describe.

    A value that cannot be parsed gives a disk without options.
    """
    found = []
    for option, value in itertools.pairwise(words):
        kind = option.lstrip("-")
        if option.startswith("-") and kind in ("drive", "blockdev"):
            found.append(Disk(kind, _json(value) if value.startswith("{") else _pairs(value)))
    return found


def held(command_line: Sequence[Disk], names: Sequence[str]) -> set[str]:
    """Return the nodes that QEMU's monitor is known to hold.

    These are the nodes that are a -blockdev of their own, and the nodes made by lazyfs. The monitor
    also holds the nodes that blockdev-add made, but they cannot be told from the children that were
    added with them.
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
    """Return the options of all nodes of the graph that can be found from the command line."""
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
        """Take the options that begin with `prefix`, for node `name` and all nodes below it."""
        node = self._graph.nodes.get(name)
        if node is None:
            return
        table = _TABLES.get(node.driver)
        if table is not None:
            self._take(disk, name, prefix, table)
        for role, child in self._graph.children(name).items():
            key = prefix + role
            word = disk.options.get(key)
            # In a -drive the value of "file" is the name of a file, not of a node.
            if word is None or (disk.kind == "drive" and key == "file"):
                self.read(disk, child, f"{key}.")
            elif child.startswith(NEW_NAMES) and isinstance(word, str) and word in self._named:
                other, start = self._named[word]
                self.read(other, child, start)  # lazyfs made `child` in the place of node `word`.

    def _take(self, disk: Disk, name: str, prefix: str, table: Mapping[str, "_Read"]) -> None:
        options = self.options.setdefault(name, {})
        if disk.kind == "drive" and table is _FILE and "aio" in disk.options:
            # The aio= of a -drive holds for all file nodes of its chain.
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
        if "encrypt" in options:
            # QMP requires the format. A system emulator opens no other (block/qcow2.c).
            options["encrypt"].setdefault("format", "luks")


# -- options, and the types of value that QMP requires for them

_Read = Callable[[object], Any]


def _flag(value: object) -> bool:
    """Read a boolean as qapi/qapi-util.c, qapi_bool_parse, does."""
    if isinstance(value, bool):
        return value
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise ValueError(value)


def _number(value: object) -> int:
    """Read a size as util/cutils.c, qemu_strtosz, does, but without fractions."""
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
"""Options that QEMU reports. A reopen repeats what QEMU reports, so they are not read here."""

_COMMON: Mapping[str, _Read] = {"discard": _discard, "force-share": _flag, "auto-read-only": _flag}
_RAW: Mapping[str, _Read] = {**_COMMON, "offset": _number, "size": _number}
_FILE: Mapping[str, _Read] = {
    **_COMMON, "aio": _word, "aio-max-batch": _number, "locking": _word, "pr-manager": _word,
    "drop-cache": _flag, "x-check-cache-dropped": _flag,
}  # fmt: skip
_SECTIONS = (
    "main-header", "active-l1", "active-l2", "refcount-table", "refcount-block", "snapshot-table",
    "inactive-l1", "inactive-l2", "bitmap-directory",
)  # fmt: skip
_QCOW2: Mapping[str, _Read] = {
    **_COMMON, "lazy-refcounts": _flag, "pass-discard-request": _flag,
    "pass-discard-snapshot": _flag, "pass-discard-other": _flag, "discard-no-unref": _flag,
    "overlap-check": _word, "overlap-check.template": _word,
    **{f"overlap-check.{section}": _flag for section in _SECTIONS},
    "cache-size": _number, "l2-cache-size": _number, "l2-cache-entry-size": _number,
    "refcount-cache-size": _number, "cache-clean-interval": _number, "encrypt.format": _word,
    "encrypt.key-secret": _word,
}  # fmt: skip
_TABLES = {"raw": _RAW, "file": _FILE, "qcow2": _QCOW2}

_OF_DRIVES = re.compile(
    r"id|if|bus|unit|index|media|snapshot|format|aio|werror|rerror|readonly|copy-on-read|group|"
    r"cache\.writeback|stats-.*|throttling\..*|iops.*|bps.*|serial|addr|cyls|heads|secs|trans"
)
"""Options of the -drive itself, which are not options of its top node."""


# -- words


def _pairs(text: str) -> dict[str, object]:
    """Read `a=b,c=d`, where a comma in a value is doubled.

    The first word may be the name of a driver alone. Any other word without "=" means "on".
    """
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
