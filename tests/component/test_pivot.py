"""`pivot` with every shape of block graph in real QEMUs, and with scripted ones for other cases.

There is no mount here. A folder in /dev/shm plays the lazyfs: QEMU has opened files there, through
symbolic links, and a scripted daemon says that they are its images. Then the links become plain
files, as paths do after a detach.
"""

import asyncio
import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import hanging_fuse
import pytest
from block_qemu import (
    BlockQemu,
    blockdevs,
    file_node,
    make_overlay,
    overlay_node,
    raw_node,
    reading,
)
from hanging_fuse import HangingFuse
from scripted_qmp import HangUp, Refuse, ScriptedQemu, ScriptedQmp
from servers import wait_until

from lazyfs import errors
from lazyfs.cli import main as cli
from lazyfs.control import client as control_client
from lazyfs.core import inode_number, qmp_wire
from lazyfs.core.pivot_choice import OpenFile
from lazyfs.host import mounts, process_files
from lazyfs.qemu import monitor as qemu_monitor
from lazyfs.qemu import pivot, pivot_steps

MiB = 1 << 20


class World:
    """Has images that QEMUs have open, and a daemon that knows them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.shm = Path(tempfile.mkdtemp(dir="/dev/shm"))
        stack.callback(shutil.rmtree, self.shm)
        assert os.stat(self.shm).st_dev != os.stat(folder).st_dev
        self.device = os.stat(self.shm).st_dev
        self.rows: dict[str, dict[str, Any]] = {}
        self.bytes: dict[str, bytes] = {}
        self.detached = False
        (folder / "run").mkdir()
        self.daemon = ScriptedQmp(folder / "run" / "lazyfs.sock", self._answer)
        stack.callback(self.daemon.kill)

    def _answer(self, command: str, arguments: dict[str, Any]) -> object:
        if command == "query-mount":
            device = f"{os.major(self.device)}:{os.minor(self.device)}"
            return {"device": device, "cache_dir": "/cache", "detached": self.detached}
        return list(self.rows.values())

    def image(self, name: str, content: bytes | None = None, state: str = "whole") -> Path:
        """Make an image, and return its path, which is a symbolic link at first."""
        self.bytes[name] = os.urandom(1 * MiB) if content is None else content
        old = self.shm / name
        old.write_bytes(self.bytes[name])
        path = self.folder / name
        path.symlink_to(old)
        size = len(self.bytes[name])
        inode = old.stat().st_ino
        self.rows[name] = {
            "path": str(path),
            "inode": inode,
            "state": state,
            "size": size,
            "error": None,
        }
        return path

    def to_plain(self, *names: str) -> None:
        """Let the paths name plain files with the image's time of change, as lazyfs leaves them."""
        for name in names or self.bytes:
            new = self.folder / f"{name}.new"
            new.write_bytes(self.bytes[name])
            os.utime(new, ns=(0, os.stat(self.shm / name).st_mtime_ns))
            new.rename(self.folder / name)

    def to_the_other_side(self, name: str) -> Path:
        """Let the plain file at the path be on a lazyfs, and the path lead to /dev/shm again."""
        path, moved, other = self.folder / name, self.folder / "moved", self.shm / name
        path.rename(moved)
        self.device = moved.stat().st_dev
        self.rows[name]["inode"] = moved.stat().st_ino
        other.write_bytes(self.bytes[name])
        os.utime(other, ns=(0, moved.stat().st_mtime_ns))
        path.symlink_to(other)
        return moved

    def poison(self, *names: str) -> None:
        """Empty the old files, so that a process which still reads them gets zeroes."""
        for name in names or self.bytes:
            os.truncate(self.shm / name, 0)

    def qemu(self, *arguments: str, name: str = "vm") -> BlockQemu:
        made = BlockQemu(self.folder, list(arguments), name)
        self.stack.callback(made.close)
        return made

    def named(self, *, name: str = "vm", cache: dict[str, Any] | None = None) -> BlockQemu:
        """Start a QEMU with an overlay on image `disk`; all nodes have names."""
        options: dict[str, Any] = {"cache": cache} if cache else {}
        disk = self.image("disk") if "disk" not in self.rows else self.folder / "disk"
        overlay = make_overlay(self.folder / f"{name}.qcow2", disk)
        nodes = [file_node("base-file", disk, **options), raw_node("base", "base-file", **options)]
        return self.qemu(*blockdevs(*nodes, overlay_node("vm", overlay, "base")), name=name)

    def pivot(self, *qemus: Any, **options: Any) -> list[pivot.Report]:
        """Pivot, and check that no overlay was written."""
        headers = {
            path: path.read_bytes() for path in self.folder.glob("*.qcow2") if not path.is_symlink()
        }
        reports = pivot.run(
            [str(getattr(one, "socket", one)) for one in qemus], pivot.Options(**options)
        )
        assert {path: path.read_bytes() for path in headers} == headers
        return reports

    def is_moved(self, qemu: BlockQemu) -> bool:
        """Return whether QEMU has no old file open."""
        return os.stat(self.shm).st_dev not in {device for device, _ in qemu.files()}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(mounts, "runtime_dir", lambda: str(tmp_path / "run"))
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def actions(reports: list[pivot.Report]) -> list[str]:
    assert [report.error for report in reports if report.error] == []
    return [node.action for report in reports for node in report.nodes]


def only(reports: list[pivot.Report]) -> pivot.NodeReport:
    (node,) = [node for report in reports for node in report.nodes]
    return node


# -- what is covered


def test_without_a_pivot_a_poisoned_file_is_noticed(world: World) -> None:
    """This shows that the other tests can fail."""
    qemu = world.named()
    world.to_plain()
    assert not world.is_moved(qemu)
    world.poison()
    assert qemu.export("vm").read() != world.bytes["disk"][:4096]


def _names_with_blockdev(world: World, disk: Path, overlay: Path) -> list[str]:
    nodes = (
        file_node("base-file", disk),
        raw_node("base", "base-file"),
        overlay_node("vm", overlay, "base"),
    )
    return blockdevs(*nodes)


def _named_base_only(world: World, disk: Path, overlay: Path) -> list[str]:
    return blockdevs(
        raw_node("base", {"driver": "file", "filename": str(disk)}),
        overlay_node("vm", overlay, "base"),
    )


def _overlay_on_file(world: World, disk: Path, overlay: Path) -> list[str]:
    return blockdevs(file_node("base-file", disk), overlay_node("vm", overlay, "base-file"))


def _inline_raw(world: World, disk: Path, overlay: Path) -> list[str]:
    file = {"driver": "file", "filename": str(disk), "cache": {"direct": True}}
    return blockdevs(
        overlay_node("vm", overlay, {"driver": "raw", "file": file, "read-only": True})
    )


def _no_aio_known(world: World, disk: Path, overlay: Path) -> list[str]:
    return ["-drive", f"file={overlay},if=none,node-name=vm,detect-zeroes=unmap,discard=unmap"]


def _drive_names(options: str) -> Callable[[World, Path, Path], list[str]]:
    return lambda world, disk, overlay: ["-drive", f"file={overlay},if=none,node-name=vm,{options}"]


ALL_NAMES = "file.node-name=vm-file,backing.node-name=base,backing.file.node-name=base-file"


def _libvirt(raw: dict[str, Any]) -> Callable[[World, Path, Path], list[str]]:
    """Return a function that makes nodes as libvirt does: of two, only the upper one is
    read-only."""

    def words(world: World, disk: Path, overlay: Path) -> list[str]:
        storage = {"driver": "file", "auto-read-only": True, "discard": "unmap"}
        return blockdevs(
            {**storage, "filename": str(disk), "node-name": "libvirt-2-storage"},
            {"node-name": "libvirt-2-format", "driver": "raw", "file": "libvirt-2-storage", **raw},
            {**storage, "filename": str(overlay), "node-name": "libvirt-1-storage"},
            {
                "node-name": "vm", "read-only": False, "driver": "qcow2", "file": "libvirt-1-storage",
                "backing": "libvirt-2-format",
            },
        )  # fmt: skip

    return words


def _auto_read_only(world: World, disk: Path, overlay: Path) -> list[str]:
    file = {
        "driver": "file",
        "auto-read-only": True,
        "filename": str(disk),
        "node-name": "base-file",
    }
    return blockdevs(file, overlay_node("vm", overlay, "base-file"))


SHAPES = {
    "as libvirt does": _libvirt({"read-only": True}),
    "as libvirt does, but writable": _libvirt({}),
    "blockdev, auto-read-only, the file itself is the backing": _auto_read_only,
    "blockdev, all named": _names_with_blockdev,
    "blockdev, only the base named": _named_base_only,
    "blockdev, the file itself is the backing": _overlay_on_file,
    "blockdev, raw is inline": _inline_raw,
    "drive, all named": _drive_names(ALL_NAMES),
    "drive, all named, cache=none": _drive_names(f"{ALL_NAMES},cache=none"),
    "drive, all named, cache=none, aio=native": _drive_names(f"{ALL_NAMES},cache=none,aio=native"),
    "drive, only the base named": _drive_names("backing.node-name=base"),
    "drive, only the overlay named": _drive_names("cache=none"),
    "drive, only the overlay named, with discard": _no_aio_known,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_moves_while_it_is_read(world: World, shape: str) -> None:
    disk = world.image("disk")
    overlay = make_overlay(world.folder / "vm.qcow2", disk)
    qemu = world.qemu(*SHAPES[shape](world, disk, overlay))
    world.to_plain()
    before = qemu.node("vm")
    with reading(qemu.export("vm"), world.bytes["disk"]):
        assert actions(world.pivot(qemu)) == ["pivoted"]
        assert world.is_moved(qemu)
        world.poison()
    assert qemu.has_open(disk)
    after = qemu.node("vm")
    assert {key: after[key] for key in ("ro", "cache", "detect_zeroes")} == {
        key: before[key] for key in ("ro", "cache", "detect_zeroes")
    }
    direct = bool(re.search("cache=none|direct", " ".join(SHAPES[shape](world, disk, overlay))))
    nodes = qemu.qmp("query-named-block-nodes", flat=True)
    files = [
        node for node in nodes if node["drv"] == "file" and node["image"]["filename"] == str(disk)
    ]
    assert [(node["ro"], node["cache"]["direct"]) for node in files] == [(True, direct)], (
        "one, as the old one was"
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_in_an_iothread_a_node_that_the_monitor_holds_moves_and_others_are_left(
    world: World, shape: str
) -> None:
    """QEMU 7.2 dies of the others.

    No process reads during the move, because QEMU's NBD server, which is not tested here, dies of a
    drain under load in an I/O thread ("nbd_client_put: Assertion `client->closing' failed").
    """
    disk = world.image("disk")
    overlay = make_overlay(world.folder / "vm.qcow2", disk)
    qemu = world.qemu("-object", "iothread,id=io0", *SHAPES[shape](world, disk, overlay))
    world.to_plain()
    export = qemu.export("vm", iothread="io0", fixed_iothread=True)
    assert export.read() == world.bytes["disk"][:4096]
    node = only(world.pivot(qemu))
    if shape.startswith("as libvirt does") or shape in (
        "blockdev, all named",
        "blockdev, the file itself is the backing",
        "blockdev, auto-read-only, the file itself is the backing",
    ):
        assert node.action == "pivoted"
        assert world.is_moved(qemu)
        world.poison()
        # And again: now the nodes are those that lazyfs made.
        assert export.read(4096) == world.bytes["disk"][4096:8192]
        moved = world.to_the_other_side("disk")
        assert actions(world.pivot(qemu)) == ["pivoted"]
        assert not qemu.has_open(moved)
        os.truncate(moved, 0)
    else:
        assert node.action == "skipped"
        assert "I/O threads" in node.message
        assert not world.is_moved(qemu)
    assert export.read(8192) == world.bytes["disk"][8192:12288]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_moves_again_when_the_path_leads_elsewhere_again(world: World, shape: str) -> None:
    disk = world.image("disk")
    qemu = world.qemu(*SHAPES[shape](world, disk, make_overlay(world.folder / "vm.qcow2", disk)))
    world.to_plain()
    assert actions(world.pivot(qemu)) == ["pivoted"]
    nodes = qemu.nodes()
    moved = world.to_the_other_side("disk")
    assert actions(world.pivot(qemu)) == ["pivoted"]
    assert not qemu.has_open(moved)
    os.truncate(moved, 0)
    assert qemu.export("vm").read() == world.bytes["disk"][:4096]
    assert len(qemu.nodes()) == len(nodes), "nothing is left over"


def test_discard_is_kept_when_the_overlay_is_reopened(world: World) -> None:
    disk = world.image("disk")
    overlay = make_overlay(world.folder / "vm.qcow2", disk)
    qemu = world.qemu("-drive", f"file={overlay},if=none,node-name=vm,discard=unmap")
    handle = qemu.export("vm", writable=True).handle
    handle.pwrite(b"x" * MiB, 0)
    handle.flush()
    used = overlay.stat().st_blocks
    assert used * 512 > MiB
    world.to_plain()
    assert actions(world.pivot(qemu)) == ["pivoted"]
    handle.trim(MiB, 0)
    handle.flush()
    assert overlay.stat().st_blocks < used - MiB // 2 // 512


QCOW2 = {
    "l2-cache-size": 256 * MiB,
    "lazy-refcounts": True,
    "pass-discard-request": False,
    "overlap-check": "all",
}


def _with_drive(overlay: Path, disk: Path) -> list[str]:
    words = ",".join(f"{key}={str(value).lower()}" for key, value in QCOW2.items())
    return ["-drive", f"file={overlay},if=none,node-name=vm,discard=unmap,{words}"]


def _with_blockdev(overlay: Path, disk: Path) -> list[str]:
    base = {"driver": "raw", "file": {"driver": "file", "filename": str(disk)}, "read-only": True}
    return blockdevs(overlay_node("vm", overlay, base, discard="unmap", **QCOW2))


@pytest.mark.parametrize("words", [_with_drive, _with_blockdev])
def test_options_of_the_overlay_are_kept_when_it_is_reopened(
    world: World, words: Callable[[Path, Path], list[str]]
) -> None:
    """Each option shows by its effect: the cache's address space, the dirty bit in the header, and
    blocks that are not freed."""
    disk = world.image("disk")
    overlay = make_overlay(world.folder / "vm.qcow2", disk)
    subprocess.run(
        ["qemu-img", "resize", "-q", overlay, "2T"], check=True, timeout=20
    )  # so a large cache is of use
    qemu = world.qemu(*words(overlay, disk))
    world.to_plain()
    before = qemu.address_space()
    assert actions(world.pivot(qemu)) == ["pivoted"]
    assert qemu.address_space() > before - 64 * MiB, "the default would be 32 MiB, so 224 less"

    handle = qemu.export("vm", writable=True).handle
    handle.pwrite(b"x" * MiB, 0)
    handle.flush()
    used = overlay.stat().st_blocks
    assert overlay.read_bytes()[79] & 1, "lazy-refcounts: the header is marked dirty"
    handle.trim(MiB, 0)
    handle.flush()
    assert overlay.stat().st_blocks >= used - 16, "pass-discard-request=off"


def test_an_encrypted_overlay_stays_readable(world: World) -> None:
    disk = world.image("disk")
    overlay = world.folder / "vm.qcow2"
    secret = ["--object", "secret,id=sec0,data=swordfish"]
    # QEMU measures its key derivation by the thread's CPU time, and gives up when a step seems to
    # take none. That is likely with SHA-256 on a fast host (6 of 10 times here) and rare with the
    # slower SHA-512, so it may try again.
    how = (
        "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.hash-alg=sha512,encrypt.iter-time=200"
    )
    command: list[str | Path] = [
        "qemu-img",
        "create",
        "-q",
        *secret,
        "-f",
        "qcow2",
        "-o",
        how,
        "-b",
        disk,
        "-F",
        "raw",
        overlay,
    ]
    tries = (
        subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        for _ in range(10)
    )
    made = next(one for one in tries if "Unable to get accurate CPU usage" not in one.stderr)
    assert made.returncode == 0, made.stderr
    drive = f"file={overlay},if=none,node-name=vm,encrypt.key-secret=sec0"
    qemu = world.qemu("-object", secret[1], "-drive", drive)
    handle = qemu.export("vm", writable=True).handle
    handle.pwrite(b"x" * 4096, 0)
    handle.flush()
    world.to_plain()
    node = only(world.pivot(qemu))
    assert (node.action, node.message) == ("pivoted", "")
    world.poison()
    handle.pwrite(b"y" * 4096, 4096)
    expected = b"x" * 4096 + b"y" * 4096 + world.bytes["disk"][8192:]
    assert handle.pread(MiB, 0) == expected


def test_several_disks_and_several_overlays_on_one_base(world: World) -> None:
    one, two = world.image("one"), world.image("two")
    overlays = [make_overlay(world.folder / f"{n}.qcow2", one) for n in "abc"]
    other = make_overlay(world.folder / "d.qcow2", two)
    nodes = [file_node("one-file", one), raw_node("one", "one-file")]
    nodes += [overlay_node(path.stem, path, "one") for path in overlays[:2]]
    nodes += [overlay_node("c", overlays[2], "one-file")]
    qemu = world.qemu(*blockdevs(*nodes), "-drive", f"file={other},if=none,node-name=d")
    world.to_plain()
    disks = [qemu.export(name) for name in "abcd"]
    assert actions(world.pivot(qemu)) == ["pivoted", "pivoted"]
    assert world.is_moved(qemu)
    world.poison()
    for disk, image in zip(disks, ["one", "one", "one", "two"], strict=True):
        assert disk.read() == world.bytes[image][:4096]


@pytest.mark.parametrize(
    "names",
    [
        "node-name=vm",
        "backing.node-name=mid",
        "backing.backing.node-name=base",
        "node-name=vm,backing.node-name=mid",
    ],
)
def test_a_chain_of_three_with_any_of_its_nodes_named(world: World, names: str) -> None:
    disk = world.image("disk")
    middle = make_overlay(world.folder / "middle.qcow2", disk)
    top = make_overlay(world.folder / "top.qcow2", middle, "qcow2")
    qemu = world.qemu("-drive", f"file={top},if=none,{names}")
    world.to_plain()
    with reading(qemu.export(qemu.top()), world.bytes["disk"]):
        assert actions(world.pivot(qemu)) == ["pivoted"]
        assert world.is_moved(qemu)
        world.poison()
    assert {
        (path.stat().st_dev, path.stat().st_ino) for path in (disk, middle, top)
    } <= qemu.files()


def test_two_images_in_one_chain_with_only_the_top_named(world: World) -> None:
    disk = world.image("disk")
    middle = make_overlay(world.folder / "made.qcow2", disk)
    content = middle.read_bytes()
    middle.unlink()
    middle = world.image("made.qcow2", content)
    top = make_overlay(world.folder / "top.qcow2", middle, "qcow2")
    qemu = world.qemu("-drive", f"file={top},if=none,node-name=vm")
    world.to_plain()
    with reading(qemu.export("vm"), world.bytes["disk"]):
        assert actions(world.pivot(qemu)) == ["pivoted", "pivoted"]
        assert world.is_moved(qemu)
        world.poison()


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "with a backing file"])
def test_an_image_that_is_itself_qcow2(world: World, backing: bool) -> None:
    plain = world.folder / "plain"
    plain.write_bytes(os.urandom(MiB))
    made = world.folder / "made"
    if backing:
        make_overlay(made, plain)
    else:
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", plain, made], check=True, timeout=20)
    image = world.image("image.qcow2", made.read_bytes())
    overlay = make_overlay(world.folder / "vm.qcow2", image, "qcow2")
    base = {"driver": "qcow2", "node-name": "base", "file": "base-file", "read-only": True}
    qemu = world.qemu(
        *blockdevs(file_node("base-file", image), base, overlay_node("vm", overlay, "base"))
    )
    world.to_plain()
    with reading(qemu.export("vm"), plain.read_bytes()):
        assert actions(world.pivot(qemu)) == ["pivoted"]
        world.poison()
    assert world.is_moved(qemu)


def test_automatic_names_are_refused_with_a_command_line_that_works(world: World) -> None:
    disk = world.image("disk")
    overlay = make_overlay(world.folder / "vm.qcow2", disk)
    qemu = world.qemu("-drive", f"file={overlay},if=virtio,cache=none")
    world.to_plain()
    node = only(world.pivot(qemu))
    assert node.action == "skipped"
    assert "automatic names" in node.message
    assert "--allow-hmp" in node.message
    assert not world.is_moved(qemu)
    advised = re.search(r"-drive \S+", node.message)
    assert advised is not None
    qemu.close()
    (world.folder / "disk").unlink()
    (world.folder / "disk").symlink_to(world.shm / "disk")
    again = world.qemu(*shlex.split(f"{advised[0]},if=virtio"), name="again")
    world.to_plain()
    assert actions(world.pivot(again)) == ["pivoted"]
    assert world.is_moved(again)


def test_links_to_sockets_in_a_folder_are_left_out(world: World) -> None:
    """Who can write there could lead root to any socket."""
    qemu = world.named()
    folder = world.folder / "sockets"
    folder.mkdir()
    (folder / "link").symlink_to(qemu.socket)
    assert pivot.sockets([], str(folder)) == []
    assert pivot.sockets([str(folder / "link")], None) == [str(folder / "link")], "it is named"


def test_nobody_waits_for_an_image_whose_node_cannot_be_moved(world: World) -> None:
    disk = world.image("disk")
    overlay = make_overlay(world.folder / "vm.qcow2", disk)
    qemu = world.qemu("-drive", f"file={overlay},if=virtio,cache=none")
    world.rows["disk"]["state"] = "partial"

    def wait(filling: pivot.Filling) -> None:
        raise AssertionError("it waits")

    (report,) = pivot.run([str(qemu.socket)], pivot.Options(), wait=wait)
    assert actions([report]) == ["skipped"]
    assert "automatic names" in report.nodes[0].message
    (report,) = pivot.run([str(qemu.socket)], pivot.Options(allow_hmp=True))
    assert actions([report]) == ["partial"], "then it is worth waiting"


def test_the_temporary_overlay_of_a_snapshot_is_not_in_the_command_line_to_use(
    world: World,
) -> None:
    """The overlay's name is json, of a file that is deleted.

    So the names go to the node below it.
    """
    disk = world.image("disk")
    overlay = make_overlay(world.folder / "vm.qcow2", disk)
    qemu = world.qemu("-drive", f"file={overlay},if=virtio,snapshot=on")
    world.to_plain()
    node = only(world.pivot(qemu))
    advised = re.search(r"-drive \S+", node.message)
    assert advised is not None
    assert advised[0].startswith(f"-drive file={overlay},")
    qemu.close()
    (world.folder / "disk").unlink()
    (world.folder / "disk").symlink_to(world.shm / "disk")
    again = world.qemu(*shlex.split(f"{advised[0]},if=virtio,snapshot=on"), name="again")
    world.to_plain()
    assert actions(world.pivot(again)) == ["pivoted"]
    assert world.is_moved(again)


def test_automatic_names_move_with_the_debugging_command(world: World) -> None:
    disk = world.image("disk")
    overlay = make_overlay(world.folder / "vm.qcow2", disk)
    qemu = world.qemu("-drive", f"file={overlay},if=none,cache=none")
    world.to_plain()
    with reading(qemu.export(qemu.top()), world.bytes["disk"]):
        assert actions(world.pivot(qemu, allow_hmp=True)) == ["pivoted"]
        assert world.is_moved(qemu)
        world.poison()


def test_what_a_killed_pivot_left_is_removed(world: World) -> None:
    qemu = world.named()
    nodes = len(qemu.nodes())
    qemu.qmp("blockdev-add", **file_node("lazyfs-7", world.folder / "disk"))
    world.to_plain()
    assert actions(world.pivot(qemu)) == ["pivoted", "pivoted"]
    assert world.is_moved(qemu)
    assert "lazyfs-7" not in qemu.nodes()
    assert len(qemu.nodes()) == nodes


def test_dry_run_says_what_and_does_nothing(world: World) -> None:
    qemu = world.named()
    world.to_plain()
    nodes = qemu.nodes()
    assert actions(world.pivot(qemu, dry_run=True)) == ["would pivot"]
    assert qemu.nodes() == nodes
    assert not world.is_moved(qemu)


def test_dry_run_only_asks(world: World) -> None:
    qemu = scripted(world)
    qemu.iothreads = 1
    node = only(world.pivot(qemu.server.path, dry_run=True))
    assert (node.action, "I/O threads" in node.message) == ("skipped", True)
    assert {name for name, _ in qemu.server.commands} <= {
        "query-named-block-nodes",
        "x-debug-query-block-graph",
        "query-iothreads",
    }


# -- what is refused


def _refusals(world: World, disk: Path, overlay: Path) -> dict[str, tuple[list[str], str]]:
    part = raw_node("base", "base-file", offset=0, size=MiB // 2)
    throttle = {
        "driver": "throttle",
        "node-name": "slow",
        "throttle-group": "group",
        "file": "base-file",
    }
    return {
        "part": (blockdevs(file_node("base-file", disk), part), "a part of the file only"),
        "throttle": (
            [
                "-object",
                "throttle-group,id=group",
                *blockdevs(file_node("base-file", disk), throttle),
            ],
            "the throttle node slow above it cannot be reopened",
        ),
        "device": (["-drive", f"file={disk},if=none,id=cd,format=file,readonly=on"], "uses node"),
        "unused": (blockdevs(file_node("base-file", disk)), "nothing uses node base-file"),
    }


@pytest.mark.parametrize("case", ["part", "throttle", "device", "unused"])
def test_what_cannot_be_moved_is_left_alone_with_a_reason(world: World, case: str) -> None:
    disk = world.image("disk")
    arguments, reason = _refusals(world, disk, world.folder)[case]
    qemu = world.qemu(*arguments)
    world.to_plain()
    nodes = qemu.nodes()
    node = only(world.pivot(qemu))
    assert node.action == "skipped"
    assert reason in node.message
    assert qemu.nodes() == nodes


def test_only_a_whole_file_of_the_same_size_is_moved_to(world: World) -> None:
    qemu = world.named()
    disk = world.folder / "disk"
    world.to_plain()
    with disk.open("ab") as file:
        file.write(bytes(512))
    assert "the file has 1049088 bytes now, the image 1048576" in only(world.pivot(qemu)).message
    disk.unlink()
    assert "the path leads nowhere now" in only(world.pivot(qemu)).message
    disk.mkdir()
    assert "no regular file" in only(world.pivot(qemu)).message
    disk.rmdir()
    world.to_plain()
    for state, error, action, message in (
        ("partial", None, "partial", "not whole yet"),
        ("remote", None, "partial", "not whole yet"),
        ("failed", "it changed", "skipped", "the image failed: it changed"),
    ):
        world.rows["disk"].update(state=state, error=error)
        node = only(world.pivot(qemu))
        assert (node.action, node.message) == (action, message)
    assert not world.is_moved(qemu)


@pytest.mark.parametrize("how", ["relative", "symbolic link"])
def test_a_path_that_is_not_the_images_own_and_leads_nowhere_is_no_success(
    world: World, how: str
) -> None:
    disk = world.image("disk")
    link = world.folder / "link"
    link.symlink_to(disk)
    path = Path(os.path.relpath(disk)) if how == "relative" else link
    qemu = world.qemu(*blockdevs(file_node("base-file", path), raw_node("base", "base-file")))
    disk.unlink()
    (report,) = world.pivot(qemu)
    (node,) = report.nodes
    assert (node.node, node.action) == ("base-file", "skipped")
    assert node.message == "the path leads nowhere now: No such file or directory"
    assert not report.good


def test_a_lazyfs_that_is_detached_elsewhere_is_not_moved_to(world: World) -> None:
    """The path still leads there: through a bind mount, or in QEMU's own mount namespace."""
    world.detached = True
    qemu = world.named()
    node = only(world.pivot(qemu))
    assert (node.action, "a lazyfs that is detached elsewhere" in node.message) == ("skipped", True)


def test_another_file_of_the_same_size_is_not_moved_to(world: World) -> None:
    qemu = world.named()
    world.to_plain()
    disk = world.folder / "disk"
    there = disk.stat()
    disk.write_bytes(os.urandom(MiB))
    os.utime(disk, ns=(0, there.st_mtime_ns + 1))
    node = only(world.pivot(qemu))
    assert (node.action, "their times of change differ" in node.message) == ("skipped", True)
    assert not world.is_moved(qemu)
    os.utime(disk, ns=(0, there.st_mtime_ns))
    assert actions(world.pivot(qemu)) == ["pivoted"], "the control: it is the time that tells"


def test_another_version_of_the_image_is_not_moved_to(world: World) -> None:
    """The path leads to a newer image of the same mount (`--on-change replace`)."""
    qemu = world.named()
    newer = world.shm / "newer"
    newer.write_bytes(world.bytes["disk"])
    disk = world.folder / "disk"
    disk.unlink()
    disk.symlink_to(newer)
    world.rows["disk"]["inode"] = newer.stat().st_ino
    node = only(world.pivot(qemu))
    assert node.action == "skipped"
    assert "does not have this file open" in node.message


def test_what_is_not_on_a_lazyfs_is_not_touched(world: World) -> None:
    disk = world.folder / "plain"
    disk.write_bytes(bytes(MiB))
    qemu = world.qemu(*blockdevs(file_node("base-file", disk), raw_node("base", "base-file")))
    replaced = world.folder / "new"
    replaced.write_bytes(bytes(MiB))
    replaced.rename(disk)
    (report,) = world.pivot(qemu)
    assert report == pivot.Report(str(qemu.socket), qemu.pid)
    assert report.good
    assert "nothing to do" in report.lines()[0]


def test_a_file_that_was_given_as_a_descriptor_is_reported(world: World) -> None:
    disk = world.image("disk")
    with disk.open("rb") as file:
        os.set_inheritable(file.fileno(), True)
        qemu = world.qemu()
    # A descriptor that QEMU has, and no node: passed over the socket.
    with disk.open("rb") as file:
        qemu._connection.setblocking(True)
        socket.send_fds(qemu._connection, [b" "], [file.fileno()])
        qemu.qmp("add-fd", fdset_id=1)
    qemu.qmp("blockdev-add", **file_node("base-file", Path("/dev/fdset/1")))
    world.to_plain()
    (report,) = world.pivot(qemu)
    assert {node.action for node in report.nodes} == {"skipped"}
    assert "no block node names it" in report.nodes[0].message


# -- what fails


def scripted(world: World) -> ScriptedQemu:
    disk = world.image("disk")
    made = ScriptedQemu(world.folder / "vm.qmp", disk, world.shm / "disk", MiB)
    world.stack.callback(made.close)
    world.to_plain()
    return made


CHANGING = ["blockdev-add", "blockdev-reopen", "blockdev-del"]


def refuse() -> None:
    raise Refuse("no such luck")


def hang_up() -> None:
    raise HangUp


def test_a_scripted_qemu_is_moved_as_a_real_one(world: World) -> None:
    qemu = scripted(world)
    assert actions(world.pivot(qemu.server.path)) == ["pivoted"]
    assert (qemu.child, list(qemu.fds)) == ("lazyfs-1", ["lazyfs-1"])


@pytest.mark.parametrize("step", CHANGING)
def test_a_step_that_fails_is_named_and_those_before_it_undone(world: World, step: str) -> None:
    qemu = scripted(world)

    def once() -> None:
        del qemu.fails[step]
        refuse()

    qemu.fails, qemu.failure = {step: 0}, once
    (report,) = world.pivot(qemu.server.path)
    (node,) = report.nodes
    assert (node.action, node.message) == ("failed", f"{step}: no such luck; the VM is as it was")
    assert (qemu.child, list(qemu.fds)) == ("base-file", ["base-file"])
    assert not report.good


def test_undoing_that_fails_is_said(world: World) -> None:
    qemu = scripted(world)
    qemu.fails, qemu.failure = {"blockdev-del": 0}, refuse
    node = only(world.pivot(qemu.server.path))
    assert (
        node.message == "blockdev-del: no such luck; undoing it failed: blockdev-del: no such luck"
    )


def test_a_qemu_that_ends_while_a_failed_step_is_undone_says_both(world: World) -> None:
    qemu = scripted(world)

    def once() -> None:
        qemu.fails, qemu.failure = {"blockdev-del": 0}, hang_up
        refuse()

    qemu.fails, qemu.failure = {"blockdev-reopen": 0}, once
    (report,) = world.pivot(qemu.server.path)
    said = (
        "blockdev-reopen: no such luck; undoing it failed: blockdev-del: QEMU hung up, or has ended"
    )
    assert ([node.message for node in report.nodes], report.error) == ([said], said)


@pytest.mark.parametrize("look", [2, 3], ids=["before the first step", "after it"])
def test_a_process_that_cannot_be_looked_at_any_more_is_undone(
    world: World, look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That happens when another process gets the pid, or when the right to inspect it is lost."""
    qemu = scripted(world)
    looks = 0
    really = process_files.open_files

    def open_files(pid: int) -> list[OpenFile]:
        nonlocal looks
        looks += 1
        if looks == look:
            raise errors.UserError(f"process {pid} has ended")
        return really(pid)

    monkeypatch.setattr(process_files, "open_files", open_files)
    node = only(world.pivot(qemu.server.path))
    assert (node.action, node.message) == (
        "failed",
        f"process {os.getpid()} has ended; the VM is as it was",
    )
    assert (qemu.child, list(qemu.fds)) == ("base-file", ["base-file"])


def test_a_bug_in_one_pivot_does_not_stop_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = scripted(world)
    two = world.image("two")
    other = world.qemu(
        "-drive",
        f"file={make_overlay(world.folder / 'two.ov', two)},if=none,node-name=vm",
        name="two",
    )
    world.to_plain("two")
    really = pivot_steps.Steps._remove

    async def remove(self: pivot_steps.Steps, name: str) -> None:
        if name == "base-file":
            raise KeyError("surprise")
        await really(self, name)

    monkeypatch.setattr(pivot_steps.Steps, "_remove", remove)
    reports = world.pivot(qemu.server.path, other)
    assert reports[0].error == "the pivot failed, a bug in lazyfs: KeyError('surprise')"
    assert [node.action for node in reports[0].nodes] == ["failed"]
    assert reports[1].good


@pytest.mark.parametrize("surprise", [KeyError("surprise"), asyncio.CancelledError()])
def test_any_failure_undoes_the_steps(
    world: World, surprise: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = scripted(world)

    async def remove(self: pivot_steps.Steps, name: str) -> None:
        raise surprise

    monkeypatch.setattr(pivot_steps.Steps, "_remove", remove)
    if isinstance(surprise, Exception):
        (report,) = world.pivot(qemu.server.path)
        assert [node.message for node in report.nodes] == ["'surprise'; the VM is as it was"]
    else:
        with pytest.raises(asyncio.CancelledError):
            world.pivot(qemu.server.path)
    assert (qemu.child, list(qemu.fds)) == ("base-file", ["base-file"])


@pytest.mark.parametrize(
    "step", [*CHANGING, "query-named-block-nodes", "x-debug-query-block-graph"]
)
def test_a_qemu_that_ends_at_any_step_is_one_line(world: World, step: str) -> None:
    qemu = scripted(world)
    qemu.fails, qemu.failure = {step: 0}, hang_up
    two = world.image("two")
    other = world.qemu(
        "-drive",
        f"file={make_overlay(world.folder / 'two.ov', two)},if=none,node-name=vm",
        name="two",
    )
    world.to_plain("two")
    reports = world.pivot(qemu.server.path, other)
    assert reports[0].error == f"{step}: QEMU hung up, or has ended"
    assert [node.action for node in reports[0].nodes] == (["failed"] if step in CHANGING else [])
    assert all(line.count("\n") == 0 for line in reports[0].complaints())
    assert reports[1].good, "the others go on"


@pytest.mark.parametrize("step", [*CHANGING, "query-named-block-nodes"])
def test_a_step_without_an_answer_times_out(
    world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_monitor, "COMMAND_S", 0.2)
    qemu = scripted(world)
    ends, _stays = socket.socketpair()
    world.stack.callback(_stays.close)
    world.stack.callback(ends.close)
    world.stack.callback(_stays.shutdown, socket.SHUT_RDWR)

    def hang_up_late() -> None:
        ends.recv(1)
        hang_up()

    qemu.fails, qemu.failure = {step: 0}, hang_up_late
    (report,) = world.pivot(qemu.server.path)
    assert report.error == f"{step}: no answer in 0.2 s; run pivot again when QEMU answers"


def test_a_new_node_on_an_unexpected_file_is_undone(world: World) -> None:
    qemu = scripted(world)
    qemu.opens = world.shm / "disk"
    node = only(world.pivot(qemu.server.path))
    assert node.message.startswith("check of the new node: QEMU has opened another file")
    assert node.message.endswith("the VM is as it was")
    assert list(qemu.fds) == ["base-file"]


def test_an_old_file_that_stays_open_is_a_failure(world: World) -> None:
    qemu = scripted(world)
    qemu.keeps_files = True
    (report,) = world.pivot(qemu.server.path)
    assert [node.action for node in report.nodes] == ["failed"]
    assert "the old file is still open" in report.nodes[0].message


def test_a_socket_that_somebody_else_made_cannot_be_checked(world: World) -> None:
    """libvirt does so. Then the process that the kernel names is not the one that has the files."""
    qemu = scripted(world)
    os.close(qemu.fds["base-file"])
    qemu.fds["base-file"] = os.open(os.devnull, os.O_RDONLY)
    node = only(world.pivot(qemu.server.path))
    assert node.action == "skipped"
    assert (
        "cannot be checked: the process that made the socket does not have this file open"
        in node.message
    )
    assert not any(command in CHANGING for command, _ in qemu.server.commands)


def test_an_interrupt_lets_the_node_end_first(world: World) -> None:
    qemu = scripted(world)
    main: list[asyncio.Task[Any]] = []

    def interrupt() -> None:
        del qemu.fails["blockdev-reopen"]
        main[0].get_loop().call_soon_threadsafe(main[0].cancel)

    qemu.fails, qemu.failure = {"blockdev-reopen": 0}, interrupt

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        main.append(task)
        await pivot._run([str(qemu.server.path)], pivot.Options())

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert (qemu.child, list(qemu.fds)) == ("lazyfs-1", ["lazyfs-1"])


def _is_cancelled(task: "asyncio.Task[Any]", times: int) -> bool:
    return task.cancelling() >= times


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A shell lets its background jobs ignore SIGINT, and the tests may run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("fails", [False, True])
def test_a_second_interrupt_lets_the_node_end_first(
    world: World, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio.run handles the first Ctrl-C; it raises KeyboardInterrupt at the second one."""
    qemu = scripted(world)
    main: list[asyncio.Task[Any]] = []
    really = pivot._run

    async def run(*arguments: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        main.append(task)
        return await really(*arguments)

    def interrupt_twice() -> None:
        del qemu.fails["blockdev-reopen"]
        for number in (1, 2):
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(partial(_is_cancelled, main[0], number), "it is handled", 5)
        if fails:
            raise Refuse("no")

    monkeypatch.setattr(pivot, "_run", run)
    qemu.fails, qemu.failure = {"blockdev-reopen": 0}, interrupt_twice
    with pytest.raises(KeyboardInterrupt):
        world.pivot(qemu.server.path)
    name = "base-file" if fails else "lazyfs-1"
    assert (qemu.child, list(qemu.fds)) == (name, [name])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_ignored_stays_ignored(world: World) -> None:
    """A shell ignores interrupts in a script's background processes."""
    qemu = scripted(world)
    qemu.fails["query-named-block-nodes"] = 0

    def interrupt() -> None:
        del qemu.fails["query-named-block-nodes"]
        os.kill(os.getpid(), signal.SIGINT)

    qemu.failure = interrupt
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (report,) = world.pivot(qemu.server.path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert report.good


def test_sockets_without_a_qemu_are_one_line_each(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_monitor, "CONNECT_S", 0.2)
    folder = world.folder
    (folder / "file").write_text("no socket")
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(folder / "gone"))
    silent = ScriptedQmp(folder / "silent", lambda command, arguments: {}, greets=False)
    world.stack.callback(silent.kill)
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as waiting:
        full.bind(str(folder / "full"))
        full.listen(0)
        waiting.connect(str(folder / "full"))
        said = {
            os.path.basename(report.socket): report.error
            for report in world.pivot(
                *(folder / name for name in ("file", "gone", "none", "silent", "full"))
            )
        }
    assert said == {
        "file": "this is not a socket",
        "gone": "nobody listens: its QEMU has ended",
        "none": "No such file or directory",
        "silent": "no QMP greeting in 0.2 s: this is not a QEMU, or it hangs, or another client is connected",
        "full": "other clients wait for this QEMU already",
    }


def test_a_qmp_server_that_is_no_qemu_is_one_line(world: World) -> None:
    (report,) = world.pivot(world.daemon.path)
    assert "in a way that lazyfs does not know" in report.error


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "this is not a QMP server: its greeting is not QMP's"),
        (b"[1,2]\n", "this is not a QMP server: its greeting is not QMP's"),
        (b"\xff\xfe\n", "this is not a QMP server: its greeting is not QMP's"),
        (b"x" * MiB, "this is not a QMP server: its greeting is not QMP's"),
        (b"", "this is not a QMP server: it hung up"),
        (
            b'{"QMP": {"version": {"qemu": {}, "package": "lazyfs"}, "capabilities": []}}\n',
            "this is lazyfs's own control socket; name the QMP sockets of QEMUs",
        ),
    ],
    ids=["ssh", "list", "bytes", "long", "none", "lazyfs"],
)
def test_a_server_that_is_no_qemu_is_one_line(
    world: World, greeting: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_monitor, "MAX_ANSWER", MiB // 2)
    path = world.folder / "a\nb\x1b[31m\u00e9"

    def greet() -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.sendall(greeting)
            if b"QMP" in greeting:
                connection.recv(4096)
                connection.sendall(b'{"return": {}}\n')
                connection.recv(4096)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        server = threading.Thread(target=greet)
        server.start()
        (report,) = world.pivot(path)
        server.join(20)
    assert (report.error, report.qemu) == (reason, False)
    assert report.complaints() == [f"{world.folder}/a\\nb\\x1b[31m\u00e9: {reason}"]


def test_what_is_no_qemu_is_a_failure_only_where_it_was_named(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.folder / "sockets"
    folder.mkdir()
    assert cli.main(["pivot", "--all-in", str(folder)]) == 0
    assert capsys.readouterr().err == f"lazyfs: there is no socket in '{folder}'\n"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(folder / "gone"))
    said = f"lazyfs: {folder}/gone: nobody listens: its QEMU has ended\n"
    assert cli.main(["pivot", "--all-in", str(folder)]) == 0
    assert capsys.readouterr().err == said
    assert cli.main(["pivot", "--all-in", str(folder), str(folder / "gone")]) == 1
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [[""], ["--all-in", ""]])
def test_an_empty_name_is_said(
    world: World, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pivot", *words]) == 2
    assert capsys.readouterr().err.startswith("lazyfs: an empty name: ")


def test_a_daemon_that_hangs_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_client, "TIMEOUT_S", 0.2)
    silent = ScriptedQmp(
        world.folder / "run" / "silent.sock", lambda command, arguments: {}, greets=False
    )
    world.stack.callback(silent.kill)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(world.folder / "run" / "gone.sock"))
    qemu = world.named()
    world.to_plain()
    assert actions(world.pivot(qemu)) == ["pivoted"]


@pytest.mark.parametrize("answer", [{}, [], None, {"device": "x", "cache_dir": "/"}])
def test_a_daemon_of_another_version_is_said(
    world: World, answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = ScriptedQmp(world.folder / "run" / "strange.sock", lambda command, arguments: answer)
    world.stack.callback(strange.kill)
    qemu = world.named()
    world.to_plain()
    assert actions(world.pivot(qemu)) == ["pivoted"], "it is no trouble of others"
    here = mounts.Mount(str(world.folder), "nbd://host", "0:99999")
    monkeypatch.setattr(mounts, "mount_of", lambda path, among=None: here)
    monkeypatch.setattr(mounts, "socket_path", lambda mountpoint: str(strange.path))
    node = only(world.pivot(qemu))
    assert (node.action, "another version of lazyfs" in node.message) == ("skipped", True)


def test_wait_goes_on_while_the_path_does_not_lead_to_the_whole_image(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon has the whole image, but the kernel still gives out the inode that the daemon
    serves."""
    qemu = world.named()
    disk = world.folder / "disk"
    plain = disk.readlink()
    here = mounts.Mount(
        str(world.folder), "nbd://host", f"{os.major(world.device)}:{os.minor(world.device)}"
    )
    monkeypatch.setattr(mounts, "mount_of", lambda path, among=None: here)
    monkeypatch.setattr(
        control_client, "query", lambda mount, path: {"images": [world.rows["disk"]]}
    )
    monkeypatch.setattr(
        inode_number, "key", lambda inode: world.rows["disk"]["inode"]
    )  # of both files
    monkeypatch.setattr(inode_number, "is_whole", lambda inode: inode != plain.stat().st_ino)
    assert actions(world.pivot(qemu)) == ["partial"]
    assert "the path does not lead to the whole image yet" in only(world.pivot(qemu)).message

    def wait(filling: pivot.Filling) -> None:
        (answer,) = filling()
        assert [image["state"] for image in answer["images"]] == ["whole"]
        whole = world.shm / "whole"
        shutil.copy2(plain, whole)
        disk.unlink()
        disk.symlink_to(whole)
        assert [answer["images"] for answer in filling()] == [[]]

    told: list[pivot.Report] = []
    (report,) = pivot.run([str(qemu.socket)], pivot.Options(), wait=wait, tell=told.append)
    assert actions([report]) == ["pivoted"]
    assert told == [report]
    world.poison()
    assert qemu.export("vm").read() == world.bytes["disk"][:4096]


# -- a file system that hangs


@pytest.fixture
def hanging(world: World) -> HangingFuse:
    """The type of its file system says that it is not a lazyfs."""
    if os.geteuid() != 0:
        pytest.skip("mounts")
    (world.folder / "hanging").mkdir()
    made = HangingFuse(world.folder / "hanging", "fuse.other")
    world.stack.callback(made.close)
    return made


def pivot_as_a_user(qemu: ScriptedQemu) -> str:
    """Run `lazyfs pivot` in a process of its own, because the process must be able to end, too."""
    command = [sys.executable, "-m", "lazyfs", "pivot", str(qemu.server.path)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def test_a_monitor_that_floods_costs_no_memory(tmp_path: Path) -> None:
    """Events that nobody reads are not kept, and an answer has a limit."""
    event = qmp_wire.encode(qmp_wire.event("SPAM", {"x": "y" * 100}, 0))

    async def look() -> tuple[int, str]:
        async with qemu_monitor.connected(str(tmp_path / "qmp")) as (monitor, _):
            assert await monitor.execute("quick", {}) == {"done": True}
            kept = monitor._client.events._queue.qsize()
            try:
                await monitor.execute("huge", {})
            except errors.UserError as error:
                return kept, str(error)
        return kept, ""

    def answer(command: str, _arguments: dict[str, Any]) -> object:
        if command == "huge":
            return "x" * (qemu_monitor.MAX_ANSWER + 1)
        server._connections[-1].sendall(event * 10_000)
        return {"done": True}

    server = ScriptedQmp(tmp_path / "qmp", answer)
    try:
        kept, said = asyncio.run(look())
    finally:
        server.kill()
    assert kept == 0
    assert "huge" in said


@pytest.mark.parametrize("answer", [b'{"return": ' + b"[" * 200_000, b'{"return": 1' + b"0" * 5000])
def test_an_answer_that_python_cannot_read(tmp_path: Path, answer: bytes) -> None:
    async def look() -> None:
        async with qemu_monitor.connected(str(tmp_path / "qmp")) as (monitor, _):
            with pytest.raises(qemu_monitor.Lost):
                await monitor.execute("quick", {})

    def send(_command: str, _arguments: dict[str, Any]) -> object:
        server._connections[-1].sendall(answer + b"}\r\n")
        return {}

    server = ScriptedQmp(tmp_path / "qmp", send)
    try:
        asyncio.run(look())
    finally:
        server.kill()


@pytest.mark.fuse
def test_paths_on_a_file_system_that_hangs_are_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A monitor can name any path. Those of other QEMUs are looked up all the same."""
    (world.folder / "hanging").mkdir()
    hanging = HangingFuse(world.folder / "hanging", "fuse.other", valid_s=0)
    world.stack.callback(hanging.close)
    monkeypatch.setattr(process_files, "LOOK_S", 0.5)
    monkeypatch.setattr(process_files, "END_S", 0.1)
    here = world.folder / "here"
    here.write_text("x")

    async def look() -> Any:
        return await asyncio.gather(
            process_files.places_of(
                [str(here), "/\0", str(world.folder / "nothing"), str(hanging.path), "/"]
            ),
            process_files.places_of([str(here)]),
        )

    with hanging.stopped():
        strange, good = asyncio.run(look())
    assert strange[0] == process_files.place_of(str(here))
    assert [error.errno for error in strange[1:]] == [
        errno.EINVAL,
        errno.ENOENT,
        errno.ETIMEDOUT,
        errno.ETIMEDOUT,
    ]
    assert good == [process_files.place_of(str(here))]


def test_a_foreign_file_system_is_not_asked(world: World, hanging: HangingFuse) -> None:
    qemu = ScriptedQemu(world.folder / "vm.qmp", hanging.path, hanging.path, hanging_fuse.SIZE)
    world.stack.callback(qemu.close)
    assert "nothing to do" in pivot_as_a_user(qemu)
    assert not hanging.was_asked()


@pytest.mark.fuse
def test_a_detached_file_system_that_hangs_stops_nobody(world: World, hanging: HangingFuse) -> None:
    """It could be a dead lazyfs, so it is asked. The answer never comes, and the process that asks
    cannot be killed."""
    qemu = ScriptedQemu(
        world.folder / "vm.qmp", world.folder / "disk", hanging.path, hanging_fuse.SIZE
    )
    world.stack.callback(qemu.close)
    (world.folder / "disk").write_bytes(bytes(MiB))
    hanging.detach()
    assert "nothing to do" in pivot_as_a_user(qemu)
    assert hanging.was_asked()


def test_all_sockets_of_a_folder(world: World) -> None:
    qemus = [world.named(name=name) for name in ("a", "b")]
    (world.folder / "c.txt").write_text("no socket")
    named = world.folder / "run" / "link"
    named.symlink_to(qemus[0].socket)
    assert pivot.sockets([str(named)], str(world.folder)) == [
        str(named),
        *(str(world.folder / name) for name in ("a.own", "b.own", "b.qmp")),
    ]


def test_reports_are_json(world: World) -> None:
    from dataclasses import asdict

    qemu = world.named()
    world.to_plain()
    (report,) = json.loads(json.dumps([asdict(report) for report in world.pivot(qemu)]))
    assert report == {
        "socket": str(qemu.socket),
        "pid": qemu.pid,
        "error": "",
        "nodes": [
            {
                "node": "base-file",
                "path": str(world.folder / "disk"),
                "action": "pivoted",
                "message": "",
            }
        ],
        "qemu": True,
    }
