"""What QEMU's command line says of its block nodes: options that no QMP command reports, and a reopen resets.

Of `-drive` and `-blockdev`, the words are read as dotted keys ("backing.file.aio"), as QEMU itself reads them. A node
that was added later is not there, and then its options are not known.

Source: QEMU 7.2, util/keyval.c, blockdev.c (blockdev_init: `aio` and `discard` of -drive).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lazyfs.core.qemu_graph import Graph, Known, way_up

_AIO = ("threads", "native", "io_uring")
_DISCARD = {"unmap": "unmap", "on": "unmap", "ignore": "ignore", "off": "ignore"}


@dataclass(frozen=True, slots=True)
class Disk:
    """One -drive or -blockdev."""

    kind: str
    options: Mapping[str, str]

    def prefix_of(self, node: str) -> str | None:
        """Return what stands before the options of the node with this name: "backing." or ""."""
        for key, value in self.options.items():
            if value == node and (key == "node-name" or key.endswith(".node-name")):
                return key.removesuffix("node-name")
        return None


def disks(words: Sequence[str]) -> list[Disk]:
    """Read the words of a command line; what is not understood is left out."""
    found = []
    for option, value in itertools.pairwise(words):
        kind = option.lstrip("-")
        if option.startswith("-") and kind in ("drive", "blockdev"):
            found.append(Disk(kind, _json(value) if value.startswith("{") else _pairs(value)))
    return found


def known(command_line: Sequence[Disk], graph: Graph, file_node: str) -> Known:
    """Return the options of `file_node`, and of the nodes above it, that matter to a plan."""
    aio = None
    discard = {}
    for ancestor in way_up(graph, file_node):
        for disk in command_line:
            prefix = disk.prefix_of(ancestor.node)
            if prefix is None:
                continue
            said = disk.options.get(f"{prefix}{ancestor.roles}aio")
            if said is None and disk.kind == "drive":
                said = disk.options.get("aio")  # the whole chain's
            aio = aio or (said if said in _AIO else None)
            if (kept := _DISCARD.get(disk.options.get(f"{prefix}discard", ""))) is not None:
                discard[ancestor.node] = kept
    return Known(aio, discard)


def _pairs(text: str) -> dict[str, str]:
    """`a=b,c=d`, where a comma in a value is doubled."""
    found = {}
    for pair in text.replace(",,", "\0").split(","):
        key, _, value = pair.replace("\0", ",").partition("=")
        found[key] = value
    return found


def _json(text: str) -> dict[str, str]:
    try:
        return dict(_flat("", json.loads(text)))
    except (ValueError, RecursionError):
        return {}


def _flat(prefix: str, value: object) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, below in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else key, below)]
    return [(prefix, str(value))]
