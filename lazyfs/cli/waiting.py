"""Waits until images are whole, and shows the progress."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from lazyfs import errors
from lazyfs.cli import printing, progress
from lazyfs.control import client as control_client
from lazyfs.core.escaping import one_line

if TYPE_CHECKING:
    from rich.progress import TaskID

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
        filling: returns the answers of daemons, in the form of `client.query`, with the images only
            that are still waited for. When none is left, the wait ends.
        timeout_s: how long to wait at most. None means for ever.

    Raises:
        UserError: one of the images has failed and will not become whole, or the time is over.
    """
    until = math.inf if timeout_s is None else time.monotonic() + timeout_s
    moved_at, seen, told = time.monotonic(), -1, ""
    found = filling()
    if not any(mount["images"] for mount in found):
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(True),
        TextColumn("{task.fields[pace]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}
        while images := [image for mount in found for image in mount["images"]]:
            jobs = {
                path: job for mount in found for path, job in progress.populate_jobs(mount).items()
            }
            connected = {
                image["path"]: mount["connected"] for mount in found for image in mount["images"]
            }
            for image in images:
                path = image["path"]
                _check_possible(image)
                if path not in tasks:
                    _populate(path)
                    tasks[path] = bars.add_task(one_line(path), total=image["size"], pace="")
                    if not console.is_terminal:
                        printing.note(f"waiting for {path} to become whole")
                bars.update(
                    tasks[path],
                    completed=image["present_bytes"] + image["zero_bytes"],
                    pace=progress.of_image(image, jobs.get(path), connected[path]).text,
                )
            here = sum(image["present_bytes"] + image["zero_bytes"] for image in images)
            now = time.monotonic()
            if here != seen:
                moved_at, seen = now, here
            why = _why_not(found, jobs)
            if now >= until:
                raise errors.UserError(
                    f"{len(images)} of the images are not whole after {timeout_s:g} s"
                    + (f": {why}" if why else "")
                )
            if now > moved_at + STILL_S and not why and not any(i["path"] in jobs for i in images):
                raise errors.UserError(
                    f"{images[0]['path']} is not being populated any more: somebody has cancelled "
                    "that, or evicted it"
                )
            if now > moved_at + STILL_S and why and why != told:
                console.print(one_line(f"nothing moves: {why}"), markup=False, soft_wrap=True)
                told = why
            time.sleep(POLL_S)
            found = filling()


def _check_possible(image: Mapping[str, Any]) -> None:
    """Raise UserError if an image will never become whole."""
    path = image["path"]
    if image.get("replaced"):
        raise errors.UserError(
            f"{path} was replaced and will not become whole: close what has it open"
        )
    if image["state"] == "failed":
        raise errors.UserError(f"{path} will not become whole: {image['error']}")


def _why_not(found: Sequence[Mapping[str, Any]], jobs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why the first image that waits for something does, or ""."""
    for mount in found:
        for image in mount["images"]:
            job = jobs.get(image["path"], {})
            why = job.get("error") or image["error"] or mount["message"]
            if why := why or progress.of_image(image, job or None).waits:
                return str(why)
    return ""


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
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(one_line(title), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
