"""A log that blocks costs lines, which are counted, and holds nobody up."""

import logging
import sys
import threading
import time

import pytest
import servers

from lazyfs.report import background_log
from lazyfs.report.background_log import BackgroundLog


class Blocking(logging.Handler):
    """A log that nobody reads, until `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.gate.wait()
        self.lines.append(self.format(record))


def logger_to(log: BackgroundLog) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addHandler(log)
    return logger


def test_lines_come_in_order_formatted_when_they_were_written() -> None:
    target = Blocking()
    target.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    target.gate.set()
    log = BackgroundLog(target)
    changing = ["before"]
    logger = logger_to(log)
    logger.info("first %s", changing)
    changing[0] = "after"
    try:
        raise ValueError("wrong")
    except ValueError:
        logger.exception("second")
    log.close()
    assert target.lines[0] == "INFO first ['before']"
    assert target.lines[1].startswith("ERROR second\n  | Traceback (most recent call last)")
    assert target.lines[1].endswith("ValueError: wrong")


def test_a_log_that_blocks_holds_nobody_up_and_its_missing_lines_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background_log, "MAX_LINES", 10)
    monkeypatch.setattr(background_log, "LAST_LINES_S", 0.1)
    target = Blocking()
    log = BackgroundLog(target)
    logger = logger_to(log)
    began = time.monotonic()
    for number in range(100):
        logger.warning("line %d", number)
    assert time.monotonic() - began < servers.DEADLINE_S / 2
    assert log.dropped in (89, 90), "ten wait, and one may be under way"
    target.gate.set()
    servers.wait_until(lambda: len(target.lines) >= 101 - log.dropped, "they are written")
    assert target.lines[-1] == f"{log.dropped} lines are missing here: the log could not be written"
    logger.warning("again")
    log.close()
    assert target.lines[-1] == "again"


def test_the_end_does_not_wait_for_a_log_that_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_log, "LAST_LINES_S", 0.1)
    target = Blocking()
    log = BackgroundLog(target)
    logger_to(log).warning("lost")
    log.close()
    assert target.lines == []
    target.gate.set()


def test_a_name_cannot_forge_a_line() -> None:
    target = Blocking()
    target.gate.set()
    log = BackgroundLog(target)
    logger_to(log).warning("image=%s", "Grüße\n2026-11-27 ERROR\x1b[31m\udcff")
    log.close()
    assert target.lines == ["image=Grüße\\n2026-11-27 ERROR\\x1b[31m\\udcff"]


def test_what_was_counted_is_told_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_log, "QUIET_S", 0.2)
    written: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(record.getMessage())

    log = background_log.BackgroundLog(Keeps())
    for _ in range(5):
        log.handle(logging.LogRecord("x", logging.WARNING, "", 0, "it fails", None, None))
    servers.wait_until(lambda: len(written) == 2, "it is told")
    assert written == ["it fails", "it fails (and 4 times more)"]
    log.handle(logging.LogRecord("x", logging.WARNING, "", 0, "again", None, None))
    log.handle(logging.LogRecord("x", logging.WARNING, "", 0, "again", None, None))
    log.close()
    assert written[2:] == ["again", "again (and 1 times more)"]


def test_however_different_the_lines_are_they_do_not_flood_the_disk() -> None:
    written: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(record.getMessage())

    log = BackgroundLog(Keeps())
    for number in range(5 * background_log.BURST_LINES):
        log.handle(logging.LogRecord("x", logging.WARNING, "", 0, f"line {number}", None, None))
    log.close()
    assert background_log.BURST_LINES <= len(written) < 3 * background_log.BURST_LINES
    assert log.dropped == 5 * background_log.BURST_LINES - len([w for w in written if "line " in w])
    assert any("lines are left out here: there were too many" in line for line in written)


def test_repeats_take_nothing_of_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    """One noisy image must not hide what is said of others."""
    written: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(record.getMessage())

    log = BackgroundLog(Keeps())
    for _ in range(3 * background_log.BURST_LINES):
        log.handle(logging.LogRecord("x", logging.WARNING, "", 0, "same", None, None))
    log.handle(logging.LogRecord("x", logging.ERROR, "", 0, "other", None, None))
    log.close()
    assert written == [
        "same",
        "other",
        f"same (and {3 * background_log.BURST_LINES - 1} times more)",
    ]
    assert log.dropped == 0


def test_a_traceback_cannot_forge_a_line() -> None:
    written: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(logging.Formatter("%(message)s").format(record))

    log = BackgroundLog(Keeps())
    try:
        raise ValueError("evil\n2026-11-28 ERROR forged\x1b[31m")
    except ValueError:
        log.handle(logging.LogRecord("x", logging.ERROR, "", 0, "a bug", None, sys.exc_info()))
    log.close()
    assert "\x1b" not in written[0]
    assert all(row.startswith("  | ") for row in written[0].split("\n")[1:])
