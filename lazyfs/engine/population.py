"""Fills images in the background.

A few workers share all images fairly. Images that somebody has open come first. A worker takes the
image that has waited longest, gives it one turn of at most TURN_S, and chooses again. The image
decides what to fetch, and when readers go first (`FillPort.claim`). The repository's fillers move
the bytes. While nothing can be filled, no task wakes up.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import trio

from lazyfs import errors
from lazyfs.core import fetch_plan
from lazyfs.core.pacing import Backoff
from lazyfs.engine.image.filling import Filling
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Filler, Repository, Stores
from lazyfs.engine.supervision import call_beside

logger = logging.getLogger(__name__)

WORKERS = 2
"""Two threads saturate a host with 2 cores (2.6-3.5 GB/s). A third only took time from the FUSE
loop."""

TURN_S = 2.0
"""How long a turn takes. It is long enough that a reconnect costs little (3 round trips, 60 ms at
20 ms each), and short enough for fairness."""

ROOM_CHECK_S = 1.0
"""How often to look for room while there is none."""

LEARN_S = 10.0
"""How long one question about extents may take. After that the image counts as unreachable, and the
worker turns to the next image."""

LOOK_AGAIN_S = 0.5
"""How long an image waits for another turn when everything that is missing is already being
fetched."""

RECONNECT_S = 1.0
"""How long an image waits for another turn after it has lost its connection. Readers that wait
reconnect sooner by themselves."""

HELD = "population is paused; lazyfs resume MOUNTPOINT goes on"
"""What `status` says while population is held."""

MAX_RETRY_S = 60.0
"""How long an image whose ranges fail waits for another turn, at most. The repository may be
repaired at any time."""


@dataclass(frozen=True, slots=True)
class PopulationStatistics:
    """Describes what population has to do, and how it has gone."""

    waiting: int
    """Images that wait for a turn."""
    working: int
    """Images that have a turn."""
    failures: int
    """Turns that have failed since the daemon started."""
    paused: bool
    """True if nothing is filled although something could be, because there is no room."""


class Population:
    """Runs the workers of one mount."""

    def __init__(
        self, repository: Repository, stores: Stores, images: Callable[[], Iterable[Image]]
    ) -> None:
        """Do nothing before `run`.

        Args:
            repository: makes the fillers.
            stores: asked whether the disk is nearly full.
            images: returns the images that may be filled. Called before each turn.
        """
        self.paused = ""
        """Why nothing is being filled although something could be. It is "" otherwise."""
        self.shortage: Callable[[], str] = lambda: ""
        """Returns why the cache may not grow, or "". Called before each turn. Whoever limits the
        cache sets it."""
        self.held = False
        """True while nothing is filled because somebody wants that."""
        self.on_turn: Callable[[], None] = lambda: None
        """Called after each turn, and when filling stops because there is no room."""
        self._repository = repository
        self._stores = stores
        self._images = images
        self._wake = trio.Event()
        self._turns = 0
        self._failures = 0
        self._busy: list[Image] = []
        """One image for each worker that has a turn under way."""
        self._backoffs: dict[int, Backoff] = {}

    def hold(self) -> None:
        """Fill nothing until `release`. Turns under way end."""
        self.held = True
        self.paused = HELD
        for image in self._images():
            image.populating.pace.stopped = True
            image.populating.rate.forget()
        self.wake()

    def release(self) -> None:
        """Undo `hold`. Images that are paused themselves stay so."""
        self.held = False
        for image in self._images():
            image.populating.pace.stopped = not image.populating.goes_on
        self.wake()

    def wake(self) -> None:
        """Look again, because something may have become fillable."""
        self._wake.set()

    def statistics(self) -> PopulationStatistics:
        """Return what there is to do now."""
        waiting = sum(image.fillable and image not in self._busy for image in self._images())
        return PopulationStatistics(
            waiting, len(set(self._busy)), self._failures, bool(self.paused)
        )

    def waits_for(self, image: Image) -> str:
        """Return what an image that is to be filled waits for, as `query-jobs` says it, or ""."""
        populating = image.populating
        if populating.paused or self.held:
            return "resume"
        if image.fill_trouble:
            return "repository" if populating.unreachable else "retry"
        if self.paused:
            return "room"
        return "" if populating.rate.begun else "turn"

    async def run(self) -> None:
        """Fill images until cancelled.

        Cancellation: everything that was claimed has been given back when this ends.
        """
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work)

    async def _work(self) -> None:
        fillers: dict[int, Filler] = {}
        while True:
            # The event is renewed before looking, so the wait does not miss what happens after.
            if self._wake.is_set():
                self._wake = trio.Event()
            wake = self._wake
            image = self._choose()
            await self._close_unused(fillers, image)
            if image is None:
                await self._wait(wake)
            elif shortage := self._shortage():
                self._stand_still(shortage)
                self.on_turn()
                await trio.sleep(ROOM_CHECK_S)
            else:
                self.paused = ""
                self._busy.append(image)
                try:
                    await self._guarded_turn(image, fillers)
                finally:
                    self._busy.remove(image)
                self.on_turn()

    def _stand_still(self, why: str) -> None:
        """Note that nothing is filled, so that this time does not count in the rates."""
        if not self.paused:
            for image in self._images():
                image.populating.rate.forget()
        self.paused = why

    def _shortage(self) -> str:
        """Return why nothing may be filled now, or ""."""
        try:
            nearly_full = self._stores.nearly_full()
        except OSError as error:
            return f"the cache's file system cannot say how full it is: {error.strerror}"
        return "the cache's disk is nearly full" if nearly_full else self.shortage()

    def _choose(self) -> Image | None:
        if self.held:
            return None
        now = trio.current_time()
        ready = {}
        for image in self._images():
            if image.fillable and image.populating.due(now) <= now:
                ready[image.inode] = image
                if image.populating.waits_since is None:
                    image.populating.waits_since = self._turns
        inode = fetch_plan.choose_image(
            (
                fetch_plan.Candidate(
                    image.inode,
                    image.open_count > 0,
                    image.populating.waits_since or 0,
                    busy=image in self._busy,
                )
                for image in ready.values()
            ),
            self._turns,
        )
        return None if inode is None else ready[inode]

    async def _wait(self, wake: trio.Event) -> None:
        """Wait until somebody calls `wake`, or until an image that has to wait is due."""
        self.paused = HELD if self.held else ""
        now = trio.current_time()
        waiting = (
            []
            if self.held
            else [image.populating.due(now) for image in self._images() if image.fillable]
        )
        with trio.move_on_at(min(waiting, default=math.inf)):
            await wake.wait()

    async def _guarded_turn(self, image: Image, fillers: dict[int, Filler]) -> None:
        """Give an image a turn. A failure of any kind concerns this image alone."""
        try:
            await self._turn(image, fillers)
        except Exception as error:
            logger.exception("filling failed, a bug in lazyfs: image=%s", image.record.export)
            bug = errors.StateError(f"filling failed, a bug in lazyfs: {error!r}")
            self._note(image, bug, progress=False)

    async def _turn(self, image: Image, fillers: dict[int, Filler]) -> None:
        self._turns += 1
        image.populating.waits_since = self._turns
        filling = image.filling
        if filling is None:  # it was closed while the worker closed connections
            return
        port, table = filling.port, filling.table
        before, began = table.counters().populated_bytes, trio.current_time()
        if self._busy.count(image) == 1:  # two workers may fill one image
            image.populating.rate.begin_turn(began, table.counters().fetched_bytes)
        port.forget_trouble()
        try:
            await self._learn(filling)
            filler = fillers.get(image.inode)
            if filler is None:
                filler = fillers[image.inode] = self._repository.filler(
                    port.export, filling.samples.take
                )
            await self._fill(filling, filler)
        except errors.ExportChanged as error:
            filling.reader.changed(error)
            return
        except (errors.LazyfsError, OSError) as error:
            trouble: Exception | None = error
        else:
            trouble = port.trouble
        finally:
            if not image.open_count:
                filling.reader.drop_connection_when_idle()
        progress = table.counters().populated_bytes > before
        if trouble is None and not progress and trio.current_time() < began + TURN_S:
            # Others have claimed everything that is missing. Whether they succeed or fail says
            # nothing about this turn.
            image.populating.after = max(image.populating.after, trio.current_time() + LOOK_AGAIN_S)
        else:
            self._note(image, trouble, progress)

    async def _learn(self, filling: Filling) -> None:
        """Learn what the fill needs next, within LEARN_S.

        A source reconnects for ever, which a worker must not do.
        """
        try:
            with trio.fail_after(LEARN_S):
                await filling.reader.learn_next()
        except trio.TooSlowError:
            raise errors.ConnectionLost(
                self._repository.uri, f"no answer in {LEARN_S:g} s"
            ) from None

    async def _fill(self, filling: Filling, filler: Filler) -> None:
        """Let the filler work, and learn meanwhile what the rest of the image holds."""
        await call_beside(filling.reader.learn_ahead, partial(filler.run, filling.port, TURN_S))

    def _note(self, image: Image, trouble: Exception | None, progress: bool) -> None:
        """Note how a turn has ended.

        An image whose turn failed waits before its next turn, longer each time.
        """
        if trouble is None:
            image.populating.note_trouble("", 0)
            self._backoffs.pop(image.inode, None)
            return
        self._failures += 1
        image.populating.note_trouble(
            str(trouble),
            image.statistics().fetched_bytes,
            isinstance(trouble, errors.ConnectionLost),
        )
        if progress:
            self._backoffs.pop(image.inode, None)
        backoff = self._backoffs.setdefault(image.inode, Backoff(first=0.2, limit=MAX_RETRY_S))
        wait_s = RECONNECT_S if isinstance(trouble, errors.ConnectionLost) else backoff.next()
        image.populating.after = trio.current_time() + wait_s
        logger.debug("population waits: image=%s reason=%s", image.record.export, trouble)

    async def _close_unused(self, fillers: dict[int, Filler], keep: Image | None) -> None:
        """Close the connections of images that are whole, failed or gone.

        If there is nothing to do, close all of them.
        """
        fillable = (
            {image.inode for image in self._images() if image.fillable}
            if keep is not None
            else set()
        )
        for inode in [inode for inode in fillers if inode not in fillable]:
            await fillers.pop(inode).aclose()
        while len(fillers) > _MAX_CONNECTIONS:
            await fillers.pop(next(iter(fillers))).aclose()


_MAX_CONNECTIONS = 8
"""How many connections one worker keeps for images to which it will come back."""
