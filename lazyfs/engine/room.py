"""Keeps the cache within --max-cache and --min-free.

It adds up what the cache takes, evicts, and says when there is no room:

    writers --reserve--> Budget --on_low--> Room.run: count, scan overlays, evict, set the Budget
                                              |
                                          message --> population pauses; status shows it

A count adds up all images. It is done when the budget runs low, and while something is wanted that
was refused. It is not done for single blocks, nor while a reader waits: a read takes the budget as
it is, and what the budget refuses is served without being kept. With limits but nothing to do no
task wakes up, except for --min-free, because other programs fill that disk as well.

`core/eviction.py` decides what to evict. This module finds out what that decision needs, and
carries it out.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio

from lazyfs import errors
from lazyfs.core import eviction
from lazyfs.core.eviction import Candidate, Evict, Limits, LookAtOverlays, Need, Shortage
from lazyfs.core.lifecycle import State
from lazyfs.engine.filesystem import Filesystem
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Space, Stores
from lazyfs.engine.operations import Refused, candidate, refuse
from lazyfs.units import format_size

logger = logging.getLogger(__name__)


async def no_overlays() -> frozenset[str]:
    """Return no backing files. This is for a mount that knows of no overlays."""
    return frozenset()


RETRY_S = 1.0
"""How often to look while there is no room. A close or an unpin makes room after at most this time.
One look at 10,000 images takes 2 ms."""

OVERLAYS_S = 10.0
"""How often to scan the overlays while nothing else keeps images from being evicted. A scan opens
every file there."""

WATCH_S = 30.0
"""How often to look at the disk for --min-free when lazyfs itself writes nothing."""


@dataclass(frozen=True, slots=True)
class RoomStatistics:
    """Describes the room as `query-mount` shows it. All numbers are bytes."""

    total: int
    """The size of the file system that holds the cache, or 0 if it does not say."""
    free: int
    """What this user may still write to that file system."""
    used: int
    """What the cache takes: data and maps."""
    max_cache: int | None
    min_free: int | None
    message: str
    """Why the cache may not grow now, or ""."""


class Room:
    """Applies the limits of one mount. Trio thread only."""

    def __init__(
        self,
        filesystem: Filesystem,
        stores: Stores,
        limits: Limits,
        backing_files: Callable[[], Awaitable[frozenset[str]]] = no_overlays,
    ) -> None:
        """Set the budget according to the catalog.

        Args:
            filesystem: the images.
            stores: asked how much of the disk is free.
            limits: what the user allows the cache.
            backing_files: returns the paths of the images that overlays need. Raises UserError if
                they cannot be found out.
        """
        self.may_evict = True
        """False once the mount is detached, because then nobody sees who opens the plain files."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when there is room again, and when there is none any more. Whoever populates sets
        it."""
        self.message = ""
        """Why the cache may not grow now, so that population pauses. It is "" if the cache may
        grow."""
        self._filesystem = filesystem
        self._stores = stores
        self._limits = limits
        self._backing_files = backing_files
        self._asked = trio.Event()
        self._overlays_free: frozenset[int] = frozenset()
        """The images that only overlays kept from being evicted at the latest scan that freed
        nothing."""
        self._overlays_found: tuple[Shortage, str] | None = None
        """The outcome of that scan."""
        self._scan_after = -math.inf
        self._not_evicted: dict[int, str] = {}
        """The reasons why images could not be evicted, as logged last, by inode."""
        filesystem.budget.on_low = self._ask_from_thread
        self._token = trio.lowlevel.current_trio_token()
        if limits:
            self._set_budget(self._measure())

    # -- what others ask

    def want(self) -> None:
        """Look again soon if there was no room, because somebody wants to write."""
        if self.message:
            self._asked.set()

    def set_limits(self, limits: Limits) -> None:
        """Apply other limits from now on.

        Raises:
            OSError: the file system cannot tell how much of it is free, and nothing has changed.
        """
        space = self._measure()
        self._limits = limits
        self._set_budget(space)
        self._asked.set()

    def statistics(self) -> RoomStatistics:
        """Return how much room there is now.

        If the file system cannot tell, its numbers are 0, and the message says why.
        """
        limits, (space, message) = self._limits, self._state()
        return RoomStatistics(
            space.total,
            space.free,
            self._used(),
            limits.max_cache,
            limits.free_bytes(space.total),
            message,
        )

    def trouble(self) -> str:
        """Return why the cache may not grow now, or "". Does not add up what the images take."""
        return self._state()[1]

    def _state(self) -> tuple[Space, str]:
        try:
            space, full = self._stores.space(), self._stores.nearly_full()
        except OSError as error:
            return Space(0, 0), f"the cache's file system fails: {error.strerror}"
        if full and not self.message:
            return space, "the cache's disk is full: what is read is not kept"
        return space, self.message

    # -- the task

    async def run(self) -> None:
        """Look for room whenever it is time to, and evict."""
        while True:
            watch_s = WATCH_S if self._limits.free_bytes(1) is not None else math.inf
            self._asked = trio.Event()
            if self._limits:
                try:
                    await self._make_room()
                except OSError as error:
                    self._say(f"no room: the cache's file system cannot tell: {error.strerror}")
            else:
                self._say("")
            if self.message:
                await trio.sleep(RETRY_S)
            with trio.move_on_after(watch_s):
                await self._asked.wait()

    async def _make_room(self) -> None:
        space = self._measure()
        need = self._need(space)
        message = ""
        if need.wanted > 0:
            freed, message = await self._evict(need)
            after = self._measure()
            # Some file systems free the blocks of a removed file a little later.
            space = Space(after.total, max(after.free, min(space.free + freed, after.total)))
            if self._need(space).wanted <= 0:
                message = ""
        self._set_budget(space)
        self._say(message)

    def _say(self, message: str) -> None:
        """Set the message.

        It is logged once that there is no room, and once that there is room again.
        """
        changed, self.message = bool(message) != bool(self.message), message
        if changed:
            level = logging.WARNING if message else logging.INFO
            logger.log(level, "%s", message or "there is room again")
            self.on_change()

    def _measure(self) -> Space:
        self._filesystem.budget.begin_count()
        return self._stores.space()

    def _room(self, space: Space) -> int:
        return self._limits.left(self._used(), space.total, space.free)

    def _need(self, space: Space) -> Need:
        room = self._room(space)
        demand = self._filesystem.budget.demand(room)
        return eviction.need(
            room=room,
            left=demand.left,
            unmet=demand.unmet,
            headroom=self._limits.headroom(space.total),
            refused_reader=demand.refused_reader,
            reading=any(
                image.record.state is State.PARTIAL for image in self._filesystem.open_images()
            ),
        )

    def _set_budget(self, space: Space) -> None:
        headroom, room = self._limits.headroom(space.total), self._room(space)
        if space.total and self._limits.free_bytes(space.total) is not None:
            room = min(room, 2 * headroom)  # others use the disk as well, so look again before long
        self._filesystem.budget.set_left(room, headroom)

    def _used(self) -> int:
        images = self._filesystem.names.all_images()
        return sum(
            image.cached_bytes() for image in images if not image.retired or image.open_count
        )

    def _ask_from_thread(self) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(lambda: self._asked.set())

    # -- evicting

    async def _evict(self, need: Need) -> tuple[int, str]:
        """Make room.

        Returns:
            How many bytes were freed, and, if they are not enough, the reason.
        """
        decision = self._decide(need, None)
        backing: frozenset[str] = frozenset()
        if isinstance(decision, LookAtOverlays):
            scanned, found = await self._scan(need)
            if scanned is None:
                assert found is not None
                return 0, self._explain(*found)
            backing = scanned
            decision = self._decide(need, backing)
            if isinstance(decision, Shortage):
                self._remember_scan(need, (decision, ""))
        if isinstance(decision, Shortage):
            return 0, self._explain(decision)
        assert isinstance(decision, Evict)
        return await self._carry_out(decision, need, backing) if decision.victims else (0, "")

    async def _carry_out(
        self, decision: Evict, need: Need, backing: frozenset[str]
    ) -> tuple[int, str]:
        images = {image.inode: image for image in self._filesystem.names.images()}
        freed, why, detail = 0, Shortage.ALL_NEEDED, ""
        for victim in decision.victims:
            if freed >= need.wanted:
                break
            image = images.get(victim.key)
            if image is None or image.retired:
                continue
            try:
                # Asked again, because each eviction before it has taken its time: somebody may have
                # opened or pinned this image, or the repository may have lost it.
                await self._filesystem.evict(image, partial(refuse, image, backing))
            except Refused:
                continue
            except (errors.LazyfsError, OSError) as error:
                why, detail = (
                    Shortage.CANNOT_EVICT,
                    f"{image.record.path} cannot be evicted: {error}",
                )
                self._complain(image, error)
            else:
                logger.info("evicted for room: image=%s bytes=%d", image.record.export, victim.size)
                freed += victim.size
        return freed, self._explain(why, detail)

    def _complain(self, image: Image, error: Exception) -> None:
        """Log why an image cannot be evicted. It is tried again each second, but logged once."""
        if self._not_evicted.get(image.inode) != errors.said(error):
            self._not_evicted[image.inode] = errors.said(error)
            logger.warning("cannot be evicted: image=%s reason=%s", image.record.export, error)

    async def _scan(self, need: Need) -> tuple[frozenset[str] | None, tuple[Shortage, str] | None]:
        """Find the backing files of overlays.

        Returns:
            The paths of the backing files and None; or None and the reason, if they are not known
                or are not looked up again yet.
        """
        free = frozenset(
            one.key for one in eviction.choose(self._candidates(need, None), eviction.ALL)
        )
        if trio.current_time() < self._scan_after and free <= self._overlays_free:
            return None, self._overlays_found
        try:
            return await self._backing_files(), None
        except errors.UserError as error:
            found = Shortage.UNKNOWN_OVERLAYS, f"nothing is evicted, as {error}"
        except Exception as error:
            logger.exception("cannot tell what overlays need, a bug in lazyfs")
            found = (
                Shortage.UNKNOWN_OVERLAYS,
                f"nothing is evicted: cannot tell what overlays need: {error!r}",
            )
        self._remember_scan(need, found)
        return None, found

    def _remember_scan(self, need: Need, found: tuple[Shortage, str]) -> None:
        """Do not scan for a while, unless something else becomes free to be evicted."""
        free = eviction.choose(self._candidates(need, None), eviction.ALL)
        self._overlays_free = frozenset(one.key for one in free)
        self._overlays_found = found
        self._scan_after = trio.current_time() + OVERLAYS_S

    def _decide(self, need: Need, backing: frozenset[str] | None) -> eviction.Decision:
        candidates = self._candidates(need, backing)
        return eviction.decide(
            candidates, need, backing_known=backing is not None, may_evict=self.may_evict
        )

    def _candidates(self, need: Need, backing: frozenset[str] | None) -> list[Candidate]:
        images = [image for image in self._filesystem.names.images() if not image.retired]
        filling = [image for image in images if image.fillable and not image.open_count]
        spared = (
            max(filling, key=lambda image: image.record.last_used_ns, default=None)
            if need.spare
            else None
        )
        return [candidate(image, backing or (), image is spared) for image in images]

    def _explain(self, why: Shortage, detail: str = "") -> str:
        space = self._stores.space()
        keep_free = self._limits.free_bytes(space.total)
        if self._limits.max_cache is not None and (keep_free is None or space.free > keep_free):
            what = (
                f"the cache takes {format_size(self._used())}, "
                f"--max-cache is {format_size(self._limits.max_cache)}"
            )
        else:
            what = (
                f"{format_size(space.free)} of the cache's disk is free, "
                f"--min-free is {format_size(keep_free or 0)}"
            )
        return f"no room: {what}, and {detail or why.value}"
