"""`lazyfs status --watch`: draws the status again and again, with the latest events.

A picture follows at once when something has happened. An asyncio loop has a task for each daemon,
which listens to the daemon's events. The queries for a picture run in a thread. When a daemon ends,
its task ends; a new daemon gets a task with the next picture.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lazyfs import errors

WATCH_S = 1.0
"""The time between two pictures while nothing happens."""

MIN_S = 0.1
"""The least time between two pictures, so that a hundred evictions do not cause a hundred
pictures."""

CONNECT_S = 10.0
"""The deadline for a daemon's greeting. If a daemon hangs, the next picture tries it again."""

MAX_LINES = 5
"""How many events are shown below the table of a mount."""

EVENTS = ("JOB_STATUS_CHANGE", "IMAGE_STATE_CHANGE")

Mounts = list[dict[str, Any]]


def watch(query: Callable[[], Mounts], draw: Callable[[Mounts], None], keep: bool) -> None:
    """Draw what `query` returns until interrupted, with each mount's latest events in `events`.

    Args:
        query: returns the mounts. It is called in a thread.
        draw: draws a picture of the mounts.
        keep: whether an event is shown in each picture while it is among the latest. If not, it is
            shown once.

    Raises:
        UserError: `query` raised it.
    """
    try:
        asyncio.run(_watch(query, draw, keep))
    except BaseExceptionGroup as group:
        if (found := group.subgroup(errors.UserError)) is None:
            raise
        # The group is from the one task group, so it contains no other groups.
        raise found.exceptions[0] from None


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
                    # From the first picture on, no event may be missed.
                    await greeted.wait()
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
    """Add the daemon's events to `lines` until the daemon hangs up.

    `greeted` is set once the connection is made or given up.
    """
    from qemu.qmp import QMPClient, QMPError

    client = QMPClient("lazyfs")
    # The listener exists before the connection, so that no event is missed.
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
    """Return one line about an event of the control socket."""
    at = time.strftime("%H:%M:%S", time.localtime(event["timestamp"]["seconds"]))
    data = event["data"]
    if event["event"] == "JOB_STATUS_CHANGE":
        status = "gone" if data["status"] == "null" else data["status"]
        return f"{at} job {data['id']}: {status}"
    return f"{at} {data['path']}: {data['state']}{', ' + data['error'] if data['error'] else ''}"
