"""Asks in a thread which images overlays need, and gives up when a file system hangs."""

from collections.abc import Callable

import trio

from lazyfs import errors

SCAN_S = 60.0
"""How long looking for overlays may take. A hundred thousand files on a slow disk take a minute."""


class BackingFiles:
    """Runs one scan at a time. Trio thread only."""

    def __init__(self, scan: Callable[[], frozenset[str]]) -> None:
        """`scan` blocks, and returns the paths of images that overlays need, or raises UserError.

        It is called in a thread of its own: a network file system that hangs must not take the
        threads of others.
        """
        self._scan = scan
        self._thread = trio.CapacityLimiter(1)
        self._late = False
        """True if a scan took too long. While it is under way, nobody waits for another."""

    async def find(self) -> frozenset[str]:
        """Return the paths of images that overlays need.

        Raises:
            UserError: they cannot be found out.
        Cancellation: the scan ends by itself.
        """
        if not (self._late and self._thread.borrowed_tokens):
            self._late = False
            with trio.move_on_after(SCAN_S):
                return await trio.to_thread.run_sync(
                    self._scan, limiter=self._thread, abandon_on_cancel=True
                )
            self._late = True
        raise errors.UserError(
            f"the folders of --overlays could not be read in {SCAN_S:g} s: "
            "perhaps a file system there hangs"
        )
