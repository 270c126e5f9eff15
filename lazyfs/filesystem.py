"""Names and inodes: which image is behind which path, as the repository's list changes.

Images are known by their key in the catalog, whichever of their two inode numbers the kernel uses
(`core/inode_number.py`). Entries of a folder are listed in the order of their inode numbers, which is
also the position a listing goes on from: no entry is skipped or shown twice while others come and go.
"""

import errno
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import trio

from lazyfs import errors
from lazyfs.core import inode_number, shown_file
from lazyfs.core.export_name import file_name
from lazyfs.core.lifecycle import State
from lazyfs.image import Image, Surroundings
from lazyfs.image_statistics import ImageStatistics
from lazyfs.interfaces import Catalog, Export, ImageRecord, Repository, Stores
from lazyfs.pace import Pace

logger = logging.getLogger(__name__)

DESCRIBE_BATCH = 128
"""Exports asked about at once: 10 ms of questions at 70 us each, 3 s over a link of 20 ms; one catalog transaction."""

MAX_SYNCS = 4
"""Images that are synced to disk at the same time. Unmeasured; a disk that queues more gains nothing."""

NO_SIZES_S = 5.0
"""After a question about sizes had no answer, others fail at once for so long: time for a listing of thousands,
and how late a user may notice that the repository is back."""


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


@dataclass(eq=False, slots=True)
class Folder:
    """A "/" in export names."""

    path: str
    inode: int
    parent: "Folder | None"
    entries: dict[str, "Folder | Image"] = field(default_factory=dict)
    order: list[tuple[int, str]] | None = None
    """Inode and name of each entry, sorted; None when out of date."""

    @property
    def shown_inode(self) -> int:
        """As of an image."""
        return self.inode


Node = Folder | Image


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
        self.on_invalid_entry: Callable[[Folder, str], None] = lambda folder, name: None
        """The kernel must ask for this name again; set by the adapter."""
        self.on_invalid_attributes: Callable[[int], None] = lambda inode: None
        """The kernel must ask for this inode's attributes again; set by the adapter."""
        self.on_fillable: Callable[[], None] = lambda: None
        """Set by whoever populates."""
        self._repository = repository
        self._catalog = catalog
        self._options = options
        self._nursery = nursery
        self._around = Surroundings(
            repository=repository,
            stores=stores,
            catalog=catalog,
            nursery=nursery,
            pace=Pace(options.fill_rate, trio.lowlevel.current_clock().current_time),
            io_timeout_s=options.io_timeout_s,
            syncs=trio.CapacityLimiter(MAX_SYNCS),
            on_fillable=lambda: self.on_fillable(),
            on_export_changed=lambda image, error: nursery.start_soon(self._export_changed, image, error),
            on_attributes_changed=lambda image: self.on_invalid_attributes(image.inode),
            on_whole=self._became_whole,
        )
        self.root = Folder("", inode_number.ROOT, None)
        self._nodes: dict[int, Node] = {self.root.inode: self.root}
        """By inode number; images by their key."""
        self._by_export: dict[str, Image] = {}
        self._active: dict[int, Image] = {}
        self._describing = trio.Lock()
        self._no_sizes_until = 0.0
        self._refreshing = trio.Lock()
        for record in records:
            self._add(Image(record, self._around))

    # -- looking

    def node(self, inode: int) -> Node | None:
        """Return what has this inode number, also if its name is gone but somebody has it open."""
        return self._nodes.get(inode_number.key(inode))

    def images(self) -> Iterator[Image]:
        """Yield the images that have a name, in no special order."""
        return iter(list(self._by_export.values()))

    def active_images(self) -> Iterable[Image]:
        """Return the images that have a cache file open: those population may look at."""
        for image in [image for image in self._active.values() if image.fetcher is None and not image.open_count]:
            del self._active[image.inode]  # whole and closed
        return list(self._active.values())

    def node_at(self, path: str) -> Node | None:
        """Return what `path`, relative to the mountpoint, names."""
        node: Node | None = self.root
        for part in path.split("/") if path else []:
            node = node.entries.get(part) if isinstance(node, Folder) else None
        return node

    def entries_after(self, folder: Folder, position: int) -> Iterator[tuple[int, str, Node]]:
        """Yield (position, name, node) for the entries behind `position`, 0 for the first."""
        if folder.order is None:
            folder.order = sorted((node.inode, name) for name, node in folder.entries.items())
        order = folder.order
        for inode, name in order[bisect_right(order, (position, "\U0010ffff")) :]:
            node = folder.entries.get(name)
            if node is not None:
                yield inode, name, node

    def statistics(self, images: Iterable[Image] | None = None) -> list[ImageStatistics]:
        """Return what `status` shows, by path: of `images`, or of all with a name or a reader."""
        chosen = [*self.images(), *self._replaced()] if images is None else images
        return sorted((image.statistics() for image in chosen), key=lambda s: s.path)

    # -- opening

    def _replaced(self) -> list[Image]:
        return [image for image in self.open_images() if image.retired]

    def open_images(self) -> list[Image]:
        """Return the images that somebody has open, with or without a name."""
        return [node for node in self._nodes.values() if isinstance(node, Image) and node.open_count]

    async def open(self, image: Image, plain: bool = False) -> None:
        """Open `image`; its population begins with its first open. `plain`: as a whole image only.

        Raises:
            LazyfsError, OSError: it cannot be opened now; says why.
        """
        if image.record.state is State.REMOTE and not image.open_count and not plain:
            # Asked again although known: from here on the size is what the cache is made for.
            await self._in_time(self._describe, [image], patient=True)
        if self._nodes.get(image.inode) is not image:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if image.record.size is None and not plain:
            raise errors.RequestFailed(f"asking for the size of {image.record.export}", errno.EIO)
        await image.open(plain)
        self._active[image.inode] = image

    async def release(self, image: Image, plain: bool = False) -> None:
        """Close what `open` opened."""
        await image.release(plain)
        if image.retired and not image.open_count:
            self._nodes.pop(image.inode, None)
            self._active.pop(image.inode, None)

    async def describe(self, images: Sequence[Image]) -> None:
        """Learn the sizes that are not known yet, in batches; what the server will not describe stays unknown.

        Raises:
            TimedOut: the repository does not answer in the time allowed.
        """
        unknown = [image for image in images if image.record.size is None]
        for start in range(0, len(unknown), DESCRIBE_BATCH):
            await self._in_time(self._describe_unknown, unknown[start : start + DESCRIBE_BATCH])

    def describe_soon(self, images: Sequence[Image]) -> None:
        """Let `describe` run in the background, after a listing showed names without sizes."""
        if not self._describing.locked():
            self._nursery.start_soon(self._describe_quietly, images)

    async def _describe_quietly(self, images: Sequence[Image]) -> None:
        try:
            await self.describe(images)
        except (errors.LazyfsError, OSError) as error:
            logger.info("sizes stay unknown: %s", error)

    async def _describe_unknown(self, images: Sequence[Image]) -> None:
        async with self._describing:
            # Looked at again under the lock: the one before us may have learned them.
            await self._describe([image for image in images if image.record.size is None])

    async def _in_time(
        self, call: Callable[[Sequence[Image]], Awaitable[None]], images: Sequence[Image], patient: bool = False
    ) -> None:
        too_late = errors.TimedOut(
            "asking for the size of an image", self._options.io_timeout_s, "the repository does not answer"
        )
        if not patient and trio.current_time() < self._no_sizes_until and not self._repository.connected:
            raise too_late  # `ls -l` of thousands waits once, not once for each
        try:
            with trio.fail_after(self._options.io_timeout_s):
                await call(images)
        except trio.TooSlowError:
            self._no_sizes_until = trio.current_time() + NO_SIZES_S
            raise too_late from None
        self._no_sizes_until = 0.0

    async def _describe(self, images: Sequence[Image]) -> None:
        if not images:
            return
        found = await self._ask([image.record.export for image in images])
        changed = []
        for image in images:
            export = found[image.record.export]
            if isinstance(export, Export):
                await image.describe(export.size, export.identity)
                changed.append((image.inode, export.size, export.identity))
            else:
                logger.warning("no size: image=%s reason=%s", image.record.export, export)
        try:
            await trio.to_thread.run_sync(self._catalog.describe, changed)
        except (errors.LazyfsError, OSError) as error:
            logger.warning("the catalog could not be written: %s", error)

    async def _ask(self, names: Sequence[str]) -> dict[str, Export | str]:
        """Describe, reconnecting for as long as the caller allows."""
        while True:
            try:
                return await self._repository.describe(names)
            except errors.ConnectionLost:
                await trio.sleep(0.5)

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
                await self._check_versions([i for i in self.images() if i.record.export in listed])
            except errors.LazyfsError as error:
                self.list_trouble = str(error)
                raise
            self.list_trouble = ""

    async def _take_in(self, listed: set[str]) -> None:
        known = {image.record.export for image in self.images()}
        for image in self.images():
            image.gone = image.record.export not in listed
        self.on_fillable()  # some may be back
        await self._drop([image for image in self.images() if image.gone and _has_nothing(image)])
        now = time.time_ns()
        records: list[ImageRecord] = []
        taken = _Names(self.root)
        for export in sorted(listed - known):
            options = self._options
            path = file_name(export, taken.is_free, shown_file.SUFFIX[options.format])
            taken.take(path)
            records.append(
                # No two of one time: that, with the size, is what a plain file is known by.
                ImageRecord(
                    0, export, path, None, "", options.format, State.REMOTE, "", options.block_size, now + len(records)
                )
            )
        if records:
            for record in await trio.to_thread.run_sync(self._catalog.add, records):
                self._add(Image(record, self._around))

    async def _drop(self, images: Sequence[Image]) -> None:
        if images:
            for image in images:  # before anything is awaited: nobody can open them from here on
                self._unname(image)
                self._nodes.pop(image.inode, None)
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
            if sure and record.state is not State.REMOTE and record.error.startswith("changed in the repository"):
                await image.recover()

    async def _export_changed(self, image: Image, error: errors.ExportChanged) -> None:
        if image.retired:
            return
        try:
            if self._options.replace_changed:
                # Disk only, so never long; half done, the name would lead nowhere.
                with trio.CancelScope(shield=True):
                    await self._replace(image, error)
            else:
                await image.fail(error)
        except (errors.LazyfsError, OSError) as failed:
            logger.warning("a change is not taken in yet: image=%s reason=%s", image.record.export, failed)
            image.retired = False

    async def _replace(self, image: Image, error: errors.ExportChanged) -> None:
        """Let a new inode take the name; the old one lives until its last close."""
        logger.info("replaced: image=%s reason=%s", image.record.export, error)
        old = image.record
        await image.retire(error)
        (record,) = await trio.to_thread.run_sync(
            self._catalog.add,
            [replace(old, size=None, identity="", state=State.REMOTE, error="", created_ns=time.time_ns(),
                     present_bytes=0, demand_bytes=0, populated_bytes=0, requests=0)],
        )  # fmt: skip
        self._unname(image)
        if not image.open_count:
            self._nodes.pop(image.inode, None)
            self._active.pop(image.inode, None)
        self._add(Image(record, self._around))

    # -- beginning and end

    async def resume(self) -> None:
        """Open the partial images of an earlier daemon."""
        for image in self.images():
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
        """Save and close every image; what is complete becomes whole. The kernel's connection has ended."""
        self.on_invalid_entry = lambda folder, name: None
        self.on_invalid_attributes = lambda inode: None
        for image in list(self._active.values()):
            try:
                await image.aclose()
            except (errors.LazyfsError, OSError) as error:
                logger.warning("not closed cleanly: image=%s reason=%s", image.record.export, error)

    # -- inside

    def _add(self, image: Image) -> None:
        *folders, name = image.record.path.split("/")
        folder = self.root
        for part in folders:
            below = folder.entries.get(part)
            if below is None:
                path = f"{folder.path}/{part}".lstrip("/")
                below = Folder(path, inode_number.folder(path), folder)
                self._nodes[below.inode] = below
                folder.entries[part] = below
                folder.order = None
            assert isinstance(below, Folder), f"{image.record.path}: {part} is an image"
            folder = below
        folder.entries[name] = image
        folder.order = None
        self._nodes[image.inode] = image
        self._by_export[image.record.export] = image
        self.on_invalid_entry(folder, name)

    def _unname(self, image: Image) -> None:
        *folders, name = image.record.path.split("/")
        folder = self.node_at("/".join(folders))
        assert isinstance(folder, Folder)
        self._by_export.pop(image.record.export, None)
        while True:
            folder.entries.pop(name, None)
            folder.order = None
            self.on_invalid_entry(folder, name)
            if folder.entries or folder.parent is None:
                break
            self._nodes.pop(folder.inode, None)
            name, folder = folder.path.rpartition("/")[2], folder.parent

    def _became_whole(self, image: Image) -> None:
        if self._by_export.get(image.record.export) is image:
            folder, _, name = image.record.path.rpartition("/")
            parent = self.node_at(folder)
            assert isinstance(parent, Folder)
            self.on_invalid_entry(parent, name)

    async def _update_catalog(self, records: Sequence[ImageRecord]) -> None:
        if records:
            try:
                await trio.to_thread.run_sync(self._catalog.update, records)
            except (errors.NoSpace, OSError) as error:
                logger.warning("the catalog could not be written: %s", error)


class _Names:
    """Which paths can still be given, while new exports are taken in."""

    def __init__(self, root: Folder) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()
        pending = [root]
        while pending:
            folder = pending.pop()
            for name, node in folder.entries.items():
                path = f"{folder.path}/{name}".lstrip("/")
                if isinstance(node, Folder):
                    self._folders.add(path)
                    pending.append(node)
                else:
                    self._files.add(path)

    def is_free(self, path: str) -> bool:
        """Whether no file or folder has `path`, and no file is where its folders belong."""
        return path not in self._files and path not in self._folders and self._files.isdisjoint(_ancestors(path))

    def take(self, path: str) -> None:
        """Give `path` to a file."""
        self._files.add(path)
        self._folders.update(_ancestors(path))


def _ancestors(path: str) -> Iterator[str]:
    position = path.find("/")
    while position >= 0:
        yield path[:position]
        position = path.find("/", position + 1)


def _has_nothing(image: Image) -> bool:
    return image.record.state is State.REMOTE and not image.open_count
