"""Serves a mount's metrics over HTTP, beside everything else that the daemon does.

The trio thread accepts connections, and reads what clients ask. So a client that is slow or sends
nothing costs a task, and is dropped in favour of later ones. Once a request is there, a thread
writes the text, for which the numbers are taken in the trio thread. At the daemon's end trio
abandons the threads, so the end does not wait for a scrape. (They are daemon threads, and their
calls into the loop that has ended fail.)

prometheus_client's own server is not used. It asks the DNS for the host's name before it listens,
starts any number of threads, lets each wait for its client for ever, and cannot be stopped without
waking up twice a second all the time. Its WSGI application makes the answers.
"""

import io
import ipaddress
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from typing import Any

import prometheus_client
import trio

from lazyfs import errors
from lazyfs.report.metrics import Collector, Picture

logger = logging.getLogger(__name__)

MAX_SCRAPES = 4
"""How many answers are written at once. One Prometheus comes every 15 s and takes a few ms."""

MAX_CLIENTS = 64
"""How many clients there can be. The one that has waited longest is dropped for the next."""

MAX_REQUEST = 16 * 1024
"""The longest request in bytes. One of Prometheus has 300."""

SCRAPE_S = 10.0
"""The time limit for a whole scrape. Prometheus itself gives up after 10 s."""

BACKLOG = 16

PATH = "/metrics"


class MetricsServer:
    """Listens from its creation on, and serves while `run` runs."""

    def __init__(self, address: str) -> None:
        """Listen at `address`, which is "HOST:PORT" or "[IPv6]:PORT".

        Raises:
            UserError: lazyfs cannot listen there.
        """
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        try:
            family, _, _, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            both = where[0] == "::" and socket.has_dualstack_ipv6()
            listening = socket.create_server(
                where[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both
            )
        except UnicodeError as error:  # The text cannot be a name at all, such as "a..b".
            raise errors.UserError(f"cannot serve metrics on {address}: no such host") from error
        except socket.gaierror as error:
            raise errors.UserError(
                f"cannot serve metrics on {address}: {error.strerror}"
            ) from error
        except OSError as error:
            raise errors.UserError(
                f"cannot serve metrics on {address}: {os.strerror(error.errno or 0)}"
            ) from error
        bound = listening.getsockname()
        self._socket = trio.socket.from_stdlib_socket(listening)
        self.address = (
            f"[{bound[0]}]:{bound[1]}" if family == socket.AF_INET6 else f"{bound[0]}:{bound[1]}"
        )
        """Where the server listens. It is "" after `close`."""
        self._local = ipaddress.ip_address(bound[0]).is_loopback
        self._scope = trio.CancelScope()
        self._limiter = trio.CapacityLimiter(MAX_SCRAPES)
        self._clients: dict[object, trio.CancelScope] = {}
        """Those that are connected, in the order in which they came."""

    async def run(self, picture: Callable[[], Awaitable[Picture]]) -> None:
        """Serve until cancelled or closed. `picture` is called in the trio thread."""
        registry = prometheus_client.CollectorRegistry()
        registry.register(Collector(lambda: trio.from_thread.run(picture)))
        app = prometheus_client.make_wsgi_app(registry)
        with self._scope:
            await trio.serve_listeners(
                partial(self._serve, app), [trio.SocketListener(self._socket)]
            )

    async def _serve(self, app: Callable[..., Any], stream: trio.SocketStream) -> None:
        """Answer one request, and hang up."""
        if len(self._clients) >= MAX_CLIENTS:
            next(iter(self._clients.values())).cancel()
        async with stream:
            with trio.move_on_after(SCRAPE_S) as scope:
                self._clients[client := object()] = scope
                try:
                    await self._talk(app, stream)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    logger.debug("a scrape was lost: %s", error)
                except Exception:
                    logger.exception("a scrape failed, a bug in lazyfs")
                finally:
                    del self._clients[client]

    async def _talk(self, app: Callable[..., Any], stream: trio.SocketStream) -> None:
        request = await _read_request(stream, self._local)
        if isinstance(request, HTTPStatus):
            await stream.send_all(_refused(request))
            return
        await stream.send_all(
            await trio.to_thread.run_sync(
                _answer, app, request, limiter=self._limiter, abandon_on_cancel=True
            )
        )

    def close(self) -> None:
        """Stop listening at once, because the next daemon may want to use the port."""
        self.address = ""
        self._scope.cancel()
        self._socket.close()


@dataclass(frozen=True, slots=True)
class _Request:
    """Describes a request for the metrics."""

    head_only: bool
    query: str
    accept: str
    accept_encoding: str


async def _read_request(stream: trio.SocketStream, local: bool) -> _Request | HTTPStatus:
    """Return what a client asks for, or why it gets nothing.

    Args:
        stream: the connection.
        local: whether only programs of this host can connect.
    """
    data = b""
    while b"\r\n\r\n" not in data and b"\n\n" not in data:
        if len(data) > MAX_REQUEST:
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        more = await stream.receive_some(MAX_REQUEST)
        if not more:
            return HTTPStatus.BAD_REQUEST
        data += more
    line, _, rest = data.partition(b"\n")
    words = line.decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return HTTPStatus.BAD_REQUEST
    try:
        headers = parse_headers(io.BytesIO(rest))
    except HTTPException:
        return HTTPStatus.BAD_REQUEST
    method, target, _ = words
    path, _, query = target.partition("?")
    hosts = headers.get_all("Host", [])
    if len(hosts) > 1 or (words[2] != "HTTP/1.0" and (not hosts or not hosts[0].strip())):
        return HTTPStatus.BAD_REQUEST  # RFC 9112, 3.2
    if local and not _is_local(hosts[0] if hosts else ""):
        return HTTPStatus.FORBIDDEN
    if path != PATH:
        return HTTPStatus.NOT_FOUND
    if method not in ("GET", "HEAD"):
        return HTTPStatus.METHOD_NOT_ALLOWED
    return _Request(
        method == "HEAD", query, headers.get("Accept", ""), headers.get("Accept-Encoding", "")
    )


def _is_local(host: str) -> bool:
    """Return whether a Host header names this host by its address, or as localhost.

    A page in a browser of this host can have another name that leads here (DNS rebinding).
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name.lower() in ("localhost", "")


_REASONS = {
    HTTPStatus.FORBIDDEN: "ask for localhost, or for the address",
    HTTPStatus.NOT_FOUND: f"there is only {PATH}",
    HTTPStatus.METHOD_NOT_ALLOWED: "GET and HEAD are known",
}


def _refused(status: HTTPStatus) -> bytes:
    text = _REASONS.get(status, "this is no request for metrics")
    more = [("Allow", "GET, HEAD")] if status is HTTPStatus.METHOD_NOT_ALLOWED else []
    return _response(
        f"{status.value} {status.phrase}",
        [("Content-Type", "text/plain"), *more],
        f"{text}\n".encode(),
    )


def _response(
    status: str, headers: Iterable[tuple[str, str]], body: bytes, head_only: bool = False
) -> bytes:
    lines = [
        f"HTTP/1.0 {status}",
        *(f"{name}: {value}" for name, value in headers),
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if head_only else body)


def _answer(app: Callable[..., Any], request: _Request) -> bytes:
    """Return the answer to a request. This runs in a thread, which may have been abandoned."""
    status, headers = "200 OK", [("Content-Type", "text/plain")]

    def start_response(said: str, given: list[tuple[str, str]]) -> None:
        nonlocal status, headers
        status, headers = said, given

    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": PATH,
        "QUERY_STRING": request.query,
        "HTTP_ACCEPT": request.accept,
        "HTTP_ACCEPT_ENCODING": request.accept_encoding,
    }
    try:
        try:
            body = b"".join(app(environ, start_response))
        except (TypeError, ValueError):
            # prometheus_client fails on some Accept headers that make no sense.
            body = b"".join(app({**environ, "HTTP_ACCEPT": ""}, start_response))
    except trio.RunFinishedError:
        status, headers, body = "503 Service Unavailable", [], b"the daemon ends\n"
    except Exception:
        logger.exception("a scrape failed, a bug in lazyfs")
        status, headers = "500 Internal Server Error", []
        body = b"a bug in lazyfs; the log has the details\n"
    return _response(status, headers, body, request.head_only)
