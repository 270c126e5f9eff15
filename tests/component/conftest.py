"""Fixtures of the component tests: single modules of lazyfs with real servers, sockets and files around them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from peers import Peers


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(tmp_path, stack)
