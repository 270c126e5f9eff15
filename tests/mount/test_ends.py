"""What ends a mount, and what does not: signals, an aborted connection, a disk and a log that
stall."""

import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import DEADLINE_S, KiB, Lab, MiB, pread, wait_until

PROGRAM = """
import sys
{patch}
from lazyfs.cli import main as cli
sys.exit(cli.main())
"""

STALLS = """
import os, time
from lazyfs.cache.store import cache_file
real = cache_file.FileReader.read
def read(self, offset, length):
    while os.path.exists({stalled!r}):
        time.sleep(0.02)
    return real(self, offset, length)
cache_file.FileReader.read = read
cache_file.FileReader.read_nowait = lambda self, offset, length: None
"""

CHATTERS = """
import logging, threading, time
from lazyfs.report import background_log
background_log.MAX_LINES = 100
def chatter():
    while True:
        logging.getLogger("chatter").warning("%d " % time.monotonic_ns() + "x" * 1000)
        time.sleep(0.0005)
threading.Thread(target=chatter, daemon=True).start()
"""


@pytest.fixture
def connections(tmp_path: Path) -> Iterator[Path]:
    """The kernel's folder of FUSE connections (fusectl), mounted for the test."""
    folder = tmp_path / "connections"
    folder.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def connection_of(connections: Path, mnt: Path) -> Path:
    """What the kernel shows of the connection of a mount."""
    return connections / str(os.minor(os.stat(mnt).st_dev))


# -- signals, and an abort


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_unmounts_and_saves_what_is_there(lab: Lab, number: signal.Signals) -> None:
    lab.image("disk", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "disk", 0, 64 * KiB)
    daemon = lab.daemon
    assert daemon is not None
    daemon.send_signal(number)
    assert daemon.wait(DEADLINE_S) == 0, lab.log_text()
    assert not os.path.ismount(lab.mnt)
    lab.daemon = None
    fetched, reads = server.bytes_read(), len(server.reads())
    lab.mount(server.uri, "--no-populate")
    assert lab.image_status("disk")["present_bytes"] == fetched > 0
    pread(lab.mnt / "disk", 0, 64 * KiB)
    assert len(server.reads()) == reads
    lab.umount()


def test_an_aborted_connection_ends_the_daemon_cleanly(lab: Lab, connections: Path) -> None:
    lab.image("disk", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "disk", 0, 64 * KiB)
    present = lab.image_status("disk")["present_bytes"]
    (connection_of(connections, lab.mnt) / "abort").write_text("1")
    daemon = lab.daemon
    assert daemon is not None
    assert daemon.wait(DEADLINE_S) == 0, lab.log_text()
    lab.daemon = None
    assert "somebody has aborted the FUSE connection" in lab.log_text()
    assert "Traceback" not in lab.log_text()
    lab.mount(server.uri, "--no-populate")  # which clears the dead mount away
    assert lab.image_status("disk")["present_bytes"] == present > 0
    lab.umount()


# -- a log that stalls


def test_a_log_that_nobody_reads_holds_up_no_read(lab: Lab) -> None:
    content = lab.image("disk", 1 * MiB).read_bytes()
    os.mkfifo(lab.log)
    log = os.open(lab.log, os.O_RDWR | os.O_NONBLOCK)  # nobody reads, and yet there is a reader
    try:
        program = PROGRAM.format(patch=CHATTERS)
        lab.mount(lab.serve().uri, "--no-populate", "--metrics", "0", program=("-c", program))

        def dropped() -> float:
            return lab_metric(lab, 'lazyfs_errors_total{.*operation="log"')

        wait_until(lambda: dropped() > 0, "the log is full")
        for start in range(0, MiB, 128 * KiB):
            assert pread(lab.mnt / "disk", start, 4 * KiB) == content[start : start + 4 * KiB]
        before = dropped()
        wait_until(lambda: dropped() > before, "and stays so")
        lab.umount()
    finally:
        os.close(log)
        lab.log.unlink()  # whoever looks at the log after a failure would wait for a writer


def lab_metric(lab: Lab, pattern: str) -> float:
    """The value of the one metric that matches."""
    with urllib.request.urlopen(f"http://{lab.status()['metrics']}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    (value,) = re.findall(rf"^{pattern}[^}}]*}} (.*)$", text, re.MULTILINE)
    return float(value)
