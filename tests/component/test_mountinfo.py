"""The one reader of mountinfo: real lines, names that try to break it, and garbage."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.host import mountinfo, open_files, process_files
from lazyfs.host.mountinfo import Entry

GOOD = b"41 22 0:45 / /images ro,nosuid shared:9 - fuse.lazyfs nbd://far rw,user_id=0"
ENTRY = Entry(
    41,
    "0:45",
    "/images",
    "fuse.lazyfs",
    "nbd://far",
    parent_id=22,
    propagation=frozenset({"shared:9"}),
)


def test_a_line() -> None:
    assert mountinfo.parse(GOOD + b"\n") == [ENTRY]
    assert mountinfo.parse(GOOD) == [ENTRY]
    assert mountinfo.parse(b"") == []


@pytest.mark.parametrize(
    ("escaped", "name"),
    [
        (rb"/a\040b", b"/a b"),
        (rb"/a\011b\012c\134d\043", b"/a\tb\nc\\d#"),
        (rb"/a\134040", rb"/a\040"),
        (rb"/a\777\9\04", rb"/a\777\9\04"),
        (b"/caf\xe9", b"/caf\xe9"),
        (b"/a\rb\x0bc\x0cd\x85e\x1cf", b"/a\rb\x0bc\x0cd\x85e\x1cf"),
        ("/\u2028x".encode(), "/\u2028x".encode()),
    ],
)
def test_names_may_contain_anything(escaped: bytes, name: bytes) -> None:
    line = b"41 22 0:45 / " + escaped + b" ro - fuse." + escaped + b" " + escaped + b" rw"
    (found,) = mountinfo.parse(line + b"\n" + b"\n")
    assert os.fsencode(found.mountpoint) == name
    assert os.fsencode(found.source) == name
    assert os.fsencode(found.kind) == b"fuse." + name


def test_the_source_may_be_empty() -> None:
    (found,) = mountinfo.parse(b"41 22 0:45 / /mnt ro - tmpfs  rw")
    assert (found.kind, found.source) == ("tmpfs", "")


@pytest.mark.parametrize(
    "line",
    [
        b"41 22 0:45 / /images ro",
        b"41 22 0:45 / /images ro - fuse.lazyfs",
        b"41 22 0:45 / /images - fuse.lazyfs nbd://far rw",
        b"x 22 0:45 / /images ro - fuse.lazyfs nbd://far rw",
        b"41 22 0-45 / /images ro - fuse.lazyfs nbd://far rw",
        b"41 22 0:4x / /images ro - fuse.lazyfs nbd://far rw",
        "4\u0661 22 0:45 / /images ro - fuse.lazyfs nbd://far rw".encode(),
        b" - ",
        b"\0",
    ],
)
def test_a_line_that_does_not_parse_hides_no_other(line: bytes) -> None:
    assert mountinfo.parse(line) == []
    assert mountinfo.parse(b"\n".join([line, GOOD, line])) == [ENTRY]


@given(st.binary())
def test_garbage_is_never_an_error(garbage: bytes) -> None:
    assert ENTRY in mountinfo.parse(garbage + b"\n" + GOOD + b"\n" + garbage)


@given(st.lists(st.sampled_from([b" ", b"-", b"\\", b"0", b":", b"\n", b"7", b"/"])))
def test_nor_is_what_looks_like_a_line(parts: list[bytes]) -> None:
    mountinfo.parse(b"".join(parts))


def test_a_process_that_has_ended_is_an_oserror() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(OSError, match="No such"):
        mountinfo.read(process.pid)


HOSTILE = "line\r7 7 0:7 - x \r\x85 end"
"""Text files end a line at a carriage return, too. What follows it looks like a line, and is
none."""

MOUNT = """
mount -t tmpfs "$(basename "$1")" "$1" && echo >"$1/file" && exec <"$1/file" && echo && exec sleep 60
"""


@pytest.fixture
def sees_hostile(tmp_path: Path) -> Iterator[int]:
    """A process that has a file open below such a mount, in a mount namespace of its own: nothing
    else on this machine sees the mount."""
    servers.requires("unshare")
    folder = tmp_path / HOSTILE
    folder.mkdir()
    command = ["unshare", "--mount", "sh", "-c", MOUNT, "sh", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_a_mount_with_a_hostile_name_breaks_nothing(sees_hostile: int, tmp_path: Path) -> None:
    mountpoint = str(tmp_path / HOSTILE)
    (entry,) = [one for one in mountinfo.read(sees_hostile) if one.mountpoint == mountpoint]
    assert (entry.kind, entry.source) == ("tmpfs", HOSTILE)
    (place,) = open_files.other_mounts(entry.device, "/")
    assert place.startswith(f"{mountpoint} in the mount namespace of ")
    inode = os.stat(f"/proc/{sees_hostile}/fd/0").st_ino
    readers = open_files.readers(entry.device, {inode})
    assert [reader.pid for reader in readers[inode]] == [sees_hostile]
    assert process_files.mounted_kind(sees_hostile, 0) == "tmpfs"
