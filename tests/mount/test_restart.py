"""What survives the daemon's end, clean or not."""

import os
import random
import signal
import subprocess
import time

import pytest
from lab import KiB, Lab, MiB, pread, wait_until


def test_whole_image_is_a_plain_file_after_umount(lab: Lab) -> None:
    source = lab.image("team/ubuntu-24.04", 3 * MiB)
    lab.image("never-opened", 1 * MiB)
    server = lab.serve_with("--filter=log", "file", f"{source}", f"logfile={lab.folder}/nbdkit.log")
    lab.mount(server.uri)
    (name,) = os.listdir(lab.mnt)
    assert name == "%00"  # nbdkit's file plugin with one file serves the default export
    assert (lab.mnt / name).read_bytes() == source.read_bytes()
    lab.wait_for_state("", "whole")
    before = (lab.mnt / name).stat()
    server.kill()
    assert (lab.mnt / name).read_bytes() == source.read_bytes()
    lab.umount()
    plain = (lab.mnt / name).stat()
    assert (lab.mnt / name).read_bytes() == source.read_bytes()
    for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_blocks", "st_mtime_ns"):
        assert getattr(plain, field) == getattr(before, field), field
    assert not os.path.ismount(lab.mnt)


def test_clean_restart_fetches_nothing_twice(lab: Lab) -> None:
    source = lab.image("dense", 8 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "dense", 1 * MiB, 300 * KiB)
    first = lab.image_status("dense")
    fetched = server.bytes_read()
    inode = (lab.mnt / "dense").stat().st_ino
    lab.umount()

    lab.mount(server.uri)
    assert (lab.mnt / "dense").stat().st_ino == inode
    status = lab.wait_for_state("dense", "whole")
    assert lab.bytes_fetched(server) == 8 * MiB
    assert fetched == first["fetched_bytes"]
    assert status["fetched_bytes"] == 8 * MiB
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()


def test_partial_image_is_served_from_the_cache_with_the_source_poisoned(lab: Lab) -> None:
    source = lab.image("dense", 2 * MiB)
    expected = source.read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    assert pread(lab.mnt / "dense", 512 * KiB, 64 * KiB) == expected[512 * KiB : 576 * KiB]
    lab.umount()
    source.write_bytes(bytes(2 * MiB))  # same size: what is cached must not be fetched again
    lab.mount(server.uri, "--no-populate")
    assert pread(lab.mnt / "dense", 512 * KiB, 64 * KiB) == expected[512 * KiB : 576 * KiB]


@pytest.mark.slow
def test_kill_9_at_random_moments_never_shows_a_wrong_byte(lab: Lab) -> None:
    dice = random.Random(7)
    sources = {
        "dense": lab.image("dense", 24 * MiB),
        "sparse": lab.image(
            "sparse", 200 * MiB, {i * 9 * MiB: os.urandom(200 * KiB) for i in range(22)}
        ),
    }
    expected = {name: path.read_bytes() for name, path in sources.items()}
    server = lab.serve("rate", parameters=("rate=100M", "burstiness=0.05"))
    fetched = 0
    for _round in range(20):
        lab.mount(server.uri)
        for name, content in expected.items():
            for _ in range(4):
                offset = dice.randrange(len(content))
                assert (
                    pread(lab.mnt / name, offset, 100 * KiB) == content[offset : offset + 100 * KiB]
                ), (name, offset)
        time.sleep(dice.random() * 0.3)  # the moment of death is the point of this test
        fetched = sum(image["present_bytes"] for image in lab.status()["images"])
        lab.kill_daemon()
    assert fetched > 0
    lab.mount(server.uri)
    for name, path in sources.items():
        lab.wait_for_state(name, "whole")
        subprocess.run(["cmp", path, lab.mnt / name], check=True)
    lab.umount()
    for name, path in sources.items():
        subprocess.run(["cmp", path, lab.mnt / name], check=True)


@pytest.mark.slow
def test_kill_9_costs_at_most_the_last_checkpoint(lab: Lab) -> None:
    lab.image("dense", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "dense", 0, 1 * MiB)
    map_file = next(path for path in _below(lab) if path.endswith(".map"))
    wait_until(lambda: _saved_blocks(lab, map_file) >= 16, "a checkpoint")
    lab.kill_daemon()
    lab.mount(server.uri, "--no-populate")
    before = server.bytes_read()
    pread(lab.mnt / "dense", 0, 1 * MiB)
    assert server.bytes_read() == before


def _below(lab: Lab) -> list[str]:
    """Return the cache's state, seen under the mount through the daemon's own descriptor."""
    assert lab.daemon is not None
    root = f"/proc/{lab.daemon_pid}/fd"
    return [os.readlink(f"{root}/{fd}") for fd in os.listdir(root)]


def _saved_blocks(lab: Lab, map_file: str) -> int:
    assert lab.daemon is not None
    for fd in os.listdir(f"/proc/{lab.daemon_pid}/fd"):
        path = f"/proc/{lab.daemon_pid}/fd/{fd}"
        if os.readlink(path) == map_file:
            with open(path, "rb") as file:
                return file.read()[8192:].count(1)
    raise AssertionError(f"{map_file} is not open")


def test_a_dead_mount_is_cleared_away_by_the_next(lab: Lab) -> None:
    source = lab.image("dense", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri)
    lab.kill_daemon()
    status = lab.lazyfs("status", lab.mnt, check=False)
    assert "mount again" in status.stdout + status.stderr
    lab.mount(server.uri)
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()


def test_second_daemon_on_one_cache_is_refused(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    server = lab.serve()
    cache = lab.folder / "cache"
    lab.mount(server.uri, "--cache-dir", cache)
    other = lab.folder / "other"
    other.mkdir()
    refused = lab.lazyfs("mount", server.uri, other, "--cache-dir", cache, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert f"the lazyfs on {lab.mnt}" in refused.stderr
    again = lab.lazyfs("mount", server.uri, lab.mnt, check=False)
    assert again.returncode == 1
    assert "mounted on" in again.stderr


def test_sigterm_unmounts_and_saves(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "dense", 0, 64 * KiB)
    present = lab.image_status("dense")["present_bytes"]
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGTERM)
    assert lab.daemon.wait(20) == 0
    lab.daemon = None
    assert not os.path.ismount(lab.mnt)
    lab.mount(server.uri, "--no-populate")
    assert lab.image_status("dense")["present_bytes"] == present >= 64 * KiB


def test_a_plain_file_that_was_removed_is_fetched_again(lab: Lab) -> None:
    source = lab.image("dense", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri)
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
    lab.wait_for_state("dense", "whole")
    lab.umount()
    (lab.mnt / "dense").unlink()
    lab.mount(server.uri)
    assert lab.image_status("dense")["state"] == "remote"
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
    lab.wait_for_state("dense", "whole")


def test_a_plain_file_that_was_changed_by_hand_is_reported_and_left_alone(lab: Lab) -> None:
    source = lab.image("dense", 1 * MiB)
    other = lab.image("other", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri)
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
    lab.wait_for_state("dense", "whole")
    lab.umount()
    os.truncate(lab.mnt / "dense", 1000)
    lab.mount(server.uri)
    status = lab.image_status("dense")
    assert status["state"] == "failed"
    assert "changed by hand" in status["error"]
    assert (lab.mnt / "other").read_bytes() == other.read_bytes()
    lab.umount()
    assert (lab.mnt / "dense").stat().st_size == 1000
    (lab.mnt / "dense").unlink()
    lab.mount(server.uri)
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
