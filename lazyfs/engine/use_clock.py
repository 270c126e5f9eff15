"""Says when images are used, so that a later use has a later time.

The host's clock can be set back, and the order of eviction must not change with it.
"""

import time


class UseClock:
    """Gives times in ns since the epoch that never go back. Trio thread only."""

    def __init__(self, latest_ns: int) -> None:
        """Begin after `latest_ns`, the latest use that is known."""
        self._latest_ns = latest_ns

    def now_ns(self) -> int:
        """Return the time of now, or a little more than the latest if the clock was set back."""
        self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
        return self._latest_ns
