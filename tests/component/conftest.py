"""Fixtures of the component tests: single modules of lazyfs with real servers, sockets and files
around them."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from peers import Peers


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(tmp_path, stack)


@pytest.fixture
def count_open_files() -> Callable[[], int]:
    """Return how many files this process has open.

    The first call first collects garbage, so that files which earlier tests left open are closed
    before the first count, not between two counts.
    """
    gc.collect()
    return lambda: len(os.listdir("/proc/self/fd"))
