"""Buffers that libnbd reads into: the process must not grow with what it reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int
from pathlib import Path

import pytest
from peers import Peers

from lazyfs.repository import nbd_buffers, nbd_connect
from lazyfs.units import MiB


def resident() -> int:
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    ]
    return int(line.split()[1]) * 1024


@contextmanager
def taken(size: int) -> Iterator[nbd_buffers.NbdBuffer]:
    buffer = nbd_buffers.take(size)
    try:
        yield buffer
    finally:
        nbd_buffers.give(buffer)


def test_a_gigabyte_of_reads_leaves_nothing_behind(peers: Peers) -> None:
    server = peers.nbdkit("pattern", f"size={MiB}")
    handle, _ = nbd_connect.connect_export(server.uri, "", nbd_connect.Attempt())

    def read() -> None:
        done: list[int] = []

        def completed(err: c_int) -> int:
            done.append(err.value)
            return 1

        with taken(MiB) as buffer:
            handle.aio_pread(buffer.target(0, MiB), 0, completed)
            while not done:
                handle.poll(-1)
            assert done == [0]
            assert bytes(buffer.memory[8:16]) == (8).to_bytes(8, "big")

    read()
    before = resident()
    for _ in range(1024):
        read()
    assert resident() < before + 64 * MiB


def test_a_buffer_is_used_again_and_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_buffers, "_free", {})
    with taken(100_000) as first:
        assert len(first.memory) >= 100_000
        with taken(100_000) as second:
            assert second is not first
    with taken(90_000) as third:
        assert third in (first, second)


def test_views_are_kept_but_not_without_end() -> None:
    with taken(MiB) as buffer:
        for length in range(1, 10 * nbd_buffers.MAX_VIEWS):
            assert len(buffer.target(0, length)) == length
        assert len(buffer._views) <= nbd_buffers.MAX_VIEWS


def test_what_a_storm_of_readers_needed_goes_back_to_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nbd_buffers, "_free", {})
    before = resident()
    buffers = [nbd_buffers.take(MiB) for _ in range(200)]
    for buffer in buffers:
        buffer.memory[:] = b"x" * MiB
    assert resident() > before + 150 * MiB
    for buffer in buffers:
        nbd_buffers.give(buffer)
    assert resident() < before + 64 * MiB
    again = [nbd_buffers.take(MiB) for _ in range(200)]
    assert set(again) == set(buffers)
