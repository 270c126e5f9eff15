"""The cache's disk stalls, and many readers wait for it."""

import mmap
import os
import subprocess
import threading
import time

from disk_rig import DiskRig
from lab import KiB, Lab, MiB

READERS = 100
"""More than the keeper has threads (MAX_THREADS of kernel/keeper.h)."""


def test_many_readers_of_a_stalled_disk_hold_up_nobody_else(lab: Lab, rig: DiskRig) -> None:
    content = lab.image("disk", 16 * MiB).read_bytes()
    other = lab.image("other", MiB).read_bytes()
    lab.mount(lab.serve().uri, "--cache-dir", rig.root / "cache", "--no-passthrough")
    lab.lazyfs("prefetch", lab.mnt / "disk", "--wait")
    subprocess.run(["sync", "-f", str(rig.root)], check=True)
    fd = os.open(lab.mnt / "disk", os.O_RDONLY | os.O_DIRECT)
    wrong: list[object] = []
    done: list[int] = []

    def read(number: int) -> None:
        buffer = mmap.mmap(-1, 4 * KiB)  # aligned
        try:
            os.preadv(fd, [buffer], number * 128 * KiB)
            if buffer[:] != content[number * 128 * KiB :][: 4 * KiB]:
                wrong.append(number)
        except OSError as error:
            wrong.append(error)
        done.append(number)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    with rig.stalled():
        for reader in readers:
            reader.start()
        time.sleep(1.0)
        assert not done
        assert lab.image_status("disk")["open_count"] == 1
        assert sorted(os.listdir(lab.mnt)) == ["disk", "other"]
    for reader in readers:
        reader.join(60)
    os.close(fd)
    assert (len(done), wrong) == (READERS, [])
    assert (lab.mnt / "other").read_bytes() == other
    lab.umount()
