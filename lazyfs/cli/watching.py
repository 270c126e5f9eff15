"""`lazyfs status --watch`: one picture after another, at once when something has happened, and what that was.

An asyncio loop has a task for each daemon, which listens to its events; the questions for a picture run in a thread.
A daemon that ends takes its task along; one that comes gets one with the next picture.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lazyfs import errors

WATCH_S = 1.0
"""Between two pictures while nothing happens."""

MIN_S = 0.1
"""Between two pictures at least: a hundred images that are evicted are not a hundred pictures."""

CONNECT_S = 10.0
"""For a daemon to greet; one that hangs is tried again with the next picture."""

MAX_LINES = 5
"""Events shown below the table of a mount."""

EVENTS = ("JOB_STATUS_CHANGE", "IMAGE_STATE_CHANGE")

Mounts = list[dict[str, Any]]


def watch(query: Callable[[], Mounts], draw: Callable[[Mounts], None], keep: bool) -> None:
    """Draw what `query` returns, with the latest events of each mount as its `events`, until interrupted.

    Args:
        keep: show events again and again while they are among the latest; if not, each once.

    Raises:
        UserError: of `query`.
    """
    try:
        asyncio.run(_watch(query, draw, keep))
    except BaseExceptionGroup as group:
        if (found := group.subgroup(errors.UserError)) is None:
            raise
        raise found.exceptions[0] from None  # of the one task group, so not nested


async def _watch(query: Callable[[], Mounts], draw: Callable[[Mounts], None], keep: bool) -> None:
    news = asyncio.Event()
    lines: dict[str, deque[str]] = {}
    listening: dict[str, asyncio.Task[None]] = {}
    async with asyncio.TaskGroup() as tasks:
        while True:
            mounts = await asyncio.to_thread(query)
            for mount in mounts:
                socket = mount["control_socket"]
                if "error" not in mount and (socket not in listening or listening[socket].done()):
                    heard = lines.setdefault(socket, deque(maxlen=MAX_LINES))
                    greeted = asyncio.Event()
                    listening[socket] = tasks.create_task(_listen(socket, heard, news, greeted))
                    await greeted.wait()  # whoever sees the picture misses nothing from then on
                mount["events"] = list(lines.get(socket, ()))
                if not keep:
                    lines.get(socket, deque()).clear()
            draw(mounts)
            await asyncio.sleep(MIN_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S - MIN_S):
                    await news.wait()
            news.clear()


async def _listen(
    path: str, lines: deque[str], news: asyncio.Event, greeted: asyncio.Event
) -> None:
    """Add to `lines` what happens, until the daemon hangs up. Sets `greeted` once connected, or given up."""
    from qemu.qmp import QMPClient, QMPError

    client = QMPClient("lazyfs")
    # The listener first: nothing that happens once we are connected is missed.
    with suppress(QMPError, OSError, EOFError, TimeoutError), client.listener(EVENTS) as listener:
        try:
            async with asyncio.timeout(CONNECT_S):
                await client.connect(path)
            greeted.set()
            ended = asyncio.create_task(client.runstate_changed())
            heard = asyncio.create_task(_hear(listener, lines, news))
            try:
                await asyncio.wait([ended, heard], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (ended, heard):
                    task.cancel()
        finally:
            greeted.set()
            await client.disconnect()


async def _hear(listener: Any, lines: deque[str], news: asyncio.Event) -> None:
    while True:
        lines.append(describe(await listener.get()))
        news.set()


def describe(event: Mapping[str, Any]) -> str:
    """Return one line about an event, as of the control socket."""
    at = time.strftime("%H:%M:%S", time.localtime(event["timestamp"]["seconds"]))
    data = event["data"]
    if event["event"] == "JOB_STATUS_CHANGE":
        status = "gone" if data["status"] == "null" else data["status"]
        return f"{at} job {data['id']}: {status}"
    return f"{at} {data['path']}: {data['state']}{', ' + data['error'] if data['error'] else ''}"
