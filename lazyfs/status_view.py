"""What `lazyfs status` prints: tables and bars, made with rich."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lazyfs.units import format_duration, format_size

MountStatus = Mapping[str, Any]

_STYLES = {"whole": "green", "partial": "yellow", "failed": "red", "remote": "dim"}
_BAR_WIDTH = 12


def render(mounts: Sequence[MountStatus]) -> RenderableType:
    """Return all mounts, as `status --json` has them, for a console to print."""
    if not mounts:
        return Text("no lazyfs mount")
    parts: list[RenderableType] = []
    for mount in mounts:
        if parts:
            parts.append(Text())
        parts.append(_heading(mount))
        if mount.get("images"):
            parts.append(_table(mount))
        elif "error" not in mount:
            parts.append(Text("  no images", style="dim"))
    return Group(*parts)


def _heading(mount: MountStatus) -> Text:
    text = Text(mount["mountpoint"], style="bold")
    text.append(f"  from {mount['repository']}", style="not bold")
    if "error" in mount:
        return text.append(f"  {mount['error']}", style="red")
    text.append(
        "  connected" if mount["connected"] else "  not connected", style="green" if mount["connected"] else "red"
    )
    if mount.get("message"):
        text.append(f"\n  {mount['message']}", style="red")
    return text


def _table(mount: MountStatus) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("  image", overflow="fold", min_width=16)
    for name in ("size", "present"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", width=_BAR_WIDTH)
    table.add_column("state", no_wrap=True)
    for name in ("fetched", "rate", "to go"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("open", justify="right", no_wrap=True)
    prefix = mount["mountpoint"].rstrip("/") + "/"
    for image in mount["images"]:
        table.add_row(*_row(image, image["path"].removeprefix(prefix)))
        if image["error"]:
            table.add_row(Text(f"    {image['error']}", style="red"))
    return table


def _row(image: Mapping[str, Any], name: str) -> list[RenderableType]:
    size = image["size"]
    here = image["present_bytes"] + image["zero_bytes"]
    missing = 0 if size is None else size - here
    rate = image["fill_rate"]
    filling = image["state"] == "partial" and rate >= 1 and missing
    touched = image["state"] != "remote"
    return [
        Text(f"  {_printable(name)}"),
        "?" if size is None else format_size(size),
        f"{_percent(here, size)} %" if touched else "",
        ProgressBar(total=max(size or 0, 1), completed=here if size else 1, width=_BAR_WIDTH) if touched else "",
        Text(image["state"], style=_STYLES.get(image["state"], "")),
        format_size(image["fetched_bytes"]) if image["fetched_bytes"] else "",
        f"{format_size(round(rate))}/s" if filling else "",
        format_duration(missing / rate) if filling else "",
        str(image["open_count"] or ""),
    ]


def _percent(here: int, size: int | None) -> int:
    """Whole percents, rounded down: 100 means all of it."""
    return 100 if not size else here * 100 // size


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
