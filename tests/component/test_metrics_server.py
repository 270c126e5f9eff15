"""The HTTP side of the metrics with clients of every kind.

Also checks that the schema is exported.
"""

import errno
import os
import re
import socket
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from lazyfs import errors
from lazyfs.core import metric_schema
from lazyfs.core.histogram import Histogram
from lazyfs.report import metrics_server
from lazyfs.report.metrics import Picture
from lazyfs.report.metrics_server import MAX_CLIENTS, MetricsServer

pytestmark = pytest.mark.trio

DEADLINE_S = 20.0


def picture(number: float = 7.0, mountpoint: str = "/mnt") -> Picture:
    """Return a number for every metric of the schema."""
    values: dict[str, Any] = {}
    histograms = {}
    for metric in metric_schema.METRICS:
        if metric.kind == metric_schema.HISTOGRAM:
            histograms[metric.name] = {
                value: Histogram([0.1, 1.0, 10.0]) for value in metric.values
            }
            for observed in (0.05, 0.5, 0.6, 100.0):
                histograms[metric.name]["present"].observe(observed)
        elif len(metric.labels) > 1:
            values[metric.name] = {(mountpoint, "0.1.0"): 1}
        else:
            values[metric.name] = dict.fromkeys(metric.values or [""], number)
    done = {
        name: {value: one.statistics() for value, one in parts.items()}
        for name, parts in histograms.items()
    }
    return Picture(values, done)


def later(take: Callable[[], Picture]) -> Callable[[], Awaitable[Picture]]:
    async def taken() -> Picture:
        return take()

    return taken


@pytest.fixture
def serving(nursery: trio.Nursery) -> Callable[..., MetricsServer]:
    def start(address: str = "127.0.0.1:0", take: Callable[[], Picture] = picture) -> MetricsServer:
        server = MetricsServer(address)
        nursery.start_soon(server.run, later(take))
        return server

    return start


async def get(server: MetricsServer, path: str = "/metrics", **headers: str) -> tuple[int, str]:
    def blocking() -> tuple[int, str]:
        request = urllib.request.Request(f"http://{server.address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await trio.to_thread.run_sync(blocking)


@contextmanager
def silent(server: MetricsServer) -> Iterator[socket.socket]:
    """Plays a client that connects and sends nothing."""
    host, _, port = server.address.rpartition(":")
    with closing(socket.create_connection((host.strip("[]"), int(port)), DEADLINE_S)) as connection:
        yield connection


async def hung_up(connection: socket.socket) -> bool:
    return await trio.to_thread.run_sync(lambda: connection.recv(1) == b"")


async def test_everything_in_the_schema_is_exported_and_nothing_else(serving: Any) -> None:
    code, text = await get(serving())
    assert code == 200
    samples = {sample.name for family in parse(text) for sample in family.samples}
    assert samples == {name for metric in metric_schema.METRICS for name in metric.samples}
    for family in parse(text):
        schema = (
            metric_schema.BY_NAME.get(family.name) or metric_schema.BY_NAME[f"{family.name}_total"]
        )
        assert (family.type, family.documentation) == (schema.kind, schema.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(schema.labels)
            if schema.values:
                assert sample.labels[schema.labels[0]] in schema.values


async def test_a_histogram_is_cumulative(serving: Any) -> None:
    _, text = await get(serving())
    (family,) = [family for family in parse(text) if family.name == "lazyfs_read_seconds"]
    present = [sample for sample in family.samples if sample.labels["served"] == "present"]
    buckets = {
        sample.labels["le"]: sample.value for sample in present if sample.name.endswith("_bucket")
    }
    assert buckets == {"0.1": 1, "1.0": 3, "10.0": 3, "+Inf": 4}
    assert {sample.value for sample in present if sample.name.endswith("_count")} == {4}
    assert [sample.value for sample in present if sample.name.endswith("_sum")] == pytest.approx(
        [101.15]
    )


async def test_openmetrics_if_the_client_asks_for_it(serving: Any) -> None:
    code, text = await get(serving(), Accept="application/openmetrics-text; version=1.0.0")
    assert code == 200
    assert text.endswith("# EOF\n")
    families: list[Any] = list(parse_openmetrics(text))  # type: ignore[no-untyped-call]
    assert {family.name for family in families} >= {"lazyfs_bytes", "lazyfs_images"}


async def test_numbers_are_new_at_each_scrape_and_taken_in_the_trio_thread(serving: Any) -> None:
    taken: list[object] = []

    def take() -> Picture:
        taken.append(trio.lowlevel.current_task())  # raises outside of the loop
        return picture(len(taken))

    server = serving(take=take)
    for number in (1, 2):
        assert f"lazyfs_open_images {number}.0" in (await get(server))[1]


@pytest.mark.parametrize("address", ["[::1]:0", "[::]:0", "localhost:0", "0.0.0.0:0"])
async def test_addresses(serving: Any, address: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        if ":" in address.rpartition(":")[0]:
            pytest.skip("this host has no IPv6")
    server = serving(address)
    assert server.address.rpartition(":")[2] != "0"
    assert (await get(server))[0] == 200


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("203.0.113.7:0", os.strerror(errno.EADDRNOTAVAIL)),
        ("a..b:1", "no such host"),
        ("\udcff:1", "no such host"),
        ("nowhere.invalid:1", "Name or service not known"),
    ],
)
async def test_an_address_that_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **options: Any) -> Any:
        if host == "nowhere.invalid":  # not by asking the DNS, which this machine may not reach
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(errors.UserError, match=f"cannot serve metrics on {address}: {reason}"):
        MetricsServer(address)


async def test_an_address_in_use_until_it_is_closed(serving: Any) -> None:
    server = serving()
    address = server.address
    with pytest.raises(
        errors.UserError, match=f"cannot serve metrics on {address}: Address already in use"
    ):
        MetricsServer(address)
    await get(server)
    server.close()
    assert server.address == ""
    again = serving(address)  # at once, with a connection of before in TIME_WAIT
    assert (await get(again))[0] == 200


async def test_clients_that_say_nothing_stop_neither_others_nor_the_end(serving: Any) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = MetricsServer("127.0.0.1:0")
            nursery.start_soon(server.run, later(picture))
            with silent(server), silent(server) as one:
                assert (await get(server))[0] == 200
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()
                    assert await hung_up(one)


async def test_a_client_that_says_nothing_is_dropped(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "SCRAPE_S", 0.1)
    server = serving()
    with silent(server) as connection, trio.fail_after(DEADLINE_S):
        assert await hung_up(connection)
    assert (await get(server))[0] == 200


async def test_silent_clients_keep_nobody_out(serving: Any) -> None:
    server = serving()
    with trio.fail_after(DEADLINE_S), ExitStack() as clients:
        oldest = clients.enter_context(silent(server))
        for _ in range(MAX_CLIENTS - 1):
            clients.enter_context(silent(server))
            await trio.sleep(0.001)  # it is accepted here
        while len(server._clients) < MAX_CLIENTS:
            await trio.sleep(0.01)
        assert (await get(server))[0] == 200
        assert await hung_up(oldest)


@pytest.mark.parametrize(
    "sent", [b"\r\n\r\n", b"\0\xff" * 100, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000, b"x" * 70000]
)
async def test_garbage(serving: Any, sent: bytes) -> None:
    server = serving()
    with silent(server) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
    assert (await get(server))[0] == 200


async def test_a_wanted_format_that_makes_no_sense(
    serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serving()
    accept = "application/openmetrics-text;version=\xff;q=nan"
    assert (await get(server, Accept=accept))[0] == 200
    assert "a bug" not in caplog.text


async def test_other_paths_methods_and_a_choice_of_metrics(serving: Any) -> None:
    server = serving()
    assert (await get(server, "/favicon.ico")) == (404, "there is only /metrics\n")
    assert (await get(server, "/"))[0] == 404
    assert (await get(server, "/metrics?name[]=lazyfs_images"))[1].count("# HELP") == 1
    answer = await asked(server, b"POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 405 ")
    assert b"Allow: GET, HEAD\r\n" in answer
    head = await asked(server, b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 ")
    assert head.endswith(b"\r\n\r\n")
    assert int(re.findall(rb"Content-Length: (\d+)", head)[0]) > 1000


@pytest.mark.parametrize(
    ("host", "code"),
    [
        (b"localhost:9100", 200), (b"LOCALHOST", 200), (b"127.0.0.1:9100", 200), (b"[::1]:9100", 200),
        (b"evil.example", 403), (b"localhost.evil.example:9100", 403),
    ],
)  # fmt: skip
async def test_a_page_whose_name_leads_here_gets_nothing(
    serving: Any, host: bytes, code: int
) -> None:
    """DNS rebinding."""
    answer = await asked(serving(), b"GET /metrics HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    assert answer.startswith(f"HTTP/1.0 {code} ".encode())
    assert (b"lazyfs_" in answer) == (code == 200)


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"GET /metrics HTTP/1.1", 400), (b"GET /metrics HTTP/1.1\r\nHost: ", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example", 400),
        (b"GET /metrics HTTP/1.1\r\nHost : localhost", 400), (b"GET /metrics HTTP/1.0", 200),
    ],
)  # fmt: skip
async def test_a_request_names_one_host(serving: Any, head: bytes, code: int) -> None:
    """RFC 9112, 3.2."""
    answer = await asked(serving(), head + b"\r\n\r\n")
    assert answer.startswith(f"HTTP/1.0 {code} ".encode())


async def test_a_server_for_other_hosts_has_any_name(serving: Any) -> None:
    server = serving("0.0.0.0:0")
    answer = await asked(server, b"GET /metrics HTTP/1.1\r\nHost: host7.example\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 200 ")


async def asked(server: MetricsServer, request: bytes) -> bytes:
    def blocking() -> bytes:
        with silent(server) as connection, connection.makefile("rb") as answer:
            connection.sendall(request)
            return answer.read()

    return await trio.to_thread.run_sync(blocking)


async def test_a_bug_is_logged_and_ends_nothing(
    serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [True]

    def take() -> Picture:
        if broken:
            raise ZeroDivisionError("a bug")
        return picture()

    server = serving(take=take)
    assert (await get(server)) == (500, "a bug in lazyfs; the log has the details\n")
    assert "ZeroDivisionError" in caplog.text
    broken.clear()
    assert (await get(server))[0] == 200
    caplog.clear()


async def test_a_mountpoint_of_any_characters(serving: Any) -> None:
    server = serving(take=lambda: picture(mountpoint='/a "b"\\\n\N{SNOWMAN}'))
    (family,) = [
        family for family in parse((await get(server))[1]) if family.name == "lazyfs_mount_info"
    ]
    assert family.samples[0].labels["mountpoint"] == '/a "b"\\\n\N{SNOWMAN}'
