"""Asks the repository which ranges of an export hold data: a window at a time, once, when somebody
needs to know."""

import trio

from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.fetch.block_table import BlockTable
from lazyfs.engine.interfaces import Source


class ExtentQuestions:
    """The questions under way for one image. Trio thread only."""

    def __init__(self, source: Source, table: BlockTable) -> None:
        """`table` learns the answers."""
        self._source = source
        self._table = table
        self._asked: dict[int, trio.Event] = {}

    def is_asked(self, window: ByteRange) -> bool:
        """Whether somebody waits for the answer about `window`."""
        return window.start in self._asked

    def __len__(self) -> int:
        return len(self._asked)

    async def ask(self, window: ByteRange) -> None:
        """Learn what `window` holds, by one request however many callers want to know.

        Raises:
            RequestFailed, ExportChanged: to the caller who asked. The others return; they find the
                window unknown, and ask again.
        """
        if (asked := self._asked.get(window.start)) is not None:
            await asked.wait()
            return
        self._asked[window.start] = trio.Event()
        try:
            self._table.learn(window, await self._source.block_status(window))
        finally:
            self._asked.pop(window.start).set()
