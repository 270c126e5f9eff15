"""A database beneath a mount, whose path leads into what is mounted there."""

import os
import sqlite3
import subprocess
from pathlib import Path

import pytest

from lazyfs.cache import sqlite_paths


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_a_database_beneath_a_mount_is_found_by_its_folders_descriptor(tmp_path: Path) -> None:
    sqlite_paths.register()
    folder = tmp_path / "folder"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    subprocess.run(["mount", "-t", "tmpfs", "over", str(folder)], check=True)
    try:
        path = f"file:/proc/self/fd/{held}/catalog.sqlite?vfs={sqlite_paths.NAME}"
        for _ in range(2):
            db = sqlite3.connect(path, uri=True)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE IF NOT EXISTS t (x)")
            db.execute("INSERT INTO t VALUES (1)")
            db.commit()
            count = db.execute("SELECT count(*) FROM t").fetchone()
            db.close()
        assert count == (2,)
        assert os.listdir(folder) == []
        assert os.listdir(held) == ["catalog.sqlite"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        os.close(held)


def test_a_path_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    sqlite_paths.register()
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        sqlite3.connect(f"file:{tmp_path}/{'x/' * 3000}db?vfs={sqlite_paths.NAME}", uri=True)
