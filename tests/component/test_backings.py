"""Backing ids.

There is one for each open inode, which is closed with the last open. If there can be none, lazyfs
works without, whatever the reason.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.kernel import session as kernel_session
from lazyfs.kernel.passthrough import Backings


class FakeSession:
    """Hands out ids as Linux does: each id only once."""

    def __init__(self) -> None:
        self.flags = kernel_session.WANTED
        self.error: int | None = None
        self.last = 0
        self.held: dict[int, int] = {}

    def open_backing(self, fd: int) -> int:
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        self.last += 1
        self.held[self.last] = fd
        return self.last

    def close_backing(self, backing_id: int) -> None:
        del self.held[backing_id]


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return what the C module was told.

    In this process it may have been loaded too late for pyfuse3, which is not used here.
    """
    told: list[tuple[int, int]] = []
    monkeypatch.setitem(
        sys.modules,
        "lazyfs.kernel._replies",
        type("C", (), {"reply_with": lambda *a: told.append(a)}),
    )
    monkeypatch.setattr(
        "lazyfs.kernel._replies", sys.modules["lazyfs.kernel._replies"], raising=False
    )
    return told


def backings(session: FakeSession, wanted: bool = True) -> Backings:
    return Backings(session, wanted, probe_fd=0)  # type: ignore[arg-type]


def test_the_id_lives_from_the_first_open_to_the_last_release(
    session: FakeSession, replies: list[tuple[int, int]]
) -> None:
    table = backings(session)
    assert table.trouble == ""
    assert not session.held, "the probe is closed"
    table.opened(7, 70)
    table.opened(7, 70)
    table.opened(8, 80)
    assert sorted(session.held.values()) == [70, 80]
    first, second = sorted(session.held)
    assert replies == [(7, first), (7, first), (8, second)]
    table.released(7)
    assert sorted(session.held) == [first, second]
    table.released(7)
    assert list(session.held) == [second]
    table.opened(7, 71)
    assert replies[-1] == (7, session.last)
    table.released(7)
    table.released(8)
    assert not session.held


def test_a_failure_is_kept_until_the_last_release(
    session: FakeSession, replies: list[tuple[int, int]]
) -> None:
    table = backings(session)
    session.error = errno.ENFILE
    table.opened(7, 70)
    session.error = None
    table.opened(7, 70)
    assert replies == [], "the kernel refuses to mix both kinds of opens"
    table.released(7)
    table.released(7)
    table.opened(7, 70)
    assert replies == [(7, session.last)]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EPERM, "CAP_SYS_ADMIN"),
        (errno.ELOOP, "file system: Too many levels"),
        (errno.ENOTTY, "file system: Inapp"),
    ],
)
def test_what_the_probe_finds(
    session: FakeSession, replies: list[tuple[int, int]], code: int, said: str
) -> None:
    session.error = code
    table = backings(session)
    assert said in table.trouble
    session.error = None
    table.opened(7, 70)
    table.released(7)
    assert replies == []
    assert not session.last


def test_reasons_to_do_without(session: FakeSession, replies: list[tuple[int, int]]) -> None:
    assert backings(session, wanted=False).trouble == "turned off"
    session.flags &= ~kernel_session.PASSTHROUGH
    assert "Linux 6.9" in backings(session).trouble
    assert not session.last


PROBE = """
import os, sys
from lazyfs.kernel import passthrough
from lazyfs.kernel.session import mount
session = mount(sys.argv[1], "nbd://example.com")
probe = os.open(sys.argv[2], os.O_RDONLY)
print(passthrough.Backings(session, True, probe).trouble or "works")
os.setresuid(65534, 65534, 65534)
print(passthrough.Backings(session, True, probe).trouble or "works")
"""


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    while str(folder) in Path("/proc/self/mountinfo").read_text():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_a_user_without_cap_sys_admin_gets_none(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", PROBE, str(mountpoint), str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines() == ["works", "it needs CAP_SYS_ADMIN"]
