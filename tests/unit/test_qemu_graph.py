"""What is planned for block graphs, without a QEMU: which commands, with which options, in which order."""

from collections.abc import Sequence
from typing import Any

import pytest

from lazyfs import errors
from lazyfs.core import qemu_arguments, qemu_graph
from lazyfs.core.qemu_graph import Edge, Graph, Known, Node

MiB = 1 << 20
NODE = "block-driver"


def node(name: str, driver: str = "raw", **changes: Any) -> Node:
    plain: dict[str, Any] = {
        "filename": f"/{name}", "size": MiB, "read_only": True, "direct": False, "no_flush": False,
        "detect_zeroes": "off",
    }  # fmt: skip
    return Node(name, driver, **{**plain, **changes})


def graph(nodes: Sequence[Node], *edges: tuple[str, str, str], device: str = "") -> Graph:
    """Edges are (parent, role, child); `device` uses the first node."""
    found = [Edge(parent, NODE, role, child) for parent, role, child in edges]
    if device:
        found.append(Edge(device, "block-backend", "root", nodes[0].name))
    return Graph({one.name: one for one in nodes}, tuple(found))


def chain(top: str, base: str, file: str, **of_top: Any) -> Graph:
    """An overlay on a raw node on a file."""
    overlay = node(top, "qcow2", **{"read_only": False, **of_top})
    nodes = [overlay, node("vm-file", "file"), node(base), node(file, "file")]
    return graph(nodes, (top, "file", "vm-file"), (top, "backing", base), (base, "file", file), device="disk")


def commands(plan: qemu_graph.Plan) -> list[str]:
    return [change.command for change in plan.changes]


def test_a_named_node_above_the_file_is_reopened() -> None:
    plan = qemu_graph.plan(chain("vm", "base", "base-file"), "base-file", "/new", Known(aio="native"))
    add, reopen = plan.changes
    assert add.arguments == {
        "driver": "file", "node-name": "lazyfs-1", "filename": "/new", "read-only": True, "aio": "native",
        "cache": {"direct": False, "no-flush": False},
    }  # fmt: skip
    assert add.undo == ("blockdev-del", {"node-name": "lazyfs-1"})
    common = {
        "driver": "raw", "node-name": "base", "read-only": True, "cache": {"direct": False, "no-flush": False},
        "detect-zeroes": "off",
    }  # fmt: skip
    assert (reopen.command, reopen.arguments) == ("blockdev-reopen", {"options": [{**common, "file": "lazyfs-1"}]})
    assert reopen.undo == ("blockdev-reopen", {"options": [{**common, "file": "base-file"}]})
    assert (plan.dropped, plan.old) == (("base-file",), "base-file")


def test_an_unnamed_node_is_made_anew_and_the_overlay_repeats_its_options() -> None:
    graph = chain("vm", "#block1", "#block2", direct=True, no_flush=True, detect_zeroes="on")
    plan = qemu_graph.plan(graph, "#block2", "/new", Known(discard={"vm": "unmap"}))
    assert commands(plan) == ["blockdev-add", "blockdev-add", "blockdev-reopen"]
    assert plan.changes[1].arguments == {
        "driver": "raw", "node-name": "lazyfs-2", "read-only": True, "file": "lazyfs-1", "detect-zeroes": "off",
        "cache": {"direct": False, "no-flush": False},
    }  # fmt: skip
    (options,) = plan.changes[2].arguments["options"]
    assert options == {
        "driver": "qcow2", "node-name": "vm", "read-only": False, "cache": {"direct": True, "no-flush": True},
        "detect-zeroes": "on", "discard": "unmap", "file": "vm-file", "backing": "lazyfs-2",
    }  # fmt: skip
    assert plan.dropped == ("#block1",)


def test_detect_zeroes_unmap_implies_discard_unmap() -> None:
    plan = qemu_graph.plan(chain("vm", "#1", "#2", detect_zeroes="unmap"), "#2", "/new", Known())
    assert plan.changes[-1].arguments["options"][0]["discard"] == "unmap"


def test_a_qcow2_node_without_backing_is_not_given_the_one_of_its_header() -> None:
    nodes = [node("base", "qcow2"), node("file", "file", size=4 * MiB)]
    plan = qemu_graph.plan(graph(nodes, ("base", "file", "file"), device="disk"), "file", "/new", Known())
    assert plan.changes[-1].arguments["options"][0]["backing"] is None


def test_all_parents_are_reopened_in_one_transaction() -> None:
    nodes = [node("a"), node("b"), node("file", "file")]
    plan = qemu_graph.plan(graph(nodes, ("a", "file", "file"), ("b", "file", "file")), "file", "/new", Known())
    assert [one["node-name"] for one in plan.changes[-1].arguments["options"]] == ["a", "b"]
    assert plan.dropped == ("file",)


def test_an_unnamed_node_with_two_parents_is_made_anew_once() -> None:
    nodes = [node("a", "qcow2"), node("b", "qcow2"), node("#1"), node("file", "file")]
    edges = ("a", "backing", "#1"), ("b", "backing", "#1"), ("#1", "file", "file")
    plan = qemu_graph.plan(graph(nodes, *edges), "file", "/new", Known())
    assert commands(plan) == ["blockdev-add", "blockdev-add", "blockdev-reopen"]
    assert [one["backing"] for one in plan.changes[-1].arguments["options"]] == ["lazyfs-2", "lazyfs-2"]


def test_new_names_are_free_also_among_devices() -> None:
    nodes = [node("lazyfs-1"), node("file", "file")]
    one = graph(nodes, ("lazyfs-1", "file", "file"), device="lazyfs-2")
    assert qemu_graph.plan(one, "file", "/new", Known()).changes[0].arguments["node-name"] == "lazyfs-3"


def test_the_debugging_command_reopens_what_is_unnamed() -> None:
    plan = qemu_graph.plan(chain("#0", "#1", "#2"), "#2", "/new", Known(), allow_hmp=True)
    assert commands(plan) == ["blockdev-add", "human-monitor-command"]
    assert plan.changes[1].arguments == {"command-line": 'qemu-io #1 "reopen -o file=lazyfs-1"'}
    assert plan.changes[1].undo[1] == {"command-line": 'qemu-io #1 "reopen -o file=#2"'}
    named = qemu_graph.plan(chain("vm", "base", "#2"), "#2", "/new", Known(), allow_hmp=True)
    assert "human-monitor-command" not in commands(named), "only where nothing else works"


def test_what_a_killed_pivot_left_needs_no_commands() -> None:
    plan = qemu_graph.plan(graph([node("lazyfs-1", "file")]), "lazyfs-1", "/new", Known())
    assert (plan.changes, plan.old) == ((), "lazyfs-1")


def test_automatic_names_are_refused_with_the_command_line_to_use() -> None:
    with pytest.raises(errors.UserError, match=r"-drive file=/#0,node-name=disk-top,backing\.node-name=disk-base "):
        qemu_graph.plan(chain("#0", "#1", "#2"), "#2", "/new", Known())


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (graph([node("file", "file")]), "nothing uses node file"),
        (graph([node("file", "file")], device="cd"), "backend 'cd' uses node file directly"),
        (graph([node("slow", "throttle"), node("file", "file")], ("slow", "file", "file")), "the throttle node slow"),
        (graph([node("part", size=512), node("file", "file")], ("part", "file", "file")), "a part of the file only"),
        (graph([node("x", "qcow2"), node("file", "file")], ("x", "other", "file")), "the qcow2 node x"),
    ],
    ids=["unused", "device", "filter", "part", "role"],
)
def test_what_cannot_be_planned_has_a_reason(one: Graph, reason: str) -> None:
    with pytest.raises(errors.UserError, match=reason):
        qemu_graph.plan(one, "file", "/new", Known())


@pytest.mark.parametrize("nodes", [{}, [], [{}], 1, None, [{"node-name": 1}]])
@pytest.mark.parametrize("edges", [{}, [], {"nodes": [], "edges": [{}]}, None, {"nodes": 1, "edges": 2}])
def test_answers_that_no_qemu_gives_are_our_error(nodes: object, edges: object) -> None:
    with pytest.raises(errors.UserError, match="in a way that lazyfs does not know"):
        qemu_graph.parse(nodes, edges)


# -- the command line

WORDS = [
    "qemu", "-drive", "file=/a,,b.qcow2,node-name=vm,discard=on,aio=native,cache=none", "-m", "1",
    "-blockdev", '{"node-name":"base","driver":"raw","file":{"driver":"file","aio":"io_uring"},"discard":"unmap"}',
    "-blockdev", "node-name=base-file,driver=file,aio=threads", "-blockdev", "{broken", "-drive",
]  # fmt: skip


def known(top: str, base: str, file: str) -> Known:
    return qemu_arguments.known(qemu_arguments.disks(WORDS), chain(top, base, file), file)


@pytest.mark.parametrize(
    ("names", "aio", "discard"),
    [
        (("vm", "#1", "#2"), "native", {"vm": "unmap"}),
        (("other", "base", "#2"), "io_uring", {"base": "unmap"}),
        (("other", "#1", "base-file"), "threads", {}),
        (("other", "#1", "#2"), None, {}),
        (("vm", "base", "base-file"), "threads", {"vm": "unmap", "base": "unmap"}),
    ],
)
def test_options_are_found_on_the_command_line(
    names: tuple[str, str, str], aio: str | None, discard: dict[str, str]
) -> None:
    assert known(*names) == Known(aio, discard)


def test_doubled_commas_are_one() -> None:
    assert qemu_arguments.disks(WORDS)[0].options["file"] == "/a,b.qcow2"


@pytest.mark.parametrize("words", [[], ["-drive"], ["-blockdev", '{"a":' * 100000]], ids=["none", "cut", "deep"])
def test_strange_command_lines_say_nothing(words: list[str]) -> None:
    assert [disk for disk in qemu_arguments.disks(words) if disk.options] == []
