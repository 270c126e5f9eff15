"""The schema of the control socket: what it refuses, how it describes itself, and its document."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core import control_schema
from lazyfs.core.control_schema import Argument, Command
from lazyfs.core.qmp_wire import CommandError

COMMAND = Command(
    "example",
    "An example.",
    (
        Argument("path", "str", ""),
        Argument("count", "int", "", optional=True),
        Argument("deep", "bool", "", optional=True),
        Argument("enable", "list", "", optional=True),
        Argument("format", "str", "", optional=True, values=("raw", "qcow2")),
    ),
)
IDS: dict[str, Any] = {"ids": lambda thing: thing.name}


@pytest.mark.parametrize(
    "arguments",
    [
        {"path": ""},
        {"path": "x", "count": 0, "deep": False, "enable": [], "format": "raw"},
        {"path": "\ud800", "count": -(2**63), "deep": True, "enable": [1, "x"], "format": "qcow2"},
        {"path": "x", "count": 2**63 - 1},
    ],
)
def test_what_fits_is_taken(arguments: dict[str, Any]) -> None:
    control_schema.check_arguments(COMMAND, arguments)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "Parameter 'path' is missing"),
        ({"count": 1}, "Parameter 'path' is missing"),
        ({"path": "x", "color": 1}, "Parameter 'color' is unexpected"),
        ({"path": None}, "Invalid parameter type for 'path', expected: string"),
        ({"path": 1}, "Invalid parameter type for 'path', expected: string"),
        ({"path": ["x"]}, "Invalid parameter type for 'path', expected: string"),
        ({"path": "x", "count": "1"}, "Invalid parameter type for 'count', expected: integer"),
        ({"path": "x", "count": 1.0}, "Invalid parameter type for 'count', expected: integer"),
        ({"path": "x", "count": True}, "Invalid parameter type for 'count', expected: integer"),
        ({"path": "x", "count": 2**63}, "Invalid parameter type for 'count', expected: integer"),
        (
            {"path": "x", "count": -(2**63) - 1},
            "Invalid parameter type for 'count', expected: integer",
        ),
        ({"path": "x", "deep": 1}, "Invalid parameter type for 'deep', expected: boolean"),
        ({"path": "x", "enable": {}}, "Invalid parameter type for 'enable', expected: array"),
        ({"path": "x", "format": "vmdk"}, "Parameter 'format' does not accept value 'vmdk'"),
        ({"path": "x", "format": 1}, "Invalid parameter type for 'format', expected: string"),
    ],
)
def test_what_does_not_is_named(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CommandError) as failure:
        control_schema.check_arguments(COMMAND, arguments)
    assert failure.value.desc == complaint
    assert failure.value.kind == "GenericError"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)
names = st.sampled_from(
    sorted({argument.name for command in control_schema.COMMANDS for argument in command.arguments})
)


@given(
    st.sampled_from(control_schema.COMMANDS),
    st.dictionaries(names | st.text(max_size=4), values, max_size=4),
)
def test_anything_is_taken_or_named(command: Command, arguments: dict[str, Any]) -> None:
    failure = ""
    try:
        control_schema.check_arguments(command, arguments)
    except CommandError as error:
        failure = error.desc
    known = {argument.name for argument in command.arguments}
    if failure:
        assert any(f"'{name}'" in failure for name in known | arguments.keys())
    else:
        assert {a.name for a in command.arguments if not a.optional} <= arguments.keys() <= known


# -- every command and event


@pytest.mark.parametrize("command", control_schema.COMMANDS, **IDS)
def test_every_command_is_well_formed(command: Command) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*|qmp_capabilities", command.name)
    assert command.meaning.endswith(".")
    assert re.fullmatch(r"\d+\.\d+", command.since)
    assert not command.returns_list or command.returns
    for argument in command.arguments:
        assert argument.type in ("str", "int", "bool", "list")
        assert not argument.values or argument.type == "str"
    members: tuple[Argument | control_schema.Field, ...] = (*command.arguments, *command.returns)
    for member in members:
        _check_member(member)
    for error in command.errors:
        assert error
        assert not error.endswith(".")


@pytest.mark.parametrize("event", control_schema.EVENTS, **IDS)
def test_every_event_is_well_formed(event: control_schema.Event) -> None:
    assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", event.name)
    assert event.meaning.endswith(".")
    assert event.data
    for member in event.data:
        _check_member(member)


def _check_member(member: Argument | control_schema.Field) -> None:
    assert re.fullmatch(r"[a-z]+([-_][a-z]+)*", member.name)
    assert member.type in ("str", "int", "bool", "number", "list", "object")
    assert member.meaning
    assert "|" not in member.meaning, "it goes into a table"


def test_names_are_unique() -> None:
    for named in (control_schema.COMMANDS, control_schema.EVENTS):
        assert len({one.name for one in named}) == len(named)
    for command in control_schema.COMMANDS:
        assert len({argument.name for argument in command.arguments}) == len(command.arguments)
        assert len({field.name for field in command.returns}) == len(command.returns)


# -- introspection, in the shape of QEMU's qapi/introspect.json

SHAPES = {
    "builtin": {"json-type"},
    "enum": {"members", "values"},
    "array": {"element-type"},
    "object": {"members"},
    "alternate": {"members"},
    "command": {"arg-type", "ret-type", "allow-oob"},
    "event": {"arg-type"},
}
JSON_TYPES = {"string", "number", "int", "boolean", "null", "object", "array", "value"}


def test_introspection_has_the_shape_of_qemus() -> None:
    entities = control_schema.introspection()
    by_name = {entity["name"]: entity for entity in entities}
    assert len(by_name) == len(entities)
    for entity in entities:
        assert entity.keys() == {"name", "meta-type"} | SHAPES[entity["meta-type"]], entity
        for member in entity.get("members", []):
            assert entity["meta-type"] != "enum" or member["name"] in entity["values"]
            assert "type" not in member or member["type"] in by_name, member
            assert member.keys() <= {"name", "type", "default"}
        for key in ("arg-type", "ret-type", "element-type"):
            assert key not in entity or entity[key] in by_name, entity
        assert entity.get("json-type", "string") in JSON_TYPES


def test_introspection_tells_of_everything() -> None:
    by_name = {entity["name"]: entity for entity in control_schema.introspection()}
    for command in control_schema.COMMANDS:
        entity = by_name[command.name]
        assert entity["meta-type"] == "command"
        members = by_name[entity["arg-type"]]["members"]
        assert [member["name"] for member in members] == [
            argument.name for argument in command.arguments
        ]
        assert ["default" in member for member in members] == [
            argument.optional for argument in command.arguments
        ]
        result = by_name[entity["ret-type"]]
        assert (result["meta-type"] == "array") == command.returns_list
        result = by_name[result["element-type"]] if command.returns_list else result
        assert [member["name"] for member in result["members"]] == [
            field.name for field in command.returns
        ]
    for event in control_schema.EVENTS:
        assert by_name[event.name]["meta-type"] == "event"
    formats = next(m for m in by_name["prefetch-arg"]["members"] if m["name"] == "format")
    assert by_name[formats["type"]]["values"] == ["raw", "qcow2"]
    size = next(m for m in by_name["query-images-ret"]["members"] if m["name"] == "size")
    assert by_name[size["type"]]["members"] == [{"type": "int"}, {"type": "null"}]


# -- the document

DOCUMENT = Path(__file__).parents[2] / "doc" / "CONTROL.md"


def test_the_document_is_made_from_it() -> None:
    assert DOCUMENT.read_text() == control_schema.document(), "run tools/make-docs"


def test_the_document_has_every_word_of_it() -> None:
    text = control_schema.document()
    everything: tuple[Command | control_schema.Event, ...] = (
        *control_schema.COMMANDS,
        *control_schema.EVENTS,
    )
    for named in everything:
        assert f"### {named.name} {named.meaning} Since {named.since}." in " ".join(text.split())
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") == 4, line
