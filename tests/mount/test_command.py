"""The command as its user meets it: exit codes, one-line errors, status."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from lab import DEADLINE_S, KiB, Lab, MiB, die_with_parent, pread, wait_until


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lazyfs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required"),
        (["frobnicate"], "invalid choice"),
        (["mount"], "required"),
        (["mount", "http://host", "/mnt"], "not an NBD URI"),
        (["mount", "nbd://host/export", "/mnt"], "give the server alone: nbd://host"),
        (["mount", "nbd+unix:///?socket=relative", "/mnt"], "absolute path"),
        (["mount", "nbd://", "/mnt"], "no host"),
        (["mount", "nbd://h", "/mnt", "--block-size", "100"], "power of two"),
        (["mount", "nbd://h", "/mnt", "--fill-rate", "fast"], "not a size"),
        (["mount", "nbd://h", "/mnt", "--fill-rate", "0"], "at least 1"),
        (["mount", "nbd://h", "/mnt", "--io-timeout", "-1"], "seconds"),
        (["mount", "nbd://h", "/mnt", "--mode", "999"], "octal"),
        (["mount", "nbd://h", "/mnt", "--uid", "-1"], "not a user or group number"),
        (["mount", "nbd://h", "/mnt", "--gid", "4294967295"], "not a user or group number"),
        (["mount", "nbd://h", "/mnt", "--refresh", "1e-9"], "at least 0.1"),
        (["mount", "nbd://h", ""], "empty name"),
        (["mount", "nbd://h", "/mnt", "--format", "vmdk"], "raw"),
        (["status", "--json", "--watch"], "--watch"),
        (["umount"], "required"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("lazyfs: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mount", "nbd+unix:///?socket=/nonexistent", "/nonexistent/mnt"], "does not exist"),
        (["mount", "nbd+unix:///?socket=/nonexistent", "/proc/version"], "not a folder"),
        (["umount", "/"], "no lazyfs is mounted"),
        (["status", "/"], "not on a lazyfs mount"),
    ],
)
def test_failures_are_one_line_and_exit_1(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert says in done.stderr


def test_a_daemon_that_cannot_start_says_why(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    server = lab.serve()
    refusals: tuple[tuple[list[str | Path], str], ...] = (
        (["--log-file", lab.folder / "none" / "log"], "cannot write the log"),
        (["--cache-dir", lab.folder / "none" / "cache"], "No such file"),
    )
    for arguments, says in refusals:
        refused = lab.lazyfs("mount", server.uri, lab.mnt, *arguments, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert says in refused.stderr
        assert not os.path.ismount(lab.mnt)


def test_nothing_is_imported_from_the_current_folder(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    server = lab.serve()
    trap = lab.folder / "trap"
    trap.mkdir()
    for name in ("trio.py", "lazyfs.py", "nbd.py"):
        (trap / name).write_text("raise SystemExit('hijacked')")
    command = [sys.executable, "-P", "-m", "lazyfs", "mount", server.uri, str(lab.mnt)]
    subprocess.run(command, cwd=trap, check=True, timeout=60)
    lab.lazyfs("umount", lab.mnt)


def test_umount_of_a_daemon_that_hangs_waits_for_it(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    pread(lab.mnt / "dense", 0, 64 * KiB)
    assert lab.daemon is not None
    lab.signal_daemon(signal.SIGSTOP)
    umount = subprocess.Popen(
        [sys.executable, "-m", "lazyfs", "umount", str(lab.mnt)], preexec_fn=die_with_parent
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            umount.wait(1)
    finally:
        lab.signal_daemon(signal.SIGCONT)
    assert umount.wait(30) == 0
    assert lab.daemon.wait(30) == 0
    lab.daemon = None
    lab.mount(server.uri, "--no-populate")
    assert lab.image_status("dense")["present_bytes"] >= 64 * KiB


def test_output_that_cannot_be_written_is_one_line(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    lab.mount(lab.serve().uri)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lazyfs", "status", "--json"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "lazyfs: No space left on device\n")


@pytest.mark.parametrize(
    "command",
    ["status", "status --json", "map {mnt}/dense", "pin --json {mnt}/dense", "check {mnt}"],
)
def test_a_closed_stdout_is_like_dev_null(lab: Lab, command: str) -> None:
    lab.image("dense", 1 * MiB)
    lab.mount(lab.serve().uri)
    words = command.format(mnt=lab.mnt)
    shell = f"exec {sys.executable} -m lazyfs {words} >&-"
    done = subprocess.run(
        ["sh", "-c", shell], stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    assert "Traceback" not in done.stderr
    as_usual = lab.lazyfs(*words.split(), check=False)
    assert (done.returncode, done.stderr) == (as_usual.returncode, as_usual.stderr)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGHUP, -1)]
)
def test_an_interrupted_mount_leaves_no_daemon(lab: Lab, number: int, code: int) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(lab.folder / "silent"))
        listening.listen()
        command = [sys.executable, "-m", "lazyfs", "mount"]
        mount = subprocess.Popen(
            [*command, f"nbd+unix:///?socket={lab.folder / 'silent'}", str(lab.mnt)],
            preexec_fn=die_with_parent,
        )
        listening.settimeout(DEADLINE_S)
        connection, _ = listening.accept()
        with connection:
            daemon, _, _ = struct.unpack(
                "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            assert daemon != mount.pid
            mount.send_signal(number)
            assert mount.wait(DEADLINE_S) == code
            # By itself it would give up after 10 s.
            wait_until(lambda: not os.path.exists(f"/proc/{daemon}"), "the daemon has ended", 5)
    assert not os.path.ismount(lab.mnt)


def test_every_verb_has_help_with_an_example() -> None:
    for verb in ("mount", "status", "pivot", "detach", "umount", "check"):
        assert "example: lazyfs" in run(verb, "--help").stdout
    assert re.fullmatch(r"lazyfs \d+\.\d+\.\d+\n", run("--version").stdout)


def test_background_mount_returns_when_it_answers(lab: Lab) -> None:
    source = lab.image("dense", 1 * MiB)
    server = lab.serve()
    lab.lazyfs("mount", server.uri, lab.mnt, "--log-file", lab.log)
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
    pid = lab.status()["pid"]
    lab.lazyfs("umount", lab.mnt)
    assert _has_ended(pid)
    assert not os.path.ismount(lab.mnt)


def _has_ended(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"  # nobody may reap orphans in a container


def test_status_json_has_what_programs_rely_on(lab: Lab) -> None:
    lab.image("team/dense", 1 * MiB)
    lab.image("flat", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    status = lab.status()
    assert {
        "mountpoint",
        "cache_dir",
        "repository",
        "connected",
        "control_socket",
        "images",
    } <= set(status)
    assert status["mountpoint"] == status["cache_dir"] == str(lab.mnt)
    assert status["repository"] == server.uri
    assert status["connected"] is True
    assert os.stat(status["control_socket"]).st_mode & 0o777 == 0o600
    (image,) = status["images"]  # nbdkit's file plugin does not serve folders
    assert {"name", "path", "size", "format", "state", "present_bytes", "zero_bytes", "fetched_bytes", "demand_bytes",
            "populated_bytes", "requests", "open_count", "error"} <= set(image)  # fmt: skip
    assert (image["name"], image["path"], image["state"]) == ("flat", f"{lab.mnt}/flat", "remote")
    fd = os.open(lab.mnt / "flat", os.O_RDONLY)
    os.pread(fd, 1, 0)
    (opened,) = json.loads(lab.lazyfs("status", lab.mnt / "flat", "--json").stdout)["mounts"][0][
        "images"
    ]
    assert (opened["open_count"], opened["state"], opened["size"]) == (1, "partial", 1 * MiB)
    os.close(fd)
    everything = json.loads(lab.status_of_all("--json"))
    assert str(lab.mnt) in [mount["mountpoint"] for mount in everything["mounts"]]
    assert "no image at" in lab.lazyfs("status", lab.mnt / "absent", check=False).stderr


def test_status_table_and_watch(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    pread(lab.mnt / "dense", 0, 64 * KiB)
    table = lab.lazyfs("status", lab.mnt).stdout
    assert re.search(r"dense +1 MiB +\d+ % .* partial", table)
    command = [sys.executable, "-m", "lazyfs", "status", "--watch", str(lab.mnt)]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
    assert watch.stdout is not None
    try:
        assert any("dense" in line for line in iter(watch.stdout.readline, ""))
    finally:
        watch.send_signal(signal.SIGINT)
        assert watch.wait(20) == 130
        watch.stdout.close()


def test_umount_of_a_busy_mount_is_refused(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    lab.mount(lab.serve().uri)
    with (lab.mnt / "dense").open("rb"):
        refused = lab.lazyfs("umount", lab.mnt, check=False)
    assert refused.returncode == 1
    assert "in use" in refused.stderr
    lab.umount()


def test_du_shows_what_is_cached(lab: Lab) -> None:
    lab.image("dense", 2 * MiB)
    lab.mount(lab.serve().uri)
    assert (lab.mnt / "dense").stat().st_blocks == 1, "or `tar --sparse` would take it for zeroes"
    (lab.mnt / "dense").read_bytes()
    lab.wait_for_state("dense", "whole")
    wait_until(lambda: (lab.mnt / "dense").stat().st_blocks * 512 == 2 * MiB, "du is up to date")


def test_the_doctor_looks_at_host_and_mount(lab: Lab) -> None:
    lab.image("dense", MiB)
    server = lab.serve()
    lab.mount(server.uri)
    done = lab.lazyfs("doctor", lab.mnt)
    assert [line.split()[0] for line in done.stdout.splitlines()].count("bad") == 0
    assert re.search(r"^ok +/dev/fuse +can be opened$", done.stdout, re.MULTILINE)
    assert re.search(rf"^ok +repository +{re.escape(server.uri)}$", done.stdout, re.MULTILINE)
    nowhere = lab.lazyfs("doctor", lab.folder, check=False)
    assert nowhere.returncode == 1
    assert re.search(r"^bad +mount +no lazyfs is mounted on ", nowhere.stdout, re.MULTILINE)


def test_status_shows_what_is_asked_for(lab: Lab) -> None:
    for name, size in (("a", MiB), ("b", 3 * MiB), ("c", 2 * MiB)):
        lab.image(name, size)
    lab.mount(lab.serve().uri, "--no-populate")
    lab.lazyfs("prefetch", lab.mnt / "b", "--wait")

    def names(*options: str) -> list[str]:
        text = lab.lazyfs("status", lab.mnt, "--json", *options).stdout
        return [image["name"] for image in json.loads(text)["mounts"][0]["images"]]

    assert names("--state", "whole") == ["b"]
    assert names("--state", "remote", "--sort", "name") == ["a", "c"]
    wait_until(lambda: [(lab.mnt / name).stat() for name in "abc"], "sizes are known")
    assert names("--sort", "size") == ["b", "c", "a"]
