"""What `pivot` sees: the images of all daemons that answer, and what one QEMU has of them. Nothing is changed here."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lazyfs import errors
from lazyfs.control import client as control_client
from lazyfs.core import inode_number
from lazyfs.core.pivot_choice import FileNode, Image, OpenFile, Place
from lazyfs.core.qemu_graph import Graph, Node
from lazyfs.host import mounts, process_files


@dataclass(frozen=True, slots=True)
class Lazyfs:
    """All images of all daemons that answered."""

    images: Mapping[tuple[int, int], Image]
    """By device and key; where their paths lead now is not looked at."""
    devices: Collection[int]
    detached: Collection[int]
    """Those of the devices that are detached from their mountpoints."""
    foreign: Collection[str]
    """The control sockets of daemons that answer as this version of lazyfs does not."""


async def survey() -> Lazyfs:
    """Ask every daemon."""
    commands: list[control_client.Command] = [("query-mount", {}), ("query-images", {})]
    sockets = mounts.control_sockets()
    answers = await asyncio.gather(
        *(control_client.ask(path, commands) for path in sockets), return_exceptions=True
    )
    images: dict[tuple[int, int], Image] = {}
    devices = set()
    detached = set()
    foreign = set()
    for path, answer in zip(sockets, answers, strict=True):
        if isinstance(answer, OSError | errors.UserError):
            continue  # killed, or ending just now, or it hangs
        if isinstance(answer, BaseException):
            raise answer
        try:
            device, found = _read(*answer)
            if answer[0].get("detached", False):
                detached.add(device)
        except (KeyError, TypeError, ValueError, AttributeError):
            foreign.add(path)
        else:
            devices.add(device)
            images |= {(device, image.key): image for image in found}
    return Lazyfs(images, devices, detached, foreign)


def _read(mount: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[int, list[Image]]:
    device, cache = process_files.device_number(mount["device"]), mount["cache_dir"]
    return device, [
        Image(
            row["path"], cache, device, inode_number.key(row["inode"]), row["state"], row.get("file_size", row["size"]),
            row["error"],
            replaced=row.get("replaced", False),
        )
        for row in rows
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class View:
    """What one QEMU has open, and its file nodes with the images that can have to do with them."""

    opened: Sequence[OpenFile]
    nodes: Sequence[FileNode]
    images: Sequence[Image]


async def look(pid: int, graph: Graph, lazyfs: Lazyfs) -> View:
    """Look at process `pid`, a QEMU with these block nodes.

    Raises:
        UserError: it cannot be looked at.
    """
    opened = process_files.open_files(pid)
    # In a thread, as it takes its time where a file system hangs: other QEMUs go on.
    dead = await asyncio.to_thread(process_files.dead_devices, pid, opened, lazyfs.devices)
    opened = [
        replace(
            file, orphan=file.device in dead, plain=_is_plain(file, pid, {*lazyfs.devices, *dead})
        )
        for file in opened
    ]
    found = [
        node
        for node in graph.nodes.values()
        if node.driver == "file" and graph.is_only_read(node.name)
    ]
    nodes = [_file_node(node, pid, lazyfs) for node in found]
    return View(opened, nodes, _images(nodes, opened, lazyfs))


def _is_plain(file: OpenFile, pid: int, lazyfs_devices: Collection[int]) -> bool:
    if file.device in lazyfs_devices:
        return False
    return process_files.mounted_kind(pid, file.fd) not in (None, mounts.FS_TYPE)


def _file_node(node: Node, pid: int, lazyfs: Lazyfs) -> FileNode:
    mount = mounts.mount_of(node.filename) if node.filename.startswith("/") else None
    now, trouble = None, ""
    if mount is not None and process_files.device_number(mount.device) not in lazyfs.devices:
        # Looking there could take for ever.
        trouble = f"the daemon of {mount.mountpoint} does not answer; if it was killed, mount again"
        if mounts.socket_path(mount.mountpoint) in lazyfs.foreign:
            trouble = f"the daemon of {mount.mountpoint} is of another version of lazyfs; use that one's pivot"
    else:
        try:
            now = process_files.place_of(node.filename, pid or None)
        except OSError as error:
            trouble = f"the path leads nowhere now: {error.strerror}"
    on_detached = now is not None and now.device in lazyfs.detached
    return FileNode(
        node.name, node.filename, node.size, now, trouble, mount is not None, on_detached
    )


def _images(nodes: Sequence[FileNode], opened: Sequence[OpenFile], lazyfs: Lazyfs) -> list[Image]:
    """Return the images with such identities or paths: all that this QEMU can have to do with."""
    places = {(file.device, inode_number.key(file.inode)) for file in opened}
    places |= {
        (node.now.device, inode_number.key(node.now.inode))
        for node in nodes
        if node.now is not None
    }
    paths = {node.path for node in nodes}
    return [
        image if image.replaced else replace(image, now=_place_or_none(image.path))
        for place, image in lazyfs.images.items()
        if place in places or image.path in paths
    ]


def _place_or_none(path: str) -> Place | None:
    try:
        return process_files.place_of(path)
    except OSError:
        return None
