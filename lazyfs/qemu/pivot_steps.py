"""Carries out a plan in one QEMU, step by step. When a step fails, the earlier steps are undone.

That is so whatever the reason is: QEMU refused a step, a check failed, or lazyfs has a bug. Only if
QEMU no longer answers, nothing can be undone.

before            The descriptors of the target that QEMU has open are counted.
plan.changes      Nodes are added. The first one opens the target, so QEMU must have one
                  descriptor more; if it has not, the changes are undone.
                  The nodes above are reopened. From here on QEMU reads the target.
remove plan.old   QEMU refuses this while something else uses the node; then the changes are
                  undone.
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
    """Carries out plans in one QEMU."""

    monitor: qemu_monitor.Monitor
    pid: int

    async def carry_out(self, plan: Plan, target: Place) -> None:
        """Run a plan that exchanges a file for `target`.

        Raises:
            StepFailed: a step failed. The message says which, and whether it could be undone.
            Lost: QEMU no longer answers. If it was lost while undoing, the message says first
                which step had failed.

        Any other exception is passed on after undoing, with a note that says whether that could be
        done.

        Cancellation: undoes the steps that QEMU has answered. A step that is under way may or may
        not be done, so the caller should not cancel this (pivot._to_its_end).
        """
        undo: list[Step] = []
        try:
            there = self._count(target)
            for change in plan.changes:
                await self.monitor.execute(change.command, change.arguments)
                undo.append(change.undo)
                if len(undo) == 1 and self._count(target) <= there:
                    raise qemu_monitor.StepFailed(
                        "check of the new node: "
                        "QEMU has opened another file than the path names here"
                    )
            await self._remove(plan.old)
        except qemu_monitor.Lost:
            raise
        except errors.UserError as failed:
            outcome = await self._undone(str(failed), undo)
            raise qemu_monitor.StepFailed(f"{failed}; {outcome}") from failed
        except BaseException as failed:
            failed.add_note(await self._undone(repr(failed), undo))
            raise

    async def _undone(self, failed: str, undo: Sequence[Step]) -> str:
        """Undo steps, the last one first. Go on if one cannot be undone.

        Raises:
            Lost: QEMU no longer answers.
        """
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
        """Delete the old node if the monitor owns it. A node that -drive made goes by itself."""
        nodes = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        if any(node["node-name"] == name for node in nodes):
            await self.monitor.execute("blockdev-del", {"node-name": name})

    def _count(self, place: Place) -> int:
        """Return how many descriptors QEMU has of the file at `place`.

        There is no other way to know which file a node has opened.
        """
        return sum(file.is_at(place) for file in process_files.open_files(self.pid))
