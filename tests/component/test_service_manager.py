"""What the service manager is told on a socket like systemd's, and the unit that systemd gets."""

import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers

from lazyfs.cli import arguments
from lazyfs.cli.verbs import VERBS
from lazyfs.report import service_manager
from lazyfs.report.service_manager import Attendance, ServiceManager

UNIT = Path(arguments.DATA_DIR) / "lazyfs@.service"

OWN_MOUNT_NAMESPACE = {
    "PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateIPC", "MountFlags", "MountAPIVFS", "ProtectSystem",
    "ProtectHome", "ProtectProc", "ProcSubset", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs",
    "ProtectControlGroups", "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths",
    "BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "RootDirectory", "RootImage", "MountImages",
    "ExtensionImages", "ExtensionDirectories", "DynamicUser", "LogNamespace", "ProtectHostname", "PrivateUsers",
    "PrivateNetwork",
}  # fmt: skip
"""systemd.exec(5) of systemd 252, and of later ones."""


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@lazyfs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(address.replace("@", "\0", 1))
        made.settimeout(servers.DEADLINE_S)
        yield address, made


def told(listener: socket.socket) -> list[str]:
    return listener.recv(4096).decode().split("\n")


class Times:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, attendance: Attendance, status: str, seconds: float) -> None:
        """Let time pass as the keeper does, a second at a time."""
        for _ in range(int(seconds)):
            self.now += 1.0
            attendance.lives(status)


def heard_nothing(heard: socket.socket) -> bool:
    heard.setblocking(False)
    try:
        heard.recv(10)
    except BlockingIOError:
        return True
    finally:
        heard.settimeout(servers.DEADLINE_S)
    return False


def test_ready_then_alive_twice_in_the_time_allowed_then_stopping(
    listener: tuple[str, socket.socket],
) -> None:
    address, heard = listener
    attendance = Attendance(ServiceManager(address, 60.0), times := Times())
    times.pass_by(attendance, "up", 100)
    assert heard_nothing(heard), "it is not ready"
    attendance.ready("up")
    assert told(heard) == ["READY=1", "STATUS=up"]
    times.pass_by(attendance, "up", 30)
    assert told(heard) == ["WATCHDOG=1"]
    times.pass_by(attendance, "lost\nthe repository", 30)
    assert told(heard) == ["WATCHDOG=1", "STATUS=lost the repository"]
    times.pass_by(attendance, "lost\nthe repository", 30)
    assert told(heard) == ["WATCHDOG=1"]
    attendance.ready("up")
    assert heard_nothing(heard), "once only"
    attendance.stops()
    assert told(heard) == ["STOPPING=1"]


def test_without_a_watchdog_only_what_is_new_is_told(
    listener: tuple[str, socket.socket],
) -> None:
    address, heard = listener
    attendance = Attendance(ServiceManager(address, None), times := Times())
    attendance.ready("up")
    times.pass_by(attendance, "up", 100)
    times.pass_by(attendance, "lost", 100)
    attendance.stops()
    assert [told(heard) for _ in range(3)] == [
        ["READY=1", "STATUS=up"],
        ["STATUS=lost"],
        ["STOPPING=1"],
    ]


def test_nobody_listens_and_the_keeper_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times = Times()
    for manager in (None, ServiceManager(str(tmp_path / "gone"), 10.0)):
        attendance = Attendance(manager, times)
        attendance.ready("up")
        times.pass_by(attendance, "up", 20)
        attendance.stops()
    assert [
        record.levelno
        for record in caplog.records
        if record.name == "lazyfs.report.service_manager"
    ] == [logging.WARNING]
    assert "cannot send to the service manager" in caplog.text


def test_one_that_does_not_receive_holds_nobody_up_for_long(
    listener: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_manager, "SEND_S", 0.01)
    manager = ServiceManager(listener[0], None)
    for _ in range(1000):  # more than its socket takes
        manager.tell("STATUS=up")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": ""}, None),
        ({"NOTIFY_SOCKET": "/run/n"}, ServiceManager("/run/n", None)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "30000000"}, ServiceManager("@n", 30.0)),
        (
            {"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "7"},
            ServiceManager("@n", 1.5),
        ),
        (
            {"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "8"},
            ServiceManager("@n", None),
        ),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "soon"}, ServiceManager("@n", None)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "0"}, ServiceManager("@n", None)),
        ({"NOTIFY_SOCKET": "vsock:2:1"}, None),
        ({"NOTIFY_SOCKET": "@"}, None),
    ],
)
def test_the_environment_says_whom_to_tell(
    environment: dict[str, str], expected: ServiceManager | None
) -> None:
    environment = {**environment, "HOME": "/"}
    assert service_manager.from_environment(environment, 7) == expected
    assert environment == {"HOME": "/"}  # what the daemon starts must not speak in its name


def settings() -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))


def test_the_unit_gives_no_mount_namespace_and_says_why() -> None:
    assert settings().keys() & OWN_MOUNT_NAMESPACE == set()
    for name in OWN_MOUNT_NAMESPACE:
        assert re.search(rf"^#.*\b{name}\b", UNIT.read_text(), re.MULTILINE), name


def test_the_unit_starts_what_exists() -> None:
    unit = settings()
    assert (unit["Type"], unit["NotifyAccess"]) == ("notify", "main")
    assert float(unit["WatchdogSec"]) / 2 == service_manager.STATUS_S  # as its comment says
    program, *words = unit["ExecStart"].split()
    assert program == "lazyfs"
    options = arguments.parsers(VERBS).top.parse_args(
        [word.replace("%i", "main") for word in words]
    )
    assert (options.verb, options.config, options.foreground) == ("mount", "main", True)


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    servers.requires("systemd-analyze")
    program = tmp_path / "lazyfs"  # systemd looks for the program, too
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("ExecStart=lazyfs ", f"ExecStart={program} "))
    assert str(program) in unit.read_text()
    analyze = shutil.which("systemd-analyze")
    command = [
        str(analyze),
        "verify",
        "--man=no",
        "--recursive-errors=no",
        str(tmp_path / "lazyfs@main.service"),
    ]
    (tmp_path / "lazyfs@main.service").symlink_to(unit)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    unit.write_text(unit.read_text().replace("[Install]", "Nonsense=yes\n[Install]"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Nonsense" in done.stderr  # the judge is awake
