"""What a verb of the `lazyfs` command is, and the parser for a list of verbs.

`cli/verbs.py` has the list.
"""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lazyfs import __version__, errors

DATA_DIR = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the whole usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.arguments: list[argparse.Action] = []
        """Everything that was added with add_argument, in this order. argparse keeps it private."""
        super().__init__(*args, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument as argparse does, and also add it to `arguments`."""
        action = super().add_argument(*names, **options)
        self.arguments.append(action)
        return action

    def error(self, message: str) -> NoReturn:
        """Raise UsageError. A word that looks like a verb or an option that there is, is named."""
        meant = self._meant(message)
        hint = f"; did you mean {meant}?" if meant else ""
        raise errors.UsageError(f"{message}{hint} (see {self.prog} --help)")

    def _meant(self, message: str) -> str:
        """Return the verb or option that is nearest to the wrong word of a message, or ""."""
        if (wrong := re.search(r"unrecognized arguments: (--[^ =]+)", message)) is not None:
            known = [name for action in self._known() for name in action.option_strings]
        elif (wrong := re.search(r"invalid choice: '([^']+)'", message)) is not None:
            known = re.findall(r"'([^']+)'", message.partition("choose from")[2])
        else:
            return ""
        return next(iter(difflib.get_close_matches(wrong[1], known, n=1)), "")

    def _known(self) -> list[argparse.Action]:
        """Return the arguments that users know of this parser and of the verbs' parsers."""
        found = [action for action in self.arguments if action.help is not argparse.SUPPRESS]
        for action in self._actions:
            if isinstance(action.choices, dict):
                for parser in action.choices.values():
                    found += parser._known()
        return found


@dataclass(frozen=True, slots=True)
class Verb:
    """Declares one verb of the command."""

    name: str
    summary: str
    """The line about the verb in `lazyfs --help`."""
    description: str
    """The text at the top of the verb's own help."""
    example: str
    """The words that follow the verb's name in an example."""
    add: Callable[[OneLineParser], None]
    """Adds the verb's arguments to its parser."""
    run: Callable[[argparse.Namespace], int]
    """Carries the verb out, and returns the exit code."""


@dataclass(frozen=True, slots=True)
class Parsers:
    """Holds the parser of the command, and the parsers of its verbs."""

    top: OneLineParser
    verbs: Mapping[str, OneLineParser]
    """The parser of each verb, by the verb's name."""


def parsers(verbs: Sequence[Verb]) -> Parsers:
    """Return the parsers for a command that has these verbs.

    The namespace that the top parser returns has the chosen verb's function as `run`.
    """
    top = OneLineParser(
        prog="lazyfs", description="Show every disk image of an NBD repository as a local file."
    )
    top.add_argument("--version", action="version", version=f"lazyfs {__version__}")
    top.add_argument(
        "--data-dir",
        action=_PrintDataDir,
        help="print the folder that has the systemd unit and the bash completion",
    )
    choices = top.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=OneLineParser
    )
    found = {}
    for verb in verbs:
        found[verb.name] = parser = choices.add_parser(
            verb.name,
            help=verb.summary,
            description=verb.description,
            epilog=f"example: lazyfs {verb.name} {verb.example}",
        )
        parser.set_defaults(run=verb.run)
        verb.add(parser)
    return Parsers(top, found)


class _PrintDataDir(argparse.Action):
    """An option that prints a path. The action of --version would fold a long one."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        help: str | None = None,  # noqa: A002
    ) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(DATA_DIR)
        parser.exit()
