"""Backing files as qcow2 headers name them."""

import json
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.core import map_file, qcow2_layout
from lazyfs.core.overlay import HEADER_SIZE, NameAt, find_name, paths_of
from lazyfs.units import KiB, MiB


def header(
    version: int = 3,
    offset: int = 512,
    length: int = 5,
    cluster_bits: int = 16,
    extensions: bytes = b"",
) -> bytes:
    start = struct.pack(">4sIQII", b"QFI\xfb", version, offset, length, cluster_bits)
    size = {1: 48, 2: 72, 3: 104}.get(version, 104)
    start = start.ljust(size, b"\0")
    if version == 3:
        start = start[:100] + struct.pack(">I", 104)
    return (start + extensions).ljust(HEADER_SIZE, b"\0")


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


FORMAT = 0xE2792ACA


@pytest.mark.parametrize("version", [2, 3])
def test_a_header(version: int) -> None:
    extensions = (
        extension(0x6803F857, b"feature names") + extension(FORMAT, b"raw") + extension(0, b"")
    )
    assert find_name(header(version, extensions=extensions)) == NameAt(512, 5, "raw")
    assert find_name(header(version)) == NameAt(512, 5, "")
    assert find_name(
        header(version, extensions=extension(0, b"") + extension(FORMAT, b"raw"))
    ) == NameAt(512, 5, "")


def test_version_1() -> None:
    assert find_name(header(1, offset=48)) == NameAt(48, 5, "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"QFI\xfb",
        b"raw image" * 100,
        header(offset=0),
        header(length=0),
        header(length=1024),
        header(version=0),
        header(version=4),
        header(offset=65535),
        header(offset=1 << 63),
        header(cluster_bits=8),
        header(cluster_bits=22),
        b"\0" * 4096,
    ],
)
def test_no_backing_file(content: bytes) -> None:
    assert find_name(content) is None


def test_a_name_where_no_file_reaches() -> None:
    """A guest can write anything to sector 0 of its raw disk, and the scan looks at that, too."""
    assert find_name(struct.pack(">4sIQII", b"QFI\xfb", 1, 2**63, 1, 16)) is None


def test_a_name_behind_what_was_read() -> None:
    assert find_name(header(offset=60000)) == NameAt(60000, 5, "")


def test_our_own_partial_file() -> None:
    own = map_file.MapHeader(1, MiB, 64 * KiB, "disk", "")
    content = qcow2_layout.partial_header(
        qcow2_layout.layout(MiB, 64 * KiB), own, "nbd://host/disk", 0
    )
    at = find_name(content[:HEADER_SIZE])
    assert at is not None
    assert at.format == "raw"
    assert content[at.offset : at.offset + at.length] == b"nbd://host/disk"


@given(st.binary(max_size=300))
@example(header(extensions=extension(1, b"")[:4] + b"\xff\xff\xff\xff"))
def test_garbage_is_harmless(content: bytes) -> None:
    for made in (content, b"QFI\xfb" + content, header()[:24] + content, header()[:100] + content):
        find_name(made)
    paths_of(content)
    paths_of(b"json:" + content)


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("/mnt/debian", ["/mnt/debian"]),
        ("../base/debian.qcow2", ["../base/debian.qcow2"]),
        ("/mnt/a:b", ["/mnt/a:b"]),
        ("./a:b", ["./a:b"]),
        ("file:/mnt/debian", ["/mnt/debian"]),
        ("file:debian", ["debian"]),
        ("nbd://host/debian", []),
        ("nbd+unix:///debian?socket=/run/x", []),
        ("rbd:pool/image", []),
        ("a:b", []),
        ("", []),
        ("file:", []),
        ("/mnt/debian\0rest", ["/mnt/debian"]),
        ("json:", []),
        ("json:{", []),
        ("json:[]", []),
        ("json:12", []),
        ("json:{}", []),
        ("json:" + "[" * 1000, []),
    ],
)
def test_names(name: str, paths: list[str]) -> None:
    assert paths_of(name.encode()) == paths


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({"driver": "file", "filename": "/mnt/a"}, ["/mnt/a"]),
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "/mnt/a"}}, ["/mnt/a"]),
        ({"driver": "raw", "file.driver": "file", "file.filename": "/mnt/a"}, ["/mnt/a"]),
        ({"file": {"filename": "file:/mnt/a"}}, ["/mnt/a"]),
        (
            {
                "driver": "qcow2",
                "file": {"filename": "/b"},
                "backing": {"driver": "raw", "file": {"filename": "/c"}},
            },
            ["/b", "/c"],
        ),
        (
            {"file.filename": "/b", "backing.file.filename": "/c", "backing.file.driver": "file"},
            ["/b", "/c"],
        ),
        ({"driver": "nbd", "server": {"type": "unix", "path": "/run/x"}, "export": "a"}, []),
        ({"filename": 7, "file": None, "backing": ["/x"]}, []),
        ({"filename": "\ud800"}, []),
        ({"filename": "json:" + json.dumps({"filename": "/deep"})}, ["/deep"]),
    ],
)
def test_json_names(options: object, paths: list[str]) -> None:
    assert paths_of(b"json:" + json.dumps(options).encode()) == paths


def test_names_are_bytes() -> None:
    assert [path.encode("utf-8", "surrogateescape") for path in paths_of(b"/mnt/\xff\xfe")] == [
        b"/mnt/\xff\xfe"
    ]
