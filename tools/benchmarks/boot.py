"""Defines the rows with virtual machines. The guests are real and emulated, as in tests/vm."""

import concurrent.futures
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.lab import Lab, MiB
from benchmarks.measure import LAZYFS, Contenders, Notes, Row, Target
from benchmarks.processes import drop_caches, run

_TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(_TESTS / "vm"), str(_TESTS / "mount"), str(_TESTS)]

import guest_image  # noqa: E402
from guest_image import GuestImage  # noqa: E402
from virtual_machine import VirtualMachine  # noqa: E402

PLAIN, BARE, COPY = "plain file", "bare NBD", "copy, then boot"


class _NbdMachine(VirtualMachine):
    """A machine whose image QEMU reads from the server by itself.

    `backing` is the URI of "guest".
    """

    def _nodes(self, backing: Path, backing_format: str, direct: bool) -> list[dict[str, object]]:
        first, *others = super()._nodes(backing, backing_format, direct)
        remote = {"driver": "nbd", "server": Lab.server(str(backing)), "export": "guest"}
        return [{"node-name": first["node-name"], "read-only": True, **remote}, *others]


def _boot(
    lab: Lab, guest: GuestImage, backing: object, kind: type[VirtualMachine] = VirtualMachine
) -> None:
    """Boot, and wait until the guest has checked its files, written one, and powered itself off."""
    folder = lab.fresh("vm")
    machine = kind(folder, "vm", guest, backing)  # type: ignore[arg-type]
    try:
        machine.wait_for_the_end()
    finally:
        machine.close()
        shutil.rmtree(folder)


@contextmanager
def _guest(lab: Lab) -> Iterator[tuple[GuestImage, Path]]:
    """Build the guest, and yield it with a plain copy of its disk.

    The copy is on the disk that is measured. Another copy is in the repository.
    """
    guest = guest_image.build(lab.fresh("guest"), guest_image.cache_folder())
    lab.repository.mkdir(exist_ok=True)
    run("cp", "--sparse=always", guest.disk, lab.repository / "guest")
    yield guest, guest.disk
    lab.forget("guest")
    shutil.rmtree(guest.folder)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def _first(lab: Lab, notes: Notes) -> Iterator[Contenders]:
    """Boot the first VM on a host, at 50 MB/s from its repository."""
    with _guest(lab) as (guest, plain), lab.far(limited=True) as uri:

        def on_lazyfs() -> float:
            with lab.lazyfs(uri) as mount:
                drop_caches()
                return _timed(lambda: _boot(lab, guest, mount.mnt / "guest"))

        def copied() -> float:
            copy = lab.fresh("copy") / "guest"

            def work() -> None:
                run("nbdcopy", "--flush", lab.export(uri, "guest"), copy)
                _boot(lab, guest, copy)

            took = _timed(work)
            shutil.rmtree(copy.parent)
            return took

        yield {
            LAZYFS: on_lazyfs,
            PLAIN: lambda: _timed(lambda: _boot(lab, guest, plain)),
            BARE: lambda: _timed(lambda: _boot(lab, guest, lab.export(uri, "guest"), _NbdMachine)),
            COPY: copied,
        }


@contextmanager
def _later(lab: Lab, notes: Notes) -> Iterator[Contenders]:
    """Boot the later VMs, four at a time. The page cache is not dropped between them."""
    count = lab.size(20, 4)
    with _guest(lab) as (guest, plain), lab.far(limited=True) as uri, lab.lazyfs(uri) as mount:
        _boot(lab, guest, mount.mnt / "guest")
        mount.wait_whole("guest")

        def all_of_them(disk: Path) -> float:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                return _timed(
                    lambda: list(pool.map(lambda _: _boot(lab, guest, disk), range(count)))
                )

        yield {LAZYFS: lambda: all_of_them(mount.mnt / "guest"), PLAIN: lambda: all_of_them(plain)}
        notes.lines.append(f"{count} VMs, four at a time")


@contextmanager
def _units(delay_ms: int, lab: Lab, notes: Notes) -> Iterator[Contenders]:
    """Boot with several sizes of blocks, and note what that asks of the repository.

    Nothing is populated meanwhile.
    """
    seen: dict[str, str] = {}

    def boot(block: str) -> float:
        with (
            lab.far(delay_ms, limited=True) as uri,
            lab.lazyfs(uri, "--no-populate", "--block-size", block) as mount,
        ):
            drop_caches()
            took = _timed(lambda: _boot(lab, guest, mount.mnt / "guest"))
            image = mount.image("guest")
            seen[block] = f"{image['requests']} requests, {image['fetched_bytes'] / MiB:.1f} MiB"
            return took

    with _guest(lab) as (guest, _):
        default = "64K"
        yield {
            LAZYFS: partial(boot, default),
            **{f"--block-size {b}": partial(boot, b) for b in ("256K", "1M", "4M")},
        }
        notes.lines += [f"{block}: {text}" for block, text in seen.items()]


BOOT_ROWS = [
    Row(
        "boot-first",
        "VM boot, repository at 50 MB/s",
        "s",
        _first,
        [Target(PLAIN, at_most=1.2)],
        rounds=3,
    ),
    Row(
        "boot-later",
        "the second to twentieth VM",
        "s",
        _later,
        [Target(PLAIN, at_most=1.05)],
        rounds=2,
        slow=True,
    ),
    Row(
        "boot-units-1ms",
        "VM boot, nothing populated, 1 ms away",
        "s",
        partial(_units, 1),
        rounds=2,
        slow=True,
    ),
    Row(
        "boot-units-20ms",
        "VM boot, nothing populated, 20 ms away",
        "s",
        partial(_units, 20),
        rounds=2,
        slow=True,
    ),
]
