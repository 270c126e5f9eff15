"""Says what every task and thread of the daemon is doing, for SIGUSR1.

It is collected in a thread, because a signal may come while the main thread holds a lock of the
log, and because the loop itself may be what hangs. So a picture of the tasks may be slightly off.
"""

import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FrameType

import trio

from lazyfs.report.background_log import ALWAYS

logger = logging.getLogger(__name__)


def log_soon(root: "trio.lowlevel.Task | None") -> None:
    """Log a line for each thread and each task, from a thread. May be called in a signal handler.

    Args:
        root: the root task of the loop, as `trio.lowlevel.current_root_task` returns it there.
    """
    threading.Thread(target=_log, args=(root,), name="tracebacks", daemon=True).start()


def _log(root: "trio.lowlevel.Task | None") -> None:
    try:
        for line, count in Counter([*_threads(), *_tasks(root)]).items():
            several = f"{count} times: " if count > 1 else ""
            logger.warning("%s%s", several, line, extra={ALWAYS: True})
    except Exception:
        logger.exception("the tracebacks could not be taken")


def _threads() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            yield f"thread {names.get(ident, ident)}: {_chain(_callers(frame))}"


def _callers(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _tasks(task: "trio.lowlevel.Task | None") -> Iterator[str]:
    if task is None:
        return
    frames = [(frame, line) for frame, line in task.iter_await_frames()]
    yield f"task {task.name}: {_chain(reversed(frames))}"
    for nursery in list(task.child_nurseries):
        for child in list(nursery.child_tasks):
            yield from _tasks(child)


def _chain(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Return the functions of frames, the innermost first."""
    return " < ".join(
        f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{line})"
        for frame, line in frames
    )
