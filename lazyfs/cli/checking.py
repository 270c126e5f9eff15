"""`lazyfs check`: checks a cache that is not mounted, and prints what is wrong with it."""

import argparse
import json
import sys
from dataclasses import asdict

from lazyfs.cli import printing


def run(options: argparse.Namespace) -> int:
    """Check a cache directory, and repair it if the user asked for that."""
    from lazyfs.cache import cache_check

    report = cache_check.run(options.cache_dir, options.repair)
    if options.json:
        findings = [asdict(finding) for finding in report.findings]
        json.dump(
            {"cache_dir": report.cache_dir, "images": report.images, "findings": findings},
            sys.stdout,
            indent=2,
        )
        print()
    else:
        for finding in report.findings:
            printing.say(finding.line())
        printing.say(report.summary())
    return 1 if report.problems else 0
