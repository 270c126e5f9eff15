"""Tests names and inodes while the repository's list changes, sizes, versions, start and end."""

import errno
import os
from collections.abc import Awaitable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import trio
from engine_world import BLOCK, IO_TIMEOUT_S, World, blocks, run, threads, until
from fakes import pattern

from lazyfs import errors
from lazyfs.core import inode_number
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import State
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import UNKNOWN
from lazyfs.engine.name_tree import Folder
from lazyfs.engine.sizes import DESCRIBE_BATCH, NO_SIZES_S
from lazyfs.engine.slices import SLICE
from lazyfs.units import MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = MiB
ALL = ByteRange(0, SIZE)


def world_with(*names: str, **options: Any) -> World:
    world = World(**options)
    for name in names:
        world.repository.add(name, pattern(SIZE))
    return world


def tree(world: World) -> dict[str, str]:
    """Return the exports by path, found by walking folders as a user would."""
    found: dict[str, str] = {}

    def walk(folder: Folder, path: str) -> None:
        for position, name, node in world.filesystem.names.entries_after(folder, 0):
            assert position == node.inode
            assert world.filesystem.names.node(node.inode) is node
            assert name not in ("", ".", "..")
            assert "/" not in name
            if isinstance(node, Folder):
                assert node.parent is folder
                assert node.entries, "an empty folder"
                walk(node, f"{path}{name}/")
            else:
                assert world.filesystem.names.node_at(f"{path}{name}") is node
                found[f"{path}{name}"] = node.record.export

    walk(world.filesystem.names.root, "")
    assert world.filesystem.names.node(inode_number.ROOT) is world.filesystem.names.root
    return found


# -- names


async def test_slashes_make_folders() -> None:
    world = world_with("debian", "team/ubuntu", "team/x/y")
    async with world.daemon():
        assert tree(world) == {name: name for name in ("debian", "team/ubuntu", "team/x/y")}
        assert world.filesystem.names.node_at("") is world.filesystem.names.root
        assert world.filesystem.names.node_at("team/none") is None
        assert world.filesystem.names.node_at("debian/none") is None


async def test_names_that_cannot_be_files_are_encoded() -> None:
    hostile = [
        "",
        ".",
        "..",
        "../../etc/passwd",
        "/abs",
        "a//b",
        "end/",
        ".lazyfs",
        ".lazyfs/lock",
        "nul\0",
        "x" * 300,
    ]
    world = world_with(*hostile, "100%", "100%25")
    async with world.daemon():
        found = tree(world)
        assert sorted(found.values()) == sorted([*hostile, "100%", "100%25"])
        assert found["%00"] == ""
        assert found["..%2F..%2Fetc%2Fpasswd"] == "../../etc/passwd"
        assert found["%2Elazyfs"] == ".lazyfs"
        assert all(len(part.encode()) <= 255 for path in found for part in path.split("/"))
        assert not any(path.split("/")[0] == ".lazyfs" for path in found)
        world.repository.exports["../../etc/passwd"] = replace(
            world.repository.exports[""], content=b"harmless"
        )
        assert await world.read(await world.open("../../etc/passwd"), 0, 100) == b"harmless"


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("order", [["a", "a/b"], ["a/b", "a"]])
async def test_a_file_and_a_folder_of_one_name(order: list[str], together: bool) -> None:
    world = world_with(*(order if together else order[:1]))
    async with world.daemon():
        first = tree(world)
        world.repository.add(order[1], pattern(SIZE))
        await world.filesystem.refresh()
        found = tree(world)
        assert sorted(found.values()) == ["a", "a/b"]
        assert first.items() <= found.items()  # a name once given stays
    async with world.daemon():
        assert tree(world) == found


async def test_a_name_given_is_kept_when_its_clash_goes_away() -> None:
    world = world_with("a", "a/b")
    async with world.daemon():
        before = tree(world)
        del world.repository.exports["a"]
        await world.filesystem.refresh()
        after = tree(world)
        assert after == {path: export for path, export in before.items() if export == "a/b"}
        world.repository.add("a", pattern(SIZE))
        await world.filesystem.refresh()
        assert sorted(tree(world).values()) == ["a", "a/b"]


# -- new, gone


async def test_new_exports_appear_and_unused_ones_disappear() -> None:
    world = world_with("old", "kept", "team/only")
    async with world.daemon():
        invalid: list[str] = []
        world.filesystem.names.on_invalid_entry = lambda folder, name: invalid.append(
            f"{folder.path}/{name}"
        )
        await world.open("kept")
        folder = world.filesystem.names.node_at("team")
        assert isinstance(folder, Folder)
        world.repository.exports = {"new": world.repository.exports["old"]}
        await world.filesystem.refresh()
        assert sorted(tree(world)) == ["kept", "new"]
        assert set(invalid) == {"/old", "team/only", "/team", "/new"}
        assert world.filesystem.names.node(folder.inode) is None
        assert "not in the repository any more" in world.image("kept").statistics().error
        assert sorted(r.export for r in world.catalog.load()) == ["kept", "new"]


async def test_what_is_cached_outlasts_its_export() -> None:
    world = world_with("disk")
    content = world.repository.exports["disk"].content
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
    world.repository.exports.clear()
    async with world.daemon():
        await world.check(await world.open("disk"), ALL, content)
    world.repository.down = True
    async with world.daemon():
        assert "no connection" in world.filesystem.list_trouble
        await world.check(await world.open("disk"), ALL, content)


def inode_of(world: World, path: str) -> int:
    node = world.filesystem.names.node_at(path)
    assert node is not None
    return node.inode


async def test_inodes_stay_and_are_never_given_twice() -> None:
    world = world_with("a", "b", "c/d")
    async with world.daemon():
        before = {path: inode_of(world, path) for path in ("a", "b", "c/d", "c")}
    async with world.daemon():
        assert {path: inode_of(world, path) for path in before} == before
        keep = world.repository.exports.pop("b")
        await world.filesystem.refresh()
        world.repository.exports["b"] = keep
        await world.filesystem.refresh()
        assert world.image("b").inode not in before.values()


async def test_a_repository_that_cannot_be_listed_changes_nothing_and_is_reported() -> None:
    world = world_with("a", "b")
    async with world.daemon():
        world.repository.down = True
        with pytest.raises(errors.ConnectionLost):
            await world.filesystem.refresh()
        assert "no connection" in world.filesystem.list_trouble
        assert sorted(tree(world)) == ["a", "b"]
        assert not any(image.gone for image in world.filesystem.names.images())
        world.repository.down = False
        await world.filesystem.refresh()
        assert world.filesystem.list_trouble == ""


# -- positions in a listing


def listing(world: World, position: int, limit: int) -> list[tuple[int, str]]:
    found: Iterable[tuple[int, str, object]] = world.filesystem.names.entries_after(
        world.filesystem.names.root, position
    )
    return [(position, name) for position, name, _ in found][:limit]


async def test_a_listing_goes_on_where_it_stopped_whatever_came_and_went() -> None:
    world = world_with(*(f"disk {i:02}" for i in range(20)), "folder/x")
    async with world.daemon():
        first = listing(world, 0, 8)
        for name in ("disk 03", "disk 07", "disk 08", "disk 12"):
            del world.repository.exports[name]
        for name in ("aaa", "disk 05b", "zzz"):
            world.repository.add(name, b"")
        await world.filesystem.refresh()
        shown = [name for _, name in first]
        while more := listing(world, first[-1][0], 3):
            shown += [name for _, name in more]
            first = more
        stayed = {f"disk {i:02}" for i in range(20)} - {"disk 03", "disk 07", "disk 08", "disk 12"}
        assert len(shown) == len(set(shown))
        assert stayed | {"aaa", "disk 05b", "zzz", "folder"} <= set(shown)


# -- sizes


async def test_sizes_are_asked_in_batches_and_once() -> None:
    world = World()
    for i in range(600):
        world.repository.add(f"disk {i}", bytes(i))
    async with world.daemon():
        images = list(world.filesystem.names.images())
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(world.filesystem.sizes.learn, images)
        assert world.repository.describes == -(-600 // DESCRIBE_BATCH)
        assert {image.record.export: image.record.size for image in images} == {
            f"disk {i}": i for i in range(600)
        }
    async with world.daemon():
        world.filesystem.sizes.learn_soon(list(world.filesystem.names.images()))
        await trio.sleep(1)
        assert world.repository.describes == -(-600 // DESCRIBE_BATCH)


async def test_an_export_the_server_will_not_describe_spoils_no_other() -> None:
    world = world_with("good", "bad")
    world.repository.refused.add("bad")
    async with world.daemon():
        await world.filesystem.sizes.learn(list(world.filesystem.names.images()))
        assert world.image("good").record.size == SIZE
        assert world.image("bad").record.size is None
        with pytest.raises(errors.RequestFailed):
            await world.open("bad")
        world.repository.refused.clear()
        await world.check(await world.open("bad"), ALL)


async def test_asking_for_sizes_waits_for_the_repository_but_not_for_ever() -> None:
    world = world_with("disk", "other")
    async with world.daemon():
        world.repository.down = True
        world.filesystem.sizes.learn_soon([world.image("disk")])
        with pytest.raises(errors.TimedOut):
            await world.open("disk")
        assert trio.current_time() == pytest.approx(IO_TIMEOUT_S, abs=1)
        began = trio.current_time()
        with pytest.raises(errors.TimedOut):  # `ls -l` of thousands waits once
            await world.filesystem.sizes.learn([world.image("other")])
        assert trio.current_time() == began
        await trio.sleep(NO_SIZES_S)
        async with trio.open_nursery() as nursery:  # nobody else has noticed that it is back
            nursery.start_soon(world.open, "disk")
            await trio.sleep(10)
            world.repository.down = False
        assert world.image("disk").open_count == 1


# -- versions


async def test_a_remote_image_is_opened_as_it_is_now() -> None:
    world = world_with("disk")
    async with world.daemon():
        await world.filesystem.sizes.learn([world.image("disk")])
        world.repository.add("disk", pattern(2 * SIZE, seed=3), identity="new")
        image = await world.open("disk")
        assert image.record.size == 2 * SIZE
        await world.check(image, ByteRange(0, 2 * SIZE))


@pytest.mark.parametrize("found_by", ["a reader", "refresh"])
async def test_replacing_gives_a_new_inode_and_old_openers_keep_old_bytes(found_by: str) -> None:
    world = world_with("disk", replace_changed=True)
    old = world.repository.exports["disk"].content
    async with world.daemon():
        invalid: list[str] = []
        image = await world.open("disk")
        await world.check(image, blocks(0, 2))
        world.filesystem.names.on_invalid_entry = lambda folder, name: invalid.append(name)
        new = world.repository.add("disk", pattern(2 * SIZE, seed=1), identity="new").content
        if found_by == "refresh":
            await world.filesystem.refresh()
        else:
            async with trio.open_nursery() as nursery:  # several find it at the same time
                for i in range(4):
                    nursery.start_soon(failing_read, world, image, blocks(8 + i))
            await until(lambda: world.image("disk") is not image)
        now = await world.open("disk")
        assert "disk" in invalid
        assert now.inode != image.inode
        assert now.record.path == image.record.path
        await world.check(now, ByteRange(0, 2 * SIZE), new)
        await until(lambda: now.record.state is State.WHOLE)
        await world.check(image, blocks(0, 2), old)
        await failing_read(world, image, blocks(3))
        assert [r.inode for r in world.catalog.load()] == [now.inode]
        assert world.filesystem.names.node(image.inode) is image
        await world.close(image)
        assert world.filesystem.names.node(image.inode) is None
        assert len(world.stores.open_files) == 1
        await world.filesystem.refresh()
        assert world.image("disk") is now
    assert world.stores.plain == {"disk": new}


async def failing_read(world: World, image: Image, where: ByteRange) -> None:
    with pytest.raises(errors.ExportChanged):
        await world.read(image, where.start, where.length)


async def test_replacing_a_whole_image() -> None:
    world = world_with("disk", replace_changed=True)
    old = world.repository.exports["disk"].content
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        new = world.repository.add("disk", pattern(SIZE, seed=1), identity="new").content
        await world.filesystem.refresh()
        assert world.stores.plain == {}
        await world.check(image, ALL, old)
        now = await world.open("disk")
        await world.check(now, ALL, new)


@pytest.mark.parametrize("after_s", [0.5, 1.5, 2.5, 3.5])
async def test_a_refresh_cancelled_in_the_middle_of_a_replacement_leaves_no_name_that_leads_nowhere(
    after_s: float,
) -> None:
    world = world_with("disk", replace_changed=True)
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        world.repository.add("disk", pattern(SIZE, seed=1), identity="new")
        threads.delay_s = 1
        with trio.move_on_after(after_s):
            await world.filesystem.refresh()
        await world.filesystem.refresh()
        now = await world.open("disk")
        assert now is not image
        await world.check(now, ALL)


@pytest.mark.parametrize("whole", [True, False])
async def test_an_open_in_the_middle_of_a_replacement_is_told_to_look_again(whole: bool) -> None:
    world = world_with("disk", replace_changed=True)
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL if whole else blocks(0))
        await trio.sleep(20)
        await world.close(image)
        world.repository.add("disk", pattern(SIZE, seed=1), identity="new")
        threads.delay_s = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.filesystem.refresh)
            await until(lambda: image.retired)
            with pytest.raises(OSError, match="Stale file handle"):
                await world.open_image(image)
        assert image.open_count == 0
        assert not world.stores.partials
        assert not world.stores.plain
        await world.check(await world.open("disk"), ALL)


@pytest.mark.parametrize("crash", [True, False])
async def test_replacing_an_image_between_its_plain_file_and_the_word_to_the_catalog(
    crash: bool,
) -> None:
    world = world_with("disk", replace_changed=True)
    new = pattern(SIZE, seed=1)
    async with world.daemon(crash=crash):
        image = await world.open("disk")
        world.catalog.error = OSError(5, "I/O error")
        await world.check(image, ALL)
        await until(lambda: "disk" in world.stores.plain)
        if not crash:
            world.catalog.error = None
            world.repository.add("disk", new, identity="new")
            await world.filesystem.refresh()
    world.catalog.error = None
    world.repository.add("disk", new, identity="new")
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        assert world.stores.plain == {"disk": new}


async def test_one_image_that_cannot_be_replaced_stops_neither_the_others_nor_the_daemon() -> None:
    world = world_with("a", "b", replace_changed=True)
    async with world.daemon():
        for name in "ab":
            image = await world.open(name)
            await world.check(image, ALL)
            await until(lambda: image.record.state is State.WHOLE)  # noqa: B023 - it is awaited here
            await world.close(image)
        world.stores.plain.pop("a")
        for name in "ab":
            world.repository.add(name, pattern(SIZE, seed=1), identity="new")
        await world.filesystem.refresh()
        assert world.filesystem.list_trouble == ""
        for name in "ab":
            await world.check(await world.open(name), ALL)


async def test_a_catalog_that_fails_during_a_replacement_does_not_end_the_daemon() -> None:
    world = world_with("disk", replace_changed=True)
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        world.catalog.error = OSError(5, "I/O error")
        world.repository.add("disk", pattern(SIZE, seed=1), identity="new")
        await failing_read(world, image, blocks(9))
        await trio.sleep(60)
        world.catalog.error = None
        await world.filesystem.refresh()
        await world.check(await world.open("disk"), ALL)
        assert len(world.catalog.load()) == 1


async def test_an_open_file_goes_on_when_its_export_disappears_and_returns() -> None:
    world = world_with("disk")
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        keep = world.repository.exports.pop("disk")
        await world.filesystem.refresh()
        await world.read(image, 0, BLOCK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.read, image, 9 * BLOCK, BLOCK)
            await trio.sleep(5)
            world.repository.exports["disk"] = keep
        await world.filesystem.refresh()
        assert image.statistics().error == ""


async def test_others_run_while_many_names_are_taken_in_shown_and_dropped() -> None:
    """A reader must not wait for a list of a hundred thousand names."""
    world = world_with("disk")
    many = 3 * SLICE + 1
    async with world.daemon():
        turns = 0

        async def look() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async def turns_of(work: Awaitable[object]) -> int:
            before = turns
            await work
            return turns - before

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            for number in range(many):
                world.repository.add(f"{number:06}", bytes(BLOCK))
            assert await turns_of(world.filesystem.refresh()) >= 4
            assert len(list(world.filesystem.names.images())) == many + 1
            assert await turns_of(world.command("query-images")) >= many / 500
            for number in range(many):
                del world.repository.exports[f"{number:06}"]
            assert await turns_of(world.filesystem.refresh()) >= 4
            assert len(list(world.filesystem.names.images())) == 1
            nursery.cancel_scope.cancel()


# -- statistics, the end


async def test_statistics_are_ordered_by_path() -> None:
    world = world_with("b", "a", "c/d")
    async with world.daemon():
        assert [i.statistics().path for i in world.filesystem.shown_images()] == ["a", "b", "c/d"]
        assert world.image("b").statistics().path == "b"


async def test_the_end_comes_although_one_image_cannot_be_saved() -> None:
    world = world_with("a", "b")
    async with world.daemon():
        for name in "ab":
            await world.check(await world.open(name), blocks(0))
        world.stores.checkpoint_error = errors.NoSpace()
    assert not world.stores.open_files


async def test_an_end_while_a_reader_waits_for_a_dead_repository() -> None:
    world = world_with("disk")
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        world.repository.hang()
        with trio.move_on_after(1):
            await world.read(image, 5 * BLOCK, BLOCK)
    world.repository.go_on()
    async with world.daemon():
        await world.check(await world.open("disk"), ALL)


# -- touched without being opened


@pytest.mark.parametrize("state", ["remote", "partial", "replaced"])
async def test_touch_is_the_last_use_and_is_kept_at_once(state: str) -> None:
    world = world_with("disk")
    async with world.daemon(crash=True):
        image = world.image("disk")
        if state != "remote":
            await world.open("disk")
            await world.check(image, blocks(0))
        if state == "replaced":
            await world.operations.evict(image)
        before = image.record
        await world.operations.touch(image, 10**18)
        assert (image.record.last_used_ns, image.record.created_ns) == (10**18, before.created_ns)
        assert image.record.state is before.state
        await world.operations.touch(image, 10**20)
        assert 10**18 < image.record.last_used_ns < 10**20, "nobody used it in the future"
        await world.operations.touch(image, -5)
        assert image.record.last_used_ns == 0
        await world.operations.touch(image, 10**18)
        if state == "partial":
            await world.close(image)  # a use, too, and later
            assert image.record.last_used_ns > 10**18
    if state != "replaced":
        assert world.catalog.load()[0].last_used_ns == 10**18


async def whole(world: World) -> Image:
    """Open "disk" and read all of it, until it is whole."""
    image = await world.open("disk")
    await world.read(image, 0, SIZE)
    await until(lambda: image.record.state is State.WHOLE)
    return image


async def test_an_image_without_a_known_identity_takes_over_that_of_its_export() -> None:
    world = world_with("disk")
    async with world.daemon():
        image = await whole(world)
        image.record = replace(image.record, identity=UNKNOWN)
        content = bytes(world.repository.exports["disk"].content)
        world.repository.add("disk", content, identity="2026-11-28")
        await world.filesystem.refresh()
        await until(lambda: image.record.identity == "2026-11-28")
        assert image.record.error == ""
        world.repository.add("disk", content, identity="2026-11-29")
        await world.filesystem.refresh()
        assert "changed in the repository" in image.record.error


async def test_an_image_without_a_known_identity_is_compared_with_its_export_first() -> None:
    world = world_with("disk")
    async with world.daemon():
        image = await whole(world)
        content = bytes(world.repository.exports["disk"].content)
        image.record = replace(image.record, identity=UNKNOWN)
        world.repository.add("disk", content[::-1], identity="2026-11-28")
        await world.filesystem.refresh()
        await until(lambda: "changed in the repository" in image.record.error)
        world.repository.add("disk", content, identity="2026-11-29")
        await world.filesystem.refresh()
        await until(lambda: not world.filesystem._identified_now)
        assert image.record.identity == UNKNOWN
        assert "changed in the repository" in image.record.error, "it does not come and go"


async def test_an_image_that_cannot_be_compared_stays_unknown() -> None:
    world = world_with("disk")
    async with world.daemon():
        image = await whole(world)
        content = bytes(world.repository.exports["disk"].content)
        await world.close(image)
        used_ns = image.record.last_used_ns
        image.record = replace(image.record, identity=UNKNOWN)
        world.repository.add("disk", content, identity="2026-11-28")

        def refuses() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        world.stores.on_call = refuses
        await world.filesystem.refresh()
        await until(lambda: not world.filesystem._identified_now)
        assert (image.record.identity, image.record.error) == (UNKNOWN, "")
        world.stores.on_call = lambda: None
        await world.filesystem.refresh()
        await until(lambda: image.record.identity == "2026-11-28")
        assert image.record.last_used_ns == used_ns, "nobody has used it"
        assert image.open_count == 0
