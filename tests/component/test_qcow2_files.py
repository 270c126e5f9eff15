"""QEMU judges the files that lazyfs computes, and the URI by which they name their export."""

import json
import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from servers import nbdkit, requires, wait_until

from lazyfs.core import export_name, map_file, qcow2_layout, shown_file
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.qcow2_layout import Layout
from lazyfs.units import KiB, MiB

TiB = 1024 * 1024 * MiB
CHUNK = 1 * MiB


@pytest.fixture(autouse=True)
def _qemu() -> None:
    requires("qemu-img")
    requires("qemu-io")


def qemu_img(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def check(path: Path) -> dict[str, Any]:
    """Check that there are no errors and no leaks, and that the exit code is 0."""
    done = qemu_img("check", "--output=json", "-f", "qcow2", path)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert isinstance(said, dict)
    assert said["check-errors"] == 0
    assert not {"leaks", "corruptions"} & set(said)
    return said


def info(path: Path) -> dict[str, Any]:
    done = qemu_img("info", "--output=json", path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert isinstance(said, dict)
    return said


def finished_file(
    path: Path, size: int, cluster_size: int, data: dict[int, bytes] | None = None
) -> Layout:
    """Write the file that the mount shows for an export: its metadata, and `data` at its
    offsets."""
    at = qcow2_layout.layout(size, cluster_size)
    shown = shown_file.of(shown_file.QCOW2, size, cluster_size)
    with path.open("wb") as file:
        file.truncate(shown.size)
        for start in range(0, shown.metadata_size, CHUNK):
            for part in shown.split(ByteRange(start, min(start + CHUNK, shown.metadata_size))):
                assert isinstance(part, bytes)
                file.write(part)
        for offset, content in (data or {}).items():
            file.seek(at.data_offset + offset)
            file.write(content)
    assert path.stat().st_size == at.file_size
    return at


def judge(path: Path, at: Layout) -> None:
    said = check(path)
    assert said["image-end-offset"] == at.file_size
    assert said.get("total-clusters", 0) == said.get("allocated-clusters", 0) == at.clusters
    told = info(path)
    assert (told["format"], told["virtual-size"], told["cluster-size"]) == (
        "qcow2",
        at.size,
        at.cluster_size,
    )
    assert "backing-filename" not in told
    assert told["format-specific"]["data"]["compat"] == "1.1"
    assert told["format-specific"]["data"]["corrupt"] is False


SIZES = [0, 1, 512, 777, 64 * KiB - 512, 64 * KiB, 64 * KiB + 512, 5 * MiB + 512]


@pytest.mark.parametrize("cluster_size", [4 * KiB, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("size", [*SIZES, 2 * MiB - 512, 2 * MiB + 512])
def test_a_finished_file_is_clean_and_has_the_data(
    tmp_path: Path, size: int, cluster_size: int
) -> None:
    content = os.urandom(size)
    at = finished_file(tmp_path / "disk.qcow2", size, cluster_size, {0: content})
    judge(tmp_path / "disk.qcow2", at)
    raw = tmp_path / "disk"
    raw.write_bytes(content.ljust(at.size, b"\0"))
    done = qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, tmp_path / "disk.qcow2")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_layout_of_the_smallest_clusters_with_many_tables(tmp_path: Path) -> None:
    """There are several clusters of everything but the refcount table."""
    at = finished_file(tmp_path / "disk.qcow2", 1100 * MiB + 777, 4 * KiB)
    assert min(at.l1_clusters, at.l2_tables, at.refcount_blocks) > 1
    judge(tmp_path / "disk.qcow2", at)


@pytest.mark.parametrize("cluster_size", [64 * KiB, 2 * MiB])
def test_two_tebibytes_take_no_more_room_than_their_metadata(
    tmp_path: Path, cluster_size: int
) -> None:
    path = tmp_path / "disk.qcow2"
    places = (0, 512 * 1024 * MiB + 4 * KiB, 2 * TiB - 4 * KiB)
    at = finished_file(path, 2 * TiB, cluster_size, dict.fromkeys(places, b"\xab" * 4 * KiB))
    assert path.stat().st_blocks * 512 <= at.data_offset + len(places) * 64 * KiB
    judge(path, at)
    reads = [word for place in places for word in ("-c", f"read -P 0xab {place} 4096")]
    for zeroes in (8 * KiB, 512 * 1024 * MiB, 2 * TiB - 8 * KiB):
        reads += ["-c", f"read -P 0 {zeroes} 4096"]
    done = subprocess.run(
        ["qemu-io", "-r", "-f", "qcow2", *reads, path], capture_output=True, text=True, check=True
    )
    assert "Pattern verification failed" not in done.stdout
    assert done.stdout.count("read 4096/4096") == 6


# -- the URI in the header of a partial file

ODD_NAMES = [
    "", "disk", "a b", " ", "100%", "a%41", "%2F", "a?b=c", "a#b", "a&b;c", "a+b", "a:b", "Grüße/日本 😀", "a/b", "a//b",
    "a/../b", "../x", ".", "a/", 'q"uo\'te', "back\\slash", "json:{}", "tab\tnewline\n", "x" * 300,
    "/", "/disk", "//disk/", "/Grüße 日本 😀", '/q"uo\'te\\', "/tab\tnewline\n", "/" + "x" * 300,
]  # fmt: skip


def partial_file(path: Path, backing: str) -> None:
    at = qcow2_layout.layout(1 * MiB, 64 * KiB)
    own = map_file.MapHeader(2, 1 * MiB, 64 * KiB, "disk", "")
    with path.open("wb") as file:
        file.truncate(at.file_size)
        for offset, content in [
            (0, qcow2_layout.partial_header(at, own, backing, 0)),
            *qcow2_layout.initial_tables(at),
        ]:
            file.seek(offset)
            file.write(content)


def test_qemu_opens_the_very_export_that_a_partial_file_names(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    plugin = ["eval", f'open=printf %s "$3" >{asked}; echo handle', "get_size=echo 1M"]
    plugin += ["pread=dd if=/dev/zero bs=$3 count=1 status=none"]
    (tmp_path / "with space?").mkdir()
    with nbdkit(tmp_path / "with space?" / "n#%41.sock", *plugin) as server:
        for name in ODD_NAMES:
            asked.unlink(missing_ok=True)
            partial_file(tmp_path / "disk.qcow2", export_name.qemu_uri(server.uri, name))
            command = [
                "qemu-io",
                "-r",
                "-f",
                "qcow2",
                "-c",
                "read -P 0 0 512",
                str(tmp_path / "disk.qcow2"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == 0, (name, done.stderr)
            assert asked.read_bytes().decode() == name
            check(tmp_path / "disk.qcow2")
            assert info(tmp_path / "disk.qcow2")["backing-filename-format"] == "raw"

        # Those that do not fit open nothing.
        for name in ("y" * 2000, "/" + "y" * 1000):
            asked.unlink()
            asked.touch()
            partial_file(tmp_path / "disk.qcow2", export_name.qemu_uri(server.uri, name))
            command = [
                "qemu-io",
                "-r",
                "-f",
                "qcow2",
                "-c",
                "read 0 512",
                str(tmp_path / "disk.qcow2"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == 1
            assert "Could not open backing file" in done.stderr
            assert asked.read_bytes() == b""
            assert info(tmp_path / "disk.qcow2")["virtual-size"] == 1 * MiB, (
                "info needs no backing file"
            )


def test_qemu_opens_such_an_export_over_tcp(tmp_path: Path) -> None:
    requires("nbdkit")
    asked = tmp_path / "asked"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [
        "nbdkit",
        "--foreground",
        "--exit-with-parent",
        "--readonly",
        "--ipaddr=127.0.0.1",
        f"--port={port}",
        "eval",
    ]
    command += [f'open=printf %s "$3" >{asked}; echo handle', "get_size=echo 1M"]
    command += ["pread=dd if=/dev/zero bs=$3 count=1 status=none"]

    def listens() -> bool:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
            return True
        return False

    with subprocess.Popen(command) as server:
        try:
            wait_until(listens, "nbdkit listens")
            for name in ("/disk", "disk"):
                partial_file(
                    tmp_path / "disk.qcow2", export_name.qemu_uri(f"nbd://127.0.0.1:{port}", name)
                )
                assert (
                    qemu_img(
                        "compare", "-F", "raw", tmp_path / "disk.qcow2", zeroes(tmp_path)
                    ).returncode
                    == 0
                )
                assert asked.read_text() == name
        finally:
            server.terminate()


def zeroes(folder: Path) -> Path:
    path = folder / "zeroes"
    path.touch()
    os.truncate(path, 1 * MiB)
    return path
