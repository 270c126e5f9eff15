"""The power goes while lazyfs works, and what the kernel had not written by then is lost."""

import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest
from disk_rig import DiskRig
from lab import KiB, Lab, MiB

SIZE = 4 * MiB
ROUNDS = int(os.environ.get("LAZYFS_POWER_CUTS", "3"))
"""How many cuts there are for each format. A run by hand may want more."""

SEED = int(os.environ.get("LAZYFS_SEED", "12"))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_cut_at_a_random_moment_loses_no_cache(lab: Lab, rig: DiskRig, image_format: str) -> None:
    """Images are read, become whole and are evicted meanwhile."""
    dice = random.Random(f"{SEED} {image_format}")
    lab.allow(40.0 * ROUNDS)
    names = [f"disk-{number}" for number in range(6)]
    for name in names:
        lab.image(name, SIZE)
    server, cache = lab.serve(), rig.root / "cache"
    for number in range(ROUNDS):
        lab.mount(server.uri, "--cache-dir", cache, "--format", image_format)
        stop = threading.Event()
        worker = threading.Thread(target=work, args=(lab, names, dice.random(), stop))
        worker.start()
        time.sleep(dice.uniform(0.2, 3.0))
        copy = rig.cut()
        stop.set()
        worker.join()
        lab.kill_daemon()
        subprocess.run(["umount", "-l", str(lab.mnt)], check=True)
        rig.boot(copy)

        lab.mount(server.uri, "--cache-dir", cache, "--format", image_format, "--no-populate")
        check_content(lab, names, image_format)
        lab.umount()
        done = lab.lazyfs("check", cache, check=False)
        assert done.returncode == 0, (number, done.stdout, done.stderr)


def work(lab: Lab, names: list[str], seed: float, stop: threading.Event) -> None:
    """Read here and there, and evict, until told to stop."""
    dice = random.Random(seed)
    while not stop.is_set():
        shown = {image["name"]: Path(image["path"]) for image in lab.status()["images"]}
        path = shown[dice.choice(names)]
        if dice.random() < 0.3:
            lab.lazyfs("evict", path, check=False)
        else:
            with path.open("rb") as file:
                file.seek(dice.randrange(SIZE))
                file.read(dice.choice([4 * KiB, 64 * KiB, MiB]))


def check_content(lab: Lab, names: list[str], image_format: str) -> None:
    shown = {image["name"]: image["path"] for image in lab.status()["images"]}
    for name in names:
        command = ["qemu-img", "compare", "-f", image_format, "-F", "raw", shown[name]]
        subprocess.run(
            [*command, str(lab.repository / name)], check=True, capture_output=True, timeout=60
        )
