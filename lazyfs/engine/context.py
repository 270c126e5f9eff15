"""What the images of a mount have in common: their I/O, limits and listeners."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from lazyfs import errors
from lazyfs.engine.budget import Budget
from lazyfs.engine.fetch.write_queue import WriteQueue
from lazyfs.engine.interfaces import Catalog, Repository, Stores
from lazyfs.engine.pace import SharedPace
from lazyfs.engine.threads import Threads
from lazyfs.engine.totals import Totals

ImageT = TypeVar("ImageT")


@dataclass(frozen=True, slots=True)
class Context(Generic[ImageT]):
    """What every image of a mount shares."""

    repository: Repository
    stores: Stores
    catalog: Catalog
    nursery: trio.Nursery
    pace: SharedPace
    totals: Totals
    budget: Budget
    writes: WriteQueue
    populate: bool
    """Whether images are populated because they were opened."""
    io_timeout_s: float
    threads: Threads
    on_fillable: Callable[[], None]
    """Population has something to look at."""
    on_export_changed: Callable[[ImageT, errors.ExportChanged], None]
    on_attributes_changed: Callable[[ImageT], None]
    """What the kernel caches about the file is out of date."""
    on_state_changed: Callable[[ImageT], None]
    """Once an image is whole, its name leads to its second inode number."""
    on_unused: Callable[[ImageT], None]
    """The image has neither a name nor anybody who has it open. May be called more than once."""
