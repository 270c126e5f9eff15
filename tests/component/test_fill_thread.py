"""Fill connections with real servers: every claim is given back, whatever happens."""

import functools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import servers
import trio
from fakes import BookedClaim
from filling import Work, until
from peers import Peers
from scripted_server import Conversation, ScriptedServer, no_data, simple_reply, transmission

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.interfaces import Export, Filler
from lazyfs.repository import fill_thread
from lazyfs.repository.nbd_repository import NbdRepository
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio

SIZE = 16 * MiB
ALL = [ByteRange(0, SIZE)]
EXPORT = Export("", SIZE, "")
BLOCK = 64 * KiB


@pytest.fixture(autouse=True)
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make requests small, so that a small image needs many of them."""
    monkeypatch.setattr(fill_thread, "REQUEST", 256 * KiB)


@functools.cache
def pattern(size: int) -> bytes:
    """Return what nbdkit's pattern plugin serves: each 8 bytes contain their offset."""
    return b"".join(offset.to_bytes(8, "big") for offset in range(0, size, 8))[:size]


@pytest.fixture
def filler_of(nursery: trio.Nursery) -> Callable[..., Filler]:
    def make(
        server: servers.Server | ScriptedServer, export: Export = EXPORT, io_timeout_s: float = 30.0
    ) -> Filler:
        return NbdRepository(server.uri, nursery, io_timeout_s).filler(export)

    return make


async def run(filler: Filler, work: Work, duration_s: float = 60.0) -> None:
    with trio.fail_after(servers.DEADLINE_S):
        await filler.run(work, duration_s)


@asynccontextmanager
async def running(filler: Filler, work: Work) -> AsyncIterator[list[BaseException]]:
    """Run the filler beside the block. After the block, the list has the errors that it raised."""
    raised: list[BaseException] = []

    async def runner() -> None:
        try:
            await run(filler, work)
        except errors.LazyfsError as error:
            raised.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner)
        yield raised


def by(work: Work, kind: type[Exception]) -> list[BookedClaim]:
    return [claim for claim, error in work.dropped if isinstance(error, kind)]


# -- what should happen


async def test_every_claim_is_kept_and_every_byte_is_asked_for_once(
    peers: Peers, filler_of: Any
) -> None:
    server = peers.nbdkit("pattern", f"size={SIZE}")
    work = Work(EXPORT, ALL)
    filler = filler_of(server)
    await run(filler, work)
    work.check_all_kept()
    assert not work.dropped
    assert bytes(work.file) == pattern(SIZE)
    reads = sorted(server.reads())
    assert reads == [
        (offset, fill_thread.REQUEST) for offset in range(0, SIZE, fill_thread.REQUEST)
    ]
    assert threading.get_ident() not in work.threads
    await filler.aclose()


async def test_zeroes_are_never_asked_for(peers: Peers, filler_of: Any) -> None:
    server = peers.nbdkit("pattern", f"size={SIZE}")
    data = [
        ByteRange(0, 4 * KiB), ByteRange(8 * KiB, 12 * KiB), ByteRange(60 * KiB, 70 * KiB),
        ByteRange(5 * MiB, 5 * MiB + 300 * KiB), ByteRange(SIZE - 4 * KiB, SIZE),
    ]  # fmt: skip
    work = Work(EXPORT, data)
    await run(filler_of(server), work)
    work.check_all_kept()
    expected = bytearray(SIZE)
    for part in data:
        expected[part.start : part.end] = pattern(SIZE)[part.start : part.end]
    assert work.file == expected
    assert sum(length for _, length in server.reads()) == sum(part.length for part in data)
    for offset, length in server.reads():
        assert any(part.start <= offset and offset + length <= part.end for part in data)


async def test_nothing_but_zeroes_needs_no_request(peers: Peers, filler_of: Any) -> None:
    server = peers.nbdkit("pattern", f"size={SIZE}")
    work = Work(EXPORT, [])
    await run(filler_of(server), work)
    work.check_all_kept()
    assert server.reads() == []


@pytest.mark.parametrize("size", [1, 512, 4 * KiB + 1, 3 * MiB + 12345])
async def test_sizes_that_are_no_multiple_of_anything(
    peers: Peers, filler_of: Any, size: int
) -> None:
    export = Export("", size, "")
    work = Work(export, [ByteRange(0, size)])
    await run(filler_of(peers.nbdkit("pattern", f"size={size}"), export), work)
    work.check_all_kept()
    assert bytes(work.file) == pattern(size)


async def test_blocks_larger_than_a_request(peers: Peers, filler_of: Any) -> None:
    server = peers.nbdkit("pattern", f"size={SIZE}")
    work = Work(EXPORT, ALL, block_size=4 * MiB)
    filler = filler_of(server)
    await run(filler, work)
    work.check_all_kept()
    assert bytes(work.file) == pattern(SIZE)
    small = Work(EXPORT, ALL)  # the same connection, after its buffers have grown
    await run(filler, small)
    small.check_all_kept()
    assert bytes(small.file) == pattern(SIZE)


async def test_claims_of_all_sizes_share_the_buffers(peers: Peers, filler_of: Any) -> None:
    """Parts at both ends of large blocks, single sectors, whole blocks, nothing."""
    server = peers.nbdkit("pattern", f"size={SIZE}")
    data = []
    for i, start in enumerate(range(0, SIZE, MiB)):
        if i % 4 == 0:
            data += [
                ByteRange(start, start + 4 * KiB),
                ByteRange(start + MiB - 4 * KiB, start + MiB),
            ]
        elif i % 4 == 1:
            data.append(ByteRange(start, start + MiB))
        elif i % 4 == 2:
            data.append(ByteRange(start + 512 * KiB, start + 516 * KiB))
    work = Work(EXPORT, data, block_size=MiB)
    await run(filler_of(server), work)
    work.check_all_kept()
    for part in data:
        assert work.file[part.start : part.end] == pattern(SIZE)[part.start : part.end]
    assert sum(length for _, length in server.reads()) == sum(part.length for part in data)


async def test_requests_are_in_flight_together(peers: Peers, filler_of: Any) -> None:
    """16 requests of 0.1 s each, 4 at a time."""
    server = peers.nbdkit("--filter=delay", "pattern", "size=4M", "rdelay=100ms")
    export = Export("", 4 * MiB, "")
    work = Work(export, [ByteRange(0, 4 * MiB)])
    most = 0

    def count() -> float:
        nonlocal most
        most = max(most, len(work.outstanding))
        return 0.0

    work.on_claim = count
    await run(filler_of(server, export), work)
    work.check_all_kept()
    assert most == fill_thread.IN_FLIGHT - 1  # outstanding while the last of them is claimed


async def test_a_turn_ends_after_its_time_and_the_next_goes_on(
    peers: Peers, filler_of: Any
) -> None:
    server = peers.nbdkit("--filter=delay", "pattern", f"size={SIZE}", "rdelay=20ms")
    work = Work(EXPORT, ALL)
    filler = filler_of(server)
    turns = 0
    with trio.fail_after(servers.DEADLINE_S):
        while len(work.kept) < SIZE // fill_thread.REQUEST:
            turns += 1
            await filler.run(work, 0.05)
            assert not work.outstanding
    assert turns > 1
    work.check_all_kept()
    assert not work.dropped
    assert bytes(work.file) == pattern(SIZE)
    assert server.request_log.read_text().count(" Connect ") == 1, "one connection for all turns"


async def test_waiting_when_told_to(peers: Peers, filler_of: Any) -> None:
    """A number instead of a claim is a time to wait, with and without requests in flight."""
    work = Work(EXPORT, ALL)
    asked: list[float] = []

    def pace() -> float:
        asked.append(time.monotonic())
        return 0.02 if len(asked) % 3 == 0 else 0.0

    work.on_claim = pace
    await run(filler_of(peers.nbdkit("pattern", f"size={SIZE}")), work)
    work.check_all_kept()
    waits = [after - before for before, after in zip(asked[2::3], asked[3::3], strict=False)]
    assert len(asked) < 200, "it does not spin"
    assert waits


async def test_idle_waits_are_not_mistaken_for_a_silent_server(
    peers: Peers, filler_of: Any
) -> None:
    work = Work(EXPORT, ALL)
    asked = 0

    def pace() -> float:
        nonlocal asked
        asked += 1
        return 0.25 if asked <= 4 else 0.0

    work.on_claim = pace
    await run(filler_of(peers.nbdkit("pattern", f"size={SIZE}"), io_timeout_s=0.6), work)
    work.check_all_kept()


async def test_nothing_left_to_claim(peers: Peers, filler_of: Any) -> None:
    work = Work(EXPORT, ALL)
    work.on_claim = lambda: None
    await run(filler_of(peers.nbdkit("pattern", f"size={SIZE}")), work)
    assert not work.kept
    assert not work.dropped


# -- what should not


async def test_requests_that_fail_are_dropped_alone(
    peers: Peers, filler_of: Any, tmp_path: Path
) -> None:
    trigger = tmp_path / "trigger"
    trigger.touch()
    server = peers.nbdkit("--filter=error", "pattern", f"size={SIZE}", "error-pread=EIO", "error-pread-rate=30%",
                          f"error-file={trigger}")  # fmt: skip
    work = Work(EXPORT, ALL)
    filler = filler_of(server)
    await run(filler, work)
    assert not work.outstanding
    failed = by(work, errors.RequestFailed)
    assert 0 < len(failed) == len(work.dropped) < SIZE // fill_thread.REQUEST
    assert len(failed) + len(work.kept) == SIZE // fill_thread.REQUEST
    for claim in failed:
        span = claim.parts[0]
        assert bytes(work.file[span.start : span.end]) == bytes(span.length), (
            "nothing is kept of a reply that failed"
        )
    trigger.unlink()
    work.retry()
    await run(filler, work)
    work.check_all_kept()
    assert bytes(work.file) == pattern(SIZE)
    assert server.request_log.read_text().count(" Connect ") == 1


async def test_one_bad_part_drops_the_whole_claim(
    peers: Peers, filler_of: Any, tmp_path: Path
) -> None:
    """The claim is dropped even if its other parts have arrived."""
    script = 'if [ "$4" -eq 8192 ]; then echo EIO bad sector >&2; exit 1; fi; dd if=/dev/zero bs="$3" count=1 status=none'
    server = peers.nbdkit("eval", "get_size=echo 1048576", f"pread={script}")
    export = Export("", MiB, "")
    data = [
        ByteRange(0, 4 * KiB),
        ByteRange(8 * KiB, 12 * KiB),
        ByteRange(16 * KiB, 20 * KiB),
        ByteRange(512 * KiB, MiB),
    ]
    work = Work(export, data)
    written: list[int] = []
    work.on_write = written.append
    await run(filler_of(server, export), work)
    assert [claim.run.first for claim in by(work, errors.RequestFailed)] == [0]
    assert all(offset >= 512 * KiB for offset in written)


@pytest.mark.parametrize("error", [errors.NoSpace(), OSError(5, "Input/output error")])
async def test_what_cannot_be_written_is_dropped(
    peers: Peers, filler_of: Any, error: Exception
) -> None:
    work = Work(EXPORT, ALL)

    def full(offset: int) -> None:
        if offset >= SIZE // 2:
            raise error

    work.on_write = full
    await run(filler_of(peers.nbdkit("pattern", f"size={SIZE}")), work)
    assert not work.outstanding
    assert {dropped for _, dropped in work.dropped} == {error}
    assert len(work.dropped) == len(work.kept) == SIZE // fill_thread.REQUEST // 2


async def test_a_server_killed_in_the_middle(peers: Peers, filler_of: Any) -> None:
    server = peers.nbdkit("--filter=delay", "pattern", f"size={SIZE}", "rdelay=50ms")
    work = Work(EXPORT, ALL)
    filler = filler_of(server)
    async with running(filler, work) as raised:
        await until(lambda: len(work.kept) >= 4)
        server.kill()
    assert [type(error) for error in raised] == [errors.ConnectionLost]
    assert not work.outstanding
    assert 0 < len(work.dropped) <= fill_thread.IN_FLIGHT
    assert {error for _, error in work.dropped} == {None}, "the claims are not to blame"
    with pytest.raises(errors.ConnectionLost):
        await run(filler, work)
    server.start()
    work.retry()
    await run(filler, work)
    work.check_all_kept()
    assert bytes(work.file) == pattern(SIZE)


async def test_a_server_that_stops_answering(peers: Peers, filler_of: Any) -> None:
    server = peers.nbdkit("--filter=delay", "pattern", f"size={SIZE}", "rdelay=30")
    work = Work(EXPORT, ALL)
    with pytest.raises(errors.ConnectionLost, match=r"no reply in 0\.3 s"):
        await run(filler_of(server, io_timeout_s=0.9), work)
    assert not work.outstanding
    assert len(work.dropped) == fill_thread.IN_FLIGHT


async def test_cancelled_in_the_middle(peers: Peers, filler_of: Any) -> None:
    """The requests take 30 s, but the connection ends at once, and late replies reach no buffer."""
    server = peers.nbdkit("--filter=delay", "pattern", f"size={SIZE}", "rdelay=30")
    work = Work(EXPORT, ALL)
    filler = filler_of(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, filler, work)
        await until(lambda: len(work.outstanding) == fill_thread.IN_FLIGHT)
        began = time.monotonic()
        nursery.cancel_scope.cancel()
    assert time.monotonic() - began < 0.5
    assert not work.outstanding
    assert [error for _, error in work.dropped] == [None] * fill_thread.IN_FLIGHT
    assert not work.kept


async def test_cancelled_while_waiting_as_told(peers: Peers, filler_of: Any) -> None:
    work = Work(EXPORT, ALL)
    asked = threading.Event()

    def pace() -> float:
        asked.set()
        return 3600.0

    work.on_claim = pace
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, filler_of(peers.nbdkit("pattern", f"size={SIZE}")), work)
        await until(asked.is_set)
        began = time.monotonic()
        nursery.cancel_scope.cancel()
    assert time.monotonic() - began < 0.5


async def test_cancelled_and_run_again(peers: Peers, filler_of: Any) -> None:
    """The server answers 13 requests of each connection and no more."""

    def script(conversation: Conversation) -> None:
        answered = 0

        def answer(conversation: Conversation, handle: bytes, offset: int, length: int) -> None:
            nonlocal answered
            answered += 1
            if answered > 13:
                conversation.until_gone()
            conversation.send(simple_reply(handle) + pattern(SIZE)[offset : offset + length])

        transmission(SIZE, answer)(conversation)

    server = peers.scripted(script)
    work = Work(EXPORT, ALL)
    filler = filler_of(server)
    for round_ in range(1, 5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, filler, work)
            await until(lambda: len(work.kept) == 13 * round_)  # noqa: B023 - it is awaited here
            await until(lambda: len(work.outstanding) == fill_thread.IN_FLIGHT)
            nursery.cancel_scope.cancel()
        assert not work.outstanding
        work.retry()
    await run(filler, work)
    work.check_all_kept()
    assert server.clients == 5
    assert bytes(work.file) == pattern(SIZE)


async def test_requests_answered_without_data_are_dropped(peers: Peers, filler_of: Any) -> None:
    """What the buffers contained before does not belong to the image."""

    def answer(conversation: Conversation, handle: bytes, offset: int, length: int) -> None:
        conversation.send(no_data(handle))

    work = Work(EXPORT, ALL)
    await run(filler_of(peers.scripted(transmission(SIZE, answer, structured=True))), work)
    assert not work.kept
    assert not any(work.file)
    assert all(isinstance(error, errors.RequestFailed) for _, error in work.dropped)
    assert work.dropped


@pytest.mark.parametrize("expected", [Export("", SIZE + 512, ""), Export("", SIZE, "v1")])
async def test_another_version_of_the_export(
    peers: Peers, filler_of: Any, expected: Export
) -> None:
    work = Work(expected, ALL)
    with pytest.raises(errors.ExportChanged):
        await run(filler_of(peers.nbdkit("pattern", f"size={SIZE}"), expected), work)
    assert not work.kept
    assert not work.dropped
    assert not work.threads, "nothing is claimed before the export is known to be the same"


async def test_the_export_changes_while_the_server_is_restarted(
    peers: Peers, filler_of: Any
) -> None:
    server = peers.nbdkit("--filter=delay", "pattern", f"size={SIZE}", "rdelay=20ms")
    work = Work(EXPORT, ALL)
    filler = filler_of(server)
    async with running(filler, work) as raised:
        await until(lambda: work.kept)
        server.kill()
    assert [type(error) for error in raised] == [errors.ConnectionLost]
    server.command = [word.replace(f"size={SIZE}", f"size={SIZE * 2}") for word in server.command]
    server.start()
    kept = len(work.kept)
    with pytest.raises(errors.ExportChanged, match=f"was {SIZE} bytes, now {SIZE * 2} bytes"):
        await run(filler, work)
    assert len(work.kept) == kept
    assert not work.outstanding


async def test_many_fillers_at_once(peers: Peers, filler_of: Any) -> None:
    server = peers.nbdkit("pattern", f"size={SIZE}", log=False)
    works = [Work(EXPORT, ALL) for _ in range(8)]
    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(run, filler_of(server), work)
    for work in works:
        work.check_all_kept()
        assert bytes(work.file) == pattern(SIZE)


async def test_closing_gives_up_connection_and_buffers(
    peers: Peers, filler_of: Any, count_open_files: Callable[[], int]
) -> None:
    server = peers.nbdkit("pattern", f"size={SIZE}")
    before = count_open_files()
    filler = filler_of(server)
    await run(filler, Work(EXPORT, ALL))
    assert count_open_files() == before + 1
    await filler.aclose()
    assert count_open_files() == before
    await run(filler, Work(EXPORT, ALL))
    await filler.aclose()
    assert count_open_files() == before
