"""The control socket with clients of every kind: the qemu.qmp library, and raw bytes."""

import asyncio
import json
import logging
import os
import random
import resource
import socket
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from qemu.qmp import ExecuteError, QMPClient

import lazyfs
from lazyfs import errors
from lazyfs.control.server import MAX_CLIENTS, MAX_UNREAD, ControlServer
from lazyfs.core import control_schema
from lazyfs.core.qmp_wire import MAX_MESSAGE, CommandError
from lazyfs.host.control_socket import ControlSocket

pytestmark = pytest.mark.trio

DEADLINE_S = 20.0
NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'


async def _echo(arguments: dict[str, Any]) -> object:
    return arguments


async def _fails(arguments: dict[str, Any]) -> object:
    raise CommandError("it is broken", "DeviceNotFound")


async def _lost(arguments: dict[str, Any]) -> object:
    raise errors.ConnectionLost("nbd://far", "it hung up")


async def _bug(arguments: dict[str, Any]) -> object:
    raise ZeroDivisionError("a bug")


async def _not_json(arguments: dict[str, Any]) -> object:
    return {"a set": {1}}


async def _much(arguments: dict[str, Any]) -> object:
    return "x" * (4 << 20)


COMMANDS = {
    "echo": _echo,
    "fails": _fails,
    "lost": _lost,
    "bug": _bug,
    "not-json": _not_json,
    "much": _much,
}
BUILT_IN = [
    command
    for command in control_schema.COMMANDS
    if command.name in ("qmp_capabilities", "query-commands", "query-qmp-schema", "query-version")
]
_ECHOED = (
    ("a", "int"),
    ("n", "int"),
    ("x", "str"),
    ("path", "str"),
    ("still", "str"),
    ("flag", "bool"),
)
SCHEMA = [
    *BUILT_IN,
    control_schema.Command(
        "echo", "", tuple(control_schema.Argument(*one, "", optional=True) for one in _ECHOED)
    ),
    *(control_schema.Command(name, "") for name in COMMANDS if name != "echo"),
]


def listening(path: Path | str, *rest: Any) -> ControlServer:
    """Return a server on a socket that is made at `path`."""
    return ControlServer(str(path), ControlSocket(str(path)).socket, *rest)


@pytest.fixture
async def server(tmp_path: Path, nursery: trio.Nursery) -> ControlServer:
    made = listening(tmp_path / "run" / "control.sock", COMMANDS, SCHEMA)
    nursery.start_soon(made.run)
    return made


class Client:
    """Plays a client that sends raw bytes, with a deadline for every answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._pending = b""

    async def send(self, data: bytes | dict[str, Any]) -> None:
        await self.stream.send_all(
            data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n"
        )

    async def receive(self) -> dict[str, Any] | None:
        """Return the next message, or None if the server hung up."""
        with trio.fail_after(DEADLINE_S):
            while b"\r\n" not in self._pending:
                try:
                    data = await self.stream.receive_some()
                except trio.BrokenResourceError:  # with our bytes unread
                    data = b""
                if not data:
                    assert self._pending == b"", "a message is sent whole"
                    return None
                self._pending += data
        line, _, self._pending = self._pending.partition(b"\r\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def ask(self, data: bytes | dict[str, Any]) -> dict[str, Any] | None:
        await self.send(data)
        return await self.receive()

    async def execute(self, name: str, **arguments: Any) -> Any:
        answer = await self.ask({"execute": name, "arguments": arguments})
        assert answer is not None
        return answer.get("return", answer.get("error"))


@asynccontextmanager
async def connected(server: ControlServer, negotiate: bool = True) -> AsyncIterator[Client]:
    async with await trio.open_unix_socket(server.path) as stream:
        client = Client(stream)
        greeting = await client.receive()
        assert greeting is not None
        assert list(greeting) == ["QMP"]
        if negotiate:
            assert await client.ask(NEGOTIATE) == {"return": {}}
        yield client


# -- the qemu.qmp library


def with_qmp_client(path: str, session: Callable[[QMPClient], Any]) -> Any:
    """Run `session` in an asyncio loop of its own."""

    async def run() -> Any:
        client = QMPClient("test")
        async with asyncio.timeout(DEADLINE_S):
            await client.connect(path)
            try:
                return await session(client)
            finally:
                await client.disconnect()

    return asyncio.run(run())


async def test_qmp_client_of_qemu(server: ControlServer) -> None:
    async def session(client: QMPClient) -> Any:
        assert client.greeting is not None
        assert client.greeting.QMP.version["package"] == "lazyfs"
        assert await client.execute("echo", {"path": "ubuntu"}) == {"path": "ubuntu"}
        with pytest.raises(ExecuteError) as failure:
            await client.execute("fails")
        assert (failure.value.error_class, str(failure.value)) == ("DeviceNotFound", "it is broken")
        with pytest.raises(ExecuteError) as failure:
            await client.execute("nonsense")
        assert failure.value.error_class == "CommandNotFound"
        many = await asyncio.gather(*(client.execute("echo", {"n": n}) for n in range(50)))
        assert many == [{"n": n} for n in range(50)]
        much: Any = await client.execute("much")
        assert len(much) == 4 << 20
        return await client.execute("query-version"), await client.execute("query-commands")

    version, commands = await trio.to_thread.run_sync(with_qmp_client, server.path, session)
    qemu = version["qemu"]
    assert (f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}", version["package"]) == (
        lazyfs.__version__,
        "lazyfs",
    )
    names = [command["name"] for command in commands]
    assert names == sorted(command.name for command in SCHEMA)


async def test_several_qmp_clients_at_once(server: ControlServer) -> None:
    async def session(client: QMPClient) -> Any:
        answers: list[Any] = [await client.execute("echo", {"n": n}) for n in range(20)]
        return [answer["n"] for answer in answers]

    results: list[Any] = []

    async def one() -> None:
        results.append(await trio.to_thread.run_sync(with_qmp_client, server.path, session))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(one)
    assert results == [list(range(20))] * 8


# -- raw bytes


async def test_a_dialogue_byte_by_byte(server: ControlServer) -> None:
    async with connected(server, negotiate=False) as client:
        for message in (
            NEGOTIATE,
            b' \r\n\t{"execute" : "echo", "arguments": {"path": "}\\"{"}, "id": 7}',
        ):
            for byte in message:
                await client.send(bytes([byte]))
                await trio.lowlevel.checkpoint()
        assert await client.receive() == {"return": {}}
        assert await client.receive() == {"return": {"path": '}"{'}, "id": 7}


async def test_pipelined_commands_are_answered_in_order(server: ControlServer) -> None:
    async with connected(server, negotiate=False) as client:
        await client.send(
            NEGOTIATE.strip() + b"".join(b'{"execute":"echo","id":%d}' % n for n in range(500))
        )
        assert await client.receive() == {"return": {}}
        for n in range(500):
            assert await client.receive() == {"return": {}, "id": n}


async def test_what_came_before_garbage_is_answered(server: ControlServer) -> None:
    async with connected(server) as client:
        await client.send(b'{"execute": "echo", "id": 1} garbage')
        assert await client.receive() == {"return": {}, "id": 1}
        answer = await client.receive()
        assert answer is not None
        assert answer["error"]["class"] == "GenericError"
        assert answer["error"]["desc"].startswith("JSON parse error")
        assert await client.receive() is None


GARBAGE = {
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "closing": b"}",
    "array": b"[]",
    "number": b"42\n",
    "not utf-8": b'{"execute": "\xff\xfe"}',
    "not json": b"{execute: echo}",
    "two values": b'{"execute": "echo" "echo"}',
    "infinity": b'{"execute": "echo", "id": Infinity}',
    "overflow": b'{"execute": "echo", "id": 1e999}',
    "deep": b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "many digits": b'{"execute": "echo", "id": ' + b"9" * 5000 + b"}",
    "utf-16": '{"execute": "echo"}'.encode("utf-16"),
    "nul": b"\0",
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_is_answered_and_ends_the_connection(
    server: ControlServer, kind: str
) -> None:
    async with connected(server) as client:
        answer = await client.ask(GARBAGE[kind])
        assert answer is not None
        assert answer["error"]["class"] == "GenericError"
        assert await client.receive() is None
    async with connected(server) as client:
        assert await client.execute("echo") == {}


async def test_random_bytes_end_no_more_than_their_connection(server: ControlServer) -> None:
    dice = random.Random(11)
    alphabet = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b",",
        b":",
        b"execute",
        b"id",
        b"1",
        b" ",
        b"\n",
        b"\xff",
        b"\0",
    ]
    for _ in range(60):
        async with connected(server, negotiate=False) as client:
            await client.send(b"".join(dice.choices(alphabet, k=dice.randrange(1, 60))))
            await client.stream.send_eof()
            while (answer := await client.receive()) is not None:
                assert "error" in answer
    async with connected(server) as client:
        assert await client.execute("echo") == {}


async def test_the_longest_message_and_one_byte_more(server: ControlServer) -> None:
    def message(length: int) -> bytes:
        frame = b'{"execute": "echo", "arguments": {"x": ""}}'
        return frame.replace(b'""', b'"' + b"y" * (length - len(frame)) + b'"')

    async with connected(server) as client:
        answer = await client.ask(message(MAX_MESSAGE))
        assert answer is not None
        assert len(answer["return"]["x"]) > MAX_MESSAGE - 100
        answer = await client.ask(message(MAX_MESSAGE + 1))
        assert answer is not None
        assert f"at most {MAX_MESSAGE} bytes" in answer["error"]["desc"]
        assert await client.receive() is None


async def test_a_message_without_end_is_refused(server: ControlServer) -> None:
    async with connected(server) as client:
        await client.send(b'{"execute": "' + b"x" * MAX_MESSAGE)
        answer = await client.receive()
        assert answer is not None
        assert f"at most {MAX_MESSAGE} bytes" in answer["error"]["desc"]
        assert await client.receive() is None


async def test_commands_in_the_wrong_order(server: ControlServer) -> None:
    async with connected(server, negotiate=False) as client:
        for name in ("echo", "query-version", "nonsense"):
            answer = await client.ask({"execute": name, "id": name})
            assert answer is not None
            assert answer["error"]["class"] == "CommandNotFound"
            assert "qmp_capabilities" in answer["error"]["desc"]
            assert answer["id"] == name
        assert await client.ask({"execute": "qmp_capabilities", "arguments": {"enable": []}}) == {
            "return": {}
        }
        answer = await client.ask(NEGOTIATE)
        assert answer is not None
        assert answer["error"]["class"] == "CommandNotFound"
        assert await client.execute("echo", a=1) == {"a": 1}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown command": ({"execute": "eject"}, "The command eject has not been found"),
    "no command": ({"id": 1}, "execute"),
    "empty": ({}, "execute"),
    "command is a number": ({"execute": 1}, "execute"),
    "arguments are a list": ({"execute": "echo", "arguments": []}, "must be an object"),
    "arguments are null": ({"execute": "echo", "arguments": None}, "must be an object"),
    "another member": ({"execute": "echo", "exec-oob": 1}, "'exec-oob' is unexpected"),
    "another argument": (
        {"execute": "echo", "arguments": {"color": 1}},
        "Parameter 'color' is unexpected",
    ),
    "another type": (
        {"execute": "echo", "arguments": {"n": "1"}, "id": 2},
        "Invalid parameter type for 'n', expected: integer",
    ),
    "too large": (
        {"execute": "echo", "arguments": {"n": 2**63}},
        "Invalid parameter type for 'n', expected: integer",
    ),
    "a bool": (
        {"execute": "echo", "arguments": {"n": True}},
        "Invalid parameter type for 'n', expected: integer",
    ),
    "null": (
        {"execute": "echo", "arguments": {"path": None}},
        "Invalid parameter type for 'path', expected: string",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
async def test_wrong_commands_are_answered_and_the_connection_goes_on(
    server: ControlServer, kind: str
) -> None:
    message, expected = WRONG[kind]
    async with connected(server) as client:
        answer = await client.ask(message)
        assert answer is not None
        assert expected in answer["error"]["desc"]
        assert ("id" in answer) == ("id" in message)
        assert await client.execute("echo", a=1) == {"a": 1}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"enable": ["oob"]}, "'enable'"), ({"enable": {}}, "'enable'"), ({"x": 1}, "'x'")],
)
async def test_a_negotiation_that_fails_may_be_repeated(
    server: ControlServer, arguments: dict[str, Any], named: str
) -> None:
    async with connected(server, negotiate=False) as client:
        answer = await client.ask({"execute": "qmp_capabilities", "arguments": arguments})
        assert answer is not None
        assert answer["error"]["class"] == "GenericError"
        assert named in answer["error"]["desc"]
        assert (await client.execute("echo"))["class"] == "CommandNotFound"
        assert await client.ask(NEGOTIATE) == {"return": {}}
        assert await client.execute("echo") == {}


async def test_ids_of_every_type_come_back(server: ControlServer) -> None:
    async with connected(server) as client:
        ids: tuple[Any, ...] = (
            None,
            0,
            -1,
            1.5,
            10**30,
            "",
            "text",
            [],
            [1, {"a": None}],
            {},
            {"deep": [[[]]]},
            True,
            "\ud800",
            "\0",
        )
        for id_ in ids:
            for name in ("echo", "nonsense"):
                answer = await client.ask({"execute": name, "id": id_})
                assert answer is not None
                assert answer["id"] == id_
                assert type(answer["id"]) is type(id_)


async def test_lone_surrogates_and_other_text(server: ControlServer) -> None:
    async with connected(server) as client:
        for text in ("\ud800", "\udcff-name", "\U0001f600", "ü", "\u2028", "\x7f"):
            assert await client.execute("echo", path=text) == {"path": text}
        answer = await client.ask(b'{"execute": "\\ud800"}')
        assert answer is not None
        assert answer["error"]["class"] == "CommandNotFound"
        assert await client.ask('{"execute": "echo", "id": "ü"}'.encode()) == {
            "return": {},
            "id": "ü",
        }
        # Surrogates as raw bytes are not UTF-8; QEMU refuses them, Python's parser takes them.
        answer = await client.ask(b'{"execute": "echo", "id": "\xed\xa0\x80"}')
        assert answer is not None


# -- errors of commands


async def test_errors_of_commands_are_answers(server: ControlServer) -> None:
    async with connected(server) as client:
        assert await client.execute("fails") == {"class": "DeviceNotFound", "desc": "it is broken"}
        assert await client.execute("lost") == {
            "class": "GenericError",
            "desc": "no connection to nbd://far: it hung up",
        }
        assert await client.execute("echo") == {}


@pytest.mark.parametrize("name", ["bug", "not-json"])
async def test_a_bug_is_an_answer_and_a_traceback_in_the_log(
    server: ControlServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(server) as other, connected(server) as client:
        answer = await client.ask({"execute": name, "id": 5})
        assert answer is not None
        assert answer["error"]["class"] == "GenericError"
        assert "a bug in lazyfs" in answer["error"]["desc"]
        assert answer["id"] == 5
        assert await client.execute("echo") == {}
        assert await other.execute("echo") == {}
    assert [
        record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR
    ] == [True]


# -- many clients, and slow ones


async def test_64_clients_and_one_more(server: ControlServer) -> None:
    async with trio.open_nursery() as nursery:
        leave = trio.Event()
        arrived = 0

        async def stay() -> None:
            nonlocal arrived
            async with connected(server) as client:
                arrived += 1
                await leave.wait()
                assert await client.execute("echo", still="here") == {"still": "here"}

        for _ in range(MAX_CLIENTS):
            nursery.start_soon(stay)
        with trio.fail_after(DEADLINE_S):
            while arrived < MAX_CLIENTS:
                await trio.sleep(0.01)
        async with await trio.open_unix_socket(server.path) as stream:
            assert await Client(stream).receive() is None
        leave.set()
    with trio.fail_after(DEADLINE_S):
        while server._clients:  # it has yet to see that they have gone
            await trio.sleep(0.01)
    async with connected(server) as client:
        assert await client.execute("echo") == {}


async def test_a_client_that_never_reads_stalls_nobody(server: ControlServer) -> None:
    async with connected(server) as deaf, connected(server) as other:
        await deaf.send({"execute": "much"})
        await deaf.send({"execute": "much"})
        with trio.fail_after(DEADLINE_S):
            for n in range(100):
                assert await other.execute("echo", n=n) == {"n": n}


async def test_a_client_that_hangs_up_in_the_middle_of_anything(server: ControlServer) -> None:
    for data in (b"", b"{", NEGOTIATE, NEGOTIATE + b'{"execute": "much"}' * 3):
        stream = await trio.open_unix_socket(server.path)
        await stream.send_all(data)
        await stream.aclose()
    async with connected(server) as client:
        assert await client.execute("echo") == {}


async def test_a_client_that_half_closes_gets_its_answers(server: ControlServer) -> None:
    async with connected(server, negotiate=False) as client:
        await client.send(NEGOTIATE + b'{"execute": "echo", "id": 9}')
        await client.stream.send_eof()
        assert await client.receive() == {"return": {}}
        assert await client.receive() == {"return": {}, "id": 9}
        assert await client.receive() is None


async def test_no_descriptors_left_is_no_reason_to_end(
    server: ControlServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(server) as early:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        late = trio.socket.socket(socket.AF_UNIX)
        with late:
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            try:
                await late.connect(server.path)
                with trio.fail_after(DEADLINE_S):
                    while not caplog.records:
                        await trio.sleep(0.01)
                assert await early.execute("echo") == {}
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert await Client(trio.SocketStream(late)).receive() is not None


# -- events

CHANGE = {"id": "ubuntu", "status": "running"}


async def test_events_reach_everybody_who_has_negotiated(server: ControlServer) -> None:
    async with (
        connected(server) as one,
        connected(server) as two,
        connected(server, negotiate=False) as early,
    ):
        server.emit("JOB_STATUS_CHANGE", CHANGE)
        for client in (one, two):
            event = await client.receive()
            assert event is not None
            assert event["event"] == "JOB_STATUS_CHANGE"
            assert event["data"] == CHANGE
            assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
            assert event["timestamp"]["seconds"] > 1_600_000_000
        assert await early.ask(NEGOTIATE) == {"return": {}}
        server.emit("JOB_STATUS_CHANGE", CHANGE)
        assert (await early.receive() or {})["event"] == "JOB_STATUS_CHANGE"


async def test_events_between_answers_are_whole_and_in_order(server: ControlServer) -> None:
    async with connected(server) as client:
        for n in range(50):
            server.emit("JOB_STATUS_CHANGE", {**CHANGE, "id": str(n)})
            await client.send({"execute": "echo", "id": n})
        got = [await client.receive() for _ in range(100)]
    assert [m["data"]["id"] for m in got if m and "event" in m] == [str(n) for n in range(50)]
    assert [m["id"] for m in got if m and "return" in m] == list(range(50))


async def test_an_event_that_no_schema_has_is_our_bug(server: ControlServer) -> None:
    with pytest.raises(AssertionError):
        server.emit("SOMETHING", {})


async def test_who_does_not_read_events_is_dropped_and_nobody_else(
    server: ControlServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(server) as deaf, connected(server) as other:
        big = {**CHANGE, "id": "x" * 10_000}
        for _ in range(MAX_UNREAD + 100):  # the socket's buffer takes a few
            server.emit("JOB_STATUS_CHANGE", big)
            assert (await other.receive() or {})["data"] == big
        assert await other.execute("echo", n=1) == {"n": 1}
        # What was under way still arrives; then the connection ends.
        with trio.fail_after(DEADLINE_S), suppress(trio.BrokenResourceError):
            while await deaf.stream.receive_some():
                pass
    assert [record.getMessage() for record in caplog.records] == [
        "a control client that does not read was dropped"
    ]


async def test_a_client_that_goes_away_does_not_cancel_its_command(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    begun, go_on, done = trio.Event(), trio.Event(), trio.Event()

    async def slow(arguments: dict[str, Any]) -> object:
        begun.set()
        await go_on.wait()
        done.set()
        return {}

    made = listening(
        tmp_path / "s", {"slow": slow}, [*BUILT_IN, control_schema.Command("slow", "")]
    )
    nursery.start_soon(made.run)
    async with connected(made) as client:
        await client.send({"execute": "slow"})
        await begun.wait()
    for _ in range(10):
        made.emit("JOB_STATUS_CHANGE", CHANGE)
        await trio.testing.wait_all_tasks_blocked()
    go_on.set()
    with trio.fail_after(DEADLINE_S):
        await done.wait()
        await made.all_answered()


async def test_events_through_the_qmp_library(server: ControlServer) -> None:
    heard: list[Any] = []

    async def session(client: QMPClient) -> Any:
        with client.listener(("JOB_STATUS_CHANGE",)) as listener:
            await client.execute("echo")
            trio.from_thread.run_sync(server.emit, "JOB_STATUS_CHANGE", CHANGE, trio_token=token)
            trio.from_thread.run_sync(
                server.emit, "IMAGE_STATE_CHANGE", {"path": "x"}, trio_token=token
            )
            trio.from_thread.run_sync(server.emit, "JOB_STATUS_CHANGE", CHANGE, trio_token=token)
            heard.extend([(await listener.get())["data"] for _ in range(2)])

    token = trio.lowlevel.current_trio_token()
    await trio.to_thread.run_sync(with_qmp_client, server.path, session)
    assert heard == [CHANGE, CHANGE]


async def test_qmp_shell_works_on_it(server: ControlServer) -> None:
    shell = Path(sys.executable).parent / "qmp-shell"
    commands = 'echo path=team/ubuntu n=7\necho color=red\n{"execute": "echo", "arguments": {"flag": true}}\n'
    done = await trio.run_process(
        [str(shell), server.path],
        stdin=commands.encode(),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    shown = done.stdout.decode() + done.stderr.decode()
    assert "lazyfs" in shown or "Connected" in shown
    assert '{"return": {"path": "team/ubuntu", "n": 7}}' in shown
    assert "Parameter 'color' is unexpected" in shown


# -- the socket itself


async def test_the_socket_is_private_and_outlives_its_servers(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "control.sock"
    old = os.umask(0)
    try:
        made = ControlSocket(str(path))
    finally:
        os.umask(old)
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    for _ in range(2):
        server = ControlServer(str(path), made.socket.dup(), COMMANDS, SCHEMA)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            async with connected(server) as client:
                assert await client.execute("echo") == {}
                nursery.cancel_scope.cancel()
        assert path.exists()
    made.remove(str(path.with_name("other")), str(path))
    assert not path.exists()


async def test_the_umask_is_left_as_it_was(tmp_path: Path, nursery: trio.Nursery) -> None:
    old = os.umask(0o027)
    try:
        nursery.start_soon(listening(tmp_path / "s", {}, BUILT_IN).run)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)


@pytest.mark.parametrize("stale", ["socket", "file", "symlink"])
async def test_what_a_dead_daemon_left_is_replaced(
    tmp_path: Path, nursery: trio.Nursery, stale: str
) -> None:
    path = tmp_path / "control.sock"
    victim = tmp_path / "victim"
    victim.write_text("mine")
    if stale == "socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    elif stale == "file":
        path.write_text("stale")
    else:
        path.symlink_to(victim)
    server = listening(path, COMMANDS, SCHEMA)
    nursery.start_soon(server.run)
    async with connected(server) as client:
        assert await client.execute("echo") == {}
    assert victim.read_text() == "mine"


async def test_a_socket_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in ("folder", "file/control.sock", "x" * 200, "y" * 300):
        with pytest.raises(errors.UserError, match="cannot make the control socket") as failure:
            ControlSocket(str(tmp_path / path))
        assert not str(failure.value).endswith("None")


async def test_two_servers_do_not_meet(tmp_path: Path, nursery: trio.Nursery) -> None:
    made = [
        listening(
            tmp_path / f"{n}.sock",
            {"who": _who(n)},
            [*BUILT_IN, control_schema.Command("who", "")],
        )
        for n in range(2)
    ]
    for server in made:
        nursery.start_soon(server.run)
    for n, server in enumerate(made):
        async with connected(server) as client:
            assert await client.execute("who") == n


def _who(n: int) -> Any:
    async def command(arguments: dict[str, Any]) -> object:
        return n

    return command


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_turned_away(
    server: ControlServer, caplog: pytest.LogCaptureFixture
) -> None:
    """They are refused even where the socket's mode would let them in."""
    folder = os.path.dirname(server.path)
    os.chmod(server.path, 0o666)
    said: list[bytes] = []

    def as_nobody(fd: int) -> None:
        # The kernel takes the credentials of connect(2); a thread may have its own.
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.syscall(_SETRESUID, -1, 65534, -1) == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(f"/proc/self/fd/{fd}/control.sock")
            said.append(client.recv(100))

    fd = os.open(folder, os.O_RDONLY)
    try:
        thread = threading.Thread(target=as_nobody, args=(fd,))
        thread.start()
        await trio.to_thread.run_sync(thread.join)
    finally:
        os.close(fd)
    assert said == [b""]
    assert any("turned away" in record.getMessage() for record in caplog.records)


_SETRESUID = 117  # x86-64; the libc function would change every thread
