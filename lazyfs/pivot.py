"""Moves running QEMUs from files on a lazyfs mount to the files that the same paths name now.

    survey        which daemons there are, and their images
    look          what QEMU's block nodes and descriptors are          \\
    choose        which nodes to move (core.pivot_choice)               | for each QEMU
    plan          with which QMP commands (core.qemu_graph)             | on its own
    carry out     step by step; when one fails, undo those before it    |
    check         /proc/PID/fd shows no old file                       /

The guest is neither stopped nor asked, and no overlay's header is written. Commands that changed something are never
left half done by an interrupt: one node's steps end first.
"""

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lazyfs import control_client, errors, mounts, process_files, qemu_monitor
from lazyfs.core import inode_number, pivot_choice, qemu_arguments, qemu_graph
from lazyfs.core.pivot_choice import Action, Choice, FileNode, Image, OpenFile, Place
from lazyfs.core.qemu_graph import Graph, Plan

AT_ONCE = 16
"""QEMUs that are moved at the same time: a host has a few descriptors and threads for each."""

PIVOTED, ALREADY, PARTIAL, SKIPPED, FAILED, WOULD = "pivoted", "already", "partial", "skipped", "failed", "would pivot"
GOOD = (PIVOTED, ALREADY, WOULD)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What became of one node."""

    node: str
    path: str
    action: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one QEMU; `error` if not all of its nodes could be seen to."""

    socket: str
    pid: int | None = None
    error: str = ""
    nodes: tuple[NodeReport, ...] = ()

    @property
    def good(self) -> bool:
        """Whether every node is on the file that its path names now."""
        return not self.error and all(node.action in GOOD for node in self.nodes)

    @property
    def partial(self) -> bool:
        """Whether nodes wait for images that are not whole."""
        return any(node.action == PARTIAL for node in self.nodes)

    def lines(self) -> list[str]:
        """Say for people what is well: a line for each node."""
        if self.good and not self.nodes:
            return [f"{self.socket}: nothing to do: no backing file of it lies on a lazyfs"]
        return [self._line(node) for node in self.nodes if node.action in GOOD]

    def complaints(self) -> list[str]:
        """Say for people what is not: a line for each."""
        return [
            *(self._line(node) for node in self.nodes if node.action not in GOOD),
            *([f"{self.socket}: {self.error}"] if self.error else []),
        ]

    def _line(self, node: NodeReport) -> str:
        reason = f": {node.message}" if node.message else ""
        return f"{self.socket}: {node.action} {node.path} (node {node.node or '-'}, pid {self.pid}){reason}"


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose."""

    allow_hmp: bool = False
    dry_run: bool = False


def sockets(paths: Sequence[str], folder: str | None) -> list[str]:
    """Return the QMP sockets that are meant, each once: `paths`, and every UNIX socket in `folder`.

    Raises:
        UserError: the folder cannot be read.
    """
    found = list(paths)
    if folder is not None:
        try:
            inside = sorted(os.path.join(folder, name) for name in os.listdir(folder))
        except OSError as error:
            raise errors.UserError(f"cannot read {folder}: {error.strerror}") from error
        found += [path for path in inside if qemu_monitor.is_socket(path)]
    once: dict[str, str] = {}
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def run(qmp_sockets: Sequence[str], options: Options) -> list[Report]:
    """Pivot each QEMU, independently of the others. Blocks; interrupted, it ends the node that it is at."""
    return asyncio.run(_run(qmp_sockets, options))


def filling(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Return the images, as `query-images` has them, that nodes of living QEMUs wait for and that may become whole."""
    wanted = {
        node.path: None
        for report in reports
        if report.pid is None or not process_files.has_ended(report.pid)
        for node in report.nodes
        if node.action == PARTIAL
    }
    found: list[dict[str, Any]] = []
    for path in wanted:
        mount = mounts.mount_of(os.path.realpath(path))
        if mount is not None:
            with suppress(errors.UserError):  # it is gone; the next pivot says so
                inside = os.path.relpath(os.path.realpath(path), mount.mountpoint)
                found += control_client.query(mount, inside)["images"]
    return [image for image in found if image["state"] not in ("whole", "failed")]


def merge(first: Report, second: Report) -> Report:
    """Return the first report on a QEMU, with what the second says of the nodes that waited then."""
    later = {node.node: node for node in second.nodes}
    nodes = (later.get(node.node, node) if node.action == PARTIAL else node for node in first.nodes)
    return replace(second, pid=first.pid, nodes=tuple(nodes))


# -- what lazyfs knows


@dataclass(frozen=True, slots=True)
class _Lazyfs:
    """All images of all daemons that answered."""

    rows: Mapping[tuple[int, int], Mapping[str, Any]]
    """By device and key."""
    devices: frozenset[int]
    hanging: bool
    """A daemon did not answer, and is not dead."""

    def images(self, places: set[tuple[int, int]], paths: set[str]) -> list[Image]:
        """Return the images with one of these identities or paths: all that one QEMU can have to do with."""
        found = []
        for (device, key), row in self.rows.items():
            if (device, key) in places or row["path"] in paths:
                now = _place_or_none(row["path"])
                found.append(Image(row["path"], device, key, row["state"], row["size"], row["error"], now))
        return found


async def _survey() -> _Lazyfs:
    commands: list[control_client.Command] = [("query-mount", {}), ("query-images", {})]
    answers = await asyncio.gather(
        *(control_client.ask(path, commands) for path in mounts.control_sockets()), return_exceptions=True
    )
    rows = {}
    devices = set()
    hanging = False
    for answer in answers:
        if isinstance(answer, TimeoutError):
            hanging = True
        elif isinstance(answer, OSError | errors.UserError):
            continue  # killed, or ending just now
        elif isinstance(answer, BaseException):
            raise answer
        else:
            mount, images = answer
            device = process_files.device_number(mount["device"])
            devices.add(device)
            rows.update({(device, inode_number.key(row["inode"])): row for row in images})
    return _Lazyfs(rows, frozenset(devices), hanging)


def _place_or_none(path: str) -> Place | None:
    try:
        return process_files.place_of(path)
    except OSError:
        return None


# -- one QEMU


async def _run(qmp_sockets: Sequence[str], options: Options) -> list[Report]:
    lazyfs = await _survey()
    free = asyncio.Semaphore(AT_ONCE)

    async def one(path: str) -> Report:
        async with free:
            return await _pivot(path, lazyfs, options)

    return await asyncio.gather(*map(one, qmp_sockets))


async def _pivot(path: str, lazyfs: _Lazyfs, options: Options) -> Report:
    qemu = None
    try:
        async with qemu_monitor.connected(path) as (monitor, pid):
            qemu = _Qemu(monitor, pid, lazyfs, options)
            await qemu.pivot()
            return Report(path, pid, "", tuple(qemu.reports))
    except errors.UserError as error:
        return Report(path, qemu.pid, str(error), tuple(qemu.reports)) if qemu else Report(path, None, str(error))


@dataclass(slots=True)
class _Qemu:
    monitor: qemu_monitor.Monitor
    pid: int
    lazyfs: _Lazyfs
    options: Options
    reports: list[NodeReport] = field(default_factory=list)

    async def pivot(self) -> None:
        """Move what is to be moved, and add to `reports`.

        Raises:
            UserError: this QEMU cannot be looked at, or answers no more.
        """
        opened = self._opened()
        nodes = self._file_nodes(await self._graph())
        choices, unexplained = pivot_choice.choose(nodes, self._images(nodes, opened), opened)
        for choice in choices:
            self.reports.append(await self._see_to(choice))
        self._check(choices)
        for file in unexplained:
            message = f"QEMU has it open (descriptor {file.fd}), but no block node names it"
            self.reports.append(NodeReport("", file.name, SKIPPED, message))

    # what there is

    def _opened(self) -> list[OpenFile]:
        if self.pid == 0:  # in another pid namespace
            return []
        # Without a daemon that hangs, what no daemon answers for may be asked whether it is dead.
        try:
            return process_files.open_files(self.pid, None if self.lazyfs.hanging else set(self.lazyfs.devices))
        except FileNotFoundError:
            raise errors.UserError(f"process {self.pid} has ended") from None
        except OSError as error:
            raise errors.UserError(f"cannot look at process {self.pid}: {error.strerror}; try as root") from error

    async def _graph(self) -> Graph:
        nodes = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        return qemu_graph.parse(nodes, await self.monitor.execute("x-debug-query-block-graph", {}))

    def _file_nodes(self, graph: Graph) -> list[FileNode]:
        nodes = [node for node in graph.nodes.values() if node.driver == "file" and node.read_only]
        return [self._file_node(node) for node in nodes]

    def _file_node(self, node: qemu_graph.Node) -> FileNode:
        mount = mounts.mount_of(node.filename) if node.filename.startswith("/") else None
        now, trouble = None, ""
        if mount is not None and process_files.device_number(mount.device) not in self.lazyfs.devices:
            # Looking there could take for ever.
            trouble = f"the daemon of {mount.mountpoint} does not answer; if it was killed, mount again"
        else:
            try:
                now = process_files.place_of(node.filename, self.pid or None)
            except OSError as error:
                trouble = f"the path leads nowhere now: {error.strerror}"
        return FileNode(node.name, node.filename, node.size, now, trouble, mount is not None)

    def _images(self, nodes: Sequence[FileNode], opened: Sequence[OpenFile]) -> list[Image]:
        places = {(file.device, inode_number.key(file.inode)) for file in opened}
        places |= {(node.now.device, inode_number.key(node.now.inode)) for node in nodes if node.now is not None}
        return self.lazyfs.images(places, {node.path for node in nodes})

    # what is done

    async def _see_to(self, choice: Choice) -> NodeReport:
        """Do what was chosen; if that loses QEMU, report the node before raising."""
        report = NodeReport(choice.node.name, choice.node.path, "", choice.message)
        if choice.action is not Action.MOVE:
            action = {Action.ALREADY: ALREADY, Action.PARTIAL: PARTIAL, Action.SKIP: SKIPPED}[choice.action]
            return replace(report, action=action)
        try:
            plan = await self._plan(choice.node)
        except qemu_monitor.Lost:
            raise
        except errors.UserError as error:
            return replace(report, action=SKIPPED, message=str(error))
        if self.options.dry_run:
            return replace(report, action=WOULD)
        assert choice.node.now is not None
        try:
            await _to_its_end(self._carry_out(plan, choice.node.now))
        except qemu_monitor.StepFailed as error:
            return replace(report, action=FAILED, message=str(error))
        except qemu_monitor.Lost as error:
            self.reports.append(replace(report, action=FAILED, message=str(error)))
            raise
        return replace(report, action=PIVOTED)

    async def _plan(self, node: FileNode) -> Plan:
        graph = await self._graph()  # again: another node's pivot has changed it
        if node.name not in graph.nodes:
            raise errors.UserError("the node is gone meanwhile")
        known = qemu_arguments.known(self._disks(), graph, node.name)
        plan = qemu_graph.plan(graph, node.name, node.path, known, allow_hmp=self.options.allow_hmp)
        if await self.monitor.execute("query-iothreads", {}):
            for name in plan.dropped:
                if not await self._is_held(name):
                    raise errors.UserError(
                        f"QEMU has I/O threads, and could die of losing node {name}, which is not from -blockdev; "
                        "next time start it with a named -blockdev for the file and one for the node above it"
                    )
        return plan

    async def _is_held(self, name: str) -> bool:
        """Whether the monitor holds this node, which is in use: so deleting it is refused, and the reason tells."""
        try:
            await self.monitor.execute("blockdev-del", {"node-name": name})
        except qemu_monitor.Lost:
            raise
        except qemu_monitor.StepFailed as error:
            return "is in use" in str(error)
        raise errors.UserError(f"node {name} is gone meanwhile")

    def _disks(self) -> list[qemu_arguments.Disk]:
        return qemu_arguments.disks(process_files.command_line(self.pid))

    async def _carry_out(self, plan: Plan, target: Place) -> None:
        """Run a plan; when a step fails, undo those before it.

        Raises:
            qemu_monitor.StepFailed: the text says which step, and how undoing went.
            qemu_monitor.Lost: QEMU answers no more.
        """
        undo: list[tuple[str, Mapping[str, Any]]] = []
        there = self._count(target)
        try:
            for change in plan.changes:
                await self.monitor.execute(change.command, change.arguments)
                undo.append(change.undo)
                if len(undo) == 1 and self._count(target) <= there:
                    raise qemu_monitor.StepFailed(
                        "check of the new node: QEMU has opened another file than the path names here"
                    )
            await self._remove(plan.old)
        except qemu_monitor.StepFailed as failed:
            raise await self._undone(failed, undo) from failed

    async def _undone(
        self, failed: qemu_monitor.StepFailed, undo: Sequence[tuple[str, Mapping[str, Any]]]
    ) -> errors.UserError:
        trouble = []
        for command, arguments in reversed(undo):
            try:
                await self.monitor.execute(command, arguments)
            except qemu_monitor.StepFailed as error:
                trouble.append(str(error))
        outcome = f"undoing it failed: {'; '.join(trouble)}" if trouble else "the VM is as it was"
        return qemu_monitor.StepFailed(f"{failed}; {outcome}")

    async def _remove(self, name: str) -> None:
        """Delete the old node, if the monitor owns it; one that -drive made goes by itself."""
        nodes = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        if any(node["node-name"] == name for node in nodes):
            await self.monitor.execute("blockdev-del", {"node-name": name})

    def _count(self, place: Place) -> int:
        return sum((file.device, file.inode) == (place.device, place.inode) for file in self._opened())

    def _check(self, choices: Sequence[Choice]) -> None:
        """Turn success into failure where an old file is still open and no node's failure explains that."""
        if self.options.dry_run:
            return
        still = {(file.device, file.inode): file.fd for file in self._opened()}
        action = {report.node: report.action for report in self.reports}
        explained = {
            (file.device, file.inode) for one in choices if action[one.node.name] != PIVOTED for file in one.stale
        }
        for number, choice in enumerate(choices):
            left = [
                still[place]
                for file in choice.stale
                if (place := (file.device, file.inode)) in still.keys() - explained
            ]
            if left and action[choice.node.name] == PIVOTED:
                message = f"the old file is still open (descriptor {left[0]}): something besides this node uses it"
                self.reports[number] = replace(self.reports[number], action=FAILED, message=message)


async def _to_its_end(steps: Coroutine[Any, Any, None]) -> None:
    """Run steps that a cancellation must not tear apart; it takes effect after them."""
    task = asyncio.ensure_future(steps)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
