"""Data that is lost on its way to the disk, and who is told."""

import os
from pathlib import Path

import pytest
from disk_rig import DiskRig

from lazyfs.host import writeback


def test_each_open_file_is_told_once(tmp_path: Path) -> None:
    with DiskRig(tmp_path / "disk") as rig:
        path = rig.root / "file"
        path.write_bytes(bytes(4096))
        writer = os.open(path, os.O_RDWR)
        os.fsync(writer)
        other = writeback.reopen(writer)
        assert not writeback.has_failed(other)
        os.pwrite(writer, os.urandom(1 << 20), 0)
        assert not writeback.has_failed(other), "it is not written yet, or well"
        rig.fail()
        os.pwrite(writer, os.urandom(1 << 20), 0)
        with pytest.raises(OSError, match="Input/output"):
            os.fdatasync(writer)
        assert not writeback.has_failed(writer), "it was told already"
        assert writeback.has_failed(other)
        assert not writeback.has_failed(other)
        os.close(writer)
        os.close(other)
        rig.again()
