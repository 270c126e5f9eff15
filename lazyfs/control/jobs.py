"""Shows background work to clients in the form of QEMU's jobs (qapi/job.json).

A populate job is an image that is being filled. It exists while the image is partial and population
is to fill it. Other work is started here and runs in a task. It stays, concluded, until it is
dismissed.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from lazyfs import errors
from lazyfs.core.lifecycle import State
from lazyfs.engine.image.image import Image
from lazyfs.engine.population import Population

logger = logging.getLogger(__name__)

RUNNING, PAUSED, STANDBY, CONCLUDED = "running", "paused", "standby", "concluded"
GONE = "null"
"""What QEMU calls the status of a job that does not exist any more."""


@dataclass(eq=False, slots=True)
class Task:
    """Holds work that a client has asked for. The work adds to `current` as it goes on."""

    id: str
    type: str
    total: int
    current: int = 0
    status: str = RUNNING
    error: str = ""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def advance(self, amount: int) -> None:
        """Note that `amount` more is done."""
        self.current += amount


@dataclass(frozen=True, slots=True)
class JobStatistics:
    """Describes one job, as a row of `query-jobs`."""

    id: str
    type: str
    status: str
    current_progress: int
    total_progress: int
    error: str = ""
    waits_for: str = ""


class Jobs:
    """Knows all jobs of one mount. Trio thread only."""

    def __init__(self, active: Callable[[], Iterable[Image]], population: Population) -> None:
        """Begin without any task.

        Args:
            active: returns the images that population may look at.
            population: fills them.
        """
        self.on_status: Callable[[str, str], None] = lambda job, status: None
        """Called when a job has another status, or is `GONE`. Whoever tells clients sets it."""
        self._nursery: trio.Nursery | None = None
        self._active = active
        self._population = population
        self._tasks: dict[str, Task] = {}
        self._told: dict[str, str] = {}

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Run what `start` begins, until cancelled.

        Cancellation: every job has ended when this ends.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def statistics(self) -> list[JobStatistics]:
        """Return all jobs, ordered by id."""
        found = [
            self._populating(image, status)
            for image in self._active()
            if (status := self._status(image))
        ]
        for task in self._tasks.values():
            found.append(
                JobStatistics(task.id, task.type, task.status, task.current, task.total, task.error)
            )
        return sorted(found, key=lambda job: job.id)

    def _status(self, image: Image) -> str:
        """Return the status of an image's populate job, or "" if it has none."""
        filling = image.filling
        if (
            image.record.state is not State.PARTIAL
            or filling is None
            or image.retired
            or not image.populating.wanted
        ):
            return ""
        if image.populating.paused:
            return PAUSED
        if filling.table.completed.is_set() and not image.record.error:
            return RUNNING  # it is being handed off
        return (
            RUNNING
            if image.fillable and not image.fill_trouble and not self._population.paused
            else STANDBY
        )

    def _populating(self, image: Image, status: str) -> JobStatistics:
        now = image.statistics()
        return JobStatistics(
            now.path,
            "populate",
            status,
            now.present_bytes + now.zero_bytes,
            now.size or 0,
            image.fill_trouble or self._population.paused,
            self._population.waits_for(image),
        )

    def announce(self) -> None:
        """Tell clients which jobs have another status than at the last call.

        Call it whenever the status of a job may have changed.
        """
        now = {
            image.record.path: status for image in self._active() if (status := self._status(image))
        }
        now |= {task.id: task.status for task in self._tasks.values()}
        for job in [
            *self._told.keys() - now.keys(),
            *(job for job in now if self._told.get(job) != now[job]),
        ]:
            self.on_status(job, now.get(job, GONE))
        self._told = now

    # -- what clients ask for

    def pause(self, job: str) -> None:
        """Pause a populate job.

        Raises:
            UserError: there is no such job, or it cannot be paused now.
        """
        image = self._image(job, "paused")
        if image.populating.paused:
            raise errors.UserError(f"Job '{job}' is paused already")
        image.populating.pause()
        self.announce()

    def resume(self, job: str) -> None:
        """Resume a paused job. The caller must wake population.

        Raises:
            UserError: there is no such job, or it is not paused.
        """
        image = self._image(job, "resumed")
        if not image.populating.paused:
            raise errors.UserError(f"Job '{job}' is not paused")
        image.populating.resume()
        self.announce()

    def cancel(self, job: str) -> None:
        """End a job.

        Raises:
            UserError: there is no such job, or it has concluded.
        """
        task = self._tasks.get(job)
        if task is None:
            self._image(job, "cancelled").populating.stop()
        elif task.status == CONCLUDED:
            raise errors.UserError(f"Job '{job}' has concluded; job-dismiss forgets it")
        else:
            task.scope.cancel()
        self.announce()

    def dismiss(self, job: str) -> None:
        """Forget a concluded job.

        Raises:
            UserError: there is no such job, or it has not concluded.
        """
        task = self._tasks.get(job)
        if task is None:
            self._image(job, "dismissed")
        if task is None or task.status != CONCLUDED:
            raise errors.UserError(f"Job '{job}' has not concluded")
        del self._tasks[job]
        self.announce()

    def _image(self, job: str, what: str) -> Image:
        if job in self._tasks:
            raise errors.UserError(f"Job '{job}' cannot be {what}")
        for image in self._active():
            if image.record.path == job and self._status(image):
                return image
        raise errors.UserError(f"Job '{job}' not found")

    def start(
        self, job: str, kind: str, total: int, work: Callable[[Task], Awaitable[None]]
    ) -> None:
        """Begin other work. If it fails, the failure is stored as the error of the job.

        Args:
            job: the id of the job.
            kind: its type.
            total: how much there is to do.
            work: does the work.

        Raises:
            UserError: a job with this id exists and has not concluded.
        """
        old = self._tasks.get(job)
        if old is not None and old.status != CONCLUDED:
            raise errors.UserError(f"Job '{job}' is running already")
        task = self._tasks[job] = Task(job, kind, total)
        assert self._nursery is not None
        self._nursery.start_soon(self._run, task, work)
        self.announce()

    async def _run(self, task: Task, work: Callable[[Task], Awaitable[None]]) -> None:
        with task.scope:
            try:
                await work(task)
            except (errors.LazyfsError, OSError) as error:
                task.error = errors.said(error)
            except Exception:
                logger.exception("a job failed, a bug in lazyfs: job=%s", task.id)
                task.error = "it failed, a bug in lazyfs; the log has the details"
        if task.scope.cancelled_caught:
            task.error = "cancelled"
        task.status = CONCLUDED
        self.announce()
