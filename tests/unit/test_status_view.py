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


def drawn(*mounts: dict[str, Any], width: int = 120, height: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(status_view.render(mounts, width, height))
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


@pytest.mark.parametrize(
    ("waits_for", "words"),
    [
        ("resume", "paused"),
        ("repository", "not connected"),
        ("retry", "tries again"),
        ("room", "no room"),
        ("turn", "waits"),
    ],
)
def test_what_an_image_waits_for_is_said_instead_of_a_rate_and_a_time(
    waits_for: str, words: str
) -> None:
    text = drawn(
        mount(
            image("one"),
            image("team/two", fill_rate=2.0 * MiB),
            jobs=[job("team/two", "standby", waits_for=waits_for)],
        )
    )
    assert line_of(text, "one ").split()[-1] == "1", "no job: neither a rate nor a reason"
    assert words in line_of(text, "team/two")
    assert "MiB/s" not in text
    assert "job" not in text


def test_a_job_that_runs_is_a_rate_and_a_time() -> None:
    text = drawn(mount(image("one", fill_rate=2.0 * MiB), jobs=[job("one", "running")]))
    assert " 2 MiB/s   25 s" in text
    assert "running" not in text
    assert "0 B/s" in drawn(mount(image("one"), jobs=[job("one", "running")]))


def test_a_job_whose_image_is_all_here_is_about_to_end() -> None:
    here = image("one", present_bytes=90 * MiB)
    assert "finishing" in drawn(mount(here, jobs=[job("one", "running")]))


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
        "  12:00:02 job one: gone\\x1b[2J",
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


def test_the_last_row_has_the_sums_and_the_time_of_the_work() -> None:
    text = drawn(
        mount(
            image("one", fill_rate=5.0 * MiB),
            image("two", fill_rate=5.0 * MiB, pinned=True),
            image("three", state="whole", present_bytes=100 * MiB, zero_bytes=0),
            image("four"),
            image("five", rate_limit=3 * MiB),
            jobs=[
                job("one", "running"),
                job("two", "running"),
                job("four", "running", waits_for="turn"),
                job("five", "paused", waits_for="resume"),
            ],
        )
    )
    assert "two (pinned)" in text
    assert "five (at most 3 MiB/s)" in text
    total = line_of(text, "5 images")
    assert total.split()[2:] == [
        "500",
        "MiB",
        "60",
        "%",
        "10",
        "MiB/s",
        "15",
        "s",
        "200",
        "MiB",
        "5",
    ]
    assert "images" not in drawn(mount(image("one")))


def test_all_that_wait_for_the_same_say_so_together() -> None:
    jobs = [job(name, "standby", waits_for="room") for name in ("one", "two")]
    assert "no room" in line_of(drawn(mount(image("one"), image("two"), jobs=jobs)), "2 images")


def test_eighty_columns_have_one_line_for_each_image_and_whole_names() -> None:
    names = ["debian-12-generic-amd64-20260101-daily", "team/ubuntu-24.04-server-cloudimg"]
    images = [image(name, fill_rate=5.0 * MiB) for name in names]
    jobs = [job(name, "running") for name in names]
    text = drawn(mount(*images, jobs=jobs), width=80)
    assert len(text.splitlines()) == 5  # the mount, the names of columns, two images, the sums
    for name in names:
        line = line_of(text, name)
        assert "50 %" in line
        assert "5 MiB/s" in line
        assert "10 s" in line


def test_a_name_is_cut_only_when_all_columns_are_gone_that_can_be_spared() -> None:
    name = "a-rather-long-name-of-an-image/of-some-team/debian-12-generic-amd64"
    text = drawn(mount(image(name)), width=60)
    assert "partial" in text
    assert "a-rather" in text
    assert "…" in text
    assert "amd64 " in text
    assert name in drawn(mount(image(name)), width=140)


def test_one_long_name_costs_the_others_no_columns() -> None:
    text = drawn(mount(image("x" * 200), image("debian-12")), width=100)
    for column in ("size", "present", "state", "fetched", "open"):
        assert column in text.splitlines()[1]
    assert "40 MiB" in line_of(text, "debian-12")


def test_rows_say_what_the_heading_says_of_the_repository() -> None:
    text = drawn(
        mount(image("one", fill_rate=5.0 * MiB), jobs=[job("one", "running")], connected=False)
    )
    assert "not connected" in line_of(text, "one ")
    assert "MiB/s" not in text


def test_reasons_that_differ_are_said_together() -> None:
    jobs = [job("one", "standby", waits_for="room"), job("two", "paused", waits_for="resume")]
    text = drawn(mount(image("one"), image("two"), jobs=jobs))
    assert "no room, paused" in line_of(text, "2 images")


def test_a_terminal_of_little_height_shows_what_fits_and_the_events() -> None:
    images = [image(f"disk-{number:03}", error="broken") for number in range(300)]
    text = drawn(mount(*images, events=["12:00:01 disk-000: whole"]), width=80, height=24)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert lines[-1] == "  12:00:01 disk-000: whole"
    assert "disk-000" in text
    assert "  and 288 more  " in text
    assert "  300 images" in text
    assert "and 295 more with an error" in text


def test_options_are_shown_as_they_are_given() -> None:
    options = {
        "no-populate": True,
        "overlays": ["/a", "/b"],
        "fill-rate": 5,
        "on-change": "replace",
    }
    text = drawn(mount(image("one"), options=options, rate_limit=50 * MiB))
    assert (
        "\n  population at most 50 MiB/s  --no-populate  --overlays /a  --overlays /b"
        "  --on-change replace\n" in text
    )


def test_a_pipe_gets_whole_names() -> None:
    name = "x" * 300
    console = Console(file=io.StringIO(), width=80)
    console.print(status_view.render([mount(image(name))], None), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    assert line_of(console.file.getvalue(), name).split()[:2] == [name, "100"]
