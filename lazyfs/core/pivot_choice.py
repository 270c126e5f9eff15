"""Which file nodes of a QEMU are to be moved, from what it has open and where the paths lead now.

Names say where a path leads *now*; what QEMU has open is told by device and inode alone. An image has two inode
numbers on its mount (`inode_number`), and after a detach its path names a plain file on another device.

    open file             path leads to          image      choice
    mount, key            mount, key             not whole  PARTIAL
    mount, key            mount, key             whole      PARTIAL: the kernel has not been told yet
    mount, key            mount, key | WHOLE     whole      MOVE
    mount, key | WHOLE    the same               whole      ALREADY
    mount, any of both    a plain file           whole      MOVE, if it is the image's
    mount, any of both    another lazyfs mount   whole      MOVE, if it has the same cache, and it is the image's
    plain file            the same                          ALREADY
    plain file            mount, key | WHOLE     whole      ALREADY, if it is the image's: it lies below the mount
    mount, any of both    nowhere                           SKIPPED
    anything              a detached mount                  SKIPPED: a bind mount, or QEMU's own mount namespace
    a dead mount          a plain file, or one   nobody     MOVE, if it is the image's
                          on a mount             answers

A path may lead to other bytes of the same name and size: a second repository mounted there, or any file that somebody
put there. So a file on another device **is the image's** only if it has the same size and the same time of change, to
the nanosecond: lazyfs gives the image, on every mount, and its plain file the time when the catalog first saw it. (A
copy has it, too, if it was made with its times. That the file lies in the cache where the daemon says is not asked:
the cache may be below the mountpoint, and then whatever is at the path lies there.) What QEMU has open of that name
besides, and is not the image's, stops the move: nobody can tell which node has which descriptor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lazyfs.core import inode_number

FD_SETS = "/dev/fdset/"
"""Names of descriptors that QEMU was given: they never led anywhere."""

SECTOR = 512
"""QEMU rounds the size of a node up to it."""


class Action(StrEnum):
    """What is to become of a node, and then what became of it; the values are printed."""

    MOVE = "would pivot"
    """Printed of a dry run only: else it becomes one of the next two."""
    PIVOTED = "pivoted"
    FAILED = "failed"
    ALREADY = "already"
    PARTIAL = "partial"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path leads."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    regular: bool


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor of QEMU."""

    fd: int
    device: int
    inode: int
    size: int
    mtime_ns: int
    name: str
    """As /proc/PID/fd shows it: for messages, and for files of a dead mount."""
    orphan: bool = False
    """The file lies on a FUSE mount whose daemon is gone."""
    plain: bool = False
    """The file lies on a mounted file system that is no lazyfs."""

    def is_at(self, place: Place) -> bool:
        """Whether it is the very file there."""
        return (self.device, self.inode) == (place.device, place.inode)

    def is_image_at(self, place: Place, image: "Image | None") -> bool:
        """Whether it is the same image as the file there, which is that of `image` if that is known: see above."""
        key = inode_number.key(self.inode)
        if self.device == place.device:
            return key == inode_number.key(place.inode)
        return (self.size, self.mtime_ns) == (place.size, place.mtime_ns) and (
            image is None or image.key == key
        )


@dataclass(frozen=True, slots=True)
class Image:
    """An image, as its daemon describes it."""

    path: str
    cache: str
    device: int
    key: int
    state: str
    size: int | None
    error: str | None
    now: Place | None = None
    """Where its path leads now, in our own view of the file system."""
    replaced: bool = False
    """Another image has its path, and some reader has this one open."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """The same for the image on a detached mount and on the one that followed: keys are numbers of one cache."""
        return self.cache, self.path, self.key


@dataclass(frozen=True, slots=True)
class FileNode:
    """A file node of QEMU."""

    name: str
    path: str
    size: int
    now: Place | None
    trouble: str
    """Why `now` is not known."""
    on_lazyfs: bool
    """The path lies on a mounted lazyfs."""
    on_detached: bool = False
    """The path leads, in QEMU's view, to a lazyfs that is detached from its mountpoint in ours."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a node, and why."""

    node: FileNode
    action: Action
    message: str
    stale: tuple[OpenFile, ...] = ()
    """Descriptors that must be gone afterwards."""
    explains: tuple[OpenFile, ...] = ()
    """Descriptors that it speaks of."""


def choose(
    nodes: Sequence[FileNode], images: Sequence[Image], opened: Sequence[OpenFile]
) -> tuple[list[Choice], list[OpenFile]]:
    """Return a choice for each node that has to do with lazyfs, and the open files of images that no node explains."""
    choices = [
        choice for node in nodes if (choice := _choose(node, nodes, images, opened)) is not None
    ]
    explained = {file.fd for choice in choices for file in choice.explains}
    unexplained = [file for file in _on_old_places(images, opened) if file.fd not in explained]
    # A path that leads nowhere, and is not the image's own (relative, or by way of a symbolic link): its size tells.
    chosen = {choice.node.name for choice in choices}
    lost = [node for node in nodes if node.now is None and not node.path.startswith(FD_SETS)]
    for node in (one for one in lost if one.name not in chosen):
        files = tuple(file for file in unexplained if _sectors(file.size) == _sectors(node.size))
        if files:
            choices.append(Choice(node, Action.SKIPPED, node.trouble, (), files))
            explained |= {file.fd for file in files}
    orphans = {
        file.fd for file in unexplained if file.orphan
    }  # of another FUSE file system, perhaps
    return choices, [file for file in unexplained if file.fd not in explained | orphans]


def _choose(
    node: FileNode, nodes: Sequence[FileNode], images: Sequence[Image], opened: Sequence[OpenFile]
) -> Choice | None:
    image = _image_named(node, images)
    of_images = [(file, one) for file in opened if (one := _image_of(file, images)) is not None]
    mine = [file for file, one in of_images if image is not None and one.identity == image.identity]
    others = [
        (file, one)
        for file, one in of_images
        if file not in mine and one.path == (image or node).path
    ]
    orphans = [file for file in opened if file.orphan and _was_named(file, node)]
    explains = (*mine, *(file for file, _ in others), *orphans)
    now = node.now

    def choice(action: Action, message: str = "", stale: Sequence[OpenFile] = ()) -> Choice:
        return Choice(node, action, message, tuple(stale), explains)

    if image is None and not explains and not node.on_lazyfs:
        return None
    if now is None:
        return choice(Action.SKIPPED, node.trouble)
    if image is None and node.on_lazyfs:
        return choice(Action.SKIPPED, "lazyfs does not know this file")
    at_target = [file for file in opened if file.is_at(now)]
    settled = len(at_target) >= sum(one.now == now for one in nodes)
    if image is None and settled:
        return None  # every node of this path is there; what is open besides only has the same name
    if node.on_detached:
        where = "the path leads QEMU to a lazyfs that is detached elsewhere"
        return choice(
            Action.SKIPPED,
            f"{where}: through a bind mount, or in a mount namespace; unmount it there",
        )
    if others and not mine and not settled:
        return choice(Action.SKIPPED, _other_version(others, image))
    if image is not None and image.state == "failed":
        return choice(Action.SKIPPED, f"the image failed: {image.error}")
    if image is not None and image.state != "whole":
        return choice(Action.PARTIAL, "not whole yet")
    below = (
        [file for file in opened if file.plain and file.is_image_at(now, None)]
        if node.on_lazyfs
        else []
    )
    if (
        below
        and not explains
        and len(at_target) + len(below) >= sum(one.now == now for one in nodes)
    ):
        return choice(Action.ALREADY, "it has the plain file below the mount open")
    if not explains and not at_target:
        message = "cannot be checked: the process that made the socket does not have this file open"
        return choice(Action.SKIPPED, message)
    if image is not None and now.device == image.device and not inode_number.is_whole(now.inode):
        return choice(Action.PARTIAL, "the path does not lead to the whole image yet")
    stale = [file for file in (*mine, *orphans) if not file.is_at(now)]
    if settled:  # then the rest is not this node's
        others, stale = [], [file for file in stale if file in mine or file.is_image_at(now, image)]
    if why := _why_not(node, now, image, stale, others):
        return choice(Action.SKIPPED, why, stale)
    return choice(Action.MOVE if stale else Action.ALREADY, "", stale)


def _image_named(node: FileNode, images: Sequence[Image]) -> Image | None:
    """Return the image that the node's path names now."""
    now = node.now
    if now is None:
        return next(
            (image for image in images if image.path == node.path and not image.replaced), None
        )
    on_mount = {(image.device, image.key): image for image in images}.get(
        (now.device, inode_number.key(now.inode))
    )
    if on_mount is not None:
        return on_mount
    there = (now.device, now.inode)
    return next(
        (one for one in images if one.now is not None and (one.now.device, one.now.inode) == there),
        None,
    )


def _image_of(file: OpenFile, images: Sequence[Image]) -> Image | None:
    """Return the image that was opened, on whichever mount it was then."""
    key = inode_number.key(file.inode)
    return next(
        (image for image in images if (image.device, image.key) == (file.device, key)), None
    )


def _on_old_places(images: Sequence[Image], opened: Sequence[OpenFile]) -> list[OpenFile]:
    found = []
    for file in opened:
        image = _image_of(file, images)
        if file.orphan if image is None else image.now is None or not file.is_at(image.now):
            found.append(file)
    return found


def _sectors(size: int) -> int:
    return -(-size // SECTOR)


def _was_named(file: OpenFile, node: FileNode) -> bool:
    """Whether a file of a dead mount is this node's: once unmounted, it shows its name within the mount only."""
    name = file.name.removesuffix(" (deleted)")
    return name.startswith("/") and node.path.endswith(name)


def _other_version(others: Sequence[tuple[OpenFile, Image]], image: Image | None) -> str:
    other = others[0][1]
    if image is None or other.cache != image.cache:
        whose = "elsewhere" if image is None else f"to one of the cache {image.cache}"
        return f"QEMU has the image of the cache {other.cache} open, and the path leads {whose} now"
    return "QEMU has another version of the image open than the path leads to now"


def _why_not(
    node: FileNode,
    now: Place,
    image: Image | None,
    stale: Sequence[OpenFile],
    others: Sequence[tuple[OpenFile, Image]],
) -> str:
    """Say why QEMU must not be moved to where the path leads now, if so."""
    if stale and not now.regular:
        return "the path names no regular file now"
    for file in stale:
        size = file.size if image is None or image.size is None else image.size
        if now.size != size or _sectors(now.size) * SECTOR != node.size:
            return (
                f"the file has {now.size} bytes now, the image {size} and QEMU's node {node.size}"
            )
    if others:
        return _other_version(others, image)
    if not all(file.is_image_at(now, image) for file in stale):
        return (
            "the path leads to another file than the image that QEMU has open: their times of change differ "
            "(a copy must keep the time, as with cp --preserve=timestamps)"
        )
    return ""
