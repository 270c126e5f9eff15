"""Defines what a check of a cache directory has found."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """Describes one thing that is wrong, or (with `warning`) may be wrong."""

    path: str
    """The path relative to the cache directory."""
    problem: str
    remedy: str
    """What a repair does with it, as a participle. If it does nothing, what the user can do."""
    repairable: bool
    repaired: bool
    warning: bool
    error: str
    """The reason why the repair failed, or "" if it did not fail."""

    def line(self) -> str:
        """Return the finding as one line for people."""
        start = f"{'warning: ' if self.warning else ''}{self.path}: {self.problem}; "
        if self.error:
            return f"{start}could not be {self.remedy}: {self.error}"
        return start + (
            self.remedy if self.repaired or not self.repairable else f"would be {self.remedy}"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Holds what a check found."""

    cache_dir: str
    images: int
    findings: list[Finding]

    @property
    def problems(self) -> int:
        """Return how many things are wrong and have not been repaired."""
        return sum(not finding.warning and not finding.repaired for finding in self.findings)

    def summary(self) -> str:
        """Return the last line of the report."""
        repaired = sum(finding.repaired for finding in self.findings)
        done = f"{repaired} repaired, " if repaired else ""
        return f"{self.cache_dir}: {self.images} images, {done}{self.problems or 'no'} problems"
