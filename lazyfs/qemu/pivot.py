"""Moves running QEMUs from files on a lazyfs mount to the files that the same paths name now.

    survey        which daemons there are, and their images (pivot_survey)
    look          what QEMU's block nodes and descriptors are          \\
    choose        which nodes to move (core.pivot_choice)               | for each QEMU
    plan          with which QMP commands (core.qemu_graph)             | on its own
    carry out     step by step; when one fails, undo (pivot_steps)      |
    check         /proc/PID/fd shows no old file                       /

A path may lead elsewhere by now, so QEMU is moved only to what is proved to be the image that it has open, by a size
and a time of change that lazyfs gives the image on every mount and the plain file (core.pivot_choice).

The guest is neither stopped nor asked, and no overlay's header is written. Commands that changed something are never
left half done by an interrupt: one node's steps end first. Until then a QEMU is only asked, never told, and a dry run
ends there.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lazyfs import errors
from lazyfs.control import client as control_client
from lazyfs.core import inode_number, pivot_choice, qemu_arguments, qemu_graph
from lazyfs.core.pivot_choice import Action, Choice, FileNode
from lazyfs.core.qemu_graph import Graph, Plan
from lazyfs.host import mounts, process_files
from lazyfs.qemu import monitor as qemu_monitor
from lazyfs.qemu import pivot_steps, pivot_survey

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""QEMUs that are moved at the same time: a host has a few descriptors and threads for each."""

GOOD = (Action.PIVOTED, Action.ALREADY, Action.MOVE)

Filling = Callable[[], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What became of one node."""

    node: str
    path: str
    action: Action
    message: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one QEMU; `error` if not all of its nodes could be seen to."""

    socket: str
    pid: int | None = None
    error: str = ""
    nodes: tuple[NodeReport, ...] = ()
    qemu: bool = True
    """False if nobody listens there, or a program that does not speak QEMU's protocol."""

    @property
    def good(self) -> bool:
        """Whether every node is on the file that its path names now."""
        return not self.error and all(node.action in GOOD for node in self.nodes)

    @property
    def partial(self) -> bool:
        """Whether nodes wait for images that are not whole."""
        return any(node.action is Action.PARTIAL for node in self.nodes)

    def lines(self) -> list[str]:
        """Say for people what is well: a line for each node."""
        if self.good and not self.nodes:
            return [
                _one_line(f"{self.socket}: nothing to do: no backing file of it lies on a lazyfs")
            ]
        return [self._line(node) for node in self.nodes if node.action in GOOD]

    def complaints(self) -> list[str]:
        """Say for people what is not: a line for each."""
        return [
            *(self._line(node) for node in self.nodes if node.action not in GOOD),
            *([_one_line(f"{self.socket}: {self.error}")] if self.error else []),
        ]

    def _line(self, node: NodeReport) -> str:
        reason = f": {node.message}" if node.message else ""
        return _one_line(
            f"{self.socket}: {node.action} {node.path} (node {node.node or '-'}, pid {self.pid}){reason}"
        )


def _one_line(text: str) -> str:
    """Return it with escapes for what would end the line or steer the terminal: names have any bytes."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose."""

    allow_hmp: bool = False
    dry_run: bool = False


def sockets(paths: Sequence[str], folder: str | None) -> list[str]:
    """Return the QMP sockets that are meant, each once: `paths`, and every UNIX socket in `folder`.

    Raises:
        UserError: the folder cannot be read.
        UsageError: an empty name.
    """
    found = list(paths)
    if "" in found or folder == "":
        raise errors.UsageError(
            "an empty name: name a QMP socket, or a folder of them with --all-in"
        )
    if folder is not None:
        try:
            inside = sorted(os.path.join(folder, name) for name in os.listdir(folder))
        except OSError as error:
            raise errors.UserError(_one_line(f"cannot read {folder}: {error.strerror}")) from error
        found += [path for path in inside if qemu_monitor.is_socket(path)]
    once: dict[str, str] = {}
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def run(
    qmp_sockets: Sequence[str],
    options: Options,
    wait: Callable[[Filling], None] | None = None,
    tell: Callable[[Report], None] = lambda report: None,
) -> list[Report]:
    """Pivot each QEMU, independently of the others. Blocks; interrupted, it ends the node that it is at.

    Args:
        qmp_sockets: Where the QEMUs are.
        options: What the user chose.
        wait: Is called when nodes wait for images, and returns when what it is given returns no more images that are
            not whole; then those QEMUs are pivoted again. None: not waited for.
        tell: Is called with each report; with one on a QEMU that is waited for before and after.

    Returns:
        One report for each QEMU.
    """
    reports = asyncio.run(_run(qmp_sockets, options))
    late = {report.socket: report for report in reports if wait is not None and report.partial}
    for report in reports:
        if report.socket not in late:
            tell(report)
        elif done := [node for node in report.nodes if node.action is not Action.PARTIAL]:
            tell(replace(report, nodes=tuple(done)))
    if wait is None or not late:
        return reports
    wait(lambda: _filling(list(late.values())))
    for again in asyncio.run(_run(list(late), options)):
        first = late[again.socket]
        waited = {node.node for node in first.nodes if node.action is Action.PARTIAL}
        late[again.socket] = both = _merge(first, again)
        tell(replace(both, nodes=tuple(node for node in both.nodes if node.node in waited)))
    return [late.get(report.socket, report) for report in reports]


def _merge(first: Report, second: Report) -> Report:
    """Return the first report on a QEMU, with what the second says of the nodes that waited then."""
    later = {node.node: node for node in second.nodes}
    nodes = (
        later.get(node.node, node) if node.action is Action.PARTIAL else node
        for node in first.nodes
    )
    return replace(second, pid=first.pid, nodes=tuple(nodes))


def _filling(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Return the images, as `query-images` has them, that nodes of living QEMUs wait for and that may become whole.

    Also those whose path does not lead to the whole image yet.
    """
    wanted = {
        node.path: None
        for report in reports
        if report.pid is None or not process_files.has_ended(report.pid)
        for node in report.nodes
        if node.action is Action.PARTIAL
    }
    found: list[dict[str, Any]] = []
    for path in wanted:
        mount = mounts.mount_of(os.path.realpath(path))
        if mount is not None:
            with suppress(errors.UserError):  # it is gone; the next pivot says so
                inside = os.path.relpath(os.path.realpath(path), mount.mountpoint)
                images = control_client.query(mount, inside)["images"]
                found += [
                    image
                    for image in images
                    if image["state"] != "failed" and not _is_there(image, mount)
                ]
    return found


def _is_there(image: Mapping[str, Any], mount: mounts.Mount) -> bool:
    """Whether the path leads to the whole image, or elsewhere: then there is nothing to wait for."""
    if image["state"] != "whole":
        return False
    try:
        now = process_files.place_of(image["path"])
    except OSError:
        return True
    return now.device != process_files.device_number(mount.device) or inode_number.is_whole(
        now.inode
    )


# -- one QEMU


async def _run(qmp_sockets: Sequence[str], options: Options) -> list[Report]:
    lazyfs = await pivot_survey.survey()
    free = asyncio.Semaphore(AT_ONCE)

    async def one(path: str) -> Report:
        async with free:
            return await _pivot(path, lazyfs, options)

    return await asyncio.gather(*map(one, qmp_sockets))


async def _pivot(path: str, lazyfs: pivot_survey.Lazyfs, options: Options) -> Report:
    """Pivot one QEMU; whatever happens there is its report, so that the others go on."""
    qemu, is_qemu = None, True
    try:
        async with qemu_monitor.connected(path) as (monitor, pid):
            qemu = _Qemu(monitor, pid, lazyfs, options)
            await qemu.pivot()
            return Report(path, pid, "", tuple(qemu.reports))
    except qemu_monitor.NoQemu as error:
        trouble, is_qemu = str(error), False
    except errors.UserError as error:
        trouble = str(error)
    except Exception as error:
        logger.debug("a bug in lazyfs: socket=%s", path, exc_info=True)
        trouble = f"the pivot failed, a bug in lazyfs: {error!r}"
    return (
        Report(path, qemu.pid, trouble, tuple(qemu.reports))
        if qemu
        else Report(path, None, trouble, (), is_qemu)
    )


@dataclass(slots=True)
class _Qemu:
    monitor: qemu_monitor.Monitor
    pid: int
    lazyfs: pivot_survey.Lazyfs
    options: Options
    reports: list[NodeReport] = field(default_factory=list)

    async def pivot(self) -> None:
        """Move what is to be moved, and add to `reports`.

        Raises:
            UserError: this QEMU cannot be looked at, or answers no more.
        """
        view = await pivot_survey.look(self.pid, await self._graph(), self.lazyfs)
        choices, unexplained = pivot_choice.choose(view.nodes, view.images, view.opened)
        for choice in choices:
            self.reports.append(await self._see_to(choice))
        self._check(choices)
        for file in unexplained:
            message = f"QEMU has it open (descriptor {file.fd}), but no block node names it"
            self.reports.append(NodeReport("", file.name, Action.SKIPPED, message))

    async def _graph(self) -> Graph:
        nodes = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        return qemu_graph.parse(nodes, await self.monitor.execute("x-debug-query-block-graph", {}))

    async def _see_to(self, choice: Choice) -> NodeReport:
        """Do what was chosen; if that loses QEMU, report the node before raising."""
        report = NodeReport(choice.node.name, choice.node.path, choice.action, choice.message)
        if choice.action is not Action.MOVE:
            return report
        try:
            plan = await self._plan(choice.node)
        except qemu_monitor.Lost:
            raise
        except errors.UserError as error:
            return replace(report, action=Action.SKIPPED, message=str(error))
        if self.options.dry_run:
            return report
        assert choice.node.now is not None
        try:
            await _to_its_end(
                pivot_steps.Steps(self.monitor, self.pid).carry_out(plan, choice.node.now)
            )
        except qemu_monitor.StepFailed as error:
            return replace(report, action=Action.FAILED, message=str(error))
        except BaseException as error:
            self.reports.append(
                replace(report, action=Action.FAILED, message=str(error) or repr(error))
            )
            raise
        return replace(report, action=Action.PIVOTED)

    async def _plan(self, node: FileNode) -> Plan:
        graph = await self._graph()  # again: another node's pivot has changed it
        if node.name not in graph.nodes:
            raise errors.UserError("the node is gone meanwhile")
        disks = qemu_arguments.disks(process_files.command_line(self.pid))
        known = qemu_arguments.known(disks, graph)
        plan = qemu_graph.plan(graph, node.name, node.path, known, allow_hmp=self.options.allow_hmp)
        unsafe = sorted(set(plan.dropped) - qemu_arguments.held(disks, list(graph.nodes)))
        if unsafe and await self.monitor.execute("query-iothreads", {}):
            raise errors.UserError(
                f"QEMU has I/O threads, and could die of losing node {unsafe[0]}, which its command line does not make "
                "with a -blockdev of its own (a node that was added later cannot be told from an unsafe one); "
                "next time start it with a named -blockdev for the file and one for the node above it"
            )
        return plan

    def _check(self, choices: Sequence[Choice]) -> None:
        """Turn success into failure where an old file is still open and no node's failure explains that."""
        if self.options.dry_run:
            return
        still = {(file.device, file.inode): file.fd for file in process_files.open_files(self.pid)}
        action = {report.node: report.action for report in self.reports}
        explained = {
            (file.device, file.inode)
            for one in choices
            if action[one.node.name] is not Action.PIVOTED
            for file in one.stale
        }
        for number, choice in enumerate(choices):
            left = [
                still[place]
                for file in choice.stale
                if (place := (file.device, file.inode)) in still.keys() - explained
            ]
            if left and action[choice.node.name] is Action.PIVOTED:
                message = f"the old file is still open (descriptor {left[0]}): something besides this node uses it"
                self.reports[number] = replace(
                    self.reports[number], action=Action.FAILED, message=message
                )


async def _to_its_end(steps: Coroutine[Any, Any, None]) -> None:
    """Run steps that a cancellation must not tear apart; it takes effect after them."""
    task = asyncio.ensure_future(steps)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
