"""Prints what `lazyfs map` shows: a strip of the whole image as wide as the terminal, and sums."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from lazyfs.units import format_size

_CELLS = {
    "data": ("█", "green"),
    "some": ("▒", "yellow"),
    "zero": ("·", "dim"),
    "missing": ("░", "red"),
}
_PIPE_WIDTH = 80


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print a map that has the form of the answer to `query-map`."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    size = sum(entry["length"] for entry in entries)
    if not size:
        console.print("0 B: an empty image")
        return
    cells = strip(entries, console.width)
    console.print(Text.assemble(*(_CELLS[cell] for cell in cells)))
    kinds = {
        "data": sum(entry["length"] for entry in entries if entry["data"]),
        "zero": sum(entry["length"] for entry in entries if entry["zero"]),
        "missing": sum(entry["length"] for entry in entries if not entry["present"]),
    }
    text = Text(f"{format_size(size)}: ")
    for kind, amount in kinds.items():
        sign, style = _CELLS[kind]
        text.append(sign, style).append(f" {kind} {format_size(amount)}  ")
    if "some" in cells:
        sign, style = _CELLS["some"]
        text.append(sign, style).append(" some of it")
    console.print(text)


def strip(entries: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Return the content of each of `width` equal parts of the image, as a key of `_CELLS`.

    "some" means that a part is present and a part is missing.
    """
    size = sum(entry["length"] for entry in entries)
    if not size:
        return []
    kinds: list[set[str]] = [set() for _ in range(width)]
    for entry in entries:
        kind = "data" if entry["data"] else "zero" if entry["zero"] else "missing"
        first = entry["start"] * width // size
        end = -(-(entry["start"] + entry["length"]) * width // size)
        for cell in kinds[first:end]:
            cell.add(kind)
    return [_of(cell) for cell in kinds]


def _of(kinds: set[str]) -> str:
    if "missing" in kinds:
        return "some" if len(kinds) > 1 else "missing"
    return "data" if "data" in kinds else "zero"
