"""The QMP wire: the same messages however the bytes are cut, and garbage is a WireError."""

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core import qmp_wire
from lazyfs.core.qmp_wire import (
    MAX_MESSAGE,
    Command,
    CommandError,
    Decoder,
    JsonObject,
    ServerSession,
    WireError,
)

texts = st.one_of(st.text(max_size=10), st.text(alphabet='{}[]"\\, \n', max_size=10))
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=5,
)
objects = st.dictionaries(texts, values, max_size=3)
gaps = st.text(alphabet=" \t\r\n", max_size=3).map(str.encode)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[JsonObject], bytes]:
    """Draw messages, and the bytes of one of the ways to write them."""
    messages = draw(st.lists(objects, max_size=4))
    wire = draw(gaps)
    for message in messages:
        indent = draw(st.sampled_from([None, 0, 2]))
        wire += json.dumps(
            message, indent=indent, ensure_ascii=draw(st.booleans())
        ).encode() + draw(gaps)
    return messages, wire


def cut(wire: bytes, places: Iterable[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(wire) + 1) for place in places), len(wire)]
    return [wire[a:b] for a, b in pairwise(bounds)]


def decode(
    chunks: Iterable[bytes], max_message: int = MAX_MESSAGE
) -> tuple[list[JsonObject], bool]:
    """Return the messages, and whether the stream was refused after them."""
    decoder = Decoder(max_message)
    messages: list[JsonObject] = []
    try:
        for chunk in chunks:
            for message in decoder.feed(chunk):
                messages.append(message)
    except WireError:
        return messages, True
    return messages, False


def bytewise(wire: bytes) -> list[bytes]:
    return [wire[i : i + 1] for i in range(len(wire))]


@given(streams(), st.lists(st.integers(0, 10_000), max_size=6))
def test_messages_are_the_same_however_the_stream_is_cut(
    stream: tuple[list[JsonObject], bytes], places: list[int]
) -> None:
    messages, wire = stream
    assert decode([wire]) == (messages, False)
    assert decode(bytewise(wire)) == (messages, False)
    assert decode(cut(wire, places)) == (messages, False)


@given(st.lists(objects, max_size=3))
def test_what_is_encoded_is_decoded(messages: list[JsonObject]) -> None:
    assert decode([qmp_wire.encode(message) for message in messages]) == (messages, False)


@given(st.lists(st.lists(objects, min_size=1, max_size=3), max_size=3))
def test_an_array_that_is_encoded_in_parts_is_the_whole_array(
    parts: list[list[JsonObject]],
) -> None:
    whole = qmp_wire.whole_array(qmp_wire.array(part) for part in parts)
    message = {"return": whole, "id": 7}
    rows = [row for part in parts for row in part]
    assert b"".join(qmp_wire.encode_in_pieces(message)) == qmp_wire.encode(
        {"return": rows, "id": 7}
    )


@given(objects)
def test_a_message_is_one_line(message: JsonObject) -> None:
    line = qmp_wire.encode(message)
    assert line.endswith(b"\r\n")
    assert b"\n" not in line[:-2]
    assert line.isascii()


tokens = [bytes([b]) for b in b'{}[]":,\\ \r\n\0\xff1tea'] + [b'{"a":', b"{}"]
json_bytes = st.lists(st.sampled_from(tokens)).map(b"".join)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw a good stream in which other bytes replace some bytes."""
    _, wire = draw(streams())
    start, end = sorted(draw(st.tuples(st.integers(0, len(wire)), st.integers(0, len(wire)))))
    return wire[:start] + draw(st.one_of(st.binary(max_size=4), json_bytes)) + wire[end:]


@settings(max_examples=300)
@given(st.one_of(st.binary(), json_bytes, damaged()), st.sampled_from([8, 64, MAX_MESSAGE]))
def test_garbage_is_a_wire_error_and_nothing_else(wire: bytes, max_message: int) -> None:
    whole = decode([wire], max_message)
    assert whole == decode(bytewise(wire), max_message)
    assert all(isinstance(message, dict) for message in whole[0])


@pytest.mark.parametrize(
    "wire",
    [
        b"x",
        b"[1]",
        b'"text"',
        b"17",
        b"null",
        b"}",
        b"{]",
        b"{1}",
        b"{'a': 1}",
        b'{"a": 1,}',
        b'{"a": \xff}',
        b'{"a": "\xff"}',
        b'{"a": "\n"}',
        b"\xef\xbb\xbf{}",
        b"\0{}",
        '{"a": 1}'.encode("utf-16-le"),
        b'{"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
    ],
    ids=lambda wire: repr(wire[:16]),
)
def test_what_is_no_message_is_refused(wire: bytes) -> None:
    assert decode([wire]) == ([], True)
    assert decode(bytewise(wire)) == ([], True)


def test_messages_before_garbage_are_delivered() -> None:
    assert decode([b'{"a": 1}{"b": 2} x {"c": 3}']) == ([{"a": 1}, {"b": 2}], True)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_longest_message_is_accepted_and_one_byte_more_is_not(chunk: int) -> None:
    for length, refused in ((MAX_MESSAGE, False), (MAX_MESSAGE + 1, True)):
        wire = b'{"a": "' + b"x" * (length - 9) + b'"}'
        assert len(wire) == length
        chunks = [wire[i : i + chunk] for i in range(0, length, chunk)]
        messages, error = decode(chunks)
        assert (len(messages), error) == (0 if refused else 1, refused)
        assert decode([wire])[1] == refused


def test_an_endless_message_is_refused_before_it_fills_memory() -> None:
    decoder = Decoder(max_message=100)
    assert list(decoder.feed(b'{"a": "' + b"x" * 93)) == []
    with pytest.raises(WireError, match="at most 100 bytes"):
        list(decoder.feed(b"x"))


def test_white_space_between_messages_counts_for_nothing() -> None:
    decoder = Decoder(max_message=10)
    assert list(decoder.feed(b" \r\n" * 100 + b"{}" + b"\n" * 1000 + b'{"a": 1}')) == [{}, {"a": 1}]
    assert list(decoder.feed(b" " * 1000)) == []


# -- the server's side


def session(negotiated: bool = True) -> ServerSession:
    server = ServerSession("lazyfs-test", (1, 2, 3))
    if negotiated:
        server.command({"execute": "qmp_capabilities"})
    return server


def test_the_greeting_is_as_in_the_specification() -> None:
    assert session(False).greeting() == {
        "QMP": {
            "version": {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "lazyfs-test"},
            "capabilities": [],
        }
    }


def test_a_command_comes_with_its_arguments_and_id() -> None:
    server = session()
    assert server.command({"execute": "x"}) == Command("x", {}, None, has_id=False)
    assert server.command({"execute": "x", "arguments": {"a": 1}, "id": 7}) == Command(
        "x", {"a": 1}, 7, has_id=True
    )
    assert server.command({"execute": "x", "id": None}) == Command("x", {}, None, has_id=True)


def test_negotiation_comes_first_and_once() -> None:
    server = session(False)
    with pytest.raises(CommandError, match="Expecting capabilities negotiation") as refusal:
        server.command({"execute": "query-images"})
    assert refusal.value.kind == "CommandNotFound"
    assert (
        server.command({"execute": "qmp_capabilities", "arguments": {"enable": []}}).name
        == "qmp_capabilities"
    )
    assert server.command({"execute": "query-images"}).name == "query-images"
    with pytest.raises(CommandError, match="already complete") as refusal:
        server.command({"execute": "qmp_capabilities"})
    assert refusal.value.kind == "CommandNotFound"


def test_capabilities_we_lack_cannot_be_enabled() -> None:
    server = session(False)
    with pytest.raises(CommandError, match="no capabilities") as refusal:
        server.command({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
    assert refusal.value.kind == "GenericError"
    with pytest.raises(CommandError, match="Expecting capabilities negotiation"):
        server.command({"execute": "query-images"})


@pytest.mark.parametrize(
    ("message", "desc"),
    [
        ({}, "lacks member 'execute'"),
        ({"execute": 1}, "lacks member 'execute'"),
        ({"execute": None}, "lacks member 'execute'"),
        ({"execute": "x", "arguments": []}, "'arguments' must be an object"),
        ({"execute": "x", "arguments": None}, "'arguments' must be an object"),
        ({"execute": "x", "argument": {}}, "'argument' is unexpected"),
        ({"exec-oob": "x"}, "'exec-oob' is unexpected"),
    ],
)
def test_what_is_no_command_is_refused(message: dict[str, Any], desc: str) -> None:
    with pytest.raises(CommandError, match=desc) as refusal:
        session().command(message)
    assert refusal.value.kind == "GenericError"


@given(
    st.booleans(),
    st.one_of(objects, st.builds(lambda o, name: {**o, "execute": name}, objects, values)),
)
def test_any_object_is_a_command_or_a_command_error(negotiated: bool, message: JsonObject) -> None:
    try:
        outcome = session(negotiated).command(message).name
    except CommandError as error:
        outcome = error.kind
    assert outcome in ("GenericError", "CommandNotFound", message.get("execute"))


@given(values, values)
def test_an_answer_carries_the_id_if_there_was_one(identity: object, value: object) -> None:
    error = CommandError("no such image", "DeviceNotFound")
    failure = {"class": "DeviceNotFound", "desc": "no such image"}
    assert qmp_wire.returned({"execute": "x"}, value) == {"return": value}
    assert qmp_wire.returned({"execute": "x", "id": identity}, value) == {
        "return": value,
        "id": identity,
    }
    assert qmp_wire.failed({"execute": "x"}, error) == {"error": failure}
    assert qmp_wire.failed({"execute": "x", "id": identity}, error) == {
        "error": failure,
        "id": identity,
    }
