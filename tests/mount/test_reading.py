"""Reads give the right bytes. Also tests which reader fetches what, and how often."""

import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import KiB, Lab, MiB, lab_in, pread

SPARSE = {
    3 * MiB: os.urandom(300 * KiB),
    40 * MiB + 12 * KiB: os.urandom(4 * KiB),
    63 * MiB: os.urandom(1 * MiB),
}


def test_random_parallel_reads_while_population_runs_are_identical(lab: Lab) -> None:
    source = lab.image("dense", 24 * MiB + 777)
    server = lab.serve("rate", parameters=("rate=400M", "burstiness=0.1"))
    lab.mount(server.uri)
    expected = source.read_bytes()

    def reader(seed: int) -> None:
        dice = random.Random(seed)
        fd = os.open(lab.mnt / "dense", os.O_RDONLY)
        try:
            for _ in range(60):
                offset = dice.randrange(len(expected))
                length = dice.choice([1, 512, 4 * KiB, 70 * KiB, 300 * KiB])
                assert os.pread(fd, length, offset) == expected[offset : offset + length], (
                    seed,
                    offset,
                    length,
                )
        finally:
            os.close(fd)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reader, range(8)))
    subprocess.run(["cmp", source, lab.mnt / "dense"], check=True)
    lab.wait_for_state("dense", "whole")
    assert lab.bytes_fetched(server) == len(expected)


@pytest.fixture(scope="module")
def sparse_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    with lab_in(tmp_path_factory.mktemp("model")) as lab:
        source = lab.image("sparse", 64 * MiB + 5, SPARSE)
        lab.mount(lab.serve().uri, "--no-populate")
        yield lab.mnt / "sparse", source.read_bytes()


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    reads=st.lists(
        st.tuples(st.integers(0, 64 * MiB + 10), st.integers(0, 2 * MiB)), min_size=1, max_size=4
    )
)
def test_any_reads_match_the_model(
    sparse_mount: tuple[Path, bytes], reads: list[tuple[int, int]]
) -> None:
    path, model = sparse_mount
    for offset, length in reads:
        assert pread(path, offset, length) == model[offset : offset + length]


def test_eight_readers_of_a_cold_block_cause_one_request(lab: Lab) -> None:
    source = lab.image("dense", 8 * MiB)
    server = lab.serve("delay", parameters=("rdelay=300ms",))
    lab.mount(server.uri, "--no-populate", "--block-size", "256K")
    expected = source.read_bytes()

    def read_page(index: int) -> bytes:
        # Eight different pages of one block, past the page cache, so that it is lazyfs that joins
        # them.
        command = [
            "dd",
            f"if={lab.mnt}/dense",
            "bs=4K",
            f"skip={512 + index}",
            "count=1",
            "iflag=direct",
            "status=none",
        ]
        return subprocess.run(command, capture_output=True, check=True).stdout

    with ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(read_page, range(8)))
    assert b"".join(pages) == expected[2 * MiB : 2 * MiB + 32 * KiB]
    assert server.reads() == [(2 * MiB, 256 * KiB)]


def test_nothing_but_the_block_is_fetched_without_population(lab: Lab) -> None:
    lab.image("dense", 8 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    fd = os.open(lab.mnt / "dense", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 10, 5 * MiB + 100)
    os.close(fd)
    assert server.reads() == [(5 * MiB, 64 * KiB)]
    status = lab.image_status("dense")
    assert (status["state"], status["present_bytes"], status["demand_bytes"]) == (
        "partial",
        64 * KiB,
        64 * KiB,
    )
    assert os.stat(lab.mnt / "dense").st_blocks == 64 * KiB // 512


def test_holes_are_never_fetched_and_each_allocated_byte_once(lab: Lab) -> None:
    source = lab.image("sparse", 64 * MiB, SPARSE)
    allocated = source.stat().st_blocks * 512
    server = lab.serve()
    lab.mount(server.uri)
    subprocess.run(["cmp", source, lab.mnt / "sparse"], check=True)
    status = lab.wait_for_state("sparse", "whole")
    assert lab.bytes_fetched(server) == allocated == status["fetched_bytes"]
    assert status["present_bytes"] == allocated
    assert status["zero_bytes"] == 64 * MiB - allocated
    for offset, length in server.reads():
        assert any(start - 4 * KiB < offset and offset + length <= start + len(data) + 4 * KiB
                   for start, data in SPARSE.items()), (offset, length)  # fmt: skip
    assert os.stat(lab.mnt / "sparse").st_blocks * 512 == allocated


def test_a_finer_hole_than_a_block_is_not_fetched(lab: Lab) -> None:
    data = {i * 64 * KiB: os.urandom(4 * KiB) for i in range(16)}
    source = lab.image("stripes", 1 * MiB, data)
    server = lab.serve()
    lab.mount(server.uri, "--no-populate")
    assert (lab.mnt / "stripes").read_bytes() == source.read_bytes()
    assert server.bytes_read() == 16 * 4 * KiB


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4097, 65536, 65537])
def test_sizes_that_are_no_multiple_of_anything(lab: Lab, size: int) -> None:
    source = lab.image("odd", size)
    lab.mount(lab.serve().uri)
    assert (lab.mnt / "odd").stat().st_size == size
    assert (lab.mnt / "odd").read_bytes() == source.read_bytes()
    lab.wait_for_state("odd", "whole")
    lab.umount()
    assert (lab.mnt / "odd").read_bytes() == source.read_bytes()


def test_mmap_and_sequential_reads(lab: Lab) -> None:
    source = lab.image("dense", 5 * MiB)
    lab.mount(lab.serve().uri, "--no-populate")
    with (
        (lab.mnt / "dense").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory,
    ):
        assert memory[:] == source.read_bytes()
