"""What `lazyfs status` draws, for terminals of all widths."""

import io
from typing import Any

import pytest
from rich.console import Console

from lazyfs.cli import map_view, status_view, watching

MiB = 1 << 20


def image(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "path": f"/mnt/{name}", "size": 100 * MiB, "state": "partial", "present_bytes": 40 * MiB,
        "zero_bytes": 10 * MiB, "fetched_bytes": 40 * MiB, "open_count": 1, "replaced": False, "fill_rate": 0.0,
        "error": "",
    } | changes  # fmt: skip


def mount(*images: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "mountpoint": "/mnt", "repository": "nbd://far", "connected": True, "images": list(images), "jobs": [],
    } | changes  # fmt: skip


def job(name: str, status: str, kind: str = "populate", **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "type": kind,
        "status": status,
        "current-progress": 30,
        "total-progress": 120,
    } | changes


def drawn(*mounts: dict[str, Any], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(status_view.render(mounts, width))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max((len(line.rstrip()) for line in text.splitlines()), default=0) <= width
    return text


def line_of(text: str, what: str) -> str:
    [line] = [line for line in text.splitlines() if what in line]
    return line


def test_nothing_is_mounted() -> None:
    assert drawn() == "no lazyfs mount\n"
    assert "no images" in drawn(mount())


@pytest.mark.parametrize("status", ["paused", "standby"])
def test_a_job_that_does_not_run_is_seen_in_its_images_line(status: str) -> None:
    text = drawn(
        mount(image("one"), image("team/two", fill_rate=2.0 * MiB), jobs=[job("team/two", status)])
    )
    assert status not in line_of(text, "one ")
    if status == "paused":
        assert "paused" in line_of(text, "team/two")
        assert "MiB/s" not in line_of(text, "team/two")
    else:
        assert "2 MiB/s" in line_of(text, "team/two"), "the repository came back"
    assert "job" not in text


def test_a_job_that_runs_is_a_rate() -> None:
    text = drawn(mount(image("one", fill_rate=2.0 * MiB), jobs=[job("one", "running")]))
    assert "2 MiB/s" in text
    assert "running" not in text
    assert "standby" in drawn(mount(image("one"), jobs=[job("one", "standby")]))


def test_other_jobs_have_a_line() -> None:
    jobs = [
        job("verify:one", "running", "verify"),
        job("verify:two", "concluded", "verify", error="the cache is damaged: bytes 0 to 5"),
        job("verify:three", "concluded", "verify"),
    ]
    lines = drawn(mount(image("one"), jobs=jobs)).splitlines()
    assert lines[-3:] == [
        "  job verify:one: running 25 %",
        "  job verify:two: concluded, the cache is damaged: bytes 0 to 5",
        "  job verify:three: concluded",
    ]


def test_room() -> None:
    room = {
        "total": 100 * MiB,
        "free": 25 * MiB,
        "used": 3 * MiB,
        "max_cache": None,
        "min_free": None,
        "message": "",
    }
    assert "\n  cache 3 MiB  disk 25 MiB free of 100 MiB\n" in drawn(mount(room=room))
    room |= {"max_cache": 50 * MiB, "min_free": 10 * MiB}
    assert "cache 3 MiB of at most 50 MiB  disk 25 MiB free of 100 MiB, 10 MiB kept free" in drawn(
        mount(room=room)
    )


def test_events_come_last() -> None:
    text = drawn(
        mount(image("one"), events=["12:00:01 one: whole", "12:00:02 job one: gone\x1b[2J"])
    )
    assert text.splitlines()[-2:] == [
        "  12:00:01 one: whole",
        "  12:00:02 job one: gone\N{REPLACEMENT CHARACTER}[2J",
    ]


@pytest.mark.parametrize("width", [20, 40, 80, 99, 100, 200])
def test_every_width(width: int) -> None:
    room = {
        "total": 100 * MiB,
        "free": 25 * MiB,
        "used": 3 * MiB,
        "max_cache": 50 * MiB,
        "min_free": 1,
        "message": "",
    }
    text = drawn(
        mount(
            image("a-rather-long-name-of-an-image/of-some-team/debian-12-generic-amd64"),
            image("two", size=None, state="remote", present_bytes=0, zero_bytes=0),
            jobs=[job("two", "paused"), job("verify:two", "running", "verify")],
            events=["12:00:01 two: partial"],
            room=room,
        ),
        width=width,
    )
    if width >= 80:
        assert "verify:two: running 25 %" in text


def test_a_daemon_without_jobs_and_room_is_shown() -> None:
    one = mount(image("one"))
    del one["jobs"]
    assert "one" in drawn(one)


# -- events


def event(name: str, **data: str) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 1_700_000_000, "microseconds": 0}}


def test_events_in_words() -> None:
    for made, words in (
        (event("JOB_STATUS_CHANGE", id="one", status="paused"), "job one: paused"),
        (event("JOB_STATUS_CHANGE", id="one", status="null"), "job one: gone"),
        (event("IMAGE_STATE_CHANGE", path="one", state="whole", error=""), "one: whole"),
        (event("IMAGE_STATE_CHANGE", path="one", state="failed", error="why"), "one: failed, why"),
    ):
        at, _, rest = watching.describe(made).partition(" ")
        assert rest == words
        assert len(at) == len("12:00:00")


# -- the map


def entry(start: int, length: int, kind: str) -> dict[str, Any]:
    return {"start": start, "length": length, "present": kind != "missing", "zero": kind == "zero",
            "data": kind == "data"}  # fmt: skip


@pytest.mark.parametrize("width", [1, 2, 7, 80, 1000])
def test_a_strip_is_as_wide_as_the_terminal(width: int) -> None:
    cells = map_view.strip(
        [entry(0, 50, "data"), entry(50, 25, "zero"), entry(75, 25, "missing")], width
    )
    assert len(cells) == width
    if width >= 7:
        assert (cells[0], cells[-1], cells[width * 6 // 10]) == ("data", "missing", "zero")
        assert [cell for i, cell in enumerate(cells) if not i or cells[i - 1] != cell][:2] == [
            "data",
            "zero",
        ]


def test_what_a_cell_shows_of_a_mixture() -> None:
    assert map_view.strip([entry(0, 1, "data"), entry(1, 99, "missing")], 1) == ["some"]
    assert map_view.strip([entry(0, 1, "zero"), entry(1, 99, "missing")], 1) == ["some"]
    assert map_view.strip([entry(0, 1, "data"), entry(1, 99, "zero")], 1) == ["data"]
    assert map_view.strip([], 80) == []


def test_a_byte_is_as_wide_as_it_must_be() -> None:
    assert (
        map_view.strip([entry(0, 1, "data"), entry(1, 1, "missing")], 6)
        == ["data"] * 3 + ["missing"] * 3
    )


def test_the_last_row_has_the_sums_of_the_work_under_way() -> None:
    text = drawn(
        mount(
            image("one", fill_rate=5.0 * MiB),
            image("two", fill_rate=5.0 * MiB, pinned=True),
            image("three", state="whole", present_bytes=100 * MiB, zero_bytes=0),
        )
    )
    assert "two (pinned)" in text
    total = line_of(text, "3 images")
    assert "200 MiB" in total  # of what is being filled
    assert "10 MiB/s" in total
    assert "10 s" in total
    assert "images" not in drawn(mount(image("one")))
