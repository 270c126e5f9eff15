"""`lazyfs pivot` with real mounts and a real QEMU; every shape of block graph is in
component/test_pivot.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nbd
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
from lab import KiB, Lab, MiB, die_with_parent, pread, wait_until

from lazyfs.control import client as control_client
from lazyfs.core import inode_number
from lazyfs.qemu import pivot as pivot_module

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="/proc/PID/fd of others is seen by root")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def start(
    lab: Lab, stack: ExitStack, image: str = "disk", name: str = "vm", **cache: Any
) -> BlockQemu:
    """Start a QEMU with an overlay on an image, all nodes named: vm, base, base-file."""
    overlay = make_overlay(lab.folder / f"{name}.qcow2", lab.mnt / image)
    nodes = [
        file_node("base-file", lab.mnt / image, **cache),
        raw_node("base", "base-file", **cache),
    ]
    qemu = BlockQemu(
        lab.folder, blockdevs(*nodes, overlay_node("vm", overlay, "base", **cache)), name
    )
    stack.callback(qemu.close)
    return qemu


def pivot(lab: Lab, *arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
    """Run it; return what it says of each QEMU."""
    done = lab.lazyfs("pivot", "--json", *arguments, check=False)
    assert done.returncode == code, f"{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    qemus = json.loads(done.stdout)["qemus"]
    assert isinstance(qemus, list)
    return qemus


def actions(qemus: list[dict[str, Any]]) -> list[str]:
    return [node["action"] for qemu in qemus for node in qemu["nodes"]]


@pytest.mark.parametrize("cache", [{}, {"cache": {"direct": True}}], ids=["cached", "cache=none"])
def test_from_partial_to_whole_to_detached_while_it_reads(
    lab: Lab, stack: ExitStack, cache: dict[str, Any]
) -> None:
    source = lab.image("disk", 8 * MiB)
    expected = source.read_bytes()
    lab.mount(lab.serve("rate", parameters=("rate=80M", "burstiness=0.05")).uri)
    path = lab.mnt / "disk"
    qemu = start(lab, stack, **cache)
    old = path.stat()
    assert not inode_number.is_whole(old.st_ino)
    header = (lab.folder / "vm.qcow2").read_bytes()
    with reading(qemu.export("vm"), expected):
        assert actions(pivot(lab, qemu.socket, "--wait")) == ["pivoted"]
        assert inode_number.is_whole(path.stat().st_ino)
        assert qemu.has_open(path)
        assert (old.st_dev, old.st_ino) not in qemu.files()
        assert actions(pivot(lab, qemu.socket)) == ["already"]
        lab.lazyfs("detach", lab.mnt, "--wait")
        assert path.stat().st_dev != old.st_dev
        assert actions(pivot(lab, qemu.socket)) == ["pivoted"]
        assert {device for device, _ in qemu.files()} & {old.st_dev} == set()
        assert qemu.has_open(path)
        assert lab.daemon is not None
        assert lab.daemon.wait(20) == 0, "nobody has a file of it open any more"
        lab.daemon = None
    assert (lab.folder / "vm.qcow2").read_bytes() == header
    assert actions(pivot(lab, qemu.socket)) == []


def test_without_a_pivot_a_killed_daemon_is_noticed(lab: Lab, stack: ExitStack) -> None:
    """This shows that the next test can fail: there is something to lose."""
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    qemu = start(lab, stack, cache={"direct": True})
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    disk = qemu.export("vm")
    lab.kill_daemon()
    subprocess.run(["umount", "-l", lab.mnt], check=True)
    with pytest.raises(nbd.Error):
        disk.read()


def test_with_a_pivot_a_killed_daemon_is_not_noticed(lab: Lab, stack: ExitStack) -> None:
    expected = lab.image("disk", 1 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-populate")
    qemu = start(lab, stack, cache={"direct": True})
    with reading(qemu.export("vm"), expected):
        (lab.mnt / "disk").read_bytes()
        lab.wait_for_state("disk", "whole")
        lab.lazyfs("detach", lab.mnt, "--wait")
        assert actions(pivot(lab, qemu.socket)) == ["pivoted"]
        lab.kill_daemon()
        lab.status_of_all()  # clears its socket away, if it was not about to end by itself


def test_mounted_again_over_the_plain_file_that_it_was_moved_to(lab: Lab, stack: ExitStack) -> None:
    expected = lab.image("disk", 1 * MiB).read_bytes()
    server = lab.serve()
    lab.mount(server.uri)
    qemu = start(lab, stack)
    become_whole(lab)
    lab.lazyfs("detach", lab.mnt, "--wait")
    assert actions(pivot(lab, qemu.socket)) == ["pivoted"]
    assert lab.daemon is not None
    assert lab.daemon.wait(20) == 0
    lab.daemon = None
    lab.mount(server.uri)
    (report,) = pivot(lab, qemu.socket)
    assert [(node["action"], node["message"]) for node in report["nodes"]] == [
        ("already", "it has the plain file below the mount open")
    ]
    assert qemu.export("vm").read(0, 1 * MiB) == expected


def test_a_bind_mount_of_a_detached_mount(lab: Lab, stack: ExitStack) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri)
    bound = lab.folder / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", lab.mnt, bound], check=True)
    stack.callback(lambda: subprocess.run(["umount", "-l", bound], check=True))
    nodes = [file_node("base-file", bound / "disk"), raw_node("base", "base-file")]
    qemu = BlockQemu(lab.folder, blockdevs(*nodes))
    stack.callback(qemu.close)
    become_whole(lab)
    lab.lazyfs("detach", lab.mnt, "--wait")
    (report,) = pivot(lab, qemu.socket, code=1)
    assert actions([report]) == ["skipped"]
    assert "a lazyfs that is detached elsewhere" in report["nodes"][0]["message"]


def test_an_old_version_that_was_replaced(lab: Lab, stack: ExitStack) -> None:
    source = lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate", "--refresh", "0.2", "--on-change", "replace")
    qemu = start(lab, stack)
    become_whole(lab)
    newer = lab.folder / "newer"
    newer.write_bytes(os.urandom(2 * MiB))
    newer.rename(source)
    wait_until(lambda: (lab.mnt / "disk").stat().st_size == 2 * MiB, "replaced")
    for state in ("not whole", "whole"):
        (report,) = pivot(lab, qemu.socket, code=1)
        assert actions([report]) == ["skipped"], state
        assert "has another version of the image open" in report["nodes"][0]["message"]
        (lab.mnt / "disk").read_bytes()
        wait_until(
            lambda: {one["state"] for one in lab.status()["images"]} == {"whole"},
            "the new one is whole",
        )


def test_a_killed_daemon_leaves_whole_images_to_pivot_to(lab: Lab, stack: ExitStack) -> None:
    """Reads of the old file fail by now, but the path names the plain file again."""
    expected = lab.image("disk", 1 * MiB).read_bytes()
    lab.image("partial", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    qemu = start(lab, stack)
    partial = start(lab, stack, "partial", "vm2")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    lab.kill_daemon()
    (report,) = pivot(lab, qemu.socket, code=1)
    assert "does not answer; if it was killed, mount again" in report["nodes"][0]["message"]
    subprocess.run(["umount", "-l", lab.mnt], check=True)
    (report, other) = pivot(lab, qemu.socket, partial.socket, code=1)
    assert actions([report]) == ["pivoted"]
    assert actions([other]) == ["skipped"]
    assert "leads nowhere" in other["nodes"][0]["message"]
    assert qemu.export("vm").read(0, 1 * MiB) == expected


def become_whole(lab: Lab, name: str = "disk") -> None:
    (lab.mnt / name).read_bytes()
    lab.wait_for_state(name, "whole")


def test_another_repository_with_an_image_of_the_same_name_and_size(
    lab: Lab, stack: ExitStack
) -> None:
    """The first mount is detached and the second mounted there, so the path leads to other
    bytes."""
    expected = lab.image("disk", 1 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--cache-dir", lab.folder / "cache-a")
    qemu = start(lab, stack, cache={"direct": True})
    become_whole(lab)
    lab.lazyfs("detach", lab.mnt, "--wait")
    first, lab.daemon = lab.daemon, None
    assert first is not None
    stack.callback(first.wait, 20)
    stack.callback(qemu.close)

    other = lab.folder / "other"
    other.mkdir()
    (other / "disk").write_bytes(os.urandom(1 * MiB))
    lab.mount(lab.serve_with("file", f"dir={other}").uri, "--cache-dir", lab.folder / "cache-b")
    disk = qemu.export("vm")
    for state in ("partial", "whole"):
        (report,) = pivot(lab, qemu.socket, code=1)
        assert disk.read(0, 1 * MiB) == expected, state
        become_whole(lab)
    assert actions([report]) == ["skipped"]
    assert report["nodes"][0]["message"] == (
        f"QEMU has the image of the cache {lab.folder}/cache-a open, "
        f"and the path leads to one of the cache {lab.folder}/cache-b now"
    )


@pytest.mark.parametrize("killed", [False, True], ids=["detached", "killed"])
def test_any_other_file_where_the_image_was(lab: Lab, stack: ExitStack, killed: bool) -> None:
    """With the cache elsewhere, the path is free. A copy of the image is recognised by its time."""
    expected = lab.image("disk", 1 * MiB).read_bytes()
    cache = lab.folder / "cache"
    lab.mount(lab.serve().uri, "--cache-dir", cache)
    qemu = start(lab, stack)
    become_whole(lab)
    if killed:
        lab.kill_daemon()
        subprocess.run(["umount", "-l", lab.mnt], check=True)
    else:
        lab.lazyfs("detach", lab.mnt, "--wait")
    (lab.mnt / "disk").write_bytes(os.urandom(1 * MiB))
    (report,) = pivot(lab, qemu.socket, code=1)
    assert actions([report]) == ["skipped"]
    assert "times of change differ (a copy must keep the time" in report["nodes"][0]["message"]
    shutil.copy2(cache / "disk", lab.mnt / "disk")
    assert actions(pivot(lab, qemu.socket)) == ["pivoted"]
    assert qemu.export("vm").read(0, 1 * MiB) == expected


def test_a_killed_daemon_that_is_mounted_again(lab: Lab, stack: ExitStack) -> None:
    expected = lab.image("disk", 1 * MiB).read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    qemu = start(lab, stack)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    lab.kill_daemon()
    lab.mount(server.uri)
    assert actions(pivot(lab, qemu.socket)) == ["pivoted"]
    assert qemu.has_open(lab.mnt / "disk")
    assert qemu.export("vm").read(0, 1 * MiB) == expected


def test_a_daemon_that_hangs_does_not_make_pivot_hang(
    lab: Lab, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri)
    qemu = start(lab, stack)
    monkeypatch.setattr(control_client, "TIMEOUT_S", 0.5)
    assert lab.daemon is not None
    lab.signal_daemon(signal.SIGSTOP)
    try:
        (report,) = pivot_module.run([str(qemu.socket)], pivot_module.Options())
    finally:
        lab.signal_daemon(signal.SIGCONT)
    assert [node.action for node in report.nodes] == ["skipped"]
    assert "does not answer" in report.nodes[0].message


def test_partial_images_stay_and_whole_ones_move(lab: Lab, stack: ExitStack) -> None:
    lab.image("disk", 1 * MiB)
    lab.image("partial", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    whole, partial = start(lab, stack, "disk", "vm1"), start(lab, stack, "partial", "vm2")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    done = lab.lazyfs("pivot", whole.socket, partial.socket, check=False)
    assert done.returncode == 1
    assert f"pivoted {lab.mnt}/disk (node base-file, pid {whole.pid})" in done.stdout
    assert done.stderr.count("\n") == 1
    assert (
        f"partial {lab.mnt}/partial (node base-file, pid {partial.pid}): not whole yet"
        in done.stderr
    )


def test_wait_moves_when_the_image_is_whole_and_reports_a_qemu_that_ends(
    lab: Lab, stack: ExitStack
) -> None:
    lab.image("disk", 1 * MiB)
    lab.image("other", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    stays, ends = start(lab, stack, "disk", "vm1"), start(lab, stack, "other", "vm2")
    command = [
        sys.executable,
        "-m",
        "lazyfs",
        "pivot",
        "--wait",
        str(stays.socket),
        str(ends.socket),
    ]
    waits = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    with waits:
        assert waits.stderr is not None
        assert waits.stdout is not None
        said = {waits.stderr.readline(), waits.stderr.readline()}
        assert said == {
            f"waiting for {lab.mnt}/{name} to become whole\n" for name in ("disk", "other")
        }
        ends.close()
        assert waits.poll() is None
        (lab.mnt / "disk").read_bytes()
        stdout, stderr = waits.communicate(timeout=30)
    assert waits.returncode == 1
    assert f"pivoted {lab.mnt}/disk" in stdout
    assert "nobody listens: its QEMU has ended" in stderr
    assert "Traceback" not in stderr


def test_an_interrupted_wait_has_said_what_was_done(lab: Lab, stack: ExitStack) -> None:
    for name in ("disk", "other"):
        lab.image(name, 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    moves, stays = start(lab, stack, "disk", "vm1"), start(lab, stack, "other", "vm2")
    become_whole(lab)
    command = [
        sys.executable,
        "-m",
        "lazyfs",
        "pivot",
        "--wait",
        str(moves.socket),
        str(stays.socket),
    ]
    waits = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    with waits:
        assert waits.stderr is not None
        assert waits.stderr.readline() == f"waiting for {lab.mnt}/other to become whole\n"
        waits.send_signal(signal.SIGINT)
        stdout, stderr = waits.communicate(timeout=30)
    assert (waits.returncode, stderr) == (130, "")
    assert stdout == f"{moves.socket}: pivoted {lab.mnt}/disk (node base-file, pid {moves.pid})\n"


def test_wait_with_a_whole_and_a_partial_image_in_one_vm(lab: Lab, stack: ExitStack) -> None:
    for name in ("disk", "other"):
        lab.image(name, 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    disks = []
    for name in ("disk", "other"):
        overlay = make_overlay(lab.folder / f"{name}.qcow2", lab.mnt / name)
        disks += ["-drive", f"file={overlay},if=none,node-name={name}"]
    qemu = BlockQemu(lab.folder, disks)
    stack.callback(qemu.close)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    command = [sys.executable, "-m", "lazyfs", "pivot", "--wait", "--json", str(qemu.socket)]
    waits = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    with waits:
        assert waits.stderr is not None
        assert waits.stderr.readline() == f"waiting for {lab.mnt}/other to become whole\n"
        assert qemu.has_open(lab.mnt / "disk"), "what is whole is moved at once"
        (lab.mnt / "other").read_bytes()
        stdout, stderr = waits.communicate(timeout=30)
    assert (waits.returncode, stderr) == (0, "")
    (report,) = json.loads(stdout)["qemus"]
    assert {(node["path"], node["action"]) for node in report["nodes"]} == {
        (f"{lab.mnt}/disk", "pivoted"),
        (f"{lab.mnt}/other", "pivoted"),
    }


def test_an_image_that_failed_ends_the_wait(lab: Lab, stack: ExitStack) -> None:
    source = lab.image("disk", 2 * MiB)
    lab.mount(lab.serve().uri, "--no-populate", "--refresh", "0.2")
    qemu = start(lab, stack)
    pread(lab.mnt / "disk", 0, 64 * KiB)
    os.truncate(source, 1 * MiB)  # the export changes: nothing more can be fetched
    wait_until(lambda: lab.image_status("disk")["error"], "the change is seen")
    assert lab.image_status("disk")["state"] == "failed"
    (report,) = pivot(lab, qemu.socket, "--wait", code=1)
    assert "the image failed" in report["nodes"][0]["message"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "name a QMP socket, or a folder of them"),
        (["--all-in", "/nonexistent"], 1, "cannot read /nonexistent"),
        (["--nonsense"], 2, "unrecognized"),
        (["/nonexistent"], 1, "/nonexistent: No such file or directory"),
        (["/proc/version"], 1, "/proc/version: this is not a socket"),
    ],
)
def test_wrong_arguments_are_one_line(lab: Lab, arguments: list[str], code: int, says: str) -> None:
    done = lab.lazyfs("pivot", *arguments, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert says in done.stderr
    assert done.stderr.startswith("lazyfs: ")


def test_a_folder_of_sockets_and_what_people_see(lab: Lab, stack: ExitStack) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    folder = lab.folder / "libvirt"
    folder.mkdir()
    empty = lab.lazyfs("pivot", "--all-in", folder)
    assert (empty.stdout, empty.stderr) == ("", f"lazyfs: there is no socket in '{folder}'\n")
    qemu = start(lab, stack)
    idle = BlockQemu(lab.folder, [], "idle")
    stack.callback(idle.close)
    for one in (qemu, idle):
        (folder / one.socket.name).hardlink_to(one.socket)
    (folder / "notes.txt").write_text("no socket")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    nothing = f"{folder}/idle.qmp: nothing to do: no backing file of it lies on a lazyfs"
    for option, action, node in (
        ("--dry-run", "would pivot", "base-file"),
        ("--wait", "pivoted", "base-file"),
        ("--wait", "already", "lazyfs-1"),
    ):
        done = lab.lazyfs("pivot", "--all-in", folder, option)
        about = f"{action} {lab.mnt}/disk (node {node}, pid {qemu.pid})"
        assert done.stdout.splitlines() == [nothing, f"{folder}/vm.qmp: {about}"]
        assert done.stderr == ""
