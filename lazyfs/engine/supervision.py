"""Runs the background tasks of a mount.

A task that fails is reported, and started again after a pause. It never ends the mount.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from lazyfs.core.pacing import Backoff

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
"""The pause between two starts of a task that fails doubles from FIRST_PAUSE_S to MAX_PAUSE_S. Both
are unmeasured. A task that fails at once each time costs one log line and one traceback each
time."""


async def log_failure(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` once. If it fails, that is logged, and nothing else ends.

    Args:
        what: names the task in the log, as in "taking in a change".
        work: the task.
    """
    try:
        await work()
    except Exception:
        logger.exception("%s failed, a bug in lazyfs", what)


async def call_beside(
    background: Callable[[], Awaitable[None]], call: Callable[[], Awaitable[T]]
) -> T:
    """Return what `call` returns. `background` runs beside it, and is cancelled when it ends.

    Raises:
        Exception: what `call` raises, as it is: not in an exception group.
    Cancellation: both are cancelled.
    """
    result: Any = None
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(background)
        try:
            result = await call()
        except Exception as error:  # kept out of the nursery's exception group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # else this frame and the error keep each other, and what they hold
    return result  # type: ignore[no-any-return]


class Supervisor:
    """Runs the background tasks of one mount. Trio thread only."""

    def __init__(self) -> None:
        self._troubles: dict[str, str] = {}

    @property
    def message(self) -> str:
        """What an operator should know of tasks that have failed and are not running again.

        It is "" if all tasks run.
        """
        return "; ".join(self._troubles.values())

    async def keep_running(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` until it returns. If it fails, log that, and run it again after a pause.

        Args:
            what: names the task in messages, as in "population".
            work: the task.
        """
        pause = Backoff(first=FIRST_PAUSE_S, limit=MAX_PAUSE_S)
        while True:
            began = trio.current_time()
            try:
                await work()
            except Exception as error:
                logger.exception("%s failed, to be started again", what)
                self._troubles[what] = f"{what} failed, and is started again: {error!r}"
            else:
                return
            if trio.current_time() - began > MAX_PAUSE_S:
                pause.reset()
            await trio.sleep(pause.next())
            del self._troubles[what]
