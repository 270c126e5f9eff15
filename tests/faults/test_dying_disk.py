"""The cache's disk fails while lazyfs serves from it."""

import subprocess
from pathlib import Path

from disk_rig import DiskRig
from lab import KiB, Lab, MiB, wait_until

SIZE = 4 * MiB


def test_a_disk_that_dies_and_comes_back(lab: Lab, rig: DiskRig) -> None:
    for name in ("whole", "partial", "remote"):
        lab.image(name, SIZE)
    cache = rig.root / "cache"
    uri = lab.serve().uri
    lab.mount(uri, "--cache-dir", cache, "--no-populate", "--no-passthrough")
    lab.lazyfs("prefetch", lab.mnt / "whole", "--wait")
    assert first(lab.mnt / "partial") == first(lab.repository / "partial")
    subprocess.run(["sync", "-f", str(rig.root)], check=True)

    rig.fail()
    for name in ("whole", "partial", "remote"):
        done = subprocess.run(
            ["dd", f"if={lab.mnt / name}", "of=/dev/null", "bs=1M", "iflag=direct"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if name != "remote":  # nothing of it is on the disk: it may be served without being kept
            assert "Input/output error" in done.stderr, name
    whole = lab.image_status("whole")
    assert (whole["state"], whole["error"]) == (
        "whole",
        "the cache's disk fails: Input/output error",
    )
    again = lab.lazyfs(
        "mount", lab.status()["repository"], lab.mnt, "--cache-dir", cache, check=False
    )
    assert "mounted on" in again.stderr, "the daemon lives"
    refused = lab.lazyfs("evict", lab.mnt / "whole", check=False)
    assert refused.returncode == 1
    assert "Errno" not in refused.stderr
    assert "changed by hand" not in lab.log_text()
    lab.umount()

    rig.again()
    lab.mount(uri, "--cache-dir", cache)
    for name in ("whole", "partial", "remote"):
        assert (lab.mnt / name).read_bytes() == (lab.repository / name).read_bytes(), name
    wait_until(lambda: not lab.image_status("whole")["error"], "it is well again")
    lab.umount()
    assert "no problems" in lab.lazyfs("check", cache).stdout


def first(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64 * KiB)
