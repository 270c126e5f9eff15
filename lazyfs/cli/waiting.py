"""Waits until images are whole, and shows the progress."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lazyfs import errors
from lazyfs.control import client as control_client

POLL_S = 0.5
"""The time between two queries. A person does not notice it, and an answer takes the daemon a
millisecond."""


STILL_S = 5.0
"""After so long without any progress, the user is told why. Population looks for room, and
reconnects, more often than that."""


def until_whole(
    filling: Callable[[], Sequence[Mapping[str, Any]]], timeout_s: float | None = None
) -> None:
    """Have images populated, and wait until all are whole.

    Progress goes to stderr: bars on a terminal, otherwise a line for each image. When nothing moves
    for a while, a line says why.

    Args:
        filling: returns the images that are still waited for, as `query-images` describes them. If
            an image has `waits`, that is why it may not move. When none is left, the wait ends.
        timeout_s: how long to wait at most. None means for ever.

    Raises:
        UserError: one of the images has failed and will not become whole, or the time is over.
    """
    until = math.inf if timeout_s is None else time.monotonic() + timeout_s
    moved_at, seen, told = time.monotonic(), -1, ""
    images = filling()
    if not images:
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {}
        while images:
            for image in images:
                path = image["path"]
                if image.get("replaced"):
                    raise errors.UserError(
                        f"{path} was replaced and will not become whole: close what has it open"
                    )
                if image["state"] == "failed":
                    raise errors.UserError(f"{path} will not become whole: {image['error']}")
                if path not in bars:
                    _populate(path)
                    bars[path] = progress.add_task(path, total=image["size"])
                    if not console.is_terminal:
                        console.print(
                            f"waiting for {path} to become whole", markup=False, soft_wrap=True
                        )
                progress.update(bars[path], completed=image["present_bytes"] + image["zero_bytes"])
            here = sum(image["present_bytes"] + image["zero_bytes"] for image in images)
            now = time.monotonic()
            if here != seen:
                moved_at, seen = now, here
            why = next((image["waits"] for image in images if image.get("waits")), "")
            if now >= until:
                raise errors.UserError(
                    f"{len(images)} of the images are not whole after {timeout_s:g} s"
                    + (f": {why}" if why else "")
                )
            if now > moved_at + STILL_S and why and why != told:
                console.print(f"nothing moves: {why}", markup=False, soft_wrap=True)
                told = why
            time.sleep(POLL_S)
            images = filling()


def _populate(path: str) -> None:
    """Ask the daemon to populate an image. With --no-populate nothing else would do that.

    A refusal is ignored here, because the image's state will soon show the reason.
    """
    mount, inside = control_client.locate(path)
    with suppress(errors.UserError):
        control_client.execute(mount, [("prefetch", {"path": inside})])


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show one bar on a terminal.

    Yields:
        A function to call with the number of bytes that are done and the number of all bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
