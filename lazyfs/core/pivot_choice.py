"""Which file nodes of a QEMU are to be moved, from what it has open and where the paths lead now.

Names say where a path leads *now*; what QEMU has open is told by device and inode alone. An image has two inode
numbers on its mount (`inode_number`), and after a detach its path names a plain file on another device.

    open file             path leads to          image      choice
    mount, key            mount, key             not whole  PARTIAL
    mount, key            mount, key | WHOLE     whole      MOVE
    mount, key | WHOLE    the same               whole      ALREADY
    mount, any of both    a plain file           whole      MOVE
    plain file            the same                          ALREADY
    a dead mount          a plain file of the    nobody     MOVE: lazyfs leaves only whole images there
                          node's size            answers
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from lazyfs.core import inode_number

SECTOR = 512
"""QEMU rounds the size of a node up to it."""


class Action(Enum):
    """What is to become of a node; the values that are printed are in `pivot`."""

    MOVE = "move"
    ALREADY = "already"
    PARTIAL = "partial"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path leads."""

    device: int
    inode: int
    size: int
    regular: bool


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor of QEMU."""

    fd: int
    device: int
    inode: int
    name: str
    """As /proc/PID/fd shows it: for messages, and for files of a dead mount."""
    orphan: bool = False
    """The file lies on a FUSE mount whose daemon is gone."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image, as its daemon describes it."""

    path: str
    device: int
    key: int
    state: str
    size: int | None
    error: str | None
    now: Place | None
    """Where its path leads now, in our own view of the file system."""

    @property
    def identity(self) -> tuple[str, int]:
        """The same for the image on a detached mount and on the one that followed."""
        return self.path, self.key


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


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a node, and why."""

    node: FileNode
    action: Action
    message: str
    image: Image | None = None
    stale: tuple[OpenFile, ...] = ()
    """Descriptors that must be gone afterwards."""


def choose(
    nodes: Sequence[FileNode], images: Sequence[Image], opened: Sequence[OpenFile]
) -> tuple[list[Choice], list[OpenFile]]:
    """Return a choice for each node that has to do with lazyfs, and the open files of images that no node explains."""
    choices = [choice for node in nodes if (choice := _choose(node, nodes, images, opened)) is not None]
    explained = {file.fd for choice in choices for file in _of_image(choice.image, images, opened)}
    return choices, [file for file in _on_old_places(images, opened) if file.fd not in explained]


def _choose(
    node: FileNode, nodes: Sequence[FileNode], images: Sequence[Image], opened: Sequence[OpenFile]
) -> Choice | None:
    image = _image_named(node, images)
    mine = _of_image(image, images, opened)
    mine += [file for file in opened if file.orphan and _was_named(file, node) and _may_be(file, image)]
    now = node.now
    if image is None and not mine and not node.on_lazyfs:
        return None
    if now is None:
        return Choice(node, Action.SKIP, node.trouble, image)
    if image is None and node.on_lazyfs:
        return Choice(node, Action.SKIP, "lazyfs does not know this file")
    at_target = [file for file in opened if (file.device, file.inode) == _place(now)]
    if image is None and len(at_target) >= sum(one.now == now for one in nodes):
        return None  # every node of this path is there; the file of the dead mount only has the same name
    if image is not None and image.state == "failed":
        return Choice(node, Action.SKIP, f"the image failed: {image.error}", image)
    if image is not None and image.state != "whole":
        return Choice(node, Action.PARTIAL, "not whole yet", image)
    if not mine and not at_target:
        message = "cannot be checked: the process that made the socket does not have this file open"
        return Choice(node, Action.SKIP, message, image)
    stale = tuple(file for file in mine if (file.device, file.inode) != _place(now))
    if not stale:
        return Choice(node, Action.ALREADY, "", image)
    why = _wrong_place(node, now, image)
    return Choice(node, Action.SKIP if why else Action.MOVE, why, image, stale)


def _image_named(node: FileNode, images: Sequence[Image]) -> Image | None:
    """Return the image that the node's path names now."""
    now = node.now
    if now is None:
        return next((image for image in images if image.path == node.path), None)
    on_mount = {(image.device, image.key): image for image in images}.get((now.device, inode_number.key(now.inode)))
    if on_mount is not None:
        return on_mount
    same = (image for image in images if image.now is not None and _place(image.now) == _place(now))
    return next(same, None)


def _place(place: Place) -> tuple[int, int]:
    return place.device, place.inode


def _of_image(image: Image | None, images: Sequence[Image], opened: Sequence[OpenFile]) -> list[OpenFile]:
    """Return the descriptors of this image, on whichever mount it was when they were opened."""
    if image is None:
        return []
    mounts: Mapping[tuple[int, int], Image] = {(one.device, one.key): one for one in images}
    found = []
    for file in opened:
        one = mounts.get((file.device, inode_number.key(file.inode)))
        if one is not None and one.identity == image.identity:
            found.append(file)
    return found


def _on_old_places(images: Sequence[Image], opened: Sequence[OpenFile]) -> list[OpenFile]:
    known = {(image.device, image.key): image for image in images}
    found = []
    for file in opened:
        image = known.get((file.device, inode_number.key(file.inode)))
        if image is not None and image.now is not None and (file.device, file.inode) != _place(image.now):
            found.append(file)
    return found


def _was_named(file: OpenFile, node: FileNode) -> bool:
    """Whether a file of a dead mount is this node's: once unmounted, it shows its name within the mount only."""
    name = file.name.removesuffix(" (deleted)")
    return name.startswith("/") and node.path.endswith(name)


def _may_be(file: OpenFile, image: Image | None) -> bool:
    return image is None or inode_number.key(file.inode) == image.key


def _wrong_place(node: FileNode, now: Place, image: Image | None) -> str:
    """Say why QEMU must not be moved to where the path leads now, if so."""
    if not now.regular:
        return "the path names no regular file now"
    size = node.size if image is None or image.size is None else image.size
    if now.size != size or -(-now.size // SECTOR) * SECTOR != node.size:
        return f"the file has {now.size} bytes now, the image {size} and QEMU's node {node.size}"
    return ""
