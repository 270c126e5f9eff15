"""Keeps the cache within --max-cache and --min-free: looks what it takes, evicts, and says when there is no room.

    fetchers --reserve--> Budget --(low)--> Room.run: look, scan overlays, evict, set the budget --> Budget
                                                |
                                            message --> population pauses; status

A look adds up all images. It comes when the budget runs low, and while something is wanted that was refused; never for
single blocks, and never on a reader's way: whoever reads finds the budget as it is, and what it refuses is served
without being kept. With limits but nothing to do no task wakes up, except for --min-free, as others fill that disk.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import trio

from lazyfs import errors
from lazyfs.core import eviction, shown_file
from lazyfs.core.eviction import Candidate, Limits
from lazyfs.core.lifecycle import State
from lazyfs.engine.filesystem import Filesystem, is_last_copy
from lazyfs.engine.image import partial_cache
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Space, Stores
from lazyfs.units import format_size

logger = logging.getLogger(__name__)


async def none_needed() -> frozenset[str]:
    """Return what overlays need where there are none."""
    return frozenset()


RETRY_S = 1.0
"""Between looks while there is no room: how late a close or an unpin makes some. A look at 10,000 images takes 2 ms."""

OVERLAYS_S = 10.0
"""Between scans of the overlays while nothing else keeps images from being evicted: a scan opens every file there."""

WATCH_S = 30.0
"""Between looks at the disk for --min-free when lazyfs itself writes nothing."""


@dataclass(frozen=True, slots=True)
class RoomStatistics:
    """What `query-mount` shows. Bytes."""

    total: int
    """Of the file system that holds the cache."""
    free: int
    """Of it, for this user."""
    used: int
    """By the cache: data and maps."""
    max_cache: int | None
    min_free: int | None
    message: str
    """Why the cache may not grow now, or ""."""


class Room:
    """The limits of one mount. Trio thread only."""

    def __init__(
        self,
        filesystem: Filesystem,
        stores: Stores,
        limits: Limits,
        backing_files: Callable[[], Awaitable[frozenset[str]]] = none_needed,
    ) -> None:
        """Set the budget by what the catalog says.

        Args:
            backing_files: returns the paths of the images that overlays need. Raises UserError if it cannot tell.
        """
        self.message = ""
        """Why the cache may not grow now, and population pauses; "" if it may."""
        self.may_evict = True
        """False once detached: nobody sees any more who opens the plain files."""
        self.on_change: Callable[[], None] = lambda: None
        """There is room again, or none any more. Set by whoever populates."""
        self._filesystem = filesystem
        self._stores = stores
        self._limits = limits
        self._backing_files = backing_files
        self._asked = trio.Event()
        self._fruitless: frozenset[int] = frozenset()
        """What overlays kept from being evicted at the latest scan."""
        self._scan_after = -math.inf
        self._overlay_trouble = ""
        """What came of that scan."""
        self._stuck: dict[int, str] = {}
        """Why images could not be evicted, as far as the log knows."""
        self._trouble = ""
        """Why nobody was evicted, if not for being open or pinned."""
        if limits:
            filesystem.budget.on_low = self._ask_from_thread
            self._token = trio.lowlevel.current_trio_token()
            self._settle(self._measure())

    # -- what others ask

    def shortage(self) -> str:
        """Return `message`, and have another look soon if there is one: somebody wants to write."""
        if self.message:
            self._asked.set()
        return self.message

    def statistics(self) -> RoomStatistics:
        """Return the room there is, as of now."""
        space, limits = self._stores.space(), self._limits
        return RoomStatistics(
            space.total, space.free, self._used(), limits.max_cache, limits.free_bytes(space.total), self.shortage()
        )

    # -- the task

    async def run(self) -> None:
        """Look whenever it is time to, and evict. Returns at once if there are no limits."""
        watch_s = WATCH_S if self._limits.free_bytes(1) is not None else math.inf
        while self._limits:
            self._asked = trio.Event()
            await self._make_room()
            if self.message:
                await trio.sleep(RETRY_S)
            with trio.move_on_after(watch_s):
                await self._asked.wait()

    async def _make_room(self) -> None:
        space = self._measure()
        wanted, reader = self._wanted(space)
        message = ""
        if wanted > 0:
            freed, message = await self._evict(wanted, spare=not reader)
            after = self._measure()
            # Some file systems free the blocks of a removed file a little later.
            space = Space(after.total, max(after.free, min(space.free + freed, after.total)))
            if self._wanted(space)[0] <= 0:
                message = ""
        self._settle(space)
        changed, self.message = bool(message) != bool(self.message), message
        if changed:
            logger.log(logging.WARNING if message else logging.INFO, "%s", message or "there is room again")
            self.on_change()

    def _measure(self) -> Space:
        self._filesystem.budget.begin_count()
        return self._stores.space()

    def _left(self, space: Space) -> int:
        return self._limits.left(self._used(), space.total, space.free)

    def _wanted(self, space: Space) -> tuple[int, bool]:
        """Return how many bytes to free, 0 for none, and whether for readers, or because a limit is exceeded."""
        headroom, room = self._limits.headroom(space.total), self._left(space)
        left, unmet, reader = self._filesystem.budget.after(room)
        mark = max(headroom, unmet)
        reading = any(image.record.state is State.PARTIAL for image in self._filesystem.open_images())
        return (mark + headroom - left if left < mark else 0), (reader and reading) or room < 0

    def _in_vain(self, candidates: list[Candidate], wanted: int) -> bool:
        """Whether there is room but for one write, for which evicting all would not be enough."""
        space = self._stores.space()
        headroom, left = self._limits.headroom(space.total), self._filesystem.budget.after(self._left(space))[0]
        return left >= headroom and 0 < sum(one.size for one in candidates) < wanted - headroom

    def _settle(self, space: Space) -> None:
        headroom, room = self._limits.headroom(space.total), self._left(space)
        if self._limits.free_bytes(space.total) is not None:
            room = min(room, 2 * headroom)  # others use the disk as well: look again before long
        self._filesystem.budget.set_left(room, headroom)

    def _used(self) -> int:
        return sum(map(_taken, self._filesystem.names.all_images()))

    def _ask_from_thread(self) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(lambda: self._asked.set())

    # -- evicting

    async def _evict(self, wanted: int, spare: bool) -> tuple[int, str]:
        """Evict for `wanted` bytes; return how many were freed, and why not enough, should they not be."""
        if self._in_vain(self._free_to_go(spare=False), wanted):
            return 0, ""  # the image that wants it says so itself
        backing = await self._scan(spare)
        if backing is None:
            return 0, self._explain()
        images = {image.inode: image for image in self._filesystem.names.images()}
        # From here to each eviction's first step nothing is awaited but evictions: who opens an image is seen.
        freed = 0
        chosen = eviction.choose(self._candidates(backing, spare), _ALL)
        if self._in_vain(chosen, wanted):
            return 0, ""
        for candidate in chosen:
            image = images[candidate.key]
            if freed >= wanted:
                break
            if image.open_count or image.retired:
                continue
            try:
                await self._filesystem.evict(image)
            except (errors.LazyfsError, OSError) as error:
                self._complain(image, error)
            else:
                logger.info("evicted for room: image=%s bytes=%d", image.record.export, candidate.size)
                freed += candidate.size
        return freed, self._explain()

    def _complain(self, image: Image, error: Exception) -> None:
        """One that cannot go leaves it to the others; said once, as it is tried again each second."""
        self._trouble = f"{image.record.path} cannot be evicted: {error}"
        if self._stuck.get(image.inode) != str(error):
            self._stuck[image.inode] = str(error)
            logger.warning("cannot be evicted: image=%s reason=%s", image.record.export, error)

    async def _scan(self, spare: bool) -> frozenset[str] | None:
        """Return the backing files of overlays; None if nothing may be evicted now."""
        free_to_go = frozenset(one.key for one in self._free_to_go(spare))
        self._trouble = "" if self.may_evict else "nothing is evicted after detach"
        if not free_to_go or not self.may_evict:
            return None
        if trio.current_time() < self._scan_after and free_to_go <= self._fruitless:
            self._trouble = self._overlay_trouble
            return None
        try:
            backing = await self._backing_files()
        except errors.UserError as error:
            self._overlay_trouble = f"nothing is evicted, as {error}"
        except Exception as error:
            logger.exception("cannot tell what overlays need, a bug in lazyfs")
            self._overlay_trouble = f"nothing is evicted: cannot tell what overlays need: {error!r}"
        else:
            if eviction.choose(self._candidates(backing, spare), 1):
                return backing
            self._overlay_trouble = "nothing can be evicted: what is not open or pinned, overlays need"
        self._trouble = self._overlay_trouble
        self._fruitless, self._scan_after = free_to_go, trio.current_time() + OVERLAYS_S
        return None

    def _free_to_go(self, spare: bool) -> list[Candidate]:
        """Return whom nothing but an overlay would keep."""
        return eviction.choose(self._candidates(frozenset(), spare), _ALL)

    def _candidates(self, backing: frozenset[str], spare: bool) -> list[Candidate]:
        """What a later fetch can bring back: not the only copy of an image that is gone or has changed."""
        images = [
            image
            for image in self._filesystem.names.images()
            if image.record.state is not State.REMOTE and not image.retired and not is_last_copy(image)
        ]
        filling = [image for image in images if image.fillable and not image.open_count]
        spared = max(filling, key=lambda image: image.record.last_used_ns, default=None) if spare else None
        return [
            Candidate(
                key=image.inode,
                size=_taken(image),
                last_used_ns=image.record.last_used_ns,
                opened=image.open_count > 0,
                pinned=image.record.pinned,
                backing=image.record.path in backing,
                spared=image is spared,
            )
            for image in images
        ]

    def _explain(self) -> str:
        space = self._stores.space()
        keep_free = self._limits.free_bytes(space.total)
        if self._limits.max_cache is not None and (keep_free is None or space.free > keep_free):
            what = f"the cache takes {format_size(self._used())}, --max-cache is {format_size(self._limits.max_cache)}"
        else:
            what = f"{format_size(space.free)} of the cache's disk is free, --min-free is {format_size(keep_free or 0)}"
        why = self._trouble or "nothing can be evicted: images are open, pinned or being filled"
        return f"no room: {what}, and {why}"


_ALL = 1 << 62


def _taken(image: Image) -> int:
    """Return what an image takes of the disk: `Image.allocated_bytes`, and the map of a raw one that is not whole."""
    record = image.record
    if record.state is State.REMOTE:
        return 0
    own_map = record.state is not State.WHOLE and record.format == shown_file.RAW
    return image.allocated_bytes() + (partial_cache.map_bytes(record) if own_map else 0)
