"""`lazyfs upgrade`: lets the installed version take over mounts that an earlier one serves."""

import argparse
import os
import sys
import time

from lazyfs import errors
from lazyfs.cli import printing
from lazyfs.control import client as control_client
from lazyfs.host import mounts

WAIT_S = 40.0
"""How long to wait for the next daemon. The keeper gives it 10 s, and then starts the version
before it again, which may take as long."""


def run(options: argparse.Namespace) -> int:
    """Upgrade one mount, or all of this user.

    Raises:
        UserError: there is no such mount.
    """
    if options.all == (options.mountpoint is not None):
        raise errors.UsageError("upgrade needs a MOUNTPOINT, or --all")
    if options.all:
        found = [mount for mount in mounts.served_mounts() if not mount.foreign]
    else:
        place = os.path.abspath(options.mountpoint)
        found = [mount for mount in mounts.lazyfs_mounts() if mount.mountpoint == place][-1:]
        if not found:
            raise errors.UserError(f"no lazyfs is mounted on {options.mountpoint}")
    code = 0
    for mount in found:
        try:
            printing.say(_upgraded(mount))
        except errors.UserError as error:
            printing.complain(error)
            code = 1
    return code


def _upgraded(mount: mounts.Mount) -> str:
    """Upgrade a mount, and return what to tell the user.

    Raises:
        UserError: it could not be upgraded. It is served as before, or the message says otherwise.
    """
    commands: list[control_client.Command] = [
        ("query-mount", {}),
        ("upgrade", {"python": sys.executable}),
    ]
    before, _ = control_client.execute(mount, commands)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        try:
            (now,) = control_client.execute(mount, [("query-mount", {})])
        except errors.UserError:
            continue  # between the two daemons
        if now["restarts"] <= before["restarts"] or "version" not in now:
            continue  # the old one still, or the keeper
        if now["upgrade_trouble"]:
            raise errors.UserError(
                f"{mount.mountpoint}: {now['upgrade_trouble']}; it is served by version "
                f"{now['version']} as before"
            )
        return f"{mount.mountpoint}: version {before['version']} -> {now['version']}"
    raise errors.UserError(
        f"{mount.mountpoint}: no daemon answers after {WAIT_S:g} s; lazyfs status says why"
    )
