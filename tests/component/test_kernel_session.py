"""The kernel's structures, compared with <linux/fuse.h>, and the answer to every kind of
FUSE_INIT."""

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import servers

from lazyfs import errors
from lazyfs.kernel import session as kernel_session
from lazyfs.kernel.session import IN_HEADER, INIT_IN, INIT_IN_SHORT, INIT_OUT, OUT_HEADER

FLAGS = {
    "FUSE_ASYNC_READ": kernel_session.ASYNC_READ,
    "FUSE_BIG_WRITES": kernel_session.BIG_WRITES,
    "FUSE_DO_READDIRPLUS": kernel_session.DO_READDIRPLUS,
    "FUSE_PARALLEL_DIROPS": kernel_session.PARALLEL_DIROPS,
    "FUSE_ABORT_ERROR": kernel_session.ABORT_ERROR,
    "FUSE_MAX_PAGES": kernel_session.MAX_PAGES,
    "FUSE_EXPLICIT_INVAL_DATA": kernel_session.EXPLICIT_INVAL_DATA,
    "FUSE_INIT_EXT": kernel_session.INIT_EXT,
    "FUSE_INIT": kernel_session.FUSE_INIT,
    "FUSE_READ": kernel_session.FUSE_READ,
    "FUSE_KERNEL_VERSION": kernel_session.MAJOR,
}

# Each structure, the format that lazyfs has for it, and its members in that order.
STRUCTURES = {
    "fuse_in_header": (IN_HEADER, ["len", "opcode", "unique", "nodeid", "uid", "gid", "pid"]),
    "fuse_out_header": (OUT_HEADER, ["len", "error", "unique"]),
    "fuse_init_in": (INIT_IN, ["major", "minor", "max_readahead", "flags"]),
    "fuse_init_out": (
        INIT_OUT,
        [
            "major",
            "minor",
            "max_readahead",
            "flags",
            "max_background",
            "congestion_threshold",
            "max_write",
            "time_gran",
            "max_pages",
            "map_alignment",
            "flags2",
        ],
    ),
}
SIZES = {"fuse_in_header": 40, "fuse_out_header": 16, "fuse_init_in": 64, "fuse_init_out": 64}

# Since protocol 7.40; the headers of Debian 12 are older. As include/uapi/linux/fuse.h of Linux 6.9
# has them.
NEWER = """
#include <sys/ioctl.h>
#include <stdint.h>
struct backing_map { int32_t fd; uint32_t flags; uint64_t padding; };
struct open_out { uint64_t fh; uint32_t open_flags; int32_t backing_id; };
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)
#define PASSTHROUGH (1ULL << 37)
#define HAS_RESEND (1ULL << 39)
"""
NEWER_VALUES = {
    "PASSTHROUGH": kernel_session.PASSTHROUGH,
    "HAS_RESEND": kernel_session.HAS_RESEND,
    "BACKING_OPEN": kernel_session.FUSE_DEV_IOC_BACKING_OPEN,
    "BACKING_CLOSE": kernel_session.FUSE_DEV_IOC_BACKING_CLOSE,
    "sizeof(struct backing_map)": kernel_session.BACKING_MAP.size,
}

MOUNT_FLAGS = {
    "MS_NOSUID": kernel_session.MS_NOSUID,
    "MS_NODEV": kernel_session.MS_NODEV,
    "MS_NOATIME": kernel_session.MS_NOATIME,
    "MNT_DETACH": kernel_session.MNT_DETACH,
}


def _program() -> str:
    lines = ["#define _GNU_SOURCE", "#include <stdio.h>", "#include <string.h>", "#include <sys/mount.h>",
             "#include <linux/fuse.h>", NEWER, "int main(void) {"]  # fmt: skip
    for name, (_, members) in STRUCTURES.items():
        lines.append(f"{{ struct {name} s; memset(&s, 0, sizeof s);")
        lines += [f"s.{member} = {i + 1};" for i, member in enumerate(members)]
        lines.append("fwrite(&s, sizeof s, 1, stdout); }")
    for name in [*FLAGS, *MOUNT_FLAGS, *NEWER_VALUES]:
        lines.append(f"{{ unsigned long long v = {name}; fwrite(&v, sizeof v, 1, stdout); }}")
    return "\n".join([*lines, "return 0; }"])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return what a C program has written: each structure with its members 1, 2, 3 ..., then the
    constants."""
    servers.requires("gcc")
    folder = tmp_path_factory.mktemp("fuse")
    (folder / "p.c").write_text(_program())
    subprocess.run(["gcc", "-o", "p", "p.c"], cwd=folder, check=True)
    return subprocess.run([folder / "p"], check=True, capture_output=True).stdout


def test_structures_are_the_kernels(output: bytes) -> None:
    for name, (ours, members) in STRUCTURES.items():
        theirs, output = output[: SIZES[name]], output[SIZES[name] :]
        assert ours.size == SIZES[name]
        values = ours.unpack(theirs)
        expected = [*range(1, len(members) + 1), *[0] * (len(values) - len(members))]
        assert list(values) == expected, name
        assert ours.pack(*expected) == theirs
    for name, value in {**FLAGS, **MOUNT_FLAGS, **NEWER_VALUES}.items():
        (theirs_value,) = struct.unpack("=Q", output[:8])
        output = output[8:]
        assert value == theirs_value, name
    assert output == b""


# -- FUSE_INIT


def init_request(
    minor: int,
    flags: int,
    *,
    major: int = 7,
    short: bool = False,
    unique: int = 2,
    flags2: int = 0xFFFFFFFF,
) -> bytes:
    """Return an INIT request as a kernel sends it."""
    readahead = 128 * 1024
    body = (
        INIT_IN_SHORT.pack(major, minor, readahead, flags)
        if short
        else INIT_IN.pack(major, minor, readahead, flags, flags2)
    )
    return (
        IN_HEADER.pack(
            IN_HEADER.size + len(body), kernel_session.FUSE_INIT, unique, 0, 0, 0, 1, 0, 0
        )
        + body
    )


def parsed(reply: bytes) -> tuple[tuple[int, ...], dict[str, int]]:
    names = [*STRUCTURES["fuse_init_out"][1], "max_stack_depth"]
    return OUT_HEADER.unpack_from(reply), dict(
        zip(names, INIT_OUT.unpack_from(reply, OUT_HEADER.size), strict=False)
    )


@pytest.mark.parametrize(
    ("minor", "short"), [(31, True), (34, True), (36, False), (38, False), (45, False)]
)
@pytest.mark.parametrize(
    "offered", [0, kernel_session.WANTED & 0xFFFFFFFF, 0xFFFFFFFF, kernel_session.ASYNC_READ]
)
def test_the_answer_takes_what_is_offered_and_wanted(minor: int, short: bool, offered: int) -> None:
    reply, agreed = kernel_session.answer_init(init_request(minor, offered, short=short, unique=77))
    header, body = parsed(reply)
    assert header == (80, 0, 77)
    assert len(reply) == 80
    assert agreed & 0xFFFFFFFF == offered & kernel_session.WANTED & 0xFFFFFFFF == body["flags"]
    assert (body["major"], body["minor"]) == (7, min(minor, 40))
    if short or not offered & kernel_session.INIT_EXT:
        assert (body["flags2"], body["max_stack_depth"]) == (0, 0), "not offered"
    else:
        assert body["flags2"] == (kernel_session.PASSTHROUGH | kernel_session.HAS_RESEND) >> 32
        assert body["max_stack_depth"] == 1, "0 would turn passthrough off"
    assert agreed >> 32 == body["flags2"]
    assert body["max_readahead"] <= 128 * 1024
    assert body["max_write"] == 4096, "the least that the kernel takes"
    assert body["max_pages"] * 4096 == kernel_session.MAX_READ
    assert 0 < body["congestion_threshold"] < body["max_background"] < 2**16
    assert body["time_gran"] == 1


@pytest.mark.parametrize(
    ("flags2", "agreed2"),
    [
        (0, 0),
        (kernel_session.PASSTHROUGH >> 32, kernel_session.PASSTHROUGH >> 32),
        (kernel_session.HAS_RESEND >> 32, kernel_session.HAS_RESEND >> 32),
        (0xFFFFFFFF & ~(kernel_session.PASSTHROUGH >> 32), kernel_session.HAS_RESEND >> 32),
    ],
)
def test_flags2_is_negotiated_down(flags2: int, agreed2: int) -> None:
    reply, agreed = kernel_session.answer_init(init_request(38, 0xFFFFFFFF, flags2=flags2))
    _, body = parsed(reply)
    assert body["flags2"] == agreed >> 32 == agreed2
    assert body["max_stack_depth"] == (1 if agreed & kernel_session.PASSTHROUGH else 0)


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (7, 0), (6, 99)])
def test_an_old_kernel_is_refused(major: int, minor: int) -> None:
    with pytest.raises(errors.UserError, match=rf"FUSE {major}\.{minor}; lazyfs needs 7\.31"):
        kernel_session.answer_init(init_request(minor, 0, major=major, short=True))


def test_another_first_request_is_a_bug() -> None:
    request = bytearray(init_request(38, 0))
    request[4] = 3  # FUSE_GETATTR
    with pytest.raises(errors.StateError, match="opcode 3"):
        kernel_session.answer_init(bytes(request))


def test_the_made_up_request_is_one_that_a_kernel_could_send() -> None:
    request = kernel_session.encode_init_in(0xFFFFFFFF)
    length, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    assert (length, opcode) == (len(request), kernel_session.FUSE_INIT) == (104, 26)
    assert unique
    major, minor, readahead, flags, flags2 = INIT_IN.unpack_from(request, IN_HEADER.size)
    assert (major, minor, readahead, flags2) == (7, 38, kernel_session.MAX_READ, 0)
    assert flags == kernel_session.BASIC, "what libfuse 3.14 knows"
    reply, _ = kernel_session.answer_init(request)
    assert parsed(reply)[0] == (80, 0, unique)


# -- mounting; where it works is proved by the mount tests


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    while str(folder) in Path("/proc/self/mountinfo").read_text():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_the_kernel_takes_our_answer(mountpoint: Path, count_open_files: Callable[[], int]) -> None:
    before = count_open_files()
    session = kernel_session.mount(str(mountpoint), "nbd://example.com, with a comma")
    try:
        entry = next(
            line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if str(mountpoint) in line
        )
        options, _, rest = entry.partition(" - ")
        assert {"rw", "nosuid", "nodev", "noatime"} <= set(options.split(" ")[5].split(","))
        assert rest.split(" ")[:2] == ["fuse.lazyfs", "nbd://example.com,\\040with\\040a\\040comma"]
        assert not session.detached
        assert session.unmount(lazy=False)
        assert not session.unmount(lazy=False), "once only"
    finally:
        os.close(session.fd)
    assert count_open_files() == before


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_a_refused_init_leaves_no_mount_behind(
    mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: bytes, wanted: int) -> tuple[bytes, int]:
        raise errors.UserError("the kernel is too old")

    monkeypatch.setattr(kernel_session, "answer_init", refuse)
    with pytest.raises(errors.UserError, match="too old"):
        kernel_session.mount(str(mountpoint), "nbd://example.com")
    assert str(mountpoint) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_a_mountpoint_that_cannot_be_one(
    tmp_path: Path, count_open_files: Callable[[], int]
) -> None:
    (tmp_path / "file").touch()
    before = count_open_files()
    for path in ("file", "missing"):
        with pytest.raises(errors.UserError, match="cannot mount on") as failure:
            kernel_session.mount(str(tmp_path / path), "nbd://example.com")
        assert str(tmp_path / path) in str(failure.value)
    assert count_open_files() == before
