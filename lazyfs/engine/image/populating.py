"""What population and its job know about one image."""

from dataclasses import dataclass

from lazyfs.engine.pace import Pace


@dataclass(slots=True)
class Populating:
    """Whether, when and how fast an image is populated. Trio thread only, `pace` excepted."""

    pace: Pace
    wanted: bool
    """Population may work on it. False with `--no-populate` until `prefetch`, and after
    `job-cancel`."""
    paused: bool = False
    """By `job-pause`."""
    waits_since: int | None = None
    """The number of population's turn when it last worked here, or first saw it."""
    after: float = 0.0
    """Population leaves it alone until this time (trio's clock), after a failure."""
    trouble: str = ""
    """Why the latest turn of population failed; "" if it did not."""

    @property
    def goes_on(self) -> bool:
        """Whether population may work on it now."""
        return self.wanted and not self.paused

    def due(self, now: float) -> float:
        """Return when population may work on it next, by trio's clock; `now` or before: at once."""
        return max(self.after, now + self.pace.own_wait_s())

    def want(self) -> None:
        """Let population work on it, unless it is paused."""
        self.wanted = True
        self.pace.stopped = self.paused

    def pause(self) -> None:
        """Stop, the turn under way included."""
        self.paused = self.pace.stopped = True

    def resume(self) -> None:
        """Undo `pause`."""
        self.paused = False
        self.pace.stopped = not self.wanted

    def stop(self) -> None:
        """Stop for good, the turn under way included: until `want`."""
        self.wanted = self.paused = False
        self.pace.stopped = True
