"""Shares the connection of a server that takes one at a time, as qemu-nbd does by default.

Such a server does not greet another client while it has one. Then the readers of an image have the
connection: population uses theirs, or gives up its own for them, and nobody else asks the server.
An export that hangs looks similar, but its server has sent a greeting, and takes more connections.
"""

import logging
import weakref
from collections.abc import Iterator
from contextlib import suppress

import trio

from lazyfs import errors
from lazyfs.repository.nbd_connect import Attempt
from lazyfs.repository.nbd_filler import NbdFiller
from lazyfs.repository.nbd_handle import NbdHandle

logger = logging.getLogger(__name__)

GIVE_WAY_S = 2.0
"""A reader to whom the server has sent nothing for so long is given the connections of others. It
is unmeasured: a far server with TLS greets after four round trips, a second or less."""

SOLE_S = 60.0
"""How long a server that takes one connection is not asked for another. It is unmeasured."""

PROBE_S = 2.0
"""How long a reader's connection has to answer when the server does not greet another client. It is
unmeasured."""


class SoleConnection:
    """Knows who has connections to one server. Trio thread only."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._readers: weakref.WeakValueDictionary[str, NbdHandle] = weakref.WeakValueDictionary()
        self._fillers: weakref.WeakSet[NbdFiller] = weakref.WeakSet()
        self._until = float("-inf")

    @property
    def seen(self) -> bool:
        """True while the server seems to take one connection only."""
        return trio.current_time() < self._until

    def note(self) -> None:
        """Note that the server seems to take one connection only."""
        if not self.seen:
            logger.info("%s takes one connection at a time: readers share it", self._uri)
        self._until = trio.current_time() + SOLE_S

    # -- who has connections

    def add_reader(self, export: str, handle: NbdHandle) -> None:
        """Note the demand connection of an export."""
        self._readers[export] = handle

    def add_filler(self, filler: NbdFiller) -> None:
        """Note one that fills an image."""
        self._fillers.add(filler)

    def reader(self, export: str) -> NbdHandle | None:
        """Return the demand connection of an export, if there is one that works."""
        found = self._readers.get(export)
        return None if found is None or found.broken else found

    def _working(self) -> Iterator[NbdHandle]:
        return (handle for handle in list(self._readers.values()) if not handle.broken)

    def check_free(self) -> None:
        """Raise Busy if the server takes one connection, and a reader has it."""
        if self.seen and next(self._working(), None) is not None:
            raise errors.Busy(self._uri)

    def note_connected(self) -> None:
        """Note that a connection was made. If others worked meanwhile, the server takes several."""
        if self.seen and next(self._working(), None) is not None:
            logger.info("%s takes several connections", self._uri)
            self._until = float("-inf")

    # -- who gets them

    async def give_way(self, attempt: Attempt) -> None:
        """Close what nobody needs now, if the server has not greeted after a while.

        That is the connections of population, and those of readers that are idle. Run it beside an
        attempt to connect. It ends only when it is cancelled.
        """
        await trio.sleep(GIVE_WAY_S)
        fillers = [filler for filler in self._fillers if filler.holds_connection]
        idle = [handle for handle in self._working() if handle.idle]
        if attempt.greeted.is_set() or not (fillers or idle):
            return
        for filler in fillers:
            filler.give_way()
        for handle in idle:
            handle.close("another reader needs the one connection of the server")
        try:
            await trio.sleep_forever()
        finally:  # the connection is made, or it has failed
            if attempt.greeted.is_set():  # it greets now that they are gone
                self.note()

    async def is_in_use(self) -> bool:
        """Return whether the server answers a reader, although it has not greeted another client.

        Then it is there, and takes one connection only. All readers are tried at the same time.
        """
        answers: list[NbdHandle] = []

        async def probe(handle: NbdHandle) -> None:
            with suppress(errors.LazyfsError):
                await handle.probe()
                answers.append(handle)
                nursery.cancel_scope.cancel()

        with trio.move_on_after(PROBE_S):
            async with trio.open_nursery() as nursery:
                for handle in self._working():
                    nursery.start_soon(probe, handle)
        if answers:
            self.note()
        return bool(answers)
