"""Knows which blocks of one image are in the cache, being fetched, or missing.

It has one byte per block, not one bit. So searches run at the speed of memchr and re, and a page of
the map can be written without reading it first. With blocks of 64 KiB it takes 16 KiB for each GiB
of an image.

    0 MISSING   nobody has it, and nobody is fetching it
    1 DATA      in the cache file
    2 ZERO      known to read as zeroes; the cache file has a hole there
    3 CLAIMED   a request is under way (in memory only; saved as MISSING)

The bytes may lie in memory that another process reads (`live_in`). It takes DATA and ZERO for what
it may read from the cache file.

While the file exists, saved bytes only ever change from 0 to 1 or 2. So if a crash leaves a page
that is a mixture of two versions of itself, what it says is still true. A block with mixed content
(some extents data, some zeroes) is DATA. `mixed_zero_bytes` counts the zeroes inside such blocks,
which is only for reporting.

This is not thread-safe. The caller holds the lock (`engine/fetch/block_table.py`).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, overload

from lazyfs.core.byte_range import ByteRange

MISSING, DATA, ZERO, CLAIMED = range(4)

PAGE_BLOCKS = 4096
"""The blocks in one page of the saved map. This is one page of memory, and of most disks."""

_ABSENT = re.compile(rb"[\x00\x03]")
_MISSING_RUN = re.compile(rb"\x00+")
_RUN = re.compile(rb"\x00+|\x01+|\x02+|\x03+")
_PRESENT_RUN = re.compile(rb"\x01+|\x02+")
_BYTE = [bytes([state]) for state in (MISSING, DATA, ZERO, CLAIMED)]
_SAVED = bytes([MISSING, DATA, ZERO, MISSING])


class BlockRun(NamedTuple):
    """Represents the blocks `[first, end)`, by index."""

    first: int
    end: int


class Memory(Protocol):
    """A bytearray, or an mmap.mmap."""

    def find(self, sub: bytes, start: int = ..., end: int = ..., /) -> int:
        """Do what bytearray.find does."""
        ...

    def rfind(self, sub: bytes, /) -> int:
        """Do what bytearray.rfind does."""
        ...

    @overload
    def __getitem__(self, key: int, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> bytes | bytearray: ...
    def __setitem__(self, key: slice, value: bytes, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


class BlockMap:
    """Holds the state of every block of an image of `size` bytes."""

    def __init__(
        self, size: int, block_size: int, saved: bytes | None = None, mixed_zero_bytes: int = 0
    ) -> None:
        """Start with every block missing, or with saved pages.

        Args:
            size: bytes of the image.
            block_size: bytes of a block.
            saved: the pages that `take_dirty` gave, put together. They may come from a damaged
                disk: a byte that is not a state counts as missing.
            mixed_zero_bytes: as saved with the pages.

        Raises:
            ValueError: `saved` does not have one byte per block.
        """
        self.size = size
        self.block_size = block_size
        self.blocks = -(-size // block_size)
        if saved is None:
            self._states: Memory = bytearray(self.blocks)
        else:
            if len(saved) != self.blocks:
                raise ValueError(f"a map of {len(saved)} blocks for an image of {self.blocks}")
            self._states = bytearray(saved.translate(_SAVED + bytes(256 - len(_SAVED))))
        self._data_bytes = self._bytes_in_state(DATA)
        self._zero_bytes = self._bytes_in_state(ZERO)
        self._mixed_zero_bytes = min(mixed_zero_bytes, self._data_bytes)
        self._dirty_pages: set[int] = set()

    def live_in(self, memory: Memory) -> None:
        """Keep the bytes in `memory` from now on, which has one for each block."""
        memory[: self.blocks] = bytes(self._states[: self.blocks])
        self._states = memory

    def take_over(self, known: bytes) -> None:
        """Take as present what `known` says so of, and is missing here.

        It is the map of the same cache file as a process had it that has ended, one byte per block.
        Its pages count as changed, because it knew more than the disk.

        Raises:
            ValueError: it is for another number of blocks.
        """
        if len(known) != self.blocks:
            raise ValueError(f"a map of {len(known)} blocks for an image of {self.blocks}")
        for match in _PRESENT_RUN.finditer(known):
            state = known[match.start()]
            for run in list(self.missing_runs(BlockRun(*match.span()))):
                self._change(run, MISSING, state)
                length = self.bytes_of(run).length
                if state == DATA:
                    self._data_bytes += length
                else:
                    self._zero_bytes += length
                self._touch(run)

    # -- what is here

    @property
    def present_bytes(self) -> int:
        """Bytes of data in the cache file. Zeroes do not count."""
        return self._data_bytes - self._mixed_zero_bytes

    @property
    def zero_bytes(self) -> int:
        """Bytes that are known to read as zeroes."""
        return self._zero_bytes + self._mixed_zero_bytes

    @property
    def mixed_zero_bytes(self) -> int:
        """The part of `zero_bytes` that is in blocks which also hold data."""
        return self._mixed_zero_bytes

    @property
    def complete(self) -> bool:
        """True if every block is DATA or ZERO."""
        return self._data_bytes + self._zero_bytes == self.size

    def blocks_of(self, wanted: ByteRange) -> BlockRun:
        """Return the blocks that `wanted` touches."""
        if wanted.start >= wanted.end:
            return BlockRun(wanted.start // self.block_size, wanted.start // self.block_size)
        return BlockRun(wanted.start // self.block_size, -(-wanted.end // self.block_size))

    def blocks_inside(self, span: ByteRange) -> BlockRun:
        """Return the blocks that are entirely inside `span`.

        The last block of the image may be shorter than the others.
        """
        first = -(-span.start // self.block_size)
        end = self.blocks if span.end == self.size else span.end // self.block_size
        return BlockRun(first, max(first, end))

    def bytes_of(self, run: BlockRun) -> ByteRange:
        """Return the bytes of `run`, cut at the end of the image."""
        return ByteRange(
            min(run.first * self.block_size, self.size), min(run.end * self.block_size, self.size)
        )

    def state(self, block: int) -> int:
        """Return MISSING, DATA, ZERO or CLAIMED."""
        return self._states[block]

    def is_present(self, wanted: ByteRange) -> bool:
        """Return whether every block that `wanted` touches can be read from the cache file."""
        run = self.blocks_of(wanted)
        return _ABSENT.search(self._states, run.first, run.end) is None

    def missing_runs(self, within: BlockRun) -> Iterator[BlockRun]:
        """Yield the maximal runs of MISSING blocks inside `within`, in order."""
        for match in _MISSING_RUN.finditer(self._states, within.first, within.end):
            yield BlockRun(*match.span())

    def next_missing(self, first: int, max_blocks: int) -> BlockRun | None:
        """Return the first run of MISSING blocks at or after block `first`, or None.

        It is at most `max_blocks` long.
        """
        start = self._states.find(_BYTE[MISSING], first)
        if start < 0:
            return None
        match = _MISSING_RUN.match(self._states, start, min(start + max_blocks, self.blocks))
        assert match is not None
        return BlockRun(*match.span())

    def next_data(self, first: int) -> int | None:
        """Return the first block at or after `first` that is DATA, or None."""
        found = self._states.find(_BYTE[DATA], first)
        return None if found < 0 else found

    def last_data(self) -> int | None:
        """Return the last block that is DATA, or None."""
        found = self._states.rfind(_BYTE[DATA])
        return None if found < 0 else found

    def some_data(self, most: int, longest: int, dice: Callable[[], float]) -> list[ByteRange]:
        """Return ranges of data: of the first block, of the last, of some at random.

        Args:
            most: how many ranges at most.
            longest: the bytes of a range at most, a power of two.
            dice: returns random numbers from 0 to 1, without 1.
        """
        chosen = [self.next_data(0), self.last_data()][:most]
        for _ in range(most - len(chosen)):
            found = self.next_data(int(dice() * self.blocks))
            chosen.append(self.next_data(0) if found is None else found)
        pieces = []
        for block in sorted({block for block in chosen if block is not None}):
            span = self.bytes_of(BlockRun(block, block + 1))
            start = span.start + int(dice() * span.length) // longest * longest
            pieces.append(ByteRange(start, min(start + longest, span.end)))
        return pieces

    def runs(self) -> Iterator[tuple[BlockRun, int]]:
        """Yield maximal runs of blocks in one state, over the whole image, in order."""
        for match in _RUN.finditer(self._states, 0, self.blocks):
            yield BlockRun(*match.span()), self._states[match.start()]

    # -- changes

    def claim(self, run: BlockRun) -> None:
        """Change MISSING blocks to CLAIMED."""
        self._change(run, MISSING, CLAIMED)

    def release(self, run: BlockRun) -> None:
        """Change CLAIMED blocks to MISSING.

        The request has failed, or its data could not be kept.
        """
        self._change(run, CLAIMED, MISSING)

    def mark_present(self, run: BlockRun, data_bytes: int) -> None:
        """Change CLAIMED blocks to DATA or ZERO. Their bytes must be in the cache file.

        Args:
            run: the blocks.
            data_bytes: how many bytes of the run were written. The rest is zeroes. A run without
                any data becomes ZERO.
        """
        length = self.bytes_of(run).length
        assert 0 <= data_bytes <= length
        if data_bytes == 0:
            self._change(run, CLAIMED, ZERO)
            self._zero_bytes += length
        else:
            self._change(run, CLAIMED, DATA)
            self._data_bytes += length
            self._mixed_zero_bytes += length - data_bytes
        self._touch(run)

    def mark_zero(self, within: BlockRun) -> None:
        """Change every MISSING block inside `within` to ZERO. The others stay as they are."""
        for run in list(self.missing_runs(within)):
            self._change(run, MISSING, ZERO)
            self._zero_bytes += self.bytes_of(run).length
            self._touch(run)

    # -- saving

    def take_dirty(self) -> list[tuple[int, bytes]]:
        """Return the pages that changed since the last call, and count them as clean.

        If they could not be saved, give them back with `give_back`.

        Returns:
            (page index, content) of each page. The content is a copy, so it does not change with
                later calls.
        """
        pages = []
        for index in sorted(self._dirty_pages):
            end = min((index + 1) * PAGE_BLOCKS, self.blocks)
            page = self._states[index * PAGE_BLOCKS : end]
            pages.append((index, bytes(page.translate(_SAVED + bytes(256 - len(_SAVED))))))
        self._dirty_pages.clear()
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Count pages as dirty again."""
        self._dirty_pages.update(pages)

    @property
    def dirty(self) -> bool:
        """True if anything changed since the last `take_dirty`."""
        return bool(self._dirty_pages)

    # -- inside

    def _change(self, run: BlockRun, old: int, new: int) -> None:
        length = run.end - run.first
        before = self._states[run.first : run.end]
        assert before.count(old) == length, f"{run}: not all in state {old}"
        self._states[run.first : run.end] = _BYTE[new] * length

    def _touch(self, run: BlockRun) -> None:
        self._dirty_pages.update(range(run.first // PAGE_BLOCKS, (run.end - 1) // PAGE_BLOCKS + 1))

    def _bytes_in_state(self, state: int) -> int:
        total = self._states[: self.blocks].count(state) * self.block_size
        if self.blocks and self._states[self.blocks - 1] == state:
            total -= self.blocks * self.block_size - self.size
        return total
