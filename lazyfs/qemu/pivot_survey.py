"""What `pivot` finds out before it changes anything.

This is the images of all daemons that answer, and which of them one QEMU has open.
"""

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
    """Holds the images of all daemons that answered."""

    images: Mapping[tuple[int, int], Image]
    """The images by device and key. Where their paths lead now has not been looked up."""
    devices: Collection[int]
    detached: Collection[int]
    """Those of the devices that are detached from their mountpoints."""
    foreign: Collection[str]
    """The control sockets of daemons whose answers this version of lazyfs does not understand."""


async def survey() -> Lazyfs:
    """Ask every daemon for its images."""
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
            continue  # The daemon was killed, is ending just now, or hangs.
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
            row["path"], cache, device, inode_number.key(row["inode"]), row["state"],
            row.get("file_size", row["size"]), row["error"],
            replaced=row.get("replaced", False),
        )
        for row in rows
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class View:
    """Holds what one QEMU has open, its file nodes, and the images that can belong to them."""

    opened: Sequence[OpenFile]
    nodes: Sequence[FileNode]
    images: Sequence[Image]


async def look(pid: int, graph: Graph, lazyfs: Lazyfs) -> View:
    """Return what process `pid` has open. It is a QEMU with the block nodes of `graph`.

    Raises:
        UserError: the process cannot be inspected.
    """
    opened = process_files.open_files(pid)
    # This runs in a thread, because it is slow where a file system hangs, and other QEMUs go on.
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
    nodes = await _file_nodes(found, pid, lazyfs)
    return View(opened, nodes, _images(nodes, opened, lazyfs))


def _is_plain(file: OpenFile, pid: int, lazyfs_devices: Collection[int]) -> bool:
    if file.device in lazyfs_devices:
        return False
    return process_files.mounted_kind(pid, file.fd) not in (None, mounts.FS_TYPE)


async def _file_nodes(nodes: Sequence[Node], pid: int, lazyfs: Lazyfs) -> list[FileNode]:
    """Return the nodes, with where their paths lead now.

    The paths are QEMU's, which may be a stranger's: they are looked up elsewhere, with a deadline.
    """
    # This is looked up once, because a stranger's QEMU may have thousands of nodes.
    table = mounts.lazyfs_mounts()
    on = [mounts.mount_of(n.filename, table) if n.filename.startswith("/") else None for n in nodes]
    troubles = [_trouble(mount, lazyfs) for mount in on]
    asked = [node.filename for node, why in zip(nodes, troubles, strict=True) if not why]
    places = iter(await process_files.places_of(asked, pid or None))
    found = []
    for node, mount, trouble in zip(nodes, on, troubles, strict=True):
        now = None
        if not trouble:
            place = next(places)
            if isinstance(place, OSError):
                trouble = f"the path leads nowhere now: {place.strerror}"
            else:
                now = place
        on_detached = now is not None and now.device in lazyfs.detached
        found.append(
            FileNode(
                node.name, node.filename, node.size, now, trouble, mount is not None, on_detached
            )
        )
    return found


def _trouble(mount: mounts.Mount | None, lazyfs: Lazyfs) -> str:
    """Return why a path on this mount must not be looked up, or ""."""
    if mount is None or process_files.device_number(mount.device) in lazyfs.devices:
        return ""
    # Looking at a path of a daemon that does not answer could take for ever.
    if mounts.socket_path(mount.mountpoint) in lazyfs.foreign:
        return (
            f"the daemon of {mount.mountpoint} is of another version of lazyfs; "
            "use that one's pivot"
        )
    return f"the daemon of {mount.mountpoint} does not answer; if it was killed, mount again"


def _images(nodes: Sequence[FileNode], opened: Sequence[OpenFile], lazyfs: Lazyfs) -> list[Image]:
    """Return the images that this QEMU has open or whose paths its nodes name or lead to.

    No other image can have to do with this QEMU.
    """
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
