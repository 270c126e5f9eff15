"""A lab whose repository serves a bootable guest, and which runs virtual machines on the mount."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from guest_image import GuestImage
from lab import DEADLINE_S, Lab, Nbdkit
from virtual_machine import VirtualMachine

IMAGE = "debian-guest"
TEST_TIMEOUT_S = 300


class GuestLab(Lab):
    """A Lab with the guest in its repository."""

    watchdog_s = TEST_TIMEOUT_S - 30.0
    """How long a test may take. Guests take longer than plain reads do. Half a minute of pytest's
    time is left for taking everything down."""

    def __init__(self, folder: Path, guest: GuestImage) -> None:
        super().__init__(folder)
        self.guest = guest
        self.source = self.repository / IMAGE
        os.link(guest.disk, self.source)
        self._rate_file = folder / "rate"
        self._machines: list[VirtualMachine] = []

    format = "raw"
    """Of the image on the mount, which must be mounted so."""

    @property
    def disk(self) -> Path:
        """Return the path of the guest's image on the mount."""
        return self.mnt / (IMAGE if self.format == "raw" else f"{IMAGE}.{self.format}")

    def data_segments(self) -> list[tuple[int, int]]:
        """Return [start, end) of all that is not a hole, in order.

        It is found with lseek(2), which the server's block status is made of, too.
        """
        found: list[tuple[int, int]] = []
        with self.source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while (position := found[-1][1] if found else 0) < size:
                try:
                    start = os.lseek(file.fileno(), position, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    break  # only a hole is left
                found.append((start, os.lseek(file.fileno(), start, os.SEEK_HOLE)))
        return found

    def boot(
        self,
        arguments: str = "",
        *,
        size: str | None = None,
        direct: bool = False,
        iothread: bool = False,
    ) -> VirtualMachine:
        """Start a virtual machine on the image; see `VirtualMachine` for the arguments."""
        name = f"vm{len(self._machines)}"
        machine = VirtualMachine(
            self.folder,
            name,
            self.guest,
            self.disk,
            arguments=arguments,
            size=size,
            direct=direct,
            iothread=iothread,
            backing_format=self.format,
        )
        self._machines.append(machine)
        return machine

    def serve_slowly(self, rate: str) -> Nbdkit:
        """Serve at so many bits per second until `hurry`.

        Then a slow host, too, does things before the image is whole.
        """
        return self.serve(
            "rate", parameters=(f"rate={rate}", f"rate-file={self._rate_file}", "burstiness=0.1")
        )

    def hurry(self) -> None:
        """Let the slow repository have 1.5 Gbit/s."""
        new = self._rate_file.with_suffix(".new")  # nbdkit-rate-filter(1) wants it renamed
        new.write_text("1500M\n")
        new.rename(self._rate_file)

    def pivot(self, *machines: VirtualMachine) -> None:
        """Move the machines to the file which the image's path names now."""
        self.lazyfs("pivot", *(machine.qmp_socket for machine in machines))

    # -- the daemon

    def daemon_runs(self) -> bool:
        return self.daemon is not None and self.daemon.poll() is None

    @contextmanager
    def daemon_stopped(self) -> Iterator[None]:
        """Stop the daemon for a while, so that it exists but answers nothing."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.daemon.send_signal(signal.SIGCONT)

    def wait_for_the_daemons_end(self) -> None:
        """Wait until the daemon has ended by itself without an error, and left no mount or
        process."""
        assert self.daemon is not None
        assert self.daemon.wait(DEADLINE_S) == 0, self.log_text()
        self.daemon = None
        assert str(self.mnt) not in Path("/proc/self/mountinfo").read_text()
        assert self._lazyfs_processes() == []

    def _lazyfs_processes(self) -> list[list[bytes]]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"lazyfs" in words and os.fsencode(self.mnt) in words:
                    found.append(words)
        return found

    def close(self) -> None:
        """End the machines first, while their reads are still answered.

        Print what explains a failure.
        """
        with ExitStack() as stack:
            stack.callback(super().close)
            for machine in self._machines:
                stack.callback(machine.close)
                print(f"--- {machine.name}\n{machine.said_lately()}")
            print(f"--- lazyfs\n{self.log_text()}")
