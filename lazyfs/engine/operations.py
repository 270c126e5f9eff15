"""What an operator asks for: images prefetched, pinned, evicted, forgotten, verified; and what
speaks against it.

The control socket's commands and unlink(2) on the mount come here, so that they refuse the same
things. Room, which evicts without being asked, has the same obstacles from `core/eviction.py`.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from errno import ESTALE

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

PREFETCH_ANSWER_S = 5.0
"""How long `prefetch` waits for the repository: less than a client of the control socket does."""

AGAINST_EVICT = (Obstacle.GONE, Obstacle.PINNED, Obstacle.BACKING)
"""What keeps an image from an operator's eviction. That it is open does not: who has it open keeps
reading it."""

AGAINST_UNLINK = (Obstacle.PINNED, Obstacle.BACKING)
"""What keeps an image from unlink(2): one that is gone from the repository may go, as it would on
any file system."""

AGAINST_FORGET = (Obstacle.PINNED, Obstacle.OPEN)

_REFUSALS = {
    Obstacle.GONE: "{path} is gone from the repository; lazyfs forget drops it",
    Obstacle.PINNED: "{path} is pinned; lazyfs unpin it first",
    Obstacle.BACKING: "{path} is the backing file of an overlay",
    Obstacle.OPEN: "{path} is open",
}


class Refused(errors.UserError):
    """An image may not go."""

    def __init__(self, path: str, obstacle: Obstacle) -> None:
        super().__init__(path, obstacle)
        self.path = path
        self.obstacle = obstacle

    def __str__(self) -> str:
        return _REFUSALS[self.obstacle].format(path=self.path)


def candidate(image: Image, backing: Collection[str], spared: bool = False) -> Candidate:
    """Return an image as eviction sees it. `backing`: the paths of images that overlays need."""
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


class Operations:
    """The operations of one mount. Trio thread only."""

    def __init__(
        self,
        filesystem: Filesystem,
        repository: Repository,
        options: Options,
        backing_files: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        """`backing_files`: returns the paths of images that overlays need. Raises UserError if it
        cannot tell."""
        self._filesystem = filesystem
        self._repository = repository
        self._options = options
        self.backing_files = backing_files

    # -- filling

    def check_format(self, image: Image, image_format: str | None) -> None:
        """Raise UserError if `prefetch` would refuse that format: something is cached in
        another."""
        if image_format not in (None, image.record.format) and not has_nothing(image):
            raise errors.UserError(
                f"{image.record.path} is cached as {image.record.format}; evict it first"
            )

    async def prefetch(self, image: Image, image_format: str | None) -> Image:
        """Populate an image without a reader; return it, or the one that shows it in another
        format.

        Raises:
            UserError: something is cached in another format, the image has failed, or is gone from
                the repository.
            LazyfsError, OSError: it cannot be begun now.
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
        """Note that somebody used `image` then, without opening it. A time in the future counts as
        now."""
        at_ns = max(0, min(used_ns, time.time_ns()))
        if image.retired:  # by an open file of it: nobody asks for its last use any more
            image.note_use(at_ns)
        else:
            await self._annotate(image, lambda record: record.used(at_ns))

    async def pin(self, image: Image, pinned: bool) -> None:
        """Keep an image from being evicted, or not any more."""
        await self._annotate(image, lambda record: record.with_pin(pinned))

    async def set_digest(self, image: Image, digest: str) -> None:
        """Have an image that is not whole compared with `digest` when it is complete."""
        image = await self._annotate(image, lambda record: record.with_digest(digest))
        if image.record.cause is Cause.WRONG_DIGEST:
            await image.recover()  # it will be compared with this one

    async def _annotate(self, image: Image, change: Callable[[ImageRecord], ImageRecord]) -> Image:
        """Change the record of the image that has the name now; it may be another than when the
        caller looked."""
        while True:
            try:
                await image.annotate(change)
            except OSError as error:
                now = self._filesystem.names.image_of(image.record.export)
                if error.errno != ESTALE or now is None or now is image:
                    raise
                image = now
            else:
                return image

    # -- dropping

    async def evict(self, image: Image, backing: Collection[str] | None = None) -> None:
        """Drop what is cached; who has the image open keeps it until closed.

        Args:
            backing: what overlays need, if the caller knows.

        Raises:
            Refused: something speaks against it.
            UserError: it cannot be told what overlays need.
            LazyfsError, OSError: it could not be dropped.
        """
        if image.record.state is State.REMOTE and not image.gone:
            return
        backing = await self.backing_files() if backing is None else backing
        self._refuse(image, backing, AGAINST_EVICT)
        await self._filesystem.evict(image)

    async def unlink(self, image: Image) -> None:
        """Evict as unlink(2) on the mount does. Raises as `evict`."""
        self._refuse(image, await self.backing_files(), AGAINST_UNLINK)
        await self._filesystem.evict(image)

    def may_go(self, image: Image, backing: Collection[str]) -> bool:
        """Whether `evict` would drop anything."""
        found = eviction.obstacle(candidate(image, backing), AGAINST_EVICT)
        return image.record.state is not State.REMOTE and found is None

    async def forget(self, image: Image) -> None:
        """Drop an image that is gone from the repository.

        Raises:
            Refused, UserError: it is there, pinned or open.
            LazyfsError, OSError: it could not be dropped.
        """
        if not image.gone:
            raise errors.UserError(
                f"{image.record.path} is in the repository; evict drops what is cached of it"
            )
        self._refuse(image, (), AGAINST_FORGET)
        await self._filesystem.evict(image)

    def _refuse(self, image: Image, backing: Collection[str], among: Collection[Obstacle]) -> None:
        found = eviction.obstacle(candidate(image, backing), among)
        if found is not None:
            raise Refused(image.record.path, found)

    # -- looking

    async def map(self, image: Image) -> list[image_map.MapEntry]:
        """Return which ranges of an image are here; as `image_map.entries`."""
        return await image_map.entries(image, self._filesystem.threads.jobs)

    async def verify(
        self,
        image: Image,
        against_repository: bool,
        progress: Callable[[int], None],
        digest: str = "",
    ) -> None:
        """Read back what is cached; drop it if it is damaged, so that it is fetched again when next
        needed.

        What cannot be fetched again, or is pinned, is kept.

        Args:
            digest: of a whole image, instead of the one that is known, and known from then on if it
                is right. If it is not, the image may be good, and is kept.

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
