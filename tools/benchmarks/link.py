"""Makes a slow link to the repository.

It is a network namespace for the server, a veth pair, and tc if the kernel has it. If the kernel
has no netem or no veth, nbdkit's `rate` and `delay` filters are used instead.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import run, running, wait_until

RATE = "400mbit"
"""The rate of the link, which is 50 MB/s."""

_TBF = f"rate {RATE} burst 256kb latency 400ms"

_HERE, _THERE = "198.18.0.1", "198.18.0.2"  # RFC 2544: for benchmarks


@dataclass(frozen=True)
class Link:
    """Describes how a server is reached."""

    prefix: tuple[str, ...]
    """What the command of the server begins with, so that it runs at the other end. If it is
    empty, there is no link but a UNIX socket."""
    filters: tuple[str, ...]
    """The filters of nbdkit for what the link itself does not do."""
    parameters: tuple[str, ...]
    address: str = _THERE


@contextmanager
def made(delay_ms: int = 0, limited: bool = False) -> Iterator[Link]:
    """Make a link on which an answer takes `delay_ms` longer, limited to 50 MB/s if `limited`."""
    filters, parameters = [], []
    if delay_ms and not _kernel_can("netem", f"delay {delay_ms}ms"):
        filters.append("delay")
        parameters.append(f"rdelay={delay_ms}ms")
    if limited and not _kernel_can("tbf", _TBF):
        filters.append("rate")
        parameters += ["rate=400M", "burstiness=0.1"]
    wanted = bool(delay_ms) + limited
    if not wanted or len(filters) == wanted:
        yield Link((), tuple(filters), tuple(parameters))
        return
    with _namespace() as prefix:
        # One at the root, the other below it: what the server sends is shaped, as that is what
        # takes time.
        parent = "root"
        if limited and "rate" not in filters:
            run(*prefix, "tc", "qdisc", "add", "dev", "there", parent, "handle", "1:",
                "tbf", *_TBF.split())  # fmt: skip
            parent = "parent 1:1"
        if delay_ms and "delay" not in filters:
            run(*prefix, "tc", "qdisc", "add", "dev", "there", *parent.split(),
                *f"netem delay {delay_ms}ms limit 100000".split())  # fmt: skip
        yield Link(prefix, tuple(filters), tuple(parameters))


def described() -> str:
    """Return what makes the links of this machine."""
    ways = {"rate": ("tbf", _TBF), "delay": ("netem", "delay 1ms")}
    return ", ".join(
        f"{what}: {'veth and ' + qdisc if _kernel_can(qdisc, options) else 'nbdkit filter'}"
        for what, (qdisc, options) in ways.items()
    )


@contextmanager
def _namespace() -> Iterator[tuple[str, ...]]:
    """Make a namespace, and yield the command that runs another command in it.

    Everything in the namespace ends together with the process that holds it.
    """
    here = f"lazyfs{os.getpid()}"
    with running("unshare", "--net", "sleep", "infinity", ready=lambda: True) as holder:
        own, theirs = os.readlink("/proc/self/ns/net"), f"/proc/{holder.pid}/ns/net"
        wait_until(lambda: os.readlink(theirs) != own, "unshare has made a namespace", holder)
        prefix = ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
        run("ip", "link", "add", here, "type", "veth", "peer", "name", "there", "netns", holder.pid)
        try:
            run("ip", "address", "add", f"{_HERE}/30", "dev", here)
            run("ip", "link", "set", here, "up")
            run(*prefix, "ip", "address", "add", f"{_THERE}/30", "dev", "there")
            run(*prefix, "ip", "link", "set", "there", "up")
            yield prefix
        finally:  # at once, and not when the kernel comes to it: the next has the same name
            with suppress(RuntimeError):  # it went with its namespace
                run("ip", "link", "delete", here)


@functools.cache
def _kernel_can(qdisc: str, options: str) -> bool:
    if not Path("/proc/self/ns/net").exists():
        return False
    try:
        with _namespace() as prefix:
            run(*prefix, "tc", "qdisc", "add", "dev", "there", "root", qdisc, *options.split())
    except (RuntimeError, OSError):
        return False
    return True
