"""Waits until images are whole, and shows how far they are."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lazyfs import errors

POLL_S = 0.5
"""Between two questions: a person does not notice, and an answer takes a daemon a millisecond."""


def until_whole(filling: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
    """Wait until `filling`, which returns images as `query-images` has them, returns none.

    Progress goes to stderr: bars on a terminal, else a line for each image.

    Raises:
        UserError: one of them has failed and will not become whole.
    """
    images = filling()
    if not images:
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(True), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {}
        while images:
            for image in images:
                path = image["path"]
                if image.get("replaced"):
                    raise errors.UserError(f"{path} was replaced and will not become whole: close what has it open")
                if image["state"] == "failed":
                    raise errors.UserError(f"{path} will not become whole: {image['error']}")
                if path not in bars:
                    bars[path] = progress.add_task(path, total=image["size"])
                    if not console.is_terminal:
                        console.print(f"waiting for {path} to become whole", markup=False, soft_wrap=True)
                progress.update(bars[path], completed=image["present_bytes"] + image["zero_bytes"])
            time.sleep(POLL_S)
            images = filling()
