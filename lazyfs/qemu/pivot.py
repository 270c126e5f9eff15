"""Moves running QEMUs from files on a lazyfs mount to the files that the same paths name now.

    survey        which daemons there are, and their images (pivot_survey)
    look          what QEMU's block nodes and descriptors are          \\
    choose        which nodes to move (core.pivot_choice)               | for each QEMU
    plan          with which QMP commands (core.qemu_graph)             | on its own
    carry out     step by step; if a step fails, undo (pivot_steps)     |
    check         /proc/PID/fd shows no old file                       /

A path may lead to another file than before. So QEMU is moved only to a file that is proved to be
the image which QEMU has open. The proof is the size and the time of change, which lazyfs gives to
the image on every mount and to the plain file (core.pivot_choice).

The guest is not stopped and notices nothing, and no overlay's header is written. Until the step
"carry out", QEMU is only asked and nothing is changed; a dry run ends there. Interrupts, however
many there are, do not leave a node half changed: the steps of that node are finished first.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lazyfs import errors
from lazyfs.control import client as control_client
from lazyfs.core import inode_number, pivot_choice, qemu_arguments, qemu_graph
from lazyfs.core.escaping import one_line
from lazyfs.core.pivot_choice import Action, Choice, FileNode
from lazyfs.core.qemu_graph import Graph, Plan
from lazyfs.host import mounts, process_files
from lazyfs.qemu import monitor as qemu_monitor
from lazyfs.qemu import pivot_steps, pivot_survey

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""How many QEMUs are moved at the same time. Each of them needs a few descriptors and threads."""

GOOD = (Action.PIVOTED, Action.ALREADY, Action.MOVE)

Filling = Callable[[], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Says what happened to one node."""

    node: str
    path: str
    action: Action
    message: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Says what happened to one QEMU. `error` is set if not all of its nodes could be handled."""

    socket: str
    pid: int | None = None
    error: str = ""
    nodes: tuple[NodeReport, ...] = ()
    qemu: bool = True
    """False if no process listens at the socket, or one that does not speak QEMU's protocol."""

    @property
    def good(self) -> bool:
        """Return whether every node has the file open that its path names now."""
        return not self.error and all(node.action in GOOD for node in self.nodes)

    @property
    def partial(self) -> bool:
        """Return whether nodes wait for images that are not whole."""
        return any(node.action is Action.PARTIAL for node in self.nodes)

    def lines(self) -> list[str]:
        """Return a line for people about each node that needs nothing more."""
        if self.good and not self.nodes:
            return [
                one_line(f"{self.socket}: nothing to do: no backing file of it lies on a lazyfs")
            ]
        return [self._line(node) for node in self.nodes if node.action in GOOD]

    def complaints(self) -> list[str]:
        """Return a line for people about each node that was not moved, and about the error."""
        return [
            *(self._line(node) for node in self.nodes if node.action not in GOOD),
            *([one_line(f"{self.socket}: {self.error}")] if self.error else []),
        ]

    def _line(self, node: NodeReport) -> str:
        reason = f": {node.message}" if node.message else ""
        return one_line(
            f"{self.socket}: {node.action} {node.path} "
            f"(node {node.node or '-'}, pid {self.pid}){reason}"
        )


@dataclass(frozen=True, slots=True)
class Options:
    """Holds what the user chose."""

    allow_hmp: bool = False
    dry_run: bool = False


def sockets(paths: Sequence[str], folder: str | None) -> list[str]:
    """Return the QMP sockets that the user named: `paths`, and every UNIX socket in `folder`.

    A socket that is named twice is returned once.

    Raises:
        UserError: the folder cannot be read.
        UsageError: a name is empty.
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
            raise errors.UserError(one_line(f"cannot read {folder}: {error.strerror}")) from error
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
    """Pivot each QEMU, independently of the others.

    This blocks. When it is interrupted, it first finishes the steps of the nodes that are being
    moved. Each step has a deadline (`monitor.COMMAND_S`), so that takes a limited time.

    Args:
        qmp_sockets: where the QEMUs are.
        options: what the user chose.
        wait: is called if nodes wait for images. It must return when the function it is given
            returns no more images. Then the QEMUs of those nodes are pivoted again. If `wait` is
            None, nothing is waited for.
        tell: is called with each report. For a QEMU that is waited for it is called twice: with
            the nodes that did not wait, and later with those that did.

    Returns:
        One report for each QEMU.
    """
    reports = _uninterrupted(_run(qmp_sockets, options))
    late = {report.socket: report for report in reports if wait is not None and report.partial}
    for report in reports:
        if report.socket not in late:
            tell(report)
        elif done := [node for node in report.nodes if node.action is not Action.PARTIAL]:
            tell(replace(report, nodes=tuple(done)))
    if wait is None or not late:
        return reports
    wait(lambda: _filling(list(late.values())))
    for again in _uninterrupted(_run(list(late), options)):
        first = late[again.socket]
        waited = {node.node for node in first.nodes if node.action is Action.PARTIAL}
        late[again.socket] = both = _merge(first, again)
        tell(replace(both, nodes=tuple(node for node in both.nodes if node.node in waited)))
    return [late.get(report.socket, report) for report in reports]


def _uninterrupted(pivots: Coroutine[Any, Any, list[Report]]) -> list[Report]:
    """Run `pivots` in an event loop in which an interrupt cancels tasks, and does nothing else.

    asyncio.run alone does so for the first interrupt only. A second one raises KeyboardInterrupt in
    whatever the loop is doing, and so ends steps that are under way.

    Raises:
        KeyboardInterrupt: there was an interrupt, and all steps that were under way have ended.
    """
    # A process that is to ignore interrupts, or to handle them in another way, goes on doing so.
    catches = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    interrupted = False

    async def cancellable() -> list[Report]:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            task.cancel()

        if not catches:
            return await pivots
        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            return await pivots
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise


def _merge(first: Report, second: Report) -> Report:
    """Return the first report on a QEMU, with the second one's results for nodes that waited."""
    later = {node.node: node for node in second.nodes}
    nodes = (
        later.get(node.node, node) if node.action is Action.PARTIAL else node
        for node in first.nodes
    )
    return replace(second, pid=first.pid, nodes=tuple(nodes))


def _filling(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Return the answers of daemons with the images that nodes of living QEMUs wait for.

    They are in the form of `client.query`, without images that will not become whole. A whole image
    counts, too, while its path does not lead to the whole image yet.
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
            with suppress(errors.UserError):  # The daemon has ended. The next pivot reports it.
                inside = os.path.relpath(os.path.realpath(path), mount.mountpoint)
                answer = control_client.query(mount, inside)
                images = [
                    image
                    for image in answer["images"]
                    if image["state"] != "failed" and not _is_there(image, mount)
                ]
                found.append({**answer, "images": images})
    return found


def _is_there(image: Mapping[str, Any], mount: mounts.Mount) -> bool:
    """Return whether there is nothing to wait for.

    That is so if the path leads to the whole image, or to something else than this mount.
    """
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
    """Pivot one QEMU. Any failure becomes part of its report, so that the other QEMUs go on."""
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
        """Move the nodes that are to be moved, and add to `reports`.

        Raises:
            UserError: this QEMU cannot be inspected, or no longer answers.
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
        """Do what was chosen for a node, and report it.

        If QEMU is lost meanwhile, the node's report is added before the error is raised.
        """
        report = NodeReport(choice.node.name, choice.node.path, choice.action, choice.message)
        if choice.action not in (Action.MOVE, Action.PARTIAL):
            return report
        # Nobody should wait for an image only to hear then that its node cannot be moved.
        try:
            plan = await self._plan(choice.node)
        except qemu_monitor.Lost:
            raise
        except errors.UserError as error:
            return replace(report, action=Action.SKIPPED, message=str(error))
        if self.options.dry_run or choice.action is Action.PARTIAL:
            return report
        assert choice.node.now is not None
        try:
            await _to_its_end(
                pivot_steps.Steps(self.monitor, self.pid).carry_out(plan, choice.node.now)
            )
        except qemu_monitor.StepFailed as error:
            return replace(report, action=Action.FAILED, message=str(error))
        except BaseException as error:
            message = "; ".join([str(error) or repr(error), *getattr(error, "__notes__", ())])
            self.reports.append(replace(report, action=Action.FAILED, message=message))
            raise
        return replace(report, action=Action.PIVOTED)

    async def _plan(self, node: FileNode) -> Plan:
        graph = await self._graph()  # Moving another node has changed the graph.
        if node.name not in graph.nodes:
            raise errors.UserError("the node no longer exists")
        disks = qemu_arguments.disks(process_files.command_line(self.pid))
        known = qemu_arguments.known(disks, graph)
        plan = qemu_graph.plan(graph, node.name, node.path, known, allow_hmp=self.options.allow_hmp)
        unsafe = sorted(set(plan.dropped) - qemu_arguments.held(disks, list(graph.nodes)))
        if unsafe and await self.monitor.execute("query-iothreads", {}):
            raise errors.UserError(
                f"QEMU has I/O threads, and could die of losing node {unsafe[0]}, "
                "which its command line does not make with a -blockdev of its own "
                "(a node that was added later cannot be told from an unsafe one); "
                "next time start it with a named -blockdev for the file "
                "and one for the node above it"
            )
        return plan

    def _check(self, choices: Sequence[Choice]) -> None:
        """Turn success into failure where an old file is still open.

        A file that is still open because another node has not been moved does not count.
        """
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
                message = (
                    f"the old file is still open (descriptor {left[0]}): "
                    "something besides this node uses it"
                )
                self.reports[number] = replace(
                    self.reports[number], action=Action.FAILED, message=message
                )


async def _to_its_end(steps: Coroutine[Any, Any, None]) -> None:
    """Run `steps` to their end, even if this task is cancelled meanwhile, and however often.

    The cancellation takes effect after the steps.
    """
    task = asyncio.ensure_future(steps)
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    task.result()
