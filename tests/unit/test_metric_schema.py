"""The metrics, their document and the dashboard say the same."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.core import metric_schema
from lazyfs.core.metric_schema import COUNTER, METRICS

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "tools" / "grafana-dashboard.json").read_text())
SAMPLES = {sample: metric for metric in METRICS for sample in metric.samples}
LABELS = re.compile(r"(?:by \(([\w, ]*)\))|(?:\{\{(\w+)\}\})|(\w+)=~?\"")


def expressions(node: Any = DASHBOARD) -> Iterator[str]:
    """Return every query that the dashboard sends to Prometheus."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list):
            yield from expressions(value)
        elif key in ("expr", "definition") or (key == "query" and "(" in value):
            yield value


def test_the_document_is_made_from_the_schema() -> None:
    # run tools/make-docs
    assert (ROOT / "doc" / "METRICS.md").read_text() == metric_schema.document()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_follows_the_conventions_of_prometheus(metric: metric_schema.Metric) -> None:
    assert re.fullmatch(r"lazyfs_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == COUNTER)
    assert metric.help.endswith(".")
    assert not metric.values or len(metric.labels) == 1
    assert metric.values or not metric.labels or metric.name.endswith("_info"), (
        "a label whose values nobody can list"
    )


def test_the_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_the_dashboard_asks_for_metrics_that_exist(expression: str) -> None:
    names = set(re.findall(r"\blazyfs_\w+", expression))
    assert names
    assert names <= SAMPLES.keys()
    for name in names:  # a gauge has no rate, and of a counter nothing else tells anything
        rated = re.search(rf"(rate|increase)\({name}\b", expression) is not None
        assert rated == (SAMPLES[name].kind not in (metric_schema.GAUGE,))


def test_the_dashboard_groups_by_labels_that_exist() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (name,) = set(re.findall(r"\blazyfs_\w+", target["expr"]))
            known = {*SAMPLES[name].labels, "instance"} | (
                {"le"} if name.endswith("_bucket") else set()
            )
            for by, legend, selected in LABELS.findall(target["expr"] + target["legendFormat"]):
                assert {
                    *filter(None, by.split(", ")),
                    *filter(None, (legend, selected)),
                } <= known, panel["title"]


def test_every_metric_is_on_the_dashboard() -> None:
    asked = " ".join(expressions())
    assert [
        m.name for m in METRICS if not any(re.search(rf"\b{s}\b", asked) for s in m.samples)
    ] == []


def test_the_dashboard_can_be_imported() -> None:
    """The file has what Grafana requires, and works with any data source."""
    assert DASHBOARD["schemaVersion"] >= 39
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        where = panel["gridPos"]
        cells = {
            (where["x"] + i, where["y"] + j) for i in range(where["w"]) for j in range(where["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another"
        assert max(x for x, _ in cells) < 24
        taken |= cells
