"""What the control socket says while there is no daemon."""

import asyncio
from pathlib import Path

import pytest

from lazyfs.control import client
from lazyfs.control.stand_in import StandIn
from lazyfs.core.qmp_wire import CommandError
from lazyfs.host.control_socket import ControlSocket


def answer(command: str) -> object:
    if command == "query-mount":
        return {"message": "there is no daemon"}
    raise CommandError("there is no daemon, because of a test")


def test_it_says_what_it_knows_until_it_is_stopped(tmp_path: Path) -> None:
    path = str(tmp_path / "control.sock")
    made = ControlSocket(path)
    for _ in range(2):
        stand_in = StandIn(made.socket, answer)
        version, mount = asyncio.run(client.ask(path, [("query-version", {}), ("query-mount", {})]))
        assert version["package"] == "lazyfs"
        assert mount == {"message": "there is no daemon"}
        with pytest.raises(client.Refused, match="because of a test"):
            asyncio.run(client.ask(path, [("query-images", {})]))
        stand_in.stop()
    made.remove(path)
    assert not Path(path).exists()
