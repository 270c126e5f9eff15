"""Learns the sizes of images from the repository.

Images that are listed are asked about in batches. One image is asked about again before its cache
is begun.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from lazyfs import errors
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Catalog, Export, Repository
from lazyfs.engine.supervision import log_failure

logger = logging.getLogger(__name__)

DESCRIBE_BATCH = 128
"""How many exports are asked about at once. This takes 10 ms at 70 us per question, or 3 s over a
link of 20 ms, and ends in one catalog transaction."""

NO_SIZES_S = 5.0
"""After a question about sizes had no answer, further questions fail at once for this time. It is
long enough for a listing of thousands, and it is how late a user may notice that the repository
is back."""


class Sizes:
    """Learns the sizes of the images of one mount. Trio thread only."""

    def __init__(
        self,
        repository: Repository,
        catalog: Catalog,
        nursery: trio.Nursery,
        io_timeout_s: float,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._repository = repository
        self._catalog = catalog
        self._nursery = nursery
        self._io_timeout_s = io_timeout_s
        self._limiter = limiter
        self._describing = trio.Lock()
        self._no_sizes_until = 0.0
        self._silent_until: dict[int, float] = {}
        """Until when further questions about an image fail at once, because the server gave no
        answer about it, by inode."""

    async def learn(self, images: Sequence[Image]) -> None:
        """Learn the sizes that are not known yet, in batches.

        What the server will not describe stays unknown.

        Raises:
            TimedOut: the repository does not answer in the time allowed.
        """
        unknown = [image for image in images if image.record.size is None]
        self._check_silent(unknown)
        for start in range(0, len(unknown), DESCRIBE_BATCH):
            await self._in_time(
                self._describe_unknown, unknown[start : start + DESCRIBE_BATCH], self._io_timeout_s
            )

    def learn_soon(self, images: Sequence[Image]) -> None:
        """Run `learn` in the background, after a listing has shown names without sizes."""
        if not self._describing.locked():
            self._nursery.start_soon(
                log_failure, "asking for sizes", partial(self._learn_quietly, images)
            )

    async def learn_again(
        self, image: Image, limit_s: float = math.inf, patient: bool = False
    ) -> None:
        """Ask for the size of an image, although it may be known.

        Args:
            image: the image.
            limit_s: how long to wait, if that is less than the time allowed for reads.
            patient: ask even if the repository did not answer a moment ago.

        Raises:
            TimedOut: the repository does not answer in that time.
        """
        call = partial(self._describe, patient=patient)
        await self._in_time(call, [image], min(limit_s, self._io_timeout_s), patient)

    async def _learn_quietly(self, images: Sequence[Image]) -> None:
        try:
            await self.learn(images)
        except (errors.LazyfsError, OSError) as error:
            logger.info("sizes stay unknown: %s", error)

    async def _describe_unknown(self, images: Sequence[Image]) -> None:
        async with self._describing:
            # Looked at again under the lock, because the task before us may have learned them.
            unknown = [image for image in images if image.record.size is None]
            self._check_silent(unknown)
            await self._describe(unknown)

    def _check_silent(self, images: Sequence[Image]) -> None:
        """Raise TimedOut if the one image that is asked about gave no answer a moment ago."""
        if len(images) == 1 and trio.current_time() < self._silent_until.get(images[0].inode, 0.0):
            what = f"asking for the size of {images[0].record.export}"
            raise errors.TimedOut(what, NO_SIZES_S, "the repository does not answer about it")

    async def _in_time(
        self,
        call: Callable[[Sequence[Image]], Awaitable[None]],
        images: Sequence[Image],
        limit_s: float,
        patient: bool = False,
    ) -> None:
        too_late = errors.TimedOut(
            "asking for the size of an image", limit_s, "the repository does not answer"
        )
        if (
            not patient
            and trio.current_time() < self._no_sizes_until
            and not self._repository.connected
        ):
            raise too_late  # so `ls -l` of thousands of images waits once, not once for each
        try:
            with trio.fail_after(limit_s):
                await call(images)
        except trio.TooSlowError:
            self._no_sizes_until = trio.current_time() + NO_SIZES_S
            raise too_late from None
        self._no_sizes_until = 0.0

    async def _describe(self, images: Sequence[Image], patient: bool = False) -> None:
        if not images:
            return
        found = await self._ask([image.record.export for image in images], patient)
        changed = []
        for image in images:
            export = found[image.record.export]
            if isinstance(export, Export):
                await image.describe(export.size, export.identity)
                changed.append((image.inode, export.size, export.identity))
            else:
                logger.warning("no size: image=%s reason=%s", image.record.export, export)
                now = trio.current_time()
                recent = {one: until for one, until in self._silent_until.items() if now < until}
                self._silent_until = {**recent, image.inode: now + NO_SIZES_S}
        try:
            await trio.to_thread.run_sync(self._catalog.describe, changed, limiter=self._limiter)
        except (errors.LazyfsError, OSError) as error:
            logger.warning("the catalog could not be written: %s", error)

    async def _ask(self, names: Sequence[str], patient: bool) -> dict[str, Export | str]:
        """Ask the repository to describe exports. Reconnects for as long as the caller allows.

        With `patient` this is also done when the repository is there, but describes none of them.
        """
        while True:
            try:
                return await self._repository.describe(names)
            except errors.ExportRefused as error:
                if not patient:
                    return dict.fromkeys(names, error.reason)
                await trio.sleep(0.5)
            except errors.ConnectionLost:
                await trio.sleep(0.5)
