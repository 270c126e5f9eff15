"""Fixtures of the component tests: single modules of lazyfs with real servers, sockets and files
around them."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import servers
import trio
from peers import Peers
from scripted_server import ScriptedServer

from lazyfs.repository.nbd_repository import NbdRepository


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


@pytest.fixture
def repository_of(nursery: trio.Nursery) -> Any:
    def make(
        server: servers.Server | ScriptedServer | str, io_timeout_s: float = 30.0
    ) -> NbdRepository:
        return NbdRepository(
            server if isinstance(server, str) else server.uri, nursery, io_timeout_s
        )

    return make
