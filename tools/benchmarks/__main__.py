"""Implements the command. See `tools/bench --help`."""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks import lab, measure, report
from benchmarks.rows import ROWS

ROUNDS, QUICK_ROUNDS = 5, 2


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench", description="Compare lazyfs with its peers, side by side."
    )
    parser.add_argument(
        "--quick", action="store_true", help="small images, two rounds: under 3 minutes"
    )
    parser.add_argument(
        "--only",
        metavar="ROW",
        action="append",
        help="only this row, or all that begin with ROW and a dash; repeatable",
    )
    parser.add_argument("--rounds", type=int, help=f"instead of {ROUNDS}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every sample")
    parser.add_argument(
        "--plot", metavar="DIR", type=Path, help="draw ratios and time series as PNG"
    )
    parser.add_argument("--dir", metavar="DIR", type=Path, default=Path(tempfile.gettempdir()),
                        help="where caches and copies lie: the disk that counts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the rows")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if options.list:
        for row in ROWS:
            console.print(f"{row.name:22} {row.title}")
        return 0
    for name in options.only or []:
        if not any(_is_named(row, name) for row in ROWS):
            parser.error(f"no row {name}; there are {', '.join(row.name for row in ROWS)}")
    chosen = [row for row in ROWS if _wanted(row, options)]
    if os.geteuid() != 0:
        parser.error("only root can drop caches; run it as root")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds takes 1 or more")
    # Now, and not after half an hour.
    if not options.dir.is_dir() or not os.access(options.dir, os.W_OK):
        parser.error(f"--dir {options.dir} is not a folder that can be written to")
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        parser.error(f"--json {options.json} is not a file in a folder that is there")
    if options.plot and options.plot.exists() and not options.plot.is_dir():
        parser.error(f"--plot {options.plot} is not a folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, leaves nothing behind
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    found = report.environment(options.dir)
    for name, value in found.items():
        console.print(f"{name:12} {value}")
    began, outcomes = time.monotonic(), []
    for row in chosen:
        with lab.made(options.dir, options.quick) as world, console.status(row.name) as status:
            outcomes.append(measure.measure(row, world, rounds, status.update))
        report.show(console, outcomes[-1:])
    console.print(f"{len(chosen)} rows in {time.monotonic() - began:.0f} s")
    if options.json:
        report.write_json(options.json, found, outcomes)
    if options.plot:
        report.plot(options.plot, outcomes)
    return 1 if any(outcome.error for outcome in outcomes) else 0


def _is_named(row: measure.Row, name: str) -> bool:
    return row.name == name or row.name.startswith(f"{name}-")


def _wanted(row: measure.Row, options: argparse.Namespace) -> bool:
    if options.only:
        return any(_is_named(row, name) for name in options.only)
    return not (options.quick and row.slow)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("tools/bench: interrupted", file=sys.stderr)
        sys.exit(130)
