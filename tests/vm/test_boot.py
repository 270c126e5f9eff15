"""Real Linux guests boot from an image that is not here yet, share it, and outlive its
repository."""

import subprocess

import pytest
from guest_lab import IMAGE, TEST_TIMEOUT_S, GuestLab
from lab import MiB

pytestmark = pytest.mark.timeout(TEST_TIMEOUT_S)

SECTORS_PER_MIB = MiB // 512


def test_boot_at_once_from_a_slow_repository(lab: GuestLab) -> None:
    """The overlay is larger than the image.

    Population would need 20 s, and the guest does not wait for it.
    """
    lab.mount(lab.serve_slowly("60M").uri)
    machine = lab.boot("guest.loop=1", size="1G")
    machine.wait_for("START")
    assert lab.image_status(IMAGE)["state"] == "partial"
    machine.wait_for_the_end()
    assert int(machine.wait_for("BEYOND")) == 768 * SECTORS_PER_MIB
    subprocess.run(["qemu-img", "check", "-q", machine.overlay], check=True)
    lab.hurry()
    lab.wait_for_state(IMAGE, "whole")
    lab.umount()
    subprocess.run(["cmp", lab.source, lab.disk], check=True)


def test_three_guests_fetch_each_allocated_byte_once(lab: GuestLab) -> None:
    server = lab.serve("rate", parameters=("rate=40M", "burstiness=0.1"))
    lab.mount(server.uri)
    machines = [lab.boot("guest.loop=1") for _ in range(3)]
    for machine in machines:
        machine.wait_for_the_end()
    status = lab.wait_for_state(IMAGE, "whole")
    assert status["demand_bytes"] > 0
    assert lab.bytes_fetched(server) == status["fetched_bytes"] == status["present_bytes"]
    assert _covered(server.reads()) == lab.data_segments()


def test_guests_go_on_without_the_repository(lab: GuestLab) -> None:
    server = lab.serve("rate", parameters=("rate=400M", "burstiness=0.1"))
    lab.mount(server.uri)
    early = [lab.boot("guest.loop=1000"), lab.boot("guest.loop=1000")]
    lab.wait_for_state(IMAGE, "whole")
    server.kill()
    late = lab.boot("guest.loop=1")
    for machine in early:
        machine.wait_for_cold_passes()
        machine.finish()
    late.wait_for_the_end()


def _covered(reads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges [start, end) that reads cover."""
    covered: list[tuple[int, int]] = []
    for offset, length in sorted(reads):
        if covered and covered[-1][1] >= offset:
            covered[-1] = (covered[-1][0], max(covered[-1][1], offset + length))
        else:
            covered.append((offset, offset + length))
    return covered
