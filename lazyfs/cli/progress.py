"""Says how the population of an image goes, for `status` and for verbs that wait.

An image and a job are rows of `query-images` and `query-jobs`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lazyfs.units import format_duration, format_size

_WAITS = {
    "resume": "paused",
    "repository": "not connected",
    "retry": "tries again",
    "room": "no room",
    "turn": "waits",
}
"""What is said about an image, by what its job waits for."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Describes how the population of an image, or of several together, goes."""

    missing: int
    """Bytes that are not here yet."""
    rate: float
    """Bytes per second. It is 0 if nothing is being populated."""
    waits: str
    """In two words why nothing moves. It is "" if something does, or if nothing is to be done."""
    active: bool
    """True if it is being populated, or is to be."""

    @property
    def to_go_s(self) -> float | None:
        """The time that is left in seconds, or None if it cannot be told."""
        return self.missing / self.rate if self.rate >= 1 and self.missing else None

    @property
    def text(self) -> str:
        """The rate and the time that is left, or why nothing moves, for people."""
        if not self.active or self.waits:
            return self.waits
        rate, to_go_s = f"{format_size(round(self.rate))}/s", self.to_go_s
        return rate if to_go_s is None else f"{rate}, {format_duration(to_go_s)}"


def of_image(
    image: Mapping[str, Any], job: Mapping[str, Any] | None, connected: bool = True
) -> Progress:
    """Return how the population of one image goes.

    Args:
        image: the image.
        job: its populate job, or None.
        connected: whether the repository answers its mount.
    """
    missing = max(0, (image["size"] or 0) - image["present_bytes"] - image["zero_bytes"])
    if job is None or image["state"] != "partial":
        return Progress(missing, 0, "", False)
    waits = _WAITS.get(job.get("waits_for", ""), "" if connected else _WAITS["repository"])
    return Progress(missing, 0 if waits else image["fill_rate"], waits, True)


def of_all(images: Iterable[Progress]) -> Progress:
    """Return how the population of images goes together.

    Those that wait for their turn count as work that is left. Those that wait for something else do
    not, because nobody can tell when they go on.
    """
    active = [one for one in images if one.active]
    moving = [one for one in active if one.waits in ("", _WAITS["turn"])]
    rate = sum(one.rate for one in moving)
    reasons = sorted({one.waits for one in active if one.waits})
    nothing = bool(reasons) and all(one.waits for one in active)
    return Progress(
        sum(one.missing for one in moving),
        rate,
        ", ".join(reasons) if nothing else "",
        bool(active),
    )


def populate_jobs(mount: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the populate jobs of a mount by the absolute paths of their images."""
    prefix = mount["mountpoint"].rstrip("/")
    return {
        f"{prefix}/{job['id']}": job for job in mount.get("jobs", []) if job["type"] == "populate"
    }
