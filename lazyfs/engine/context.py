"""Defines what the images of a mount have in common: I/O, limits and listeners."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from lazyfs import errors
from lazyfs.engine.budget import Budget
from lazyfs.engine.fetch.under_way import UnderWay
from lazyfs.engine.fetch.waiting_reads import WaitingReads
from lazyfs.engine.fetch.write_queue import WriteQueue
from lazyfs.engine.interfaces import Catalog, PresentReader, Repository, Stores
from lazyfs.engine.map_memory import MapMemory
from lazyfs.engine.pace import SharedPace
from lazyfs.engine.threads import Threads
from lazyfs.engine.totals import Totals
from lazyfs.engine.use_clock import UseClock

ImageT = TypeVar("ImageT")


@dataclass(frozen=True, slots=True)
class Context(Generic[ImageT]):
    """Holds what all images of a mount share."""

    repository: Repository
    stores: Stores
    catalog: Catalog
    nursery: trio.Nursery
    pace: SharedPace
    totals: Totals
    use_clock: UseClock
    budget: Budget
    writes: WriteQueue
    under_way: UnderWay
    waiting: WaitingReads
    map_memory: MapMemory
    present: PresentReader
    populate: bool
    """Whether the first open of an image starts its population."""
    io_timeout_s: float
    threads: Threads
    on_fillable: Callable[[], None]
    """Called when population may have something new to do."""
    on_export_changed: Callable[[ImageT, errors.ExportChanged], None]
    on_attributes_changed: Callable[[ImageT], None]
    """Called when what the kernel caches about the file is out of date."""
    on_state_changed: Callable[[ImageT], None]
    """Called when the state of an image has changed. Once an image is whole, its name leads to its
    second inode number."""
    on_opened: Callable[[ImageT], None]
    """Called when a file of an image is about to be opened."""
    on_unkept: Callable[[ImageT], None]
    """Called when an image is closed for which there was no room, and that population wants."""
    on_unused: Callable[[ImageT], None]
    """Called when an image has no name and nobody has it open. It may be called more than once."""
