"""What every Catalog promises, in memory and in SQLite."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import MemoryCatalog

from lazyfs.catalog import SqliteCatalog
from lazyfs.core.lifecycle import State
from lazyfs.interfaces import ImageRecord

AnyCatalog = MemoryCatalog | SqliteCatalog

BLANK = ImageRecord(0, "debian-12", "debian-12", None, "", "raw", State.REMOTE, "", 65536, 1_600_000_000_123_456_789)


class Keeper:
    """A catalog that can be closed and opened again."""

    def __init__(self, reopen: Callable[[], AnyCatalog]) -> None:
        self._reopen = reopen
        self.now = reopen()

    def reopen(self) -> AnyCatalog:
        self.now.close()
        self.now = self._reopen()
        return self.now


@pytest.fixture(params=["memory", "sqlite"])
def keeper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Keeper]:
    if request.param == "memory":
        one = MemoryCatalog()
        yield Keeper(lambda: one)
        return
    made = Keeper(lambda: SqliteCatalog(str(tmp_path / "catalog.sqlite")))
    yield made
    made.now.close()


def test_a_new_catalog_is_empty(keeper: Keeper) -> None:
    assert keeper.now.load() == []
    assert keeper.reopen().load() == []


def test_added_records_come_back_with_inodes_and_nothing_else_changed(keeper: Keeper) -> None:
    records = [replace(BLANK, export=f"disk {i}", path=f"disk {i}", inode=99) for i in range(5)]
    added = keeper.now.add(records)
    assert [replace(record, inode=99) for record in added] == records
    inodes = [record.inode for record in added]
    assert inodes == sorted(set(inodes))
    assert min(inodes) >= 2  # 1 is the root
    assert keeper.now.load() == added
    assert keeper.reopen().load() == added


def test_every_field_comes_back(keeper: Keeper) -> None:
    record = ImageRecord(
        0, "tëam/\0\n'\"%", "t%00", 2**62, "id\U0001f600", "raw", State.FAILED, "why; --", 4096, 2**62,
        present_bytes=2**61, demand_bytes=1, populated_bytes=2, requests=3,
    )  # fmt: skip
    (added,) = keeper.now.add([record])
    assert replace(added, inode=0) == record
    assert keeper.reopen().load() == [added]


@pytest.mark.parametrize("state", State)
def test_every_state_comes_back(keeper: Keeper, state: State) -> None:
    (added,) = keeper.now.add([BLANK])
    keeper.now.update([replace(added, state=state)])
    (found,) = keeper.reopen().load()
    assert found.state is state


def test_an_update_changes_its_own_record_only(keeper: Keeper) -> None:
    one, two, three = keeper.now.add([BLANK, replace(BLANK, export="b", path="b"), replace(BLANK, export="c")])
    changed = replace(two, size=0, error="full", requests=7, path="elsewhere")
    keeper.now.update([changed])
    assert keeper.reopen().load() == [one, changed, three]


def test_describing_changes_size_and_identity_of_remote_images_only(keeper: Keeper) -> None:
    one, two, three = keeper.now.add([BLANK, replace(BLANK, export="b", path="b"), replace(BLANK, export="c")])
    begun = replace(two, state=State.PARTIAL, size=7)
    keeper.now.update([begun])
    gone = three.inode
    keeper.now.remove([gone])
    keeper.now.describe([(one.inode, 2**40, "v2"), (begun.inode, 8, "v2"), (gone, 9, "v2")])
    assert keeper.reopen().load() == [replace(one, size=2**40, identity="v2"), begun]
    keeper.now.describe([])


def test_an_update_of_a_record_that_is_gone_brings_nothing_back(keeper: Keeper) -> None:
    one, two = keeper.now.add([BLANK, replace(BLANK, export="b", path="b")])
    keeper.now.remove([one.inode])
    keeper.now.update([replace(one, size=5), replace(two, size=5)])
    assert keeper.now.load() == [replace(two, size=5)]


def test_an_inode_is_never_given_twice(keeper: Keeper) -> None:
    given = []
    for _ in range(3):
        added = keeper.now.add([BLANK, BLANK])
        given += [record.inode for record in added]
        keeper.now.remove([record.inode for record in added])
        keeper.reopen()
    assert len(set(given)) == 6
    assert keeper.now.load() == []


def test_two_records_of_one_export(keeper: Keeper) -> None:
    """A replaced image and the one in its place."""
    old, new = keeper.now.add([BLANK])[0], keeper.now.add([BLANK])[0]
    keeper.now.remove([old.inode])
    assert keeper.now.load() == [new]


def test_nothing_to_do_is_nothing(keeper: Keeper) -> None:
    (added,) = keeper.now.add([BLANK])
    assert keeper.now.add([]) == []
    keeper.now.update([])
    keeper.now.remove([])
    keeper.now.remove([12345])
    assert keeper.now.load() == [added]


def test_calls_from_several_threads(keeper: Keeper) -> None:
    added = keeper.now.add([replace(BLANK, export=str(i), path=str(i)) for i in range(4)])

    def work(record: ImageRecord) -> None:
        for i in range(20):
            keeper.now.update([replace(record, requests=i)])

    threads = [threading.Thread(target=work, args=(record,)) for record in added]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.requests for record in keeper.reopen().load()] == [19] * 4
