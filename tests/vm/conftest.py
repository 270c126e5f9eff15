"""Fixtures of the tests with virtual machines: the guest, built once, and a lab that serves it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import guest_image
import pytest
import servers
from guest_image import GuestImage
from guest_lab import GuestLab


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestImage]:
    for program in ("qemu-system-x86_64", "mke2fs", "debugfs", "apt-get", "dpkg-deb"):
        servers.requires(program)
    folder = tmp_path_factory.mktemp("guest")
    yield guest_image.build(folder, guest_image.cache_folder())
    shutil.rmtree(folder)


@pytest.fixture
def lab(tmp_path: Path, guest: GuestImage) -> Iterator[GuestLab]:
    made = GuestLab(tmp_path, guest)
    try:
        yield made
    finally:
        made.close()
        # pytest keeps the folders of the last three runs: not with images in them.
        shutil.rmtree(tmp_path, ignore_errors=True)
