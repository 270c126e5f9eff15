"""Puts this folder on sys.path (by being here), so that every test can import `fakes` and
`servers`, and marks the tests of whole folders with what they need."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS = {
    "mount": ("fuse",),
    "soak": ("slow",),
    "faults": ("fuse", "slow"),
    "vm": ("fuse", "vm", "slow"),
}
"""The marks of all tests in a folder. A single test elsewhere has them as decorators."""


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in NEEDS.get(item.path.relative_to(HERE).parts[0], ()):
            item.add_marker(mark)
        if "vm" in item.keywords:
            # One guest at a time: each takes a whole core, and the image is built once a process.
            item.add_marker(pytest.mark.xdist_group("vm"))
