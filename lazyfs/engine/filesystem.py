"""The images of one mount, as the repository's list changes: opened, refreshed, replaced, evicted."""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import trio

from lazyfs import errors
from lazyfs.core import shown_file
from lazyfs.core.export_name import EXPORT, shown_path
from lazyfs.core.lifecycle import State
from lazyfs.engine import verifying
from lazyfs.engine.budget import Budget
from lazyfs.engine.context import Context
from lazyfs.engine.fetch.events import UnderWay
from lazyfs.engine.fetch.write_queue import WriteQueue
from lazyfs.engine.image.image import Image
from lazyfs.engine.image.image_statistics import ImageStatistics
from lazyfs.engine.interfaces import Catalog, Export, ImageRecord, Repository, Stores
from lazyfs.engine.name_tree import NameTree, TakenNames
from lazyfs.engine.pace import SharedPace
from lazyfs.engine.sizes import DESCRIBE_BATCH, Sizes
from lazyfs.engine.totals import Totals
from lazyfs.units import KiB

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 64 * KiB
"""Of raw images, and the clusters of qcow2: QEMU's default; doc/BENCHMARKS.md has what a guest makes of others."""

MAX_SYNCS = 4
"""Images that are synced to disk at the same time. Unmeasured; a disk that queues more gains nothing."""

PREFETCH_ANSWER_S = 5.0
"""How long `prefetch` waits for the repository: less than a client of the control socket does."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose about images; the daemon chooses the rest."""

    block_size: int
    """Of new images; for a qcow2 its clusters."""
    io_timeout_s: float
    replace_changed: bool
    populate: bool
    fill_rate: int | None = None
    format: str = "raw"
    names: str = EXPORT
    """Of new images: one of `export_name.NAMES`."""


class Filesystem:
    """All images of one mount. Trio thread only."""

    def __init__(
        self,
        repository: Repository,
        stores: Stores,
        catalog: Catalog,
        records: Sequence[ImageRecord],
        options: Options,
        nursery: trio.Nursery,
    ) -> None:
        """Start from the catalog's `records`; `refresh` brings in what the repository has."""
        self.list_trouble = ""
        """Why the repository could not be listed; "" if it could."""
        self.names = NameTree()
        self.sizes = Sizes(repository, catalog, nursery, options.io_timeout_s)
        self.totals = Totals(trio.lowlevel.current_clock().current_time)
        self.budget = Budget()
        self.on_invalid_attributes: Callable[[int], None] = lambda inode: None
        """The kernel must ask for this inode's attributes again; set by the adapter."""
        self.on_fillable: Callable[[], None] = lambda: None
        """Set by whoever populates."""
        self.on_state_changed: Callable[[Image], None] = lambda image: None
        """Set by whoever tells clients."""
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
            budget=self.budget,
            writes=WriteQueue(nursery),
            populate=options.populate,
            io_timeout_s=options.io_timeout_s,
            syncs=trio.CapacityLimiter(MAX_SYNCS),
            on_fillable=lambda: self.on_fillable(),
            on_export_changed=lambda image, error: nursery.start_soon(self._export_changed, image, error),
            on_attributes_changed=lambda image: self.on_invalid_attributes(image.inode),
            on_state_changed=self._state_changed,
        )
        self._active: dict[int, Image] = {}
        self._replacing = UnderWay()
        self._refreshing = trio.Lock()
        self._uses_saved_ns = max((record.last_used_ns for record in records), default=0)
        for record in records:
            self.names.add(Image(record, self._context))

    # -- looking

    def active_images(self) -> Iterable[Image]:
        """Return the images that have a cache file open: those population may look at."""
        for image in [image for image in self._active.values() if image.fetcher is None and not image.open_count]:
            del self._active[image.inode]  # whole and closed
        return list(self._active.values())

    def statistics(self, images: Iterable[Image] | None = None) -> list[ImageStatistics]:
        """Return what `status` shows, by path: of `images`, or of all with a name or a reader."""
        chosen = [*self.names.images(), *self._replaced()] if images is None else images
        return sorted((image.statistics() for image in chosen), key=lambda s: s.path)

    # -- opening

    def _replaced(self) -> list[Image]:
        return [image for image in self.open_images() if image.retired]

    def open_images(self) -> list[Image]:
        """Return the images that somebody has open, with or without a name."""
        return [image for image in self.names.all_images() if image.open_count]

    async def open(self, image: Image, plain: bool = False) -> None:
        """Open `image`; its population begins with its first open. `plain`: as a whole image only.

        Raises:
            LazyfsError, OSError: it cannot be opened now; says why.
        """
        if image.record.state is State.REMOTE and not image.open_count and not plain:
            # Asked again although known: from here on the size is what the cache is made for.
            await self.sizes.learn_again(image, patient=True)
        if self.names.node(image.inode) is not image:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if image.record.size is None and not plain:
            raise errors.RequestFailed(f"asking for the size of {image.record.export}", errno.EIO)
        self._active[image.inode] = image
        try:
            await image.open(plain)
        except OSError:  # ESTALE: the kernel looks the name up again, once, and must find the new inode then
            await self._replacing.over(image.inode)
            raise

    async def release(self, image: Image, plain: bool = False) -> None:
        """Close what `open` opened."""
        await image.release(plain)
        self._drop_if_unused(image)

    def _drop_if_unused(self, image: Image) -> None:
        if image.retired and not image.open_count:
            self.names.drop_inode(image)
            self._active.pop(image.inode, None)

    # -- the repository's list

    async def refresh(self) -> None:
        """Bring the names up to date with the repository, and look whether cached exports changed.

        Raises:
            ConnectionLost, Unsupported: nothing has changed here; `list_trouble` says why.
        """
        async with self._refreshing:
            try:
                listed = set(await self._repository.list_exports())
                await self._take_in(listed)
                await self._check_versions([i for i in self.names.images() if i.record.export in listed])
            except errors.LazyfsError as error:
                self.list_trouble = str(error)
                raise
            self.list_trouble = ""

    async def _take_in(self, listed: set[str]) -> None:
        known = {image.record.export for image in self.names.images()}
        for image in self.names.images():
            image.gone = image.record.export not in listed
        self.on_fillable()  # some may be back
        await self._drop([image for image in self.names.images() if image.gone and _has_nothing(image)])
        now = time.time_ns()
        records: list[ImageRecord] = []
        taken = TakenNames(self.names.root)
        for export in sorted(listed - known):
            options = self._options
            path = shown_path(export, options.names, taken.is_free, shown_file.SUFFIX[options.format])
            taken.take(path)
            records.append(
                # No two of one time: that, with the size, is what a plain file is known by.
                ImageRecord(
                    0, export, path, None, "", options.format, State.REMOTE, "", options.block_size, now + len(records)
                )
            )
        if records:
            for record in await trio.to_thread.run_sync(self._catalog.add, records):
                self.names.add(Image(record, self._context))

    async def _drop(self, images: Sequence[Image]) -> None:
        if images:
            for image in images:  # before anything is awaited: nobody can open them from here on
                self.names.unname(image)
                self.names.drop_inode(image)
            await trio.to_thread.run_sync(self._catalog.remove, [image.inode for image in images])

    async def _check_versions(self, images: Sequence[Image]) -> None:
        """Ask again about what is cached; about what is not, the next open asks."""
        known = [image for image in images if not _has_nothing(image)]
        for start in range(0, len(known), DESCRIBE_BATCH):
            batch = known[start : start + DESCRIBE_BATCH]
            found = await self._repository.describe([image.record.export for image in batch])
            for image in batch:
                export = found[image.record.export]
                if isinstance(export, Export):
                    await self._compare(image, export)

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
            # Without an identity an equal size proves nothing, once another version has been seen.
            sure = record.state is State.WHOLE or record.identity != ""
            if sure and record.state is not State.REMOTE and _has_changed(record):
                await image.recover()

    async def _export_changed(self, image: Image, error: errors.ExportChanged) -> None:
        if image.retired:
            return
        try:
            if self._options.replace_changed:
                await self._replace(image, error)
            else:
                await image.fail(error)
        except (errors.LazyfsError, OSError) as failed:
            logger.warning("a change is not taken in yet: image=%s reason=%s", image.record.export, failed)

    async def _replace(self, image: Image, error: errors.ExportChanged | None, **changes: object) -> Image:
        """Let a new inode take the name; the old one lives until its last close. All or nothing."""
        fresh: dict[str, object] = {
            "size": None, "identity": "", "state": State.REMOTE, "error": "", "created_ns": time.time_ns(),
            "present_bytes": 0, "demand_bytes": 0, "populated_bytes": 0, "requests": 0, "digest": "",
        }  # fmt: skip

        self._check_current(image)

        def take_over() -> ImageRecord:
            added = replace(image.record, **(fresh | changes))  # type: ignore[arg-type]
            return self._catalog.replace(image.inode, added)

        # Disk only, so never long; half done, the name would lead nowhere.
        with trio.CancelScope(shield=True), self._replacing.mark(image.inode):
            record = await image.retire(error, take_over)
            logger.info("replaced: image=%s reason=%s", image.record.export, error or "evicted")
            self._take_name(image)
            new = Image(record, self._context)
            new.gone = image.gone
            self.names.add(new)
        self.on_state_changed(new)
        return new

    def _take_name(self, image: Image) -> None:
        """Of a retired image: only who has it open can reach it now."""
        self.names.unname(image)
        self._drop_if_unused(image)

    # -- what an operator asks for

    async def prefetch(self, image: Image, image_format: str | None) -> Image:
        """Populate an image without a reader; return it, or the one that shows it in another format.

        Raises:
            UserError: something is cached in another format, the image has failed, or is gone from the repository.
            LazyfsError, OSError: it cannot be begun now.
        """
        self.check_format(image, image_format)
        if image_format is not None and image_format != image.record.format:
            taken, own = TakenNames(self.names.root), image.record.path
            path = shown_path(
                image.record.export,
                self._options.names,
                lambda path: path == own or taken.is_free(path),
                shown_file.SUFFIX[image_format],
            )
            size = self._options.block_size if image_format == self._options.format else DEFAULT_BLOCK_SIZE
            digest = image.record.digest
            image = await self._replace(image, None, path=path, format=image_format, block_size=size, digest=digest)
        if image.record.state is State.REMOTE:
            await self.sizes.learn_again(image, PREFETCH_ANSWER_S)
            if image.record.size is None:
                raise errors.UserError(f"the repository does not describe {image.record.export}")
        if image.gone and image.record.state is not State.WHOLE:
            raise errors.UserError(f"{image.record.path} is not in the repository any more")
        self._check_current(image)
        await image.prefetch()
        self._active[image.inode] = image
        self.on_fillable()
        return image

    def check_format(self, image: Image, image_format: str | None) -> None:
        """Raise UserError if `prefetch` would refuse that format: something is cached in another."""
        if image_format not in (None, image.record.format) and not _has_nothing(image):
            raise errors.UserError(f"{image.record.path} is cached as {image.record.format}; evict it first")

    async def evict(self, image: Image) -> None:
        """Drop what is cached; who has the image open keeps it until closed.

        Raises:
            UserError: it is pinned.
            LazyfsError, OSError: it could not be dropped.
        """
        if image.record.pinned:
            raise errors.UserError(f"{image.record.path} is pinned; lazyfs unpin it first")
        if image.record.state is State.REMOTE and not image.gone:
            return
        with trio.CancelScope(shield=True):
            new = await self._replace(image, None, digest=_lasting_digest(image))
            if new.gone and not new.open_count:
                await self._drop([new])

    async def touch(self, image: Image, used_ns: int) -> None:
        """Note that somebody used `image` then, without opening it. A time in the future counts as now."""
        await image.annotate(last_used_ns=max(0, min(used_ns, time.time_ns())))

    async def forget(self, image: Image) -> None:
        """Drop an image that is gone from the repository.

        Raises:
            UserError: it is there, pinned or open.
        """
        if not image.gone:
            raise errors.UserError(f"{image.record.path} is in the repository; evict drops what is cached of it")
        if image.open_count:
            raise errors.UserError(f"{image.record.path} is open")
        await self.evict(image)

    async def verify(
        self, image: Image, against_repository: bool, progress: Callable[[int], None], digest: str = ""
    ) -> None:
        """Read back what is cached; drop it if it is damaged, so that it is fetched again when next needed.

        What cannot be fetched again, or is pinned, is kept. `digest`: of a whole image, instead of the one that is
        known, and known from then on if it is right; if it is not, the image may be good, and is kept.

        Raises:
            Differs, CacheCorrupt: it is damaged.
            UserError: it does not have the `digest`.
            UserError, OSError, LazyfsError: it cannot be verified; says why.
        """
        record = image.record
        known = record.digest if record.state is State.WHOLE else ""
        source = None
        if against_repository:
            if record.size is None:
                raise errors.UserError(f"nothing of {record.path} is cached")
            source = self._repository.source(Export(record.export, record.size, record.identity))
        try:
            await verifying.verify(image, digest or known, source, self._options.io_timeout_s, progress)
            if digest:
                await image.annotate(digest=digest)
        except (verifying.Differs, errors.CacheCorrupt) as damage:
            if isinstance(damage, verifying.OtherDigest) and digest not in ("", known):
                raise errors.UserError(damage.what) from damage
            if is_last_copy(image) or image.record.pinned or image.retired:
                logger.critical("%s: image=%s; kept", damage, record.export)
            else:
                logger.critical("%s: image=%s; dropped, to be fetched again", damage, record.export)
                await self._replace(image, None, digest=_lasting_digest(image))
            raise
        finally:
            self._drop_if_unused(image)
            if source is not None:
                with trio.CancelScope(shield=True):
                    await source.aclose()

    def _check_current(self, image: Image) -> None:
        if image.retired or image.inode in self._replacing:
            raise errors.UserError(f"{image.record.path} is being replaced by a new version; try again")

    def set_rate(self, rate: int | None) -> None:
        """Limit population of all images together."""
        self._context.pace.set_rate(rate)

    async def save_uses(self) -> None:
        """Write to the catalog when images were used last."""
        records = [image.record for image in self.names.images() if image.record.last_used_ns > self._uses_saved_ns]
        uses = [(record.inode, record.last_used_ns) for record in records]
        if not uses:
            return
        try:
            await trio.to_thread.run_sync(self._catalog.note_uses, uses)
        except (errors.NoSpace, OSError) as error:
            logger.warning("the catalog could not be written: %s", error)
        else:
            self._uses_saved_ns = max(used_ns for _, used_ns in uses)

    # -- beginning and end

    async def resume(self) -> None:
        """Open the partial images of an earlier daemon."""
        for image in self.names.images():
            if image.record.state in (State.PARTIAL, State.FAILED):
                try:
                    await image.resume()
                    self._active[image.inode] = image
                except (errors.LazyfsError, OSError) as error:
                    logger.warning("cannot resume: image=%s reason=%s", image.record.export, error)
                except Exception:
                    logger.exception("cannot resume, a bug in lazyfs: image=%s", image.record.export)
        self.on_fillable()

    async def aclose(self) -> None:
        """Save and close every image; what is complete becomes whole. The kernel's connection has ended.

        It is noted when each was used.
        """
        self.names.on_invalid_entry = lambda folder, name: None
        self.on_invalid_attributes = lambda inode: None
        for image in list(self._active.values()):
            try:
                await image.aclose()
            except (errors.LazyfsError, OSError) as error:
                logger.warning("not closed cleanly: image=%s reason=%s", image.record.export, error)
        await self.save_uses()

    # -- inside

    def _state_changed(self, image: Image) -> None:
        if self.names.image_of(image.record.export) is image:
            if image.record.state is State.WHOLE:
                self.names.invalidate(image)
            self.on_state_changed(image)


def is_last_copy(image: Image) -> bool:
    """Whether no fetch would bring back what is cached: the export is gone, or has changed."""
    record = image.record
    return image.gone or record.state is State.FAILED or (record.state is State.WHOLE and _has_changed(record))


def _has_changed(record: ImageRecord) -> bool:
    return record.error.startswith("changed in the repository")


def _lasting_digest(image: Image) -> str:
    """Return the digest that holds for what will be fetched: none if anything was wrong with it, or with the export."""
    return "" if image.record.error else image.record.digest


def _has_nothing(image: Image) -> bool:
    return image.record.state is State.REMOTE and not image.open_count
