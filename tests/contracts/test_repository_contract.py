"""What every Repository, Source and Filler promises: the fake, and NBD against real servers."""

import errno
import math
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest
import servers
import trio
from fakes import POISON, BookedClaim, FakeRepository, pattern

from lazyfs import errors
from lazyfs.core.block_map import BlockMap
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.interfaces import Claim, Export, Repository, Sample, Source
from lazyfs.repository.nbd_repository import NbdRepository
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio

SIZE = 3 * MiB - 512
HOLES = [ByteRange(256 * KiB, 512 * KiB), ByteRange(MiB, 2 * MiB)]
BLOCK = 64 * KiB
DEADLINE_S = 20.0


class Lab(Protocol):
    """Has two exports, "disk" (with HOLES) and "team/other", and can be made to fail."""

    content: bytes
    """The content of "disk"."""

    def repository(self, nursery: trio.Nursery) -> Repository: ...
    def reads(self) -> list[ByteRange]:
        """Return what was read of "disk"."""
        ...

    def stop(self) -> None: ...
    def start(self) -> None: ...
    def fail(self, on: bool) -> None:
        """Refuse all reads with EIO."""
        ...

    def change(self) -> None:
        """Give "disk" another size, as a server has it that was stopped and started."""
        ...

    def remove(self) -> None:
        """Take "disk" away, in the same way."""
        ...


class FakeLab:
    def __init__(self, _folder: Path, _stack: ExitStack) -> None:
        self._fake = FakeRepository()
        self.content = self._fake.add("disk", pattern(SIZE), HOLES).content
        self._fake.add("team/other", b"other" * 1000)

    def repository(self, nursery: trio.Nursery) -> Repository:
        self._fake.nursery = nursery
        return self._fake

    def reads(self) -> list[ByteRange]:
        return self._fake.reads("disk")

    def stop(self) -> None:
        self._fake.down = True

    def start(self) -> None:
        self._fake.down = False

    def fail(self, on: bool) -> None:
        if on:
            self._fake.fail("disk", ByteRange(0, SIZE), errno.EIO)
        else:
            self._fake.heal()

    def change(self) -> None:
        self._fake.add("disk", self.content + bytes(512))

    def remove(self) -> None:
        del self._fake.exports["disk"]


class NbdkitLab:
    """Runs `nbdkit file dir=`. It cannot have names with "/", so "team/other" is "team-other"."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._images = folder / "images"
        self._images.mkdir()
        self._trigger = folder / "fail"
        content = bytearray(pattern(SIZE))
        with (self._images / "disk").open("wb") as file:
            position = 0
            for hole in [*HOLES, ByteRange(SIZE, SIZE)]:
                content[hole.start : hole.end] = bytes(hole.length)
                file.seek(position)
                file.write(content[position : hole.start])
                position = hole.end
        self.content = bytes(content)
        (self._images / "other").write_bytes(b"other" * 1000)
        self._server = stack.enter_context(
            servers.nbdkit(
                folder / "nbd.sock",
                *("--filter=error", "file", f"dir={self._images}"),
                *("error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={self._trigger}"),
            )
        )

    def repository(self, nursery: trio.Nursery) -> Repository:
        return NbdRepository(self._server.uri, nursery, io_timeout_s=60)

    def reads(self) -> list[ByteRange]:
        return [ByteRange(start, start + length) for start, length in self._server.reads("disk")]

    def stop(self) -> None:
        self._server.kill()

    def start(self) -> None:
        self._server.start()

    def fail(self, on: bool) -> None:
        if on:
            self._trigger.touch()
        else:
            self._trigger.unlink()

    def change(self) -> None:
        self.stop()
        os.truncate(self._images / "disk", SIZE + 512)
        self.start()

    def remove(self) -> None:
        self.stop()
        (self._images / "disk").unlink()
        self.start()


@pytest.fixture(params=[FakeLab, NbdkitLab], ids=["fake", "nbdkit"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield request.param(tmp_path, stack)


@asynccontextmanager
async def connected(lab: Lab) -> AsyncIterator[tuple[Repository, Export]]:
    """Give a repository and its export "disk". Nothing may take longer than the deadline."""
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            repository = lab.repository(nursery)
            found = (await repository.describe(["disk"]))["disk"]
            assert isinstance(found, Export)
            yield repository, found
            nursery.cancel_scope.cancel()


@contextmanager
def raises(kind: type[Exception]) -> Iterator[None]:
    """Do what pytest.raises does. Around an await that the deadline cancels, pytest.raises would
    hide that."""
    with pytest.raises(kind):
        yield


# -- names and sizes


async def test_exports_are_listed(lab: Lab) -> None:
    async with connected(lab) as (repository, _):
        listed = await repository.list_exports()
        assert len(listed) == 2
        assert "disk" in listed
        assert repository.connected


async def test_exports_are_described_and_unknown_ones_spoil_no_other(lab: Lab) -> None:
    async with connected(lab) as (repository, _):
        found = await repository.describe(["no such", "disk", "", "x" * 5000])
        assert found["disk"] == Export("disk", SIZE, "")
        assert isinstance(found["no such"], str)
        assert found["no such"]
        assert list(found) == ["no such", "disk", "", "x" * 5000]
        assert await repository.describe([]) == {}


async def test_a_repository_that_is_down_says_so_at_once_and_comes_back(lab: Lab) -> None:
    async with connected(lab) as (repository, _):
        lab.stop()
        for attempt in (repository.list_exports, lambda: repository.describe(["disk"])):
            with raises(errors.ConnectionLost):
                await attempt()
            assert not repository.connected
        lab.start()
        assert "disk" in await repository.list_exports()
        assert repository.connected


# -- Source


async def test_a_source_reads_any_range(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        for asked in [
            ByteRange(0, 1),
            ByteRange(511, 70000),
            ByteRange(SIZE - 1, SIZE),
            ByteRange(0, SIZE),
        ]:
            buffer = bytearray(asked.length)
            await source.pread(asked.start, memoryview(buffer))
            assert buffer == lab.content[asked.start : asked.end]
        source.drop_connection()
        buffer = bytearray(512)
        await source.pread(512, memoryview(buffer))  # connects again
        assert buffer == lab.content[512:1024]
        source.drop_connection()


async def test_a_new_connection_is_compared_with_the_samples(lab: Lab) -> None:
    right = [Sample(512, lab.content[512:66048]), Sample(SIZE - 1, lab.content[-1:])]
    wrong = [*right, Sample(4096, bytes([lab.content[4096] ^ 1]))]
    async with connected(lab) as (repository, export):
        for reads in (repository.source(export, lambda: right), repository.source(export)):
            buffer = bytearray(10)
            await reads.pread(0, memoryview(buffer))
            assert buffer == lab.content[:10]
            await reads.compare()
            reads.drop_connection()
        changed = repository.source(export, lambda: wrong)
        with pytest.raises(errors.ContentChanged) as difference:
            await changed.pread(0, memoryview(bytearray(10)))
        assert (difference.value.start, difference.value.end) == (4096, 4097)
        with pytest.raises(errors.ContentChanged):
            await changed.compare()
        changed.drop_connection()
        filler = repository.filler(export, lambda: wrong)
        with pytest.raises(errors.ContentChanged):
            await filler.run(Nothing(export), 1)
        await filler.aclose()


class Nothing:
    """Has nothing to fill. Implements `interfaces.FillWork`."""

    def __init__(self, export: Export) -> None:
        self.export = export

    def claim(self, limit: int) -> Claim | float | None:
        return None


async def test_many_reads_at_once(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        found = bytearray(SIZE)
        async with trio.open_nursery() as nursery:
            for piece in ByteRange(0, SIZE).split(100_000):
                nursery.start_soon(
                    source.pread, piece.start, memoryview(found)[piece.start : piece.end]
                )
        assert found == lab.content
        assert sorted(lab.reads()) == list(ByteRange(0, SIZE).split(100_000))
        source.drop_connection()


class Submitted:
    """Holds a request without a task of its own, and how it ended."""

    def __init__(self, source: Source, asked: ByteRange) -> None:
        self.buffer = bytearray([POISON]) * asked.length
        self.ended = trio.Event()
        self.sent = source.submit(asked.start, memoryview(self.buffer), self._answered)
        assert not self.ended.is_set(), "later, not from within"

    def _answered(self, error: errors.LazyfsError | None) -> None:
        assert not self.ended.is_set(), "once"
        self.error = error
        self.ended.set()

    async def outcome(self) -> errors.LazyfsError | None:
        assert self.sent
        await self.ended.wait()
        return self.error


async def test_what_is_submitted_is_answered_once_there_is_a_connection(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        assert not Submitted(source, ByteRange(0, 512)).sent
        await source.pread(0, memoryview(bytearray(512)))
        pieces = list(ByteRange(0, SIZE).split(100_000))
        requests = [Submitted(source, piece) for piece in pieces]
        assert [await request.outcome() for request in requests] == [None] * len(pieces)
        assert b"".join(request.buffer for request in requests) == lab.content
        assert sorted(lab.reads())[1:] == pieces
        source.drop_connection()
        assert not Submitted(source, ByteRange(0, 512)).sent


async def test_a_refused_submission_fails_alone(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        await source.pread(0, memoryview(bytearray(512)))
        lab.fail(True)
        for _ in range(2):
            error = await Submitted(source, ByteRange(0, 512)).outcome()
            assert isinstance(error, errors.RequestFailed)
            assert error.code == errno.EIO
        lab.fail(False)
        request = Submitted(source, ByteRange(0, 512))
        assert await request.outcome() is None
        assert request.buffer == lab.content[:512]
        source.drop_connection()


@pytest.mark.parametrize("loss", ["the server ends", "it has another version", "closed by us"])
async def test_what_is_submitted_before_a_loss_hears_of_it(lab: Lab, loss: str) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        await source.pread(0, memoryview(bytearray(512)))
        before = [Submitted(source, ByteRange(i * 4096, (i + 1) * 4096)) for i in range(8)]
        if loss == "closed by us":
            source.drop_connection()
        elif loss == "the server ends":
            lab.stop()
        else:
            lab.change()
        for i, request in enumerate(before):  # the server may have been faster
            error = await request.outcome()
            assert isinstance(error, errors.ConnectionLost | None)
            assert error is not None or request.buffer == lab.content[i * 4096 : (i + 1) * 4096]
        after = Submitted(source, ByteRange(0, 512))
        assert not after.sent or isinstance(await after.outcome(), errors.ConnectionLost)
        source.drop_connection()


async def test_block_status_leaves_out_what_reads_as_zeroes(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        data = [
            ByteRange(0, HOLES[0].start),
            ByteRange(HOLES[0].end, HOLES[1].start),
            ByteRange(HOLES[1].end, SIZE),
        ]
        assert await source.block_status(ByteRange(0, SIZE)) == data
        part = ByteRange(300 * KiB, 600 * KiB)
        assert await source.block_status(part) == [ByteRange(512 * KiB, 600 * KiB)]
        assert await source.block_status(HOLES[1]) == []
        assert lab.reads() == []
        source.drop_connection()


async def test_a_refused_read_fails_alone_and_on_the_same_source_later_ones_work(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        lab.fail(True)
        for _ in range(2):
            with pytest.raises(errors.RequestFailed) as caught:
                await source.pread(0, memoryview(bytearray(512)))
            assert caught.value.code == errno.EIO
        lab.fail(False)
        buffer = bytearray([POISON]) * 512
        await source.pread(0, memoryview(buffer))
        assert buffer == lab.content[:512]
        source.drop_connection()


async def test_a_source_waits_for_a_repository_that_is_down(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        await source.pread(0, memoryview(bytearray(512)))
        lab.stop()
        buffers = [bytearray(4096) for _ in range(8)]
        windows: list[list[ByteRange]] = []

        async def ask() -> None:
            windows.append(await source.block_status(HOLES[0]))

        async with trio.open_nursery() as nursery:
            for i, buffer in enumerate(buffers):
                nursery.start_soon(source.pread, i * 4096, memoryview(buffer))
            nursery.start_soon(ask)
            while repository.connected:
                await trio.sleep(0.01)
            lab.start()
        assert b"".join(buffers) == lab.content[: 8 * 4096]
        assert windows == [[]]
        source.drop_connection()


async def test_a_read_of_a_repository_that_is_down_can_be_cancelled(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        lab.stop()
        source = repository.source(export)
        with trio.move_on_after(0.2) as scope:
            await source.pread(0, memoryview(bytearray(512)))
        assert scope.cancelled_caught
        lab.start()
        buffer = bytearray(512)
        await source.pread(0, memoryview(buffer))
        assert buffer == lab.content[:512]
        source.drop_connection()


async def test_a_source_notices_another_version(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        await source.pread(0, memoryview(bytearray(512)))
        lab.change()
        with raises(errors.ExportChanged):
            await source.pread(512, memoryview(bytearray(512)))
        with raises(errors.ExportChanged):
            await source.block_status(ByteRange(0, SIZE))
        source.drop_connection()
        now = (await repository.describe(["disk"]))["disk"]
        assert isinstance(now, Export)
        assert now.size == SIZE + 512
        source = repository.source(now)
        await source.pread(SIZE, memoryview(bytearray(512)))
        source.drop_connection()


async def test_a_source_expects_the_identity_it_was_made_for(lab: Lab) -> None:
    async with connected(lab) as (repository, _):
        source = repository.source(Export("disk", SIZE, "another"))
        with raises(errors.ExportChanged):
            await source.pread(512, memoryview(bytearray(512)))
        source.drop_connection()


async def test_a_source_waits_for_an_export_that_is_gone(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        source = repository.source(export)
        await source.pread(0, memoryview(bytearray(512)))
        lab.remove()
        with trio.move_on_after(0.5) as scope:
            await source.pread(512, memoryview(bytearray(512)))
        assert scope.cancelled_caught
        source.drop_connection()


# -- Filler


class Work:
    """Implements `interfaces.FillWork`.

    Checks that each claim comes back once, and nothing else.
    """

    def __init__(self, export: Export, data: list[ByteRange]) -> None:
        self.export = export
        self.blocks = BlockMap(export.size, BLOCK)
        self.found = bytearray(export.size)
        self.kept = 0
        self.dropped: list[Exception | None] = []
        self.give_way = 0
        """Claims to answer with a short wait."""
        self.claimed_up_to: Callable[[], None] = lambda: None
        self.write_error: Exception | None = None
        self._data = data
        self._lock = threading.Lock()
        self._out: set[BookedClaim] = set()

    def claim(self, limit: int) -> BookedClaim | float | None:
        with self._lock:
            if self.give_way:
                self.give_way -= 1
                return 0.001
            if self.dropped:
                return None
            run = self.blocks.next_missing(0, max(1, limit // BLOCK))
            if run is None:
                return None
            self.blocks.claim(run)
            span = self.blocks.bytes_of(run)
            claim = BookedClaim(
                self, run, tuple(piece.clip(span) for piece in self._data if piece.overlaps(span))
            )
            self._out.add(claim)
            return claim

    def write(self, offset: int, data: memoryview) -> None:
        if self.write_error is not None:
            raise self.write_error
        self.found[offset : offset + len(data)] = data

    def keep(self, claim: BookedClaim) -> None:
        with self._lock:
            self._out.remove(claim)
            self.blocks.mark_present(claim.run, sum(part.length for part in claim.parts))
            self.kept += 1

    def drop(self, claim: BookedClaim, error: Exception | None) -> None:
        with self._lock:
            self._out.remove(claim)
            self.blocks.release(claim.run)
            self.dropped.append(error)

    def all_back(self) -> bool:
        return not self._out


async def work_on(repository: Repository, export: Export) -> Work:
    source = repository.source(export)
    data = await source.block_status(ByteRange(0, export.size))
    source.drop_connection()
    return Work(export, data)


async def test_a_filler_moves_every_claim_and_only_data(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        work = await work_on(repository, export)
        work.give_way = 20
        filler = repository.filler(export)
        await filler.run(work, 10)
        assert work.blocks.complete
        assert work.all_back()
        assert work.found == lab.content
        assert not work.dropped
        assert sum(asked.length for asked in lab.reads()) == SIZE - sum(
            hole.length for hole in HOLES
        )
        await filler.run(work, 10)  # nothing left
        await filler.aclose()


async def test_a_filler_stops_when_its_time_is_over(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        work = await work_on(repository, export)
        work.give_way = 10**9
        filler = repository.filler(export)
        began = trio.current_time()
        await filler.run(work, 0.2)
        assert trio.current_time() - began < 5
        assert work.kept == 0
        work.give_way = 0
        await filler.run(work, 10)
        assert work.found == lab.content
        await filler.aclose()


async def test_a_filler_gives_back_what_was_refused(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        work = await work_on(repository, export)
        filler = repository.filler(export)
        lab.fail(True)
        await filler.run(work, 10)
        assert work.all_back()
        assert work.dropped
        assert all(isinstance(error, errors.RequestFailed) for error in work.dropped)
        lab.fail(False)
        work.dropped.clear()
        await filler.run(work, 10)
        assert work.blocks.complete
        assert work.found == lab.content
        await filler.aclose()


@pytest.mark.parametrize("error", [errors.NoSpace(), OSError(errno.EIO, "I/O error")])
async def test_a_filler_gives_back_what_could_not_be_written(lab: Lab, error: Exception) -> None:
    async with connected(lab) as (repository, export):
        work = await work_on(repository, export)
        work.write_error = error
        filler = repository.filler(export)
        await filler.run(work, 10)
        assert work.all_back()
        assert error in work.dropped
        await filler.aclose()


async def test_a_filler_says_when_the_repository_is_lost_and_works_when_it_is_back(
    lab: Lab,
) -> None:
    async with connected(lab) as (repository, export):
        work = await work_on(repository, export)
        filler = repository.filler(export)
        lab.stop()
        with raises(errors.ConnectionLost):
            await filler.run(work, 10)
        assert work.all_back()
        assert work.dropped in ([], [None] * len(work.dropped))
        assert not repository.connected
        lab.start()
        work.dropped.clear()
        await filler.run(work, 10)
        assert work.found == lab.content
        await filler.aclose()


async def test_a_filler_notices_another_version(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        work = await work_on(repository, export)
        lab.change()
        filler = repository.filler(export)
        with raises(errors.ExportChanged):
            await filler.run(work, 10)
        assert work.all_back()
        assert work.kept == 0
        await filler.aclose()


async def test_a_cancelled_filler_gives_back_everything_soon(lab: Lab) -> None:
    async with connected(lab) as (repository, export):
        work = await work_on(repository, export)
        work.give_way = 10**9
        filler = repository.filler(export)
        with trio.move_on_after(0.2) as scope:
            await filler.run(work, math.inf)
        assert scope.cancelled_caught
        assert work.all_back()
        work.give_way = 0
        await filler.run(work, 10)
        assert work.found == lab.content
        await filler.aclose()


# -- NBD only: other servers, and one that says nothing


async def test_a_cancelled_attempt_is_no_loss_of_the_repository(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "mute.sock"))
        mute.listen()
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                repository = NbdRepository(
                    f"nbd+unix:///?socket={tmp_path}/mute.sock", nursery, io_timeout_s=60
                )
                repository.connected = True
                for attempt in (
                    repository.list_exports,
                    lambda: repository.source(Export("disk", 512, "")).pread(
                        0, memoryview(bytearray(1))
                    ),
                ):
                    with trio.move_on_after(0.1) as scope:
                        await attempt()
                    assert scope.cancelled_caught
                    assert repository.connected
                    assert repository.trouble == ""
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("program", ["qemu-nbd", "qemu-storage-daemon"])
async def test_qemus_servers_and_their_descriptions(tmp_path: Path, program: str) -> None:
    image, path = tmp_path / "image", tmp_path / "nbd.sock"
    image.write_bytes(pattern(SIZE + 512))
    starting = (
        servers.qemu_nbd(path, image, "-x", "disk", "-D", "version 7")
        if program == "qemu-nbd"
        else servers.storage_daemon(path, {"disk": (image, "version 7")})
    )
    with starting as server, trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            repository = NbdRepository(server.uri, nursery, io_timeout_s=60)
            assert await repository.list_exports() == ["disk"]
            export = (await repository.describe(["disk"]))["disk"]
            assert export == Export("disk", SIZE + 512, "version 7")
            assert isinstance(export, Export)
            work = await work_on(repository, export)
            filler = repository.filler(export)
            await filler.run(work, 10)
            assert work.found == image.read_bytes()
            await filler.aclose()
            source = repository.source(Export("disk", SIZE + 512, "version 6"))
            with raises(errors.ExportChanged):
                await source.pread(0, memoryview(bytearray(512)))
            nursery.cancel_scope.cancel()
