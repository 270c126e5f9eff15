"""Servers that take one connection at a time, and those that only look like it."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import scripted_server as nbd
import servers
import trio
from filling import Work, until
from peers import Peers
from scripted_server import Conversation, simple_reply

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.interfaces import Export
from lazyfs.repository import describing, nbd_connect, nbd_filler, sole_connection
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio

SIZE = MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_connect, "CONNECT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(describing, "DESCRIBE_S", 1.0)
    monkeypatch.setattr(sole_connection, "GIVE_WAY_S", 0.2)
    monkeypatch.setattr(nbd_filler, "SECOND_S", 0.5)


async def read(source: Any, offset: int = 0) -> bytes:
    buffer = bytearray(4 * KiB)
    with trio.fail_after(servers.DEADLINE_S):
        await source.pread(offset, memoryview(buffer))
    return bytes(buffer)


# -- qemu-nbd, which takes one unless it is told otherwise


async def test_a_server_that_a_reader_has_for_itself_is_busy_and_not_lost(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    server = peers.qemu_nbd(image, "--shared=1")
    repository = repository_of(server)
    assert await repository.list_exports() == [""]
    source = repository.source((await repository.describe([""]))[""])
    content = await trio.Path(image).read_bytes()
    assert await read(source) == content[: 4 * KiB]
    for _ in range(2):  # the second time it is known
        with pytest.raises(errors.Busy):
            await repository.list_exports()
        with pytest.raises(errors.Busy):
            await repository.describe([""])
        assert repository.connected
        assert repository.reconnects == 0
    source.drop_connection()
    await until(lambda: not list(repository._sole._working()))
    assert await repository.list_exports() == [""]


async def test_population_uses_the_connection_of_readers(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    repository = repository_of(peers.qemu_nbd(image, "--shared=1"))
    export = (await repository.describe([""]))[""]
    source = repository.source(export)
    await read(source)
    work = Work(export, [ByteRange(0, SIZE)])
    filler = repository.filler(export)
    with trio.fail_after(servers.DEADLINE_S):
        await filler.run(work, 60)
    assert bytes(work.file) == await trio.Path(image).read_bytes()
    assert repository._sole.seen
    await filler.aclose()
    source.drop_connection()


async def test_a_reader_gets_the_connection_of_population(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    repository = repository_of(peers.qemu_nbd(image, "--shared=1"))
    export = (await repository.describe([""]))[""]
    work = Work(export, [ByteRange(0, SIZE)])
    work.on_claim = lambda: 0.05  # it has nothing to fetch, and keeps its connection
    filler = repository.filler(export)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(filler.run, work, 60)
        await until(lambda: filler.holds_connection)
        source = repository.source(export)
        assert await read(source) == (await trio.Path(image).read_bytes())[: 4 * KiB]
        nursery.cancel_scope.cancel()
    assert repository._sole.seen
    source.drop_connection()


# -- a server of several exports, some of which hang


class Exports:
    """Serves exports in Python. Those whose names begin with "hang" give no answer."""

    def __init__(self) -> None:
        self.asking = 0
        self.most = 0
        self._lock = threading.Lock()

    def script(self, conversation: Conversation) -> None:
        with self._lock:
            self.asking += 1
            self.most = max(self.most, self.asking)
        try:
            self._talk(conversation)
        finally:
            with self._lock:
                self.asking -= 1

    def _talk(self, conversation: Conversation) -> None:
        conversation.greet()
        while True:
            option, data = conversation.option()
            if option == nbd.OPT_LIST:
                conversation.list(b"good", b"hang-0")
            elif option in (nbd.OPT_INFO, nbd.OPT_GO):
                name = data[4 : 4 + int.from_bytes(data[:4], "big")]
                if name.startswith(b"hang"):
                    conversation.until_gone()
                    return
                conversation.info(option, SIZE)
                if option == nbd.OPT_GO:
                    break
            else:
                conversation.refuse(option)
        while True:
            header = conversation.receive(28)
            if header[6:8] != b"\0\0":
                return
            length = int.from_bytes(header[24:], "big")
            conversation.send(simple_reply(header[8:16]) + b"x" * length)


async def test_an_export_that_hangs_takes_no_connection_from_others(
    peers: Peers, repository_of: Any
) -> None:
    """The server has greeted, so it takes more than one."""
    repository = repository_of(peers.scripted(Exports().script))
    export = (await repository.describe(["good"]))["good"]
    work = Work(export, [ByteRange(0, SIZE)])
    work.on_claim = lambda: 0.05
    filler = repository.filler(export)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(filler.run, work, 60)
        await until(lambda: filler.holds_connection)
        with trio.move_on_after(2):
            await read(repository.source(Export("hang-0", SIZE, "")))
        assert filler.holds_connection
        assert not repository._sole.seen
        assert await repository.list_exports() == ["good", "hang-0"]
        nursery.cancel_scope.cancel()


async def test_many_exports_that_hang_are_asked_about_side_by_side(
    peers: Peers, repository_of: Any
) -> None:
    exports = Exports()
    repository = repository_of(peers.scripted(exports.script))
    names = [f"hang-{number}" for number in range(6)] + ["good"]
    with trio.fail_after(servers.DEADLINE_S):
        found = await repository.describe(names)
    assert found["good"] == Export("good", SIZE, "")
    assert all("no answer" in str(found[name]) for name in names[:-1])
    assert exports.most >= 6
    assert repository.connected


async def test_a_server_that_answers_is_asked_on_one_connection(
    peers: Peers, repository_of: Any
) -> None:
    exports = Exports()
    repository = repository_of(peers.scripted(exports.script))
    names = [f"good-{number}" for number in range(200)]
    found = await repository.describe(names)
    assert found == {name: Export(name, SIZE, "") for name in names}
    assert exports.most == 1


async def test_an_export_at_which_the_server_hangs_up_costs_one_connection(
    peers: Peers, repository_of: Any
) -> None:
    connections = 0

    def script(conversation: Conversation) -> None:
        nonlocal connections
        connections += 1
        conversation.greet()
        while True:
            option, data = conversation.option()
            if option != nbd.OPT_INFO:
                conversation.refuse(option)
            elif b"evil" in data:
                return
            else:
                conversation.info(option, SIZE)

    repository = repository_of(peers.scripted(script))
    names = [f"good-{number}" for number in range(100)]
    found = await repository.describe([names[0], "evil", *names[1:]])
    assert "hangs up" in str(found["evil"])
    assert sum(isinstance(one, Export) for one in found.values()) == 100
    assert connections == 3  # up to it, at it, and after it
    connections = 0
    await repository.describe(names)
    assert connections == 1, "and is forgotten then"


async def test_another_failure_beside_a_reader_is_told_as_what_it_is(
    peers: Peers, image: Path, tmp_path: Path, repository_of: Any
) -> None:
    """The server takes several connections, and it is the key that is wrong now."""
    keys = tmp_path / "keys.psk"
    keys.write_text("alice:0123456789abcdef\n")
    server = peers.nbdkit("--tls=require", f"--tls-psk={keys}", "file", image)
    mine = tmp_path / "mine.psk"
    mine.write_text(keys.read_text())
    uri = f"nbds+unix://alice@/?socket={server.path}&tls-psk-file={mine}"
    repository = repository_of(uri)
    source = repository.source((await repository.describe([""]))[""])
    await read(source)
    for content, said in (("alice:ffff456789abcdef\n", "refuses the key"), ("", "has no key")):
        mine.write_text(content)
        with pytest.raises(errors.ConnectionLost, match=said) as failure:
            await repository.list_exports()
        assert not isinstance(failure.value, errors.Busy)
        assert not repository.connected
        assert not repository._sole.seen
    source.drop_connection()


async def test_an_idle_reader_gives_the_one_connection_to_another(
    peers: Peers, image: Path, repository_of: Any
) -> None:
    repository = repository_of(peers.qemu_nbd(image, "--shared=1"))
    export = (await repository.describe([""]))[""]
    idle, other = repository.source(export), repository.source(export)
    content = (await trio.Path(image).read_bytes())[: 4 * KiB]
    assert await read(idle) == content
    assert await read(other) == content
    assert await read(idle) == content, "and gets it back"
    idle.drop_connection()
    other.drop_connection()
