"""Makes what `lazyfs status` prints: for each mount a heading, a table of images and what happens.

The table has one line for each image. Where a terminal is narrow, columns are left out, and only
then names are cut. The lines are put together here, because rich takes 4 s for a table of 10,000
rows, and this 0.1 s (AMD EPYC).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from lazyfs.cli import progress
from lazyfs.core.escaping import one_line
from lazyfs.units import format_duration, format_size

MountStatus = Mapping[str, Any]

_STYLES = {
    "whole": Style(color="green"),
    "partial": Style(color="yellow"),
    "failed": Style(color="red"),
    "remote": Style(dim=True),
}
_DIM, _BOLD, _PLAIN = Style(dim=True), Style(bold=True), Style()

_COLUMNS = ("size", "present", "state", "rate", "to go", "fetched", "open")
_LEFT_OUT_FOR_NAMES = ("fetched", "open", "size")
"""The columns that are left out, one after the other, so that names need not be cut."""
_LEFT_OUT = ("to go", "rate", "present", "state")
"""The columns that are left out so that at least a part of the names can be read."""
_GAP = 2
_INDENT = 2
_SHORT_NAME = 12
"""What can be read of a name in the narrowest terminal. It is unmeasured."""
_ALIGNED = 60
"""Names of up to so many characters have their columns below each other in a pipe."""
_FEWEST = 3
"""How many images are shown even if there is no room for them."""
_ERRORS = 5
"""How many errors are shown where the height is limited."""


@dataclass(frozen=True, slots=True)
class _Line:
    """Holds what is shown of one image, or of all."""

    name: str
    cells: Mapping[str, str]
    """The texts by the names of their columns."""
    style: Style
    """The style of the state."""


def render(
    mounts: Sequence[MountStatus], width: int | None, height: int | None = None
) -> RenderableType:
    """Return something that a console can print.

    Args:
        mounts: what `status --json` prints.
        width: how many columns there are. None means as many as are needed.
        height: how many lines there are. If all images do not fit, only the first ones are shown.
            None means as many as are needed.
    """
    if not mounts:
        return Text("no lazyfs mount")
    above = [_heading(mount) for mount in mounts]
    below = [_below(mount, _ERRORS if height else None) for mount in mounts]
    if height is not None:
        for line in (line for part in [*above, *below] for line in part):
            line.no_wrap, line.overflow = True, "ellipsis"
    rows = None
    if height is not None:
        # A line for the names of columns, one for the sums, one for what is not shown, one between.
        used = sum(len(part) for part in [*above, *below])
        rows = max(_FEWEST, (height - used) // len(mounts) - 4)
    parts: list[RenderableType] = []
    for number, mount in enumerate(mounts):
        if number:
            parts.append(Text())
        parts += above[number]
        if mount.get("images"):
            parts.append(_table(mount, width, rows))
        elif "error" not in mount:
            parts.append(Text("  no images", style="dim"))
        parts += below[number]
    return Group(*parts)


# -- around the table


def _heading(mount: MountStatus) -> list[Text]:
    text = Text(one_line(mount["mountpoint"]), style="bold")
    text.append(f"  from {one_line(mount['repository'])}", style="not bold")
    if "error" in mount:
        return [text.append(f"  {one_line(mount['error'])}", style="red")]
    if mount.get("detached"):
        text.append(f"  detached, pid {mount['pid']} serves what is still open", style="yellow")
    text.append(
        "  connected" if mount["connected"] else "  not connected",
        style="green" if mount["connected"] else "red",
    )
    lines = [text]
    if mount.get("room"):
        lines.append(Text(f"  {_room(mount['room'])}", style="dim"))
    if options := _options(mount):
        lines.append(Text(f"  {options}", style="dim"))
    if mount.get("message"):
        lines.append(Text(f"  {one_line(mount['message'])}", style="red"))
    if mount.get("passthrough_trouble"):
        lines.append(
            Text(f"  no passthrough: {one_line(mount['passthrough_trouble'])}", style="dim")
        )
    return lines


def _room(room: Mapping[str, Any]) -> str:
    cache = f"cache {format_size(room['used'])}"
    if room.get("max_cache"):
        cache += f" of at most {format_size(room['max_cache'])}"
    free = f"disk {format_size(room['free'])} free of {format_size(room['total'])}"
    if room.get("min_free"):
        free += f", {format_size(room['min_free'])} kept free"
    return f"{cache}  {free}"


def _options(mount: MountStatus) -> str:
    """Return what was chosen, as options of `lazyfs mount`, and the rate that holds now."""
    words = []
    for name, value in mount.get("options", {}).items():
        if name in ("fill-rate", "max-cache", "min-free"):
            continue  # the rate may be another one now; the limits stand beside the room
        for one in value if isinstance(value, list) else [value]:
            said = f"{one:g}" if isinstance(one, float) else one_line(str(one))
            words.append(f"--{name}" if one is True else f"--{name} {said}")
    if mount.get("rate_limit"):
        words.insert(0, f"population at most {format_size(mount['rate_limit'])}/s")
    return "  ".join(words)


def _below(mount: MountStatus, most: int | None) -> list[Text]:
    """Return the errors of images, the jobs and the events. `most` limits the errors."""
    prefix = mount["mountpoint"].rstrip("/") + "/"
    wrong = [image for image in mount.get("images", []) if image["error"]]
    lines = [
        Text(
            f"  {one_line(image['path'].removeprefix(prefix))}: {one_line(image['error'])}",
            style="red",
        )
        for image in wrong[:most]
    ]
    if most is not None and len(wrong) > most:
        lines.append(Text(f"  and {len(wrong) - most} more with an error", style="red"))
    lines += [_job(job) for job in mount.get("jobs", []) if job["type"] != "populate"]
    return lines + [Text(f"  {one_line(line)}", style="dim") for line in mount.get("events", [])]


def _job(job: Mapping[str, Any]) -> Text:
    """Return the line for a job. Populate jobs are not shown so, but in their image's line."""
    done = (
        f" {_percent(job['current-progress'], job['total-progress'])} %"
        if job["status"] == "running"
        else ""
    )
    text = Text(f"  job {one_line(job['id'])}: {job['status']}{done}")
    return text.append(f", {one_line(job['error'])}", style="red") if job.get("error") else text


# -- the table


def _table(mount: MountStatus, width: int | None, most: int | None) -> Segments:
    """Return a line for each image, at most `most` of them, and one with the sums."""
    prefix = mount["mountpoint"].rstrip("/") + "/"
    jobs = progress.populate_jobs(mount)
    images = mount["images"]
    connected = mount["connected"]
    going = [progress.of_image(image, jobs.get(image["path"]), connected) for image in images]
    shown = images if most is None else images[:most]
    lines = [
        _line(image, how, prefix) for image, how in zip(shown, going[: len(shown)], strict=True)
    ]
    left = len(images) - len(shown)
    if left:
        lines.append(_Line(f"and {left} more", {}, _PLAIN))
    if len(images) > 1:
        lines.append(_sums(images, going))
    columns, widths = _layout(lines, width)
    name_width, cut = widths["image"], width is not None
    segments = [Segment(" " * _INDENT + _fitted("image", name_width, cut), _DIM)]
    segments += [Segment(_cell(column, column, widths[column]), _DIM) for column in columns]
    segments.append(Segment.line())
    for number, line in enumerate(lines):
        summed = len(images) > 1 and number == len(lines) - 1
        segments.append(
            Segment(" " * _INDENT + _fitted(line.name, name_width, cut), _BOLD if summed else None)
        )
        segments += [
            Segment(
                _cell(column, line.cells.get(column, ""), widths[column]),
                line.style if column == "state" else None,
            )
            for column in columns
        ]
        segments.append(Segment.line())
    return Segments(segments)


def _layout(lines: Sequence[_Line], width: int | None) -> tuple[list[str], dict[str, int]]:
    """Return the columns to show besides the name, and how wide each column is."""
    widths = {"image": max(cell_len(line.name) for line in lines)}
    widths["image"] = longest = max(widths["image"], len("image"))
    columns = []
    for column in _COLUMNS:
        texts = [len(line.cells.get(column, "")) for line in lines]
        if any(texts):  # a column in which nothing stands only takes room
            columns.append(column)
            widths[column] = max(*texts, len(column))
    if width is None:  # a longer name moves its line to the right
        widths["image"] = min(longest, _ALIGNED)
        return columns, widths

    def left_for_names() -> int:
        return width - _INDENT - sum(widths[column] + _GAP for column in columns)

    half = max(_ALIGNED // 2, width // 2)  # one long name must not cost all others their columns
    for wanted, removable in ((half, _LEFT_OUT_FOR_NAMES), (_SHORT_NAME, _LEFT_OUT)):
        for column in removable:
            if column in columns and left_for_names() < min(wanted, longest):
                columns.remove(column)
    widths["image"] = max(1, min(longest, left_for_names()))
    return columns, widths


def _cell(column: str, text: str, width: int) -> str:
    return " " * _GAP + (text.ljust(width) if column == "state" else text.rjust(width))


def _fitted(name: str, width: int, cut: bool) -> str:
    """Return the name with just this width. If `cut`, the middle of a longer name is left out."""
    if cell_len(name) <= width:
        return set_cell_size(name, width)
    if not cut:
        return name
    head = (width - 1) // 2
    tail = width - 1 - head
    return set_cell_size(f"{name[:head]}…{name[-tail:] if tail else ''}", width)


def _line(image: Mapping[str, Any], how: progress.Progress, prefix: str) -> _Line:
    size = image["size"]
    here = image["present_bytes"] + image["zero_bytes"]
    notes = [
        "replaced" if image.get("replaced") else "",
        "pinned" if image.get("pinned") else "",
        f"at most {format_size(image['rate_limit'])}/s" if image.get("rate_limit") else "",
    ]
    said = ", ".join(filter(None, notes))
    name = one_line(image["path"].removeprefix(prefix))
    return _Line(
        f"{name} ({said})" if said else name,
        {
            "size": "?" if size is None else format_size(size),
            "present": "" if image["state"] == "remote" else f"{_percent(here, size)} %",
            "state": image["state"],
            **_pace(how),
            "fetched": format_size(image["fetched_bytes"]) if image["fetched_bytes"] else "",
            "open": str(image["open_count"] or ""),
        },
        _STYLES.get(image["state"], _PLAIN),
    )


def _pace(how: progress.Progress) -> dict[str, str]:
    if not how.active:
        return {}
    to_go = how.to_go_s
    return {
        "rate": how.waits or (f"{format_size(round(how.rate))}/s" if how.missing else "finishing"),
        "to go": "" if to_go is None else format_duration(to_go),
    }


def _sums(images: Sequence[Mapping[str, Any]], going: Sequence[progress.Progress]) -> _Line:
    """Return the line with the sums over all images whose sizes are known.

    The time is that of the work that is under way or waits for its turn.
    """
    size = sum(image["size"] or 0 for image in images)
    here = sum(image["present_bytes"] + image["zero_bytes"] for image in images)
    fetched = sum(image["fetched_bytes"] for image in images)
    opened = sum(image["open_count"] for image in images)
    return _Line(
        f"{len(images)} images",
        {
            "size": format_size(size) if size else "",
            "present": f"{_percent(here, size)} %" if size else "",
            **_pace(progress.of_all(going)),
            "fetched": format_size(fetched) if fetched else "",
            "open": str(opened or ""),
        },
        _PLAIN,
    )


def _percent(here: int, size: int | None) -> int:
    """Return whole percents, rounded down, so that 100 means all of it."""
    return 100 if not size else here * 100 // size
