"""Finding mounts in mountinfo, and the names of control sockets."""

import errno
import io
import os
import random
import subprocess
from pathlib import Path

import pytest
import servers

from lazyfs import errors
from lazyfs.cli import mounting
from lazyfs.control import client as control_client
from lazyfs.host import mountinfo as mountinfo_of_lazyfs
from lazyfs.host import mounts
from lazyfs.host.mounts import Mount
from lazyfs.kernel import session

MOUNTINFO = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /run rw,nosuid,nodev shared:5 - tmpfs tmpfs rw,size=1g
41 22 0:45 / /images ro,nosuid,nodev shared:9 - fuse.lazyfs nbd://far rw,user_id=0,group_id=0,allow_other
42 22 0:46 / /other ro - fuse.sshfs nbd://far rw
43 41 0:47 / /images/inner ro,nosuid,nodev - fuse.lazyfs nbd+unix:///?socket=/run/a\040b rw
44 22 0:48 / /with\040space\011tab\134back\012line ro master:3 propagate_from:2 - fuse.lazyfs nbds://far:10809 ro
45 22 0:49 / /images2 ro - fuse.lazyfs nbd://near ro
46 22 0:50 / /twice ro - fuse.lazyfs nbd://below ro
47 46 0:51 / /twice ro - fuse.lazyfs nbd://above ro
48 22 0:52 / /a\040-\040b ro - fuse.lazyfs nbd://dash ro
49 22 0:53 / /lazyfs - fuse.lazyfs
50 22 0:54 / /by\040name ro - fuse fuse.lazyfs rw
"""


@pytest.fixture
def mountinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_open(path: str, mode: str) -> io.BytesIO:
        assert (path, mode) == ("/proc/self/mountinfo", "rb")
        return io.BytesIO(MOUNTINFO.encode())

    monkeypatch.setattr(mountinfo_of_lazyfs, "open", fake_open, raising=False)


@pytest.mark.usefixtures("mountinfo")
def test_the_mounts_of_lazyfs_and_no_others() -> None:
    assert mounts.lazyfs_mounts() == [
        Mount("/images", "nbd://far", "0:45"),
        Mount("/images/inner", "nbd+unix:///?socket=/run/a b", "0:47"),
        Mount("/with space\ttab\\back\nline", "nbds://far:10809", "0:48"),
        Mount("/images2", "nbd://near", "0:49"),
        Mount("/twice", "nbd://below", "0:50"),
        Mount("/twice", "nbd://above", "0:51"),
        Mount("/a - b", "nbd://dash", "0:52"),
    ]


@pytest.mark.usefixtures("mountinfo")
@pytest.mark.parametrize(
    ("path", "repository"),
    [
        ("/images", "nbd://far"),
        ("/images/", "nbd://far"),
        ("/images/debian-12", "nbd://far"),
        ("/images/team/ubuntu", "nbd://far"),
        ("/images/../images/x", "nbd://far"),
        ("/images/inner", "nbd+unix:///?socket=/run/a b"),
        ("/images/inner/x", "nbd+unix:///?socket=/run/a b"),
        ("/images/innermost", "nbd://far"),
        ("/images2/x", "nbd://near"),
        ("/images3", None),
        ("/image", None),
        ("/", None),
        ("/other/x", None),
        ("/twice/x", "nbd://above"),
        ("/with space\ttab\\back\nline/x", "nbds://far:10809"),
        ("/a - b/x", "nbd://dash"),
    ],
)
def test_which_mount_a_path_lies_on(path: str, repository: str | None) -> None:
    found = mounts.mount_of(path)
    assert (found.repository if found else None) == repository


def test_this_machines_mountinfo_can_be_read() -> None:
    assert isinstance(mounts.lazyfs_mounts(), list)


def test_names_that_are_not_utf8_go_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(b"41 22 0:45 / /caf\xe9 ro - fuse.lazyfs nbd://far rw\n")
    monkeypatch.setattr(
        mountinfo_of_lazyfs, "open", lambda *_: io.BytesIO(table.read_bytes()), raising=False
    )
    (found,) = mounts.lazyfs_mounts()
    assert os.fsencode(found.mountpoint) == b"/caf\xe9"
    assert mounts.mount_of(os.fsdecode(b"/caf\xe9/x")) == found
    assert mounts.socket_path(found.mountpoint).endswith("/caf\\xe9.sock")


# -- sockets


@pytest.fixture
def run_folder(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mounts, "runtime_dir", lambda: "/run/lazyfs")
    return "/run/lazyfs"


@pytest.mark.parametrize(
    ("mountpoint", "name"),
    [
        ("/var/lib/imagecache", "var-lib-imagecache"),
        ("/", "-"),
        ("/a-b", "a\\x2db"),
        ("/a/b", "a-b"),
        ("/a//b/", "a-b"),
        ("//a", "a"),
        ("/with space", "with\\x20space"),
        ("/x:y_z.0", "x:y_z.0"),
        ("/ü", "\\xc3\\xbc"),
        ("/.hidden", "\\x2ehidden"),
        ("/a/.hidden", "a-.hidden"),
        ("/back\\slash", "back\\x5cslash"),
        ("/a\nb~", "a\\x0ab\\x7e"),
    ],
)
def test_socket_names(run_folder: str, mountpoint: str, name: str) -> None:
    assert mounts.socket_path(mountpoint) == f"{run_folder}/{name}.sock"


def test_names_are_those_of_systemd_escape(run_folder: str) -> None:
    servers.requires("systemd-escape")
    dice = random.Random(2)
    paths = [
        "/" + "".join(dice.choices("abZ09-_.:/ ü\\%~@", k=12)).strip("/ ") + "x" for _ in range(200)
    ]
    paths = [path for path in paths if os.path.normpath(path) == path]
    assert len(paths) > 50
    done = subprocess.run(
        ["systemd-escape", "--path", "--", *paths], check=True, capture_output=True, text=True
    )
    # It separates its answers by spaces, which it never leaves in one.
    for path, escaped in zip(paths, done.stdout.split(), strict=True):
        assert mounts.socket_path(path) == f"{run_folder}/{escaped}.sock", path


def test_long_mountpoints_get_short_names_of_their_own(run_folder: str) -> None:
    found = set()
    for length in range(60, 400):
        for last in "ab":
            path = mounts.socket_path("/" + "d" * length + last)
            assert len(path) <= 107
            assert path.startswith(f"{run_folder}/ddd")
            found.add(path)
    assert len(found) == 2 * (400 - 60)
    assert any("~" in path for path in found)
    assert any("~" not in path for path in found)


def test_spellings_of_one_mountpoint_have_one_socket(run_folder: str) -> None:
    for path in ("/images", "/" + "long" * 50):
        assert (
            len(
                {
                    mounts.socket_path(spelling)
                    for spelling in (path, path + "/", "/" + path, "/x/.." + path)
                }
            )
            == 1
        )


@pytest.mark.parametrize("length", [60, 85, 95])
def test_a_long_runtime_folder_leaves_room_for_the_hash(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """XDG_RUNTIME_DIR can be anything; when nothing fits, making the socket fails with a
    message."""
    folder = "/" + "r" * (length - 1)
    monkeypatch.setattr(mounts, "runtime_dir", lambda: folder)
    one, two = (mounts.socket_path(f"/images/{name}" * 10) for name in "ab")
    assert one != two
    assert one.startswith(folder + "/")
    if length + len("/~") + 16 + len(".sock") <= 107:
        assert len(one) <= 107


@pytest.mark.parametrize("uid", [0, 1000])
def test_the_folder_of_sockets(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert mounts.runtime_dir() == ("/run/lazyfs" if uid == 0 else "/run/user/1000/lazyfs")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    if uid:
        assert mounts.runtime_dir().startswith("/home/somebody/"), "a folder that is nobody else's"


def test_a_mount_whose_disk_fails_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its statfs is that of the cache's disk, so it fails with the disk."""
    mount = mounts.Mount(str(tmp_path), "nbd://example.com", "0:1")
    monkeypatch.setattr(mounts, "lazyfs_mounts", lambda: [mount])
    monkeypatch.setattr(control_client, "alive", lambda _mount: True)
    monkeypatch.setattr(session, "clear_away", lambda _mount: pytest.fail("it is alive"))

    def fails(_path: str) -> os.statvfs_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "statvfs", fails)
    with pytest.raises(errors.UserError, match=f"cannot use {tmp_path}: Input/output error"):
        mounting._mountpoint(str(tmp_path))
