"""What `lazyfs mount` tells its user although it mounts, and what it refuses by name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import servers
from lab import KiB, Lab, Nbdkit, die_with_parent, wait_until

BLOCK = 64 * KiB
NOBODY = 65534


def test_a_mount_of_a_lost_repository_says_what_is_shown(lab: Lab) -> None:
    lab.image("one", BLOCK)
    server = lab.serve()
    lab.mount(server.uri)
    assert lab.notes == []
    lab.umount()
    server.kill()
    lab.mount(server.uri)
    (note,) = lab.notes
    assert "no connection to" in note
    assert note.endswith("; the images that are known from before are shown")


def test_the_user_sees_the_notes_of_a_mount_in_the_background(lab: Lab) -> None:
    lab.image("one", BLOCK)
    server = lab.serve()
    done = lab.lazyfs("mount", server.uri, lab.mnt, "--log-file", lab.log)
    assert done.stderr == ""
    lab.lazyfs("umount", lab.mnt)
    done = lab.lazyfs("mount", server.uri, lab.mnt, "--names", "sha1", "--log-file", lab.log)
    lab.lazyfs("umount", lab.mnt)
    assert re.fullmatch(
        r"lazyfs: --names sha1 is for images new to this cache: 1 .*\n", done.stderr
    )


def test_options_that_come_too_late_for_known_images_say_so(lab: Lab) -> None:
    lab.image("one", BLOCK)
    server = lab.serve()
    lab.mount(server.uri)
    lab.umount()
    lab.mount(server.uri, "--format", "qcow2")
    (note,) = lab.notes
    assert "--format qcow2 is for images new to this cache: 1 known" in note
    assert (lab.mnt / "one").exists()
    lab.lazyfs("prefetch", "--format", "qcow2", lab.mnt / "one")
    lab.umount()
    lab.mount(server.uri, "--format", "qcow2")
    assert lab.notes == []


def test_a_server_of_a_single_nameless_export_gets_a_hint(lab: Lab) -> None:
    server = lab.serve_with("file", str(lab.image("disk", BLOCK)))
    lab.mount(server.uri)
    (note,) = lab.notes
    assert "a single export without a name, shown as %00" in note
    assert [path.name for path in lab.mnt.iterdir()] == ["%00"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("tls-certificates={0}/nothing", "cannot read {0}/nothing/ca-cert.pem"),
        ("tls-certificates={0}", "cannot read {0}/ca-cert.pem"),
        ("tls-certificate={0}", "parameter 'tls-certificate'"),
        ("", "needs either tls-certificates=FOLDER"),
    ],
)
def test_a_mount_that_cannot_tell_the_server_from_another_is_refused(
    lab: Lab, query: str, said: str
) -> None:
    """Also if the images are known from before."""
    lab.image("one", BLOCK)
    server = lab.serve()
    lab.mount(server.uri)
    lab.umount()
    done = lab.lazyfs(
        "mount", f"nbds://localhost/?{query.format(lab.folder)}", lab.mnt, check=False
    )
    assert done.returncode in (1, 2)
    assert said.format(lab.folder) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_socket_that_one_may_not_use_is_named_as_that(lab: Lab) -> None:
    """It is not "unreachable": the server is there."""
    servers.requires("setpriv")
    lab.image("one", BLOCK)
    server = lab.serve()
    server.socket.chmod(0o600)
    for folder in (lab.folder, *lab.folder.parents):
        if folder.stat().st_mode & 0o005 != 0o005 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    lab.mnt.chmod(0o777)
    done = as_nobody("mount", server.uri, lab.mnt, home=lab.folder)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr


def as_nobody(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "env",
        f"HOME={home}",
        f"XDG_RUNTIME_DIR={home}",
        sys.executable,
        "-m",
        "lazyfs",
        *map(str, arguments),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, preexec_fn=die_with_parent
    )


def test_another_user_is_told_that_the_mount_is_not_theirs(lab: Lab) -> None:
    servers.requires("setpriv")
    lab.image("one", BLOCK)
    lab.mount(lab.serve().uri)
    wait_until(lambda: lab.status()["images"], "it lists")
    for verb in (("status",), ("evict", "--all"), ("detach",)):
        done = as_nobody(*verb, lab.mnt, home=lab.folder)
        assert done.returncode == 1, verb
        assert "was mounted by root (uid 0), and only that user" in done.stdout + done.stderr
    assert as_nobody("status", home=lab.folder).returncode == 0, "it was not asked for"


def test_a_cache_that_was_filled_over_tls_and_goes_on_without_says_so(lab: Lab) -> None:
    lab.image("one", BLOCK)
    keys = lab.folder / "keys.psk"
    keys.write_text("alice:0123456789abcdef\n")
    secure = lab.serve_with("--tls=require", f"--tls-psk={keys}", "file", f"dir={lab.repository}")
    uri = f"nbds+unix://alice@/?socket={secure.socket}&tls-psk-file={keys}"
    lab.mount(uri)
    assert lab.notes == []
    lab.lazyfs("prefetch", lab.mnt / "one", "--wait")
    lab.umount()
    secure.kill()
    plain = Nbdkit(secure.socket, "file", f"dir={lab.repository}", log=lab.folder / "plain.log")
    try:
        for _ in range(2):
            lab.mount(plain.uri)
            (note,) = lab.notes
            assert "filled over TLS" in note
            lab.umount()
    finally:
        plain.stop()
