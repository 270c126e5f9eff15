"""Tests the operators' operations on images while readers and population are at work.

They are prefetch, evict, pin, forget, map and verify.
"""

import errno
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import fakes
import pytest
import trio
from engine_world import BLOCK, World, blocks, run, threads, until
from fakes import MemoryStores, pattern

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import Cause, State
from lazyfs.core.qmp_wire import CommandError
from lazyfs.engine.image.image import Image
from lazyfs.units import MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = 2 * MiB - 512
HOLE = blocks(8, 16)
FORMATS = ["raw", "qcow2"]


def world_with(*names: str, **options: Any) -> World:
    world = World(**options)
    for n, name in enumerate(names):
        world.repository.add(name, pattern(SIZE, n), [HOLE])
    return world


async def whole(world: World, name: str = "disk") -> Image:
    """Return an image that is whole and closed."""
    image = await world.open(name)
    await world.read(image, 0, image.record.shown.size)
    await until(lambda: image.record.state is State.WHOLE)
    await world.close(image)
    return image


async def partial(world: World, name: str = "disk") -> Image:
    """Return an image of which four blocks are present, and which is closed."""
    image = await world.open(name)
    begin = image.record.shown.metadata_size
    await world.read(image, begin, 4 * BLOCK)
    assert image.filling is not None
    await image.filling.reader.written()
    await world.close(image)
    return image


def states(world: World) -> dict[str, str]:
    return {
        image.record.path: image.record.state.value for image in world.filesystem.names.images()
    }


# -- prefetch


@pytest.mark.parametrize("populate", [True, False])
async def test_prefetch_without_a_reader(populate: bool) -> None:
    world = world_with("disk", "other", populate=populate)
    async with world.daemon(populate=True):
        assert await world.command("prefetch", path="disk") == {"images": 1, "paths": ["disk"]}
        image = world.image("disk")
        await until(lambda: image.record.state is State.WHOLE)
        assert image.open_count == 0
        assert states(world)["other"] == "remote"
        assert bytes(world.stores.plain["disk"]) == world.repository.exports["disk"].content
        assert await world.command("prefetch", path="disk") == {"images": 1, "paths": ["disk"]}
        assert not world.demand()


async def test_prefetch_of_a_folder_and_of_all() -> None:
    world = world_with("team/a", "team/b", "solo", populate=False)
    async with world.daemon(populate=True):
        assert (await world.command("prefetch", path="team"))["paths"] == ["team/a", "team/b"]
        await until(lambda: list(states(world).values()).count("whole") == 2)
        assert (await world.command("prefetch", path=""))["images"] == 3
        await until(lambda: list(states(world).values()).count("whole") == 3)
        for path in ("team/c", "teams", "solo/x"):
            with pytest.raises(CommandError, match="no image"):
                await world.command("prefetch", path=path)


async def test_prefetch_in_another_format_changes_the_name() -> None:
    world = world_with("disk", "pinned")
    async with world.daemon(populate=True):
        await world.command("pin", path="pinned")
        assert await world.command("prefetch", path="disk", format="qcow2") == {
            "images": 1,
            "paths": ["disk.qcow2"],
        }
        image = world.image("disk")
        assert (image.record.format, image.record.path) == ("qcow2", "disk.qcow2")
        assert world.filesystem.names.node_at("disk") is None
        await until(lambda: image.record.state is State.WHOLE)
        (row,) = await world.command("query-images", path="disk.qcow2")
        assert (row["path"], row["format"], row["name"]) == ("/mnt/disk.qcow2", "qcow2", "disk")
        # Evicted it keeps its format, and may get another.
        await world.command("evict", path="disk.qcow2")
        assert states(world)["disk.qcow2"] == "remote"
        assert (await world.command("prefetch", path="disk.qcow2", format="raw"))["paths"] == [
            "disk"
        ]
        assert (await world.command("prefetch", path="pinned", format="qcow2"))["paths"] == [
            "pinned.qcow2"
        ]
        assert world.image("pinned").record.pinned
    async with world.daemon():
        assert world.image("disk").record.path == "disk"


async def test_prefetch_refuses_another_format_where_something_is_cached() -> None:
    world = world_with("disk", "open", populate=False)
    async with world.daemon(populate=True):
        await partial(world)
        opened = await world.open("open")
        for name in ("disk", "open"):
            with pytest.raises(errors.UserError, match="is cached as raw; evict it first"):
                await world.command("prefetch", path=name, format="qcow2")
        assert await world.command("prefetch", path="disk", format="raw") == {
            "images": 1,
            "paths": ["disk"],
        }
        await world.close(opened)


async def test_prefetch_of_what_cannot_be_had() -> None:
    world = world_with("disk", "refused", populate=False)
    world.repository.refused.add("refused")
    async with world.daemon(populate=True):
        with pytest.raises(CommandError, match="does not describe refused"):
            await world.command("prefetch", path="refused")
        with pytest.raises(CommandError, match="does not describe refused"):
            await world.command("prefetch", path="")
        await until(
            lambda: states(world)["disk"] == "whole"
        )  # one that fails does not stop the others
        assert world.image("refused").record.state is State.REMOTE


async def test_prefetch_without_a_repository_fails_soon_and_together() -> None:
    world = world_with(*(f"disk{n}" for n in range(20)), populate=False)
    async with world.daemon(populate=True):
        world.repository.down = True
        at = trio.current_time()
        with pytest.raises(CommandError, match=r"does not answer \(and 19 more; 0 done\)"):
            await world.command("prefetch", path="")
        assert trio.current_time() - at < 10, "less than a client waits"


async def test_prefetch_of_a_failed_image() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon(populate=True):
        image = await partial(world)
        await image.fail(Cause.EXPORT_CHANGED, errors.UserError("it went wrong"))
        with pytest.raises(CommandError, match="disk has failed: it went wrong"):
            await world.command("prefetch", path="disk")


# -- evict


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("make", [partial, whole])
@pytest.mark.parametrize("opened", [False, True])
async def test_evict(make: Callable[[World], Awaitable[Image]], format_: str, opened: bool) -> None:
    world = world_with("disk", format=format_, populate=False)
    async with world.daemon(populate=True):
        old = await make(world)
        begin = old.record.shown.metadata_size
        plain = old.record.state is State.WHOLE
        if opened:
            await world.open_image(old, plain)
        path = old.record.path
        assert (await world.command("evict", path=path))["images"] == 1
        new = world.image("disk")
        assert new is not old
        assert new.inode != old.inode
        assert (new.record.state, new.record.path, new.record.format) == (
            State.REMOTE,
            path,
            format_,
        )
        assert new.statistics().present_bytes == 0
        assert path not in world.stores.plain
        assert not world.stores.partials
        if opened:
            content = world.repository.exports["disk"].content
            for start in (0, 20 * BLOCK, 0):  # what was there, what was not, and again
                assert (
                    await world.read(old, begin + start, BLOCK, plain)
                    == content[start : start + BLOCK]
                )
            (row,) = [row for row in await world.command("query-images") if row["replaced"]]
            assert row["open_count"] == 1
            await world.close(old, plain)
        assert not world.stores.open_files
        assert world.filesystem.names.node(old.inode) is None
        assert [row["replaced"] for row in await world.command("query-images")] == [False]
        # It begins anew.
        await world.open("disk")
        assert (
            await world.read(new, begin, BLOCK) == world.repository.exports["disk"].content[:BLOCK]
        )
        await world.close(new)
    async with world.daemon():
        assert states(world) == {path: "partial"}


async def test_evict_of_what_is_remote_is_nothing() -> None:
    world = world_with("disk")
    async with world.daemon():
        inode = world.image("disk").inode
        await world.command("evict", path="disk")
        assert world.image("disk").inode == inode


async def test_evict_of_folders_leaves_pinned_ones() -> None:
    world = world_with("a/one", "a/two", "b/three", "four", populate=False)
    async with world.daemon():
        for name in ("a/one", "a/two", "b/three"):
            await whole(world, name)
        await world.command("pin", path="a/two")
        await world.command("pin", path="b")
        with pytest.raises(CommandError, match="a/two is pinned; lazyfs unpin it first"):
            await world.command("evict", path="a/two")
        # A folder with a single image is a folder, too.
        assert (await world.command("evict", path="b"))["images"] == 0
        assert (await world.command("evict", path=""))["images"] == 1
        assert states(world) == {
            "a/one": "remote",
            "a/two": "whole",
            "b/three": "whole",
            "four": "remote",
        }
        assert await world.command("unpin", path="") == {"images": 4}
        assert (await world.command("evict", path=""))["images"] == 2
        assert set(states(world).values()) == {"remote"}


async def test_an_evicted_image_that_is_open_is_not_populated_any_more() -> None:
    world = world_with("disk")
    world.repository.delay_s = 0.5
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await until(lambda: image.statistics().populated_bytes)
        await world.command("evict", path="disk")
        asked = len(world.fills())
        await trio.sleep(100)
        assert len(world.fills()) == asked
        assert await world.command("query-jobs") == []
        await world.check(image, ByteRange(0, SIZE))
        await world.close(image)


@pytest.mark.parametrize("thread_s", [0.0, 0.03])
@pytest.mark.parametrize("format_", FORMATS)
async def test_no_reader_fails_because_of_evictions(  # noqa: PLR0915 - a script
    thread_s: float, format_: str
) -> None:
    """Meanwhile population works, readers come and go, and images become whole."""
    world = world_with("disk", format=format_)
    content = world.repository.exports["disk"].content
    world.repository.delay_s = 0.3
    async with world.daemon(populate=True):
        threads.delay_s = thread_s
        evictions = reads = 0
        found: set[State] = set()

        async def reader(seed: int) -> None:
            nonlocal reads
            n = 0
            while evictions < 12:
                n += 1
                image, plain = await opened()
                begin = image.record.shown.metadata_size
                for k in range(3):
                    start = (seed * 7 + n * 3 + k) * BLOCK % (SIZE - BLOCK)
                    assert (
                        await world.read(image, begin + start, BLOCK, plain)
                        == content[start : start + BLOCK]
                    )
                    reads += 1
                    await trio.sleep(0.05)
                await world.close(image, plain)

        async def opened() -> tuple[Image, bool]:
            # As the kernel does: ESTALE means look the name up again.
            for _ in range(100):
                image = world.image("disk")
                plain = image.record.state is State.WHOLE
                try:
                    await world.open_image(image, plain)
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    await trio.sleep(0.01)
                else:
                    return image, plain
            raise AssertionError("stale for ever")

        async def evictor() -> None:
            nonlocal evictions
            while True:
                await trio.sleep(0.7 if evictions % 3 else 4.0)
                found.add(world.image("disk").record.state)
                await world.command("evict", path=world.image("disk").record.path)
                evictions += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(evictor)
            async with trio.open_nursery() as readers:
                for seed in range(4):
                    readers.start_soon(reader, seed)
            nursery.cancel_scope.cancel()
        assert reads > 100
        assert found >= {State.PARTIAL, State.WHOLE}
        threads.delay_s = 0.0
        image = world.image("disk")
        await world.command("prefetch", path=image.record.path)
        await until(lambda: image.record.state is State.WHOLE)
        assert set(world.stores.plain) == {image.record.path}
        assert not world.stores.partials
        assert len(world.filesystem.names._nodes) == 2, "the root and one image"
    assert len(world.catalog.load()) == 1


async def test_two_evictions_at_once_are_one() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        await whole(world)
        threads.delay_s = 0.1
        outcomes: list[str] = []

        async def evict() -> None:
            try:
                await world.command("evict", path="disk")
                outcomes.append("")
            except CommandError as error:
                outcomes.append(error.desc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(evict)
            nursery.start_soon(evict)
        threads.delay_s = 0.0
        assert sorted(outcomes) == ["", "disk is being replaced by a new version; try again"]
        assert states(world) == {"disk": "remote"}
    assert len(world.catalog.load()) == 1


@pytest.mark.parametrize("make", [whole, partial])
@pytest.mark.parametrize("opened", [True, False])
async def test_an_image_whose_eviction_fails_half_way_goes_on_and_can_be_evicted(
    make: Callable[[World], Awaitable[Image]], opened: bool
) -> None:
    world = world_with("disk", populate=False)
    async with world.daemon(populate=True):
        image = await make(world)
        if opened:
            await world.open_image(image)
        world.catalog.error = OSError(errno.EIO, "the disk is broken")
        with pytest.raises(CommandError, match="the disk is broken"):
            await world.command("evict", path="disk")
        world.catalog.error = None
        assert not image.retired
        assert world.image("disk") is image
        assert states(world)["disk"] == image.record.state.value != "remote"
        read = world.repository.bytes_read()
        if not opened:
            await world.open_image(image)
        await world.check(image, blocks(0, 4))
        assert world.repository.bytes_read() == read, "all is as it was"
        assert len(world.catalog.load()) == 1
        await world.command("prefetch", path="disk")
        await until(lambda: states(world)["disk"] == "whole")
        await world.command("evict", path="disk")
        assert world.image("disk") is not image
        assert states(world)["disk"] == "remote"
        assert not world.stores.plain
        assert not world.stores.partials
        await world.check(image, blocks(0, 9))
        await world.close(image)
        await world.check(await world.open("disk"), blocks(0, 9))
    assert len(world.catalog.load()) == 1


async def test_a_plain_file_changed_by_hand_is_not_evicted() -> None:
    """The file is not what lazyfs left there, so lazyfs must not remove it.

    Without its row in the catalog the next mount would refuse it.
    """
    world = world_with("disk", populate=False)
    async with world.daemon():
        await whole(world)
        world.stores.plain["disk"] = bytearray(b"mine")
        with pytest.raises(CommandError, match="changed by hand; remove that"):
            await world.command("evict", path="disk")
        assert world.stores.plain == {"disk": b"mine"}
        assert states(world) == {"disk": "whole"}
        world.stores.plain.clear()
        await world.command("evict", path="disk")
        assert states(world) == {"disk": "remote"}


async def test_the_right_digest_mends_what_the_wrong_one_broke() -> None:
    world = world_with("disk", populate=False)
    digest = f"sha256:{hashlib.sha256(world.repository.exports['disk'].content).hexdigest()}"
    async with world.daemon(populate=True):
        await world.command("verify", path="disk", digest="sha256:" + "0" * 64)
        await world.command("prefetch", path="disk")
        await until(lambda: states(world)["disk"] == "failed")
        assert await world.command("verify", path="disk", digest=digest) == {}
        await world.command("prefetch", path="disk")
        await until(lambda: states(world)["disk"] == "whole")


async def test_evicting_takes_a_new_version_without_the_digest_of_the_old() -> None:
    world = world_with("disk", populate=False)
    content = world.repository.exports["disk"].content
    async with world.daemon():
        await whole(world)
        assert (
            await verified(world, "disk", digest=f"sha256:{hashlib.sha256(content).hexdigest()}")
            == ""
        )
        world.repository.add("disk", pattern(len(content), 9), identity="new")
        await world.filesystem.refresh()
        await world.command("evict", path="disk")
        assert world.image("disk").record.digest == ""
        await whole(world)


async def test_prefetch_in_another_format_keeps_the_digest() -> None:
    world = world_with("disk", populate=False)
    digest = f"sha256:{hashlib.sha256(world.repository.exports['disk'].content).hexdigest()}"
    async with world.daemon():
        assert await world.command("verify", path="disk", digest=digest) == {}
        await world.command("prefetch", path="disk", format="qcow2")
        assert world.image("disk").record.digest == digest


async def test_evict_heeds_overlays_and_leaves_last_copies() -> None:
    world = world_with("a", "b", "c", populate=False)
    async with world.daemon():
        for name in "abc":
            await whole(world, name)
        del world.repository.exports["c"]
        await world.filesystem.refresh()
        world.backing_files = lambda: frozenset({"a"})
        with pytest.raises(CommandError, match="a is the backing file of an overlay"):
            await world.command("evict", path="a")
        with pytest.raises(
            CommandError, match="c is gone from the repository; lazyfs forget drops it"
        ):
            await world.command("evict", path="c")
        assert (await world.command("evict", path=""))["images"] == 1
        assert states(world) == {"a": "whole", "b": "remote", "c": "whole"}
        world.backing_files = frozenset
        await world.command("evict", path="a")
        assert states(world)["a"] == "remote"


# -- pin, last use


async def test_pins_and_digests_outlive_the_daemon() -> None:
    world = world_with("disk")
    async with world.daemon():
        assert await world.command("pin", path="disk") == {"images": 1}
        await world.command("pin", path="disk")
        (row,) = await world.command("query-images")
        assert row["pinned"] is True
    async with world.daemon():
        (row,) = await world.command("query-images")
        assert row["pinned"] is True
        await world.command("unpin", path="disk")
    async with world.daemon():
        assert (await world.command("query-images"))[0]["pinned"] is False


async def test_the_last_use_is_saved_at_the_end_and_now_and_then() -> None:
    world = world_with("used", "unused", populate=False)
    async with world.daemon():
        image = await world.open("used")
        opened = image.record.last_used_ns
        assert opened > 0
        await world.close(image)
        assert image.record.last_used_ns >= opened
        (row,) = await world.command("query-images", path="used")
        assert row["last_used_ns"] == image.record.last_used_ns
        await world.filesystem.save_uses()
        saved = {record.export: record.last_used_ns for record in world.catalog.load()}
        assert saved == {"used": image.record.last_used_ns, "unused": 0}
        await world.open("used")
        await world.close(image)
    last = {record.export: record.last_used_ns for record in world.catalog.load()}
    assert last == {"used": image.record.last_used_ns, "unused": 0}
    async with world.daemon():
        assert world.image("used").record.last_used_ns == last["used"]


# -- forget


async def test_forget_drops_what_the_repository_does_not_have() -> None:
    world = world_with("old", "kept", "pinned", "opened", "also", populate=False)
    async with world.daemon():
        for name in ("old", "kept", "pinned", "opened", "also"):
            await whole(world, name)
        await world.command("pin", path="pinned")
        for name in ("old", "pinned", "opened", "also"):
            del world.repository.exports[name]
        with pytest.raises(CommandError, match="old is in the repository; evict drops"):
            await world.command("forget", path="old")  # nobody has looked yet
        await world.filesystem.refresh()
        opened = world.image("opened")
        await world.open_image(opened, True)
        for name, reason in {
            "kept": "in the repository",
            "pinned": "is pinned",
            "opened": "is open",
        }.items():
            with pytest.raises(CommandError, match=reason):
                await world.command("forget", path=name)
        assert await world.command("forget", path="old") == {"images": 1}
        assert "old" not in states(world)
        with pytest.raises(CommandError, match="no image"):
            await world.command("forget", path="old")
        with pytest.raises(CommandError, match=r"is (open|pinned).* \(and 1 more; 1 done\)"):
            await world.command("forget", path="")
        assert sorted(states(world)) == ["kept", "opened", "pinned"]
        await world.close(opened, True)
        await world.command("unpin", path="pinned")
        assert await world.command("forget", path="") == {"images": 2}
        assert sorted(world.stores.plain) == ["kept"]
    assert [record.export for record in world.catalog.load()] == ["kept"]


# -- map


@pytest.mark.parametrize("format_", FORMATS)
async def test_the_map_of_a_partial_image(format_: str) -> None:
    world = world_with("disk", format=format_, populate=False)
    async with world.daemon():
        path = world.image("disk").record.path
        with pytest.raises(errors.UserError, match=r"size of .* is not known"):
            await world.command("query-map", path=path)
        await world.filesystem.sizes.learn([world.image("disk")])
        missing = {"start": 0, "length": SIZE, "present": False, "zero": False, "data": False}
        assert await world.command("query-map", path=path) == [missing]
        await partial(world)
        entries = await world.command("query-map", path=path)
        assert [entry["start"] for entry in entries] == [
            0,
            *(e["start"] + e["length"] for e in entries[:-1]),
        ]
        assert sum(entry["length"] for entry in entries) == SIZE
        here = {(e["start"], e["length"]): (e["present"], e["zero"], e["data"]) for e in entries}
        assert here[HOLE.start, HOLE.length] == (True, True, False)
        assert entries[0]["data"]
        assert entries[-1]["present"] is False
        for folder in ("", "elsewhere"):
            with pytest.raises(CommandError, match="no image"):
                await world.command("query-map", path=folder)


# -- verify


async def verified(world: World, path: str, **arguments: Any) -> str:
    """Return the error of the job, or "" if it has none."""
    answer = await world.command("verify", path=path, **arguments)
    job: dict[str, Any] = {}

    async def concluded() -> bool:
        (found,) = [one for one in await world.command("query-jobs") if one["id"] == answer["id"]]
        job.update(found)
        return bool(found["status"] == "concluded")

    with trio.fail_after(1000):
        while not await concluded():
            await trio.sleep(0.1)
    await world.command("job-dismiss", id=answer["id"])
    if "error" not in job:
        assert job["current-progress"] == job["total-progress"]
    return str(job.get("error", ""))


def damage(stores: MemoryStores, image: Image, at: int) -> None:
    """Flip a byte of what is cached."""
    if image.record.state is State.WHOLE:
        data = bytearray(stores.plain[image.record.path])
        data[at] ^= 1
        stores.plain[image.record.path] = data
    else:
        stores.partials[image.inode].data[at] ^= 1


@pytest.mark.parametrize("make", [partial, whole])
async def test_verify_of_what_is_good(make: Callable[[World], Awaitable[Image]]) -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = await make(world)
        asked = len(world.demand())
        assert await verified(world, "disk") == ""
        assert len(world.demand()) == asked, "the repository is asked only when told so"
        assert await verified(world, "disk", against_repository=True) == ""
        assert len(world.demand()) > asked
        assert world.image("disk") is image
        assert image.open_count == 0


@pytest.mark.parametrize("make", [partial, whole])
@pytest.mark.parametrize("drop", [False, True])
async def test_what_differs_from_the_repository_is_kept_unless_told_to_drop_it(
    make: Callable[[World], Awaitable[Image]], drop: bool
) -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = await make(world)
        damage(world.stores, image, 2 * BLOCK + 5)
        assert await verified(world, "disk") == ""  # it reads; nobody knows better
        error = await verified(world, "disk", against_repository=True, drop=drop)
        assert error.startswith("differs from the repository at bytes ")
        if not drop:
            assert error.endswith("; it is kept, and --drop would drop it")
            assert world.image("disk") is image
            # What is partial must not become a mixture.
            assert states(world) == {"disk": "failed" if make is partial else "whole"}
            return
        assert error.endswith("; dropped, to be fetched again")
        assert states(world) == {"disk": "remote"}
        assert world.filesystem.names.node(image.inode) is None
        fresh = await whole(world)
        assert await verified(world, "disk", against_repository=True) == ""
        assert bytes(world.stores.plain["disk"]) == world.repository.exports["disk"].content
        assert fresh.record.inode != image.inode


@pytest.mark.parametrize("why", ["pinned", "open", "backing", "gone"])
async def test_what_must_stay_is_kept_although_it_differs(why: str) -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = await whole(world)
        damage(world.stores, image, 2 * BLOCK + 5)
        if why == "pinned":
            await world.command("pin", path="disk")
        elif why == "open":
            await world.open_image(image, whole=True)
        elif why == "backing":
            world.backing_files = lambda: frozenset({"disk"})
        else:
            image.gone = True
        error = await verified(world, "disk", against_repository=True, drop=True)
        assert "; it is kept, because disk is " in error
        assert world.image("disk") is image
        assert states(world) == {"disk": "whole"}
        if why == "open":
            await world.close(image, whole=True)


async def test_a_digest_is_compared_and_kept() -> None:
    world = world_with("disk", populate=False)
    content = world.repository.exports["disk"].content
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    async with world.daemon():
        image = await whole(world)
        assert (
            await verified(world, "disk", digest=digest.upper().replace("SHA256", "sha256")) == ""
        )
        assert image.record.digest == digest
        assert (
            await verified(world, "disk", digest=f"sha512:{hashlib.sha512(content).hexdigest()}")
            == ""
        )
        assert await verified(world, "disk", digest=digest) == ""
    async with world.daemon():
        assert world.image("disk").record.digest == digest
        damage(world.stores, world.image("disk"), 7)
        error = await verified(world, "disk")
        assert error.startswith("the cache is damaged: its digest is sha256:")
        assert world.image("disk").record.digest == digest, (
            "what it must be does not change with the damage"
        )
        await whole(world)
        assert await verified(world, "disk") == ""
        await world.command("evict", path="disk")
        assert world.image("disk").record.digest == digest, "evicted to fetch it again, perhaps"


async def test_a_wrong_digest_given_by_hand_drops_no_image_and_is_not_kept() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = await whole(world)
        assert "its digest is sha256:" in await verified(world, "disk", digest=f"sha256:{'0' * 64}")
        assert world.image("disk") is image
        assert (image.record.state, image.record.digest) == (State.WHOLE, "")


async def test_a_comparison_with_a_repository_that_hangs_ends() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = await whole(world)
        world.repository.hang()
        assert "the repository does not answer" in await verified(
            world, "disk", **{"against-repository": True}
        )
        assert (image.record.state, image.open_count) == (State.WHOLE, 0)


async def test_what_is_gone_is_not_waited_for() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = world.image("disk")
        await world.command("prefetch", path="disk")
        image.gone = True
        with pytest.raises(CommandError, match="not in the repository any more"):
            await world.command("prefetch", path="disk")


async def test_an_image_evicted_while_it_is_opened_is_looked_after_by_nobody() -> None:
    """Otherwise its task would find no file to save, and end the daemon."""
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = world.image("disk")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.open_image, image)
            while image.record.state is State.REMOTE:
                await trio.lowlevel.checkpoint()
            assert image.filling is None, "it is being opened"
            nursery.start_soon(world.filesystem.evict, image)
        await world.read(image, 0, 4096)
        await world.close(image)
        await trio.sleep(60)
        assert image.retired


@pytest.mark.parametrize("why", ["pinned", "gone"])
async def test_a_damaged_image_that_must_stay_is_kept(why: str) -> None:
    world = world_with("disk", populate=False)
    digest = f"sha256:{hashlib.sha256(world.repository.exports['disk'].content).hexdigest()}"
    async with world.daemon():
        image = await whole(world)
        assert await verified(world, "disk", digest=digest) == ""
        if why == "pinned":
            await world.command("pin", path="disk")
        else:
            image.gone = True
        damage(world.stores, image, 7)
        assert "its digest is sha256:" in await verified(world, "disk")
        assert world.image("disk") is image


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256",
        "sha256:",
        "sha256:12",
        "md5:" + "0" * 32,
        "sha256:" + "g" * 64,
        "0" * 64,
        "sha512:" + "0" * 64,
    ],
)
async def test_digests_that_are_none(digest: str) -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        await whole(world)
        with pytest.raises(CommandError, match="is not a digest such as sha256"):
            await world.command("verify", path="disk", digest=digest)
        assert world.image("disk").record.digest == ""


async def test_a_digest_of_an_image_that_is_not_whole_is_kept_for_later() -> None:
    world = world_with("disk", populate=False)
    digest = f"sha256:{hashlib.sha256(world.repository.exports['disk'].content).hexdigest()}"
    async with world.daemon():
        image = await partial(world)
        assert await world.command("verify", path="disk", digest=digest) == {}
        assert image.record.digest == digest
        await whole(world)
        assert await verified(world, "disk") == ""


async def test_verify_of_what_is_not_cached() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        assert await verified(world, "disk") == "nothing of disk is cached"
        assert await verified(world, "disk", against_repository=True) == "nothing of disk is cached"
        with pytest.raises(CommandError, match="no image"):
            await world.command("verify", path="")


async def test_a_plain_file_that_is_gone_is_damage() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        await whole(world)
        del world.stores.plain["disk"]
        assert "cannot be opened" in await verified(world, "disk")
        assert states(world) == {"disk": "remote"}
        await whole(world)
        assert await verified(world, "disk") == ""


async def test_sectors_that_the_disk_cannot_read_are_damage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = await whole(world)

        def broken(self: object, offset: int, length: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        assert image.record.state is State.WHOLE
        monkeypatch.setattr(fakes._MemoryReader, "read", broken)
        monkeypatch.setattr(fakes._MemoryReader, "read_nowait", broken)
        assert "the disk cannot read bytes 0 to " in await verified(world, "disk")
        assert states(world) == {"disk": "remote"}


@pytest.mark.parametrize("format_", FORMATS)
async def test_verify_while_evicted_and_read(format_: str) -> None:
    world = world_with("disk", format=format_, populate=False)
    async with world.daemon():
        old = await whole(world)
        threads.delay_s = 0.05
        answer = await world.command("verify", path=old.record.path)
        await trio.sleep(0.1)
        await world.command("evict", path=old.record.path)
        threads.delay_s = 0.0
        with trio.fail_after(100):
            while (await world.command("query-jobs"))[0]["status"] != "concluded":
                await trio.sleep(0.1)
        await world.command("job-dismiss", id=answer["id"])
        assert world.filesystem.names.node(old.inode) is None
        assert not world.stores.open_files


async def test_a_verification_that_is_cancelled_closes_what_it_opened() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = await whole(world)
        world.repository.hang()
        answer = await world.command("verify", path="disk", against_repository=True)
        await trio.sleep(1)
        assert image.open_count == 1
        with pytest.raises(errors.UserError, match="is running already"):
            await world.command("verify", path="disk")
        await world.command("job-cancel", id=answer["id"])
        await until(lambda: image.open_count == 0)
        world.repository.go_on()
        assert (await world.command("query-jobs"))[0]["error"] == "cancelled"
        assert await verified(world, "disk") == ""


async def test_verify_while_the_repository_is_away_fails_and_drops_nothing() -> None:
    world = world_with("disk", populate=False)
    async with world.daemon():
        image = await whole(world)
        world.repository.fail("disk", blocks(1))
        assert "failed" in await verified(world, "disk", against_repository=True)
        assert world.image("disk") is image
        assert image.record.state is State.WHOLE


async def test_a_clock_that_steps_back_changes_no_order_and_loses_no_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_with("a", "b", populate=False)
    async with world.daemon():
        a, b = world.image("a"), world.image("b")
        await world.open_image(a)
        await world.close(a)
        await world.filesystem.save_uses()
        now_ns = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now_ns - 10**15)
        await world.open_image(b)
        await world.close(b)
        assert b.record.last_used_ns > a.record.last_used_ns
        await world.filesystem.save_uses()
        saved = {record.export: record.last_used_ns for record in world.catalog.load()}
        assert saved == {"a": a.record.last_used_ns, "b": b.record.last_used_ns}
    async with world.daemon():
        await world.open_image(world.image("a"))
        assert world.image("a").record.last_used_ns > saved["b"]
        await world.close(world.image("a"))
