"""Holds the names on the mount: folders and images, and the inode numbers the kernel uses for them.

The inode numbers of the root and the folders are derived from their paths. An image is found by its
key in the catalog, whichever of its two inode numbers the kernel uses (`core/inode_number.py`).

A folder lists its entries in the order of their inode numbers. That number is also the position
from which a listing continues. So no entry is skipped or shown twice while others are added and
removed.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lazyfs.core import inode_number
from lazyfs.engine.image.image import Image


@dataclass(eq=False, slots=True)
class Folder:
    """Represents a folder, which is made from a "/" in export names."""

    path: str
    inode: int
    parent: "Folder | None"
    entries: dict[str, "Folder | Image"] = field(default_factory=dict)
    order: list[tuple[int, str]] | None = None
    """The inode and name of each entry, sorted. None when it is out of date."""
    changed_ns: int = 0
    """When a name came or went, in ns since the epoch. 0 means never."""

    def changed(self) -> None:
        """Note that a name has come or gone."""
        self.order = None
        self.changed_ns = time.time_ns()

    @property
    def shown_inode(self) -> int:
        """The inode number that its name leads to, as of an image."""
        return self.inode


Node = Folder | Image


class NameTree:
    """Holds all names, and the images that are open but have lost their name. Trio thread only."""

    def __init__(self) -> None:
        self.root = Folder("", inode_number.ROOT, None)
        self.on_invalid_entry: Callable[[Folder, str], None] = lambda folder, name: None
        """Called when the kernel must ask for this name again. The adapter sets it."""
        self._nodes: dict[int, Node] = {self.root.inode: self.root}
        """All nodes by their inode number. For images it is their key in the catalog."""
        self._by_export: dict[str, Image] = {}

    def node(self, inode: int) -> Node | None:
        """Return what has this inode number.

        An image without a name is also found, as long as somebody has it open.
        """
        return self._nodes.get(inode_number.key(inode))

    def images(self) -> Iterator[Image]:
        """Yield the images that have a name, in no particular order."""
        return iter(list(self._by_export.values()))

    def image_of(self, export: str) -> Image | None:
        """Return the image that shows `export`, or None."""
        return self._by_export.get(export)

    def all_images(self) -> Iterator[Image]:
        """Yield the images with a name and those without."""
        return (node for node in list(self._nodes.values()) if isinstance(node, Image))

    def node_at(self, path: str) -> Node | None:
        """Return what is at `path`, which is relative to the mountpoint, or None."""
        node: Node | None = self.root
        for part in path.split("/") if path else []:
            node = node.entries.get(part) if isinstance(node, Folder) else None
        return node

    def entries_after(self, folder: Folder, position: int) -> Iterator[tuple[int, str, Node]]:
        """Yield (position, name, node) for the entries behind `position`.

        Position 0 starts at the first entry.
        """
        if folder.order is None:
            folder.order = sorted((node.inode, name) for name, node in folder.entries.items())
        order = folder.order
        for inode, name in order[bisect_right(order, (position, "\U0010ffff")) :]:
            node = folder.entries.get(name)
            if node is not None:
                yield inode, name, node

    def images_below(self, node: Node) -> list[Image]:
        """Return the image itself, or all images in the folder and below it."""
        images, pending = [], [node]
        while pending:
            node = pending.pop()
            if isinstance(node, Image):
                images.append(node)
            else:
                pending.extend(node.entries.values())
        return images

    def can_add(self, path: str) -> bool:
        """Return whether `path` is free and none of its folders is the name of an image."""
        node: Node = self.root
        for part in path.split("/"):
            if not isinstance(node, Folder):
                return False
            if (below := node.entries.get(part)) is None:
                return True
            node = below
        return False

    def add(self, image: Image) -> None:
        """Show an image at its path. Folders that are missing are made."""
        *folders, name = image.record.path.split("/")
        folder = self.root
        for part in folders:
            below = folder.entries.get(part)
            if below is None:
                path = f"{folder.path}/{part}".lstrip("/")
                below = Folder(path, inode_number.folder(path), folder)
                self._nodes[below.inode] = below
                folder.entries[part] = below
                folder.changed()
            assert isinstance(below, Folder), f"{image.record.path}: {part} is an image"
            folder = below
        folder.entries[name] = image
        folder.changed()
        self._nodes[image.inode] = image
        self._by_export[image.record.export] = image
        self.on_invalid_entry(folder, name)

    def unname(self, image: Image) -> None:
        """Take an image's name away, and the folders that are empty then.

        The inode still leads to the image.
        """
        *folders, name = image.record.path.split("/")
        folder = self.node_at("/".join(folders))
        assert isinstance(folder, Folder)
        self._by_export.pop(image.record.export, None)
        while True:
            folder.entries.pop(name, None)
            folder.changed()
            self.on_invalid_entry(folder, name)
            if folder.entries or folder.parent is None:
                break
            self._nodes.pop(folder.inode, None)
            name, folder = folder.path.rpartition("/")[2], folder.parent

    def invalidate(self, image: Image) -> None:
        """Let the kernel ask again what is behind the name of an image."""
        folder, _, name = image.record.path.rpartition("/")
        parent = self.node_at(folder)
        assert isinstance(parent, Folder)
        self.on_invalid_entry(parent, name)

    def drop_inode(self, image: Image) -> None:
        """Forget an image that has no name and is not open."""
        self._nodes.pop(image.inode, None)


class TakenNames:
    """Knows which paths are still free while new exports are added."""

    def __init__(self, root: Folder) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()
        pending = [root]
        while pending:
            folder = pending.pop()
            for name, node in folder.entries.items():
                path = f"{folder.path}/{name}".lstrip("/")
                if isinstance(node, Folder):
                    self._folders.add(path)
                    pending.append(node)
                else:
                    self._files.add(path)

    def is_free(self, path: str) -> bool:
        """Return whether `path` is free and none of its folders is the name of a file."""
        return (
            path not in self._files
            and path not in self._folders
            and self._files.isdisjoint(_ancestors(path))
        )

    def take(self, path: str) -> None:
        """Give `path` to a file."""
        self._files.add(path)
        self._folders.update(_ancestors(path))


def _ancestors(path: str) -> Iterator[str]:
    position = path.find("/")
    while position >= 0:
        yield path[:position]
        position = path.find("/", position + 1)
