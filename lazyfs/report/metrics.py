"""Gives the numbers of a mount to Prometheus.

The numbers come from the `statistics()` of the engine, and their names from
`core/metric_schema.py`.

prometheus_client only writes the text (names, escaping, versions of the format). It holds no
numbers, because its own counters are global and cost a lock for each read. `Collector` takes a
`Picture` at each scrape and keeps none.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import trio
from prometheus_client import core

import lazyfs
from lazyfs.core import metric_schema
from lazyfs.core.histogram import HistogramStatistics
from lazyfs.core.lifecycle import State
from lazyfs.engine import totals
from lazyfs.engine.filesystem import Filesystem
from lazyfs.engine.interfaces import RepositoryStatistics
from lazyfs.engine.population import Population
from lazyfs.engine.room import Room
from lazyfs.engine.slices import slices
from lazyfs.kernel.passthrough import Backings


@dataclass(frozen=True, slots=True)
class Picture:
    """Holds the values of all metrics at one moment.

    The values are by the metric's name and then by the value of its label. The key is a tuple if
    a metric has several labels, and "" if it has none.
    """

    values: Mapping[str, Mapping[str | tuple[str, ...], float]]
    histograms: Mapping[str, Mapping[str, HistogramStatistics]]


@dataclass(frozen=True, slots=True)
class Mount:
    """Holds the objects from which the numbers of one mount come."""

    mountpoint: str
    filesystem: Filesystem
    population: Population
    repository: Callable[[], RepositoryStatistics]
    backings: Backings
    room: Room
    dropped_log_lines: Callable[[], int] = lambda: 0
    """Returns how many lines did not fit into a log that blocks."""

    async def picture(self) -> Picture:
        """Return all numbers as of now.

        Only the trio thread may call this. Images are counted in slices, so a few may change
        their states meanwhile: 100,000 take 40 ms, and readers come between.
        """
        images = list(self.filesystem.names.images())
        states: Counter[str] = Counter()
        present_bytes = 0
        for some in slices(images):
            states.update(image.record.state.value for image in some)
            present_bytes += sum(image.present_bytes for image in some)
            await trio.lowlevel.checkpoint()
        sums, population, repository = (
            self.filesystem.totals.statistics(), self.population.statistics(), self.repository()
        )  # fmt: skip
        room = self.room.statistics()
        # A mountpoint can contain any bytes, but the text must be UTF-8.
        mountpoint = self.mountpoint.encode("utf-8", "backslashreplace").decode()
        values: dict[str, dict[str | tuple[str, ...], float]] = {
            "lazyfs_mount_info": {(mountpoint, lazyfs.__version__): 1},
            "lazyfs_bytes_total": {
                "demand": sums.sums[totals.DEMAND_BYTES],
                "population": sums.sums[totals.POPULATED_BYTES],
                "zero": sums.sums[totals.ZERO_BYTES],
                "sample": sums.sums[totals.SAMPLED_BYTES],
            },
            "lazyfs_requests_total": {
                "demand": sums.sums[totals.DEMAND_REQUESTS],
                "population": sums.sums[totals.POPULATION_REQUESTS],
                "sample": sums.sums[totals.SAMPLE_REQUESTS],
            },
            "lazyfs_opens_total": {
                "daemon": sums.opens - self.backings.opens,
                "passthrough": self.backings.opens,
            },
            "lazyfs_errors_total": {
                "read": sums.reads[totals.FAILED].count,
                "open": sums.errors[totals.OPEN],
                "write": sums.errors[totals.WRITE],
                "checkpoint": sums.errors[totals.CHECKPOINT],
                "population": population.failures,
                "connect": repository.failures,
                "log": self.dropped_log_lines(),
            },
            "lazyfs_queue_length": {
                "readers": sums.waiting,
                "population": population.waiting,
                "threads": trio.to_thread.current_default_thread_limiter()
                .statistics()
                .tasks_waiting,
            },
            "lazyfs_images": {state.value: states[state.value] for state in State},
            "lazyfs_open_images": {"": len(self.filesystem.open_images())},
            "lazyfs_filling_images": {"": population.working},
            "lazyfs_present_bytes": {"": present_bytes},
            "lazyfs_room_size_bytes": {"": room.total},
            "lazyfs_room_used_bytes": {"": room.used},
            "lazyfs_room_max_cache_bytes": {"": room.max_cache or 0},
            "lazyfs_room_min_free_bytes": {"": room.min_free or 0},
            "lazyfs_room_free_bytes": {"": room.free},
            "lazyfs_room_short": {"": population.paused or room.message != ""},
            "lazyfs_repository_connected": {"": repository.connected},
            "lazyfs_reconnects_total": {"": repository.reconnects},
        }
        return Picture(values, {"lazyfs_read_seconds": sums.reads})


class Collector:
    """Implements a collector of prometheus_client."""

    def __init__(self, picture: Callable[[], Picture]) -> None:
        """`picture` is called at each scrape, in the scrape's thread."""
        self._picture = picture

    def describe(self) -> Iterable[core.Metric]:
        """Return every metric of the schema without numbers.

        prometheus_client needs this so that a scrape can choose some metrics (`name[]=`).
        """
        return [_family(metric) for metric in metric_schema.METRICS]

    def collect(self) -> Iterable[core.Metric]:
        """Yield every metric of the schema with its numbers."""
        picture = self._picture()
        for metric in metric_schema.METRICS:
            family = _family(metric)
            if isinstance(family, core.HistogramMetricFamily):
                for value, histogram in picture.histograms[metric.name].items():
                    family.add_metric((value,), _buckets(histogram), histogram.total)
            else:
                for key, number in picture.values[metric.name].items():
                    family.add_metric(
                        key if isinstance(key, tuple) else (key,) if metric.labels else (), number
                    )
            yield family


_Family: TypeAlias = core.CounterMetricFamily | core.GaugeMetricFamily | core.HistogramMetricFamily


def _family(metric: metric_schema.Metric) -> _Family:
    if metric.kind == metric_schema.HISTOGRAM:
        return core.HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    made = (
        core.CounterMetricFamily if metric.kind == metric_schema.COUNTER else core.GaugeMetricFamily
    )
    return made(metric.name, metric.help, labels=metric.labels)


def _buckets(histogram: HistogramStatistics) -> list[tuple[str, float]]:
    """Return each upper bound, and the number of observations that do not exceed it.

    Prometheus requires cumulative counts.
    """
    sums = itertools.accumulate(histogram.counts)
    return [
        (str(bound), below) for bound, below in zip([*histogram.bounds, "+Inf"], sums, strict=True)
    ]
