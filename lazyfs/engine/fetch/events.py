"""Waiting for one of several events, and for work of others to be over."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


async def first_of(*events: trio.Event) -> None:
    """Wait until one of `events` is set."""

    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(wait, event)


class UnderWay:
    """What is under way, by key; at most one thing for each."""

    def __init__(self) -> None:
        self._events: dict[int, trio.Event] = {}

    @contextmanager
    def mark(self, key: int) -> Iterator[None]:
        """Be under way inside the `with`, however that ends."""
        event = self._events[key] = trio.Event()
        try:
            yield
        finally:
            del self._events[key]
            event.set()

    def __contains__(self, key: int) -> bool:
        return key in self._events

    async def over(self, key: int) -> None:
        """Wait until nothing is under way for `key`."""
        if (event := self._events.get(key)) is not None:
            await event.wait()
