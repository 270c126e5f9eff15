"""Running guests move from lazyfs to the plain file, and lazyfs goes away underneath them."""

import os
import shutil
import subprocess

import pytest
from guest_lab import IMAGE, TEST_TIMEOUT_S, GuestLab
from virtual_machine import BackingFile

pytestmark = pytest.mark.timeout(TEST_TIMEOUT_S)

READING = "guest.loop=1000000"
"""How long the passes go on: until `finish`."""


@pytest.mark.parametrize(
    ("direct", "iothread"),
    [(False, False), (True, False), (True, True)],
    ids=["cached", "cache=none", "iothread"],
)
def test_guests_outlive_lazyfs(lab: GuestLab, direct: bool, iothread: bool) -> None:
    """One guest is moved as soon as the image is whole, another only when lazyfs is detached.

    Both read all the time.
    """
    server = lab.serve_slowly("40M")
    lab.mount(server.uri)
    early, late = [lab.boot(READING, direct=direct, iothread=iothread) for _ in range(2)]
    for machine in (early, late):
        machine.wait_for("START")
    assert lab.image_status(IMAGE)["state"] == "partial"
    filling = lab.disk.stat().st_ino
    lab.hurry()
    lab.wait_for_state(IMAGE, "whole")
    server.kill()
    whole = lab.disk.stat().st_ino
    assert whole != filling
    assert early.backing() == late.backing() == BackingFile(filling, direct)

    lab.pivot(early)
    assert early.backing() == BackingFile(whole, direct)
    assert late.backing() == BackingFile(filling, direct)
    if lab.status()["passthrough"]:
        with lab.daemon_stopped():  # it is the kernel alone that answers
            early.wait_for_cold_passes()

    lab.lazyfs("detach", lab.mnt)
    assert not os.path.ismount(lab.mnt)
    assert lab.daemon_runs()
    for machine in (early, late):
        machine.wait_for_cold_passes()
    plain = lab.disk.stat().st_ino
    lab.pivot(early, late)
    assert early.backing() == late.backing() == BackingFile(plain, direct)
    lab.wait_for_the_daemons_end()
    for machine in (early, late):
        machine.wait_for_cold_passes()
        machine.finish()


def test_a_guest_boots_from_a_qcow2_that_is_being_filled_and_outlives_lazyfs(lab: GuestLab) -> None:
    lab.format = "qcow2"
    server = lab.serve_slowly("40M")
    lab.mount(server.uri, "--format", "qcow2")
    machine = lab.boot(READING, size="1G")
    machine.wait_for("START")
    assert lab.image_status(IMAGE)["state"] == "partial"
    subprocess.run(["qemu-img", "check", "-q", "-U", lab.disk], check=True)
    lab.hurry()
    lab.wait_for_state(IMAGE, "whole")
    server.kill()
    lab.pivot(machine)
    lab.lazyfs("detach", lab.mnt)
    lab.pivot(machine)
    lab.wait_for_the_daemons_end()
    assert machine.backing().inode == lab.disk.stat().st_ino
    machine.wait_for_cold_passes()
    machine.finish()
    subprocess.run(["qemu-img", "check", "-q", lab.disk], check=True)
    subprocess.run(
        ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", lab.source, lab.disk], check=True
    )


def test_a_guest_uses_the_file_it_was_moved_to_and_no_other(lab: GuestLab) -> None:
    """The proof is to empty the file that the guest used before.

    Then, to show that the proof can fail, the file that it uses now is emptied.
    """
    server = lab.serve_slowly("40M")
    cache = lab.folder / "cache"
    lab.mount(server.uri, "--cache-dir", cache)
    machine = lab.boot(READING)
    machine.wait_for("START")
    assert lab.image_status(IMAGE)["state"] == "partial"
    lab.hurry()
    lab.lazyfs("detach", lab.mnt, "--wait")
    # With the cache elsewhere, the path that was on the mount is free, and another file of the same
    # bytes is put there. Its time of change says that it is the image's.
    shutil.copy2(cache / IMAGE, lab.disk)
    lab.pivot(machine)
    assert machine.backing().inode == lab.disk.stat().st_ino
    lab.wait_for_the_daemons_end()

    os.truncate(cache / IMAGE, 0)
    machine.wait_for_cold_passes(2)
    os.truncate(lab.disk, 0)
    machine.wait_for_failure()
