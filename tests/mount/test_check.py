"""`lazyfs check` and daemons: one that has the cache, and one that was killed."""

import os
import random

import pytest
from lab import KiB, Lab, MiB, pread, wait_until


def test_check_is_refused_while_a_daemon_has_the_cache(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    server = lab.serve()
    for cache in (lab.mnt, lab.folder / "cache"):
        lab.mount(server.uri, "--cache-dir", cache)
        for repair in ((), ("--repair",)):
            refused = lab.lazyfs("check", cache, *repair, check=False)
            assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
            assert f"the lazyfs on {lab.mnt}" in refused.stderr
        lab.umount()
        assert "no problems" in lab.lazyfs("check", cache).stdout


def test_check_is_refused_while_a_detached_daemon_serves_files(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    with (lab.mnt / "disk").open("rb"):
        lab.lazyfs("detach", lab.mnt)
        refused = lab.lazyfs("check", lab.mnt, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "detached" in refused.stderr
    assert lab.daemon is not None
    assert lab.daemon.wait(60) == 0
    assert "no problems" in lab.lazyfs("check", lab.mnt).stdout


@pytest.mark.slow
def test_a_cache_that_a_killed_daemon_left_is_checked_and_repaired(lab: Lab) -> None:
    sources = {f"d{i}": lab.image(f"d{i}", 3 * MiB) for i in range(4)}
    server = lab.serve()
    cache = lab.folder / "cache"
    for turn in range(3):
        lab.mount(
            server.uri,
            "--cache-dir",
            cache,
            "--fill-rate",
            "4M",
            "--format",
            ("raw", "qcow2")[turn % 2],
        )
        for path in lab.mnt.iterdir():
            pread(path, random.randrange(2 * MiB), 64 * KiB)

        def much_is_here(enough: int = (turn + 1) * MiB) -> bool:
            return sum(int(image["present_bytes"]) for image in lab.status()["images"]) > enough

        wait_until(much_is_here, "some")
        lab.kill_daemon()
        refused = lab.lazyfs("check", lab.mnt, check=False)
        assert "unmount" in refused.stderr, "a dead mount is in the way"
        report = lab.lazyfs("check", cache, check=False).stdout
        assert "left alone" not in report.replace("warning", "")
        lab.lazyfs("check", cache, "--repair")
        assert "no problems" in lab.lazyfs("check", cache).stdout
    lab.mount(server.uri, "--cache-dir", cache)
    for name, source in sources.items():
        assert (lab.mnt / name).read_bytes() == source.read_bytes()
        lab.wait_for_state(name, "whole")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_anothers_cache_is_not_for_us(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri)
    lab.umount()
    os.chown(lab.mnt / ".lazyfs", 1234, 1234)
    refused = lab.lazyfs("check", lab.mnt, "--repair", check=False)
    assert "user 1234's" in refused.stderr
    os.chown(lab.mnt / ".lazyfs", 0, 0)
    assert lab.lazyfs("check", lab.mnt).returncode == 0
