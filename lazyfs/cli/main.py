"""The `lazyfs` command: it parses the arguments, runs the verb, and turns errors into exit codes.

The exit code is 0 if the verb did what it was asked, 1 if it failed, and 2 if the arguments are
wrong. A failure is reported in one line on stderr, which says why and what to do.
"""

import io
import os
import sys
from collections.abc import Sequence

from lazyfs import errors
from lazyfs.cli import arguments as arguments_of
from lazyfs.cli import mounting, printing
from lazyfs.cli.verbs import VERBS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name can contain any bytes, also those that the terminal's encoding does not have.
            stream.reconfigure(errors="backslashreplace")
    try:
        words = sys.argv[1:] if arguments is None else arguments
        options = arguments_of.parsers(VERBS).top.parse_args(words)
        options.words = words
        code: int = options.run(options)
        sys.stdout.flush()
    except errors.UserError as error:
        printing.complain(error)
        return mounting.exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        printing.complain(error.strerror or error)
        return 1
    return code


def _open_standard_streams() -> None:
    """Put /dev/null in the place of a standard stream that the caller has closed.

    Otherwise Python has no object for it, and the next file that is opened gets its number.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is `fd`
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - it stays open to the end
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - it stays open to the end
