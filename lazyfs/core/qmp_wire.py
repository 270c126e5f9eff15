"""The QMP protocol for servers and clients, without input or output: bytes in, messages out.

A message is a JSON object, and messages follow one another. A server writes each message on a line
of its own that ends in CR LF, and begins with a greeting. A client must negotiate with
`qmp_capabilities` before it sends any other command.

    S: {"QMP": {"version": {...}, "capabilities": []}}
    C: {"execute": "qmp_capabilities"}
    S: {"return": {}}
    C: {"execute": "query-images", "id": 1}
    S: {"return": [...], "id": 1}     or     {"error": {"class": ..., "desc": ...}, "id": 1}

Source: QEMU's "QEMU Machine Protocol Specification" (docs/interop/qmp-spec).
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_MESSAGE = 64 * 1024
"""The longest message in bytes that a server accepts. A command has a few hundred bytes, so a
longer message is a mistake or an attack."""

JsonObject = dict[str, Any]


class WireError(Exception):
    """What arrived is not a QMP message. `desc` is sent back to the peer as a GenericError."""

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class CommandError(Exception):
    """A command failed. `kind` is the error class of the QMP specification."""

    def __init__(self, desc: str, kind: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Command:
    """Holds one command that a client sent (`execute`)."""

    name: str
    arguments: JsonObject
    id: object = None
    has_id: bool = False


class Decoder:
    """Cuts a stream of bytes into JSON objects.

    QMP clients may put white space, or nothing, between two objects.
    """

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self._max_message = max_message
        self._pending = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[JsonObject]:
        """Yield each object that `data` completes.

        Raises:
            WireError: the bytes are not JSON, not an object, or longer than allowed. The start of
                the next message cannot be found after that, so the stream must be closed.
        """
        self._pending += data
        while (end := self._find_end()) is not None:
            text = bytes(self._pending[:end])
            del self._pending[:end]
            self._scanned = 0
            try:
                message = json.loads(text, parse_float=_finite, parse_constant=_finite)
            except (ValueError, RecursionError) as error:
                raise WireError("not JSON") from error
            if not isinstance(message, dict):
                raise WireError("a message is a JSON object")
            yield message
        if len(self._pending) > self._max_message:
            raise WireError(f"a message is at most {self._max_message} bytes")

    def _find_end(self) -> int | None:
        pending = self._pending
        if self._depth == 0 and not self._in_string:
            stripped = len(pending) - len(pending.lstrip())
            del pending[:stripped]
            self._scanned = max(0, self._scanned - stripped)
            if pending and pending[0] != ord("{"):
                raise WireError("a message begins with '{'")
        for i in range(self._scanned, len(pending)):
            byte = pending[i]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == ord("\\"):
                    self._escaped = True
                elif byte == ord('"'):
                    self._in_string = False
            elif byte == ord('"'):
                self._in_string = True
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    if i + 1 > self._max_message:
                        raise WireError(f"a message is at most {self._max_message} bytes")
                    return i + 1
        self._scanned = len(pending)
        return None


def _finite(number: str) -> float:
    # Python reads NaN, Infinity and 1e999, and writes them back. No other JSON parser accepts them.
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a JSON number")
    return value


@dataclass(frozen=True, slots=True)
class Encoded:
    """Holds a value that is JSON already.

    Python encodes a value in one step, in which no other task runs: 0.3 s for 100,000 images. So
    a long list is encoded in pieces, with pauses, by whoever makes it.
    """

    pieces: Sequence[bytes]


def array(rows: Iterable[object]) -> bytes:
    """Return rows as a part of an array: JSON without the brackets around it."""
    return json.dumps(list(rows)).encode()[1:-1]


def whole_array(parts: Iterable[bytes]) -> Encoded:
    """Return the array that is made of parts of `array`, none of which is empty."""
    pieces = [piece for part in parts for piece in (b", ", part)]
    return Encoded([b"[", *pieces[1:], b"]"])


def encode(message: JsonObject) -> bytes:
    """Return one message as a line that ends in CR LF."""
    return b"".join(encode_in_pieces(message))


def encode_in_pieces(message: JsonObject) -> list[bytes]:
    """Return the pieces of one message. Its members may be `Encoded`."""
    pieces = [b"{"]
    for number, (name, value) in enumerate(message.items()):
        pieces.append((b", " if number else b"") + json.dumps(name).encode() + b": ")
        pieces += value.pieces if isinstance(value, Encoded) else [json.dumps(value).encode()]
    return [*pieces, b"}\r\n"]


@dataclass(slots=True)
class ServerSession:
    """Handles the server's side of one connection.

    It does the negotiation and checks the form of commands.
    """

    package: str
    version: tuple[int, int, int]
    negotiated: bool = field(default=False, init=False)

    def greeting(self) -> JsonObject:
        """Return the first message, which the server sends without being asked."""
        major, minor, micro = self.version
        qemu = {"major": major, "minor": minor, "micro": micro}
        return {"QMP": {"version": {"qemu": qemu, "package": self.package}, "capabilities": []}}

    def command(self, message: JsonObject) -> Command:
        """Return the command that `message` contains, and note a successful negotiation.

        Raises:
            CommandError: the message is not a command, or capabilities must be negotiated first
                (the error class is CommandNotFound then, as in QEMU).
        """
        unknown = set(message) - {"execute", "arguments", "id"}
        if unknown:
            raise CommandError(f"QMP input member '{min(unknown)}' is unexpected")
        name = message.get("execute")
        if not isinstance(name, str):
            raise CommandError("QMP input lacks member 'execute'")
        arguments = message.get("arguments", {})
        if not isinstance(arguments, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if not self.negotiated and name != "qmp_capabilities":
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if name == "qmp_capabilities":
            if self.negotiated:
                raise CommandError(
                    "Capabilities negotiation is already complete, command ignored",
                    "CommandNotFound",
                )
            enable = arguments.get("enable", [])
            if not isinstance(enable, list):
                raise CommandError("Invalid parameter type for 'enable', expected: array")
            if enable:
                raise CommandError(
                    "Parameter 'enable' must be empty: this server has no capabilities"
                )
            if unexpected := set(arguments) - {"enable"}:
                raise CommandError(f"Parameter '{min(unexpected)}' is unexpected")
            self.negotiated = True
        return Command(name, arguments, message.get("id"), "id" in message)


def returned(message: JsonObject, value: object) -> JsonObject:
    """Return the answer to the command in `message`, with the same id."""
    return _with_id({"return": value}, message)


def failed(message: JsonObject, error: CommandError) -> JsonObject:
    """Return the answer which says that the command in `message` failed, with the same id."""
    return _with_id({"error": {"class": error.kind, "desc": error.desc}}, message)


def event(name: str, data: JsonObject, time_us: int) -> JsonObject:
    """Return an event that happened `time_us` microseconds after the epoch."""
    seconds, microseconds = divmod(time_us, 1_000_000)
    return {
        "event": name,
        "data": data,
        "timestamp": {"seconds": seconds, "microseconds": microseconds},
    }


def _with_id(answer: JsonObject, message: JsonObject) -> JsonObject:
    if "id" in message:
        answer["id"] = message["id"]
    return answer
