"""The completion that comes with the package, in a real bash."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import servers

from lazyfs.cli import arguments
from lazyfs.cli.verbs import VERBS

SCRIPT = Path(arguments.DATA_DIR) / "lazyfs.bash"

COMPLETE = """
source "$1" && shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
complete -p lazyfs >&2
_shtab_lazyfs
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""What bash does when Tab is pressed after the last word."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "image.qcow2").touch()
    (tmp_path / "main.toml").touch()
    return tmp_path


def completed(folder: Path, *words: str) -> set[str]:
    servers.requires("bash")
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(SCRIPT), "lazyfs", *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == "complete -o bashdefault -o default -F _shtab_lazyfs lazyfs\n"
    return set(done.stdout.split("\n")) - {""}


PARSERS = arguments.parsers(VERBS).verbs


def test_verbs(folder: Path) -> None:
    assert completed(folder, "") == {verb.name for verb in VERBS}
    assert completed(folder, "pre") == {"prefetch"}


@pytest.mark.parametrize("verb", PARSERS)
def test_every_option_of_every_verb(folder: Path, verb: str) -> None:
    """This also finds a completion that is older than the options. Run tools/make-docs then."""
    shown = [action for action in PARSERS[verb].arguments if action.help != argparse.SUPPRESS]
    options = {
        option for action in shown for option in action.option_strings if option.startswith("--")
    }
    assert completed(folder, verb, "--") == options, "run tools/make-docs"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mount", "--on-change", ""], {"keep", "replace"}),
        (["mount", "--fill-rate", "50M", "--format", "q"], {"qcow2"}),
        (["mount", "--cache-dir", "im"], {"images"}),
        (["mount", "--log-file", "im"], {"images", "image.qcow2"}),
        (["mount", "nbd", "im"], {"images"}),
        (["mount", "--config", "./ma"], {"./main.toml"}),
        (["config", "ma"], {"main.toml"}),
        (["umount", "im"], {"images"}),
        (["detach", "--wait", "im"], {"images"}),
        (["evict", "image.qcow2", "im"], {"images", "image.qcow2"}),
        (["pivot", "--all-in", "im"], {"images"}),
    ],
)
def test_values_and_files(folder: Path, words: list[str], expected: set[str]) -> None:
    assert completed(folder, *words) == expected


def test_the_command_says_where_it_is() -> None:
    command = [sys.executable, "-m", "lazyfs", "--data-dir"]
    done = subprocess.run(
        command, env={**os.environ, "COLUMNS": "10"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{SCRIPT.parent}\n"
    assert {"lazyfs.bash", "lazyfs@.service"} <= set(os.listdir(SCRIPT.parent))


def test_configurations_are_completed_by_name(folder: Path) -> None:
    names = (
        {path.removesuffix(".toml") for path in os.listdir("/etc/lazyfs")}
        if os.path.isdir("/etc/lazyfs")
        else set()
    )
    assert completed(folder, "mount", "--config", "") == names | set(os.listdir(folder))
