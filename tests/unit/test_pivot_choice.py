"""Which nodes are to be moved: every row of the drawing in `pivot_choice`, and what must not be."""

from dataclasses import replace
from typing import Any

import pytest

from lazyfs.core import inode_number
from lazyfs.core.pivot_choice import (
    ROWS,
    Action,
    Choice,
    FileNode,
    Image,
    OpenFile,
    Place,
    Row,
    case_of,
    choose,
)

MOUNT, PLAIN, KEY, SIZE = 50, 8, 17, 1 << 20
TIME = frozenset({1_700_000_000_123_456_789})
LATER = frozenset({1_700_000_000_123_456_790})
WHOLE = inode_number.whole(KEY)
PATH = "/mnt/disk"

FILLING = Place(MOUNT, KEY, SIZE, TIME, True)
ON_MOUNT = Place(MOUNT, WHOLE, SIZE, TIME, True)
DETACHED = Place(PLAIN, 99, SIZE, TIME, True)


def node(now: Place | None, **changes: Any) -> FileNode:
    plain = FileNode(
        "base-file",
        PATH,
        SIZE,
        now,
        "" if now else "nowhere",
        now is not None and now.device == MOUNT,
    )
    return replace(plain, **changes)


def image(now: Place | None, state: str = "whole", **changes: Any) -> Image:
    return replace(Image(PATH, "/cache", MOUNT, KEY, state, SIZE, None, now), **changes)


def opened(device: int, inode: int, **changes: Any) -> OpenFile:
    return replace(OpenFile(11, device, inode, SIZE, TIME, PATH), **changes)


def only(nodes: list[FileNode], images: list[Image], files: list[OpenFile]) -> Choice:
    choices, _ = choose(nodes, images, files)
    (choice,) = choices
    return choice


@pytest.mark.parametrize(
    ("file", "now", "state", "action"),
    [
        ((MOUNT, KEY), FILLING, "partial", Action.PARTIAL),
        ((MOUNT, KEY), FILLING, "remote", Action.PARTIAL),
        ((MOUNT, KEY), FILLING, "failed", Action.SKIPPED),
        ((MOUNT, KEY), FILLING, "whole", Action.PARTIAL),
        ((MOUNT, WHOLE), FILLING, "whole", Action.PARTIAL),
        ((MOUNT, KEY), ON_MOUNT, "whole", Action.MOVE),
        ((MOUNT, WHOLE), ON_MOUNT, "whole", Action.ALREADY),
        ((MOUNT, KEY), DETACHED, "whole", Action.MOVE),
        ((MOUNT, WHOLE), DETACHED, "whole", Action.MOVE),
        ((PLAIN, 99), DETACHED, "whole", Action.ALREADY),
        ((MOUNT, KEY), DETACHED, "partial", Action.PARTIAL),
        ((MOUNT, KEY + 1), ON_MOUNT, "whole", Action.SKIPPED),
        ((PLAIN, 5), ON_MOUNT, "whole", Action.SKIPPED),
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
    assert (choice.action, bool(choice.message)) == (Action.SKIPPED, True)


def test_a_size_that_is_no_multiple_of_a_sector() -> None:
    now = replace(DETACHED, size=SIZE - 100)
    file = opened(MOUNT, KEY, size=SIZE - 100)
    assert only([node(now)], [image(now, size=SIZE - 100)], [file]).action is Action.MOVE
    assert only([node(now)], [image(now, size=SIZE)], [file]).action is Action.SKIPPED
    assert only([node(now)], [], [replace(file, orphan=True)]).action is Action.MOVE


def test_what_has_nothing_to_do_with_lazyfs_is_not_mentioned() -> None:
    assert choose([node(DETACHED)], [], [opened(PLAIN, 5)]) == ([], [])
    assert choose([node(DETACHED)], [image(None)], [opened(PLAIN, 99)]) == ([], [])


def test_a_path_that_leads_nowhere_says_why() -> None:
    choice = only([node(None)], [image(None)], [opened(MOUNT, KEY)])
    assert (choice.action, choice.message) == (Action.SKIPPED, "nowhere")


def test_an_image_of_a_detached_mount_that_was_mounted_again() -> None:
    now = Place(MOUNT + 1, WHOLE, SIZE, TIME, True)
    images = [image(now), image(now, device=MOUNT + 1)]
    choice = only([node(now)], images, [opened(MOUNT, KEY)])
    assert choice.action is Action.MOVE
    assert choice.stale == (opened(MOUNT, KEY),)


def test_a_path_that_is_not_the_images_own_and_leads_nowhere() -> None:
    for file in (opened(MOUNT, KEY), replace(DEAD, name="/disk")):
        images = [] if file.orphan else [image(None)]
        choices, unexplained = choose([node(None, path="links/other")], images, [file])
        assert [(one.action, one.message) for one in choices] == [(Action.SKIPPED, "nowhere")]
        assert unexplained == []
        assert choose([node(None, path="links/other", size=SIZE + 512)], images, [file])[0] == []


def test_the_plain_file_below_the_mount_needs_nothing() -> None:
    """Detached, pivoted, and mounted again over it."""
    below = opened(PLAIN, 99, plain=True)
    assert only([node(ON_MOUNT)], [image(ON_MOUNT)], [below]).action is Action.ALREADY
    for other in (
        replace(below, times_ns=LATER),
        replace(below, size=SIZE + 1),
        replace(below, plain=False),
    ):
        choice = only([node(ON_MOUNT)], [image(ON_MOUNT)], [other])
        assert (choice.action, "cannot be checked" in choice.message) == (Action.SKIPPED, True)
    nodes = [node(ON_MOUNT), node(ON_MOUNT, name="later")]
    assert {one.action for one in choose(nodes, [image(ON_MOUNT)], [below])[0]} == {
        Action.SKIPPED
    }, "one of them has it"


def test_an_old_version_beside_a_new_one_that_is_not_whole() -> None:
    old, new = (
        image(None, replaced=True),
        image(replace(FILLING, inode=KEY + 1), "partial", key=KEY + 1),
    )
    choice = only([node(new.now)], [old, new], [opened(MOUNT, KEY)])
    assert (choice.action, "another version of the image open" in choice.message) == (
        Action.SKIPPED,
        True,
    )


def test_a_mount_that_is_detached_elsewhere_is_not_moved_to() -> None:
    for inode in (KEY, WHOLE):
        choice = only([node(ON_MOUNT, on_detached=True)], [image(ON_MOUNT)], [opened(MOUNT, inode)])
        assert (choice.action, "detached elsewhere" in choice.message) == (Action.SKIPPED, True)


# -- other bytes of the same name and size

OTHER = replace(DETACHED, times_ns=LATER)


def test_an_image_of_another_repository_at_the_same_path_is_not_moved_to() -> None:
    """The first mount was detached, and the second has its own cache. Keys are small numbers of one
    cache, so both may have the same."""
    now = Place(MOUNT + 1, WHOLE, SIZE, TIME, True)  # even the same time
    images = [image(now), image(now, device=MOUNT + 1, cache="/other")]
    file = opened(MOUNT, KEY)
    choices, unexplained = choose([node(now)], images, [file])
    assert [choice.action for choice in choices] == [Action.SKIPPED]
    assert choices[0].message == (
        "QEMU has the image of the cache /cache open, and the path leads to one of the cache /other now"
    )
    assert unexplained == [], "one line says it"


def test_nor_is_one_of_two_nodes_when_it_may_be_the_other_that_has_it() -> None:
    now = Place(MOUNT + 1, WHOLE, SIZE, TIME, True)
    images = [image(now), image(now, device=MOUNT + 1, cache="/other")]
    nodes = [node(now), node(now, name="later")]
    for there in (KEY, WHOLE):
        choices, _ = choose(nodes, images, [opened(MOUNT, KEY), opened(MOUNT + 1, there, fd=12)])
        assert [choice.action for choice in choices] == [Action.SKIPPED, Action.SKIPPED]


def test_a_cache_that_was_begun_anew_in_the_same_folder_is_not_moved_to() -> None:
    now = Place(MOUNT + 1, WHOLE, SIZE, LATER, True)
    images = [image(now), image(now, device=MOUNT + 1)]
    choice = only([node(now)], images, [opened(MOUNT, KEY)])
    assert (choice.action, "times of change differ" in choice.message) == (Action.SKIPPED, True)


def test_another_version_of_an_image_is_not_moved_to() -> None:
    old, new = image(None, replaced=True), image(DETACHED, key=KEY + 1)
    choice = only([node(DETACHED)], [old, new], [opened(MOUNT, KEY)])
    assert (choice.action, "another version" in choice.message) == (Action.SKIPPED, True)


def test_an_unrelated_file_below_the_mountpoint_is_not_moved_to() -> None:
    """The cache lies elsewhere, so the path is free after a detach."""
    choice = only([node(OTHER)], [image(OTHER)], [opened(MOUNT, WHOLE)])
    assert (choice.action, "times of change differ" in choice.message) == (Action.SKIPPED, True)


@pytest.mark.parametrize("now", [OTHER, replace(DETACHED, size=SIZE + 512)])
def test_a_dead_mount_may_be_anybodys_so_the_file_must_be_the_one(now: Place) -> None:
    choice = only([node(now)], [], [replace(DEAD, name="/disk")])
    assert (choice.action, bool(choice.message)) == (Action.SKIPPED, True)


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
    assert only([node(there)], [other], [DEAD]).action is Action.SKIPPED


# -- open files that no node explains


def test_an_open_file_without_a_node_is_found() -> None:
    file = opened(MOUNT, KEY)
    assert choose([], [image(DETACHED)], [file]) == ([], [file])
    assert choose([], [image(ON_MOUNT)], [opened(MOUNT, WHOLE)]) == ([], [])
    assert choose([node(DETACHED)], [image(DETACHED)], [file])[1] == []


# -- the rows

ELSEWHERE = replace(ON_MOUNT, device=MOUNT + 1)

FIRST = {
    "has nothing to do with lazyfs": ([node(DETACHED)], [], [opened(PLAIN, 5)]),
    "leads nowhere": ([node(None)], [image(None)], [opened(MOUNT, KEY)]),
    "leads to a file on a lazyfs that is no image": ([node(ON_MOUNT)], [], [opened(MOUNT, WHOLE)]),
    "has a file open that is no image, and leads to it": (
        [node(DETACHED)],
        [],
        [DEAD, opened(PLAIN, 99, fd=12)],
    ),
    "leads to a detached mount": (
        [node(ON_MOUNT, on_detached=True)],
        [image(ON_MOUNT, "failed")],
        [opened(MOUNT, KEY)],
    ),
    "has only other images of this path open": (
        [node(ELSEWHERE)],
        [image(ELSEWHERE), image(ELSEWHERE, "failed", device=MOUNT + 1, cache="/other")],
        [opened(MOUNT, KEY)],
    ),
    "leads to a failed image": (
        [node(FILLING)],
        [image(FILLING, "failed", error="EIO")],
        [opened(MOUNT, KEY)],
    ),
    "leads to an image that is not whole": (
        [node(FILLING)],
        [image(FILLING, "partial")],
        [opened(PLAIN, 99, plain=True)],
    ),
    "has the plain file below the mount open": (
        [node(ON_MOUNT)],
        [image(ON_MOUNT)],
        [opened(PLAIN, 99, plain=True)],
    ),
    "has no file open that is known": ([node(ON_MOUNT)], [image(ON_MOUNT)], [opened(PLAIN, 5)]),
    "leads to a whole image that the kernel does not know to be whole": (
        [node(FILLING)],
        [image(FILLING)],
        [opened(MOUNT, WHOLE)],
    ),
    "would be moved to what is no regular file": (
        [node(replace(DETACHED, regular=False, size=1))],
        [image(replace(DETACHED, regular=False, size=1))],
        [opened(MOUNT, KEY)],
    ),
    "would be moved to a file of another size": (
        [node(replace(OTHER, size=SIZE + 512))],
        [image(replace(OTHER, size=SIZE + 512))],
        [opened(MOUNT, KEY)],
    ),
    "may have another image of this path open": (
        [node(OTHER), node(OTHER, name="later")],
        [image(OTHER), image(None, key=KEY + 1, replaced=True)],
        [opened(MOUNT, KEY), opened(MOUNT, KEY + 1, fd=12)],
    ),
    "would be moved to another file": ([node(OTHER)], [image(OTHER)], [opened(MOUNT, KEY)]),
    "has the image open, but not the file to which the path leads": (
        [node(DETACHED)],
        [image(DETACHED)],
        [opened(MOUNT, KEY)],
    ),
    "has the file open to which the path leads": (
        [node(DETACHED)],
        [image(DETACHED)],
        [opened(PLAIN, 99)],
    ),
}
"""For each row the nodes, images and open files to which it is the first that applies. Where it can
be, a later row applies to them as well."""


def test_every_row_has_an_example() -> None:
    assert list(FIRST) == [row.name for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_applies_and_none_above_it(row: Row) -> None:
    nodes, images, files = FIRST[row.name]
    case = case_of(nodes[0], nodes, images, files)
    assert next(one for one in ROWS if one.applies(case)) is row
    choices, _ = choose(nodes, images, files)
    if row.action is None:
        assert choices == []
        return
    assert choices[0].action is row.action
    assert choices[0].message == row.message(case)
    assert bool(choices[0].message) == (
        row.action in (Action.SKIPPED, Action.PARTIAL) or bool(case.below)
    )
    assert choices[0].stale == (case.stale if row.compares else ())
