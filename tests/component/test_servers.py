"""The NBD repository with real servers of every kind, and with servers that break every promise."""

import functools
import gc
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import scripted_server as nbd
import servers
import trio
import trio.lowlevel
from filling import Work, until
from peers import Peers
from scripted_server import Conversation, no_data, simple_reply, transmission

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.interfaces import Export, Source
from lazyfs.repository import nbd_connect
from lazyfs.repository.nbd_repository import NbdRepository
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio

SIZE = 4 * MiB
HOLE = ByteRange(1 * MiB, 3 * MiB)


@functools.cache
def content() -> bytes:
    """Random data around a hole."""
    head, tail = os.urandom(HOLE.start), os.urandom(SIZE - HOLE.end)
    return head + bytes(HOLE.length) + tail


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image.raw")


def make_image(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(content()[: HOLE.start])
        file.seek(HOLE.end)
        file.write(content()[HOLE.end :])
    return path


async def submitted(source: Source, buffer: memoryview) -> errors.LazyfsError | None:
    """Submit a request for the first bytes, and wait for its end."""
    outcomes: list[errors.LazyfsError | None] = []
    ended = trio.Event()

    def answered(error: errors.LazyfsError | None) -> None:
        outcomes.append(error)
        ended.set()

    assert source.submit(0, buffer, answered)
    with trio.fail_after(servers.DEADLINE_S):
        await ended.wait()
    return outcomes[0]


async def read(source: Source, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    with trio.fail_after(servers.DEADLINE_S):
        await source.pread(offset, memoryview(buffer))
    return bytes(buffer)


async def check_export(repository: NbdRepository, export: Export, *, extents: bool = True) -> None:
    """Read, ask for block status, and fill, each on its own connection."""
    source = repository.source(export)
    for offset, length in [
        (0, 4 * KiB),
        (SIZE - 4 * KiB, 4 * KiB),
        (512 * KiB, 3 * MiB),
        (0, SIZE),
    ]:
        assert await read(source, offset, length) == content()[offset : offset + length]
    everything = ByteRange(0, SIZE)
    data = await source.block_status(everything)
    assert data == (
        [ByteRange(0, HOLE.start), ByteRange(HOLE.end, SIZE)] if extents else [everything]
    )
    assert await source.block_status(ByteRange(HOLE.start, HOLE.end)) == (
        [] if extents else [ByteRange(HOLE.start, HOLE.end)]
    )
    source.drop_connection()
    assert await read(source, 8 * KiB, 4 * KiB) == content()[8 * KiB : 12 * KiB]  # connects again
    source.drop_connection()
    work = Work(export, data)
    filler = repository.filler(export)
    with trio.fail_after(servers.DEADLINE_S):
        await filler.run(work, 60)
    await filler.aclose()
    assert bytes(work.file) == content()
    work.check_all_kept()


def calls(repository: NbdRepository) -> list[Callable[[], Awaitable[object]]]:
    """The three ways of connecting."""
    return [
        repository.list_exports,
        functools.partial(repository.describe, [""]),
        functools.partial(repository.connect_export, Export("", SIZE, "")),
    ]


# -- servers as they should be


@pytest.mark.parametrize("name", ["", "debian", "team/ubuntu 24.04 ü%"])
async def test_qemu_nbd(peers: Peers, image: Path, repository_of: Any, name: str) -> None:
    repository = repository_of(peers.qemu_nbd(image, "-x", name, "-D", "build 17 ü"))
    assert await repository.list_exports() == [name]
    found = await repository.describe([name])
    assert found == {name: Export(name, SIZE, "build 17 ü")}
    assert repository.connected
    await check_export(repository, found[name])


async def test_qemu_nbd_without_a_description(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    repository = repository_of(peers.qemu_nbd(image))
    assert await repository.list_exports() == [""]
    found = await repository.describe([""])
    assert found == {"": Export("", SIZE, "")}
    await check_export(repository, found[""])


async def test_qemu_storage_daemon_with_several_exports(
    peers: Peers, tmp_path: Path, repository_of: Any
) -> None:
    names = ["a", "b/c", "with space", "ü"]
    images = {
        name: (make_image(tmp_path / f"{i}.raw"), f"v{i}" if i % 2 else "")
        for i, name in enumerate(names)
    }
    repository = repository_of(peers.storage_daemon(images))
    assert sorted(await repository.list_exports()) == sorted(names)
    found = await repository.describe(names)
    assert found == {name: Export(name, SIZE, images[name][1]) for name in names}
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(check_export, repository, found[name])


async def test_exports_that_are_not_there_are_described_by_the_servers_words(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    repository = repository_of(peers.qemu_nbd(image, "-x", "here"))
    found = await repository.describe(["gone", "here", "gone too"])
    assert list(found) == ["gone", "here", "gone too"]
    assert found["here"] == Export("here", SIZE, "")
    for name in ("gone", "gone too"):
        assert isinstance(found[name], str)
        assert found[name]
    assert repository.connected


async def test_names_asked_for_twice_are_described_once(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    repository = repository_of(peers.qemu_nbd(image, "-x", "here"))
    with trio.fail_after(servers.DEADLINE_S):
        assert list(await repository.describe(["here", "here", "gone", "gone"])) == ["here", "gone"]


async def test_a_server_without_structured_replies(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    """Such a server has no block status, so everything counts as data."""
    repository = repository_of(peers.nbdkit("--no-sr", "file", image))
    found = await repository.describe([""])
    await check_export(repository, found[""], extents=False)


async def test_a_server_without_extents(peers: Peers, image: Path, repository_of: Any) -> None:
    repository = repository_of(peers.nbdkit("--filter=noextents", "file", image))
    found = await repository.describe([""])
    await check_export(repository, found[""], extents=False)


async def test_a_server_that_takes_64_kib_at_most(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    server = peers.nbdkit(
        "--filter=blocksize-policy", "file", image,
        "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error",
    )  # fmt: skip
    repository = repository_of(server)
    found = await repository.describe([""])
    await check_export(repository, found[""])
    assert max(length for _, length in server.reads()) == 64 * KiB


async def test_extents_in_small_pieces(peers: Peers, tmp_path: Path, repository_of: Any) -> None:
    """A server may answer for less than was asked; a window is asked for until it is known."""
    repository = repository_of(peers.nbdkit("--no-sr", "null", "size=0"))
    assert (await repository.describe([""]))[""].size == 0
    path = tmp_path / "comb.raw"
    with path.open("wb") as file:
        file.truncate(64 * MiB)
        for start in range(0, 64 * MiB, 64 * KiB):
            file.seek(start)
            file.write(b"x" * 4096)
    repository = repository_of(peers.qemu_nbd(path))
    source = repository.source((await repository.describe([""]))[""])
    data = await source.block_status(ByteRange(0, 64 * MiB))
    assert data == [ByteRange(start, start + 4096) for start in range(0, 64 * MiB, 64 * KiB)]


async def test_many_reads_at_once_on_one_connection(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    server = peers.nbdkit("file", image)
    repository = repository_of(server)
    source = repository.source((await repository.describe([""]))[""])

    async def one(offset: int) -> None:
        assert await read(source, offset, 10 * KiB) == content()[offset : offset + 10 * KiB]

    async with trio.open_nursery() as nursery:
        for offset in range(0, 2 * MiB, 10 * KiB):
            nursery.start_soon(one, offset)
    text = server.request_log.read_text()
    assert len(set(re.findall(r"connection=(\d+) Read", text))) == 1


async def test_a_cancelled_read_disturbs_no_other(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    repository = repository_of(peers.nbdkit("--filter=delay", "file", image, "rdelay=100ms"))
    source = repository.source((await repository.describe([""]))[""])
    await read(source, 0, 512)
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await read(source, 0, 256 * KiB)

        nursery.start_soon(cancelled)
        nursery.start_soon(read, source, 4096, 4096)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        assert await read(source, 8192, 4096) == content()[8192 : 8192 + 4096]


async def test_a_failed_request_is_that_requests_alone(
    peers: Peers, image: Path, tmp_path: Path, repository_of: Any
) -> None:
    trigger = tmp_path / "trigger"
    server = peers.nbdkit("--filter=error", "file", image, "error-pread=ENOSPC", "error-pread-rate=100%",
                          f"error-file={trigger}")  # fmt: skip
    repository = repository_of(server)
    source = repository.source((await repository.describe([""]))[""])
    trigger.touch()
    with pytest.raises(errors.RequestFailed, match="No space left"):
        await read(source, 0, 4096)
    assert repository.connected
    trigger.unlink()
    assert await read(source, 0, 4096) == content()[:4096]
    assert repository.reconnects == 0


async def test_reads_beyond_the_end_are_refused(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    repository = repository_of(peers.nbdkit("file", image))
    source = repository.source((await repository.describe([""]))[""])
    with pytest.raises(errors.RequestFailed):
        await read(source, SIZE - 100, 200)
    assert await read(source, SIZE - 100, 100) == content()[-100:]


@pytest.mark.parametrize(
    "option", ["--oldstyle", "--mask-handshake=0", "--mask-handshake=1", "--mask-handshake=2"]
)
async def test_servers_of_another_age(
    peers: Peers, image: Path, repository_of: Any, option: str
) -> None:
    server = peers.nbdkit(option, "file", image)
    repository = repository_of(server)
    fixed_newstyle = option.endswith("=1")
    if fixed_newstyle:  # all that is needed
        await check_export(repository, (await repository.describe([""]))[""])
        return
    for call in calls(repository):
        with pytest.raises((errors.Unsupported, errors.ConnectionLost)) as failure:
            await call()
        assert server.uri in str(failure.value)


async def test_more_exports_than_a_server_answers_for_on_one_connection(
    peers: Peers, tmp_path: Path, repository_of: Any
) -> None:
    names = [f"{i:03}" for i in range(100)]
    (tmp_path / "exports").mkdir()
    for name in names:
        (tmp_path / "exports" / name).write_bytes(bytes(512 * (int(name) + 1)))
    repository = repository_of(peers.nbdkit("file", f"dir={tmp_path}/exports"))
    assert sorted(await repository.list_exports()) == names
    for _ in range(2):
        found = await repository.describe(names)
        assert found == {name: Export(name, 512 * (int(name) + 1), "") for name in names}
    assert repository.reconnects == 0


# -- servers that go and come


async def test_restarts_between_calls(peers: Peers, image: Path, repository_of: Any) -> None:
    server = peers.nbdkit("file", image)
    repository = repository_of(server)
    export = (await repository.describe([""]))[""]
    source = repository.source(export)
    for i in range(3):
        assert await read(source, i * 4096, 4096) == content()[i * 4096 : (i + 1) * 4096]
        server.restart()
        assert await repository.list_exports() == [""]
        server.restart()
        assert await source.block_status(ByteRange(HOLE.start, HOLE.end)) == []
        server.restart()
        await check_export(repository, export)
    assert repository.connected


async def test_gone_and_back(
    peers: Peers, image: Path, repository_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = peers.nbdkit("file", image)
    repository = repository_of(server)
    source = repository.source((await repository.describe([""]))[""])
    server.kill()
    for _ in range(3):
        with pytest.raises(errors.ConnectionLost) as failure:
            await repository.list_exports()
    assert not repository.connected
    assert repository.trouble == str(failure.value)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1, (
        "one line for each loss"
    )
    async with trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def wait() -> None:
            got.append(await read(source, 0, 4096))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.1)
        server.start()
    assert got == [content()[:4096]]
    assert repository.connected
    assert repository.trouble == ""
    assert repository.reconnects == 1


async def test_killed_with_reads_in_flight(peers: Peers, image: Path, repository_of: Any) -> None:
    """They go on by themselves when it is back."""
    server = peers.nbdkit("--filter=delay", "file", image, "rdelay=300ms")
    repository = repository_of(server)
    source = repository.source((await repository.describe([""]))[""])
    got: dict[int, bytes] = {}

    async def one(offset: int) -> None:
        got[offset] = await read(source, offset, 4096)

    async with trio.open_nursery() as nursery:
        for offset in range(0, 64 * KiB, 4096):
            nursery.start_soon(one, offset)
        await until(lambda: server.reads())
        server.restart()
    assert got == {offset: content()[offset : offset + 4096] for offset in range(0, 64 * KiB, 4096)}


@pytest.mark.parametrize("change", ["size", "identity"])
async def test_another_export_behind_the_same_name(
    peers: Peers, tmp_path: Path, repository_of: Any, change: str
) -> None:
    repository = repository_of(peers.qemu_nbd(make_image(tmp_path / "i"), "-x", "e", "-D", "new"))
    expected = Export("e", SIZE + 512, "new") if change == "size" else Export("e", SIZE, "old")
    with pytest.raises(errors.ExportChanged) as failure:
        await read(repository.source(expected), 0, 512)
    assert ("4194816" if change == "size" else "'old'") in str(failure.value)
    with pytest.raises(errors.ExportChanged):
        await repository.filler(expected).run(Work(expected, []), 1)


# -- no server at all


@pytest.mark.parametrize("what", ["nothing", "file", "folder", "dead socket", "no port", "no host"])
async def test_nobody_there(tmp_path: Path, repository_of: Any, what: str) -> None:
    path = tmp_path / "s"
    uri = f"nbd+unix:///?socket={path}"
    match what:
        case "file":
            path.touch()
        case "folder":
            path.mkdir()
        case "dead socket":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        case "no port":
            uri = "nbd://127.0.0.1:1"
        case "no host":
            uri = "nbd://host.invalid"
    repository = repository_of(uri)
    with trio.fail_after(servers.DEADLINE_S), pytest.raises(errors.ConnectionLost) as failure:
        await repository.list_exports()
    assert failure.value.uri == uri
    assert "nbd_" not in failure.value.reason


async def test_a_read_answered_without_data_fails(peers: Peers, repository_of: Any) -> None:
    """Otherwise the bytes that the buffer had before, perhaps of another image, would be taken for
    the answer."""
    answers: list[int] = []

    def answer(conversation: Conversation, handle: bytes, offset: int, length: int) -> None:
        answers.append(offset)
        if len(answers) % 2:
            # NBD_REPLY_TYPE_OFFSET_DATA
            chunk = struct.pack(">IHH8sIQ", 0x668E33EF, 1, 1, handle, 8 + length, offset)
            conversation.send(chunk + b"a" * length)
        else:
            conversation.send(no_data(handle))

    repository = repository_of(peers.scripted(transmission(SIZE, answer, structured=True)))
    source = repository.source(Export("", SIZE, ""))
    data = bytearray(64 * KiB)
    await source.pread(0, memoryview(data))
    assert data == b"a" * len(data)
    with pytest.raises(errors.RequestFailed):
        await source.pread(0, memoryview(data))
    await source.pread(0, memoryview(data))
    assert isinstance(await submitted(source, memoryview(data)), errors.RequestFailed)
    source.drop_connection()


# -- servers that break every promise


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_connect, "CONNECT_TIMEOUT_S", 0.5)


def greeted(conversation: Conversation) -> int:
    """Greet, do without structured replies; return the option that comes then."""
    conversation.greet()
    while True:
        option, _ = conversation.option()
        if option != nbd.OPT_STRUCTURED_REPLY:
            return option
        conversation.refuse(option)


def says(data: bytes) -> Any:
    def script(conversation: Conversation) -> None:
        conversation.send(data)
        conversation.until_gone()

    return script


def _greets_then(data: bytes) -> Any:
    def script(conversation: Conversation) -> None:
        conversation.greet()
        conversation.send(data)
        conversation.until_gone()

    return script


def _lists_then(data: bytes) -> Any:
    def script(conversation: Conversation) -> None:
        greeted(conversation)
        conversation.send(data)
        conversation.until_gone()

    return script


HOSTILE = {
    "closes at once": lambda conversation: None,
    "closes after the greeting": lambda conversation: conversation.send(b"NBDMAGICIHAVEOPT\0\3"),
    "closes in the greeting": lambda conversation: conversation.send(b"NBDMAGI"),
    "closes at the first option": lambda conversation: conversation.greet(),
    "closes at the list": lambda conversation: greeted(conversation),
    "says nothing": lambda conversation: conversation.until_gone(),
    "says nothing after the greeting": _greets_then(b""),
    "says nothing to the list": _lists_then(b""),
    "speaks HTTP": says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "speaks garbage": says(os.urandom(1000)),
    "greets, then garbage": _greets_then(os.urandom(1000)),
    "lists garbage": _lists_then(os.urandom(1000)),
    "lists for another option": _lists_then(
        nbd.REPLY.pack(0x3E889045565A9, nbd.OPT_GO, nbd.REP_ACK, 0)
    ),
    "a name longer than its reply": _lists_then(
        nbd.REPLY.pack(0x3E889045565A9, nbd.OPT_LIST, nbd.REP_SERVER, 8) + b"\xff\xff\xff\xffname"
    ),
    "a reply of 4 GiB": _lists_then(
        nbd.REPLY.pack(0x3E889045565A9, nbd.OPT_LIST, nbd.REP_SERVER, 2**32 - 1)
    ),
    "half a reply": _lists_then(
        nbd.REPLY.pack(0x3E889045565A9, nbd.OPT_LIST, nbd.REP_SERVER, 20) + b"\0\0"
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.usefixtures("impatient")
async def test_a_hostile_server_is_a_lost_connection(
    peers: Peers, repository_of: Any, kind: str
) -> None:
    repository = repository_of(peers.scripted(HOSTILE[kind]))
    with trio.fail_after(5):
        for call in calls(repository):
            with pytest.raises(errors.ConnectionLost) as failure:
                await call()
            assert failure.value.reason
            assert not repository.connected


SILENT = ["says nothing", "says nothing after the greeting", "says nothing to the list"]


@pytest.mark.parametrize("kind", SILENT)
async def test_waiting_for_a_silent_server_can_be_cancelled(
    peers: Peers, repository_of: Any, kind: str
) -> None:
    server = peers.scripted(HOSTILE[kind])
    repository = repository_of(server)
    for call in calls(repository):
        before = server.clients
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await until(lambda: server.clients > before)  # noqa: B023 - it is awaited here
            began = time.monotonic()
            nursery.cancel_scope.cancel()
        assert time.monotonic() - began < 1


@pytest.mark.usefixtures("impatient")
async def test_a_list_that_trickles_in_takes_its_time_and_can_be_cancelled(
    peers: Peers, repository_of: Any
) -> None:
    """The time limit is on silence, because a list of a million names takes long."""

    def script(conversation: Conversation) -> None:
        option = greeted(conversation)
        assert option == nbd.OPT_LIST
        while True:
            conversation.reply(nbd.OPT_LIST, nbd.REP_SERVER, b"\0\0\0\1x")
            time.sleep(0.05)  # a slow server is what is tested

    repository = repository_of(peers.scripted(script))
    began = time.monotonic()
    with trio.move_on_after(1.2) as scope:
        await repository.list_exports()
    assert scope.cancelled_caught
    assert time.monotonic() - began < 2


async def test_a_server_that_does_not_list(peers: Peers, repository_of: Any) -> None:
    for kind in (nbd.REP_ERR_UNSUP, nbd.REP_ERR_POLICY):
        repository = repository_of(peers.scripted(functools.partial(_refuse_all_by, kind)))
        with pytest.raises(errors.Unsupported, match="does not list its exports"):
            await repository.list_exports()


def _refuse_all(conversation: Conversation, option: int, kind: int) -> None:
    while option != nbd.OPT_ABORT:
        conversation.refuse(option, kind)
        option, _ = conversation.option()


def _refuse_all_by(kind: int, conversation: Conversation) -> None:
    _refuse_all(conversation, greeted(conversation), kind)


async def test_a_list_of_odd_names(peers: Peers, repository_of: Any, caplog: pytest.LogCaptureFixture,
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A name can be any bytes.

    Names that are not UTF-8 are left out. libnbd's own complaint goes to sys.excepthook.
    """
    complaints: list[object] = []
    monkeypatch.setattr(sys, "excepthook", lambda *what: complaints.append(what))
    names = [
        b"a",
        b"",
        b"\xff\xfe",
        b"..",
        b"a/b",
        b"\n",
        "\U0001f600".encode(),
        b"a",
        b"x" * 4096,
        b"\xed\xa0\x80",
    ]

    def script(conversation: Conversation) -> None:
        assert greeted(conversation) == nbd.OPT_LIST
        conversation.list(*names)
        conversation.option()

    repository = repository_of(peers.scripted(script))
    listed = await repository.list_exports()
    assert listed == ["a", "", "..", "a/b", "\n", "\U0001f600", "a", "x" * 4096]
    assert "2 exports whose names are not UTF-8" in caplog.text


def info_script(
    answers: dict[bytes, tuple[int, bytes]], options_per_connection: int = 10**9
) -> Any:
    """Describe exports by name -> (size, description), and hang up after so many."""

    def script(conversation: Conversation) -> None:
        option = 0
        conversation.greet()
        for _ in range(options_per_connection):
            option, data = conversation.option()
            if option in (nbd.OPT_INFO, nbd.OPT_GO):
                length = int.from_bytes(data[:4], "big")
                name = data[4 : 4 + length]
                if name in answers:
                    conversation.info(option, *answers[name])
                else:
                    conversation.refuse(option, nbd.REP_ERR_UNKNOWN)
            elif option == nbd.OPT_ABORT:
                conversation.reply(option, nbd.REP_ACK)
                return
            else:
                conversation.refuse(option)

    return script


async def test_impossible_sizes_and_descriptions(peers: Peers, repository_of: Any) -> None:
    answers = {
        b"largest": (2**63 - 1, b""), b"too large": (2**63, b""), b"all ones": (2**64 - 1, b"x"),
        b"empty": (0, b"nothing"), b"odd": (12345, b"d" * 4000),
        b"other": (12345, b"d" * 3999 + b"e"), b"not utf-8": (512, b"\xff\xfe"), b"last": (512, b""),
    }  # fmt: skip
    repository = repository_of(peers.scripted(info_script(answers)))
    found = await repository.describe([name.decode() for name in answers] + ["unknown"])
    assert found["largest"] == Export("largest", 2**63 - 1, "")
    for name in ("too large", "all ones", "unknown"):
        assert isinstance(found[name], str), name
    assert found["empty"] == Export("empty", 0, "nothing")
    odd, other = found["odd"], found["other"]
    assert isinstance(odd, Export)
    assert isinstance(other, Export)
    assert odd.size == 12345
    assert odd.identity != other.identity, "they differ, though only the digest of the end is kept"
    assert len(odd.identity) <= nbd_connect.MAX_IDENTITY
    assert found["last"] == Export("last", 512, ""), (
        "no description is taken over from another export"
    )
    assert isinstance(found["not utf-8"], Export)
    with pytest.raises(errors.ConnectionLost):
        await repository.connect_export(Export("too large", 2**63, ""))


@pytest.mark.parametrize("options", [2, 3, 4, 7, 33])
async def test_a_server_that_hangs_up_after_some_options(
    peers: Peers, repository_of: Any, options: int
) -> None:
    answers = {b"%d" % i: (512 * i, b"") for i in range(40)}
    server = peers.scripted(info_script(answers, options))
    repository = repository_of(server)
    with trio.fail_after(servers.DEADLINE_S):
        found = await repository.describe([name.decode() for name in answers])
    assert [export.size for export in found.values()] == [512 * i for i in range(40)]


async def test_a_server_that_never_gets_to_an_answer(peers: Peers, repository_of: Any) -> None:
    repository = repository_of(peers.scripted(info_script({b"a": (512, b"")}, 1)))
    with trio.fail_after(servers.DEADLINE_S), pytest.raises(errors.ConnectionLost):
        await repository.describe(["a"])


# -- the transmission phase


def _answers_right(conversation: Conversation, handle: bytes, offset: int, length: int) -> None:
    conversation.send(simple_reply(handle) + content()[offset : offset + length])


def _hangs_up(conversation: Conversation, *_: object) -> None:
    raise ConnectionResetError


def _hangs_up_in_the_data(
    conversation: Conversation, handle: bytes, offset: int, length: int
) -> None:
    conversation.send(simple_reply(handle) + b"wrong" * 10)
    raise ConnectionResetError


def _sends_garbage(conversation: Conversation, *_: object) -> None:
    conversation.send(b"garbage!" * 100)


def _answers_another(conversation: Conversation, handle: bytes, offset: int, length: int) -> None:
    conversation.send(simple_reply(bytes(8)) + bytes(length))


def _shuts_down(conversation: Conversation, handle: bytes, *_: object) -> None:
    conversation.send(simple_reply(handle, 108))


def _says_nothing(conversation: Conversation, *_: object) -> None:
    conversation.until_gone()


MISDEEDS = [
    _hangs_up,
    _hangs_up_in_the_data,
    _sends_garbage,
    _answers_another,
    _shuts_down,
    _says_nothing,
]


@pytest.mark.parametrize("misdeed", MISDEEDS)
async def test_a_lost_connection_in_a_read_is_made_again(
    peers: Peers, repository_of: Any, misdeed: Any
) -> None:
    """The first two connections misbehave."""
    began: list[int] = []

    def script(conversation: Conversation) -> None:
        began.append(1)
        transmission(SIZE, misdeed if len(began) <= 2 else _answers_right)(conversation)

    # silence counts as lost after a third of it
    repository = repository_of(peers.scripted(script), io_timeout_s=1.5)
    source = repository.source(Export("", SIZE, ""))
    assert await read(source, 4096, 100_000) == content()[4096:104_096]
    assert len(began) == 3
    assert await read(source, 0, 4096) == content()[:4096]
    assert len(began) == 3


@pytest.mark.parametrize("misdeed", MISDEEDS)
async def test_a_request_that_was_submitted_hears_of_a_lost_connection(
    peers: Peers, repository_of: Any, misdeed: Any
) -> None:
    asked: list[int] = []

    def answer(conversation: Conversation, handle: bytes, offset: int, length: int) -> None:
        asked.append(offset)
        (_answers_right if len(asked) == 1 else misdeed)(conversation, handle, offset, length)

    source = repository_of(peers.scripted(transmission(SIZE, answer)), io_timeout_s=1.5).source(
        Export("", SIZE, "")
    )
    assert await read(source, 0, 4096) == content()[:4096]
    assert isinstance(
        await submitted(source, memoryview(bytearray(100_000))), errors.ConnectionLost
    )
    assert len(asked) == 2
    source.drop_connection()


async def test_what_was_answered_is_not_kept_in_memory(peers: Peers, repository_of: Any) -> None:
    """It is not left to the garbage collector, which does not know the size of buffers."""

    class Reader:
        def __init__(self) -> None:
            self.ended = trio.Event()

        def answered(self, error: errors.LazyfsError | None) -> None:
            self.ended.set()

    source = repository_of(peers.scripted(transmission(SIZE, _answers_right))).source(
        Export("", SIZE, "")
    )
    assert await read(source, 0, 4096) == content()[:4096]
    reader = Reader()
    there = weakref.ref(reader)
    gc.disable()
    try:
        assert source.submit(0, memoryview(bytearray(512)), reader.answered)
        with trio.fail_after(servers.DEADLINE_S):
            await reader.ended.wait()
        await trio.lowlevel.checkpoint()
        del reader
        assert there() is None
    finally:
        gc.enable()
    source.drop_connection()


async def test_one_request_without_an_answer_among_others(peers: Peers, repository_of: Any) -> None:
    """The connection makes progress all the time. What ends is the time that a request may take."""

    def answer(conversation: Conversation, handle: bytes, offset: int, length: int) -> None:
        if offset != 4096:
            _answers_right(conversation, handle, offset, length)

    source = repository_of(peers.scripted(transmission(SIZE, answer)), io_timeout_s=1.5).source(
        Export("", SIZE, "")
    )
    assert await read(source, 0, 4096) == content()[:4096]
    outcomes: list[errors.LazyfsError | None] = []
    assert source.submit(4096, memoryview(bytearray(512)), outcomes.append)
    with trio.fail_after(servers.DEADLINE_S):
        while not outcomes:
            assert await read(source, 0, 4096) == content()[:4096]
            await trio.sleep(0.01)
    assert isinstance(outcomes[0], errors.ConnectionLost)
    source.drop_connection()


@pytest.mark.parametrize("misdeed", MISDEEDS)
async def test_a_lost_connection_in_a_fill_ends_that_run(
    peers: Peers, repository_of: Any, misdeed: Any
) -> None:
    began: list[int] = []

    def script(conversation: Conversation) -> None:
        began.append(1)
        transmission(SIZE, misdeed if len(began) <= 2 else _answers_right)(conversation)

    repository = repository_of(peers.scripted(script), io_timeout_s=1.5)
    export = Export("", SIZE, "")
    filler = repository.filler(export)
    work = Work(export, [ByteRange(0, SIZE)])
    for _ in range(2):
        with trio.fail_after(5), pytest.raises(errors.ConnectionLost):
            await filler.run(work, 60)
        assert not work.outstanding
        assert not work.kept
        work.retry()
    await filler.run(work, 60)
    work.check_all_kept()
    assert bytes(work.file) == content()


# -- TCP


async def test_the_addresses_of_a_name_are_tried_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is there, and its queue of connections is full: it never answers."""
    silent = socket.socket()
    silent.bind(("127.0.0.2", 0))
    silent.listen(0)
    port = silent.getsockname()[1]
    queued = []
    for _ in range(3):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(("127.0.0.2", port))
        queued.append(one)
    stream = socket.SOCK_STREAM
    found = [
        (socket.AF_INET, stream, 6, "", ("127.0.0.2", port)),
        (socket.AF_INET, stream, 6, "", ("127.0.0.1", port)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_named: found)
    command = ["nbdkit", "--foreground", "-i", "127.0.0.1", "-p", str(port), "memory", "1M"]
    with subprocess.Popen(command) as server:  # noqa: ASYNC220 - it returns at once
        try:
            async with trio.open_nursery() as nursery:
                repository = NbdRepository(f"nbd://two.example:{port}", nursery, 20)
                with trio.fail_after(servers.DEADLINE_S):
                    while True:
                        try:
                            assert await repository.list_exports() == [""]
                            break
                        except errors.ConnectionLost:
                            await trio.sleep(0.1)  # nbdkit is starting
                nursery.cancel_scope.cancel()
        finally:
            server.kill()
            for one in [*queued, silent]:
                one.close()


async def test_a_tcp_connection_is_kept_alive() -> None:
    with socket.socket() as one:
        nbd_connect.keep_alive(one)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
    with socket.socket(socket.AF_UNIX) as other:
        nbd_connect.keep_alive(other)  # does nothing


# -- data and holes


async def test_an_absurd_number_of_pieces_is_not_asked_for_again(
    peers: Peers, repository_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes gigabytes to look at."""
    bomb = struct.pack(">IIII", 1, 0, 1, 3) * 70_000
    asked = 0

    def script(conversation: Conversation) -> None:
        nonlocal asked
        conversation.greet()
        while True:
            option, _ = conversation.option()
            if option == nbd.OPT_STRUCTURED_REPLY:
                conversation.reply(option, nbd.REP_ACK)
            elif option == nbd.OPT_SET_META:
                name = b"base:allocation"
                conversation.reply(option, 4, struct.pack(">I", 7) + name)  # NBD_REP_META_CONTEXT
                conversation.reply(option, nbd.REP_ACK)
            elif option == nbd.OPT_GO:
                conversation.info(option, SIZE)
                break
            else:
                conversation.refuse(option)
        while True:
            header = conversation.receive(28)
            kind, handle = header[6:8], header[8:16]
            length = int.from_bytes(header[24:], "big")
            if kind == b"\0\7":  # NBD_CMD_BLOCK_STATUS
                asked += 1
                body = struct.pack(">I", 7) + bomb
                reply = struct.pack(">IHH", 0x668E33EF, 1, 5) + handle
            elif kind == b"\0\0":
                body = header[16:24] + b"x" * length
                reply = struct.pack(">IHH", 0x668E33EF, 1, 1) + handle
            else:
                return
            conversation.send(reply + struct.pack(">I", len(body)) + body)

    repository = repository_of(peers.scripted(script))
    source = repository.source(Export("", SIZE, ""))
    everything = ByteRange(0, SIZE)
    for _ in range(3):
        with trio.fail_after(servers.DEADLINE_S):
            assert await source.block_status(everything) == [everything]
    assert asked == 1
    assert "more pieces than there can be" in caplog.text
    assert await read(source, 0, 4096) == b"x" * 4096
    caplog.clear()
