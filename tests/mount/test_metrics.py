"""The metrics of real mounts move as they should."""

import errno
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from lab import DEADLINE_S, KiB, Lab, MiB, pread, wait_until
from prometheus_client.parser import text_string_to_metric_families as parse

BLOCK = 64 * KiB


class Scrape(dict[str, float]):
    """Maps `name{value of the label}` or `name` to a number."""

    def by(self, name: str) -> dict[str, float]:
        """Return the values of a metric that are not zero, by its label."""
        return {
            key[len(name) + 1 : -1]: n
            for key, n in self.items()
            if n and key.startswith(name + "{")
        }


def scrape(lab: Lab) -> Scrape:
    found = Scrape()
    with urllib.request.urlopen(
        f"http://{lab.status()['metrics']}/metrics", timeout=DEADLINE_S
    ) as answer:
        for family in parse(answer.read().decode()):
            for sample in family.samples:
                if "le" not in sample.labels:
                    label = "".join(
                        f"{{{value}}}" for key, value in sample.labels.items() if key != "version"
                    )
                    found[sample.name + label] = sample.value
    return found


def until(lab: Lab, key: str, least: float) -> Scrape:
    wait_until(lambda: scrape(lab).get(key, 0) >= least, f"{key} is {least:g}")
    return scrape(lab)


def port_of(lab: Lab) -> tuple[str, int]:
    host, _, port = lab.status()["metrics"].rpartition(":")
    return host, int(port)


@contextmanager
def page_reader(path: Path) -> Iterator[int]:
    """Open a file of which the kernel reads no more than is asked for."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        yield fd
    finally:
        os.close(fd)


def test_bytes_by_kind_are_those_of_the_servers_log_and_outlive_eviction(lab: Lab) -> None:
    lab.image("sparse", 8 * MiB, {0: os.urandom(1 * MiB), 5 * MiB: os.urandom(256 * KiB)})
    lab.image("other", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--metrics", "0", "--no-populate")
    start = scrape(lab)
    assert start.by("lazyfs_images") == {"remote": 2}
    assert start.by("lazyfs_bytes_total") == {}
    assert start.by("lazyfs_mount_info") == {str(lab.mnt): 1}
    # Population begins after the read, because it would have fetched everything before the kernel
    # asks if the machine is busy.
    with page_reader(lab.mnt / "sparse") as fd:
        os.pread(fd, 4096, 0)
    lab.lazyfs("prefetch", "--wait", lab.mnt / "sparse")
    filled = scrape(lab)
    assert filled["lazyfs_bytes_total{demand}"] > 0
    assert filled["lazyfs_bytes_total{population}"] > 0
    fetched = filled["lazyfs_bytes_total{demand}"] + filled["lazyfs_bytes_total{population}"]
    compared = filled["lazyfs_bytes_total{sample}"]
    assert fetched + compared == server.bytes_read()
    assert compared > 0
    assert sum(filled.by("lazyfs_requests_total").values()) == len(server.reads())
    assert sum(filled.by("lazyfs_bytes_total").values()) - compared == 8 * MiB
    assert filled["lazyfs_present_bytes"] == fetched == 1280 * KiB
    assert filled.by("lazyfs_images") == {"remote": 1, "whole": 1}
    lab.lazyfs("evict", lab.mnt / "sparse")
    evicted = scrape(lab)
    assert evicted.by("lazyfs_images") == {"remote": 2}
    assert evicted["lazyfs_present_bytes"] == 0
    assert evicted.by("lazyfs_bytes_total") == filled.by("lazyfs_bytes_total")
    with page_reader(lab.mnt / "sparse") as fd:
        os.pread(fd, 4096, 0)
    lab.lazyfs("prefetch", "--wait", lab.mnt / "sparse")
    again = scrape(lab)
    by_kind = again.by("lazyfs_bytes_total")
    assert sum(by_kind.values()) - by_kind["zero"] == server.bytes_read()
    assert again["lazyfs_bytes_total{zero}"] == 2 * filled["lazyfs_bytes_total{zero}"]


def test_only_demand_without_population(lab: Lab) -> None:
    lab.image("dense", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--metrics", "0", "--no-populate")
    with page_reader(lab.mnt / "dense") as fd:
        os.pread(fd, 4096, 1 * MiB)
        found = until(lab, "lazyfs_bytes_total{demand}", 1)
        assert (
            found.by("lazyfs_bytes_total") == {"demand": server.bytes_read()} == {"demand": BLOCK}
        )
        assert found.by("lazyfs_read_seconds_count") == {"fetched": 1}
        assert found.by("lazyfs_opens_total") == {"daemon": 1}
        assert found["lazyfs_open_images"] == 1
        wait_until(lambda: lab.image_status("dense")["present_bytes"] == BLOCK, "it is kept")
        os.pread(fd, 4096, 1 * MiB + 8192)
        assert scrape(lab).by("lazyfs_read_seconds_count") == {"fetched": 1, "present": 1}
    wait_until(lambda: scrape(lab)["lazyfs_open_images"] == 0, "it is closed")


def test_one_reader_fetches_and_seven_join(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    control = lab.folder / "pause.sock"
    server = lab.serve("pause", parameters=(f"pause-control={control}",))
    lab.mount(server.uri, "--metrics", "0", "--no-populate")
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        fds = [stack.enter_context(page_reader(lab.mnt / "dense")) for _ in range(8)]
        _pause(control, b"p")
        try:
            reads = [pool.submit(os.pread, fd, 4096, i * 4096) for i, fd in enumerate(fds)]
            waiting = until(lab, "lazyfs_queue_length{readers}", 8)
            assert waiting.by("lazyfs_read_seconds_count") == {}
        finally:
            _pause(control, b"r")
        for read in reads:
            assert len(read.result(DEADLINE_S)) == 4096
    found = scrape(lab)
    assert found.by("lazyfs_read_seconds_count") == {"fetched": 1, "joined": 7}
    assert found["lazyfs_read_seconds_sum{joined}"] > 0
    assert found.by("lazyfs_queue_length") == {}
    assert len(server.reads()) == found["lazyfs_requests_total{demand}"] == 1


def _pause(path: Path, letter: bytes) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(os.fspath(path))
        client.sendall(letter)
        assert client.recv(1) == letter.upper()


def test_errors(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    trigger = lab.folder / "trigger"
    trigger.touch()
    server = lab.serve(
        "error", parameters=("error-pread=EIO", "error-pread-rate=100%", f"error-file={trigger}")
    )
    lab.mount(server.uri, "--metrics", "0")
    with pytest.raises(OSError, match="Input/output error"):
        pread(lab.mnt / "dense", 0, 4 * KiB)
    found = until(lab, "lazyfs_errors_total{population}", 1)
    assert found["lazyfs_errors_total{read}"] == found["lazyfs_read_seconds_count{failed}"] >= 1
    assert found.by("lazyfs_errors_total").keys() == {"read", "population"}
    assert found.by("lazyfs_bytes_total") == {}
    trigger.unlink()
    lab.wait_for_state("dense", "whole")
    assert scrape(lab)["lazyfs_errors_total{read}"] == found["lazyfs_errors_total{read}"]


def test_reconnects(lab: Lab) -> None:
    lab.image("dense", 4 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--metrics", "0", "--no-populate")
    pread(lab.mnt / "dense", 0, 4 * KiB)
    before = scrape(lab)
    assert before["lazyfs_repository_connected"] == 1
    assert before["lazyfs_reconnects_total"] == before["lazyfs_errors_total{connect}"] == 0
    server.kill()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pread, lab.mnt / "dense", 2 * MiB, 4 * KiB)
        lost = until(lab, "lazyfs_errors_total{connect}", 1)
        assert lost["lazyfs_repository_connected"] == 0
        server.start()
        waiting.result(DEADLINE_S)
    back = until(lab, "lazyfs_repository_connected", 1)
    assert back["lazyfs_reconnects_total"] == lab.status()["reconnects"] >= 1


@pytest.mark.skipif(os.geteuid() != 0, reason="passthrough needs CAP_SYS_ADMIN")
def test_passthrough_opens(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--metrics", "0")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    before = scrape(lab)
    if lab.status()["passthrough_trouble"]:
        pytest.skip(lab.status()["passthrough_trouble"])
    for _ in range(3):
        (lab.mnt / "disk").read_bytes()
    after = scrape(lab)
    assert after["lazyfs_opens_total{passthrough}"] == before["lazyfs_opens_total{passthrough}"] + 3
    assert after["lazyfs_opens_total{daemon}"] == before["lazyfs_opens_total{daemon}"] == 1
    # the kernel read them
    assert after.by("lazyfs_read_seconds_count") == before.by("lazyfs_read_seconds_count")


def test_whole_images_without_passthrough(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--metrics", "0", "--no-passthrough")
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    before = scrape(lab)
    pread(lab.mnt / "disk", 0, 4 * KiB)
    after = scrape(lab)
    assert after.by("lazyfs_opens_total") == {"daemon": before["lazyfs_opens_total{daemon}"] + 1}
    assert (
        after["lazyfs_read_seconds_count{present}"] > before["lazyfs_read_seconds_count{present}"]
    )


def test_room(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--metrics", "0", "--cache-dir", lab.folder / "cache")
    room = os.statvfs(lab.folder / "cache")
    found = scrape(lab)
    assert found["lazyfs_room_size_bytes"] == room.f_blocks * room.f_frsize
    assert (
        abs(found["lazyfs_room_free_bytes"] - room.f_bavail * room.f_frsize)
        < room.f_blocks * room.f_frsize / 10
    )
    assert found["lazyfs_room_used_bytes"] == found["lazyfs_room_short"] == 0
    assert found["lazyfs_room_max_cache_bytes"] == found["lazyfs_room_min_free_bytes"] == 0
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    assert scrape(lab)["lazyfs_room_used_bytes"] == 1 * MiB


def test_no_room(lab: Lab) -> None:
    lab.image("disk", 4 * MiB)
    lab.mount(lab.serve().uri, "--metrics", "0", "--max-cache", "1M", "--no-populate")
    with (lab.mnt / "disk").open("rb") as file:
        file.read()
        found = until(lab, "lazyfs_room_short", 1)
        assert found["lazyfs_room_max_cache_bytes"] == 1 * MiB
        assert 0 < found["lazyfs_room_used_bytes"] <= 1 * MiB
        assert found["lazyfs_bytes_total{demand}"] >= 4 * MiB  # fetched, if not kept
        assert found["lazyfs_errors_total{write}"] == 0  # which is as it should be


def test_off_by_default_and_loopback_if_only_a_port_is_given(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri)
    assert lab.status()["metrics"] == ""
    lab.umount()
    lab.mount(server.uri, "--metrics", "0")
    assert port_of(lab)[0] == "127.0.0.1"
    assert f"metrics: http://{lab.status()['metrics']}/metrics" in lab.log_text()
    lab.umount()
    lab.mount(server.uri, "--metrics", "localhost:0")
    assert scrape(lab).by("lazyfs_images") == {"remote": 1}


@pytest.mark.parametrize("extra", [[], ["--foreground"]])
def test_an_address_in_use(lab: Lab, extra: list[str]) -> None:
    lab.image("disk", 1 * MiB)
    server = lab.serve()
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        done = lab.lazyfs("mount", server.uri, lab.mnt, "--metrics", str(port), *extra, check=False)
    assert done.returncode == 1
    assert (
        done.stderr == f"lazyfs: cannot serve metrics on 127.0.0.1:{port}: Address already in use\n"
    )
    assert not os.path.ismount(lab.mnt)
    lab.mount(server.uri, "--metrics", str(port))


@pytest.mark.parametrize(
    "address", ["", "x", "1:2:3", "::1:9100", ":9100", "[]:9100", "host:", "99999", "-1", "h:1e3"]
)
def test_an_address_that_is_none(lab: Lab, address: str) -> None:
    done = lab.lazyfs("mount", "nbd://localhost", lab.mnt, f"--metrics={address}", check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--metrics" in done.stderr


def test_a_client_that_says_nothing_does_not_hold_up_the_end(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--metrics", "0")
    with closing(socket.create_connection(port_of(lab))) as silent:
        silent.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert scrape(lab)["lazyfs_repository_connected"] == 1
        lab.umount()


def test_a_scrape_of_a_daemon_that_hangs_does_not_keep_it_from_ending(lab: Lab) -> None:
    """The scrape that came while the daemon hung is served or cut off. Both end it."""
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--metrics", "0")
    where = port_of(lab)
    assert lab.daemon is not None
    lab.signal_daemon(signal.SIGSTOP)
    with closing(socket.create_connection(where, DEADLINE_S)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        lab.daemon.send_signal(signal.SIGTERM)
        lab.signal_daemon(signal.SIGCONT)
        assert lab.daemon.wait(DEADLINE_S) == 0
        lab.daemon = None
        try:
            while client.recv(65536):
                pass
        except ConnectionResetError:
            pass


def test_scrapes_while_the_daemon_ends(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    lab.mount(lab.serve().uri, "--metrics", "0")
    host, port = port_of(lab)

    def scrape_on() -> int:
        good = 0
        while True:
            try:
                with urllib.request.urlopen(f"http://{host}:{port}/", timeout=DEADLINE_S) as answer:
                    good += bool(answer.read())
            except urllib.error.HTTPError as error:
                error.close()
            except TimeoutError:
                raise
            except OSError as error:
                if getattr(getattr(error, "reason", error), "errno", None) == errno.ECONNREFUSED:
                    return good
            except Exception:  # cut off in the middle
                pass

    with ThreadPoolExecutor(3) as pool:
        scrapers = [pool.submit(scrape_on) for _ in range(3)]
        lab.umount()
        assert sum(scraper.result(DEADLINE_S) for scraper in scrapers) >= 0
    assert "a bug in lazyfs" not in lab.log_text()


def test_after_detach_the_port_is_free_for_the_next_daemon(lab: Lab) -> None:
    lab.image("disk", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--metrics", "0")
    port = port_of(lab)[1]
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    reader = subprocess.Popen([sys.executable, "-c", "import sys; f = open(sys.argv[1]); print(flush=True); input()",
                               lab.mnt / "disk"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert reader.stdout is not None
        reader.stdout.readline()
        lab.lazyfs("detach", lab.mnt)
        with closing(socket.create_server(("127.0.0.1", port))):
            pass
    finally:
        reader.communicate(b"\n")
    assert lab.daemon is not None
    assert lab.daemon.wait(DEADLINE_S) == 0
    lab.daemon = None
