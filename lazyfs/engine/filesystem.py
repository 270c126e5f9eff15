"""Manages the images of one mount.

It follows the repository's list of exports, and opens, refreshes, replaces and evicts images.
"""

# Longer than 500 lines: opens, the repository's list and replacements all change the same tables of
# images.

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from lazyfs import errors
from lazyfs.core import looking, shown_file
from lazyfs.core.export_name import EXPORT, shown_path
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import Cause, State
from lazyfs.core.shown_file import ShownFile
from lazyfs.engine import identifying
from lazyfs.engine.budget import Budget
from lazyfs.engine.context import Context
from lazyfs.engine.fetch import waiting_reads
from lazyfs.engine.fetch.under_way import UnderWay
from lazyfs.engine.fetch.waiting_reads import WaitingReads
from lazyfs.engine.fetch.write_queue import WriteQueue
from lazyfs.engine.image.handles import Handle, OrphanHandle, PartialHandle, WholeHandle
from lazyfs.engine.image.image import ROOM_CHECK_S, Image
from lazyfs.engine.interfaces import (
    UNKNOWN,
    Catalog,
    Export,
    PresentReader,
    Repository,
    Samples,
    Stores,
)
from lazyfs.engine.map_memory import MapMemory
from lazyfs.engine.name_tree import NameTree, TakenNames
from lazyfs.engine.pace import SharedPace
from lazyfs.engine.sizes import DESCRIBE_BATCH, Sizes
from lazyfs.engine.slices import slices
from lazyfs.engine.supervision import log_failure
from lazyfs.engine.threads import Threads
from lazyfs.engine.totals import Totals
from lazyfs.engine.use_clock import UseClock
from lazyfs.units import KiB

logger = logging.getLogger(__name__)
HandleT = TypeVar("HandleT")

DEFAULT_BLOCK_SIZE = 64 * KiB
"""The block size of raw images and the cluster size of qcow2 images: QEMU's default.
doc/BENCHMARKS.md shows how other sizes affect a guest."""


COMPARED_AT_ONCE = 2
"""How many images that were taken in without a catalog are compared at the same time.
One that hangs must not hold up all others, and readers need the connections. It is unmeasured."""


@dataclass(frozen=True, slots=True)
class Options:
    """Holds what the user chose about images. The daemon chooses the rest."""

    block_size: int
    """The block size of new images. For a qcow2 image it is the cluster size."""
    io_timeout_s: float
    replace_changed: bool
    populate: bool
    fill_rate: int | None = None
    format: str = "raw"
    names: str = EXPORT
    """How new images are named: one of `export_name.NAMES`."""
    queue: int = waiting_reads.DEFAULT
    """How many background requests of this mount the kernel has under way."""


class Filesystem:
    """Holds all images of one mount. Trio thread only."""

    def __init__(
        self,
        repository: Repository,
        stores: Stores,
        catalog: Catalog,
        records: Sequence[ImageRecord],
        options: Options,
        nursery: trio.Nursery,
        present: PresentReader,
    ) -> None:
        """Start from the catalog's `records`. `refresh` adds what the repository has."""
        self.list_trouble = ""
        """Why the repository could not be listed, or "" if it could."""
        self.names = NameTree()
        self.threads = Threads()
        self._comparing = trio.CapacityLimiter(COMPARED_AT_ONCE)
        self._identified_now: set[Image] = set()
        """The images that were taken in without a catalog and are being compared."""
        self.sizes = Sizes(repository, catalog, nursery, options.io_timeout_s, self.threads.catalog)
        self.totals = Totals(trio.lowlevel.current_clock().current_time)
        self.budget = Budget()
        self.on_invalid_attributes: Callable[[int], None] = lambda inode: None
        """Called when the kernel must ask for this inode's attributes again. The adapter sets it.
        """
        self.on_fillable: Callable[[], None] = lambda: None
        """Called when population may have something new to do. Whoever populates sets it."""
        self.on_state_changed: Callable[[Image], None] = lambda image: None
        """Called when an image has changed its state. Whoever tells clients sets it."""
        self._repository = repository
        self._catalog = catalog
        self._options = options
        self._nursery = nursery
        self._context = Context(
            repository=repository,
            stores=stores,
            catalog=catalog,
            nursery=nursery,
            pace=SharedPace(options.fill_rate, trio.lowlevel.current_clock().current_time),
            totals=self.totals,
            use_clock=UseClock(max((record.last_used_ns for record in records), default=0)),
            budget=self.budget,
            writes=WriteQueue(nursery, self.threads.writes),
            under_way=UnderWay(),
            waiting=WaitingReads(options.queue),
            map_memory=MapMemory(),
            present=present,
            populate=options.populate,
            io_timeout_s=options.io_timeout_s,
            threads=self.threads,
            on_fillable=lambda: self.on_fillable(),
            on_export_changed=lambda image, error: nursery.start_soon(
                log_failure,
                "taking in a change of an export",
                partial(self._export_changed, image, error),
            ),
            on_attributes_changed=lambda image: self.on_invalid_attributes(image.inode),
            on_state_changed=self._state_changed,
            on_opened=self._opened,
            on_unkept=self._wait_for_room,
            on_unused=self._drop_unused,
        )
        self._active: dict[int, Image] = {}
        self._replacing: dict[int, trio.Event] = {}
        """The images that are being replaced, by inode, until the new image has the name."""
        self._without_room: dict[int, Image] = {}
        """Closed images that are to be filled as soon as there is room, by inode."""
        self._looking_for_room = False
        self._refreshing = trio.Lock()
        self._reserved: set[str] = set()
        """Paths that images are about to get."""
        self._stale_rows: set[int] = set()
        """Inodes of catalog rows that no longer belong to an image. These rows are still to be
        removed."""
        self._uses_saved = {record.inode: record.last_used_ns for record in records}
        """When each image was last used, as the catalog has it, by inode."""
        # Images that have something cached come first. A row without may be what a failure left.
        for record in sorted(records, key=lambda one: (one.state is State.REMOTE, one.inode)):
            self._add_known(record)

    def _add_known(self, record: ImageRecord) -> None:
        """Show an image of the catalog, unless another image has its name."""
        if self.names.image_of(record.export) is None and self.names.can_add(record.path):
            self.names.add(Image(record, self._context))
        elif record.state is State.REMOTE:
            logger.warning("a stale row is removed from the catalog: path=%s", record.path)
            self._stale_rows.add(record.inode)
        else:
            logger.error(
                "not shown, another image is in the way; lazyfs check --repair mends it: path=%s",
                record.path,
            )

    # -- looking

    def active_images(self) -> Iterable[Image]:
        """Return the images that have a cache file open. Population may look at these."""
        for image in [
            image
            for image in self._active.values()
            if image.filling is None and not image.open_count
        ]:
            del self._active[image.inode]  # whole and closed
        return list(self._active.values())

    def shown_images(self) -> list[Image]:
        """Return the images that `status` shows, sorted by path."""
        images = [*self.names.images(), *self._replaced()]
        return sorted(images, key=lambda image: image.record.path)

    # -- opening

    def _replaced(self) -> list[Image]:
        return [image for image in self.open_images() if image.retired]

    def open_images(self) -> list[Image]:
        """Return the images that somebody has open, with or without a name."""
        return [image for image in self.names.all_images() if image.open_count]

    async def open(self, image: Image) -> Handle:
        """Open `image` in its present state.

        The first open starts its population if the image has been used before. Otherwise that
        starts as soon as somebody means to use it (`core/looking.py`).

        Raises:
            LazyfsError, OSError: the image cannot be opened now. The error says why.
        """
        # Decided before anything is awaited, so that only one of two concurrent opens is the first.
        first = not image.open_count
        if image.record.state is State.REMOTE and first:
            # The size is asked for even if it is known, because the cache is about to be made for
            # this size.
            with self.totals.waits():
                await self.sizes.learn_again(image, patient=True)
        if image.record.size is None:
            raise errors.RequestFailed(f"asking for the size of {image.record.export}", errno.EIO)
        self._check_inode(image)
        handle = await self._in_time(image, image.open)
        if not self._is_a_look(image, handle) and first and self._context.populate:
            image.populating.want()
            self.on_fillable()
        return handle

    async def reopen(self, image: Image, whole: bool) -> Handle:
        """Open `image` again, which the kernel has open since an earlier daemon.

        The repository is not asked.

        Raises:
            LazyfsError, OSError: it cannot be opened.
        """
        if whole:
            return await image.open_whole()
        if image.record.size is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        handle = await image.open()
        self._is_a_look(image, handle)
        return handle

    def orphan(
        self,
        export: Export,
        shown: ShownFile,
        samples: Samples | None,
        closed: Callable[[], None],
    ) -> Handle:
        """Return a handle of an image that is in no catalog any more, and that somebody has open.

        Args:
            export: what it was fetched from.
            shown: the file that is shown on the mount.
            samples: what the repository must still have. None if it has another version now.
            closed: called when the handle is closed.
        """
        source = None if samples is None else self._repository.source(export, samples)
        return OrphanHandle(shown, source, self._options.io_timeout_s, closed)

    def _is_a_look(self, image: Image, handle: Handle) -> bool:
        """Return whether this open may be just a look. If more comes of it, that is noted."""
        if not isinstance(handle, PartialHandle) or image.record.meant:
            return False
        handle.on_meant = partial(self._meant, image)
        self._nursery.start_soon(
            log_failure, "noting that an image is used", partial(self._mean_in_a_while, handle)
        )
        return True

    def _meant(self, image: Image) -> None:
        image.mean()
        # At once: after a crash, only images that are known to be used are populated.
        self._nursery.start_soon(log_failure, "saving that an image is used", image.save)

    async def _mean_in_a_while(self, handle: PartialHandle) -> None:
        with trio.move_on_after(looking.LOOK_S):
            await handle.closed.wait()
        handle.mean()  # which does nothing once it is closed

    async def open_whole(self, image: Image) -> WholeHandle:
        """Open `image` as a whole image, by its second inode number. Raises what `open` raises."""
        self._check_inode(image)
        return await self._in_time(image, image.open_whole)

    def _check_inode(self, image: Image) -> None:
        if self.names.node(image.inode) is not image:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _opened(self, image: Image) -> None:
        self._active[image.inode] = image

    async def _in_time(self, image: Image, opened: Callable[[], Awaitable[HandleT]]) -> HandleT:
        try:
            return await opened()
        except OSError:
            # After ESTALE the kernel looks the name up again, but only once. By then the name must
            # lead to the new inode.
            if (replaced := self._replacing.get(image.inode)) is not None:
                await replaced.wait()
            raise

    def _wait_for_room(self, image: Image) -> None:
        self._without_room[image.inode] = image
        if not self._looking_for_room:
            self._looking_for_room = True
            self._nursery.start_soon(log_failure, "waiting for room", self._begin_with_room)

    async def _begin_with_room(self) -> None:
        """Begin the caches of images for which there was no room, and that nobody has open."""
        try:
            while self._without_room:
                await trio.sleep(ROOM_CHECK_S)
                for inode, image in list(self._without_room.items()):
                    if await self._need_not_wait(image):
                        self._without_room.pop(inode, None)
        finally:
            self._looking_for_room = False

    async def _need_not_wait(self, image: Image) -> bool:
        """Begin the cache of an image if there is room now; return whether that is settled."""
        if image.record.state is not State.PARTIAL or image.retired or image.open_count:
            return True
        try:
            if self._context.stores.nearly_full():
                return False
            await image.resume()
        except (errors.LazyfsError, OSError) as error:
            logger.warning("cannot go on yet: image=%s reason=%s", image.record.export, error)
            return False
        return True

    def _drop_unused(self, image: Image) -> None:
        self.names.drop_inode(image)
        self._active.pop(image.inode, None)

    # -- the repository's list

    async def refresh(self) -> None:
        """Update the names from the repository, and look whether exports that are cached have
        changed.

        Raises:
            ConnectionLost, Unsupported: the repository could not be listed or asked.
            LazyfsError, OSError: the catalog could not be written.
                In both cases `list_trouble` says why, and the next refresh tries again.
        """
        async with self._refreshing:
            try:
                listed = set(await self._repository.list_exports())
                await self._take_in(listed)
                await self._check_versions(
                    [i for i in self.names.images() if i.record.export in listed]
                )
            except errors.Busy:
                return  # it is there, but nobody can ask it: nothing is known to have changed
            except (errors.LazyfsError, OSError) as error:
                self.list_trouble = errors.said(error)
                raise
            self.list_trouble = ""

    async def _take_in(self, listed: set[str]) -> None:
        known = set()
        for images in slices(list(self.names.images())):
            for image in images:
                known.add(image.record.export)
                image.gone = image.record.export not in listed
            gone = [image for image in images if image.gone and has_nothing(image)]
            await self._drop([image for image in gone if image.inode not in self._replacing])
            await trio.lowlevel.checkpoint()
        self.on_fillable()  # some images may be in the repository again
        await self._remove_stale_rows()
        for exports in slices(sorted(listed - known)):
            await self._add(self._new_records(exports))

    async def _add(self, records: Sequence[ImageRecord]) -> None:
        """Store and show images that are new."""
        paths = {record.path for record in records}
        self._reserved |= paths
        try:
            added = await trio.to_thread.run_sync(
                self._catalog.add, records, limiter=self.threads.catalog
            )
            for record in added:
                self.names.add(Image(record, self._context))
        finally:
            self._reserved -= paths

    def _new_records(self, exports: Sequence[str]) -> list[ImageRecord]:
        options, now, taken = self._options, time.time_ns(), self.taken_names()
        records: list[ImageRecord] = []
        for export in exports:
            suffix = shown_file.SUFFIX[options.format]
            path = shown_path(export, options.names, taken.is_free, suffix)
            taken.take(path)
            record = ImageRecord(
                inode=0,
                export=export,
                path=path,
                size=None,
                identity="",
                format=options.format,
                state=State.REMOTE,
                error="",
                block_size=options.block_size,
                # No two images have the same time: a plain file is recognised by its time and size.
                created_ns=now + len(records),
            )
            records.append(record)
        return records

    def taken_names(self) -> TakenNames:
        """Return the paths that are taken by images that are shown or are about to be shown."""
        taken = TakenNames(self.names.root)
        for path in self._reserved:
            taken.take(path)
        return taken

    async def _drop(self, images: Sequence[Image]) -> None:
        """Forget images of which nothing is cached and which nobody has open."""
        # The names go before anything is awaited, so nobody can open these images from here on.
        for image in images:
            self.names.unname(image)
            self.names.drop_inode(image)
            self._stale_rows.add(image.inode)
        await self._remove_stale_rows()

    async def _remove_stale_rows(self) -> None:
        """Delete the catalog rows of images that are not shown.

        If that fails, the next refresh tries again.

        Raises:
            LazyfsError, OSError: the catalog cannot be written.
        """
        if rows := list(self._stale_rows):
            await trio.to_thread.run_sync(self._catalog.remove, rows, limiter=self.threads.catalog)
            self._stale_rows.difference_update(rows)

    async def _check_versions(self, images: Sequence[Image]) -> None:
        """Ask the repository again about the images that have something cached.

        The next open of any other image asks about it.
        """
        known = [image for image in images if not has_nothing(image)]
        for start in range(0, len(known), DESCRIBE_BATCH):
            batch = known[start : start + DESCRIBE_BATCH]
            try:
                found = await self._repository.describe([image.record.export for image in batch])
            except errors.ExportRefused:
                continue  # none of them has answered, which says nothing about others
            for image in batch:
                export = found[image.record.export]
                if isinstance(export, Export):
                    await self._compare(image, export)
                    self._compare_samples(image)

    async def _compare(self, image: Image, export: Export) -> None:
        """Compare a cached image with its export as it is now."""
        record = image.record
        if record.size is None:
            return
        try:
            Export(record.export, record.size, record.identity).check_same(export)
        except errors.ExportChanged as change:
            await self._export_changed(image, change)
        else:
            if record.identity == UNKNOWN:
                if record.state is State.WHOLE and record.cause is not Cause.CONTENT_CHANGED:
                    self._identify_later(image, export)
                return
            # Once another version of an export has been seen, an equal size alone proves nothing
            # if the export has no identity.
            sure = record.state is State.WHOLE or record.identity != ""
            if sure and record.state is not State.REMOTE and record.cause is Cause.EXPORT_CHANGED:
                await image.recover()

    def _identify_later(self, image: Image, export: Export) -> None:
        """Compare an image in the background: one export that hangs must not hold up others."""

        async def identify() -> None:
            try:
                async with self._comparing:
                    await self._identify(image, export)
            finally:
                self._identified_now.discard(image)

        if image not in self._identified_now:
            self._identified_now.add(image)
            self._nursery.start_soon(log_failure, "comparing an image", identify)

    async def _identify(self, image: Image, export: Export) -> None:
        """Take over the identity of the export of an image, if their bytes are the same."""
        record = image.record
        try:
            await identifying.compare(
                record,
                partial(self._context.stores.whole, record),
                self._repository.source(export),
                self._options.io_timeout_s,
                self.threads.jobs,
            )
        except errors.ExportChanged as change:
            await self._export_changed(image, change)
        except (errors.LazyfsError, OSError) as error:
            logger.info("not compared yet: image=%s reason=%s", record.export, error)
        else:
            if image.retired or image.record.state is not State.WHOLE:
                return
            await image.identify(export.identity)
            if image.record.cause is Cause.EXPORT_CHANGED:
                await image.recover()

    def _compare_samples(self, image: Image) -> None:
        """Compare some of what is cached with the repository, if something was fetched lately.

        This is done in the background, because one export that hangs must not hold up others.
        """
        filling = image.filling
        if filling is None or image.record.state is not State.PARTIAL:
            return
        if filling.kept and filling.samples.due:

            async def compare() -> None:
                await filling.reader.compare()
                if not image.open_count:
                    filling.reader.drop_connection_when_idle()

            self._nursery.start_soon(log_failure, "comparing with the repository", compare)

    async def _export_changed(self, image: Image, error: errors.ExportChanged) -> None:
        if image.retired:
            return
        try:
            if self._options.replace_changed:
                await self.replace(image, error, lambda record: record.successor(time.time_ns()))
            else:
                await image.fail(change_of(error), error)
        except (errors.LazyfsError, OSError) as failed:
            logger.warning(
                "a change is not taken in yet: image=%s reason=%s", image.record.export, failed
            )

    async def replace(
        self,
        image: Image,
        error: errors.ExportChanged | None,
        successor: Callable[[ImageRecord], ImageRecord],
        check: Callable[[], None] = lambda: None,
    ) -> Image:
        """Let an image with a new inode take the name.

        The old image stays usable until its last close. If this fails, nothing has changed.

        Args:
            image: the old image.
            error: why the rest of the old image cannot be fetched any more. None if it can.
            successor: returns the new record, made from the old one.
            check: as for `Image.retire`.

        Raises:
            UserError, OSError, LazyfsError, and what `check` raises: nothing has changed.
        """
        self.check_current(image)
        path = successor(image.record).path

        def take_over() -> ImageRecord:
            return self._catalog.replace(image.inode, successor(image.record))

        # This is shielded because the name would lead nowhere if it stopped halfway. It only waits
        # for the disk, so it is never long.
        with trio.CancelScope(shield=True), self._marked_as_replaced(image, path):
            record = await image.retire(error, take_over, check)
            logger.info("replaced: image=%s reason=%s", image.record.export, error or "evicted")
            self.names.unname(image)
            new = Image(record, self._context)
            new.gone = image.gone
            self.names.add(new)
        self.on_state_changed(new)
        return new

    @contextmanager
    def _marked_as_replaced(self, image: Image, path: str) -> Iterator[None]:
        event = self._replacing[image.inode] = trio.Event()
        self._reserved.add(path)
        try:
            yield
        finally:
            self._reserved.discard(path)
            del self._replacing[image.inode]
            event.set()

    def check_current(self, image: Image) -> None:
        """Check that this image has its name, and that it is not being replaced.

        Raises:
            UserError: another image has the name, or is about to get it.
        """
        if image.retired or image.inode in self._replacing:
            raise errors.UserError(
                f"{image.record.path} is being replaced by a new version; try again"
            )

    async def evict(self, image: Image, check: Callable[[], None] = lambda: None) -> None:
        """Drop what is cached of an image. Obstacles such as a pin are not considered.

        Processes that have the image open keep what was present until they close it.

        Args:
            image: the image.
            check: as for `Image.retire`.

        Raises:
            LazyfsError, OSError, and what `check` raises: it could not be dropped.
        """
        if image.record.state is State.REMOTE and not image.gone:
            return
        with trio.CancelScope(shield=True):
            new = await self.replace(
                image,
                None,
                lambda record: record.successor(
                    time.time_ns(),
                    digest=lasting_digest(record),
                    same_export=not is_changed(record),
                ),
                check,
            )
            if new.gone and not new.open_count:
                await self._drop([new])

    async def prefetch(self, image: Image) -> None:
        """Start to populate an image that nobody reads. Its size must be known.

        Raises:
            LazyfsError, OSError: population cannot start now.
        """
        self.check_current(image)
        await image.prefetch()
        self.on_fillable()

    def set_rate(self, rate: int | None) -> None:
        """Limit the population of all images together to `rate` bytes per second.

        None means no limit.
        """
        self._context.pace.set_rate(rate)

    def use_time(self) -> int:
        """Return the time of a use of now, in ns since the epoch, which never goes back."""
        return self._context.use_clock.now_ns()

    @property
    def rate_limit(self) -> int | None:
        """The limit of `set_rate`."""
        return self._context.pace.rate_limit

    async def set_setting(self, name: str, value: str) -> None:
        """Store what concerns the whole cache.

        Raises:
            LazyfsError, OSError: the catalog cannot be written.
        """
        await trio.to_thread.run_sync(
            self._catalog.set_setting, name, value, limiter=self.threads.catalog
        )

    async def save_uses(self) -> None:
        """Write to the catalog when each image was last used.

        If that fails, the next call tries again.
        """
        records = [
            image.record
            for image in self.names.images()
            if image.record.last_used_ns != self._uses_saved.get(image.inode, 0)
        ]
        uses = [(record.inode, record.last_used_ns) for record in records]
        if not uses:
            return
        try:
            await trio.to_thread.run_sync(
                self._catalog.note_uses, uses, limiter=self.threads.catalog
            )
        except (errors.LazyfsError, OSError) as error:
            logger.warning("the catalog could not be written: %s", error)
        else:
            self._uses_saved.update(uses)

    # -- beginning and end

    async def resume(self) -> None:
        """Open the partial images that an earlier daemon left."""
        for image in self.names.images():
            if image.record.state in (State.PARTIAL, State.FAILED) and not image.retired:
                try:
                    await image.resume()
                except (errors.LazyfsError, OSError) as error:
                    logger.warning("cannot resume: image=%s reason=%s", image.record.export, error)
                except Exception:
                    logger.exception(
                        "cannot resume, a bug in lazyfs: image=%s", image.record.export
                    )
        self.on_fillable()

    async def aclose(self) -> None:
        """Save and close every image. Images that are complete become whole.

        The connection to the kernel must have ended. The times of the last uses are saved as well.
        """
        self.names.on_invalid_entry = lambda folder, name: None
        self.on_invalid_attributes = lambda inode: None
        for image in list(self._active.values()):
            try:
                await image.aclose()
            except (errors.LazyfsError, OSError) as error:
                logger.warning("not closed cleanly: image=%s reason=%s", image.record.export, error)
            except Exception:
                # The other images are still to be saved.
                logger.exception(
                    "not closed cleanly, a bug in lazyfs: image=%s", image.record.export
                )
        await self.save_uses()

    # -- inside

    def _state_changed(self, image: Image) -> None:
        if self.names.image_of(image.record.export) is image:
            if image.record.state is State.WHOLE:
                self.names.invalidate(image)
            self.on_state_changed(image)


def is_last_copy(image: Image) -> bool:
    """Return whether what is cached could not be fetched again.

    That is so if the export is gone or has changed.
    """
    record = image.record
    changed = record.state is State.WHOLE and is_changed(record)
    return image.gone or record.state is State.FAILED or changed


def is_changed(record: ImageRecord) -> bool:
    """Return whether the export is known to be another one than what is cached."""
    return record.cause in (Cause.EXPORT_CHANGED, Cause.CONTENT_CHANGED)


def change_of(error: errors.ExportChanged) -> Cause:
    """Return the cause that the catalog stores for a change of an export."""
    content = isinstance(error, errors.ContentChanged)
    return Cause.CONTENT_CHANGED if content else Cause.EXPORT_CHANGED


def lasting_digest(record: ImageRecord) -> str:
    """Return the digest that still holds for what will be fetched.

    It is "" if anything was wrong with the image or its export.
    """
    return "" if record.error else record.digest


def has_nothing(image: Image) -> bool:
    """Return whether nothing of the image is cached and nobody has it open."""
    return image.record.state is State.REMOTE and not image.open_count
