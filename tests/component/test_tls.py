"""TLS with real servers: who may serve, and what is said when they may not."""

import datetime
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import servers
import trio
import trustme
from peers import Peers

from lazyfs import errors
from lazyfs.core import repository_uri
from lazyfs.engine.interfaces import Export
from lazyfs.repository import tls
from lazyfs.units import KiB

pytestmark = pytest.mark.trio

SIZE = 64 * KiB
KEY = "0123456789abcdef0123456789abcdef"
REPOSITORY = "nbds://localhost"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


class TcpServer(servers.Server):
    """nbdkit on 127.0.0.1, as certificates are for host names."""

    def __init__(self, path: Path, *arguments: str | Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        super().__init__(
            path,
            ["nbdkit", "--foreground", "--exit-with-parent", "--readonly", "--ipaddr=127.0.0.1",
             f"--port={self.port}", *map(str, arguments)],
        )  # fmt: skip

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.messages.read_text()
        try:
            with socket.create_connection(("127.0.0.1", self.port)) as client:
                return client.recv(8) == b"NBDMAGIC"
        except OSError:
            return False


Serve = Callable[..., TcpServer]


@pytest.fixture
def serve(tmp_path: Path, image: Path) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(*arguments: str | Path) -> TcpServer:
            server = TcpServer(tmp_path / f"tcp{time.monotonic_ns()}", *arguments, "file", image)
            stack.callback(server.kill)
            server.start()
            return server

        yield start


# -- certificates


@functools.cache
def authority(name: str) -> trustme.CA:
    return trustme.CA(organization_name=name)


def certificates(
    folder: Path, *, trust: str = "ours", issuer: str = "ours", kind: str = "", **made: Any
) -> Path:
    """A folder as libnbd and nbdkit want it: the authority to trust, and a certificate of its own.

    Args:
        kind: server, client, or "" for no certificate.
        made: as for `trustme.CA.issue_cert`.
    """
    folder.mkdir()
    authority(trust).cert_pem.write_to_path(str(folder / "ca-cert.pem"))
    if kind:
        found = authority(issuer).issue_cert(made.pop("name", "localhost"), **made)
        found.private_key_pem.write_to_path(str(folder / f"{kind}-key.pem"))
        found.cert_chain_pems[0].write_to_path(str(folder / f"{kind}-cert.pem"))
    return folder


def with_certificates(server: TcpServer, folder: Path, host: str = "localhost") -> str:
    return f"nbds://{host}:{server.port}/?tls-certificates={folder}"


async def refused(repository: Any) -> str:
    """Why the repository is not used, on each of the ways to connect."""
    calls = (
        repository.list_exports,
        functools.partial(repository.describe, [""]),
        functools.partial(repository.connect_export, Export("", SIZE, "")),
    )
    reasons = set()
    for call in calls:
        with trio.fail_after(servers.DEADLINE_S), pytest.raises(errors.ConnectionLost) as failure:
            await call()
        reasons.add(failure.value.reason)
    assert len(reasons) == 1, reasons
    return str(reasons.pop())


async def test_a_server_that_proves_itself(
    serve: Serve, tmp_path: Path, image: Path, repository_of: Any
) -> None:
    server = serve(
        "--tls=require",
        f"--tls-certificates={certificates(tmp_path / 'server', kind='server')}",
    )
    repository = repository_of(with_certificates(server, certificates(tmp_path / "trusted")))
    assert await repository.list_exports() == [""]
    source = repository.source((await repository.describe([""]))[""])
    buffer = bytearray(SIZE)
    await source.pread(0, memoryview(buffer))
    assert bytes(buffer) == await trio.Path(image).read_bytes()
    source.drop_connection()


LONG_AGO = {
    "not_before": datetime.datetime(2020, 1, 1),
    "not_after": datetime.datetime(2021, 1, 1),
}


@pytest.mark.parametrize(
    ("server", "host", "reason"),
    [
        ({"issuer": "theirs"}, "localhost", "unable to get local issuer certificate"),
        ({"name": "example.com"}, "localhost", "Hostname mismatch"),
        ({}, "127.0.0.1", "IP address mismatch"),
        (LONG_AGO, "localhost", "certificate has expired"),
    ],
)
async def test_a_server_that_does_not_is_refused_by_the_name_of_the_mistake(
    serve: Serve, tmp_path: Path, repository_of: Any, server: Any, host: str, reason: str
) -> None:
    running = serve(
        "--tls=require",
        f"--tls-certificates={certificates(tmp_path / 'server', kind='server', **server)}",
    )
    trusted = certificates(tmp_path / "trusted")
    said = await refused(repository_of(with_certificates(running, trusted, host)))
    assert "certificate is refused" in said
    assert reason in said
    assert f"checked for {host!r} with {trusted}/ca-cert.pem" in said


@pytest.mark.parametrize("mine", ["", "theirs"])
async def test_a_server_that_wants_another_certificate_of_ours(
    serve: Serve, tmp_path: Path, repository_of: Any, mine: str
) -> None:
    folder = certificates(tmp_path / "server", kind="server")
    running = serve("--tls=require", f"--tls-certificates={folder}", "--tls-verify-peer")
    ours = certificates(tmp_path / "ours", kind="client" if mine else "", issuer=mine or "ours")
    said = await refused(repository_of(with_certificates(running, ours)))
    assert "refuses this host's certificate, or wants one" in said
    right = certificates(tmp_path / "right", kind="client")
    assert await repository_of(with_certificates(running, right)).list_exports() == [""]


async def test_nbds_is_never_downgraded(
    serve: Serve, tmp_path: Path, repository_of: Any, peers: Peers, image: Path
) -> None:
    folder = certificates(tmp_path / "trusted")
    assert "does not do TLS" in await refused(
        repository_of(with_certificates(serve("--tls=off"), folder))
    )
    plain = peers.nbdkit("file", image)
    keys = shared_key(tmp_path)
    assert "does not do TLS" in await refused(repository_of(with_key(plain, keys)))
    assert not plain.request_log.read_text().count("Connect")


async def test_a_plaintext_client_at_a_tls_server(
    peers: Peers, image: Path, tmp_path: Path, repository_of: Any
) -> None:
    server = peers.nbdkit("--tls=require", f"--tls-psk={shared_key(tmp_path)}", "file", image)
    with pytest.raises((errors.ConnectionLost, errors.Unsupported), match="TLS"):
        await repository_of(server).list_exports()


# -- keys


def shared_key(folder: Path, user: str = "alice", key: str = KEY) -> Path:
    path = folder / f"{user}-{key[:4]}.psk"
    path.write_text(f"{user}:{key}\n")
    return path


def with_key(server: servers.Server, psk: Path, user: str = "alice") -> str:
    return f"nbds+unix://{user}@/?socket={server.path}&tls-psk-file={psk}"


async def test_a_shared_key(peers: Peers, image: Path, tmp_path: Path, repository_of: Any) -> None:
    psk = shared_key(tmp_path)
    server = peers.nbdkit("--tls=require", f"--tls-psk={psk}", "file", image)
    repository = repository_of(with_key(server, psk))
    assert await repository.list_exports() == [""]
    assert (await repository.describe([""]))[""].size == SIZE
    assert "tls=1" in server.request_log.read_text()
    assert "tls=0" not in server.request_log.read_text()


async def test_a_shared_key_over_tcp(serve: Serve, tmp_path: Path, repository_of: Any) -> None:
    psk = shared_key(tmp_path)
    server = serve("--tls=require", f"--tls-psk={psk}")
    uri = f"nbds://alice@localhost:{server.port}?tls-psk-file={psk}"
    assert await repository_of(uri).list_exports() == [""]


@pytest.mark.parametrize(("user", "key"), [("alice", KEY[::-1]), ("eve", KEY)])
async def test_a_wrong_key(
    peers: Peers, image: Path, tmp_path: Path, repository_of: Any, user: str, key: str
) -> None:
    psk = shared_key(tmp_path)
    server = peers.nbdkit("--tls=require", f"--tls-psk={psk}", "file", image)
    said = await refused(repository_of(with_key(server, shared_key(tmp_path, user, key), user)))
    assert f"refuses the key of {user!r}" in said
    assert not server.request_log.read_text().count("Connect")


async def test_a_key_at_a_server_with_certificates_and_the_other_way_round(
    serve: Serve, tmp_path: Path, repository_of: Any
) -> None:
    psk = shared_key(tmp_path)
    folder = certificates(tmp_path / "server", kind="server")
    server = serve("--tls=require", f"--tls-certificates={folder}")
    uri = f"nbds://alice@localhost:{server.port}?tls-psk-file={psk}"
    assert "certificates, not with keys" in await refused(repository_of(uri))
    server = serve("--tls=require", f"--tls-psk={psk}")
    trusted = certificates(tmp_path / "trusted")
    assert "may want a key" in await refused(repository_of(with_certificates(server, trusted)))


# -- the files


@pytest.mark.parametrize("broken", ["missing", "empty", "no certificate", "no folder"])
async def test_authorities_that_cannot_be_used_are_refused_before_anybody_is_asked(
    tmp_path: Path, broken: str
) -> None:
    folder = certificates(tmp_path / "pki")
    file = folder / "ca-cert.pem"
    match broken:
        case "missing":
            file.unlink()
        case "empty":
            file.write_text("")
        case "no certificate":
            file.write_text("-----BEGIN CERTIFICATE-----\nnothing\n")
        case "no folder":
            folder = tmp_path / "nothing"
    check_refused(f"{REPOSITORY}?tls-certificates={folder}", f"{folder}/ca-cert.pem")


async def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo, folder = tmp_path / "fifo", tmp_path / "certificates"
    os.mkfifo(fifo)
    folder.mkdir()
    (folder / "ca-cert.pem").symlink_to("/dev/zero")
    (tmp_path / "long").write_bytes(bytes(tls.MAX_FILE + 1))
    for rest, message in (
        (f"tls-psk-file={fifo}", "no plain file"),
        ("tls-psk-file=/dev/zero", "no plain file"),
        (f"tls-certificates={folder}", "no plain file"),
        (f"tls-psk-file={tmp_path / 'long'}", "longer than"),
    ):
        with pytest.raises(errors.LastingError, match=message):
            tls.check_files(repository_uri.parse(f"nbds://alice@localhost/?{rest}"))


async def test_half_a_certificate_of_ours_is_refused(tmp_path: Path) -> None:
    folder = certificates(tmp_path / "pki", kind="client")
    tls.check_files(repository_uri.parse(f"{REPOSITORY}?tls-certificates={folder}"))
    (folder / "client-key.pem").unlink()
    check_refused(f"{REPOSITORY}?tls-certificates={folder}", "client-key.pem")


async def test_a_key_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    uri = "nbds://alice@localhost?tls-psk-file="
    check_refused(f"{uri}{tmp_path}/nothing", f"{tmp_path}/nothing, which TLS needs: No such file")
    check_refused(f"{uri}{shared_key(tmp_path, 'bob')}", "has no key of 'alice'")


def check_refused(uri: str, message: str) -> None:
    with pytest.raises(errors.LastingError) as failure:
        tls.check_files(repository_uri.parse(uri))
    assert message in str(failure.value)


async def test_files_that_go_later_stop_new_connections(
    serve: Serve, tmp_path: Path, repository_of: Any
) -> None:
    """libnbd would go on without looking at the server's certificate."""
    folder = certificates(tmp_path / "server", kind="server")
    server = serve("--tls=require", f"--tls-certificates={folder}")
    trusted = certificates(tmp_path / "trusted")
    repository = repository_of(with_certificates(server, trusted))
    assert await repository.list_exports() == [""]
    (trusted / "ca-cert.pem").rename(trusted / "ca-cert.old")
    assert f"{trusted}/ca-cert.pem" in await refused(repository)
    (trusted / "ca-cert.old").rename(trusted / "ca-cert.pem")
    assert await repository.list_exports() == [""]


async def test_the_commands_of_the_documentation_make_certificates(
    serve: Serve, tmp_path: Path, repository_of: Any
) -> None:
    servers.requires("openssl")
    text = (Path(__file__).parents[2] / "doc" / "CONFIGURATION.md").read_text()
    start = text.index("    openssl req -x509")
    script = text[start : text.index("\n\n", start)].replace("images.example.com", "localhost")
    await trio.run_process(["sh", "-ec", script], cwd=tmp_path, capture_stderr=True)
    shown = await trio.run_process(
        ["openssl", "x509", "-in", "server-cert.pem", "-noout", "-ext", "basicConstraints"],
        cwd=tmp_path, capture_stdout=True,
    )  # fmt: skip
    assert b"CA:FALSE" in shown.stdout, "who has this key must not be able to sign for others"
    server = serve("--tls=require", f"--tls-certificates={tmp_path}")
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    (tmp_path / "ca-cert.pem").rename(trusted / "ca-cert.pem")
    assert await repository_of(with_certificates(server, trusted)).list_exports() == [""]


@pytest.mark.parametrize("trust", ["missing", "empty folder", "no folder", "misspelt", "right"])
async def test_a_server_of_another_authority_is_never_read(
    serve: Serve, tmp_path: Path, repository_of: Any, trust: str
) -> None:
    folder = certificates(tmp_path / "server", kind="server", issuer="theirs", trust="theirs")
    server = serve("--tls=require", f"--tls-certificates={folder}")
    ours = certificates(tmp_path / "ours")
    if trust in ("missing", "empty folder"):
        (ours / "ca-cert.pem").unlink()
    if trust == "no folder":
        ours = tmp_path / "nothing"
    uri = with_certificates(server, ours)
    if trust == "misspelt":
        with pytest.raises(ValueError, match="did you mean tls-certificates"):
            repository_uri.parse(uri.replace("tls-certificates", "tls-certificate"))
        return
    said = await refused(repository_of(uri))
    assert ("certificate is refused" if trust == "right" else "ca-cert.pem") in said
