"""The documents name tests, modules, commands and messages; these must exist."""

import re
import shlex
from pathlib import Path

import pytest

from lazyfs.cli import arguments
from lazyfs.cli.verbs import VERBS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "doc").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_tests_exist(document: Path) -> None:
    for name, function in re.findall(
        r"`(?:tests/)?(\w+/test_\w+\.py)(?:::(\w+))?`", document.read_text()
    ):
        path = ROOT / "tests" / name
        assert path.is_file(), f"{document.name} names {name}"
        assert not function or f"def {function}(" in path.read_text(), (
            f"{document.name} names {name}::{function}"
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_promise_names_a_test() -> None:
    text = (ROOT / "doc" / "SEMANTICS.md").read_text()
    promises, _, _ = text.partition("## Limits")
    for promise in re.findall(r"^- .*?(?=^- |^#|^\||\Z)", promises, re.MULTILINE | re.DOTALL):
        assert re.search(r"`\w+/test_\w+\.py", promise), promise


def test_the_messages_that_troubleshooting_explains_exist() -> None:
    """Each part of a message in a heading, between dots, must stand in the code as it is written
    there."""
    code = "\n".join(path.read_text() for path in (ROOT / "lazyfs").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a string that goes on in the next line
    headings = re.findall(
        r"^### .*", (ROOT / "doc" / "TROUBLESHOOTING.md").read_text(), re.MULTILINE
    )
    assert len(headings) >= 15
    for message in re.findall(r"`([^`]+)`", "\n".join(headings)):
        for part in filter(None, map(str.strip, message.split("..."))):
            assert part in code, f"no message says {part!r}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_right(document: Path) -> None:
    """Each line of a code block that begins with `lazyfs VERB` is taken by the parser.

    README.md has a drawing, too, with lines of its own.
    """
    parser = arguments.parsers(VERBS).top
    for line in re.findall(r"^    lazyfs (?!-|on /)(.*)", document.read_text(), re.MULTILINE):
        parser.parse_args(shlex.split(line, comments=True))
