"""Builds and wires the engine of a mount and its control.

The daemon passes real parts, and tests pass fakes.

Filesystem --on_fillable--> Population.wake, Jobs.announce        something may be filled
           --on_state_changed--> IMAGE_STATE_CHANGE, Jobs.announce
Population --on_turn--> Jobs.announce
           --shortage--> Room.want, Room.message                  before each turn
Room       --on_change--> as on_fillable             there is room again, or none any more
Budget     --on_low--> Room                          set by Room itself
Jobs       --on_status--> JOB_STATUS_CHANGE
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from lazyfs.control.commands import PAUSED, Commands
from lazyfs.control.jobs import Jobs
from lazyfs.core.eviction import Limits
from lazyfs.core.image_record import ImageRecord
from lazyfs.engine.filesystem import Filesystem, Options
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Catalog, PresentReader, Repository, Stores
from lazyfs.engine.operations import Operations
from lazyfs.engine.population import Population
from lazyfs.engine.room import Room
from lazyfs.engine.supervision import Supervisor

Emit = Callable[[str, dict[str, object]], None]
"""Sends an event to the clients of the control socket. The arguments are its name and its data."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Holds the engine of one mount, and what controls it."""

    filesystem: Filesystem
    operations: Operations
    room: Room
    population: Population
    jobs: Jobs
    commands: Commands
    supervisor: Supervisor


def build(
    *,
    mountpoint: str,
    repository: Repository,
    stores: Stores,
    catalog: Catalog,
    records: Sequence[ImageRecord],
    options: Options,
    limits: Limits,
    backing_files: Callable[[], Awaitable[frozenset[str]]],
    nursery: trio.Nursery,
    present: PresentReader,
) -> Parts:
    """Build all parts. They do nothing before they are wired and `start` is called.

    Args:
        mountpoint: where the images are shown.
        repository: where the exports are.
        stores: makes the cache files.
        catalog: stores the records.
        records: what `catalog` holds.
        options: what the user chose about images.
        limits: what the user allows the cache.
        backing_files: returns the paths of images that overlays need. Raises UserError if they
            cannot be found out.
        nursery: runs fetches and the tasks of images. It ends after the images are closed.
        present: reads what is present.
    """
    filesystem = Filesystem(repository, stores, catalog, records, options, nursery, present)
    operations = Operations(filesystem, repository, options, backing_files)
    room = Room(filesystem, stores, limits, backing_files)
    population = Population(repository, stores, filesystem.active_images)
    jobs = Jobs(filesystem.active_images, population)
    if catalog.setting(PAUSED):
        population.hold()
    commands = Commands(mountpoint, filesystem, operations, population, jobs)
    return Parts(filesystem, operations, room, population, jobs, commands, Supervisor())


def wire(parts: Parts, emit: Emit, on_use: Callable[[], None] = lambda: None) -> None:
    """Connect the parts. Everything that one part calls when something happens is set here.

    Args:
        parts: what `build` returned.
        emit: sends events to clients.
        on_use: called when an image may have been used.
    """

    def fillable() -> None:
        parts.population.wake()
        parts.jobs.announce()
        on_use()

    def state_changed(image: Image) -> None:
        record = image.record
        emit(
            "IMAGE_STATE_CHANGE",
            {"path": record.path, "state": record.state.value, "error": record.error},
        )
        parts.jobs.announce()

    def shortage() -> str:
        parts.room.want()
        return parts.room.message

    parts.filesystem.on_fillable = fillable
    parts.filesystem.on_state_changed = state_changed
    parts.population.on_turn = parts.jobs.announce
    parts.population.shortage = shortage
    parts.room.on_change = fillable
    parts.jobs.on_status = lambda job, status: emit(
        "JOB_STATUS_CHANGE", {"id": job, "status": status}
    )


async def start(parts: Parts, nursery: trio.Nursery, *, populate: bool = True) -> None:
    """Start the background tasks in `nursery`.

    The nursery must end before the images are closed, because jobs read them.
    """
    await nursery.start(parts.jobs.run)
    nursery.start_soon(parts.supervisor.keep_running, "making room", parts.room.run)
    if populate:
        nursery.start_soon(parts.supervisor.keep_running, "population", parts.population.run)
