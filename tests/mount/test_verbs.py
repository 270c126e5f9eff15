"""Each verb that asks a daemon for something: its effect, --json, exit codes, one-line errors."""

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from lab import KiB, Lab, MiB, Nbdkit, die_with_parent, pread, wait_until
from qemu.qmp import ExecuteError, QMPClient

from lazyfs.core import control_schema

SIZE = 2 * MiB
JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "number": (int, float),
    "list": list,
    "object": dict,
}


@pytest.fixture
def server(lab: Lab) -> Nbdkit:
    for name in ("one", "two"):
        lab.image(name, SIZE)
    lab.image("sparse", SIZE, {512 * KiB: os.urandom(256 * KiB)})
    return lab.serve()


def make_whole(lab: Lab, name: str = "one") -> None:
    lab.lazyfs("prefetch", lab.mnt / name, "--wait")


def json_of(lab: Lab, *arguments: str | Path, code: int = 0) -> Any:
    done = lab.lazyfs(*arguments, "--json", check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def refused(lab: Lab, *arguments: str | Path, says: str) -> None:
    done = lab.lazyfs(*arguments, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("lazyfs: ")
    assert says in done.stderr


def cached_blocks(lab: Lab) -> int:
    """Return the 512-byte blocks of all files in the cache, whatever is mounted over it."""
    cache = lab.folder / "cache"
    return sum(
        path.stat().st_blocks
        for path in cache.rglob("*")
        if path.is_file() and "sqlite" not in path.name
    )


# -- the same for all


VERBS = (
    "prefetch",
    "pause",
    "resume",
    "cancel",
    "evict",
    "pin",
    "unpin",
    "verify",
    "forget",
    "map",
)


@pytest.mark.parametrize("verb", [*VERBS, "set-rate"])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    command = [sys.executable, "-m", "lazyfs", verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"example: lazyfs {verb} " in done.stdout
    assert "--json" in done.stdout


def test_every_verb_says_in_one_line_what_is_wrong(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    for verb in VERBS:
        refused(lab, verb, "/proc", says="is not on a lazyfs mount")
        refused(lab, verb, lab.mnt / "absent", says="no image at 'absent'")
    refused(lab, "set-rate", "1M", lab.mnt / "absent", says="no image at 'absent'")
    for wrong in (
        ["evict"],
        ["set-rate", "fast", "x"],
        ["set-rate", "1M"],
        ["prefetch", "--format", "vmdk", "x"],
    ):
        done = lab.lazyfs(*wrong, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    refused(lab, "map", lab.mnt, says="is a mountpoint; name an image on it")
    assert lab.lazyfs("verify", "a", "b", "--digest", "sha256:0", check=False).returncode == 2


def test_one_that_fails_does_not_stop_the_others(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    done = lab.lazyfs("pin", lab.mnt / "absent", lab.mnt / "one", "--json", check=False)
    assert done.returncode == 1
    assert done.stderr == f"lazyfs: {lab.mnt}: no image at 'absent'\n"
    absent, one = json.loads(done.stdout)
    assert absent == {"path": f"{lab.mnt}/absent", "error": f"{lab.mnt}: no image at 'absent'"}
    assert one == {"path": f"{lab.mnt}/one", "images": 1}
    assert lab.image_status("one")["pinned"] is True


def test_a_daemon_that_was_killed_is_one_line(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    lab.kill_daemon()
    refused(lab, "evict", "--all", lab.mnt, says="it was killed; mount again")
    done = lab.lazyfs("status", lab.mnt, check=False)
    assert done.returncode == 1
    assert "it was killed; mount again" in done.stdout


def test_the_65th_client_is_told_why(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    path = lab.status()["control_socket"]
    with ExitStack() as stack:
        for _ in range(64):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(path)
            client.recv(1)  # of the greeting: it is one of those served
        refused(
            lab,
            "pin",
            lab.mnt / "one",
            says="its control socket has as many clients as it takes (64)",
        )
    wait_until(
        lambda: lab.lazyfs("pin", lab.mnt / "one", check=False).returncode == 0, "they have gone"
    )


# -- prefetch and jobs


def test_prefetch_waits_until_whole(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    done = lab.lazyfs("prefetch", lab.mnt / "one", "--wait", "--json")
    assert json.loads(done.stdout) == [{"path": f"{lab.mnt}/one", "images": 1, "paths": ["one"]}]
    assert f"waiting for {lab.mnt}/one" in done.stderr
    assert lab.image_status("one")["state"] == "whole"
    assert lab.image_status("two")["state"] == "remote"
    lab.lazyfs("prefetch", lab.mnt, "--wait")
    assert {image["state"] for image in lab.status()["images"]} == {"whole"}
    assert (lab.mnt / "two").read_bytes() == (lab.repository / "two").read_bytes()


def test_prefetch_in_another_format(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    lab.lazyfs("prefetch", lab.mnt / "sparse", "--format", "qcow2", "--wait")
    assert not (lab.mnt / "sparse").exists()
    compare: list[str | Path] = [
        "qemu-img",
        "compare",
        "-f",
        "qcow2",
        "-F",
        "raw",
        lab.mnt / "sparse.qcow2",
        lab.repository / "sparse",
    ]
    subprocess.run(compare, check=True, timeout=60, capture_output=True)
    refused(
        lab,
        "prefetch",
        lab.mnt / "sparse.qcow2",
        "--format",
        "raw",
        says="is cached as qcow2; evict it first",
    )
    lab.lazyfs("evict", lab.mnt / "sparse.qcow2")
    lab.lazyfs("prefetch", lab.mnt / "sparse.qcow2", "--format", "raw", "--wait")
    assert (lab.mnt / "sparse").read_bytes() == (lab.repository / "sparse").read_bytes()


def test_pause_resume_cancel(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--fill-rate", "64K")
    refused(
        lab, "pause", lab.mnt / "one", says="is not being populated; lazyfs prefetch begins that"
    )
    fds = [os.open(lab.mnt / name, os.O_RDONLY) for name in ("one", "two")]
    try:
        lab.lazyfs("prefetch", lab.mnt / "one", lab.mnt / "two")
        assert json_of(lab, "pause", lab.mnt / "one") == [
            {"path": f"{lab.mnt}/one", "jobs": ["one"]}
        ]
        jobs = {job["id"]: job["status"] for job in lab.status()["jobs"]}
        assert jobs == {"one": "paused", "two": "running"}
        assert re.search(r"one .* paused", lab.lazyfs("status", lab.mnt).stdout)
        # The mountpoint means all: those that are not paused yet.
        everything = {"path": str(lab.mnt), "population": True}
        assert json_of(lab, "pause", lab.mnt) == [{**everything, "jobs": ["two"]}]
        assert json_of(lab, "pause", lab.mnt) == [{**everything, "jobs": []}]
        (shown,) = json_of(lab, "status", lab.mnt / "two")["mounts"]
        assert [job["id"] for job in shown["jobs"]] == ["two"]
        lab.lazyfs("cancel", lab.mnt / "one")
        assert [job["id"] for job in lab.status()["jobs"]] == ["two"]
        lab.lazyfs("resume", lab.mnt)
        lab.lazyfs("set-rate", "0", lab.mnt)
        lab.wait_for_state("two", "whole")
        assert lab.image_status("one")["state"] == "partial"
        assert lab.status()["jobs"] == []
    finally:
        for fd in fds:
            os.close(fd)
    lab.lazyfs("prefetch", lab.mnt / "one", "--wait")


def test_set_rate_is_live(lab: Lab) -> None:
    lab.image("big", 16 * MiB)
    lab.mount(lab.serve().uri, "--fill-rate", "1K")
    lab.lazyfs("prefetch", lab.mnt / "big")
    assert lab.image_status("big")["state"] == "partial"
    assert json_of(lab, "set-rate", "1K", lab.mnt / "big") == [
        {"path": f"{lab.mnt}/big", "images": 1}
    ]
    assert json_of(lab, "set-rate", "1G", lab.mnt) == [{"path": str(lab.mnt), "images": 1}]
    assert lab.image_status("big")["state"] == "partial"
    lab.lazyfs("set-rate", "0", lab.mnt / "big")
    lab.wait_for_state("big", "whole")


# -- evict, pin, forget


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_an_evicted_image_frees_its_room_and_comes_again(
    lab: Lab, server: Nbdkit, format_: str
) -> None:
    lab.mount(server.uri, "--no-populate", "--cache-dir", lab.folder / "cache", "--format", format_)
    path = lab.mnt / ("one" if format_ == "raw" else "one.qcow2")
    make_whole(lab, path.name)
    content = path.read_bytes()
    assert cached_blocks(lab) * 512 >= SIZE
    (done,) = json_of(lab, "evict", path)
    assert (done["images"], done["left"]) == (1, 0)
    assert done["bytes"] >= SIZE
    wait_until(lambda: cached_blocks(lab) * 512 < SIZE // 4, "the room is free")
    assert lab.image_status("one")["state"] == "remote"
    assert path.stat().st_blocks == 1
    assert path.read_bytes() == content


@pytest.mark.parametrize("begun", ["partial", "whole"])
def test_open_files_keep_theirs_until_closed(lab: Lab, server: Nbdkit, begun: str) -> None:
    lab.mount(server.uri, "--no-populate", "--cache-dir", lab.folder / "cache")
    if begun == "whole":
        make_whole(lab)
    content = (lab.repository / "one").read_bytes()
    with (lab.mnt / "one").open("rb", buffering=0) as file:
        assert file.read(MiB) == content[:MiB]
        lab.lazyfs("evict", lab.mnt / "one")
        (now, old) = sorted(
            (i for i in lab.status()["images"] if i["name"] == "one"), key=lambda i: i["replaced"]
        )
        assert (now["state"], now["open_count"], old["replaced"], old["open_count"]) == (
            "remote",
            0,
            True,
            1,
        )
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), SIZE, 0) == content
        assert (lab.mnt / "one").read_bytes() == content  # a new open, a new cache
    wait_until(lambda: len(lab.status()["images"]) == 3, "the old one is forgotten")
    assert lab.image_status("one")["state"] in ("partial", "whole")


def test_evict_of_a_folder_leaves_pinned_images(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    lab.lazyfs("prefetch", lab.mnt, "--wait")
    assert json_of(lab, "pin", lab.mnt / "one", lab.mnt / "two")[1] == {
        "path": f"{lab.mnt}/two",
        "images": 1,
    }
    refused(lab, "evict", lab.mnt / "one", says="one is pinned; lazyfs unpin it first")
    (done,) = json_of(lab, "evict", "--all", lab.mnt)
    assert (done["images"], done["left"]) == (1, 2)
    states = {image["name"]: image["state"] for image in lab.status()["images"]}
    assert states == {"one": "whole", "two": "whole", "sparse": "remote"}
    lab.umount()
    lab.mount(server.uri, "--no-populate")
    assert lab.image_status("one")["pinned"] is True
    lab.lazyfs("unpin", lab.mnt)
    lab.lazyfs("evict", "--all", lab.mnt)
    assert {image["state"] for image in lab.status()["images"]} == {"remote"}


def test_readers_do_not_notice_evictions(lab: Lab, server: Nbdkit) -> None:
    """Reads are in this process, evictions in others, and population goes on between them."""
    lab.mount(server.uri)
    content = (lab.repository / "one").read_bytes()
    command = [sys.executable, "-m", "lazyfs", "evict", str(lab.mnt / "one")]
    for _ in range(5):
        evicting = subprocess.Popen(command, preexec_fn=die_with_parent)
        reads = 0
        while evicting.poll() is None or reads < 20:
            assert (lab.mnt / "one").read_bytes() == content
            reads += 1
        assert evicting.wait(60) == 0
    lab.wait_for_state("one", "whole")


def test_forget_what_is_gone(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate", "--refresh", "0.2")
    lab.lazyfs("prefetch", lab.mnt, "--wait")
    refused(
        lab,
        "forget",
        lab.mnt / "one",
        says="one is in the repository; evict drops what is cached of it",
    )
    (lab.repository / "one").unlink()
    wait_until(
        lambda: "not in the repository" in lab.image_status("one")["error"],
        "it is known to be gone",
    )
    with (lab.mnt / "one").open("rb"):
        refused(lab, "forget", lab.mnt / "one", says="one is open")
    wait_until(lambda: lab.image_status("one")["open_count"] == 0, "it is closed")
    assert json_of(lab, "forget", lab.mnt) == [{"path": str(lab.mnt), "images": 1}]
    assert sorted(os.listdir(lab.mnt)) == ["sparse", "two"]
    lab.umount()
    assert not (lab.mnt / "one").exists()
    assert (lab.mnt / "two").exists()


# -- map


def test_map_against_qemu_img_and_the_disk(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    (lab.mnt / "sparse").stat()
    assert json_of(lab, "map", lab.mnt / "sparse") == [
        {"start": 0, "length": SIZE, "present": False, "zero": False, "data": False}
    ]
    pread(lab.mnt / "sparse", 576 * KiB, 4 * KiB)
    strip, sums = lab.lazyfs("map", lab.mnt / "sparse").stdout.splitlines()
    assert len(strip) == 80
    assert "█" in strip
    assert sums.startswith("2 MiB: █ data ")
    make_whole(lab, "sparse")
    ours = json_of(lab, "map", lab.mnt / "sparse")
    assert [(e["start"], e["length"], e["data"], e["zero"]) for e in ours] == [
        (0, 512 * KiB, False, True), (512 * KiB, 256 * KiB, True, False), (768 * KiB, SIZE - 768 * KiB, False, True),
    ]  # fmt: skip
    lab.umount()
    command: list[str | Path] = [
        "qemu-img",
        "map",
        "--output=json",
        "-f",
        "raw",
        lab.mnt / "sparse",
    ]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    keys = ("start", "length", "present", "zero", "data")
    assert [{key: entry[key] for key in keys} for entry in theirs] == ours


def test_map_of_a_qcow2_is_of_the_disk_in_it(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate", "--format", "qcow2")
    make_whole(lab, "sparse.qcow2")
    ours = json_of(lab, "map", lab.mnt / "sparse.qcow2")
    assert [(e["start"], e["length"]) for e in ours if e["data"]] == [(512 * KiB, 256 * KiB)]
    assert sum(e["length"] for e in ours) == SIZE


# -- verify


def damage(path: Path, offset: int) -> None:
    """Flip a byte of a plain file from outside lazyfs."""
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), offset)


def test_a_damaged_plain_file_is_found_and_fetched_again(lab: Lab, server: Nbdkit) -> None:
    content = (lab.repository / "one").read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    lab.mount(server.uri, "--no-populate", "--cache-dir", lab.folder / "cache")
    make_whole(lab)
    make_whole(lab, "two")
    done = lab.lazyfs("verify", lab.mnt / "one", "--digest", digest)
    assert done.stdout == f"{lab.mnt}/one: as it should be\n"
    damage(lab.folder / "cache" / "one", 1234567)
    refused(lab, "verify", lab.mnt / "one", says="the cache is damaged: its digest is sha256:")
    assert lab.image_status("one")["state"] == "remote"
    assert (lab.mnt / "one").read_bytes() == content
    make_whole(lab)
    # The digest is still known; one that fails does not stop the others.
    assert json_of(lab, "verify", lab.mnt) == [{"path": str(lab.mnt), "images": 2}]
    damage(lab.folder / "cache" / "one", 5)
    done = lab.lazyfs("verify", lab.mnt, "--against-repository", check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "differs from the repository at bytes 0 to 1048576; it is kept" in done.stderr
    assert done.stdout == f"{lab.mnt}/two: as it should be\n"
    assert lab.status()["jobs"] == [], "each was dismissed"
    assert lab.image_status("one")["state"] == "whole"
    done = lab.lazyfs("verify", lab.mnt / "one", "--against-repository", "--drop", check=False)
    assert done.returncode == 1
    assert "; dropped, to be fetched again" in done.stderr
    assert lab.image_status("one")["state"] == "remote"
    done = lab.lazyfs("verify", lab.mnt / "one", "--drop", check=False)
    assert (done.returncode, done.stderr) == (2, "lazyfs: --drop needs --against-repository\n")


def test_a_verification_is_cancelled(lab: Lab) -> None:
    lab.image("one", 32 * MiB)
    rate = lab.folder / "rate"
    lab.mount(lab.serve("rate", parameters=(f"rate-file={rate}",)).uri, "--no-populate")
    make_whole(lab)
    rate.write_text("1M\n")
    command = [
        sys.executable,
        "-m",
        "lazyfs",
        "verify",
        str(lab.mnt / "one"),
        "--against-repository",
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as verify:
        wait_until(lambda: lab.status()["jobs"] != [], "the job has begun")
        lab.lazyfs("cancel", lab.mnt / "one")
        _, complaint = verify.communicate(timeout=30)
    assert (verify.returncode, complaint) == (1, f"lazyfs: {lab.mnt}/one: cancelled\n")
    assert lab.image_status("one")["state"] == "whole"


def test_verify_of_partial_remote_and_qcow2_images(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate", "--format", "qcow2")
    refused(lab, "verify", lab.mnt / "one.qcow2", says="nothing of one.qcow2 is cached")
    assert json_of(lab, "verify", lab.mnt) == [{"path": str(lab.mnt), "images": 0}]
    pread(lab.mnt / "one.qcow2", MiB, 64 * KiB)
    lab.lazyfs("verify", lab.mnt / "one.qcow2", "--against-repository")
    wrong = "sha256:" + "0" * 64
    done = lab.lazyfs("verify", lab.mnt / "one.qcow2", "--digest", "sha256:12", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is not a digest such as" in done.stderr
    make_whole(lab, "two.qcow2")
    good = f"sha512:{hashlib.sha512((lab.repository / 'two').read_bytes()).hexdigest()}"
    lab.lazyfs("verify", lab.mnt / "two.qcow2", "--digest", good, "--against-repository")
    refused(lab, "verify", lab.mnt / "two.qcow2", "--digest", wrong, says=f"not {wrong}")


# -- status


def test_status_watch_shows_what_changes(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    command = [sys.executable, "-m", "lazyfs", "status", "--watch", str(lab.mnt)]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
    assert watch.stdout is not None
    try:
        lines = iter(watch.stdout.readline, "")
        assert any(re.search(r"disk .* free of ", line) for line in lines)
        assert any("sparse" in line for line in lines)  # it listens before it draws
        lab.lazyfs("prefetch", lab.mnt / "one")
        assert any(re.search(r"\d\d:\d\d:\d\d one: whole$", line) for line in lines)
        lab.lazyfs("evict", lab.mnt / "one")
        assert any(re.search(r"\d\d:\d\d:\d\d one: remote$", line) for line in lines)
    finally:
        watch.send_signal(signal.SIGINT)
        assert watch.wait(20) == 130
        watch.stdout.close()


def test_status_watch_of_nothing_is_one_line(lab: Lab, server: Nbdkit) -> None:
    refused(lab, "status", "--watch", lab.mnt, says="is not on a lazyfs mount")


# -- the schema


def test_every_answer_of_a_daemon_is_what_its_schema_says(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    make_whole(lab)
    pread(lab.mnt / "two", 0, 4 * KiB)
    arguments: dict[str, dict[str, Any]] = {
        "job-pause": {"id": "two"}, "job-resume": {"id": "two"}, "job-cancel": {"id": "verify:one"},
        "job-dismiss": {"id": "verify:one"}, "prefetch": {"path": "two"}, "set-rate": {"path": "", "rate": 1},
        "evict": {"path": "one"}, "pin": {"path": "two"}, "unpin": {"path": "two"}, "forget": {"path": ""},
        "query-map": {"path": "two"}, "verify": {"path": "one"},
    }  # fmt: skip
    may_be_too_late = {"job-cancel", "job-pause", "job-resume"}
    order = ["set-rate", "prefetch", "query-map", "verify", "job-cancel", "job-dismiss"]
    names = [
        command.name
        for command in control_schema.COMMANDS
        if command.name not in (*order, "upgrade")  # which ends the connection
    ]
    events: list[dict[str, Any]] = []

    async def ask() -> dict[str, Any]:
        client = QMPClient("test")
        answers: dict[str, Any] = {}
        async with asyncio.timeout(60):
            await client.connect(lab.status()["control_socket"])
            try:
                with client.listener() as listener:
                    for name in [*order, *names]:
                        if name == "qmp_capabilities":
                            continue
                        while name == "job-dismiss":
                            listed: Any = await client.execute("query-jobs")
                            jobs = {job["id"]: job for job in listed}
                            if jobs["verify:one"]["status"] == "concluded":
                                break
                        try:
                            answers[name] = await client.execute(name, arguments.get(name, {}))
                        except ExecuteError:
                            assert name in may_be_too_late, name
                    while not listener.empty():
                        events.append(dict(await listener.get()))
            finally:
                with suppress(EOFError):  # the daemon was faster
                    await client.disconnect()
        return answers

    answers = asyncio.run(ask())
    assert answers.keys() >= {c.name for c in control_schema.COMMANDS} - may_be_too_late - {
        "upgrade",
        "qmp_capabilities",
    }
    for command in control_schema.COMMANDS:
        if command.name in answers:
            answer = answers[command.name]
            for row in answer if command.returns_list else [answer]:
                # Of query-qmp-schema the common members alone are declared, as in QEMU's own.
                check_fields(
                    command.name, command.returns, row, open_=command.name == "query-qmp-schema"
                )
    declared = {event.name: event for event in control_schema.EVENTS}
    assert {event["event"] for event in events} == set(declared)
    for event in events:
        check_fields(event["event"], declared[event["event"]].data, event["data"])
    # After `detach` with no file open it ends.
    assert lab.daemon is not None
    assert lab.daemon.wait(60) == 0
    lab.daemon = None


def check_fields(
    what: str, fields: tuple[control_schema.Field, ...], row: dict[str, Any], open_: bool = False
) -> None:
    known = {field.name: field for field in fields}
    assert open_ or row.keys() <= known.keys(), (what, row.keys() - known.keys())
    for name, field in known.items():
        if name not in row:
            assert field.optional, (what, name)
        elif row[name] is None:
            assert field.nullable, (what, name)
        else:
            assert isinstance(row[name], JSON_TYPES[field.type]), (what, name, row[name])
            assert isinstance(row[name], bool) == (field.type == "bool"), (what, name, row[name])


def test_verbs_say_what_they_did(lab: Lab, server: Nbdkit) -> None:
    lab.mount(server.uri, "--no-populate")
    make_whole(lab)
    make_whole(lab, "two")
    assert lab.lazyfs("pin", lab.mnt / "two").stdout == f"{lab.mnt}/two: 1 image pinned\n"
    refused(lab, "evict", lab.mnt, says="evict --all drops what is cached of all of them")
    said = lab.lazyfs("evict", "--all", "--dry-run", lab.mnt).stdout
    assert "1 image would be evicted, " in said
    assert lab.image_status("one")["state"] == "whole"
    said = lab.lazyfs("evict", "--all", lab.mnt).stdout
    assert re.fullmatch(
        rf"{lab.mnt}: 1 image evicted, [0-9.]+ MiB freed, "
        r"1 left \(pinned, backing files, or gone\)\n",
        said,
    )
    refused(lab, "pin", "", says="an image has an empty name")


def test_a_wait_says_why_nothing_moves_and_ends(lab: Lab) -> None:
    lab.image("big", 32 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--fill-rate", "64K")
    lab.lazyfs("prefetch", lab.mnt / "big")
    lab.lazyfs("pause", lab.mnt / "big")
    done = lab.lazyfs("prefetch", lab.mnt / "big", "--wait", "--timeout", "7", check=False)
    assert done.returncode == 1
    assert "nothing moves: paused\n" in done.stderr
    assert "1 of the images are not whole after 7 s: paused" in done.stderr


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("prefech", "x"), "did you mean prefetch?"),
        (("evict", "--dry-runn", "x"), "did you mean --dry-run?"),
        (("set-rate", "50", "x"), "50 is 50 bytes per second; write 50M for MiB"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(
    lab: Lab, words: tuple[str, ...], meant: str
) -> None:
    done = lab.lazyfs(*words, check=False)
    assert done.returncode == 2
    assert meant in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["cancel", "evict"])
def test_prefetch_does_not_wait_for_what_somebody_has_ended(lab: Lab, verb: str) -> None:
    lab.image("one", 32 * MiB)
    lab.mount(lab.serve().uri, "--fill-rate", "1M")
    waits = subprocess.Popen(
        [sys.executable, "-m", "lazyfs", "prefetch", "--wait", lab.mnt / "one"],
        stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    with waits:
        assert waits.stderr is not None
        assert "waiting for" in waits.stderr.readline()
        wait_until(lambda: lab.status()["jobs"], "it is populated")
        lab.lazyfs(verb, lab.mnt / "one")
        assert "is not being populated any more" in waits.stderr.read()
        assert waits.wait(60) == 1
