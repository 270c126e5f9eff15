"""Makes the tables and bars that `lazyfs status` prints, with rich."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lazyfs.units import format_duration, format_size

MountStatus = Mapping[str, Any]

_STYLES = {"whole": "green", "partial": "yellow", "failed": "red", "remote": "dim"}
_COLUMNS = {
    "size": 8,
    "present": 7,
    "bar": 10,
    "state": 7,
    "fetched": 8,
    "rate": 11,
    "to go": 11,
    "open": 4,
}
"""The columns with their widths, which together fill a terminal of 80 columns."""
_WIDE = 100
"""In a terminal with at least so many columns, an image's name is on the same line as the rest."""


def render(mounts: Sequence[MountStatus], width: int) -> RenderableType:
    """Return something that a console of `width` columns can print.

    `mounts` has the form of `status --json`.
    """
    if not mounts:
        return Text("no lazyfs mount")
    parts: list[RenderableType] = []
    for mount in mounts:
        if parts:
            parts.append(Text())
        parts.append(_heading(mount))
        if mount.get("images"):
            parts.append(_table(mount, width))
        elif "error" not in mount:
            parts.append(Text("  no images", style="dim"))
        parts += [_job(job) for job in mount.get("jobs", []) if job["type"] != "populate"]
        parts += [Text(f"  {_printable(line)}", style="dim") for line in mount.get("events", [])]
    return Group(*parts)


def _job(job: Mapping[str, Any]) -> Text:
    """Return the line for a job. Populate jobs are not shown so, but in their image's line."""
    done = (
        f" {_percent(job['current-progress'], job['total-progress'])} %"
        if job["status"] == "running"
        else ""
    )
    text = Text(f"  job {_printable(job['id'])}: {job['status']}{done}")
    return text.append(f", {_printable(job['error'])}", style="red") if job.get("error") else text


def _heading(mount: MountStatus) -> Text:
    text = Text(_printable(mount["mountpoint"]), style="bold")
    text.append(f"  from {_printable(mount['repository'])}", style="not bold")
    if "error" in mount:
        return text.append(f"  {mount['error']}", style="red")
    if mount.get("detached"):
        text.append(f"  detached, pid {mount['pid']} serves what is still open", style="yellow")
    text.append(
        "  connected" if mount["connected"] else "  not connected",
        style="green" if mount["connected"] else "red",
    )
    if mount.get("room"):
        text.append(f"\n  {_room(mount['room'])}", style="dim not bold")
    if mount.get("message"):
        text.append(f"\n  {_printable(mount['message'])}", style="red")
    if mount.get("passthrough_trouble"):
        text.append(f"\n  no passthrough: {mount['passthrough_trouble']}", style="dim not bold")
    return text


def _room(room: Mapping[str, Any]) -> str:
    cache = f"cache {format_size(room['used'])}"
    if room.get("max_cache"):
        cache += f" of at most {format_size(room['max_cache'])}"
    free = f"disk {format_size(room['free'])} free of {format_size(room['total'])}"
    if room.get("min_free"):
        free += f", {format_size(room['min_free'])} kept free"
    return f"{cache}  {free}"


def _table(mount: MountStatus, width: int) -> Group:
    """Return a line for each image, or two where the terminal is narrow, and the errors below."""
    prefix = mount["mountpoint"].rstrip("/") + "/"
    parts: list[RenderableType] = []
    jobs = {job["id"]: job["status"] for job in mount.get("jobs", []) if job["type"] == "populate"}
    table = _grid("  image" if width >= _WIDE else None)
    parts.append(table)
    for image in mount["images"]:
        replaced = " (replaced)" if image.get("replaced") else ""
        replaced += " (pinned)" if image.get("pinned") else ""
        name = Text(
            f"  {_printable(image['path'].removeprefix(prefix))}{replaced}", overflow="fold"
        )
        row = _row(image, jobs.get(image["path"].removeprefix(prefix), ""))
        if width >= _WIDE:
            table.add_row(name, *row.values())
        else:
            line = _grid(None, header=False)
            line.add_row(*row.values())
            parts += [name, line]
    if len(mount["images"]) > 1:
        name = Text(f"  {len(mount['images'])} images", style="bold")
        total = _row(_total(mount["images"]), "")
        if width >= _WIDE:
            table.add_row(name, *total.values())
        else:
            line = _grid(None, header=False)
            line.add_row(*total.values())
            parts += [name, line]
    for image in mount["images"]:
        if image["error"]:
            name = Text(
                f"  {_printable(image['path'].removeprefix(prefix))}: {_printable(image['error'])}",
                style="red",
            )
            parts.append(name)
    return Group(*parts)


def _total(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of images, in the form of one image.

    What is left and the rate are those of the images that are being filled, so the time to go is
    that of the work under way.
    """
    begun = [image for image in images if image["state"] != "remote"]
    filling = [image for image in begun if image["fill_rate"] >= 1]
    shown = filling or begun
    return {
        "size": sum(image["size"] or 0 for image in shown),
        "present_bytes": sum(image["present_bytes"] for image in shown),
        "zero_bytes": sum(image["zero_bytes"] for image in shown),
        "fetched_bytes": sum(image["fetched_bytes"] for image in images),
        "fill_rate": sum(image["fill_rate"] for image in filling),
        "open_count": sum(image["open_count"] for image in images),
        "state": "partial" if filling else "",
    }


def _grid(first: str | None, header: bool = True) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=header)
    if first is not None:
        table.add_column(first, overflow="fold", min_width=16)
    for name, width in _COLUMNS.items():
        align: Literal["left", "right"] = "left" if name in ("bar", "state") else "right"
        table.add_column("" if name == "bar" else name, width=width, justify=align, no_wrap=True)
    return table


def _row(image: Mapping[str, Any], job: str) -> dict[str, RenderableType]:
    """Return the columns for an image. `job` is the status of its populate job, or ""."""
    size = image["size"]
    here = image["present_bytes"] + image["zero_bytes"]
    missing = 0 if size is None else size - here
    rate = image["fill_rate"]
    filling = image["state"] == "partial" and rate >= 1 and missing and job != "paused"
    touched = image["state"] != "remote"
    return {
        "size": "?" if size is None else format_size(size),
        "present": f"{_percent(here, size)} %" if touched else "",
        "bar": ProgressBar(
            total=max(size or 0, 1), completed=here if size else 1, width=_COLUMNS["bar"]
        )
        if touched
        else "",
        "state": Text(image["state"], style=_STYLES.get(image["state"], "")),
        "fetched": format_size(image["fetched_bytes"]) if image["fetched_bytes"] else "",
        "rate": f"{format_size(round(rate))}/s"
        if filling
        else job
        if job in ("paused", "standby")
        else "",
        "to go": format_duration(missing / rate) if filling else "",
        "open": str(image["open_count"] or ""),
    }


def _percent(here: int, size: int | None) -> int:
    """Return whole percents, rounded down, so that 100 means all of it."""
    return 100 if not size else here * 100 // size


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
