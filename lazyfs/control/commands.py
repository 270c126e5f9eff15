"""Implements the commands of the control socket by calling the engine.

`core/control_schema.py` says what each command does.
"""

import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

import trio

from lazyfs import errors
from lazyfs.control.jobs import Jobs, JobStatistics, Task
from lazyfs.core import digest
from lazyfs.core.lifecycle import State
from lazyfs.core.qmp_wire import CommandError, Encoded, array, whole_array
from lazyfs.engine.filesystem import Filesystem
from lazyfs.engine.image.image import Image
from lazyfs.engine.image.image_statistics import ImageStatistics
from lazyfs.engine.operations import AGAINST_EVICT, Operations, refuse
from lazyfs.engine.population import Population
from lazyfs.engine.slices import slices

Arguments = dict[str, Any]
T = TypeVar("T")

ROWS_AT_ONCE = 500
"""How many images are described without letting other tasks run: 5 ms, 2 of them for JSON."""

_FIELDS = tuple(field.name for field in fields(ImageStatistics))

PAUSED = "paused"
"""The setting of the catalog that says that population is held. It is "yes" then."""
Handler = Callable[[Arguments], Awaitable[object]]


async def _rows(items: Sequence[T], row: Callable[[T], dict[str, object]]) -> Encoded:
    """Return a row about each item, while readers come between."""
    parts = []
    for some in slices(items, ROWS_AT_ONCE):
        parts.append(array(map(row, some)))
        await trio.lowlevel.checkpoint()
    return whole_array(parts)


class Commands:
    """Implements the commands that concern images and jobs.

    The schema has checked the arguments already.
    """

    def __init__(
        self,
        mountpoint: str,
        filesystem: Filesystem,
        operations: Operations,
        population: Population,
        jobs: Jobs,
    ) -> None:
        self._mountpoint = mountpoint
        self._filesystem = filesystem
        self._operations = operations
        self._population = population
        self._jobs = jobs
        self.handlers: dict[str, Handler] = {
            "query-images": self._query_images,
            "query-jobs": self._query_jobs,
            "query-map": self._query_map,
            "population-pause": self._population_pause,
            "population-resume": self._population_resume,
            "job-pause": self._job_pause,
            "job-resume": self._job_resume,
            "job-cancel": self._job_cancel,
            "job-dismiss": self._job_dismiss,
            "prefetch": self._prefetch,
            "set-rate": self._set_rate,
            "evict": self._evict,
            "pin": self._pin,
            "unpin": self._unpin,
            "forget": self._forget,
            "verify": self._verify,
        }

    # -- which images

    def _images(
        self, path: str, unless_named: Callable[[Image], bool] = lambda image: True
    ) -> list[Image]:
        """Return the image at `path`, or the images in the folder there for which `unless_named`
        holds.

        An image that `path` names itself is returned in any case.
        """
        node = self._filesystem.names.node_at(path)
        if node is None:
            raise CommandError(f"no image at {path!r}")
        if isinstance(node, Image):
            return [node]
        below = [
            image for image in self._filesystem.names.images_below(node) if unless_named(image)
        ]
        return sorted(below, key=lambda image: image.record.path)

    def _image(self, path: str) -> Image:
        node = self._filesystem.names.node_at(path)
        if not isinstance(node, Image):
            raise CommandError(f"no image at {path!r}")
        return node

    async def _each(
        self, images: Iterable[Image], work: Callable[[Image], Awaitable[object]]
    ) -> dict[str, Any]:
        """Do something with each image, even if it fails for some. Then raise the first failure.

        Raises:
            CommandError: it has failed for at least one image.
        """
        done, failures = 0, []
        for image in images:
            try:
                await work(image)
                done += 1
            except (errors.LazyfsError, OSError) as error:
                failures.append(errors.said(error))
        if failures:
            more = f" (and {len(failures) - 1} more; {done} done)" if len(failures) > 1 else ""
            raise CommandError(failures[0] + more)
        return {"images": done}

    # -- queries

    async def _query_images(self, arguments: Arguments) -> object:
        path = arguments.get("path", "")
        images = self._images(path) if path else self._filesystem.shown_images()

        def row(image: Image) -> dict[str, object]:
            one = image.statistics()
            values = {name: getattr(one, name) for name in _FIELDS}  # asdict takes ten times longer
            return {**values, "path": os.path.join(self._mountpoint, one.path)}

        return await _rows(images, row)

    async def _query_jobs(self, _arguments: Arguments) -> object:
        def row(job: JobStatistics) -> dict[str, object]:
            return {
                "id": job.id,
                "type": job.type,
                "status": job.status,
                "current-progress": job.current_progress,
                "total-progress": job.total_progress,
                **({"error": job.error} if job.error else {}),
                **({"waits_for": job.waits_for} if job.waits_for else {}),
            }

        return await _rows(self._jobs.statistics(), row)

    async def _query_map(self, arguments: Arguments) -> object:
        return [
            asdict(entry) for entry in await self._operations.map(self._image(arguments["path"]))
        ]

    # -- jobs

    async def _population_pause(self, _arguments: Arguments) -> object:
        await self._filesystem.set_setting(PAUSED, "yes")
        self._population.hold()
        self._jobs.announce()
        return {}

    async def _population_resume(self, _arguments: Arguments) -> object:
        await self._filesystem.set_setting(PAUSED, "")
        self._population.release()
        self._jobs.announce()
        return {}

    async def _job_pause(self, arguments: Arguments) -> object:
        self._jobs.pause(arguments["id"])
        return {}

    async def _job_resume(self, arguments: Arguments) -> object:
        self._jobs.resume(arguments["id"])
        self._population.wake()
        return {}

    async def _job_cancel(self, arguments: Arguments) -> object:
        self._jobs.cancel(arguments["id"])
        return {}

    async def _job_dismiss(self, arguments: Arguments) -> object:
        self._jobs.dismiss(arguments["id"])
        return {}

    # -- images

    async def _prefetch(self, arguments: Arguments) -> object:
        paths, images, image_format = [], self._images(arguments["path"]), arguments.get("format")
        for image in images:  # all are checked before the name of any is changed
            self._operations.check_format(image, image_format)

        async def prefetch(image: Image) -> None:
            paths.append((await self._operations.prefetch(image, image_format)).record.path)

        return {**await self._each(images, prefetch), "paths": paths}

    async def _set_rate(self, arguments: Arguments) -> object:
        rate, images = arguments["rate"] or None, self._images(arguments["path"])
        if arguments["rate"] < 0:
            raise CommandError("Parameter 'rate' expects bytes per second, 0 for no limit")
        if arguments["path"] == "":
            self._filesystem.set_rate(rate)
        else:
            for image in images:
                image.populating.pace.set_rate(rate)
        return {"images": len(images)}

    async def _evict(self, arguments: Arguments) -> object:
        backing = await self._operations.backing_files()
        left = freed = open_bytes = 0

        def may_go(image: Image) -> bool:
            nonlocal left
            goes = self._operations.may_go(image, backing)
            left += not goes and image.record.state is not State.REMOTE
            return goes

        images = self._images(arguments["path"], may_go)

        async def evict(image: Image) -> None:
            nonlocal freed, open_bytes
            amount, is_open = image.cached_bytes(), image.open_count > 0
            if arguments.get("dry-run"):
                refuse(image, backing, AGAINST_EVICT)
            else:
                await self._operations.evict(image, backing)
            freed += amount
            open_bytes += amount if is_open else 0

        done = await self._each(images, evict)
        return {**done, "bytes": freed, "open_bytes": open_bytes, "left": left}

    async def _pin(self, arguments: Arguments) -> object:
        return await self._each(
            self._images(arguments["path"]), lambda image: self._operations.pin(image, True)
        )

    async def _unpin(self, arguments: Arguments) -> object:
        return await self._each(
            self._images(arguments["path"]), lambda image: self._operations.pin(image, False)
        )

    async def _forget(self, arguments: Arguments) -> object:
        return await self._each(
            self._images(arguments["path"], lambda image: image.gone), self._operations.forget
        )

    async def _verify(self, arguments: Arguments) -> object:
        image = self._image(arguments["path"])
        try:
            known = digest.parse(arguments["digest"]) if "digest" in arguments else ""
        except ValueError as error:
            raise CommandError(f"Parameter 'digest': {error}") from error
        if known and image.record.state is not State.WHOLE:
            await self._operations.set_digest(image, known)
            if not arguments.get("against-repository"):
                return {}
            known = ""
        job = f"verify:{image.record.path}"
        total = image.statistics().present_bytes + image.statistics().zero_bytes

        async def work(task: Task) -> None:
            await self._operations.verify(
                image,
                arguments.get("against-repository", False),
                task.advance,
                known,
                arguments.get("drop", False),
            )

        self._jobs.start(job, "verify", total, work)
        return {"id": job}
