"""Fuzzes what strangers send: URIs, names of exports, answers of monitors, key files.

Whatever they send, the outcome is a value or the error that the function documents. The parsers of
mountinfo, QMP's wire, qcow2 headers and maps are fuzzed beside their other tests.
"""

import string
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs import errors
from lazyfs.core import export_name, pivot_choice, qemu_arguments, qemu_graph, repository_uri
from lazyfs.core.escaping import one_line
from lazyfs.core.pivot_choice import FileNode, OpenFile, Place

text = st.text(max_size=40)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)

# -- URIs

uri_parts = st.sampled_from(
    ["nbd", "nbds", "+unix", "+vsock", "://", ":", "/", "?", "&", "=", "#", "@", "[", "]", "%", "%2",
     "%ff", "+", "socket=", "/run/s", "tls-certificates=", "tls-psk-file=", "host", "::1", "99999",
     "-1", "user", " ", "\n", "\0", "\ud800", "é"]
)  # fmt: skip


@given(st.lists(uri_parts, max_size=12).map("".join) | text)
@example("nbd://[")
@example("nbd://[::1")
@example("nbd://]host")
@example("nbd://host:٣")
def test_a_uri_is_parsed_or_refused(uri: str) -> None:
    try:
        found = repository_uri.parse(uri)
    except ValueError:
        return
    assert found.transport in ("tcp", "unix", "vsock")
    assert repository_uri.parse(found.identity).identity == found.identity
    if found.tls:
        assert (found.certificates == "") != (found.psk_file == "")
        assert (found.certificates or found.psk_file).startswith("/")
    else:
        assert not found.certificates + found.psk_file


paths = st.text(string.ascii_letters + "/ +%é?&=#", min_size=1, max_size=30).map(lambda p: f"/{p}")


@given(paths, paths)
def test_every_path_can_be_written_in_a_uri(socket: str, keys: str) -> None:
    uri = f"nbds+unix://alice@/?socket={quote(socket)}&tls-psk-file={quote(keys)}"
    found = repository_uri.parse(uri)
    assert (found.socket, found.psk_file, found.user) == (socket, keys, "alice")


# -- names


@given(st.text(max_size=5000))
def test_a_name_is_safe_to_show_and_to_print(name: str) -> None:
    path = export_name.file_name(name)
    parts = path.split("/")
    assert 1 <= len(parts) <= export_name.MAX_DEPTH
    assert not {"", ".", "..", ".lazyfs"} & set(parts[:1])
    assert not {"", ".", ".."} & set(parts)
    assert "\0" not in path
    assert one_line(path).isprintable()


# -- monitors


@given(json, json)
def test_block_nodes_of_a_stranger_are_a_graph_or_an_error(nodes: Any, graph: Any) -> None:
    with_errors(lambda: qemu_graph.parse(nodes, graph))


NODE = {
    "node-name": "a", "drv": "file", "ro": True, "detect_zeroes": "off",
    "image": {"filename": "/mnt/a", "virtual-size": 512},
    "cache": {"direct": False, "no-flush": False},
}  # fmt: skip
GRAPH = {
    "nodes": [{"id": 1, "name": "a", "type": "block-driver"}, {"id": 2, "name": "b", "type": "block-driver"}],
    "edges": [{"parent": 2, "child": 1, "name": "file", "perm": [], "shared-perm": []}],
}  # fmt: skip


@given(st.data())
def test_an_answer_that_is_nearly_right_is_a_graph_or_an_error(data: st.DataObject) -> None:
    nodes, graph = mutated(data, [NODE, {**NODE, "node-name": "b"}]), mutated(data, GRAPH)
    found = with_errors(lambda: qemu_graph.parse(nodes, graph))
    if found is None:
        return
    known = qemu_arguments.known([], found)
    for name in found.nodes:
        with_errors(lambda name=name: qemu_graph.plan(found, name, "/mnt/a", known, allow_hmp=True))


def with_errors(call: Any) -> Any:
    """Return what `call` returns, or None for the error that is told to people."""
    try:
        return call()
    except errors.UserError:
        return None


def mutated(data: st.DataObject, value: Any) -> Any:
    """Return a copy in which here and there something else stands."""
    if data.draw(st.integers(0, 15)) == 0:
        return data.draw(json)
    if isinstance(value, dict):
        return {
            key: mutated(data, one) for key, one in value.items() if data.draw(st.integers(0, 15))
        }
    if isinstance(value, list):
        return [mutated(data, one) for one in value]
    return value


@given(st.lists(text, max_size=6), json)
def test_command_lines_of_others_are_read_or_left(words: list[str], options: Any) -> None:
    qemu_arguments.disks(words)
    qemu_arguments.disks(["qemu", "-blockdev", str(options), "-drive", ",".join(words)])


@pytest.mark.parametrize("count", [0, 3])
@given(data=st.data())
def test_choices_are_made_of_whatever_a_process_has_open(count: int, data: st.DataObject) -> None:
    number = st.integers(0, 3)
    opened = [
        OpenFile(
            fd, data.draw(number), data.draw(number), 512, frozenset({data.draw(number)}), "/x"
        )
        for fd in range(count)
    ]
    nodes = [
        FileNode(
            f"n{fd}", data.draw(text), data.draw(number),
            data.draw(st.none() | st.builds(Place, number, number, number, st.frozensets(number), st.booleans())),
            data.draw(st.sampled_from(["", "trouble"])), data.draw(st.booleans()), data.draw(st.booleans()),
        )
        for fd in range(count)
    ]  # fmt: skip
    choices, _ = pivot_choice.choose(nodes, [], opened)
    assert [choice.node for choice in choices] == nodes or len(choices) <= len(nodes)
