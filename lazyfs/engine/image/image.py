"""One image: its state, its cache file, and reads of it.

Invariants (more in `doc/CONCURRENCY.md`):

- `_changing` serialises every change of state; `record` is replaced, never edited, and the catalog knows a
  state before anybody relies on it.
- The bytes behind one Image never change version: when the export changes, a new Image with a new inode
  takes the name (`filesystem.py`), and this one serves what it has to those who have it open.
- `_file` stays open while anybody reads: it is closed only with no open count and no population.
- Opens of the whole image (by its second inode number) use `_plain`; those from before go on with `_file`.
"""

# Longer than 500 lines: it is about to be split by idea.

import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio

from lazyfs import errors
from lazyfs.core import inode_number, lifecycle
from lazyfs.core.block_map import BlockMap
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import State
from lazyfs.core.shown_file import ShownFile
from lazyfs.engine.context import Context
from lazyfs.engine.fetch.fetcher import Fetcher
from lazyfs.engine.image import image_statistics, partial_cache, reading
from lazyfs.engine.image.digest_check import DigestCheck
from lazyfs.engine.image.populating import Populating
from lazyfs.engine.interfaces import Export, FetchCounters, ImageFile, ImageRecord, PlainFile, Store
from lazyfs.engine.pace import Pace
from lazyfs.engine.totals import Read

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHECKPOINT_S = 5.0
"""Between checkpoints while something changes: what a crash may cost. One fdatasync of both files each."""

ROOM_CHECK_S = 5.0
"""Between looks for room for an image that is read without being kept."""


class Image:
    """An export as this host sees it. Trio thread only."""

    def __init__(self, record: ImageRecord, context: "Context[Image]") -> None:
        self.record = record
        self.open_count = 0
        self.gone = False
        """The repository does not list it any more."""
        self.retired = False
        """Another inode has the name now; this one lives until it is closed."""
        self.populating = Populating(Pace(context.pace), context.populate)
        self.fetcher: Fetcher | None = None
        self._context = context
        self._shown: ShownFile | None = None
        """Set by the first open; from then on the size is fixed."""
        self._file: ImageFile | None = None
        self._plain: PlainFile | None = None
        self._plain_opens = 0
        self._store: Store | None = None
        self._unkept = False
        """There was no room even for a map: `_store` keeps nothing."""
        self._digest_check = DigestCheck(lambda: self.record, self.fail, self.recover, context.syncs)
        self._open_trouble = ""
        """Why the cache file cannot be opened, if the user can mend that."""
        self._changing = trio.Lock()
        self._scope = trio.CancelScope()

    # -- as the file system sees it

    @property
    def inode(self) -> int:
        """The inode number until it is whole, and the key in the catalog."""
        return self.record.inode

    @property
    def shown_inode(self) -> int:
        """The inode number that its name leads to now."""
        whole = self.record.state is State.WHOLE
        return inode_number.whole(self.record.inode) if whole else self.record.inode

    def allocated_bytes(self) -> int:
        """Return what the cache file takes of the disk, as `du` shows it: data, and a qcow2's metadata."""
        metadata = 0 if self.record.state is State.REMOTE or self._unkept else self.record.shown.metadata_size
        return image_statistics.present_bytes(self.record, self.fetcher) + metadata

    @property
    def fillable(self) -> bool:
        """Whether population could do something here."""
        kept = self.record.state is State.PARTIAL and not (self.gone or self.retired or self._unkept)
        return kept and self.populating.goes_on and self.fetcher is not None and self.fetcher.can_be_filled

    @property
    def plain_fd(self) -> int:
        """The descriptor of the plain file, while the whole image is open."""
        assert self._plain is not None
        return self._plain.fileno()

    async def open(self, plain: bool = False) -> None:
        """Count an opener, and begin the cache if this is the first one ever; `plain`: as a whole image only.

        The size must be known (`Filesystem.describe`).

        Raises:
            CacheCorrupt, OSError: it cannot be used (ESTALE: retired, or not whole any more), and does not count.
        """
        self.open_count += 1
        try:
            async with self._changing:
                if self.retired or (plain and self.record.state is not State.WHOLE):
                    # Its files are gone; the kernel looks the name up again and finds the new inode.
                    if self.retired and self.open_count == 1:  # `retire` left the file open for us
                        await self._close_file()
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                if plain:
                    await self._open_plain()
                elif self._file is None:
                    await self._open_file()
                if self._context.populate and self.open_count == 1:
                    self.populating.want()
                self._shown = self.record.shown
        except BaseException:
            self.open_count -= 1
            raise
        self._touch()
        self._context.on_fillable()

    def _touch(self) -> None:
        """Note the use; the catalog hears of it with the next change, or from `Filesystem.save_uses`."""
        self.record = replace(self.record, last_used_ns=time.time_ns())

    async def release(self, plain: bool = False) -> None:
        """Uncount an opener. No read of this opener may be under way."""
        self.open_count -= 1
        self._touch()
        if plain:
            self._plain_opens -= 1
        if self.open_count and self._plain_opens:
            return
        async with self._changing:
            await self._close_plain_if_unused()
            if self.open_count:
                return
            if self.record.state is State.WHOLE or self.retired or self._unkept:
                await self._close_file()
            elif self.fetcher is not None:
                await self.fetcher.rest()

    def read_now(self, offset: int, length: int, plain: bool) -> bytes | None:
        """Return what `read` would, if the host's page cache has all of it; None if not, or if anything is wrong."""
        fetcher = None if plain or self._store is None else self.fetcher
        return reading.read_now(self._shown, self._plain if plain else self._file, fetcher, offset, length)

    async def read(self, offset: int, length: int, plain: bool = False, read: Read | None = None) -> bytes:
        """Return the bytes at `offset` of the file shown, fewer at its end. The image must be open in the same way.

        Raises:
            RequestFailed, ExportChanged, UserError: a missing range cannot be had.
            OSError, CacheCorrupt: the cache file cannot be read.
        Cancellation: nothing is lost. `read` learns how it was served.
        """
        shown = self._shown
        assert shown is not None
        wanted = ByteRange(min(offset, shown.size), min(offset + length, shown.size))
        if plain or self._store is None:
            return await reading.read_file(self._plain if plain else self._file, wanted)
        return await reading.read_partial(shown, wanted, self._cache, read)

    def _cache(self) -> tuple[Fetcher, Store]:
        """Both change when room is found for an image that had none."""
        assert self.fetcher is not None and self._store is not None  # noqa: PT018
        return self.fetcher, self._store

    # -- the life of an image

    async def resume(self) -> None:
        """Open what an earlier daemon left of a partial or failed image, so that population can go on."""
        async with self._changing:
            if self._file is None:
                await self._open_file()

    async def fail(self, reason: errors.LazyfsError) -> None:
        """Fetch nothing more; present ranges stay readable."""
        async with self._changing:
            if self.fetcher is not None:
                self.fetcher.failure = reason
            if self.record.state is State.WHOLE and self.record.error != str(reason):
                await self._save(error=str(reason))
            elif self.record.state is State.PARTIAL:  # a failed image keeps its first reason
                logger.warning("image failed: image=%s reason=%s", self.record.export, reason)
                await self._save(state=State.FAILED, error=str(reason))
                await self._disown()

    async def recover(self) -> None:
        """The cause of a failure is gone: the export is again what the cache was filled from."""
        async with self._changing:
            if self.record.state is State.FAILED:
                await self._save(state=State.PARTIAL, error="")
                if self.fetcher is not None:
                    self.fetcher.failure = None
            elif self.record.error:
                await self._save(error="")
        self._context.on_fillable()

    async def describe(self, size: int, identity: str) -> None:
        """Take over what the repository says of an image that has nothing cached."""
        async with self._changing:
            if self.record.state is State.REMOTE and self._file is None:
                self.record = replace(self.record, size=size, identity=identity)

    async def prefetch(self) -> None:
        """Begin the cache without a reader, and let population work on it whatever the mount's default.

        The size must be known.

        Raises:
            OSError, CacheCorrupt, UserError: it cannot be begun.
        """
        async with self._changing:
            if self.record.state is State.FAILED:
                raise errors.UserError(f"{self.record.path} has failed: {self.record.error}")
            if self.record.state is not State.WHOLE:
                self.populating.want()
                if self._file is None:
                    await self._open_file()
                self._touch()
        self._context.on_fillable()

    async def annotate(self, **changes: object) -> None:
        """Keep what an operator says of the image: `pinned`, `digest`."""
        async with self._changing:
            if replace(self.record, **changes) != self.record:  # type: ignore[arg-type]
                await self._save(**changes)

    async def retire(self, reason: errors.LazyfsError | None, take_over: Callable[[], T]) -> T:
        """Give up the name, and remove what is cached; return what `take_over` returns.

        Who has it open keeps what was present. With a `reason` the rest is not fetched any more; without, readers still
        fetch: the export is the same.

        `take_over` puts another image in this one's place in the catalog; it is called in a thread.

        Raises:
            UserError, OSError, and what `take_over` raises: all is as it was.
        """
        async with self._changing:
            remove = partial(partial_cache.remove, self._context.stores, self.record, take_over)
            taken_over = await trio.to_thread.run_sync(remove)
            self.retired = True
            self.populating.stop()
            self._scope.cancel()
            if self.fetcher is not None and reason is not None:
                self.fetcher.failure = reason
                await self.fetcher.aclose()
            if not self.open_count:
                await self._close_plain_if_unused()
                await self._close_file()
        return taken_over

    async def aclose(self) -> None:
        """Save everything, hand off what is complete, and close; for the daemon's end, when nobody reads any more."""
        self._scope.cancel()
        async with self._changing:
            self._scope.cancel()  # again: an open that was under way has begun another
            if self.fetcher is not None and self.record.state in (State.PARTIAL, State.FAILED) and not self.retired:
                await self.fetcher.written()
                if not await self._become_whole(self.fetcher):  # its task may not have begun, or was cancelled
                    await self._checkpoint()
            self._plain_opens = 0
            await self._close_plain_if_unused()
            await self._close_file()

    # -- inside; all with `_changing` held

    async def _open_file(self) -> None:
        if self.record.state is State.WHOLE:
            self._file = await self._open_whole()
            return
        assert self.record.size is not None
        if trouble := partial_cache.too_large(self.record):
            raise errors.UserError(trouble)
        fresh = self.record.state is State.REMOTE
        if fresh:
            await self._save(state=State.PARTIAL)
            self._context.on_attributes_changed(self)
        self._use(*await self._load(fresh or self._unkept))
        await self._disown()  # a crash may have come before it; last, as this may be cancelled

    async def _load(self, fresh: bool) -> tuple[Store, BlockMap, bool]:
        load = partial(partial_cache.load, self._context.stores, self.record, self._context.budget, fresh)
        self._open_trouble = ""
        try:
            return await trio.to_thread.run_sync(load)
        except errors.UserError as error:
            self._open_trouble = str(error)
            raise

    def _use(self, store: Store, blocks: BlockMap, kept: bool) -> None:
        """Serve from this store from now on, and look after it."""
        self._store, self._file, self._unkept = store, store, not kept
        self.fetcher = self._make_fetcher(store, blocks)
        if self.record.state is State.FAILED:
            self.fetcher.failure = errors.UserError(self.record.error)
        self._scope = trio.CancelScope()
        task = self._attend if kept else self._wait_for_room
        self._context.nursery.start_soon(task, self.fetcher)

    async def _disown(self) -> None:
        if self._store is not None and self.record.state is State.FAILED:
            disown = partial(partial_cache.disown, self._store, self.record)
            trouble = await trio.to_thread.run_sync(disown, limiter=self._context.syncs)
            if self.fetcher is not None and trouble is not None:
                self.fetcher.distrust = trouble

    async def _open_plain(self) -> None:
        if self._plain is None:
            self._plain = await self._open_whole()
        self._plain_opens += 1

    async def _close_plain_if_unused(self) -> None:
        if self._plain is not None and not self._plain_opens:
            file, self._plain = self._plain, None
            await self._close(file)

    async def _close(self, file: ImageFile) -> None:
        """Close in a thread what nothing else holds: the kernel frees its blocks meanwhile, which takes seconds."""
        if not self.retired:
            file.close()
            return
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(file.close, limiter=self._context.syncs)

    async def _open_whole(self) -> PlainFile:
        try:
            return await trio.to_thread.run_sync(self._context.stores.whole, self.record)
        except errors.CacheCorrupt as error:
            self.record = replace(self.record, error=f"{error}; remove what is there, and mount anew to fetch it again")
            raise

    def _make_fetcher(self, store: Store, blocks: BlockMap) -> Fetcher:
        record, context = self.record, self._context
        assert record.size is not None
        export = Export(record.export, record.size, record.identity)
        return Fetcher(
            export,
            context.repository.source(export),
            store,
            blocks,
            nursery=context.nursery,
            pace=self.populating.pace,
            io_timeout_s=context.io_timeout_s,
            counters=self._counters(),
            totals=context.totals,
            writes=context.writes,
            budget=context.budget,
            on_changed=lambda error: context.on_export_changed(self, error),
            is_open=lambda: self.open_count > 0,
        )

    def _counters(self) -> FetchCounters:
        if self.fetcher is not None:
            return self.fetcher.counters()
        return FetchCounters(self.record.demand_bytes, self.record.populated_bytes, self.record.requests)

    async def _close_file(self) -> None:
        fetcher, file = self.fetcher, self._file
        self.fetcher = self._store = self._file = None
        if file is not None:
            await self._close(file)  # first: what follows may be cancelled
        if fetcher is not None:
            await fetcher.aclose()

    async def _save(self, **changes: object) -> None:
        """Change the record, catalog first."""
        if isinstance(state := changes.get("state"), State) and state is not self.record.state:
            lifecycle.check(self.record.state, state)
        counters: dict[str, object] = {}
        if self.fetcher is not None:
            now = self._counters()
            counters = {n: getattr(now, n) for n in ("demand_bytes", "populated_bytes", "requests")}
            counters["present_bytes"] = self.fetcher.present_bytes
        record = replace(self.record, **(counters | changes))  # type: ignore[arg-type]
        if not self.retired:
            try:
                await trio.to_thread.run_sync(self._context.catalog.update, [record])
            except (errors.NoSpace, errors.CacheCorrupt, OSError) as error:
                if record.state is State.WHOLE and self.record.state is not State.WHOLE:
                    raise
                # It catches up with the next change; at worst a restart asks or counts again.
                logger.warning("the catalog could not be written: %s", error)
        before, self.record = self.record, record
        if "last_used_ns" not in changes:  # the image may have been closed meanwhile
            self.record = replace(record, last_used_ns=max(record.last_used_ns, before.last_used_ns))
        if record.state is not before.state:
            self._context.on_state_changed(self)

    # -- the task of an image that is being filled

    async def _attend(self, fetcher: Fetcher) -> None:
        """Checkpoint while it fills; hand off when it is complete."""
        with self._scope:
            await fetcher.until_complete(CHECKPOINT_S, self._checkpoint_locked)
            while not await self._hand_off(fetcher):  # noqa: ASYNC110 - a disk or a file in the way tells nobody
                await trio.sleep(CHECKPOINT_S)

    async def _checkpoint_locked(self) -> None:
        async with self._changing:
            await self._checkpoint()

    async def _wait_for_room(self, unkept: Fetcher) -> None:
        """Begin to cache an image that was opened with no room for its map, once there is room."""
        with self._scope:
            while self.fetcher is unkept:
                await trio.sleep(ROOM_CHECK_S)
                async with self._changing:
                    if self.fetcher is unkept and not self._context.stores.nearly_full():
                        await self._try_to_keep()
            while not await unkept.rest():  # noqa: ASYNC110 - readers that had begun with it end with it
                await trio.sleep(ROOM_CHECK_S)

    async def _try_to_keep(self) -> None:
        try:
            store, blocks, kept = await self._load(fresh=True)
        except (errors.LazyfsError, OSError) as error:
            logger.warning("still no room: image=%s reason=%s", self.record.export, error)
            return
        if kept:
            self._use(store, blocks, kept)
            self._context.on_fillable()

    async def _checkpoint(self) -> None:
        assert self.fetcher is not None
        try:
            await self.fetcher.checkpoint(self._context.syncs)
        except errors.CacheCorrupt as error:
            logger.critical("reads fail until lazyfs is mounted anew: image=%s reason=%s", self.record.export, error)
        except (errors.NoSpace, OSError) as error:
            logger.warning("checkpoint failed, to be repeated: image=%s reason=%s", self.record.export, error)
        else:
            await self._save()

    async def _hand_off(self, fetcher: Fetcher) -> bool:
        """Turn the complete image into a plain file, and tell the kernel; False if it is worth another try later."""
        # The digest takes minutes; no open waits for that.
        if self._store is None or not await self._digest_check.passes(self._store):
            return False
        async with self._changing:
            if not await self._become_whole(fetcher):
                return False
            await fetcher.aclose()
            if self.open_count == 0:
                await self._close_file()
        self._context.on_attributes_changed(self)
        return True

    async def _become_whole(self, fetcher: Fetcher) -> bool:
        missing = fetcher.export.size - fetcher.present_bytes - fetcher.zero_bytes
        if missing or self._store is None or self._unkept or self.record.state is State.FAILED:
            return False
        if not self._digest_check.is_current(self.record):  # at the daemon's end, which does not wait for it
            return False
        try:
            await fetcher.checkpoint(self._context.syncs)
            await trio.to_thread.run_sync(self._store.finish, limiter=self._context.syncs)
            with trio.CancelScope(shield=True):  # else the partial name would stay until the next start
                await self._save(state=State.WHOLE, error="")
                await trio.to_thread.run_sync(self._store.remove)
        except (errors.LazyfsError, OSError) as error:
            if self.record.error != str(error):
                logger.warning("cannot hand off: image=%s reason=%s", self.record.export, error)
                self.record = replace(self.record, error=str(error))
            return False
        logger.info("image is whole: image=%s size=%d", self.record.export, self.record.size)
        return True

    # -- reporting

    def statistics(self) -> image_statistics.ImageStatistics:
        """Return what `status` shows, as of now."""
        # Nobody looks for room for one that is closed.
        unkept = self._unkept and (self.fetcher is not None or self._context.stores.nearly_full())
        return image_statistics.of(
            self.record,
            self.fetcher,
            self._counters(),
            inode=self.shown_inode,
            open_count=self.open_count,
            replaced=self.retired,
            messages=[
                self.record.error or partial_cache.too_large(self.record) or self._open_trouble,
                "not in the repository any more" if self.gone else "",
                image_statistics.filling_trouble(self.record, self.fetcher, unkept, self.populating.trouble),
            ],
        )
