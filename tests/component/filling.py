"""A `FillWork` that records its claims and requires that every one is given back."""

import threading
from collections.abc import Callable, Iterable

import servers
import trio
from fakes import BookedClaim

from lazyfs.core.block_map import BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.interfaces import Export
from lazyfs.units import KiB


class Work:
    """Hands out all blocks of an export in order, and dropped blocks again after `retry`."""

    def __init__(
        self, export: Export, data: Iterable[ByteRange], block_size: int = 64 * KiB
    ) -> None:
        """`data` are the ranges that are not zeroes."""
        self.export = export
        self.file = bytearray(export.size)
        self.kept: list[BookedClaim] = []
        self.dropped: list[tuple[BookedClaim, Exception | None]] = []
        self.outstanding: list[BookedClaim] = []
        self.limits: set[int] = set()
        self.threads: set[int] = set()
        self.on_claim: Callable[[], float | None] = lambda: 0.0
        """Returns what to give instead of a claim: seconds to wait, or None if nothing is left.

        0.0 means that a claim is given.
        """
        self.on_write: Callable[[int], None] = lambda offset: None
        self.on_keep: Callable[[BookedClaim], None] = lambda claim: None
        self._blocks = BlockMap(export.size, block_size)
        self._data = list(data)
        self._next = 0
        self._lock = threading.Lock()

    # -- interfaces.FillWork

    def claim(self, limit: int) -> BookedClaim | float | None:
        self.limits.add(limit)
        self.threads.add(threading.get_ident())
        wait_s = self.on_claim()
        if wait_s is None or wait_s > 0:
            return wait_s
        with self._lock:
            run = self._blocks.next_missing(self._next, max(1, limit // self._blocks.block_size))
            if run is None:
                return None
            self._next = run.end
            self._blocks.claim(run)
            span = self._blocks.bytes_of(run)
            claim = BookedClaim(
                self, run, tuple(piece for part in self._data if (piece := part.clip(span)).length)
            )
            self.outstanding.append(claim)
            return claim

    def write(self, offset: int, data: memoryview) -> None:
        span = ByteRange(offset, offset + len(data))
        assert any(span in claim.parts for claim in self.outstanding), f"{span} was not claimed"
        self.on_write(offset)
        self.file[span.start : span.end] = data

    def keep(self, claim: BookedClaim) -> None:
        with self._lock:
            self.outstanding.remove(claim)
            self.kept.append(claim)
            self._blocks.mark_present(claim.run, sum(part.length for part in claim.parts))
        self.on_keep(claim)

    def drop(self, claim: BookedClaim, error: Exception | None) -> None:
        with self._lock:
            self.outstanding.remove(claim)
            self.dropped.append((claim, error))
            self._blocks.release(claim.run)

    # -- for tests

    def retry(self) -> None:
        """Begin again at the first missing block."""
        self._next = 0

    def check_all_kept(self) -> None:
        assert not self.outstanding
        assert self._blocks.complete
        runs = sorted(claim.run for claim in self.kept)
        assert (
            [run.first for run in runs] == [0, *(run.end for run in runs[:-1])]
            if runs
            else self.export.size == 0
        )

    def kept_runs(self) -> list[BlockRun]:
        return sorted(claim.run for claim in self.kept)


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, instead of for a fixed time."""
    with trio.fail_after(servers.DEADLINE_S):
        while not condition():
            await trio.sleep(0.005)
