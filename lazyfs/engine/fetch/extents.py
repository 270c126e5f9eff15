"""What the repository says of an export's content: asked a window at a time, once, when somebody needs it."""

from threading import Lock

import trio

from lazyfs.core.block_map import BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.extent_map import ExtentMap
from lazyfs.engine.interfaces import Source


class Extents(ExtentMap):
    """An extent map that can ask. Population's threads look at it, under `lock`."""

    def __init__(self, source: Source, blocks: BlockMap, lock: Lock) -> None:
        """`blocks`: learns what is zeroes; also under `lock`."""
        super().__init__(blocks.size)
        self._source = source
        self._blocks = blocks
        self._lock = lock
        self._asked: dict[int, trio.Event] = {}

    def is_asked(self, window: ByteRange) -> bool:
        """Whether somebody waits for the answer."""
        return window.start in self._asked

    @property
    def asking(self) -> bool:
        """Whether an answer is waited for."""
        return bool(self._asked)

    async def ask(self, window: ByteRange) -> None:
        """Learn what `window` holds, by one request however many callers want to know. Trio thread only.

        Raises:
            RequestFailed, ExportChanged: the caller who asked; the others find it unknown and ask again.
        """
        if (asked := self._asked.get(window.start)) is not None:
            await asked.wait()
            return
        self._asked[window.start] = trio.Event()
        try:
            data = await self._source.block_status(window)
            with self._lock:
                self.learn(window, data)
                self._mark_zeroes(window)
        finally:
            self._asked.pop(window.start).set()

    def _mark_zeroes(self, window: ByteRange) -> None:
        size = self._blocks.block_size
        for zeroes in self.zero_ranges(window):
            whole = -(-zeroes.end // size) if zeroes.end == self._blocks.size else zeroes.end // size
            first = -(-zeroes.start // size)
            if first < whole:
                self._blocks.mark_zero(BlockRun(first, whole))
