"""Asks the repository which ranges of an export hold data.

It asks for one window at a time, once, when somebody needs to know.
"""

import logging

import trio

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.fetch.block_table import BlockTable
from lazyfs.engine.interfaces import Source

logger = logging.getLogger(__name__)


class ExtentQuestions:
    """Tracks the questions under way for one image. Trio thread only."""

    def __init__(self, source: Source, table: BlockTable) -> None:
        """Begin with no question under way.

        Args:
            source: answers the questions.
            table: learns the answers.
        """
        self._source = source
        self._table = table
        self._asked: dict[int, trio.Event] = {}

    def is_asked(self, window: ByteRange) -> bool:
        """Return whether somebody waits for the answer about `window`."""
        return window.start in self._asked

    def __len__(self) -> int:
        return len(self._asked)

    async def ask(self, window: ByteRange) -> None:
        """Learn what `window` holds. One request serves all callers who want to know.

        If the server refuses to answer, everything counts as data, which costs only time.

        Raises:
            ExportChanged: raised to the caller who sent the request. The other callers return;
                they find that the window is still unknown, and ask again.
        """
        if (asked := self._asked.get(window.start)) is not None:
            await asked.wait()
            return
        self._asked[window.start] = trio.Event()
        try:
            self._table.learn(window, await self._asked_or_all(window))
        finally:
            self._asked.pop(window.start).set()

    async def _asked_or_all(self, window: ByteRange) -> list[ByteRange]:
        try:
            return await self._source.block_status(window)
        except errors.RequestFailed as error:
            logger.info("all of it counts as data: window=%s reason=%s", window, error)
            return [window]
