"""QEMU's block graph, and how one file node in it is exchanged for another.

    device        block backend, job or export: not a node
      | root
    vm-a          qcow2, the overlay
      | file \\ backing
    vm-a-file    base          raw (or qcow2)
                   | file
                 base-file     file: the node that is exchanged

A child is exchanged by reopening its parent. QEMU reopens by name only nodes that the user named
and refuses automatic names (#block123). So lazyfs goes upwards from the file: for each unnamed
read-only node it makes a new node, above the new child, until it meets a named node, which it
reopens. It changes nothing in the header of an overlay.

QEMU 7.2 dies when a reopen drops the last reference to a node in an I/O thread
("qemu_mutex_unlock_impl: Operation not permitted"), and also when blockdev-add names such a node as
a child. So a plan lists the nodes it drops (`dropped`). In a QEMU with I/O threads, only nodes that
the monitor holds may be dropped (`qemu_arguments.held`). Then blockdev-add does not name a node in
use either, because new nodes are made only in the place of unnamed parents.

Source: QEMU 7.2, qapi/block-core.json (blockdev-add, blockdev-reopen, BlockDeviceInfo,
XDbgBlockGraph), block.c.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazyfs import errors

AUTOMATIC = "#"
"""The first character of names that QEMU makes (util/id.c). A name from a user cannot have it."""

NEW_NAMES = "lazyfs-"
"""The start of the names of nodes that lazyfs makes: lazyfs-1, lazyfs-2, ..."""

_FORMATS = {"raw": ("file",), "qcow2": ("file", "backing", "data-file")}
"""The drivers whose nodes can be reopened or made anew, with the roles of their children. The
options of other drivers are not known."""

_NODE_TYPE = "block-driver"

Arguments = Mapping[str, Any]

Step = tuple[str, Arguments]
"""A QMP command and its arguments."""


@dataclass(frozen=True, slots=True)
class Node:
    """Describes a node as QEMU reports it."""

    name: str
    driver: str
    filename: str
    size: int
    """The size in bytes, which QEMU rounds up to sectors."""
    read_only: bool
    direct: bool
    no_flush: bool
    detect_zeroes: str

    @property
    def automatic(self) -> bool:
        """Return whether QEMU made the name."""
        return self.name.startswith(AUTOMATIC)


@dataclass(frozen=True, slots=True)
class Edge:
    """Says that `parent` uses node `child`."""

    parent: str
    parent_type: str
    role: str
    child: str


@dataclass(frozen=True, slots=True)
class Graph:
    """Holds all named block nodes, automatic names included, and which node uses which."""

    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]

    def above(self, name: str) -> list[Edge]:
        """Return the uses of this node by its parents."""
        return [edge for edge in self.edges if edge.child == name]

    def is_only_read(self, name: str) -> bool:
        """Return whether nothing writes to the node.

        That is so if the node is read-only, or if each of its parents uses it as a backing file or
        is itself only read. The parents must be checked because QEMU reports a file node with
        auto-read-only, as libvirt makes them, as one that can be written to.
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
        """Return the names of the node's children by their roles."""
        return {
            edge.role: edge.child
            for edge in self.edges
            if edge.parent == name and edge.parent_type == _NODE_TYPE
        }


@dataclass(frozen=True, slots=True)
class Known:
    """Holds options that QEMU does not report, as far as its command line shows them.

    Both fields are by the names of nodes.
    """

    options: Mapping[str, Arguments] = field(default_factory=dict)
    """The options, in the form that QMP requires."""
    strange: Mapping[str, str] = field(default_factory=dict)
    """One option of the node that lazyfs does not know."""


@dataclass(frozen=True, slots=True)
class Change:
    """Holds a QMP command and the command that undoes it."""

    command: str
    arguments: Arguments
    undo: Step


@dataclass(frozen=True, slots=True)
class Plan:
    """Says how to exchange one file node.

    The `changes` are done in order. After them, node `old` must be removed.
    """

    changes: tuple[Change, ...]
    dropped: tuple[str, ...]
    """The nodes that lose a parent."""
    old: str


def parse(nodes: object, graph: object) -> Graph:
    """Return the graph from the answers to two QMP commands.

    Args:
        nodes: the answer to query-named-block-nodes.
        graph: the answer to x-debug-query-block-graph.

    Raises:
        UserError: the answers do not have the form that QEMU gives them.
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
            one["node-name"], one["drv"], one["image"]["filename"], one["image"]["virtual-size"],
            one["ro"], cache["direct"], cache["no-flush"], one["detect_zeroes"],
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
    """Return how to exchange file node `old` for a new one on `filename`.

    Args:
        known: the options that `qemu_arguments.known` found.
        allow_hmp: whether QEMU's debugging command may be used if no node above has a name.

    Raises:
        UserError: QEMU does not allow the exchange. The message says why, and what to do.
    """
    planner = _Planner(graph, known, old, filename)
    if not graph.above(old):
        if old.startswith(NEW_NAMES):  # A pivot that was killed left it behind.
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
    """No node on the way up that must be reopened has a name."""

    def __init__(self, advice: str) -> None:
        super().__init__(advice)
        self.advice = advice


class _Planner:
    def __init__(self, graph: Graph, known: Known, old: str, filename: str) -> None:
        self._graph = graph
        self._known = known
        self._old = graph.nodes[old]
        # Nodes and devices share one name space.
        self._used = set(graph.nodes) | {edge.parent for edge in graph.edges}
        self.new_file = self._new_name()
        self._adds = [self._file_options(filename)]
        self._made: dict[str, str] = {}
        self._swaps: dict[str, dict[str, str]] = {}
        """The new child, by the name of a named parent and then by role."""

    def climb(self, child: str, new_child: str) -> None:
        """Put `new_child` in the place of `child` below everything that uses `child`."""
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
        """Return the plan that `climb` has found. One transaction reopens all parents."""
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
        """Return a plan with QEMU's debugging command.

        That command reopens any node, named or not, and keeps the node's other options.
        """
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
                f"{kind} {edge.parent!r} uses node {edge.child} directly; "
                "give it a named raw node above the file"
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
        """Return all that is known of `node`: an option that is left out gets its default."""
        options: dict[str, Any] = {
            "driver": node.driver, "node-name": name, "read-only": node.read_only,
            "cache": {"direct": node.direct, "no-flush": node.no_flush},
            "detect-zeroes": node.detect_zeroes,
        }  # fmt: skip
        if node.driver == "qcow2":
            options["backing"] = None  # Without it, QEMU would open what the header names.
        if node.detect_zeroes == "unmap":
            options["discard"] = "unmap"  # QEMU permits detect-zeroes=unmap only with it.
        return {**options, **self._said(node), **self._graph.children(node.name), **swaps}

    def _said(self, node: Node) -> Arguments:
        """Return what the command line says of `node`.

        Raises:
            UserError: the command line gives the node an option that lazyfs does not know.
        """
        strange = self._known.strange.get(node.name)
        if strange is not None:
            raise errors.UserError(
                f"QEMU's command line gives node {node.name} the option {strange}, "
                f"which lazyfs does not know, and which would be lost"
            )
        return self._known.options.get(node.name, {})

    def _new_name(self) -> str:
        number = 1
        while f"{NEW_NAMES}{number}" in self._used:
            number += 1
        self._used.add(f"{NEW_NAMES}{number}")
        return f"{NEW_NAMES}{number}"

    def _advice(self) -> str:
        """Return which command line names the node above the file and the top of its chain."""
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
            up.pop()  # The advice names what is below the temporary overlay.
        top = up[-1]
        stem = device or "disk"
        names = f"node-name={stem}-top"
        if len(up) > 2:  # There are more nodes than the file and the node above it.
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
            "all nodes above it have automatic names, which QEMU does not reopen; "
            f"next time start it with {drive}, "
            "or use --allow-hmp"
        )

    def _is_temporary(self, name: str) -> bool:
        """Return whether the node is the overlay that snapshot=on makes.

        QEMU has deleted the file of such an overlay already (block.c, create_tmp_file).
        """
        file = self._graph.nodes.get(self._graph.children(name).get("file", ""))
        return file is not None and re.search(r"/vl\.\w{6}$", file.filename) is not None


@dataclass(frozen=True, slots=True)
class Ancestor:
    """Names a node above another one.

    `roles` is the way down from it to the other node, such as "backing.file.".
    """

    node: str
    roles: str


def way_up(graph: Graph, name: str) -> Sequence[Ancestor]:
    """Return the node itself and the nodes above it, following the first parent of each."""
    found = [Ancestor(name, "")]
    while True:
        last = found[-1]
        edge = next(
            (edge for edge in graph.above(last.node) if edge.parent_type == _NODE_TYPE), None
        )
        if edge is None:
            return found
        found.append(Ancestor(edge.parent, f"{edge.role}.{last.roles}"))
