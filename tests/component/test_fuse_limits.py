"""The kernel's limits for FUSE file systems."""

from pathlib import Path

import pytest

from lazyfs import daemon
from lazyfs.core.eviction import Limits
from lazyfs.engine.filesystem import Options
from lazyfs.engine.interfaces import FileAttributes
from lazyfs.host import fuse_limits
from lazyfs.mounted import MountConfig


@pytest.mark.parametrize(
    ("default", "most", "limit"),
    [("0", "0", 0), ("30", "0", 30), ("0", "40", 40), ("30", "40", 30), ("50", "40", 40), ("", "", 0)],
)  # fmt: skip
def test_the_limit_for_requests(tmp_path: Path, default: str, most: str, limit: int) -> None:
    (tmp_path / "default_request_timeout").write_text(default)
    (tmp_path / "max_request_timeout").write_text(most)
    assert fuse_limits.request_timeout_s(str(tmp_path)) == limit


def test_a_kernel_without_such_limits(tmp_path: Path) -> None:
    assert fuse_limits.request_timeout_s(str(tmp_path)) == 0


@pytest.mark.parametrize(("limit", "waits"), [(0, 120.0), (60, 58.0), (121, 119.0), (122, 120.0)])
def test_reads_fail_before_the_kernel_aborts_the_mount(
    monkeypatch: pytest.MonkeyPatch, limit: int, waits: float
) -> None:
    monkeypatch.setattr(fuse_limits, "request_timeout_s", lambda: limit)
    options = Options(block_size=65536, io_timeout_s=120, replace_changed=False, populate=True)
    config = MountConfig(
        "nbd://x", "/m", "/m", FileAttributes(0o444, 0, 0), options, 60, Limits(), [], None, True, False
    )  # fmt: skip
    assert daemon._within_kernel_limits(config).options.io_timeout_s == waits


@pytest.mark.parametrize(
    ("user", "limit", "queue"),
    [(0, "100", 16384), (1000, "100", 100), (1000, "65535", 16384), (1000, "", 16384)],
)
def test_users_have_fewer_requests_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, limit: str, queue: int
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    (tmp_path / "max_user_bgreq").write_text(limit)
    assert fuse_limits.background_requests(16384, str(tmp_path)) == queue
