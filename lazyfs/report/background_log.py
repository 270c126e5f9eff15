"""Writes the daemon's log in a thread, so that a log that blocks does not hold up any read.

    any thread --put--> queue of at most MAX_LINES --> a thread --> syslog, a file or stderr

Lines that do not fit are dropped and counted. As soon as the thread can write again, it says how
many lines are missing.
"""

import logging
import math
import os
import queue
import threading
import time
from contextlib import nullcontext

from lazyfs.core.escaping import one_line
from lazyfs.core.pacing import TokenBucket

MAX_LINES = 10_000
"""How many lines may wait for a log that blocks. That is some minutes of a daemon in trouble,
and a few MiB of memory. It is unmeasured."""

LINES_PER_S = 200
BURST_LINES = 2000
"""However different the lines are, no more than so many are written: 17 million a day, 2 GB. Others
are dropped and counted. Both are unmeasured. A mount with 10,000 images writes some lines for each
of them at times."""

QUIET_S = 10.0
MAX_REPEATS = 1000
"""A warning or error that says the same as one before is written once in QUIET_S seconds, and
counted. The last MAX_REPEATS lines are remembered, about 200 KiB. Both are unmeasured."""

ALWAYS = "always"
"""The name of an attribute of records that are written even if the same was written just now."""

WAKE = logging.LogRecord("", 0, "", 0, "", None, None)
"""No line: it only wakes the thread."""

LAST_LINES_S = 1.0
"""How long the end of the daemon waits for lines that are still to be written."""


class DescriptorHandler(logging.Handler):
    """Writes lines to a descriptor, without a buffer of its own.

    A buffered file has a lock. A thread that blocks while it holds the lock would keep the
    interpreter from ending.
    """

    def __init__(self, fd: int) -> None:
        """Write to `fd`, which stays open."""
        super().__init__()
        self._fd = fd

    def use(self, fd: int) -> None:
        """Write to another descriptor from now on, and close the one before.

        A line that is being written while this is called may end in either.
        """
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line. Blocks."""
        try:
            line = memoryview(f"{self.format(record)}\n".encode(errors="backslashreplace"))
            while line:
                line = line[os.write(self._fd, line) :]
        except Exception:
            self.handleError(record)


class BackgroundLog(logging.Handler):
    """Passes records on to another handler in a thread of its own.

    It is thread-safe and never blocks.
    """

    def __init__(self, handler: logging.Handler) -> None:
        """Start the thread. Only the thread calls `handler`, which may block.

        The message is formatted where the record is made. So the thread never looks at an object
        that a message shows. Control characters are escaped, because a repository chooses the
        names of exports, and could forge lines.
        """
        super().__init__()
        self.dropped = 0
        """How many lines did not fit."""
        self._too_many = 0
        """How many lines were left out because there were too many at once, and are not told of."""
        self._handler = handler
        self._reported = 0
        self._repeats: dict[str, tuple[float, int]] = {}
        """For each line of late: when it was last written, and how often it came since."""
        self._rate = TokenBucket(LINES_PER_S, BURST_LINES / LINES_PER_S, full=True)
        self._owes = False
        """True if some came since, so that the thread must tell how often."""
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue `record` to be written soon, or count it as dropped."""
        try:
            line = logging.makeLogRecord(record.__dict__)
            text = one_line(record.getMessage())
            trouble = record.levelno >= logging.WARNING and not hasattr(record, ALWAYS)
            if trouble and (text := self._once(text)) == "":
                return
            if not hasattr(record, ALWAYS) and not self._within_rate():
                self._too_many += 1
                return
            line.msg, line.args = text, None
            if record.exc_info:
                trace = logging.Formatter().formatException(record.exc_info)
                line.exc_text = "\n".join(f"  | {one_line(row)}" for row in trace.split("\n"))
                line.exc_info = None  # this would keep the frames of the error in memory
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1
        except Exception:
            self.handleError(record)

    def _within_rate(self) -> bool:
        """Return whether another line may be written now, and count it."""
        now = time.monotonic()
        if self._rate.wait(now) > 0:
            return False
        self._rate.take(now, 1)
        return True

    def _once(self, text: str) -> str:
        """Return the line, and how often it came since; or "" if it was written a moment ago."""
        now = time.monotonic()
        written_at, since = self._repeats.get(text, (-math.inf, 0))
        if now < written_at + QUIET_S:
            self._repeats[text] = written_at, since + 1
            if not self._owes:
                self._owes = True
                self._lines.put_nowait(WAKE)  # it waits for a limited time from now on
            return ""
        if len(self._repeats) >= MAX_REPEATS:
            self._repeats.clear()
        self._repeats[text] = now, 0
        return f"{text} (and {since} times more)" if since else text

    def _tell_repeats(self, now: float) -> None:
        """Write how often lines came that are quiet by now, in the thread."""
        # logging.shutdown() holds the lock while `close` waits for this thread.
        with nullcontext() if now == math.inf or self.lock is None else self.lock:
            quiet = [
                (text, since)
                for text, (written_at, since) in self._repeats.items()
                if since and now >= written_at + QUIET_S
            ]
            for text, _ in quiet:
                del self._repeats[text]
            self._owes = any(since for _, since in self._repeats.values())
        for text, since in quiet:
            self._handler.emit(_made(f"{text} (and {since} times more)"))

    def _tell_left_out(self) -> None:
        if self._lines.empty() and self._too_many:
            count, self._too_many = self._too_many, 0
            self.dropped += count
            self._reported += count
            self._handler.emit(_made(f"{count} lines are left out here: there were too many"))

    def close(self) -> None:
        """Wait for the lines that are still to be written, for at most 2 * LAST_LINES_S."""
        try:
            self._lines.put(None, timeout=LAST_LINES_S)
            self._thread.join(LAST_LINES_S)
        except queue.Full:
            pass  # the log is blocked
        super().close()

    def _write(self) -> None:
        while True:
            try:
                line = self._lines.get(timeout=QUIET_S if self._owes else None)
            except queue.Empty:
                self._tell_repeats(time.monotonic())
                self._tell_left_out()
                continue
            if line is WAKE:
                continue
            if line is None:
                self._tell_repeats(math.inf)
                self._tell_left_out()
                return
            self._handler.emit(line)
            self._tell_left_out()
            if (missing := self.dropped - self._reported) and self._lines.empty():
                self._reported += missing
                text = f"{missing} lines are missing here: the log could not be written"
                self._handler.emit(_made(text))


def _made(text: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)
