"""`lazyfs status`: asks the daemons for their status and prints it."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lazyfs import errors
from lazyfs.control import client as control_client
from lazyfs.host import mounts


def run(options: argparse.Namespace) -> int:
    """Show the mounts and images that the user named."""
    if options.json and options.watch:
        raise errors.UsageError(
            "--watch draws for people; call status --json again and again instead"
        )
    from rich.console import Console

    from lazyfs.cli import status_view

    if options.json:
        found = _chosen(_query_all(options.paths), options)
        json.dump({"mounts": found}, sys.stdout, indent=2)
        print()
        return _exit_code(found, options.paths)
    console = Console(highlight=False)
    terminal = console.is_terminal
    if not options.watch:
        found = _chosen(_query_all(options.paths), options)
        picture = status_view.render(found, console.width if terminal else None)
        console.print(picture, soft_wrap=not terminal)  # a pipe has no width
        return _exit_code(found, options.paths)
    from rich.live import Live

    from lazyfs.cli import watching

    with Live(console=console, auto_refresh=False) as live:

        def draw(found: list[dict[str, Any]]) -> None:
            if terminal:
                picture = status_view.render(found, console.width, console.height)
                live.update(picture, refresh=True)
            else:  # In a log or a pipe, one picture follows another.
                console.print(status_view.render(found, None), soft_wrap=True)
                sys.stdout.flush()

        watching.watch(lambda: _chosen(_query_all(options.paths), options), draw, keep=terminal)
    return 0


_ORDERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name": lambda image: image["path"],
    "size": lambda image: -(image["size"] or 0),
    "present": lambda image: -image["present_bytes"],
    "used": lambda image: -image["last_used_ns"],
    "active": lambda image: (image["fill_rate"] < 1, not image["open_count"], image["path"]),
}
"""How images are sorted, by the word after --sort."""

SORTS = tuple(_ORDERS)


def _chosen(found: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the mounts with the images that the user wants to see, in the order wanted."""
    order = options.sort or ("active" if options.watch else "name")
    for mount in found:
        images = [
            image
            for image in mount["images"]
            if options.state is None or image["state"] in options.state
        ]
        mount["images"] = sorted(images, key=_ORDERS[order])
    return found


def _exit_code(found: Sequence[dict[str, Any]], named: Sequence[str]) -> int:
    """Return 1 if a daemon did not answer, even if the others did.

    The mounts of other users count only if they were named.
    """
    return 1 if any("error" in one and (named or not one.get("foreign")) for one in found) else 0


def _query_all(paths: Sequence[str]) -> list[dict[str, Any]]:
    if not paths:
        # Side by side, because a daemon that hangs takes 10 s.
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(_query_or_say_why, mounts.served_mounts()))
        return found + control_client.query_detached()
    named: dict[str, dict[str, Any]] = {}
    detached = {one["mountpoint"]: one for one in control_client.query_detached()}
    for path in paths:
        # A path is resolved only if it lies on no mount as it is written, because resolving it may
        # ask a daemon that hangs.
        if mounts.mount_of(path) is None and (gone := detached.get(os.path.realpath(path))):
            named.setdefault(f"detached {path}", gone)
            continue
        mount, inside = control_client.locate(path)
        one = _query_or_say_why(mount) if not inside else control_client.query(mount, inside)
        known = named.setdefault(mount.mountpoint, one)
        if known is not one:
            paths_known = {image["path"] for image in known["images"]}
            known["images"] += [
                image for image in one["images"] if image["path"] not in paths_known
            ]
    return list(named.values())


def _query_or_say_why(mount: mounts.Mount) -> dict[str, Any]:
    """Return what the daemon says, or as `error` why it says nothing."""
    try:
        return control_client.query(mount)
    except errors.UserError as error:
        return {
            "mountpoint": mount.mountpoint,
            "cache_dir": None,
            "repository": mount.repository,
            "connected": False,
            "control_socket": mounts.socket_path(mount.mountpoint),
            "images": [],
            "jobs": [],
            "error": str(error),
            **({"foreign": True} if mount.foreign else {}),
        }
