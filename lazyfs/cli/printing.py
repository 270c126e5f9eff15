"""The one place that writes text for people to the terminal.

Names of images, commands of processes, and what servers say can contain any characters. Those that
would steer a terminal, end the line or hide others are escaped here. JSON escapes them by itself.
"""

import sys

from lazyfs.core.escaping import one_line


def say(text: str) -> None:
    """Print a line."""
    print(one_line(text), flush=True)


def complain(text: object, program: str = "lazyfs") -> None:
    """Print a line about something that is wrong on stderr."""
    print(f"{program}: {one_line(str(text))}", file=sys.stderr)


def note(text: str) -> None:
    """Print a line on stderr about how something goes on."""
    print(one_line(text), file=sys.stderr)
