"""Does what an operator asks for, and checks what speaks against it.

Operators prefetch, pin, evict, forget and verify images. Both the commands of the control socket
and unlink(2) on the mount come here, so both refuse the same things. Room evicts without being
asked; it uses the same obstacles, from `core/eviction.py`.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from errno import ESTALE
from functools import partial

from lazyfs import errors
from lazyfs.core import eviction, shown_file
from lazyfs.core.eviction import Candidate, Obstacle
from lazyfs.core.export_name import shown_path
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import Cause, State
from lazyfs.engine import verifying
from lazyfs.engine.filesystem import (
    DEFAULT_BLOCK_SIZE,
    Filesystem,
    Options,
    has_nothing,
    is_last_copy,
    lasting_digest,
)
from lazyfs.engine.image import image_map
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Export, Repository

logger = logging.getLogger(__name__)

RECENT_NS = 1_000_000_000
"""A time that is set and is no older than this means now: the request took a moment to arrive."""

PREFETCH_ANSWER_S = 5.0
"""How long `prefetch` waits for the repository. This is shorter than a client of the control socket
waits for the answer."""

AGAINST_EVICT = (Obstacle.GONE, Obstacle.PINNED, Obstacle.BACKING)
"""What keeps an operator from evicting an image. Being open is not among these, because processes
that have the image open can keep reading it."""

AGAINST_UNLINK = (Obstacle.PINNED, Obstacle.BACKING)
"""What keeps unlink(2) from evicting an image. An image that is gone from the repository may be
unlinked, as on any file system."""

AGAINST_FORGET = (Obstacle.PINNED, Obstacle.OPEN)

AGAINST_DROP = (Obstacle.GONE, Obstacle.PINNED, Obstacle.BACKING, Obstacle.OPEN)
"""What keeps an image that differs from the repository from being dropped."""

_REFUSALS = {
    Obstacle.GONE: "{path} is gone from the repository; lazyfs forget drops it",
    Obstacle.PINNED: "{path} is pinned; lazyfs unpin it first",
    Obstacle.BACKING: "{path} is the backing file of an overlay",
    Obstacle.OPEN: "{path} is open",
    Obstacle.LAST_COPY: "{path} could not be fetched again",
    Obstacle.SPARED: "{path} is being filled",
    Obstacle.EMPTY: "nothing of {path} is cached",
}


class Refused(errors.UserError):
    """An image may not be dropped."""

    def __init__(self, path: str, obstacle: Obstacle) -> None:
        super().__init__(path, obstacle)
        self.path = path
        self.obstacle = obstacle

    def __str__(self) -> str:
        return _REFUSALS[self.obstacle].format(path=self.path)


def candidate(image: Image, backing: Collection[str], spared: bool = False) -> Candidate:
    """Return an image as a candidate for eviction.

    Args:
        image: the image.
        backing: the paths of images that overlays need.
        spared: whether the room is wanted for this very image, so that it is not evicted.
    """
    return Candidate(
        key=image.inode,
        size=image.cached_bytes(),
        last_used_ns=image.record.last_used_ns,
        opened=image.open_count > 0,
        pinned=image.record.pinned,
        backing=image.record.path in backing,
        spared=spared,
        gone=image.gone,
        last_copy=is_last_copy(image),
    )


def refuse(
    image: Image, backing: Collection[str], among: Collection[Obstacle] = tuple(Obstacle)
) -> None:
    """Raise Refused if one of the obstacles `among` keeps an image from being evicted now."""
    found = eviction.obstacle(candidate(image, backing), among)
    if found is not None:
        raise Refused(image.record.path, found)


class Operations:
    """Carries out the operations of one mount. Trio thread only."""

    def __init__(
        self,
        filesystem: Filesystem,
        repository: Repository,
        options: Options,
        backing_files: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        """Do nothing yet.

        Args:
            filesystem: the images.
            repository: asked when images are compared with it.
            options: what the user chose about images.
            backing_files: returns the paths of images that overlays need. Raises UserError if they
                cannot be found out.
        """
        self._filesystem = filesystem
        self._repository = repository
        self._options = options
        self.backing_files = backing_files

    # -- filling

    def check_format(self, image: Image, image_format: str | None) -> None:
        """Check that `prefetch` would accept this format.

        Raises:
            UserError: something is cached in another format.
        """
        if image_format not in (None, image.record.format) and not has_nothing(image):
            raise errors.UserError(
                f"{image.record.path} is cached as {image.record.format}; evict it first"
            )

    async def prefetch(self, image: Image, image_format: str | None) -> Image:
        """Populate an image that nobody reads.

        Returns:
            The image, or the image that shows the same export in another format.

        Raises:
            UserError: something is cached in another format, the image has failed, or it is gone
                from the repository.
            LazyfsError, OSError: population cannot start now.
        """
        self.check_format(image, image_format)
        if image_format is not None and image_format != image.record.format:
            image = await self._in_format(image, image_format)
        if image.record.state is State.REMOTE:
            await self._filesystem.sizes.learn_again(image, PREFETCH_ANSWER_S)
            if image.record.size is None:
                raise errors.UserError(f"the repository does not describe {image.record.export}")
        if image.gone and image.record.state is not State.WHOLE:
            raise errors.UserError(f"{image.record.path} is not in the repository any more")
        await self._filesystem.prefetch(image)
        return image

    async def _in_format(self, image: Image, image_format: str) -> Image:
        taken, own = self._filesystem.taken_names(), image.record.path
        path = shown_path(
            image.record.export,
            self._options.names,
            lambda path: path == own or taken.is_free(path),
            shown_file.SUFFIX[image_format],
        )
        block_size = (
            self._options.block_size if image_format == self._options.format else DEFAULT_BLOCK_SIZE
        )

        def successor(record: ImageRecord) -> ImageRecord:
            return record.successor(
                time.time_ns(),
                digest=record.digest,
                path=path,
                image_format=image_format,
                block_size=block_size,
            )

        return await self._filesystem.replace(image, None, successor)

    # -- keeping

    async def touch(self, image: Image, used_ns: int) -> None:
        """Note that somebody used `image` at that time without opening it.

        A time in the future counts as now.
        """
        now_ns = time.time_ns()
        # A time of now is later than those that were given out before the clock was set back.
        at_ns = self._filesystem.use_time() if used_ns >= now_ns - RECENT_NS else max(0, used_ns)
        if image.retired:  # only its open files lead here, and nobody asks for its last use
            image.note_use(at_ns)
        else:
            await self._annotate(image, lambda record: record.used(at_ns), must=False)

    async def pin(self, image: Image, pinned: bool) -> None:
        """Pin an image, so that it is not evicted, or unpin it.

        Raises:
            LazyfsError, OSError: the catalog cannot be written, and nothing has changed.
        """
        await self._annotate(image, lambda record: record.with_pin(pinned))

    async def set_digest(self, image: Image, digest: str) -> None:
        """Set the digest with which an image is compared when it is complete.

        Raises:
            LazyfsError, OSError: the catalog cannot be written, and nothing has changed.
        """
        image = await self._annotate(image, lambda record: record.with_digest(digest))
        if image.record.cause is Cause.WRONG_DIGEST:
            await image.recover()  # it will be compared with the new digest

    async def _annotate(
        self, image: Image, change: Callable[[ImageRecord], ImageRecord], must: bool = True
    ) -> Image:
        """Change the record of the image that has the name now, and return that image.

        It may be another image than the one the caller has looked at.
        """
        while True:
            try:
                await image.annotate(change, must)
            except OSError as error:
                now = self._filesystem.names.image_of(image.record.export)
                if error.errno != ESTALE or now is None or now is image:
                    raise
                image = now
            else:
                return image

    # -- dropping

    async def evict(self, image: Image, backing: Collection[str] | None = None) -> None:
        """Drop what is cached of an image.

        Processes that have the image open keep what was present until they close it.

        Args:
            image: the image.
            backing: the paths of images that overlays need. None means that they are to be looked
                up.

        Raises:
            Refused: an obstacle speaks against it.
            UserError: it cannot be found out what overlays need.
            LazyfsError, OSError: it could not be dropped.
        """
        if image.record.state is State.REMOTE and not image.gone:
            return
        backing = await self.backing_files() if backing is None else backing
        check = partial(refuse, image, backing, AGAINST_EVICT)
        check()
        await self._filesystem.evict(image, check)

    async def unlink(self, image: Image) -> None:
        """Evict as unlink(2) on the mount does. Raises what `evict` raises."""
        check = partial(refuse, image, await self.backing_files(), AGAINST_UNLINK)
        await self._filesystem.evict(image, check)

    def may_go(self, image: Image, backing: Collection[str]) -> bool:
        """Return whether `evict` would drop anything."""
        found = eviction.obstacle(candidate(image, backing), AGAINST_EVICT)
        return image.record.state is not State.REMOTE and found is None

    async def forget(self, image: Image) -> None:
        """Drop an image that is gone from the repository.

        Raises:
            Refused, UserError: the image is still in the repository, or it is pinned or open.
            LazyfsError, OSError: it could not be dropped.
        """
        if not image.gone:
            raise errors.UserError(
                f"{image.record.path} is in the repository; evict drops what is cached of it"
            )
        await self._filesystem.evict(image, partial(refuse, image, (), AGAINST_FORGET))

    # -- looking

    async def map(self, image: Image) -> list[image_map.MapEntry]:
        """Return which ranges of an image are present. See `image_map.entries`."""
        return await image_map.entries(image, self._filesystem.threads.jobs)

    async def verify(
        self,
        image: Image,
        against_repository: bool,
        progress: Callable[[int], None],
        digest: str = "",
        drop: bool = False,
    ) -> None:
        """Read back what is cached of an image and compare it.

        If the cache is damaged, it is dropped, so it is fetched again when it is needed next. What
        cannot be fetched again, or is pinned, is kept. What differs from the repository is not
        damaged: the export may be another one now, and overlays need the old bytes. So it is kept
        without `drop`. If it is partial, nothing more is fetched of it.

        Args:
            image: the image.
            against_repository: compare with what the repository has now.
            drop: drop what differs from the repository, unless it is pinned, open, the backing file
                of an overlay, or could not be fetched again.
            progress: called with the number of bytes of each chunk.
            digest: the digest of a whole image, used instead of the one in the catalog. If it
                matches, it is stored in the catalog. If it does not, the image may still be good,
                and is kept.

        Raises:
            Differs, CacheCorrupt: the cache is damaged.
            UserError: the image does not have the `digest`, or differs from the repository.
            UserError, OSError, LazyfsError: it cannot be verified. The error says why.
        """
        record = image.record
        known = record.digest if record.state is State.WHOLE else ""
        source = None
        if against_repository:
            if record.size is None:
                raise errors.UserError(f"nothing of {record.path} is cached")
            source = self._repository.source(Export(record.export, record.size, record.identity))
        try:
            await verifying.verify(
                image,
                digest or known,
                source,
                self._options.io_timeout_s,
                progress,
                self._filesystem.threads.jobs,
            )
            if digest:
                await self._annotate(image, lambda record: record.with_digest(digest))
        except verifying.DiffersFromRepository as difference:
            raise errors.UserError(await self._differs(image, difference, drop)) from difference
        except (verifying.Differs, errors.CacheCorrupt) as damage:
            if isinstance(damage, verifying.OtherDigest) and digest not in ("", known):
                raise errors.UserError(damage.what) from damage
            if is_last_copy(image) or image.record.pinned or image.retired:
                logger.critical("%s: image=%s; kept", damage, record.export)
            else:
                logger.critical("%s: image=%s; dropped, to be fetched again", damage, record.export)
                await self._filesystem.replace(
                    image,
                    None,
                    lambda record: record.successor(time.time_ns(), digest=lasting_digest(record)),
                )
            raise
        finally:
            if source is not None:
                source.drop_connection()

    async def _differs(
        self, image: Image, difference: verifying.DiffersFromRepository, drop: bool
    ) -> str:
        """Do what follows from a difference between cache and repository, and return a message."""
        record = image.record
        if record.state is State.PARTIAL:  # or it would become a mixture of both
            changed = errors.ContentChanged(record.export, difference.start, difference.end)
            await image.fail(Cause.CONTENT_CHANGED, changed)
        logger.warning("%s: image=%s", difference, record.export)
        if not drop:
            return f"{difference}; it is kept, and --drop would drop it"
        check = partial(refuse, image, await self.backing_files(), AGAINST_DROP)
        try:
            check()
            await self._filesystem.replace(
                image, None, lambda record: record.successor(time.time_ns()), check
            )
        except Refused as refusal:
            return f"{difference}; it is kept, because {refusal}"
        return f"{difference}; dropped, to be fetched again"
