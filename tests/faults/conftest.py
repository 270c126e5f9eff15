"""Fixtures of the fault tests: a mount whose cache lies on a disk that fails or loses its power."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from disk_rig import DiskRig
from lab import Lab, lab_in


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with lab_in(tmp_path) as made:
        yield made


@pytest.fixture
def rig(tmp_path: Path, lab: Lab) -> Iterator[DiskRig]:
    """A disk. It goes after the lab has ended its daemon."""
    with ExitStack() as stack:
        made = stack.enter_context(DiskRig(tmp_path / "disk"))
        stack.callback(lab.close)
        yield made
