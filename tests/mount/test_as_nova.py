"""A mount used as OpenStack Nova uses its base directory: touched, measured, and files removed to
make room."""

import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lab import KiB, Lab, MiB, pread, wait_until

PYTHON = "/usr/bin/python3"  # other users cannot look into the environment's
NOBODY = 65534


def in_mount(lab: Lab, script: str, user: int = 0) -> Any:
    """Run Python in the mount as any user, and return what it prints."""
    command = [PYTHON, "-I", "-c", script]
    done = subprocess.run(
        command,
        cwd=lab.mnt,
        user=user,
        group=user,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def team(lab: Lab) -> str:
    """Serve an image in a folder, which nbdkit's file plugin cannot do, and return the URI."""
    names = lab.folder / "names"
    names.write_text("plain\nteam/disk\n")
    return lab.serve_with("eval", f"list_exports=cat {names}", "get_size=echo 4194304",
                          "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none").uri  # fmt: skip


# -- utime


def test_utime_is_the_last_use_and_nothing_else(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB).read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    disk = lab.mnt / "disk"
    shown = disk.stat()
    assert lab.image_status("disk")["last_used_ns"] == 0
    before = time.time_ns() - 10**8  # the kernel's clock for files ticks every few milliseconds
    os.utime(disk)
    assert before <= lab.image_status("disk")["last_used_ns"] <= time.time_ns()
    assert (lab.image_status("disk")["state"], lab.image_status("disk")["requests"]) == (
        "remote",
        0,
    )

    subprocess.run(["touch", "-c", "-d", "2001-02-03 04:05:06 UTC", disk], check=True)
    assert lab.image_status("disk")["last_used_ns"] == 981173106 * 10**9
    subprocess.run(["touch", "-a", disk], check=True)
    assert before <= lab.image_status("disk")["last_used_ns"]
    os.utime(disk, (time.time() + 10**6, time.time() + 10**6))
    assert lab.image_status("disk")["last_used_ns"] <= time.time_ns(), (
        "nobody used it in the future"
    )
    os.utime(disk, ns=(5, 7))
    assert lab.image_status("disk")["last_used_ns"] == 7

    with disk.open("rb") as file:
        os.utime(file.fileno())
        after = os.fstat(file.fileno())
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_ino) == (
        shown.st_mtime_ns,
        shown.st_ctime_ns,
        shown.st_ino,
    )
    assert disk.read_bytes() == source
    os.utime(disk, ns=(5, 10**18))
    lab.wait_for_state("disk", "whole")
    os.utime(disk, ns=(5, 10**18))
    lab.kill_daemon()
    lab.mount(server.uri, "--no-populate")
    assert lab.image_status("disk")["last_used_ns"] == 10**18, "at once, not at the next checkpoint"
    assert disk.stat().st_mtime_ns == shown.st_mtime_ns


def test_utime_leaves_the_page_cache_alone(lab: Lab) -> None:
    source = lab.image("disk", 1 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--no-populate", "--no-passthrough")
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    assert os.pread(fd, 128 * KiB, 0) == source[: 128 * KiB]
    os.utime(lab.mnt / "disk")
    assert lab.daemon is not None
    lab.signal_daemon(signal.SIGSTOP)
    try:
        assert os.pread(fd, 128 * KiB, 0) == source[: 128 * KiB]
    finally:
        lab.signal_daemon(signal.SIGCONT)
    os.close(fd)


def test_utime_needs_no_more_and_no_less_than_on_any_file(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--uid", "1234", "--gid", "1234")
    script = """
import errno, json, os
def attempt(*times):
    try:
        os.utime("disk", *times)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
print(json.dumps([attempt(None), attempt((1, 2))]))
"""
    assert in_mount(lab, script, user=1234) == ["ok", "ok"]
    assert in_mount(lab, script, user=NOBODY) == ["EACCES", "EPERM"]
    assert in_mount(lab, script, user=0) == ["ok", "ok"]


# -- everything else

CHANGES = """
import ctypes, errno, fcntl, json, os, socket, stat, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result:
        raise OSError(ctypes.get_errno(), "")
def ioctl(name):
    fd = os.open(name, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x40086602, struct.pack("l", 0x10))  # FS_IOC_SETFLAGS: immutable
    finally:
        os.close(fd)
def bind():
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("new")
attempts = {
    "open for writing": lambda: os.open("plain", os.O_WRONLY),
    "open for both": lambda: os.open("plain", os.O_RDWR),
    "open to append": lambda: os.open("plain", os.O_WRONLY | os.O_APPEND),
    "open and truncate": lambda: os.open("plain", os.O_RDWR | os.O_TRUNC),
    "open for reading and truncate": lambda: os.open("plain", os.O_RDONLY | os.O_TRUNC),
    "open, direct": lambda: os.open("plain", os.O_RDWR | os.O_DIRECT),
    "create": lambda: os.open("new", os.O_RDWR | os.O_CREAT),
    "create exclusively": lambda: os.open("new", os.O_WRONLY | os.O_CREAT | os.O_EXCL),
    "create for reading": lambda: os.open("new", os.O_RDONLY | os.O_CREAT),
    "create in a folder": lambda: os.open("team/new", os.O_RDWR | os.O_CREAT),
    "truncate": lambda: os.truncate("plain", 0),
    "extend": lambda: os.truncate("plain", 1 << 20),
    "chmod": lambda: os.chmod("plain", 0o666),
    "chmod to what it is": lambda: os.chmod("plain", 0o444),
    "chmod of a folder": lambda: os.chmod("team", 0o777),
    "chown": lambda: os.chown("plain", 1, 1),
    "chown of a folder": lambda: os.chown("team", 1, 1),
    "utime of a folder": lambda: os.utime("team"),
    "utime of the root": lambda: os.utime("."),
    "mkdir": lambda: os.mkdir("new"),
    "rmdir": lambda: os.rmdir("team"),
    "symlink": lambda: os.symlink("plain", "new"),
    "link": lambda: os.link("plain", "new"),
    "rename": lambda: os.rename("plain", "new"),
    "rename over": lambda: os.rename("plain", "team/disk"),
    "rename of a folder": lambda: os.rename("team", "new"),
    "exchange": lambda: call(libc.renameat2(-100, b"plain", -100, b"team/disk", 2)),
    "mkfifo": lambda: os.mkfifo("new"),
    "mknod": lambda: os.mknod("new", stat.S_IFREG | 0o600),
    "mknod of a device": lambda: os.mknod("new", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "bind": bind,
    "setxattr": lambda: os.setxattr("plain", "user.mine", b"1"),
    "setxattr of ours": lambda: os.setxattr("plain", "user.lazyfs.state", b"whole"),
    "setxattr of a folder": lambda: os.setxattr("team", "user.mine", b"1"),
    "setxattr, trusted": lambda: os.setxattr("plain", "trusted.mine", b"1"),
    "setxattr, security": lambda: os.setxattr("plain", "security.mine", b"1"),
    "removexattr": lambda: os.removexattr("plain", "user.lazyfs.state"),
    "unlink": lambda: os.unlink("plain"),
    "unlink in a folder": lambda: os.unlink("team/disk"),
    "chattr": lambda: ioctl("plain"),
    "a nameless file": lambda: os.open(".", os.O_RDWR | os.O_TMPFILE),
}
found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "ok"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
print(json.dumps(found))
"""

NEVER_ASKED = {"chattr": {"ENOTTY", "ENOTSUP"}, "a nameless file": {"ENOTSUP"}}
"""Changes that libfuse cannot pass on, so the kernel itself says that they are not supported."""


def look(lab: Lab, length: int) -> list[tuple[object, ...]]:
    """Return what must not change of the two images of `team`."""
    found: list[tuple[object, ...]] = []
    for name in ("plain", "team/disk"):
        assert pread(lab.mnt / name, 0, length) == bytes(length)
        s = (lab.mnt / name).stat()
        found.append(
            (
                s.st_mode,
                s.st_uid,
                s.st_gid,
                s.st_size,
                s.st_nlink,
                s.st_ino,
                s.st_mtime_ns,
                s.st_ctime_ns,
            )
        )
    return found


@pytest.mark.parametrize("options", [(), ("--allow-evict",)], ids=["as it is", "--allow-evict"])
@pytest.mark.parametrize("whole", [False, True], ids=["partial", "whole"])
def test_every_other_change_is_refused(lab: Lab, options: tuple[str, ...], whole: bool) -> None:
    uri = team(lab)
    if whole:
        lab.mount(uri)
        look(lab, 4 * MiB)
        lab.wait_for_state("plain", "whole")
        lab.wait_for_state("team/disk", "whole")
        lab.umount()
    lab.mount(uri, "--no-populate", *options)
    before = look(lab, 64 * KiB)
    assert {image["state"] for image in lab.status()["images"]} == {"whole" if whole else "partial"}
    as_root = in_mount(lab, CHANGES)
    expected: dict[str, set[str]] = {name: NEVER_ASKED.get(name, {"EROFS"}) for name in as_root}
    if options:
        expected["unlink"] = expected["unlink in a folder"] = {"ok"}
    assert {name: got for name, got in as_root.items() if got not in expected[name]} == {}
    after = look(lab, 64 * KiB)
    assert after == before or options
    assert sorted(os.listdir(lab.mnt)) == ["plain", "team"]

    as_other = in_mount(lab, CHANGES, user=NOBODY)
    refusals = {"EROFS", "EACCES", "EPERM", "ENOTTY", "ENOTSUP"}
    assert {name: got for name, got in as_other.items() if got not in refusals} == {}
    assert sorted(os.listdir(lab.mnt)) == ["plain", "team"]


def test_an_owner_who_is_not_root_is_refused_as_well(lab: Lab) -> None:
    lab.mount(team(lab), "--uid", "1234", "--gid", "1234", "--mode", "0666", "--no-populate")
    found = in_mount(lab, CHANGES, user=1234)
    for name in ("chmod", "truncate", "create", "unlink", "setxattr", "rename", "open for both"):
        assert found[name] in ("EROFS", "EACCES"), name
    assert found["chmod"] == "EROFS"
    assert "ok" not in found.values()


def test_an_admin_can_have_it_read_only_for_the_kernel_too(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--allow-evict")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    subprocess.run(["mount", "-i", "-o", "remount,ro", lab.mnt], check=True)
    for change in (os.utime, os.unlink):
        with pytest.raises(OSError, match="Read-only"):
            change(lab.mnt / "disk")
    fd = os.open(lab.mnt / "disk", os.O_RDONLY)
    os.fstat(fd)
    assert lab.daemon is not None
    lab.signal_daemon(signal.SIGSTOP)
    try:
        os.pread(fd, 4096, 0)
        assert os.fstat(fd).st_size == 1 * MiB, (
            "after a read, too, the kernel need not ask for the attributes"
        )
    finally:
        lab.signal_daemon(signal.SIGCONT)
    os.close(fd)


# -- unlink


def test_unlink_is_refused_without_allow_evict(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    pread(lab.mnt / "disk", 0, 64 * KiB)
    with pytest.raises(OSError, match="Read-only") as refusal:
        os.unlink(lab.mnt / "disk")
    assert refusal.value.errno == errno.EROFS
    assert lab.image_status("disk")["state"] == "partial"


@pytest.mark.parametrize("state", ["remote", "partial", "whole"])
def test_unlink_evicts(lab: Lab, state: str) -> None:
    source = lab.image("disk", 1 * MiB).read_bytes()
    cache = lab.folder / "cache"
    lab.mount(lab.serve().uri, "--cache-dir", cache, "--no-populate", "--allow-evict")
    disk = lab.mnt / "disk"
    if state == "partial":
        pread(disk, 0, 64 * KiB)
    elif state == "whole":
        assert disk.read_bytes() == source
        lab.wait_for_state("disk", "whole")
    fd = os.open(disk, os.O_RDONLY) if state != "remote" else -1
    old = disk.stat()
    os.unlink(disk)
    # The export is still there, so its name is, too: an image of which nothing is cached.
    new = disk.stat()
    assert (new.st_size, new.st_blocks, new.st_nlink) == (1 * MiB, 1, 1)
    assert (new.st_ino == old.st_ino) == (state == "remote")
    assert [i["state"] for i in lab.status()["images"] if not i["replaced"]] == ["remote"]
    assert [p.name for p in cache.iterdir()] == [".lazyfs"]
    assert list((cache / ".lazyfs/partial").iterdir()) == []
    if fd >= 0:
        # Who has it open goes on, as with every unlinked file.
        assert os.fstat(fd).st_ino == old.st_ino
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 2 * MiB, 0) == source
        os.close(fd)
    assert disk.read_bytes() == source
    assert lab.image_status("disk")["state"] in ("partial", "whole")
    assert disk.stat().st_ino != old.st_ino or state == "remote"
    os.unlink(disk)
    subprocess.run(["rm", "-f", disk], check=True)
    lab.umount()
    assert [p.name for p in cache.iterdir()] == [".lazyfs"]


def test_what_must_stay_is_not_unlinked(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--allow-evict", "--no-populate")
    pread(lab.mnt / "disk", 0, 64 * KiB)
    lab.lazyfs("pin", lab.mnt / "disk")
    with pytest.raises(PermissionError):
        os.unlink(lab.mnt / "disk")
    removed = subprocess.run(
        ["rm", "-f", lab.mnt / "disk"], capture_output=True, text=True, check=False
    )
    assert removed.returncode == 1
    assert "Operation not permitted" in removed.stderr
    assert lab.image_status("disk")["present_bytes"] >= 64 * KiB
    lab.lazyfs("unpin", lab.mnt / "disk")
    os.unlink(lab.mnt / "disk")
    with pytest.raises(FileNotFoundError):
        os.unlink(lab.mnt / "absent")


def test_the_backing_file_of_an_overlay_is_not_unlinked(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    overlays = lab.folder / "vms"
    overlays.mkdir()
    overlay = overlays / "vm.qcow2"
    lab.mount(lab.serve().uri, "--allow-evict", "--overlays", overlays)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", lab.mnt / "disk", "-F", "raw", overlay],
        check=True,
    )
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    with pytest.raises(OSError, match="busy") as refusal:
        os.unlink(lab.mnt / "disk")
    assert refusal.value.errno == errno.EBUSY
    assert lab.image_status("disk")["state"] == "whole"
    overlay.unlink()
    os.unlink(lab.mnt / "disk")
    assert lab.image_status("disk")["state"] == "remote"


def test_rm_rf_of_everything_evicts_everything(lab: Lab) -> None:
    lab.mount(team(lab), "--allow-evict")
    look(lab, 4 * MiB)
    lab.wait_for_state("plain", "whole")
    lab.wait_for_state("team/disk", "whole")
    done = subprocess.run(
        ["rm", "-rf", lab.mnt / "plain", lab.mnt / "team"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "team" in done.stderr, "a folder stays"
    assert [image["state"] for image in lab.status()["images"]] == ["remote", "remote"]
    look(lab, 4 * MiB)


def test_unlinking_under_readers_shows_no_wrong_byte_and_hangs_nobody(lab: Lab) -> None:
    source = lab.image("disk", 2 * MiB).read_bytes()
    lab.mount(lab.serve().uri, "--allow-evict")
    stop = threading.Event()
    wrong: list[object] = []
    rounds = [0] * 4

    def read(reader: int) -> None:
        while not stop.is_set():
            offset = random.randrange(2 * MiB)
            try:
                got = pread(lab.mnt / "disk", offset, 64 * KiB)
            except FileNotFoundError:
                continue  # between the unlink and the next lookup, as on any file system
            except OSError as error:
                wrong.append(error)
                return
            if got != source[offset : offset + 64 * KiB]:
                wrong.append(offset)
            rounds[reader] += 1

    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(4)]
    for reader in readers:
        reader.start()
    inodes = set()
    for _ in range(20):
        seen = list(rounds)
        wait_until(
            lambda seen=seen: (
                wrong or all(now > then for now, then in zip(rounds, seen, strict=True))
            ),  # type: ignore[misc]
            "all have read once more",
        )
        os.unlink(lab.mnt / "disk")
        inodes.add(os.stat(lab.mnt / "disk").st_ino)
    stop.set()
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    assert wrong == []
    assert len(inodes) > 10
    assert (lab.mnt / "disk").read_bytes() == source


def test_st_blocks_is_what_the_cache_takes(lab: Lab) -> None:
    lab.image("disk", 8 * MiB, {0: b"x" * 12 * KiB, MiB: b"y" * 4 * KiB, 5 * MiB: b"z" * MiB})
    cache = lab.folder / "cache"
    lab.mount(lab.serve().uri, "--cache-dir", cache, "--no-populate")
    pread(lab.mnt / "disk", 0, 4 * KiB)
    wait_until(
        lambda: (
            (lab.mnt / "disk").stat().st_blocks
            == next(cache.glob(".lazyfs/partial/*.raw")).stat().st_blocks
            > 0
        ),
        "a partial image takes what its file takes",
    )
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    wait_until(
        lambda: (lab.mnt / "disk").stat().st_blocks == (MiB + 16 * KiB) // 512, "and a whole one"
    )
    assert (cache / "disk").stat().st_blocks == (MiB + 16 * KiB) // 512


# -- names


def test_sha1_names(lab: Lab) -> None:
    uuid = "155d900f-4e14-4e4c-a73d-069cbf4541e6"
    source = lab.image(uuid, 1 * MiB).read_bytes()
    server = lab.serve()
    lab.mount(server.uri, "--names", "sha1")
    name = hashlib.sha1(uuid.encode()).hexdigest()
    assert os.listdir(lab.mnt) == [name]
    assert (lab.mnt / name).read_bytes() == source
    assert (lab.image_status(uuid)["path"], os.getxattr(lab.mnt / name, "user.lazyfs.export")) == (
        str(lab.mnt / name), uuid.encode(),
    )  # fmt: skip
    lab.wait_for_state(uuid, "whole")
    lab.umount()
    assert (lab.mnt / name).read_bytes() == source

    lab.image("other", 1 * MiB)  # a cache keeps the names that it has given
    lab.mount(server.uri)
    assert sorted(os.listdir(lab.mnt)) == sorted([name, "other"])
    assert lab.image_status(uuid)["state"] == "whole"


def test_sha1_names_have_neither_folders_nor_suffixes(lab: Lab) -> None:
    lab.mount(team(lab), "--names", "sha1", "--format", "qcow2", "--no-populate")
    names = {hashlib.sha1(export.encode()).hexdigest() for export in ("plain", "team/disk")}
    assert set(os.listdir(lab.mnt)) == names
    path = lab.mnt / hashlib.sha1(b"plain").hexdigest()
    lab.lazyfs("prefetch", path, "--format", "raw", "--wait")
    assert set(os.listdir(lab.mnt)) == names
    assert path.stat().st_size == 4 * MiB
    assert lab.image_status("plain")["format"] == "raw"


# -- extended attributes


def test_extended_attributes(lab: Lab) -> None:
    lab.image("disk", 4 * MiB, {0: b"x" * 2 * MiB})
    lab.mount(lab.serve().uri, "--no-populate")
    disk = lab.mnt / "disk"

    def ours() -> dict[str, str]:
        found = {}
        for name in ("state", "present", "export", "digest"):
            with suppress(OSError):
                found[name] = os.getxattr(disk, f"user.lazyfs.{name}").decode()
        return found

    assert ours() == {"state": "remote", "present": "0", "export": "disk"}
    assert os.listxattr(disk) == [], "copies would carry them along"
    assert lab.image_status("disk")["requests"] == 0, "to look fetches nothing"
    pread(disk, 0, 64 * KiB)
    present = lab.image_status("disk")["present_bytes"]
    assert present >= 64 * KiB
    assert ours() == {"state": "partial", "present": str(present), "export": "disk"}
    digest = "sha256:" + hashlib.sha256((lab.repository / "disk").read_bytes()).hexdigest()
    disk.read_bytes()
    lab.wait_for_state("disk", "whole")
    lab.lazyfs("verify", disk, "--digest", digest)
    assert ours() == {"state": "whole", "present": str(2 * MiB), "export": "disk", "digest": digest}
    dump = subprocess.run(
        ["getfattr", "-n", "user.lazyfs.digest", disk], capture_output=True, text=True, check=True
    ).stdout
    assert f'user.lazyfs.digest="{digest}"\n' in dump

    for name in (
        "user.other",
        "user.lazyfs.other",
        "security.capability",
        "system.posix_acl_access",
        "trusted.x",
    ):
        with pytest.raises(OSError) as failure:  # noqa: PT011
            os.getxattr(disk, name)
        # Not supported, as where no such attribute can be: `ls -l` and `cp -a` do not ask for each
        # file then.
        assert failure.value.errno == (
            errno.ENODATA if name.startswith("user.") else errno.EOPNOTSUPP
        ), name
    assert os.listxattr(lab.mnt) == []
    with pytest.raises(OSError, match="No data"):
        os.getxattr(lab.mnt, "user.lazyfs.state")
    changes: tuple[Callable[[], None], ...] = (
        lambda: os.setxattr(disk, "user.lazyfs.state", b"x"),
        lambda: os.removexattr(disk, "user.lazyfs.state"),
    )
    for change in changes:
        with pytest.raises(OSError, match="Read-only"):
            change()
    script = "import json, os; print(json.dumps(os.getxattr('disk', 'user.lazyfs.state').decode()))"
    assert in_mount(lab, script, user=NOBODY) == "whole"


def test_attributes_of_names_with_unusual_characters(lab: Lab) -> None:
    names = lab.folder / "names"
    names.write_text("é/ü\t%\n")
    server = lab.serve_with("eval", f"list_exports=cat {names}", "get_size=echo 4096")
    lab.mount(server.uri, "--names", "sha1")
    (name,) = os.listdir(lab.mnt)
    assert name == hashlib.sha1("é/ü\t%".encode()).hexdigest()
    assert os.getxattr(lab.mnt / name, "user.lazyfs.export") == "é/ü\t%".encode()


# -- all of it, as nova/virt/libvirt/imagecache.py does it


class ImageCacheManager:
    """Does what Nova's manager does with its base directory. The names are Nova's."""

    def __init__(self, base_dir: Path) -> None:
        self.base_dir = base_dir

    def list_base_images(self) -> list[str]:
        """Return files whose names are SHA-1s, as `_list_base_images` does."""
        digest_size = hashlib.sha1().digest_size * 2
        return [
            name
            for name in os.listdir(self.base_dir)
            if len(name) == digest_size and (self.base_dir / name).is_file()
        ]

    def mark_in_use(self, image_id: str) -> Path:
        """Do what `nova.privsep.path.utime` does.

        Nova calls it for each image of an instance, and whenever an instance is made of it.
        """
        base_file = self.base_dir / hashlib.sha1(image_id.encode()).hexdigest()
        assert base_file.exists(), "Nova would fetch it from Glance"
        os.utime(base_file, None)
        return base_file

    def get_disk_size(self, base_file: Path) -> int:
        """Return what `libvirt.utils.get_disk_size` returns, which uses `qemu-img info`."""
        return base_file.stat().st_blocks * 512

    def age_and_verify_cached_images(self, in_use: set[Path]) -> list[str]:
        removed = []
        for name in self.list_base_images():
            base_file = self.base_dir / name
            if base_file in in_use:
                continue
            age = time.time() - os.path.getmtime(base_file)
            assert age >= 0
            os.remove(base_file)
            removed.append(name)
        return removed


def test_novas_image_cache_manager(lab: Lab) -> None:
    images = {f"{i}" * 8 + "-4e14-4e4c-a73d-069cbf4541e6": MiB for i in range(3)}
    contents = {
        image_id: lab.image(image_id, size).read_bytes() for image_id, size in images.items()
    }
    lab.mount(lab.serve().uri, "--names", "sha1", "--allow-evict")
    manager = ImageCacheManager(lab.mnt)
    assert len(manager.list_base_images()) == 3

    bases = {image_id: manager.mark_in_use(image_id) for image_id in images}
    for image_id, base_file in bases.items():
        assert manager.get_disk_size(base_file) == 512
        overlay = lab.folder / f"{image_id}.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base_file, "-F", "raw", overlay],
            check=True,
        )
        copy = lab.folder / "copy"
        subprocess.run(["qemu-img", "convert", "-O", "raw", overlay, copy], check=True)
        assert copy.read_bytes() == contents[image_id]
        lab.wait_for_state(image_id, "whole")
        wait_until(
            lambda: manager.get_disk_size(base_file) == MiB,  # noqa: B023 - it is awaited here
            "as much as it takes",
        )

    used, *unused = images
    removed = manager.age_and_verify_cached_images({manager.mark_in_use(used)})
    assert sorted(removed) == sorted(bases[image_id].name for image_id in unused)
    by_name = {image["name"]: image for image in lab.status()["images"]}
    assert {by_name[image_id]["state"] for image_id in unused} == {"remote"}
    assert by_name[used]["state"] == "whole"
    assert manager.get_disk_size(bases[unused[0]]) == 512
    # The next instance of a removed image needs no Glance: the base file is there, and is fetched
    # again.
    again = manager.mark_in_use(unused[0])
    assert again.read_bytes() == contents[unused[0]]
    assert stat.S_IMODE(again.stat().st_mode) == 0o444
