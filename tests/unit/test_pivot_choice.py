"""Which nodes are to be moved: every row of the drawing in `pivot_choice`, and what must not be."""

from dataclasses import replace

import pytest

from lazyfs.core import inode_number
from lazyfs.core.pivot_choice import Action, Choice, FileNode, Image, OpenFile, Place, choose

MOUNT, PLAIN, KEY, SIZE = 50, 8, 17, 1 << 20
WHOLE = inode_number.whole(KEY)
PATH = "/mnt/disk"

FILLING = Place(MOUNT, KEY, SIZE, True)
ON_MOUNT = Place(MOUNT, WHOLE, SIZE, True)
DETACHED = Place(PLAIN, 99, SIZE, True)


def node(now: Place | None, **changes: object) -> FileNode:
    plain = FileNode("base-file", PATH, SIZE, now, "" if now else "nowhere", now is not None and now.device == MOUNT)
    return replace(plain, **changes)


def image(now: Place | None, state: str = "whole", **changes: object) -> Image:
    return replace(Image(PATH, MOUNT, KEY, state, SIZE, None, now), **changes)


def opened(device: int, inode: int, **changes: object) -> OpenFile:
    return replace(OpenFile(11, device, inode, PATH), **changes)


def only(nodes: list[FileNode], images: list[Image], files: list[OpenFile]) -> Choice:
    choices, _ = choose(nodes, images, files)
    (choice,) = choices
    return choice


@pytest.mark.parametrize(
    ("file", "now", "state", "action"),
    [
        ((MOUNT, KEY), FILLING, "partial", Action.PARTIAL),
        ((MOUNT, KEY), FILLING, "remote", Action.PARTIAL),
        ((MOUNT, KEY), FILLING, "failed", Action.SKIP),
        ((MOUNT, KEY), ON_MOUNT, "whole", Action.MOVE),
        ((MOUNT, WHOLE), ON_MOUNT, "whole", Action.ALREADY),
        ((MOUNT, KEY), DETACHED, "whole", Action.MOVE),
        ((MOUNT, WHOLE), DETACHED, "whole", Action.MOVE),
        ((PLAIN, 99), DETACHED, "whole", Action.ALREADY),
        ((MOUNT, KEY), DETACHED, "partial", Action.PARTIAL),
        ((MOUNT, KEY + 1), ON_MOUNT, "whole", Action.SKIP),
        ((PLAIN, 5), ON_MOUNT, "whole", Action.SKIP),
    ],
)
def test_each_row(file: tuple[int, int], now: Place, state: str, action: Action) -> None:
    assert only([node(now)], [image(now, state)], [opened(*file)]).action is action


@pytest.mark.parametrize(
    ("now", "size"),
    [
        (replace(DETACHED, size=SIZE + 512), SIZE),
        (replace(DETACHED, regular=False), SIZE),
        (DETACHED, SIZE + 512),
    ],
)
def test_a_wrong_file_is_not_moved_to(now: Place, size: int) -> None:
    choice = only([node(now, size=size)], [image(now)], [opened(MOUNT, KEY)])
    assert (choice.action, bool(choice.message)) == (Action.SKIP, True)


def test_a_size_that_is_no_multiple_of_a_sector() -> None:
    now = replace(DETACHED, size=SIZE - 100)
    assert only([node(now)], [image(now, size=SIZE - 100)], [opened(MOUNT, KEY)]).action is Action.MOVE
    assert only([node(now)], [image(now, size=SIZE)], [opened(MOUNT, KEY)]).action is Action.SKIP


def test_what_has_nothing_to_do_with_lazyfs_is_not_mentioned() -> None:
    assert choose([node(DETACHED)], [], [opened(PLAIN, 5)]) == ([], [])
    assert choose([node(DETACHED)], [image(None)], [opened(PLAIN, 99)]) == ([], [])


def test_a_path_that_leads_nowhere_says_why() -> None:
    choice = only([node(None)], [image(None)], [opened(MOUNT, KEY)])
    assert (choice.action, choice.message) == (Action.SKIP, "nowhere")


def test_an_image_of_a_detached_mount_that_was_mounted_again() -> None:
    now = Place(MOUNT + 1, WHOLE, SIZE, True)
    images = [image(now), image(now, device=MOUNT + 1)]
    choice = only([node(now)], images, [opened(MOUNT, KEY)])
    assert choice.action is Action.MOVE
    assert choice.stale == (opened(MOUNT, KEY),)


# -- a killed daemon

DEAD = opened(MOUNT, KEY, orphan=True)


@pytest.mark.parametrize("name", [PATH, "/disk", "/disk (deleted)"])
def test_a_file_of_a_dead_mount_is_known_by_its_name(name: str) -> None:
    assert only([node(DETACHED)], [], [replace(DEAD, name=name)]).action is Action.MOVE


@pytest.mark.parametrize("name", ["/other", "isk", "/mnt2/mnt/disk"])
def test_a_file_of_a_dead_mount_with_another_name_is_not_moved(name: str) -> None:
    assert choose([node(DETACHED)], [], [replace(DEAD, name=name)])[0] == []


def test_a_plain_file_is_not_taken_for_one_of_a_dead_mount_with_the_same_name() -> None:
    assert choose([node(DETACHED)], [], [DEAD, opened(PLAIN, 99, fd=12)])[0] == []


def test_two_disks_of_a_path_of_which_one_was_opened_later() -> None:
    nodes = [node(DETACHED), node(DETACHED, name="later")]
    choices, _ = choose(nodes, [], [DEAD, opened(PLAIN, 99, fd=12)])
    assert [choice.action for choice in choices] == [Action.MOVE, Action.MOVE]


def test_a_dead_mount_that_is_mounted_again_must_have_the_same_image() -> None:
    again = replace(ON_MOUNT, device=MOUNT + 1)
    same, other = image(again, device=MOUNT + 1), image(again, device=MOUNT + 1, key=KEY + 1)
    assert only([node(again)], [same], [DEAD]).action is Action.MOVE
    there = replace(again, inode=inode_number.whole(KEY + 1))
    assert only([node(there)], [other], [DEAD]).action is Action.SKIP


# -- open files that no node explains


def test_an_open_file_without_a_node_is_found() -> None:
    file = opened(MOUNT, KEY)
    assert choose([], [image(DETACHED)], [file]) == ([], [file])
    assert choose([], [image(ON_MOUNT)], [opened(MOUNT, WHOLE)]) == ([], [])
    assert choose([node(DETACHED)], [image(DETACHED)], [file])[1] == []
