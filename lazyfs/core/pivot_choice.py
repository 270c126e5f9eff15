"""Chooses which file nodes of a QEMU are to be moved to plain files.

The choice follows from what QEMU has open, and from where the paths lead now. The name of a node
only says where its path leads *now*. Which file QEMU really has open is known by device and inode
alone. An image has two inode numbers on its mount (`inode_number`), and after a detach its path
names a plain file on another device.

    open file             path leads to          image      choice
    mount, key            mount, key             not whole  PARTIAL
    mount, key            mount, key             whole      PARTIAL: the kernel does not know yet
                                                            that the image is whole
    mount, key            mount, key | WHOLE     whole      MOVE
    mount, key | WHOLE    the same               whole      ALREADY
    mount, either number  a plain file           whole      MOVE, if it is the image's
    mount, either number  another lazyfs mount   whole      MOVE, if it has the same cache, and it
                                                            is the image's
    plain file            the same                          ALREADY
    plain file            mount, key | WHOLE     whole      ALREADY, if it is the image's: the plain
                                                            file lies below the mount
    mount, either number  nowhere                           SKIPPED
    anything              a detached mount                  SKIPPED: the path leads through a bind
                                                            mount, or QEMU has its own mount
                                                            namespace
    a dead mount          a plain file, or a     no daemon  MOVE, if it is the image's
                          file on a mount        answers

A path can lead to other bytes of the same name and size: another repository may be mounted there,
or somebody may have put any file there. So a file on another device **is the image's** only if it
has the same size and the same time of change, to the nanosecond. lazyfs gives an image the time
when the catalog first saw it, as its ctime on every mount, and gives the plain file the same time
as its mtime. So one of the times of both files must be the same. (A copy
of the file has that time, too, if it was made with `cp --preserve=timestamps`. Whether the file
lies in the cache directory that the daemon names is not checked: the cache may be below the
mountpoint, and then whatever is at the path lies in it.)

If QEMU also has another file of that name open, which is not the image's, the node is not moved:
nothing shows which node has which descriptor.

The table above shows what follows for a QEMU that has one file open. The decision is made by ROWS:
the first row that applies to a node says what happens to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from lazyfs.core import inode_number

FD_SETS = "/dev/fdset/"
"""The start of the names of descriptors that QEMU was given. Such a name never led to a file."""

SECTOR = 512
"""QEMU rounds the size of a node up to a multiple of this many bytes."""


class Action(StrEnum):
    """Says what is to happen to a node, and later what happened. The values are printed."""

    MOVE = "would pivot"
    """Printed only by a dry run. Otherwise the action becomes one of the next two."""
    PIVOTED = "pivoted"
    FAILED = "failed"
    ALREADY = "already"
    PARTIAL = "partial"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Place:
    """Describes the file to which a path leads."""

    device: int
    inode: int
    size: int
    times_ns: frozenset[int]
    """Its times of change: mtime and ctime."""
    regular: bool


@dataclass(frozen=True, slots=True)
class OpenFile:
    """Describes a file that QEMU has open, by its descriptor."""

    fd: int
    device: int
    inode: int
    size: int
    times_ns: frozenset[int]
    """Its times of change: mtime and ctime."""
    name: str
    """The name that /proc/PID/fd shows. It is used in messages, and for files of a dead mount."""
    orphan: bool = False
    """Whether the file lies on a FUSE mount whose daemon has ended."""
    plain: bool = False
    """Whether the file lies on a mounted file system that is not a lazyfs."""

    def is_at(self, place: Place) -> bool:
        """Return whether this is the very file at `place`."""
        return (self.device, self.inode) == (place.device, place.inode)

    def is_image_at(self, place: Place, image: "Image | None") -> bool:
        """Return whether this is the same image as the file at `place`; see the module's docstring.

        `image` is the image to which that file belongs, or None if it is not known.
        """
        key = inode_number.key(self.inode)
        if self.device == place.device:
            return key == inode_number.key(place.inode)
        same = self.size == place.size and bool(self.times_ns & place.times_ns)
        return same and (image is None or image.key == key)


@dataclass(frozen=True, slots=True)
class Image:
    """Describes an image as its daemon does."""

    path: str
    cache: str
    device: int
    key: int
    state: str
    size: int | None
    error: str | None
    now: Place | None = None
    """Where the image's path leads now, in our own view of the file system."""
    replaced: bool = False
    """Whether another image has the path now, while a reader still has this image open."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """Return what is equal for an image on a detached mount and on the mount that followed it.

        The key is included, as both mounts have one catalog, and so the same keys.
        """
        return self.cache, self.path, self.key


@dataclass(frozen=True, slots=True)
class FileNode:
    """Describes a file node of QEMU's block graph."""

    name: str
    path: str
    size: int
    now: Place | None
    trouble: str
    """The reason why `now` is not known."""
    on_lazyfs: bool
    """Whether the path lies on a mounted lazyfs."""
    on_detached: bool = False
    """Whether the path, in QEMU's view, leads to a lazyfs which is detached in our view."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Says what to do with a node, and why."""

    node: FileNode
    action: Action
    message: str
    stale: tuple[OpenFile, ...] = ()
    """The descriptors that must be closed afterwards."""
    explains: tuple[OpenFile, ...] = ()
    """The descriptors that this choice accounts for."""


def choose(
    nodes: Sequence[FileNode], images: Sequence[Image], opened: Sequence[OpenFile]
) -> tuple[list[Choice], list[OpenFile]]:
    """Return what to do with each node, and the open files that no node accounts for.

    There is a choice for each node that has to do with lazyfs. The files are those of images.
    """
    choices = [
        choice for node in nodes if (choice := _choose(node, nodes, images, opened)) is not None
    ]
    explained = {file.fd for choice in choices for file in choice.explains}
    unexplained = [file for file in _on_old_places(images, opened) if file.fd not in explained]
    # A path can lead nowhere and differ from the image's own path (it is relative, or goes through
    # a symbolic link). Then the open file is found by its size.
    chosen = {choice.node.name for choice in choices}
    lost = [node for node in nodes if node.now is None and not node.path.startswith(FD_SETS)]
    for node in (one for one in lost if one.name not in chosen):
        files = tuple(file for file in unexplained if _sectors(file.size) == _sectors(node.size))
        if files:
            choices.append(Choice(node, Action.SKIPPED, node.trouble, (), files))
            explained |= {file.fd for file in files}
    # An orphan may belong to another FUSE file system than lazyfs.
    orphans = {file.fd for file in unexplained if file.orphan}
    return choices, [file for file in unexplained if file.fd not in explained | orphans]


def _choose(
    node: FileNode, nodes: Sequence[FileNode], images: Sequence[Image], opened: Sequence[OpenFile]
) -> Choice | None:
    case = case_of(node, nodes, images, opened)
    row = next(row for row in ROWS if row.applies(case))
    if row.action is None:
        return None
    stale = case.stale if row.compares else ()
    return Choice(node, row.action, row.message(case), stale, case.explains)


@dataclass(frozen=True, slots=True)
class Case:
    """Holds what is known about a node. The rows decide by it."""

    node: FileNode
    image: Image | None
    """The image to which the path leads now."""
    mine: tuple[OpenFile, ...]
    """The open files that are this image, on whichever mount they were opened."""
    explains: tuple[OpenFile, ...]
    """All open files that may be the node's: `mine`, those of other images that have or had this
    path, and those of dead mounts that have this name."""
    at_path: tuple[OpenFile, ...]
    """The open files that are the file to which the path leads now."""
    below: tuple[OpenFile, ...]
    """The open files that are the image's plain file, over which a lazyfs is mounted now."""
    sharing: int
    """How many nodes have a path that leads to the same file. This node is one of them."""
    rivals: tuple[Image, ...]
    """The other images that the node may have open. There are none if the case is settled."""
    stale: tuple[OpenFile, ...]
    """The open files that must be closed if the node is moved."""

    @property
    def settled(self) -> bool:
        """Return whether each node of this path has the file open to which the path leads.

        Then other open files only have the same name, and do not belong to this node.
        """
        return self.node.now is not None and len(self.at_path) >= self.sharing

    @property
    def now(self) -> Place:
        """Return where the path leads. Only rows below "leads nowhere" may ask."""
        assert self.node.now is not None
        return self.node.now


def case_of(
    node: FileNode, nodes: Sequence[FileNode], images: Sequence[Image], opened: Sequence[OpenFile]
) -> Case:
    """Return what is known about a node of `nodes`."""
    now = node.now
    image = _image_named(node, images)
    of_images = [(file, one) for file in opened if (one := _image_of(file, images)) is not None]
    mine = [file for file, one in of_images if image is not None and one.identity == image.identity]
    others = [
        (file, one)
        for file, one in of_images
        if file not in mine and one.path == (image or node).path
    ]
    orphans = [file for file in opened if file.orphan and _was_named(file, node)]
    at_path = [file for file in opened if now is not None and file.is_at(now)]
    below = [
        file
        for file in opened
        if file.plain and node.on_lazyfs and now is not None and file.is_image_at(now, None)
    ]
    sharing = sum(one.now == now for one in nodes)
    case = Case(
        node=node,
        image=image,
        mine=tuple(mine),
        explains=(*mine, *(file for file, _ in others), *orphans),
        at_path=tuple(at_path),
        below=tuple(below),
        sharing=sharing,
        rivals=tuple(one for _, one in others),
        stale=tuple(file for file in (*mine, *orphans) if now is None or not file.is_at(now)),
    )
    if not case.settled:
        return case
    stale = (file for file in case.stale if file in mine or file.is_image_at(case.now, image))
    return replace(case, rivals=(), stale=tuple(stale))


@dataclass(frozen=True, slots=True)
class Row:
    """Says what happens to the nodes to which it applies, if no row above it does."""

    name: str
    applies: Callable[[Case], bool]
    action: Action | None
    """None means that the node is not mentioned."""
    message: Callable[[Case], str] = lambda case: ""
    compares: bool = False
    """Whether the row compares the open files with the file at the path. Then the choice names the
    files that would have to be closed."""


def _failure(case: Case) -> str:
    assert case.image is not None
    return f"the image failed: {case.image.error}"


def _size_trouble(case: Case) -> str:
    """Return what is wrong with the sizes, or ""."""
    for file in case.stale:
        size = file.size if case.image is None or case.image.size is None else case.image.size
        if case.now.size != size or _sectors(case.now.size) * SECTOR != case.node.size:
            return (
                f"the file has {case.now.size} bytes now, the image {size} "
                f"and QEMU's node {case.node.size}"
            )
    return ""


def _other_version(case: Case) -> str:
    other = case.rivals[0]
    if case.image is None or other.cache != case.image.cache:
        whose = "elsewhere" if case.image is None else f"to one of the cache {case.image.cache}"
        return f"QEMU has the image of the cache {other.cache} open, and the path leads {whose} now"
    return "QEMU has another version of the image open than the path leads to now"


ROWS = (
    Row(
        "has nothing to do with lazyfs",
        lambda case: case.image is None and not case.explains and not case.node.on_lazyfs,
        None,
    ),
    Row(
        "leads nowhere",
        lambda case: case.node.now is None,
        Action.SKIPPED,
        lambda case: case.node.trouble,
    ),
    Row(
        "leads to a file on a lazyfs that is no image",
        lambda case: case.image is None and case.node.on_lazyfs,
        Action.SKIPPED,
        lambda _: "lazyfs does not know this file",
    ),
    Row(
        "has a file open that is no image, and leads to it",
        lambda case: case.image is None and case.settled,
        None,
    ),
    Row(
        "leads to a detached mount",
        lambda case: case.node.on_detached,
        Action.SKIPPED,
        lambda _: (
            "the path leads QEMU to a lazyfs that is detached elsewhere: "
            "through a bind mount, or in a mount namespace; unmount it there"
        ),
    ),
    Row(
        "has only other images of this path open",
        lambda case: bool(case.rivals) and not case.mine,
        Action.SKIPPED,
        _other_version,
    ),
    Row(
        "leads to a failed image",
        lambda case: case.image is not None and case.image.state == "failed",
        Action.SKIPPED,
        _failure,
    ),
    Row(
        "leads to an image that is not whole",
        lambda case: case.image is not None and case.image.state != "whole",
        Action.PARTIAL,
        lambda _: "not whole yet",
    ),
    Row(
        "has the plain file below the mount open",
        lambda case: (
            bool(case.below)
            and not case.explains
            and len(case.at_path) + len(case.below) >= case.sharing
        ),
        Action.ALREADY,
        lambda _: "it has the plain file below the mount open",
    ),
    Row(
        "has no file open that is known",
        lambda case: not case.explains and not case.at_path,
        Action.SKIPPED,
        lambda _: (
            "cannot be checked: the process that made the socket does not have this file open"
        ),
    ),
    Row(
        "leads to a whole image that the kernel does not know to be whole",
        lambda case: (
            case.image is not None
            and case.now.device == case.image.device
            and not inode_number.is_whole(case.now.inode)
        ),
        Action.PARTIAL,
        lambda _: "the path does not lead to the whole image yet",
    ),
    Row(
        "would be moved to what is no regular file",
        lambda case: bool(case.stale) and not case.now.regular,
        Action.SKIPPED,
        lambda _: "the path names no regular file now",
        compares=True,
    ),
    Row(
        "would be moved to a file of another size",
        lambda case: bool(_size_trouble(case)),
        Action.SKIPPED,
        _size_trouble,
        compares=True,
    ),
    Row(
        "may have another image of this path open",
        lambda case: bool(case.rivals),
        Action.SKIPPED,
        _other_version,
        compares=True,
    ),
    Row(
        "would be moved to another file",
        lambda case: not all(file.is_image_at(case.now, case.image) for file in case.stale),
        Action.SKIPPED,
        lambda _: (
            "the path leads to another file than the image that QEMU has open: "
            "their times of change differ "
            "(a copy must keep the time, as with cp --preserve=timestamps)"
        ),
        compares=True,
    ),
    Row(
        "has the image open, but not the file to which the path leads",
        lambda case: bool(case.stale),
        Action.MOVE,
        compares=True,
    ),
    Row("has the file open to which the path leads", lambda case: True, Action.ALREADY),
)
"""Each name says of a node what it has, or where its path leads. The last row applies always."""


def _image_named(node: FileNode, images: Sequence[Image]) -> Image | None:
    """Return the image to which the node's path leads now."""
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
    """Return the image of an open file, whichever mount it was opened on."""
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
    """Return whether a file of a dead mount belongs to this node.

    Once the mount is unmounted, /proc shows the name of such a file relative to the mount only.
    """
    name = file.name.removesuffix(" (deleted)")
    return name.startswith("/") and node.path.endswith(name)
