"""Who is at the other end of a UNIX socket."""

import os
import socket
from pathlib import Path

import pytest
import trio

from lazyfs.host import peer

ME = peer.Peer(os.getpid(), os.geteuid(), os.getegid())


def test_a_client_and_its_server_see_each_other(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(path)
        listening.listen()
        client.connect(path)
        server, _ = listening.accept()
        with server:
            assert peer.of(client) == peer.of(server) == ME


@pytest.mark.trio
async def test_a_socket_of_trio() -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        assert peer.of(ours) == ME
