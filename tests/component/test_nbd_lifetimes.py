"""Connections to the repository: made once, closed when nobody needs them, and forgotten commands
are forgotten."""

import errno
import gc
import os
import socket
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import nbd
import pytest
import servers
import trio
from filling import Work

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.interfaces import Export, Sample
from lazyfs.repository import nbd_buffers, nbd_connect
from lazyfs.repository.lookups import Resolver
from lazyfs.repository.nbd_buffers import NbdBuffer
from lazyfs.repository.nbd_handle import NbdHandle
from lazyfs.repository.nbd_repository import NbdRepository
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio

EXPORT = Export("disk", 1000, "")


class Handle:
    """Stands for a libnbd handle where no server is needed."""


class Running:
    """Stands for `NbdHandle`."""

    made: list["Running"]

    def __init__(self, *_: object) -> None:
        self.broken = ""
        Running.made.append(self)

    async def run(self) -> None:
        await trio.sleep_forever()

    async def pread(self, _offset: int, _buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()

    def close(self, why: str = "closed") -> None:
        self.broken = why


@pytest.fixture(autouse=True)
def _no_connections_yet() -> None:
    Running.made = []


@asynccontextmanager
async def repository(
    uri: str = "nbd://x", io_timeout_s: float = 30
) -> AsyncIterator[NbdRepository]:
    async with trio.open_nursery() as nursery:
        yield NbdRepository(uri, nursery, io_timeout_s)
        nursery.cancel_scope.cancel()


async def test_an_export_of_another_version_keeps_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handles: list[weakref.ref[Handle]] = []

    def connected(_uri: str, name: str, _attempt: object) -> tuple[Handle, Export]:
        handles.append(weakref.ref(handle := Handle()))
        return handle, Export(name, 2000, "")

    monkeypatch.setattr(nbd_connect, "connect_export", connected)
    async with repository() as found:
        source, filler = found.source(EXPORT), found.filler(EXPORT)
        kept: list[BaseException] = []  # as a failed image keeps a failure
        with pytest.raises(errors.ExportChanged) as caught:
            await source.pread(0, memoryview(bytearray(10)))
        kept.append(caught.value)
        with pytest.raises(errors.ExportChanged) as caught:
            await filler.run(object(), 1)  # type: ignore[arg-type]
        kept.append(caught.value)
        del caught
        with trio.fail_after(servers.DEADLINE_S):  # a thread that ends lets go a moment later
            while any(handle() is not None for handle in handles):
                await trio.sleep(0.01)
                gc.collect()
        assert len(handles) == len(kept) == 2


async def test_a_connection_that_is_dropped_while_it_is_made_is_closed_when_its_caller_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()

    def slow(_uri: str, name: str, _attempt: object) -> tuple[Handle, Export]:
        go_on.wait(servers.DEADLINE_S)
        return Handle(), EXPORT

    monkeypatch.setattr(nbd_connect, "connect_export", slow)
    monkeypatch.setattr("lazyfs.repository.nbd_handle.NbdHandle", Running)
    async with repository() as found:
        source = found.source(EXPORT)
        async with trio.open_nursery() as readers:
            readers.start_soon(source.pread, 0, memoryview(bytearray(10)))
            await trio.testing.wait_all_tasks_blocked()
            source.drop_connection()
            go_on.set()
        assert [one.broken for one in Running.made] == ["closed"]
        await source.pread(0, memoryview(bytearray(10)))  # a later call connects again
        assert [one.broken for one in Running.made] == ["closed", ""]


@pytest.mark.parametrize("readers", [1, 50])
async def test_a_lost_repository_is_asked_as_often_whoever_waits(
    monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    attempts = 0

    def down(uri: str, _name: str, _attempt: object) -> tuple[Handle, Export]:
        nonlocal attempts
        attempts += 1
        raise errors.ConnectionLost(uri, "refused")

    monkeypatch.setattr(nbd_connect, "connect_export", down)
    async with repository() as found:
        source = found.source(EXPORT)
        with trio.move_on_after(2):
            async with trio.open_nursery() as nursery:
                for _ in range(readers):
                    nursery.start_soon(source.pread, 0, memoryview(bytearray(10)))
        assert 3 <= attempts <= 8, "the pauses double from 0.05 s"
        assert found.statistics().failures == attempts


@pytest.mark.parametrize("call", ["list", "describe", "read", "fill"])
async def test_a_name_look_up_that_hangs_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The C library resolves names in a call that nothing interrupts."""
    hanging, hung = threading.Event(), threading.Event()

    def hangs(
        _host: object, _port: object, _family: int, _type: int, _proto: int, flags: int
    ) -> list[object]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "it is a name")
        hung.set()
        hanging.wait(2 * servers.DEADLINE_S)
        raise OSError("getaddrinfo: no answer")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    try:
        async with repository("nbd://name.invalid") as found:
            calls = {
                "list": found.list_exports,
                "describe": lambda: found.describe(["disk"]),
                "read": lambda: found.source(EXPORT).pread(0, memoryview(bytearray(10))),
                "fill": lambda: found.filler(EXPORT).run(object(), 10),  # type: ignore[arg-type]
            }
            with trio.fail_after(servers.DEADLINE_S), trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(calls[call])
                    while not hung.is_set():
                        await trio.sleep(0.01)
                    scope.cancel()
            assert scope.cancelled_caught
            assert not hanging.is_set()
            assert trio.current_effective_deadline() > trio.current_time()
    finally:
        hanging.set()


def forgotten(handle: NbdHandle) -> bool:
    """Whether libnbd keeps no command that has completed."""
    try:
        return bool(handle._handle.aio_peek_command_completed() == 0)
    except nbd.Error:  # there are none at all
        return True


@asynccontextmanager
async def connected(server: servers.Server, size: int) -> AsyncIterator[NbdHandle]:
    async with repository(server.uri) as found:
        description = (await found.describe([""]))[""]
        assert isinstance(description, Export)
        assert description.size == size
        yield await found.connect_export(description)


async def test_libnbd_forgets_every_command_however_it_ended(tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    arguments = ["--filter=error", "--filter=delay", "memory", "1M", "rdelay=10ms"]
    arguments += [f"error-file={trigger}", "error=EIO", "error-rate=100%"]
    with servers.nbdkit(tmp_path / "nbd.sock", *arguments) as server:
        async with connected(server, MiB) as handle:
            buffer = memoryview(bytearray(64 * KiB))
            await handle.pread(0, buffer)
            assert forgotten(handle)
            trigger.touch()
            for _ in range(10):
                with pytest.raises(errors.RequestFailed) as caught:
                    await handle.pread(0, buffer)
                assert caught.value.code == errno.EIO
                with pytest.raises(errors.RequestFailed):
                    await handle.block_status(ByteRange(0, MiB))
                failed = list[Any]()
                assert handle.submit(0, buffer, failed.append)
                while not failed:
                    await trio.sleep(0.001)
                assert isinstance(failed[0], errors.RequestFailed)
            assert forgotten(handle)
            trigger.unlink()
            for seconds in (0.0, 0.002, 0.005, 0.009, 0.011, 0.015) * 3:
                with trio.move_on_after(seconds):
                    await handle.pread(0, buffer)
                with trio.move_on_after(seconds):
                    await handle.block_status(ByteRange(0, MiB))
            answers: list[Any] = []
            assert handle.submit(0, buffer, answers.append)
            with trio.fail_after(servers.DEADLINE_S):
                while handle._orphans or not answers:
                    await trio.sleep(0.01)
            assert answers == [None]
            assert forgotten(handle)
            assert not handle._in_flight
            assert not handle._asked_bytes
            await handle.pread(0, buffer)


async def slow_link(server: Path, place: Path, *, task_status: trio.TaskStatus[None]) -> None:
    """Relay connections to `server`; what it answers passes at 256 KiB/s."""
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    with listener:
        await listener.bind(str(place))
        listener.listen()
        task_status.started()
        await _relay_all(listener, server)


async def _relay_all(listener: trio.socket.SocketType, server: Path) -> None:

    async def relay(source: trio.SocketStream, sink: trio.SocketStream, pause_s: float) -> None:
        with suppress(trio.BrokenResourceError):  # a client goes when it knows enough
            while data := await source.receive_some(16 * KiB):
                await trio.sleep(pause_s * len(data) / (16 * KiB))
                await sink.send_all(data)
            await sink.send_eof()

    async def serve(client: trio.SocketStream) -> None:
        behind = await trio.open_unix_socket(str(server))
        async with client, behind, trio.open_nursery() as both:
            both.start_soon(relay, client, behind, 0.0)
            both.start_soon(relay, behind, client, 1 / 16)

    async with trio.open_nursery() as nursery:
        while True:
            connection, _ = await listener.accept()
            nursery.start_soon(serve, trio.SocketStream(connection))


async def test_a_connection_that_failed_is_closed_without_the_garbage_collector(
    tmp_path: Path,
) -> None:
    """An error that refers to a frame which refers to it would keep the connection until then."""
    trigger = tmp_path / "trigger"
    arguments = ["--filter=error", "memory", "1M", f"error-file={trigger}", "error-rate=100%"]
    with servers.nbdkit(tmp_path / "nbd.sock", *arguments) as server:
        gc.collect()
        gc.disable()
        try:
            async with repository(server.uri) as found:
                description = (await found.describe([""]))[""]
                assert isinstance(description, Export)
                before = own_sockets()
                await _everything_fails(found, description, trigger, server)
                with trio.fail_after(servers.DEADLINE_S):
                    while own_sockets() != before:
                        await trio.sleep(0.01)
        finally:
            gc.enable()


async def _everything_fails(
    found: NbdRepository, export: Export, trigger: Path, server: servers.Server
) -> None:
    source, filler = found.source(export), found.filler(export)
    buffer = memoryview(bytearray(4 * KiB))
    await source.pread(0, buffer)
    trigger.touch()  # noqa: ASYNC240
    with pytest.raises(errors.RequestFailed):
        await source.pread(0, buffer)
    with pytest.raises(errors.RequestFailed):
        await source.block_status(ByteRange(0, MiB))
    source.drop_connection()
    await filler.run(Work(export, [ByteRange(0, MiB)]), 5)
    trigger.unlink()  # noqa: ASYNC240
    full = Work(export, [ByteRange(0, MiB)])
    full.on_write = _no_space
    await filler.run(full, 5)
    await source.pread(0, buffer)
    server.kill()
    with trio.move_on_after(0.3):
        await source.pread(0, buffer)
    with pytest.raises(errors.ConnectionLost):
        await filler.run(Work(export, [ByteRange(0, MiB)]), 5)
    server.restart()
    await filler.aclose()


def own_sockets() -> int:
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(fd))
    return sum(link.startswith("socket:") for link in links)


def _no_space(_offset: int) -> None:
    raise errors.NoSpace


async def test_a_link_too_slow_for_the_timeout_still_brings_what_was_asked_for(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    """1 MiB takes 4 s at 256 KiB/s. --io-timeout is 1 s, so the connection may stall for 0.33 s."""
    place = tmp_path / "slow.sock"
    with servers.nbdkit(tmp_path / "nbd.sock", "memory", "1M") as server:
        await nursery.start(slow_link, server.path, place)
        async with repository(f"nbd+unix:///?socket={place}", io_timeout_s=1) as found:
            description = (await found.describe([""]))[""]
            assert isinstance(description, Export)
            source = found.source(description)
            await source.block_status(ByteRange(0, MiB))  # it is connected
            answers: list[Any] = []
            began = trio.current_time()
            assert source.submit(0, memoryview(bytearray(MiB)), answers.append)
            work = Work(description, [ByteRange(0, MiB)])
            filler = found.filler(description)
            with trio.fail_after(servers.DEADLINE_S):
                await filler.run(work, 60)
                while not answers:
                    await trio.sleep(0.05)
            assert answers == [None]
            assert trio.current_time() > began + 2, "the link was not slow"
            work.check_all_kept()
            assert found.statistics().failures == 0
            await filler.aclose()
        nursery.cancel_scope.cancel()


async def test_look_ups_that_hang_take_no_threads_of_readers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()

    def hangs(*_arguments: object) -> list[object]:
        go_on.wait(servers.DEADLINE_S)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    resolver, default = Resolver(), trio.to_thread.current_default_thread_limiter()
    with trio.move_on_after(0.2):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(resolver.getaddrinfo, b"name.invalid", 1)
            await trio.sleep_forever()
    try:
        assert default.borrowed_tokens == 0
        assert resolver._limiter.borrowed_tokens == 50
    finally:
        go_on.set()


async def test_a_comparison_that_fails_halfway_gives_its_buffers_back() -> None:
    taken: list[NbdBuffer] = []
    real = nbd_buffers.take

    class Stalls:
        def get_block_size(self, _which: int) -> int:
            return 1

        def get_size(self) -> int:
            return 1 << 20

        def aio_pread(self, _buffer: object, _offset: int, _completed: object) -> int:
            raise nbd.Error("aio_pread", "failed", 5)

    with pytest.MonkeyPatch.context() as patch:

        def take(size: int) -> NbdBuffer:
            taken.append(buffer := real(size))
            return buffer

        patch.setattr(nbd_buffers, "take", take)
        handle = Stalls()
        sample = Sample(0, b"x" * 512)
        lost = ""
        try:
            nbd_connect.compare(handle, "nbd://x", "disk", [sample], nbd_connect.Attempt())  # type: ignore[arg-type]
        except errors.ConnectionLost as error:
            lost = error.reason
        assert lost
        assert len(taken) == 1
        assert taken[0] not in free_buffers(), "libnbd may still write to it"
        del handle
        gc.collect()
        assert taken[0] in free_buffers()


def free_buffers() -> list[NbdBuffer]:
    return [buffer for free in nbd_buffers._free.values() for buffer in free]
