"""What signals do to the daemon."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab, MiB, wait_until


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGVTALRM,
        signal.SIGPROF,
        signal.SIGIO,
        signal.SIGPWR,
        signal.SIGPIPE,
        signal.SIGRTMIN,
        signal.SIGRTMAX,
    ],
)
def test_a_signal_that_means_nothing_does_nothing(lab: Lab, number: int) -> None:
    source = lab.image("a", MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    assert lab.daemon is not None
    with (lab.mnt / "a").open("rb") as file:
        os.kill(lab.daemon.pid, number)
        assert lab.status()["pid"] == lab.daemon.pid
        assert file.read() == source.read_bytes()


def test_hup_opens_the_log_again(lab: Lab) -> None:
    lab.image("a", MiB)
    lab.mount(lab.serve().uri)
    old = lab.log.rename(lab.folder / "lazyfs.log.1")
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: lab.log.exists() and "the log is reopened" in lab.log.read_text(), "it is")
    assert "reopened" not in old.read_text()
    assert lab.status()["pid"] == lab.daemon.pid


def test_hup_applies_what_can_be_applied_of_the_configuration(lab: Lab) -> None:
    lab.image("a", 4 * MiB)
    file = lab.folder / "main.toml"
    file.write_text('refresh = 1000\nfill-rate = "1M"\n')
    lab.mount(lab.serve().uri, "--config", file, "--no-populate")
    assert lab.status()["room"]["max_cache"] is None
    (lab.mnt / "a").read_bytes()
    lab.wait_for_state("a", "whole")
    file.write_text('refresh = 0.2\nmax-cache = "1M"\nblock-size = "4K"\nlog-level = "debug"\n')
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: lab.status()["room"]["max_cache"] == MiB, "the limit holds")
    lab.wait_for_state("a", "remote")
    lab.image("b", MiB)
    wait_until(lambda: (lab.mnt / "b").exists(), "the list is looked at more often")
    assert "this needs a new mount to take effect: block-size" in lab.log_text()
    file.write_text("nonsense\n")
    lab.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "the configuration stays as it was" in lab.log_text(), "it says so")
    assert lab.status()["room"]["max_cache"] == MiB
    file.write_text("refresh = 1000\n")
    lab.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: lab.status()["room"]["max_cache"] is None, "there is no limit any more")


def test_usr1_says_what_tasks_and_threads_do(lab: Lab) -> None:
    lab.image("a", MiB)
    lab.mount(lab.serve().uri)
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGUSR1)
    wait_until(
        lambda: "task lazyfs.mounted.Mounted._unmount_on_signal: " in lab.log.read_text(), "it does"
    )
    wait_until(lambda: "thread MainThread: " in lab.log.read_text(), "it does")
    assert lab.status()["pid"] == lab.daemon.pid
    before = lab.log.read_text().count("thread MainThread: ")
    lab.daemon.send_signal(signal.SIGUSR1)  # as one does to see what does not move
    wait_until(
        lambda: lab.log.read_text().count("thread MainThread: ") > before, "it does so again"
    )


def test_hup_finds_files_that_were_named_relative_to_the_folder_of_the_command(lab: Lab) -> None:
    lab.image("a", MiB)
    (lab.folder / "main.toml").write_text("refresh = 1000\n")
    uri = lab.serve().uri
    words = ["mount", uri, "mnt", "--config", "./main.toml", "--cache-dir", "cache"]
    subprocess.run(
        [sys.executable, "-m", "lazyfs", *words, "--log-file", "lazyfs.log"],
        cwd=lab.folder, check=True, timeout=60,
    )  # fmt: skip
    try:
        (lab.folder / "main.toml").write_text('max-cache = "1M"\nlog-level = "debug"\n')
        os.kill(lab.status()["pid"], signal.SIGHUP)
        wait_until(lambda: lab.status()["room"]["max_cache"] == MiB, "the limit holds")
        assert "needs a new mount" not in lab.log_text()
        assert lab.status()["options"]["cache-dir"] == str(lab.folder / "cache")
    finally:
        lab.lazyfs("umount", lab.mnt)


def test_a_line_that_is_repeated_is_counted(lab: Lab) -> None:
    """The same failure of the same file in each read."""
    source = lab.image("a", MiB)
    lab.mount(lab.serve().uri, "--no-populate", "--cache-dir", lab.folder / "cache")
    lab.lazyfs("prefetch", lab.mnt / "a", "--wait")
    Path(lab.folder / "cache" / "a").unlink()
    for _ in range(50):
        with pytest.raises(OSError, match="rror"):
            (lab.mnt / "a").read_bytes()
    assert 1 <= lab.log.read_text().count("the plain file is gone") <= 2
    assert source.exists()
