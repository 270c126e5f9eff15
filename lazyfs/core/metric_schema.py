"""Every metric that `lazyfs mount --metrics` exports: its name, its kind, its labels and what they may be.

The one authority: `metrics.py` exports these and no others, doc/METRICS.md is made from it (tools/make-docs), and the
expressions of tools/grafana-dashboard.json are compared with it. No label has values that grow with the images:
thousands of images would be thousands of time series in every Prometheus that looks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, as Prometheus has it."""

    name: str
    """In full, with the `_total` of a counter."""
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    """Of its only label: what it may be, and what that means. {} if nobody can list it."""

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
        "Always 1; its labels say which mount this is, and the version of lazyfs.",
        ("mountpoint", "version"),
    ),
    Metric(
        "lazyfs_bytes_total",
        COUNTER,
        "Bytes of images that came to be known, by how.",
        ("kind",),
        {
            "demand": "fetched because a reader waited, with what is read ahead and around",
            "population": "fetched in the background",
            "zero": "known to be zeroes, and never fetched",
        },
    ),
    Metric(
        "lazyfs_requests_total",
        COUNTER,
        "Read requests for the repository; one that is sent again after a lost connection counts once.",
        ("kind",),
        {"demand": "because a reader waited", "population": "in the background"},
    ),
    Metric(
        "lazyfs_read_seconds",
        HISTOGRAM,
        "Time that reads took in the daemon. It does not see those that the kernel answers (page cache, passthrough).",
        ("served",),
        {
            "present": "all of it was in the cache",
            "joined": "it waited for requests of other readers, or of population, alone",
            "fetched": "the repository was asked on its account",
            "failed": "it failed",
        },
    ),
    Metric(
        "lazyfs_opens_total",
        COUNTER,
        "Opens of images, by who serves their reads.",
        ("served",),
        {"daemon": "the daemon", "passthrough": "the kernel by itself: the image was whole"},
    ),
    Metric(
        "lazyfs_errors_total",
        COUNTER,
        "What failed. Reads wait and try again for as long as --io-timeout allows before they count here.",
        ("operation",),
        {
            "read": "a read of an image",
            "open": "an open of an image",
            "population": "a turn of population: the image waits, and is tried again",
            "write": "a write to the cache: the bytes went to their readers and were not kept",
            "checkpoint": "a checkpoint: it is repeated",
            "connect": "a connection that could not be made, or was lost while an image was filled",
        },
    ),
    Metric(
        "lazyfs_queue_length",
        GAUGE,
        "What waits.",
        ("queue",),
        {
            "readers": "reads, for the repository",
            "population": "images, for a turn of population",
            "threads": "calls of the cache's files, for a thread",
        },
    ),
    Metric(
        "lazyfs_images",
        GAUGE,
        "Images of the mount, by state.",
        ("state",),
        {
            "remote": "nothing is cached",
            "partial": "being filled, or waiting for it",
            "whole": "a plain file",
            "failed": "nothing is fetched any more: `lazyfs status` says why",
        },
    ),
    Metric("lazyfs_open_images", GAUGE, "Images that somebody has open, replaced ones included."),
    Metric("lazyfs_filling_images", GAUGE, "Images that population works on just now."),
    Metric("lazyfs_present_bytes", GAUGE, "Data of images in the cache, without maps and other metadata."),
    Metric("lazyfs_room_size_bytes", GAUGE, "Size of the file system that the cache is on."),
    Metric("lazyfs_room_free_bytes", GAUGE, "What of it an ordinary user may still take."),
    Metric(
        "lazyfs_room_used_bytes",
        GAUGE,
        "What the cache takes of it, maps and files that are open and evicted included.",
    ),
    Metric("lazyfs_room_max_cache_bytes", GAUGE, "What it may take (--max-cache); 0 for no limit."),
    Metric("lazyfs_room_min_free_bytes", GAUGE, "What must stay free there (--min-free); 0 for no limit."),
    Metric(
        "lazyfs_room_short", GAUGE, "1 while there is no room: population pauses, and what is read may not be kept."
    ),
    Metric("lazyfs_repository_connected", GAUGE, "1 if the latest attempt to reach the repository succeeded."),
    Metric("lazyfs_reconnects_total", COUNTER, "Times that the repository was back after a loss."),
)

BY_NAME = {metric.name: metric for metric in METRICS}


def document() -> str:
    """Return doc/METRICS.md."""
    return "\n".join([_INTRODUCTION, *(_describe(metric) for metric in METRICS)])


_INTRODUCTION = """# Metrics

<!-- Made from lazyfs/core/metric_schema.py by tools/make-docs; tests/unit/test_metric_schema.py compares. -->

`lazyfs mount --metrics 9100` serves the metrics of that mount to Prometheus on http://127.0.0.1:9100/metrics;
`--metrics ADDRESS:PORT` elsewhere: `[::1]:9100`, or `0.0.0.0:9100` for everybody who can reach the host. There is no
password: whoever reaches the port reads the metrics, which name the mountpoint and no image. Port 0 takes a free one,
which the log and `query-mount` tell. Off by default. After `lazyfs detach` the port is closed.

    scrape_configs:
      - job_name: lazyfs
        static_configs: [{targets: ["localhost:9100"]}]

Counters and histograms begin at zero with each daemon and never fall while it lives, whatever is evicted or replaced.
No metric has a label for each image, as there may be thousands; `lazyfs status --json` has those numbers.
`tools/grafana-dashboard.json` is a dashboard to import into Grafana.
"""


def _describe(metric: Metric) -> str:
    labels = f", by {' and '.join(f'`{name}`' for name in metric.labels)}" if metric.labels else ""
    lines = [f"## {metric.name}\n", f"{metric.kind.capitalize()}{labels}. {metric.help}\n"]
    if metric.values:
        lines += [f"| {metric.labels[0]} | |", "|---|---|"]
        lines += [f"| `{value}` | {meaning} |" for value, meaning in metric.values.items()]
        lines.append("")
    return "\n".join(lines)
