"""Holds what population and its job know about one image."""

from dataclasses import dataclass, field

from lazyfs.core.pacing import RoundRate
from lazyfs.engine.pace import Pace


@dataclass(slots=True)
class Populating:
    """Says whether, when and how fast an image is populated.

    Trio thread only, except for `pace`.
    """

    pace: Pace
    wanted: bool
    """True if population may work on the image. With `--no-populate` it is False until `prefetch`.
    It is also False after `job-cancel`."""
    paused: bool = False
    """True after `job-pause`."""
    waits_since: int | None = None
    """The number of population's turn in which it last worked on the image, or first saw it."""
    after: float = 0.0
    """Population leaves the image alone until this time, by trio's clock, after a failure."""
    rate: RoundRate = field(default_factory=RoundRate)
    """How fast bytes of the image are fetched, by readers as well."""
    unreachable: bool = False
    """True if the latest turn failed because the repository could not be reached."""
    trouble: str = ""
    """Why the latest turn of population failed. It is "" if it did not."""
    trouble_at: int = 0
    """How many bytes had been fetched in all by then."""

    def note_trouble(self, why: str, fetched_bytes: int, unreachable: bool = False) -> None:
        """Note why a turn has failed, or with "" that it has not."""
        self.trouble, self.trouble_at, self.unreachable = why, fetched_bytes, unreachable

    def trouble_now(self, fetched_bytes: int) -> str:
        """Return why the latest turn failed, unless more bytes have come since."""
        return self.trouble if fetched_bytes == self.trouble_at else ""

    @property
    def goes_on(self) -> bool:
        """True if population may work on the image now."""
        return self.wanted and not self.paused

    def due(self, now: float) -> float:
        """Return when population may work on the image next, by trio's clock.

        `now` or an earlier time means at once.
        """
        return max(self.after, now + self.pace.own_wait_s())

    def want(self) -> None:
        """Let population work on the image, unless it is paused."""
        self.wanted = True
        self.pace.stopped = self.paused

    def pause(self) -> None:
        """Pause population, including the turn under way."""
        self.paused = self.pace.stopped = True
        self.rate.forget()

    def resume(self) -> None:
        """Undo `pause`."""
        self.paused = False
        self.pace.stopped = not self.wanted

    def stop(self) -> None:
        """Stop population until `want` is called, including the turn under way."""
        self.wanted = self.paused = False
        self.rate.forget()
        self.pace.stopped = True
