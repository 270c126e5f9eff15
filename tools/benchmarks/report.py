"""Reports the results: prints the environment and the table, and writes JSON and PNG."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import link
from benchmarks.measure import LAZYFS, Outcome
from benchmarks.processes import run


def environment(folder: Path) -> dict[str, str]:
    """Return what the figures depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {
        "lazyfs": revision.stdout.strip() or "not in a git checkout",
        "kernel": platform.release(),
        "CPU": f"{os.cpu_count()} x {cpu}",
        "memory": f"{memory:.0f} GiB",
        "file system": run("stat", "-f", "-c", "%T", folder).strip(),
        "python": platform.python_version(),
        "libnbd": run("nbdcopy", "--version").split("\n")[0].removeprefix("nbdcopy "),
        "links": link.described(),
        "nbdkit": run("nbdkit", "--version").strip().removeprefix("nbdkit "),
        "qemu": run("qemu-img", "--version").split("\n")[0].removeprefix("qemu-img version "),
        "fio": run("fio", "--version").strip().removeprefix("fio-"),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("row", overflow="fold")
    table.add_column("who")
    for name in ("median", "spread", "lazyfs / it"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("to reach", no_wrap=True)
    for outcome in outcomes:
        _add(table, outcome)
    console.print(table)


def _add(table: Table, outcome: Outcome) -> None:
    row = outcome.row
    table.add_row(f"[bold]{row.name}[/]: {row.title}", "", "", "", "", "", end_section=False)
    if outcome.error:
        table.add_row("", f"[red]failed: {outcome.error}[/]", "", "", "", "")
        return
    targets = {target.peer: target for target in row.targets}
    for name, samples in outcome.samples.items():
        target = targets.get("" if name == LAZYFS else name)
        mark = ""
        if target is not None:
            reached = target.reached(outcome.against(target))
            mark = f"{target} [{'green]reached' if reached else 'red]behind'}[/]"
        ratio = "" if name == LAZYFS else f"{statistics.median(outcome.ratios(name)):.2f}"
        spread = f"{_figure(min(samples))} .. {_figure(max(samples))}"
        table.add_row("", name, f"{_figure(outcome.median(name))} {row.unit}", spread, ratio, mark)
    for line in outcome.notes.lines:
        table.add_row("", f"[dim]{line}[/]", "", "", "", "")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_json(path: Path, found: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """Write everything, including each sample."""
    content = {"environment": dict(found), "rows": [outcome.as_json() for outcome in outcomes]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw the ratios, and the time series of each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    bars = [
        (f"{o.row.name} / {t.peer}", o.against(t), t)
        for o in outcomes
        if not o.error
        for t in o.row.targets
        if t.peer
    ]
    if bars:
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * len(bars)))
        for position, (_, value, target) in enumerate(bars):
            limit = target.at_most if target.at_most is not None else target.at_least
            axes.barh(position, value, color="tab:green" if target.reached(value) else "tab:red")
            axes.plot([limit, limit], [position - 0.4, position + 0.4], color="black")
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.set_xlabel("lazyfs / peer; the black line is to be reached")
        figure.tight_layout()
        figure.savefig(folder / "ratios.png", dpi=100)
        pyplot.close(figure)
    for outcome in outcomes:
        series = outcome.notes.series
        if not series:
            continue
        figure, axes = pyplot.subplots(
            len(series), 1, sharex=True, figsize=(9, 3 * len(series)), squeeze=False
        )
        for (name, points), one in zip(series.items(), axes[:, 0], strict=True):
            one.plot(
                [at for at, _ in points], [value for _, value in points], marker=".", linewidth=0.8
            )
            one.set_ylabel(name)
        axes[-1, 0].set_xlabel("s")
        figure.suptitle(outcome.row.title)
        figure.tight_layout()
        figure.savefig(folder / f"{outcome.row.name}.png", dpi=100)
        pyplot.close(figure)
