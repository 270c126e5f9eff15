"""Prints the bash completion of the `lazyfs` command, made from its parser: lazyfs/data/lazyfs.bash."""

import argparse
from typing import Any

import shtab

from lazyfs.cli import arguments
from lazyfs.cli import main as cli

COMPLETERS = {
    **dict.fromkeys(("IMAGE", "PATH", "FILE", "QMP_SOCKET"), shtab.FILE),
    "NAME|FILE": {"bash": "_lazyfs_config_files"},
    **dict.fromkeys(("DIR", "MOUNTPOINT"), shtab.DIRECTORY),
}
"""How bash completes an argument, by its metavar."""

PREAMBLE = """
_lazyfs_config_files() {
  local path names=""
  for path in /etc/lazyfs/*.toml; do
    [ -e "$path" ] && path=${path##*/} && names+=" ${path%.toml}"
  done
  compgen -W "$names" -- "$1"
  compgen -f -- "$1"
}
"""


def say_what_is_a_file(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                say_what_is_a_file(verb)
        elif isinstance(action.metavar, str) and action.metavar in COMPLETERS:
            action.complete = COMPLETERS[action.metavar]  # type: ignore[attr-defined]


parser = arguments.parser(cli._verbs())
say_what_is_a_file(parser)
preamble: Any = {"bash": PREAMBLE}  # which shtab declares as a str
print(shtab.complete(parser, "bash", preamble=preamble).rstrip("\n"))
# bash splits a URI at its colons, so a MOUNTPOINT after it is one word more than the parser expects.
# For such a word, any file is offered.
print("complete -o bashdefault -o default -F _shtab_lazyfs lazyfs")
