"""`lazyfs pivot`: chooses the sockets, and prints what happened to each QEMU."""

import argparse
import json
import sys
from dataclasses import asdict

from lazyfs import errors
from lazyfs.cli import printing, waiting
from lazyfs.qemu import pivot


def run(options: argparse.Namespace) -> int:
    """Move the QEMUs that the user named to the plain files."""
    if not options.sockets and options.all_in is None:
        raise errors.UsageError(
            "name a QMP socket, or a folder of them with --all-in (see lazyfs pivot --help)"
        )
    named = set(options.sockets)
    chosen = pivot.sockets(options.sockets, options.all_in)
    if not chosen:
        printing.complain(f"there is no socket in {options.all_in!r}")
    reports = pivot.run(
        chosen,
        pivot.Options(options.allow_hmp, options.dry_run),
        wait=waiting.until_whole if options.wait else None,
        tell=_tell_of_errors if options.json else _tell,
    )
    if options.json:
        json.dump({"qemus": [asdict(report) for report in reports]}, sys.stdout, indent=2)
        print()
    # A folder often has sockets of other programs, and those that a QEMU left behind. They are no
    # failure unless the user named them.
    good = all(report.good or not (report.qemu or report.socket in named) for report in reports)
    return 0 if good else 1


def _tell(report: pivot.Report) -> None:
    """Print a report at once, because what follows may take long and be interrupted."""
    _tell_of_errors(report)
    for line in report.lines():
        printing.say(line)


def _tell_of_errors(report: pivot.Report) -> None:
    for line in report.complaints():
        printing.complain(line)
