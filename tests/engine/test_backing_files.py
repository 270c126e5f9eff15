"""Tests the wait for a scan that hangs."""

import threading

import pytest
import trio
from engine_world import until

from lazyfs import errors
from lazyfs.engine import backing_files
from lazyfs.engine.backing_files import BackingFiles

pytestmark = pytest.mark.trio


async def test_nobody_waits_for_a_scan_that_hangs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing_files, "SCAN_S", 0.05)
    goes_on = threading.Event()
    scans = 0

    def scan() -> frozenset[str]:
        nonlocal scans
        scans += 1
        goes_on.wait()
        return frozenset({"disk"})

    asked = BackingFiles(scan)
    try:
        with pytest.raises(errors.UserError, match="could not be read"):
            await asked.find()
        monkeypatch.setattr(backing_files, "SCAN_S", 3600)
        with pytest.raises(errors.UserError, match="could not be read"), trio.fail_after(60):
            await asked.find()
        assert scans == 1
    finally:
        goes_on.set()
    await until(lambda: not asked._thread.borrowed_tokens)
    assert await asked.find() == {"disk"}
