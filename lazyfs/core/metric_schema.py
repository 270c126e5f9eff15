"""Defines every metric that `lazyfs mount --metrics` exports: its name, kind, labels and their
values.

This is the only authority: `metrics.py` exports exactly these, tools/make-docs makes doc/METRICS.md
from it, and a test compares the expressions of tools/grafana-dashboard.json with it. No label has
values whose number grows with the number of images. Thousands of images would otherwise be
thousands of time series in every Prometheus that scrapes them.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """Describes one metric, as Prometheus has it."""

    name: str
    """The full name, including the `_total` of a counter."""
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    """The possible values of its only label, and what they mean. {} if they cannot be listed."""

    @property
    def samples(self) -> tuple[str, ...]:
        """The names of its time series."""
        if self.kind == HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "count", "sum"))
        return (self.name,)


METRICS = (
    Metric(
        "lazyfs_mount_info",
        GAUGE,
        "Always 1. The labels say which mount this is, and the version of lazyfs.",
        ("mountpoint", "version"),
    ),
    Metric(
        "lazyfs_bytes_total",
        COUNTER,
        "Bytes of images that were fetched, or that the repository reported as zeroes.",
        ("kind",),
        {
            "demand": (
                "fetched because a reader waited, including readahead and what is fetched around "
                "a read"
            ),
            "population": "fetched in the background",
            "zero": "reported as zeroes by the repository, and not fetched",
            "sample": "fetched to compare the cache with the repository, and not kept",
        },
    ),
    Metric(
        "lazyfs_requests_total",
        COUNTER,
        "Read requests to the repository. A request that is sent again after a lost connection "
        "counts once.",
        ("kind",),
        {
            "demand": "sent because a reader waited",
            "population": "sent in the background",
            "sample": "sent to compare the cache with the repository",
        },
    ),
    Metric(
        "lazyfs_read_seconds",
        HISTOGRAM,
        "Time that reads took in the daemon. It does not see reads that the kernel answers (page "
        "cache, passthrough).",
        ("served",),
        {
            "present": "the whole range was in the cache",
            "joined": "it waited only for requests of other readers or of population",
            "fetched": "at least one request was sent for it",
            "failed": "the read failed",
        },
    ),
    Metric(
        "lazyfs_opens_total",
        COUNTER,
        "Opens of images, by who serves the reads.",
        ("served",),
        {"daemon": "the daemon", "passthrough": "the kernel by itself, as the image was whole"},
    ),
    Metric(
        "lazyfs_errors_total",
        COUNTER,
        "Failures, by what failed. A read waits and tries again as long as --io-timeout allows "
        "before it counts here.",
        ("operation",),
        {
            "read": "a read of an image",
            "open": "an open of an image",
            "population": "a turn of population; the image waits, and is tried again",
            "write": "a write to the cache; readers got the bytes, and they were not kept",
            "checkpoint": "a checkpoint; it is repeated",
            "log": "a line of the log, dropped because the log could not be written in time",
            "connect": (
                "a connection that could not be made, or was lost while an image was populated"
            ),
        },
    ),
    Metric(
        "lazyfs_queue_length",
        GAUGE,
        "Length of queues, by what waits.",
        ("queue",),
        {
            "readers": "reads that wait for the repository",
            "population": "images that wait for a turn of population",
            "threads": "operations on files of the cache that wait for a thread",
        },
    ),
    Metric(
        "lazyfs_images",
        GAUGE,
        "Images of the mount, by state.",
        ("state",),
        {
            "remote": "nothing is cached",
            "partial": "opened or prefetched, and not whole yet",
            "whole": "nothing is missing: a plain file",
            "failed": "missing ranges are not fetched any more; `lazyfs status` says why",
        },
    ),
    Metric("lazyfs_open_images", GAUGE, "Images that somebody has open, including replaced ones."),
    Metric("lazyfs_filling_images", GAUGE, "Images that population works on at this moment."),
    Metric(
        "lazyfs_present_bytes",
        GAUGE,
        "Bytes of data in the cache, without maps and other metadata.",
    ),
    Metric("lazyfs_room_size_bytes", GAUGE, "Size of the file system that the cache is on."),
    Metric(
        "lazyfs_room_free_bytes",
        GAUGE,
        "Bytes of that file system that are free for an ordinary user.",
    ),
    Metric(
        "lazyfs_room_used_bytes",
        GAUGE,
        "Bytes of it that the cache takes, including maps, and files that are open and evicted.",
    ),
    Metric(
        "lazyfs_room_max_cache_bytes",
        GAUGE,
        "Bytes that the cache may take (--max-cache); 0 for no limit.",
    ),
    Metric(
        "lazyfs_room_min_free_bytes",
        GAUGE,
        "Bytes that must stay free on it (--min-free); 0 for no limit.",
    ),
    Metric(
        "lazyfs_room_short",
        GAUGE,
        "1 while there is no room: population pauses, and what is read is perhaps not kept. "
        "Otherwise 0.",
    ),
    Metric(
        "lazyfs_repository_connected",
        GAUGE,
        "1 if the latest attempt to reach the repository succeeded, otherwise 0.",
    ),
    Metric(
        "lazyfs_reconnects_total",
        COUNTER,
        "Number of times that the repository was back after it was lost.",
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}


def document() -> str:
    """Return doc/METRICS.md."""
    return "\n".join([_INTRODUCTION, *(_describe(metric) for metric in METRICS)])


_INTRODUCTION = """# Metrics

<!-- Made from lazyfs/core/metric_schema.py by tools/make-docs. -->

`lazyfs mount --metrics 9100` serves the metrics of that mount to Prometheus, at
http://127.0.0.1:9100/metrics. Without `--metrics` there are none.

- `--metrics ADDRESS:PORT` listens on another address: `[::1]:9100`, or `0.0.0.0:9100` for everybody
  who can reach the host.
- There is no password. Whoever reaches the port can read the metrics: with a port alone, every user
  of the host. They name the mountpoint, and no image.
- Only GET and HEAD of /metrics are answered. On a loopback address the Host header must be an
  address or `localhost`, so that no page in a browser of the host can read them under another name.
- Port 0 takes a free port. The log and `query-mount` say which one.
- After `lazyfs detach` the port is closed.

For Prometheus:

    scrape_configs:
      - job_name: lazyfs
        static_configs: [{targets: ["localhost:9100"]}]

`tools/grafana-dashboard.json` is a dashboard to import into Grafana.

Counters and histograms begin at zero when the daemon starts. They never fall while it runs, even if
images are evicted or replaced. No metric has a label for each image, as there can be thousands of
images; `lazyfs status --json` has the numbers of each image.
"""

WIDTH = 100
"""Columns of the document, except for tables."""


def _describe(metric: Metric) -> str:
    labels = f", by {' and '.join(f'`{name}`' for name in metric.labels)}" if metric.labels else ""
    text = textwrap.fill(
        f"{metric.kind.capitalize()}{labels}. {metric.help}", WIDTH, break_on_hyphens=False
    )
    lines = [f"## {metric.name}\n", f"{text}\n"]
    if metric.values:
        lines += [f"| {metric.labels[0]} | |", "|---|---|"]
        lines += [f"| `{value}` | {meaning} |" for value, meaning in metric.values.items()]
        lines.append("")
    return "\n".join(lines)
