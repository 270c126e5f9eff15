"""Which commands are planned for block graphs, with which options and in which order.

No QEMU runs.
"""

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
    """Make a graph from (parent, role, child). `device` uses the first node."""
    found = [Edge(parent, NODE, role, child) for parent, role, child in edges]
    if device:
        found.append(Edge(device, "block-backend", "root", nodes[0].name))
    return Graph({one.name: one for one in nodes}, tuple(found))


def chain(top: str, base: str, file: str, **of_top: Any) -> Graph:
    """Make the graph of an overlay on a raw node on a file."""
    overlay = node(top, "qcow2", **{"read_only": False, **of_top})
    nodes = [overlay, node("vm-file", "file"), node(base), node(file, "file")]
    return graph(
        nodes, (top, "file", "vm-file"), (top, "backing", base), (base, "file", file), device="disk"
    )


def commands(plan: qemu_graph.Plan) -> list[str]:
    return [change.command for change in plan.changes]


def test_a_named_node_above_the_file_is_reopened() -> None:
    plan = qemu_graph.plan(
        chain("vm", "base", "base-file"),
        "base-file",
        "/new",
        Known({"base-file": {"aio": "native"}}),
    )
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
    assert (reopen.command, reopen.arguments) == (
        "blockdev-reopen",
        {"options": [{**common, "file": "lazyfs-1"}]},
    )
    assert reopen.undo == ("blockdev-reopen", {"options": [{**common, "file": "base-file"}]})
    assert (plan.dropped, plan.old) == (("base-file",), "base-file")


def test_an_unnamed_node_is_made_anew_and_the_overlay_repeats_its_options() -> None:
    graph = chain("vm", "#block1", "#block2", direct=True, no_flush=True, detect_zeroes="on")
    plan = qemu_graph.plan(graph, "#block2", "/new", Known({"vm": {"discard": "unmap"}}))
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
    plan = qemu_graph.plan(
        graph(nodes, ("base", "file", "file"), device="disk"), "file", "/new", Known()
    )
    assert plan.changes[-1].arguments["options"][0]["backing"] is None


def test_all_parents_are_reopened_in_one_transaction() -> None:
    nodes = [node("a"), node("b"), node("file", "file")]
    plan = qemu_graph.plan(
        graph(nodes, ("a", "file", "file"), ("b", "file", "file")), "file", "/new", Known()
    )
    assert [one["node-name"] for one in plan.changes[-1].arguments["options"]] == ["a", "b"]
    assert plan.dropped == ("file",)


def test_an_unnamed_node_with_two_parents_is_made_anew_once() -> None:
    nodes = [node("a", "qcow2"), node("b", "qcow2"), node("#1"), node("file", "file")]
    edges = ("a", "backing", "#1"), ("b", "backing", "#1"), ("#1", "file", "file")
    plan = qemu_graph.plan(graph(nodes, *edges), "file", "/new", Known())
    assert commands(plan) == ["blockdev-add", "blockdev-add", "blockdev-reopen"]
    assert [one["backing"] for one in plan.changes[-1].arguments["options"]] == [
        "lazyfs-2",
        "lazyfs-2",
    ]


def test_new_names_are_free_also_among_devices() -> None:
    nodes = [node("lazyfs-1"), node("file", "file")]
    one = graph(nodes, ("lazyfs-1", "file", "file"), device="lazyfs-2")
    assert (
        qemu_graph.plan(one, "file", "/new", Known()).changes[0].arguments["node-name"]
        == "lazyfs-3"
    )


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
    with pytest.raises(
        errors.UserError, match=r"-drive file=/#0,node-name=disk-top,backing\.node-name=disk-base "
    ):
        qemu_graph.plan(chain("#0", "#1", "#2"), "#2", "/new", Known())


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (graph([node("file", "file")]), "nothing uses node file"),
        (graph([node("file", "file")], device="cd"), "backend 'cd' uses node file directly"),
        (
            graph([node("slow", "throttle"), node("file", "file")], ("slow", "file", "file")),
            "the throttle node slow",
        ),
        (
            graph([node("part", size=512), node("file", "file")], ("part", "file", "file")),
            "a part of the file only",
        ),
        (
            graph([node("x", "qcow2"), node("file", "file")], ("x", "other", "file")),
            "the qcow2 node x",
        ),
    ],
    ids=["unused", "device", "filter", "part", "role"],
)
def test_what_cannot_be_planned_has_a_reason(one: Graph, reason: str) -> None:
    with pytest.raises(errors.UserError, match=reason):
        qemu_graph.plan(one, "file", "/new", Known())


@pytest.mark.parametrize("nodes", [{}, [], [{}], 1, None, [{"node-name": 1}]])
@pytest.mark.parametrize(
    "edges", [{}, [], {"nodes": [], "edges": [{}]}, None, {"nodes": 1, "edges": 2}]
)
def test_answers_that_no_qemu_gives_are_our_error(nodes: object, edges: object) -> None:
    with pytest.raises(errors.UserError, match="in a way that lazyfs does not know"):
        qemu_graph.parse(nodes, edges)


# -- the command line

WORDS = [
    "qemu", "-drive", "file=/a,,b.qcow2,node-name=vm,discard=on,aio=native,cache=none", "-m", "1",
    "-blockdev", '{"node-name":"base","driver":"raw","file":{"driver":"file","aio":"io_uring"},"discard":"unmap"}',
    "-blockdev", "node-name=base-file,driver=file,aio=threads", "-blockdev", "{broken", "-drive",
]  # fmt: skip


def known(top: str, base: str, file: str) -> dict[str, Any]:
    found = qemu_arguments.known(qemu_arguments.disks(WORDS), chain(top, base, file))
    assert found.strange == {}
    return {
        name: dict(options)
        for name, options in found.options.items()
        if options and name != "vm-file"
    }


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("vm", "#1", "#2"), {"vm": {"discard": "unmap"}, "#2": {"aio": "native"}}),
        (("other", "base", "#2"), {"base": {"discard": "unmap"}, "#2": {"aio": "io_uring"}}),
        (("other", "#1", "base-file"), {"base-file": {"aio": "threads"}}),
        (("other", "#1", "#2"), {}),
        (
            ("vm", "base", "base-file"),
            {
                "vm": {"discard": "unmap"},
                "base": {"discard": "unmap"},
                "base-file": {"aio": "threads"},
            },
        ),
    ],
)
def test_options_are_found_on_the_command_line(
    names: tuple[str, str, str], options: dict[str, Any]
) -> None:
    assert known(*names) == options


def read(*words: str, graph: Graph | None = None) -> Known:
    return qemu_arguments.known(qemu_arguments.disks(words), graph or chain("vm", "#1", "#2"))


QCOW2 = (
    "l2-cache-size=4M,lazy-refcounts=on,pass-discard-request=off,overlap-check.template=all,overlap-check.bitmap-directory=no,"
    "encrypt.format=luks,encrypt.key-secret=sec0,cache-clean-interval=0"
)
AS_QMP = {
    "l2-cache-size": 4 * MiB, "lazy-refcounts": True, "pass-discard-request": False, "cache-clean-interval": 0,
    "overlap-check": {"template": "all", "bitmap-directory": False},
    "encrypt": {"format": "luks", "key-secret": "sec0"},
}  # fmt: skip


def test_options_of_qcow2_are_as_qmp_wants_them() -> None:
    drive = f"file=/vm.qcow2,if=none,id=disk,cache=none,aio=native,media=disk,throttling.bps-total=1,werror=stop,{QCOW2}"
    as_json = '{"driver":"qcow2","node-name":"vm","file":{"driver":"file"},"backing":null,' + str(
        AS_QMP
    )[1:].replace("'", '"').replace("True", "true").replace("False", "false")
    for words in (
        ("-drive", f"{drive},node-name=vm"),
        ("-drive", drive),  # named by the device that uses it
        ("-blockdev", f"qcow2,node-name=vm,{QCOW2}"),
        ("-blockdev", as_json),
    ):
        found = read(*words)
        assert found.strange == {}
        assert found.options["vm"] == AS_QMP


def test_a_reopen_repeats_them() -> None:
    one = chain("vm", "#1", "#2")
    plan = qemu_graph.plan(
        one,
        "#2",
        "/new",
        read("-drive", f"node-name=vm,backing.file.locking=off,{QCOW2}", graph=one),
    )
    assert plan.changes[0].arguments["locking"] == "off"
    (options,) = plan.changes[-1].arguments["options"]
    assert AS_QMP.items() <= options.items()
    assert options["backing"] == "lazyfs-2"


def test_all_that_are_reopened_repeat_their_own() -> None:
    nodes = [node("a", "qcow2"), node("b", "qcow2"), node("#1"), node("file", "file")]
    one = graph(nodes, ("a", "backing", "#1"), ("b", "backing", "#1"), ("#1", "file", "file"))
    words = [
        word
        for name in "ab"
        for word in ("-blockdev", f"qcow2,node-name={name},l2-cache-size={ord(name)}")
    ]
    plan = qemu_graph.plan(one, "file", "/new", read(*words, graph=one))
    assert [options["l2-cache-size"] for options in plan.changes[-1].arguments["options"]] == [
        97,
        98,
    ]


def test_what_was_made_by_a_pivot_has_the_options_of_what_it_took_the_place_of() -> None:
    words = [
        "-blockdev",
        "qcow2,node-name=vm,backing=base",
        "-blockdev",
        "raw,node-name=base,file=base-file",
    ]
    words += ["-blockdev", "file,node-name=base-file,aio=native"]
    assert read(*words, graph=chain("vm", "base", "lazyfs-1")).options["lazyfs-1"] == {
        "aio": "native"
    }
    inline = "-drive", "node-name=vm,backing.file.aio=native"
    assert read(*inline, graph=chain("vm", "lazyfs-2", "lazyfs-1")).options["lazyfs-1"] == {
        "aio": "native"
    }


def test_aio_of_a_drive_is_that_of_what_it_made_itself() -> None:
    words = [
        "-drive",
        "node-name=vm,aio=native,backing=base",
        "-blockdev",
        "raw,node-name=base,file=base-file",
    ]
    found = read(
        *words, "-blockdev", "file,node-name=base-file", graph=chain("vm", "base", "base-file")
    )
    assert (found.options["vm-file"], found.options["base-file"]) == ({"aio": "native"}, {})


@pytest.mark.parametrize(
    "word",
    [
        "node-name=vm,new-option=1",
        "node-name=vm,l2-cache-size=1.5M",
        "backing.node-name=#1,backing.file.x.y=1",
    ],
)
def test_an_option_that_is_not_known_is_not_lost_but_refused(word: str) -> None:
    one = chain("vm", "#1", "#2")
    with pytest.raises(
        errors.UserError,
        match=r"the option (new-option|l2-cache-size|x\.y), which lazyfs does not know",
    ):
        qemu_graph.plan(one, "#2", "/new", read("-drive", word, graph=one))


def test_held_are_nodes_of_their_own_blockdev_and_ours() -> None:
    disks = qemu_arguments.disks(
        [
            "-blockdev",
            "raw,node-name=base,file.node-name=base-file",
            "-drive",
            "node-name=vm,file.node-name=lazyfs-9",
        ]
    )
    names = ["base", "base-file", "vm", "added", "lazyfs-1", "lazyfs-9", "#block1"]
    assert qemu_arguments.held(disks, names) == {"base", "lazyfs-1"}


def test_doubled_commas_are_one() -> None:
    assert qemu_arguments.disks(WORDS)[0].options["file"] == "/a,b.qcow2"


@pytest.mark.parametrize(
    "words", [[], ["-drive"], ["-blockdev", '{"a":' * 100000]], ids=["none", "cut", "deep"]
)
def test_strange_command_lines_say_nothing(words: list[str]) -> None:
    assert [disk for disk in qemu_arguments.disks(words) if disk.options] == []
