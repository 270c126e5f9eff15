"""Manages one image: its state, its catalog row, what is open of it, and the task for its cache.

What is open is one of these, and holds just what it needs:

    Closed                  nothing
    Filling                 a cache file that is being filled
    Unkept                  the same without a cache file, because there is no room for one
    Whole                   the plain file

Invariants (`doc/CONCURRENCY.md` has more):

- `_changing` serialises every change of state, and of what is open. `record` is replaced, never
  edited. A state is in the catalog before anybody relies on it.
- The bytes behind one Image never change version. When the export changes, a new Image with a new
  inode takes the name (`engine/filesystem.py`). The old Image serves what it has to those who have
  it open.
- Everybody who has the image open holds a handle (`handles.py`). What a handle reads from stays
  open as long as the handle.
- An image that has lost its name is dropped through `Context.on_unused` as soon as nobody has it
  open, whatever happened before.
"""

# Longer than 500 lines: opens, changes of state and the image's task all change what is open, and
# do so under one lock.

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from lazyfs import errors
from lazyfs.core import inode_number
from lazyfs.core.image_record import FetchCounters, ImageRecord
from lazyfs.core.lifecycle import Cause, State
from lazyfs.core.pacing import Backoff
from lazyfs.core.shown_file import RAW
from lazyfs.engine.budget import UNKEPT
from lazyfs.engine.context import Context
from lazyfs.engine.fetch.samples import Compared
from lazyfs.engine.image import partial_cache
from lazyfs.engine.image.digest_check import DigestCheck
from lazyfs.engine.image.filling import Filling, make_filling
from lazyfs.engine.image.handles import Handle, PartialHandle, WholeHandle
from lazyfs.engine.image.image_statistics import ImageStatistics
from lazyfs.engine.image.populating import Populating
from lazyfs.engine.interfaces import Export, ImageFile, PlainFile, Stores
from lazyfs.engine.pace import Pace

logger = logging.getLogger(__name__)
T = TypeVar("T")
HandleT = TypeVar("HandleT", PartialHandle, WholeHandle, PartialHandle | WholeHandle)

CHECKPOINT_S = 5.0
"""The time between checkpoints while something changes. A crash loses at most what came in this
time. Each checkpoint costs one fdatasync of both files."""

ROOM_CHECK_S = 5.0
"""The time between attempts to begin the cache of an image that is read without being kept."""

MAX_RETRY_S = 60.0
"""The longest time between attempts to hand off a complete image, or to go on after a bug. It is
unmeasured. An attempt costs an fsync."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Nothing is open."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The plain file is open, for everybody who has opened the image since it is whole."""

    file: PlainFile


class Image:
    """Represents an export on this host. Trio thread only."""

    def __init__(self, record: ImageRecord, context: "Context[Image]") -> None:
        self.record = record
        self.gone = False
        """True if the repository does not list the export any more."""
        self.retired = False
        """True if another inode has the name now. This one exists until it is closed."""
        self.populating = Populating(Pace(context.pace), context.populate and record.meant)
        self._context = context
        self._content: Closed | Filling | Whole = Closed()
        # Dictionaries, because an empty set takes four times as much, and there are many images.
        self._handles: dict[PartialHandle | WholeHandle, None] = {}
        self._opening: dict[object, None] = {}
        """A token for each open that is under way. What such an open may use stays open."""
        self._compared = Compared()
        self._unkept = False
        """True if there was no room for a map when the cache was to be begun, and there is still
        none."""
        self._bug = ""
        """What is reported of a task of this image that has failed because of a bug, until it works
        again."""
        self._trouble = ""
        """Why the latest open has failed, or a read since then, or "". It may be the disk, or what
        the user can mend."""
        self._digest_check = DigestCheck(
            lambda: self.record, self.fail, self.recover, context.threads.syncs
        )
        self._changing = trio.Lock()
        self._scope = trio.CancelScope()
        self._shown: dict[int, Filling | Whole] = {}
        """What the keeper answers reads from, by inode number."""

    # -- as the file system sees it

    @property
    def inode(self) -> int:
        """The inode number until the image is whole. It is also the key in the catalog."""
        return self.record.inode

    @property
    def shown_inode(self) -> int:
        """The inode number to which the name leads now."""
        whole = self.record.state is State.WHOLE
        return inode_number.whole(self.record.inode) if whole else self.record.inode

    @property
    def open_count(self) -> int:
        """How many have the image open, or are opening it."""
        return len(self._handles) + len(self._opening)

    @property
    def filling(self) -> Filling | None:
        """The open cache file that is being filled, or None.

        There is none, for instance, if the image is whole.
        """
        return self._content if isinstance(self._content, Filling) else None

    @property
    def present_bytes(self) -> int:
        """Bytes of data in the cache file.

        They are counted live while it is open to be filled, and else as of the last checkpoint.
        """
        return (
            self.record.present_bytes if self.filling is None else self.filling.table.present_bytes
        )

    def allocated_bytes(self) -> int:
        """Return what the cache file takes of the disk, as `du` shows it.

        That is its data, and the metadata of a qcow2 image.
        """
        nothing = self.record.state is State.REMOTE or self._unkept
        return self.present_bytes + (0 if nothing else self.record.shown.metadata_size)

    @property
    def may_have_data(self) -> bool:
        """False if every byte is known to be zero.

        A file without any blocks is taken for zeroes by programs such as `tar --sparse`.
        """
        filling = self.filling
        if filling is not None:
            return filling.table.zero_bytes < filling.table.size
        return self.record.state is not State.WHOLE and self.record.size != 0

    def cached_bytes(self) -> int:
        """Return everything that the image takes of the disk.

        That is what `allocated_bytes` returns, and the map of a raw image.
        """
        record = self.record
        if record.state is State.REMOTE:
            return 0
        has_map = record.state is not State.WHOLE and record.format == RAW
        return self.allocated_bytes() + (partial_cache.map_bytes(record) if has_map else 0)

    @property
    def fillable(self) -> bool:
        """True if population could do something here."""
        if self.record.state is not State.PARTIAL or self.gone or self.retired or self._bug:
            return False
        filling = self.filling
        return (
            filling is not None
            and filling.kept
            and filling.table.may_be_filled
            and self.populating.goes_on
        )

    async def open(self) -> Handle:
        """Open the image in its present state: as a whole image, or through its cache.

        The first open ever begins the cache. The size must be known (`Sizes`).

        Raises:
            CacheCorrupt, OSError: it cannot be opened. ESTALE means that it is retired.
        Cancellation: the image is not open.
        """
        return await self._opened(self._whole_handle_or_partial)

    async def open_whole(self) -> WholeHandle:
        """Open the image as a whole image, by its second inode number.

        Raises:
            CacheCorrupt, OSError: it cannot be opened. ESTALE means that it is retired, or not
                whole any more.
        Cancellation: the image is not open.
        """
        return await self._opened(self._whole_handle)

    async def _opened(self, make: Callable[[], Awaitable[HandleT]]) -> HandleT:
        self._opening[opening := object()] = None
        try:
            async with self._changing:
                # The files of a retired image are gone. After ESTALE the kernel looks the name up
                # again and finds the new inode.
                if self.retired:
                    raise _stale()
                handle = await make()
                self._handles[handle] = None
        except BaseException as error:
            del self._opening[opening]
            if isinstance(error, OSError) and error.errno != errno.ESTALE:
                self._note_disk(error)
            await self._close_unused()
            raise
        del self._opening[opening]
        self._trouble = ""
        self._note_use_of(handle)
        self._context.on_fillable()
        return handle

    async def _whole_handle_or_partial(self) -> PartialHandle | WholeHandle:
        if self.record.state is State.WHOLE:
            return await self._whole_handle()
        filling = self.filling or await self._begin()
        return PartialHandle(self.record.shown, filling, self._closed, self._note_disk)

    async def _whole_handle(self) -> WholeHandle:
        if self.record.state is not State.WHOLE:
            raise _stale()
        if not isinstance(self._content, Whole):
            assert isinstance(self._content, Closed)
            self._content = Whole(await self._open_plain_file())
            self._show_whole(self._content)
            self._context.on_opened(self)
        return WholeHandle(self.record.shown, self._content.file, self._closed, self._note_disk)

    def _note_disk(self, error: OSError) -> None:
        # These say something of the daemon or of the machine, and nothing of the disk.
        short = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        what = "the cache cannot be opened" if short else "the cache's disk fails"
        self._trouble = f"{what}: {error.strerror}"

    async def _closed(self, handle: PartialHandle | WholeHandle) -> None:
        del self._handles[handle]
        self._note_use_of(handle)
        old = handle.filling if isinstance(handle, PartialHandle) else None
        await self._close_unused(old)

    async def _close_unused(self, old: Filling | None = None) -> None:
        """Close what nobody has open any more.

        Args:
            old: what a handle that was just closed has read from.
        """
        with trio.CancelScope(shield=True):
            async with self._changing:
                await self._close_unused_locked(old)

    async def _close_unused_locked(self, old: Filling | None = None) -> None:
        content = self._content
        used: set[object] = {
            h.filling if isinstance(h, PartialHandle) else h.file for h in self._handles
        }
        if old is not None and old is not content and old not in used:
            await self._close(old)
        if self._opening:
            return
        if isinstance(content, Whole) and content.file not in used:
            await self._close(content)
        elif isinstance(content, Filling) and content not in used:
            if self.retired or not content.kept:
                await self._close(content)
                if not self.retired and self.populating.goes_on:
                    self._context.on_unkept(self)
            else:
                content.reader.drop_connection_when_idle()
        if self.retired and not self._handles:
            self._context.on_unused(self)

    def _note_use_of(self, handle: PartialHandle | WholeHandle) -> None:
        """Note that somebody opens or closes the image, unless it was only looked at so far.

        Nobody can tell that of a whole image: the kernel reads it by itself.
        """
        if self.record.meant or isinstance(handle, WholeHandle):
            self.note_use(self._context.use_clock.now_ns())

    def mean(self) -> None:
        """Note that somebody uses the image. If the mount populates, population begins.

        It is saved with the next change, or by `save`.
        """
        self.record = self.record.meant_to_be_used()
        self.note_use(self._context.use_clock.now_ns())
        if self._context.populate:
            self.populating.want()
        self._context.on_fillable()

    async def save(self) -> None:
        """Save what is known of the image. If that fails, the next change saves it."""
        async with self._changing:
            await self._save(lambda record: record)

    def note_use(self, at_ns: int) -> None:
        """Note that the image was used at `at_ns`, in ns since the epoch.

        The time is saved with the next change, or by `Filesystem.save_uses`.
        """
        self.record = self.record.used(at_ns)

    # -- the life of an image

    async def resume(self) -> None:
        """Open what an earlier daemon left of a partial or failed image.

        So population can go on.

        Raises:
            OSError, CacheCorrupt, UserError: it cannot be opened.
        """
        async with self._changing:
            # It may have become whole meanwhile: somebody had it open, and all of it was there.
            unfinished = self.record.state in (State.PARTIAL, State.FAILED)
            if unfinished and isinstance(self._content, Closed):
                await self._begin()

    async def fail(self, cause: Cause, reason: errors.LazyfsError) -> None:
        """Fetch nothing more. Present ranges stay readable.

        An image that has failed before keeps its first reason.
        """
        async with self._changing:
            if self.filling is not None:
                self.filling.table.stop_fetching(reason)
            if self.record.state is State.WHOLE and self.record.error != str(reason):
                await self._save(lambda record: record.troubled(cause, str(reason)))
            elif self.record.state is State.PARTIAL:
                logger.warning("image failed: image=%s reason=%s", self.record.export, reason)
                await self._save(lambda record: record.failed(cause, str(reason)))
                await self._disown()

    async def recover(self) -> None:
        """Fetch again, because the cause of the failure is gone.

        That is, the export is again what the cache was filled from.
        """
        async with self._changing:
            if self.record.state is State.FAILED or self.record.error:
                await self._save(ImageRecord.recovered)
                if self.filling is not None:
                    self.filling.table.go_on_fetching()
        self._context.on_fillable()

    async def describe(self, size: int, identity: str) -> None:
        """Take over what the repository says of an image of which nothing is cached."""
        async with self._changing:
            if self.record.state is State.REMOTE and isinstance(self._content, Closed):
                self.record = self.record.described(size, identity)

    async def identify(self, identity: str) -> None:
        """Take over the identity of the export, which is not known yet."""
        async with self._changing:
            size = self.record.size
            assert size is not None
            await self._save(lambda record: record.described(size, identity))

    async def prefetch(self) -> None:
        """Begin the cache without a reader, and let population fill it, whatever the mount's
        default.

        The size must be known.

        Raises:
            OSError, CacheCorrupt, UserError: it cannot be begun. UserError means that the image has
                failed.
        """
        async with self._changing:
            if self.record.state is State.FAILED:
                raise errors.UserError(f"{self.record.path} has failed: {self.record.error}")
            if self.record.state is not State.WHOLE:
                self.populating.want()
                self.record = self.record.meant_to_be_used()
                if isinstance(self._content, Closed):
                    await self._begin()
                self.note_use(self._context.use_clock.now_ns())
        self._context.on_fillable()

    async def annotate(
        self, change: Callable[[ImageRecord], ImageRecord], must: bool = True
    ) -> None:
        """Save what an operator says of the image: its pin, its digest or its use.

        Args:
            change: returns the changed record.
            must: as for `_save`.

        Raises:
            NoSpace, CacheCorrupt, OSError: the catalog cannot be written, as `_save` says.
            OSError: ESTALE means that it is retired, so another image has its name now.
        """
        async with self._changing:
            if self.retired:
                raise _stale()
            if change(self.record) != self.record:
                await self._save(change, must)

    async def retire(
        self,
        reason: errors.LazyfsError | None,
        take_over: Callable[[], T],
        check: Callable[[], None] = lambda: None,
    ) -> T:
        """Give up the name, and remove what is cached. Return what `take_over` returns.

        Processes that have the image open keep what was present.

        Args:
            reason: why the rest is not fetched any more. None if readers may still fetch, because
                the export is the same.
            take_over: puts another image in this one's place in the catalog. Called in a thread.
            check: raises if the image must stay. It is called when nobody else can change the image
                any more.

        Raises:
            UserError, OSError, and what `take_over` and `check` raise: nothing has changed.
        """
        async with self._changing:
            check()
            remove = partial(partial_cache.remove, self._context.stores, self.record, take_over)
            for inode in self._shown:  # first: a crash may come at any moment
                self._context.present.orphan(inode, self.record, may_fetch=reason is None)
            try:
                taken_over = await trio.to_thread.run_sync(
                    remove, limiter=self._context.threads.opens
                )
            except BaseException:
                for inode in self._shown:
                    self._context.present.keep_name(inode)
                raise
            self.retired = True
            self.populating.stop()
            self._scope.cancel()
            if self.filling is not None and reason is not None:
                self.filling.table.stop_fetching(reason)
                self.filling.reader.close()
            await self._close_unused_locked()
        return taken_over

    async def aclose(self) -> None:
        """Save everything, hand off what is complete, and close.

        This is for the end of the daemon, when nobody reads any more.
        """
        self._scope.cancel()
        async with self._changing:
            self._scope.cancel()  # again, as an open that was under way may have begun another task
            filling = self.filling
            if (
                filling is not None
                and filling.kept
                and not self.retired
                and self.record.state is not State.WHOLE
            ):
                await filling.reader.written()
                # The image's task may not have begun to hand it off, or was cancelled.
                if not await self._become_whole(filling):
                    await self._checkpoint(filling)
            left = {handle.filling for handle in self._handles if isinstance(handle, PartialHandle)}
            self._handles.clear()
            for old in left - {self._content}:
                await self._close(old)
            if not isinstance(self._content, Closed):
                await self._close(self._content)

    # -- inside; all with `_changing` held

    async def _begin(self) -> Filling:
        """Open the cache file, or begin it.

        Raises:
            OSError, CacheCorrupt, UserError: it cannot be opened. ESTALE means that the image is
                retired: its files are gone, and belong to nobody if they were made again.
        """
        assert isinstance(self._content, Closed)
        if self.retired:
            raise _stale()
        if trouble := partial_cache.too_large(self.record):
            raise errors.UserError(trouble)
        with ExitStack() as room:
            try:
                room.enter_context(
                    self._context.map_memory.reserved(self.record.size or 0, self.record.block_size)
                )
            except errors.UserError as error:
                self._trouble = str(error)
                raise
            fresh = self.record.state is State.REMOTE
            if fresh:
                await self._save(ImageRecord.begun)
                self._context.on_attributes_changed(self)
            loaded = await self._load(fresh or self._unkept)
        filling = self._fill(loaded)
        # A crash may have come before the file of a failed image was disowned. This comes last,
        # because it may be cancelled.
        await self._disown()
        return filling

    async def _load(self, fresh: bool) -> partial_cache.Loaded:
        load = partial(
            partial_cache.load,
            self._context.stores,
            self.record,
            self._context.budget,
            self._context.present,
            fresh,
        )
        self._trouble = ""
        try:
            loaded = await trio.to_thread.run_sync(load, limiter=self._context.threads.opens)
        except errors.UserError as error:
            self._trouble = str(error)
            raise
        self._context.map_memory.add(loaded.blocks)
        return loaded

    def _fill(self, loaded: partial_cache.Loaded) -> Filling:
        """Serve from this store from now on, and start the task for it."""
        record = self.record
        assert record.size is not None
        filling = self._content = make_filling(
            Export(record.export, record.size, record.identity),
            loaded,
            self._context,
            pace=self.populating.pace,
            counters=self._counters(),
            compared=self._compared,
            on_changed=lambda error: self._context.on_export_changed(self, error),
            is_open=lambda: self.open_count > 0,
        )
        self._unkept = not loaded.kept
        file, blocks = (loaded.store, loaded.blocks) if loaded.kept else (None, None)
        self._context.present.show(record.inode, record.shown, file, blocks)
        self._shown[record.inode] = filling
        self._context.on_opened(self)
        if self.record.state is State.FAILED:
            filling.table.stop_fetching(errors.UserError(self.record.error))
        self._scope = trio.CancelScope()
        self._context.nursery.start_soon(self._carry_on, filling, self._scope)
        return filling

    async def _disown(self) -> None:
        filling = self.filling
        if filling is not None and self.record.state is State.FAILED:
            disown = partial(partial_cache.disown, filling.store, self.record)
            trouble = await trio.to_thread.run_sync(disown, limiter=self._context.threads.syncs)
            if trouble is not None:
                filling.table.stop_reading(trouble)
                self._withdraw(filling)

    async def _open_plain_file(self) -> PlainFile:
        try:
            return await trio.to_thread.run_sync(
                self._context.stores.whole, self.record, limiter=self._context.threads.opens
            )
        except errors.CacheCorrupt as error:
            advice = f"{error}; remove what is there, and mount anew to fetch it again"
            self.record = self.record.troubled(Cause.PLAIN_FILE, advice)
            raise

    def _show_whole(self, whole: Whole) -> None:
        # By its first number as well: a daemon before this one may have opened it by that.
        for inode in (self.record.inode, inode_number.whole(self.record.inode)):
            if inode not in self._shown:
                self._context.present.show(inode, self.record.shown, whole.file, None)
                self._shown[inode] = whole

    def _withdraw(self, content: Filling | Whole) -> None:
        """Let no read be answered from a file that is about to be closed, or not trusted."""
        distrusted = isinstance(content, Filling) and content.table.distrust is not None
        for inode in [inode for inode, one in self._shown.items() if one is content]:
            self._context.present.withdraw(inode, distrusted=distrusted)
            del self._shown[inode]
        if isinstance(self._content, Whole) and self._content is not content:
            self._show_whole(self._content)  # somebody may have opened that by the first number

    async def _close(self, content: Filling | Whole) -> None:
        self._withdraw(content)
        if content is self._content:
            self._content = Closed()
        if isinstance(content, Whole):
            await self._close_file(content.file)
        else:
            content.reader.close()
            await self._close_file(content.store)

    async def _close_file(self, file: ImageFile) -> None:
        """Close a file. If nothing else may hold it, that is done in a thread.

        The kernel then frees the blocks during the close, which takes seconds. An error is only
        reported, because the file is closed all the same: what was to be durable was synced before.
        """
        try:
            if not self.retired:
                file.close()
                return
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(file.close, limiter=self._context.threads.syncs)
        except OSError as error:
            logger.warning(
                "error when a file was closed: image=%s reason=%s", self.record.export, error
            )

    @property
    def fill_trouble(self) -> str:
        """Why population does not get on with this image, or ""."""
        return self.populating.trouble_now(self._counters().fetched_bytes)

    def _counters(self) -> FetchCounters:
        if self.filling is not None:
            return self.filling.table.counters()
        return FetchCounters(
            self.record.demand_bytes, self.record.populated_bytes, self.record.requests
        )

    async def _save(self, change: Callable[[ImageRecord], ImageRecord], must: bool = False) -> None:
        """Change the record, first in the catalog and then here.

        Raises:
            NoSpace, CacheCorrupt, OSError: the catalog cannot be written, which only concerns a
                change that `must` be in it. Nothing has changed. Any other change is saved with the
                next one. At worst the daemon asks or counts again after a restart.
        """
        counted = self.record
        if self.filling is not None:
            counted = counted.counted(self.filling.table.present_bytes, self._counters())
        record = change(counted)
        if not self.retired:
            try:
                await trio.to_thread.run_sync(
                    self._context.catalog.update, [record], limiter=self._context.threads.catalog
                )
            except (errors.NoSpace, errors.CacheCorrupt, OSError) as error:
                if must:
                    raise
                logger.warning("the catalog could not be written: %s", error)
        before, self.record = self.record, record
        if record.last_used_ns == counted.last_used_ns:  # the image may have been closed meanwhile
            self.record = record.used(max(record.last_used_ns, before.last_used_ns))
        if before.meant and not counted.meant:  # somebody has begun to use it meanwhile
            self.record = self.record.meant_to_be_used()
        if record.state is not before.state:
            self._context.on_state_changed(self)

    # -- the task of an image that is being filled

    async def _carry_on(self, filling: Filling, scope: trio.CancelScope) -> None:
        """Look after a cache file until it is handed off.

        A bug is reported, and the work goes on after a pause.
        """
        retry = Backoff(first=1.0, limit=MAX_RETRY_S)
        with scope:
            while True:
                try:
                    await (self._attend(filling) if filling.kept else self._wait_for_room(filling))
                except Exception as error:
                    logger.exception(
                        "attending to an image failed, a bug in lazyfs: image=%s",
                        self.record.export,
                    )
                    self._bug = (
                        f"a bug in lazyfs: {error!r}; "
                        "it is tried again, and the log has the details"
                    )
                else:
                    return
                await trio.sleep(retry.next())
                self._bug = ""
                self._context.on_fillable()

    async def _attend(self, filling: Filling) -> None:
        """Make checkpoints while the cache file is being filled, and hand it off at the end."""
        while not filling.table.completed.is_set():
            await filling.table.until_changed()
            with trio.move_on_after(CHECKPOINT_S):
                await filling.table.completed.wait()
            async with self._changing:
                await self._checkpoint(filling)
            if filling.table.distrust is not None:
                return
        retry = Backoff(first=CHECKPOINT_S, limit=MAX_RETRY_S)
        while not await self._hand_off(filling):
            if filling.table.distrust is not None:
                return
            await trio.sleep(retry.next())

    async def _wait_for_room(self, unkept: Filling) -> None:
        """Begin the cache of an image that was opened without room for its map.

        That is done once there is room.
        """
        while self._content is unkept:
            await trio.sleep(ROOM_CHECK_S)
            async with self._changing:
                if self._content is unkept and not _nearly_full(self._context.stores):
                    await self._try_to_keep(unkept)

    async def _try_to_keep(self, unkept: Filling) -> None:
        try:
            loaded = await self._load(fresh=True)
        except (errors.LazyfsError, OSError) as error:
            logger.warning("still no room: image=%s reason=%s", self.record.export, error)
            return
        if not loaded.kept:
            return
        filling = self._fill(loaded)
        for handle in self._handles:
            if isinstance(handle, PartialHandle) and handle.filling is unkept:
                handle.filling = filling
        # Reads that have begun through `unkept` end through it.
        unkept.reader.drop_connection_when_idle()
        self._context.on_fillable()

    async def _checkpoint(self, filling: Filling) -> None:
        try:
            await filling.checkpoint(self._context.threads.syncs)
        except errors.CacheCorrupt as error:
            self._withdraw(filling)
            logger.critical(
                "reads fail until lazyfs is mounted anew: image=%s reason=%s",
                self.record.export,
                error,
            )
        except (errors.NoSpace, OSError) as error:
            logger.warning(
                "checkpoint failed, to be repeated: image=%s reason=%s", self.record.export, error
            )
        else:
            await self._save(lambda record: record)

    async def _hand_off(self, filling: Filling) -> bool:
        """Turn the complete image into a plain file, and tell the kernel.

        Returns:
            False if this should be tried again later.
        """
        # The digest takes minutes. `_changing` is not held, so no open waits for that.
        if not await self._digest_check.passes(filling.store):
            return False
        async with self._changing:
            if not await self._become_whole(filling):
                return False
            filling.reader.close()
            self._content = Closed()
            if not any(isinstance(handle, PartialHandle) for handle in self._handles):
                await self._close(filling)
        self._context.on_attributes_changed(self)
        return True

    async def _become_whole(self, filling: Filling) -> bool:
        if not filling.kept or not filling.table.complete or self.record.state is State.FAILED:
            return False
        # The digest may not have been compared yet at the end of the daemon, which does not wait
        # for that.
        if not self._digest_check.is_current(self.record):
            return False
        try:
            await filling.checkpoint(self._context.threads.syncs)
            await trio.to_thread.run_sync(filling.store.finish, limiter=self._context.threads.syncs)
            # Without the shield the partial file's name could stay until the next start.
            with trio.CancelScope(shield=True):
                await self._save(ImageRecord.became_whole, must=True)
                await self._remove_partial_name(filling)
        except (errors.LazyfsError, OSError) as error:
            if filling.table.distrust is not None:
                self._withdraw(filling)
            if self.record.error != str(error):
                logger.warning("cannot hand off: image=%s reason=%s", self.record.export, error)
                self.record = self.record.troubled(Cause.HAND_OFF, str(error))
            return False
        logger.info("image is whole: image=%s size=%d", self.record.export, self.record.size)
        return True

    async def _remove_partial_name(self, filling: Filling) -> None:
        # The image is whole whether this succeeds or not.
        try:
            await trio.to_thread.run_sync(filling.store.remove, limiter=self._context.threads.opens)
        except OSError as error:
            logger.warning(
                "its map is removed by the next mount: image=%s reason=%s",
                self.record.export,
                error,
            )

    # -- reporting

    def statistics(self) -> ImageStatistics:
        """Return what `status` shows now."""
        record, counters, filling = self.record, self._counters(), self.filling
        if filling is not None:
            zero = filling.table.zero_bytes
        else:
            zero = (record.size or 0) - record.present_bytes if record.state is State.WHOLE else 0
        goes_on = (
            filling is not None and record.state is State.PARTIAL and not filling.writer.refused
        )
        return ImageStatistics(
            name=record.export,
            path=record.path,
            inode=self.shown_inode,
            size=record.size,
            file_size=record.file_size,
            format=record.format,
            state=record.state.value,
            present_bytes=self.present_bytes,
            zero_bytes=zero,
            fetched_bytes=counters.fetched_bytes,
            demand_bytes=counters.demand_bytes,
            populated_bytes=counters.populated_bytes,
            requests=counters.requests,
            sampled_bytes=self._compared.bytes,
            open_count=self.open_count,
            replaced=self.retired,
            fill_rate=self.populating.rate.rate(trio.current_time(), counters.fetched_bytes)
            if goes_on
            else 0.0,
            rate_limit=self.populating.pace.rate_limit,
            pinned=record.pinned,
            last_used_ns=record.last_used_ns,
            error="; ".join(filter(None, self._messages())),
        )

    def _messages(self) -> list[str]:
        return [
            self.record.error or partial_cache.too_large(self.record) or self._trouble,
            self._bug,
            "not in the repository any more" if self.gone else "",
            self._filling_message(),
        ]

    def _filling_message(self) -> str:
        """Return what hinders an image that is not whole, or ""."""
        if self.record.state is not State.PARTIAL:
            return ""
        # Nobody waits for room for an image that is closed.
        if self._unkept and (self.filling is not None or _nearly_full(self._context.stores)):
            return UNKEPT
        return (self.filling.message() if self.filling is not None else "") or self.fill_trouble


def _nearly_full(stores: Stores) -> bool:
    try:
        return stores.nearly_full()
    except OSError:  # a write will report what is wrong
        return False


def _stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))
