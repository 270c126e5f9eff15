"""Carries out a plan in one QEMU, step by step; when a step fails, those before it are undone.

before                    the descriptors of the target are counted
plan.changes              add nodes ...; the first one opens the target: one descriptor more, or undo
                          reopen the nodes above: from here on QEMU reads the target
remove plan.old           refused while something else uses it: undo
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lazyfs import errors
from lazyfs.core.pivot_choice import Place
from lazyfs.core.qemu_graph import Plan, Step
from lazyfs.host import process_files
from lazyfs.qemu import monitor as qemu_monitor


@dataclass(frozen=True, slots=True)
class Steps:
    """Of one QEMU."""

    monitor: qemu_monitor.Monitor
    pid: int

    async def carry_out(self, plan: Plan, target: Place) -> None:
        """Run a plan that exchanges a file for `target`.

        Raises:
            StepFailed: the text says which step, and how undoing went.
            Lost: QEMU answers no more; the text says what failed first.
        """
        undo: list[Step] = []
        try:
            there = self._count(target)
            for change in plan.changes:
                await self.monitor.execute(change.command, change.arguments)
                undo.append(change.undo)
                if len(undo) == 1 and self._count(target) <= there:
                    raise qemu_monitor.StepFailed(
                        "check of the new node: QEMU has opened another file than the path names here"
                    )
            await self._remove(plan.old)
        except qemu_monitor.Lost:
            raise
        except errors.UserError as failed:
            outcome = await self._undone(failed, undo)
            raise qemu_monitor.StepFailed(f"{failed}; {outcome}") from failed

    async def _undone(self, failed: errors.UserError, undo: Sequence[Step]) -> str:
        trouble = []
        for command, arguments in reversed(undo):
            try:
                await self.monitor.execute(command, arguments)
            except qemu_monitor.StepFailed as error:
                trouble.append(str(error))
            except qemu_monitor.Lost as error:
                raise qemu_monitor.Lost(
                    "; ".join([f"{failed}; undoing it failed: {error}", *trouble])
                ) from error
        return f"undoing it failed: {'; '.join(trouble)}" if trouble else "the VM is as it was"

    async def _remove(self, name: str) -> None:
        """Delete the old node, if the monitor owns it; one that -drive made goes by itself."""
        nodes = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        if any(node["node-name"] == name for node in nodes):
            await self.monitor.execute("blockdev-del", {"node-name": name})

    def _count(self, place: Place) -> int:
        """Return how many descriptors of the file there QEMU has; there is no other way to know what a node opened."""
        return sum(file.is_at(place) for file in process_files.open_files(self.pid))
