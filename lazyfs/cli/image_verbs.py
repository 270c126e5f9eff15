"""The verbs that ask the daemon for something about images, such as prefetch, evict and verify.

Each verb takes images by their paths on a mount. A folder, or the mountpoint, means all images
below it. If a verb fails for one image, it goes on with the others, the reason goes to stderr, and
the exit code is 1.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from lazyfs import errors
from lazyfs.cli import map_view, printing, waiting
from lazyfs.control import client as control_client
from lazyfs.host import mounts
from lazyfs.units import format_size

POLL_S = 0.3
"""The time between two queries about a verify job."""

Target = tuple[mounts.Mount, str]
"""A mount, and a path relative to its mountpoint."""


def _each(
    options: argparse.Namespace,
    work: Callable[[Target], dict[str, Any]],
    say: Callable[[dict[str, Any]], str] | None = None,
) -> int:
    """Call `work` for each image that the user named, and print the results.

    Args:
        options: has the images, and whether the results are printed as JSON.
        work: does what is to be done, and returns the result.
        say: returns a line for people about a result. None means that nothing is printed.
    """
    results, failed = [], False
    for path in options.images:
        try:
            if not path:
                raise errors.UserError("an image has an empty name")
            result = work(control_client.locate(path))
            results.append({"path": path, **result})
            if say is not None and not options.json:
                printing.say(f"{path}: {say(result)}")
        except errors.UserError as error:
            failed = True
            printing.complain(error)
            results.append({"path": path, "error": str(error)})
    if options.json:
        json.dump(results, sys.stdout, indent=2)
        print()
    return 1 if failed else 0


def _command(name: str, target: Target, **arguments: Any) -> dict[str, Any]:
    mount, inside = target
    (result,) = control_client.execute(mount, [(name, {"path": inside, **arguments})])
    assert isinstance(result, dict)
    return result


def evict(options: argparse.Namespace) -> int:
    """Evict images: remove what is cached of them, and say what that has freed."""
    arguments = {"dry-run": True} if options.dry_run else {}

    def one(target: Target) -> dict[str, Any]:
        mount, inside = target
        if not inside and not options.all:
            raise errors.UserError(
                f"{mount.mountpoint} stands for every image on it; "
                "evict --all drops what is cached of all of them"
            )
        return _command("evict", target, **arguments)

    def say(done: dict[str, Any]) -> str:
        what = "would be evicted" if options.dry_run else "evicted"
        freed = f"{format_size(done['bytes'])} {'to be freed' if options.dry_run else 'freed'}"
        if done["open_bytes"]:
            freed += f", {format_size(done['open_bytes'])} of that once it is closed"
        stay = f", {done['left']} left (pinned, backing files, or gone)" if done["left"] else ""
        return f"{_images(done['images'])} {what}, {freed}{stay}"

    return _each(options, one, say)


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def forget(options: argparse.Namespace) -> int:
    """Remove images that no longer exist in the repository."""
    return _each(
        options,
        lambda target: _command("forget", target),
        lambda done: f"{_images(done['images'])} forgotten",
    )


def pin(options: argparse.Namespace) -> int:
    """Keep images from being evicted."""
    return _each(
        options,
        lambda target: _command("pin", target),
        lambda done: f"{_images(done['images'])} pinned",
    )


def unpin(options: argparse.Namespace) -> int:
    """Undo `pin`."""
    return _each(
        options,
        lambda target: _command("unpin", target),
        lambda done: f"{_images(done['images'])} unpinned",
    )


def set_rate(options: argparse.Namespace) -> int:
    """Limit the rate of population."""
    limit = f"at most {format_size(options.rate)}/s" if options.rate else "no limit"

    def say(done: dict[str, Any]) -> str:
        return f"{limit} for {_images(done['images'])}"

    return _each(options, lambda target: _command("set-rate", target, rate=options.rate), say)


# -- prefetch


def prefetch(options: argparse.Namespace) -> int:
    """Populate images without a reader. With --wait, wait until they are whole."""
    if options.timeout is not None and not options.wait:
        raise errors.UsageError("--timeout needs --wait")
    begun: list[Target] = []

    def begin(target: Target) -> dict[str, Any]:
        result = _command(
            "prefetch", target, **({"format": options.format} if options.format else {})
        )
        begun.extend((target[0], path) for path in result["paths"])
        return result

    code = _each(options, begin)
    if options.wait:
        waiting.until_whole(lambda: [_not_whole(target) for target in begun], options.timeout)
    return code


def _not_whole(target: Target) -> dict[str, Any]:
    answer = control_client.query(*target)
    images = [image for image in answer["images"] if image["state"] != "whole"]
    return {**answer, "images": images}


# -- jobs


def pause(options: argparse.Namespace) -> int:
    """Pause the population of images."""
    return _each(
        options,
        lambda target: _jobs(
            "job-pause", target, lambda job: _populates(job) and job["status"] != "paused"
        ),
        lambda done: _told_of(done, "paused"),
    )


def resume(options: argparse.Namespace) -> int:
    """Resume the population of images."""
    return _each(
        options,
        lambda target: _jobs(
            "job-resume", target, lambda job: _populates(job) and job["status"] == "paused"
        ),
        lambda done: _told_of(done, "resumed"),
    )


def _told_of(done: dict[str, Any], what: str) -> str:
    images = f"{_images(len(done['jobs']))} {what}"
    return f"population is {what}; {images}" if done.get("population") else images


def cancel(options: argparse.Namespace) -> int:
    """End the population of images, and verify jobs."""
    return _each(
        options,
        lambda target: _jobs(
            "job-cancel", target, lambda job: job["status"] not in ("concluded", "null")
        ),
        lambda done: f"{len(done['jobs'])} job{'' if len(done['jobs']) == 1 else 's'} cancelled",
    )


def _populates(job: dict[str, Any]) -> bool:
    return bool(job["type"] == "populate")


def _image_of(job: dict[str, Any]) -> str:
    """Return the path of the image that a job works on, relative to the mountpoint."""
    name: str = job["id"]
    return name if _populates(job) else name.removeprefix(f"{job['type']}:")


def _jobs(command: str, target: Target, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Apply a command to the jobs of an image, or to those of all images below a folder.

    For a mountpoint, population as a whole is paused or resumed, too.
    """
    mount, inside = target
    all_of_it = not inside and command in ("job-pause", "job-resume")
    if all_of_it:
        control_client.execute(mount, [(command.replace("job", "population"), {})])
    (jobs,) = control_client.execute(mount, [("query-jobs", {})])
    concerned = [job for job in jobs if not inside or f"{_image_of(job)}/".startswith(f"{inside}/")]
    ids = [job["id"] for job in concerned if wanted(job)]
    if not ids and inside and not any(map(_populates, concerned)):
        control_client.query(mount, inside)  # This raises UserError if there is no such image.
        raise errors.UserError(
            f"{mount.mountpoint}/{inside} is not being populated; lazyfs prefetch begins that"
        )
    applied = [job for job in ids if _applied(command, mount, job, must=job == inside)]
    return {"jobs": applied, **({"population": True} if all_of_it else {})}


def _applied(command: str, mount: mounts.Mount, job: str, must: bool) -> bool:
    """Apply a command to a job; return whether the daemon accepted it.

    The daemon refuses if the job has ended, or if another process was faster. That is an error
    only with `must`.
    """
    try:
        control_client.execute(mount, [(command, {"id": job})])
    except control_client.Refused:
        if must:
            raise
        return False
    return True


# -- map


def map_image(options: argparse.Namespace) -> int:
    """Show which ranges of an image are present."""
    mount, inside = control_client.locate(options.image)
    if not inside:
        raise errors.UserError(f"{options.image} is a mountpoint; name an image on it")
    (entries,) = control_client.execute(mount, [("query-map", {"path": inside})])
    if options.json:
        json.dump(entries, sys.stdout, indent=2)
        print()
    else:
        map_view.show(entries)
    return 0


# -- verify


def verify(options: argparse.Namespace) -> int:
    """Read the cached data of images back and check it."""
    if options.digest and len(options.images) > 1:
        raise errors.UsageError("one digest is for one image")
    arguments: dict[str, Any] = {}
    if options.digest:
        arguments["digest"] = options.digest
    if options.against_repository:
        arguments["against-repository"] = True
    if options.drop:
        if not options.against_repository:
            raise errors.UsageError("--drop needs --against-repository")
        arguments["drop"] = True
    return _each(options, lambda target: _verified(target, arguments, quiet=options.json))


def _verified(target: Target, arguments: dict[str, Any], quiet: bool) -> dict[str, Any]:
    mount, inside = target
    images = control_client.query(mount, inside)["images"]
    single = len(images) == 1 and images[0]["path"] == f"{mount.mountpoint}/{inside}"
    names = [
        image["path"].removeprefix(f"{mount.mountpoint}/")
        for image in images
        if single or image["state"] != "remote"
    ]
    damaged = []
    for name in names:
        try:
            outcome = _verify_one(mount, name, arguments)
        except errors.UserError as error:
            damaged.append(str(error))
        else:
            if not quiet:
                printing.say(f"{mount.mountpoint}/{name}: {outcome}")
    if damaged:
        raise errors.UserError("; ".join(damaged))
    return {"images": len(names)}


def _verify_one(mount: mounts.Mount, name: str, arguments: dict[str, Any]) -> str:
    """Return the result of verifying one image, if it is good.

    Raises:
        UserError: the image is damaged, or could not be verified.
    """
    (begun,) = control_client.execute(mount, [("verify", {"path": name, **arguments})])
    if "id" not in begun:
        return "not whole yet; the digest is kept, and compared once it is"
    job = begun["id"]
    try:
        with waiting.bar(f"{mount.mountpoint}/{name}") as advance:
            told = Still()
            while (now := _job(mount, job))["status"] != "concluded":
                advance(now["current-progress"], now["total-progress"])
                told.look(now["current-progress"], lambda: _message(mount))
                time.sleep(POLL_S)
    except BaseException:
        with suppress(errors.UserError):
            control_client.execute(mount, [("job-cancel", {"id": job})])
        raise
    control_client.execute(mount, [("job-dismiss", {"id": job})])
    if error := now.get("error"):
        raise errors.UserError(f"{mount.mountpoint}/{name}: {error}")
    (image,) = control_client.query(mount, name)["images"]
    if image["state"] == "failed":
        raise errors.UserError(
            f"{mount.mountpoint}/{name}: what is cached can be read, but it has failed: "
            f"{image['error']}"
        )
    return "as it should be"


class Still:
    """Tells the user on stderr why a job does not get on, once for each reason."""

    def __init__(self) -> None:
        self._moved_at, self._seen, self._told = time.monotonic(), -1, ""

    def look(self, progress: int, why: Callable[[], str]) -> None:
        """Note the progress, and ask for the reason if there has been none for a while."""
        if progress != self._seen:
            self._moved_at, self._seen = time.monotonic(), progress
        if time.monotonic() < self._moved_at + waiting.STILL_S:
            return
        if (reason := why()) and reason != self._told:
            printing.note(f"nothing moves: {reason}")
            self._told = reason


def _message(mount: mounts.Mount) -> str:
    (status,) = control_client.execute(mount, [("query-mount", {})])
    return str(status["message"])


def _job(mount: mounts.Mount, job: str) -> dict[str, Any]:
    (jobs,) = control_client.execute(mount, [("query-jobs", {})])
    found: Sequence[dict[str, Any]] = [one for one in jobs if one["id"] == job]
    if not found:
        raise errors.UserError(f"the job {job} is gone: somebody dismissed it")
    return found[0]
