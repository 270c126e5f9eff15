"""Answers on the control socket while there is no daemon that could.

It speaks QMP as the daemon does, but knows little: how the mount is, and why nobody else answers.
It has a thread of its own, and one for each client, because whoever uses it must wait for nobody.
"""

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import lazyfs
from lazyfs.core import qmp_wire
from lazyfs.host import peer

logger = logging.getLogger(__name__)

CLIENT_S = 10.0
"""How long a client may say nothing. Verbs ask at once, and then hang up."""

PAUSE_S = 0.1
"""How long to wait after a client could not be accepted, for instance because too many files are
open."""

MAX_CLIENTS = 16
"""How many are answered at the same time. Others are turned away, and ask again."""

Answer = Callable[[str], object]
"""Returns the result of a command without arguments, or raises CommandError. Thread-safe."""


class StandIn:
    """Answers clients of a listening socket, until it is told to stop."""

    def __init__(self, listening: socket.socket, answer: Answer) -> None:
        """Start to accept clients of `listening`, which stays the caller's."""
        self._listening = listening
        self._answer = answer
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._clients = threading.Semaphore(MAX_CLIENTS)
        self._thread = threading.Thread(target=self._accept, name="stand-in", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Accept no more clients. Those that are connected are still answered."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.close(self._stop_fd)

    def _accept(self) -> None:
        poller = select.poll()
        poller.register(self._listening, select.POLLIN)
        poller.register(self._stop_fd, select.POLLIN)
        while True:
            if self._stop_fd in dict(poller.poll()):
                return
            try:
                client, _ = self._listening.accept()
            except OSError as error:
                logger.debug("no client: %s", error)
                time.sleep(PAUSE_S)
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if peer.of(client).uid not in (0, os.geteuid()):
                return
            if not self._clients.acquire(blocking=False):
                return
            try:
                client.settimeout(CLIENT_S)
                self._talk(client)
            finally:
                self._clients.release()

    def _talk(self, client: socket.socket) -> None:
        major, minor, micro = (int(part) for part in lazyfs.__version__.split("."))
        session = qmp_wire.ServerSession("lazyfs", (major, minor, micro))
        decoder = qmp_wire.Decoder()
        client.sendall(qmp_wire.encode(session.greeting()))
        while data := client.recv(4096):
            try:
                for message in decoder.feed(data):
                    client.sendall(qmp_wire.encode(self._answered(session, message)))
            except qmp_wire.WireError as error:
                failure = qmp_wire.CommandError(f"JSON parse error, {error.desc}")
                client.sendall(qmp_wire.encode(qmp_wire.failed({}, failure)))
                return

    def _answered(
        self, session: qmp_wire.ServerSession, message: qmp_wire.JsonObject
    ) -> qmp_wire.JsonObject:
        try:
            command = session.command(message)
            if command.name == "qmp_capabilities":
                return qmp_wire.returned(message, {})
            if command.name == "query-version":
                return qmp_wire.returned(message, session.greeting()["QMP"]["version"])
            return qmp_wire.returned(message, self._answer(command.name))
        except qmp_wire.CommandError as error:
            return qmp_wire.failed(message, error)
