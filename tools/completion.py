"""Prints the bash completion of the `lazyfs` command, made from its parser:
lazyfs/data/lazyfs.bash."""

from typing import Any

import shtab

from lazyfs.cli import arguments
from lazyfs.cli.verbs import VERBS

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


parsers = arguments.parsers(VERBS)
for parser in parsers.verbs.values():
    for action in parser.arguments:
        if isinstance(action.metavar, str) and action.metavar in COMPLETERS:
            action.complete = COMPLETERS[action.metavar]  # type: ignore[attr-defined]
preamble: Any = {"bash": PREAMBLE}  # which shtab declares as a str
print(shtab.complete(parsers.top, "bash", preamble=preamble).rstrip("\n"))
# bash splits a URI at its colons, so a MOUNTPOINT after it is one word more than the parser
# expects. For such a word, any file is offered.
print("complete -o bashdefault -o default -F _shtab_lazyfs lazyfs")
