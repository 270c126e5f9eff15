"""QEMU's block graph, and how one file node in it is exchanged for another.

    device        block backend, job or export: not a node
      | root
    vm-a          qcow2, the overlay
      | file \\ backing
    vm-a-file    base          raw (or qcow2)
                   | file
                 base-file     file: what is exchanged

A child is exchanged by reopening its parent, and QEMU reopens by name only nodes that the user named: an automatic
name (#block123) is refused. So from the file upwards, each unnamed read-only node is made anew on the new child
until a named node is met, which is reopened. Nothing of an overlay's header is touched.

QEMU 7.2 dies when a reopen drops the last reference to a node in an I/O thread ("qemu_mutex_unlock_impl: Operation not
permitted"), and also when blockdev-add names such a node as a child. So a plan says what it drops (`dropped`): where
there are I/O threads, only nodes that the monitor holds may be (`qemu_arguments.held`), and then no node in use is
named either, as only unnamed parents are made anew.

Source: QEMU 7.2, qapi/block-core.json (blockdev-add, blockdev-reopen, BlockDeviceInfo, XDbgBlockGraph), block.c.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazyfs import errors

AUTOMATIC = "#"
"""Names that QEMU makes begin with it (util/id.c); a user's cannot."""

NEW_NAMES = "lazyfs-"
"""Nodes made here are called lazyfs-1, lazyfs-2, ..."""

_FORMATS = {"raw": ("file",), "qcow2": ("file", "backing", "data-file")}
"""What can be reopened or made anew, with the roles of its children: options of other drivers are not known."""

_NODE_TYPE = "block-driver"

Arguments = Mapping[str, Any]

Step = tuple[str, Arguments]
"""A QMP command."""


@dataclass(frozen=True, slots=True)
class Node:
    """What QEMU tells about a node."""

    name: str
    driver: str
    filename: str
    size: int
    """Bytes, rounded up to sectors by QEMU."""
    read_only: bool
    direct: bool
    no_flush: bool
    detect_zeroes: str

    @property
    def automatic(self) -> bool:
        """Whether QEMU made the name."""
        return self.name.startswith(AUTOMATIC)


@dataclass(frozen=True, slots=True)
class Edge:
    """`parent` uses node `child`."""

    parent: str
    parent_type: str
    role: str
    child: str


@dataclass(frozen=True, slots=True)
class Graph:
    """All named block nodes, automatic names included, and who uses what."""

    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]

    def above(self, name: str) -> list[Edge]:
        """Return who uses this node."""
        return [edge for edge in self.edges if edge.child == name]

    def is_only_read(self, name: str) -> bool:
        """Whether the node is read-only, or is only used by such, or as a backing file.

        Of a file node with auto-read-only, as libvirt makes them, QEMU says that it can be written.
        """
        if self.nodes[name].read_only:
            return True
        above = self.above(name)
        return bool(above) and all(
            edge.parent_type == _NODE_TYPE
            and (
                edge.role == "backing"
                or (edge.parent in self.nodes and self.is_only_read(edge.parent))
            )
            for edge in above
        )

    def children(self, name: str) -> dict[str, str]:
        """Return the children of this node by their roles."""
        return {
            edge.role: edge.child
            for edge in self.edges
            if edge.parent == name and edge.parent_type == _NODE_TYPE
        }


@dataclass(frozen=True, slots=True)
class Known:
    """Options that QEMU does not report, as far as its command line shows them; both by the names of nodes."""

    options: Mapping[str, Arguments] = field(default_factory=dict)
    """As QMP wants them."""
    strange: Mapping[str, str] = field(default_factory=dict)
    """An option of the node that lazyfs does not know."""


@dataclass(frozen=True, slots=True)
class Change:
    """A QMP command, and the one that undoes it."""

    command: str
    arguments: Arguments
    undo: Step


@dataclass(frozen=True, slots=True)
class Plan:
    """How to exchange one file node: `changes` in order, then node `old` must go."""

    changes: tuple[Change, ...]
    dropped: tuple[str, ...]
    """The nodes that lose their parents."""
    old: str


def parse(nodes: object, graph: object) -> Graph:
    """Read the answers of query-named-block-nodes and x-debug-query-block-graph.

    Raises:
        UserError: they are not what QEMU answers.
    """
    try:
        return _parse(nodes, graph)
    except (KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(
            f"QEMU describes its block nodes in a way that lazyfs does not know: {error!r}"
        ) from error


def _parse(nodes: Any, graph: Any) -> Graph:
    found = {}
    for one in nodes:
        cache = one["cache"]
        found[one["node-name"]] = Node(
            one["node-name"], one["drv"], one["image"]["filename"], one["image"]["virtual-size"], one["ro"],
            cache["direct"], cache["no-flush"], one["detect_zeroes"],
        )  # fmt: skip
    known = {one["id"]: one for one in graph["nodes"]}
    edges = (
        Edge(
            known[edge["parent"]]["name"],
            known[edge["parent"]]["type"],
            edge["name"],
            known[edge["child"]]["name"],
        )
        for edge in graph["edges"]
    )
    return Graph(found, tuple(edges))


def plan(graph: Graph, old: str, filename: str, known: Known, *, allow_hmp: bool = False) -> Plan:
    """Plan to exchange file node `old` for a new one on `filename`.

    Raises:
        UserError: QEMU does not allow it; the text says why and what to do.
    """
    planner = _Planner(graph, known, old, filename)
    if not graph.above(old):
        if old.startswith(NEW_NAMES):  # left behind by a pivot that was killed
            return Plan((), (), old)
        raise errors.UserError(f"nothing uses node {old}: remove it with blockdev-del")
    try:
        planner.climb(old, planner.new_file)
    except _Unnamed as unnamed:
        if not allow_hmp:
            raise errors.UserError(unnamed.advice) from None
        return _Planner(graph, known, old, filename).with_hmp()
    return planner.with_qmp()


class _Unnamed(Exception):
    """No node on the way up has a name."""

    def __init__(self, advice: str) -> None:
        super().__init__(advice)
        self.advice = advice


class _Planner:
    def __init__(self, graph: Graph, known: Known, old: str, filename: str) -> None:
        self._graph = graph
        self._known = known
        self._old = graph.nodes[old]
        self._used = set(graph.nodes) | {
            edge.parent for edge in graph.edges
        }  # nodes and devices share one name space
        self.new_file = self._new_name()
        self._adds = [self._file_options(filename)]
        self._made: dict[str, str] = {}
        self._swaps: dict[str, dict[str, str]] = {}
        """Named parent -> role -> new child."""

    def climb(self, child: str, new_child: str) -> None:
        """Put `new_child` in the place of `child` under everything that uses it."""
        for edge in self._graph.above(child):
            parent = self._format_node(edge)
            if not parent.automatic:
                self._swaps.setdefault(parent.name, {})[edge.role] = new_child
            elif not parent.read_only:
                raise _Unnamed(self._advice())
            elif parent.name not in self._made:
                self._made[parent.name] = name = self._new_name()
                self._adds.append(self._options(parent, name, {edge.role: new_child}))
                self.climb(parent.name, name)

    def with_qmp(self) -> Plan:
        """Return the plan that climb() has found: one transaction for all parents."""
        now, before = [], []
        for name, swaps in self._swaps.items():
            now.append(self._options(self._graph.nodes[name], name, swaps))
            before.append(self._options(self._graph.nodes[name], name, {}))
        reopen = Change(
            "blockdev-reopen", {"options": now}, ("blockdev-reopen", {"options": before})
        )
        dropped = [
            self._graph.children(name)[role]
            for name, swaps in self._swaps.items()
            for role in swaps
        ]
        return self._plan([reopen], dropped)

    def with_hmp(self) -> Plan:
        """Return a plan with the debugging command, which reopens any node and keeps its other options."""
        reopens = []
        for edge in self._graph.above(self._old.name):
            parent = self._format_node(edge)
            now, before = (
                {"command-line": f'qemu-io {parent.name} "reopen -o {edge.role}={child}"'}
                for child in (self.new_file, self._old.name)
            )
            reopens.append(Change("human-monitor-command", now, ("human-monitor-command", before)))
        return self._plan(reopens, [self._old.name])

    def _plan(self, reopens: Sequence[Change], dropped: Sequence[str]) -> Plan:
        adds = [
            Change("blockdev-add", add, ("blockdev-del", {"node-name": add["node-name"]}))
            for add in self._adds
        ]
        return Plan((*adds, *reopens), tuple(dict.fromkeys(dropped)), self._old.name)

    def _format_node(self, edge: Edge) -> Node:
        parent = self._graph.nodes.get(edge.parent) if edge.parent_type == _NODE_TYPE else None
        if parent is None:
            kind = edge.parent_type.removeprefix("block-")
            raise errors.UserError(
                f"{kind} {edge.parent!r} uses node {edge.child} directly; give it a named raw node above the file"
            )
        if edge.role not in _FORMATS.get(parent.driver, ()):
            raise errors.UserError(
                f"the {parent.driver} node {parent.name} above it cannot be reopened by lazyfs"
            )
        if parent.driver == "raw" and parent.size != self._graph.nodes[edge.child].size:
            raise errors.UserError(
                f"the raw node {parent.name} shows a part of the file only (offset= or size=)"
            )
        return parent

    def _file_options(self, filename: str) -> dict[str, Any]:
        options = {
            "driver": "file", "node-name": self.new_file, "filename": filename, "read-only": True,
            "cache": {"direct": self._old.direct, "no-flush": self._old.no_flush},
        }  # fmt: skip
        return {**options, **self._said(self._old)}

    def _options(self, node: Node, name: str, swaps: Mapping[str, str]) -> dict[str, Any]:
        """Repeat all that is known of `node`: what is left out goes back to its default."""
        options: dict[str, Any] = {
            "driver": node.driver, "node-name": name, "read-only": node.read_only,
            "cache": {"direct": node.direct, "no-flush": node.no_flush}, "detect-zeroes": node.detect_zeroes,
        }  # fmt: skip
        if node.driver == "qcow2":
            options["backing"] = None  # left out, it would be what the header names
        if node.detect_zeroes == "unmap":
            options["discard"] = "unmap"  # QEMU permits the one with the other only
        return {**options, **self._said(node), **self._graph.children(node.name), **swaps}

    def _said(self, node: Node) -> Arguments:
        """Return what the command line says of `node`."""
        strange = self._known.strange.get(node.name)
        if strange is not None:
            raise errors.UserError(
                f"QEMU's command line gives node {node.name} the option {strange}, which lazyfs does not know, "
                f"and which would be lost"
            )
        return self._known.options.get(node.name, {})

    def _new_name(self) -> str:
        number = 1
        while f"{NEW_NAMES}{number}" in self._used:
            number += 1
        self._used.add(f"{NEW_NAMES}{number}")
        return f"{NEW_NAMES}{number}"

    def _advice(self) -> str:
        """Say which command line names the node above the file, and the top of its chain."""
        up = list(way_up(self._graph, self._old.name))
        device = next(
            (
                edge.parent
                for edge in self._graph.above(up[-1].node)
                if edge.parent_type != _NODE_TYPE
            ),
            "",
        )
        if len(up) > 2 and self._is_temporary(up[-1].node):
            up.pop()  # the names go to what is below it
        top = up[-1]
        stem = device or "disk"
        names = f"node-name={stem}-top"
        if len(up) > 2:  # not only the file and the node above it
            prefix = top.roles.removesuffix("file.")
            names += f",{prefix}node-name={stem}-base"
        filename = self._graph.nodes[top.node].filename
        if filename.startswith("json:"):
            drive = f"{names} added to its -drive"
        else:
            drive = (
                f"-drive file={filename.replace(',', ',,')},{names} (and the options it has now)"
            )
        return (
            f"all nodes above it have automatic names, which QEMU does not reopen; next time start it with {drive}, "
            "or use --allow-hmp"
        )

    def _is_temporary(self, name: str) -> bool:
        """Whether it is the overlay of snapshot=on; its file is deleted already. block.c, create_tmp_file."""
        file = self._graph.nodes.get(self._graph.children(name).get("file", ""))
        return file is not None and re.search(r"/vl\.\w{6}$", file.filename) is not None


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A node above another; `roles` lead down from it: "backing.file."."""

    node: str
    roles: str


def way_up(graph: Graph, name: str) -> Sequence[Ancestor]:
    """Return the node itself and what is above it, by the first parent each time."""
    found = [Ancestor(name, "")]
    while True:
        last = found[-1]
        edge = next(
            (edge for edge in graph.above(last.node) if edge.parent_type == _NODE_TYPE), None
        )
        if edge is None:
            return found
        found.append(Ancestor(edge.parent, f"{edge.role}.{last.roles}"))
