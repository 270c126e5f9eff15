"""Serves a mount's metrics over HTTP, beside everything else that the daemon does.

The trio thread accepts connections. For each of them a thread reads the request and writes the
text, so that a client which is slow or sends nothing does not delay readers. When the request has
arrived, the numbers are taken in the trio thread, so no lock is needed. At the daemon's end trio
abandons the threads, so the end does not wait for a scrape. (They are daemon threads, and their
calls into the loop that has ended fail.)

prometheus_client's own server is not used. It asks the DNS for the host's name before it listens,
starts any number of threads, lets each wait for its client for ever, and cannot be stopped without
waking up twice a second all the time.
"""

import io
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

import prometheus_client
import trio

from lazyfs import errors
from lazyfs.report.metrics import Collector, Picture

logger = logging.getLogger(__name__)

MAX_SCRAPES = 4
"""The largest number of scrapes at once. The next one is refused. One Prometheus comes every 15 s
and takes a few ms."""

SCRAPE_S = 10.0
"""The time limit for a whole scrape. Prometheus itself gives up after 10 s."""

BACKLOG = 16


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
        self._scope = trio.CancelScope()
        self._limiter = trio.CapacityLimiter(MAX_SCRAPES)

    async def run(self, picture: Callable[[], Awaitable[Picture]]) -> None:
        """Serve until cancelled or closed. `picture` is called in the trio thread."""
        registry = prometheus_client.CollectorRegistry()
        registry.register(Collector(lambda: trio.from_thread.run(picture)))
        app = prometheus_client.make_wsgi_app(registry)

        async def serve(stream: trio.SocketStream) -> None:
            if self._limiter.available_tokens < 1:
                await stream.aclose()
                return
            connection = socket.socket(fileno=stream.socket.detach())
            connection.setblocking(True)
            try:
                with trio.move_on_after(SCRAPE_S):
                    await trio.to_thread.run_sync(
                        _serve, connection, app, limiter=self._limiter, abandon_on_cancel=True
                    )
            finally:
                # If the thread has finished, its socket is closed and this fails. If it has been
                # abandoned, this ends its waiting.
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        with self._scope:
            await trio.serve_listeners(serve, [trio.SocketListener(self._socket)])

    def close(self) -> None:
        """Stop listening at once, because the next daemon may want to use the port."""
        self.address = ""
        self._scope.cancel()
        self._socket.close()


def _serve(connection: socket.socket, app: Callable[..., Any]) -> None:
    """Answer one request. This runs in a thread, which may have been abandoned."""
    with connection:
        try:
            application: Any = _Application(app)
            _Handler(connection, connection.getpeername(), application)
        except OSError as error:
            logger.debug("a scrape was lost: %s", error)
        except trio.RunFinishedError:
            logger.debug("a scrape came too late")
        except Exception:
            logger.exception("a scrape failed, a bug in lazyfs")


class _Application:
    """Gives `WSGIRequestHandler` what it asks of its server."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app
        self.base_environ = {
            "SERVER_NAME": "",
            "SERVER_PORT": "",
            "SCRIPT_NAME": "",
            "GATEWAY_INTERFACE": "CGI/1.1",
        }

    def get_app(self) -> Callable[..., Any]:
        """Return the WSGI application, which answers any failure of prometheus_client."""
        return self._answer

    def _answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        try:
            answer: Iterable[bytes] = self._app(environ, start_response)
        except trio.RunFinishedError:
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"the daemon ends\n"]
        except Exception:
            logger.exception("a scrape failed, a bug in lazyfs")
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"a bug in lazyfs; the log has the details\n"]
        return answer


class _Handler(WSGIRequestHandler):
    """Handles one request on one connection. It prints nothing on stderr."""

    def get_stderr(self) -> io.StringIO:
        """Return a buffer, so that nothing is printed when a client hangs up."""
        return io.StringIO()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write to the log at level DEBUG instead of to stderr."""
        logger.debug("scrape: %s", format % args)
