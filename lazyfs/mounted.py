"""Serves a mount: its background tasks, its signals, and the commands that concern all of it."""

import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lazyfs.kernel import passthrough  # isort: skip  # before pyfuse3
import pyfuse3
import trio

import lazyfs
from lazyfs import assembly, errors
from lazyfs.assembly import Parts
from lazyfs.cache.cache_dir import CacheDir
from lazyfs.control.commands import Handler
from lazyfs.control.server import ControlServer
from lazyfs.core.eviction import Limits
from lazyfs.core.lifecycle import State
from lazyfs.core.pacing import Backoff
from lazyfs.core.qmp_wire import CommandError
from lazyfs.engine.filesystem import Options
from lazyfs.engine.interfaces import FileAttributes
from lazyfs.engine.supervision import log_failure
from lazyfs.host import mounts
from lazyfs.kernel.channel import Connection, Keeper
from lazyfs.kernel.present_files import PresentFiles
from lazyfs.kernel.session import ENDING, MAX_BACKGROUND, KernelSession
from lazyfs.qemu.overlay_scan import OverlayScan
from lazyfs.repository.nbd_repository import NbdRepository

if TYPE_CHECKING:
    from lazyfs.report.metrics_server import MetricsServer

logger = logging.getLogger(__name__)

LAST_ANSWERS_S = 1.0
"""How long the end of the daemon waits for requests of the kernel, and for control commands
under way, such as the `detach` that caused it."""

ALIVE_S = 2.0
"""How often the daemon tells the keeper that it is alive. The keeper waits for ten seconds."""

SILENT_S = 3.0
"""After so long without a byte, while reads wait, `status` says that the repository is not
answering. Answers over a slow link take a second or two."""

SAVE_USES_S = 30.0
"""How late the catalog is told that an image was used. A crash loses the uses of this time,
which matter only for the order of eviction."""

MAX_REQUESTS = 2 * MAX_BACKGROUND
"""How many FUSE requests are handled at once. Those that read ahead or directly leave half of them
to all others."""


@dataclass(frozen=True, slots=True)
class MountConfig:
    """Holds everything that `lazyfs mount` decides."""

    repository: str
    mountpoint: str
    cache_dir: str
    file_attributes: FileAttributes
    options: Options
    refresh_s: float
    limits: Limits
    overlays: Sequence[str]
    """Folders of qcow2 files whose backing files are never evicted."""
    metrics: str | None
    """Where to serve the metrics, as "HOST:PORT". None means that they are not served."""
    passthrough: bool
    allow_evict: bool
    log_level: str = "info"
    moved: bool = False
    """True if the cache was filled from this repository at another address."""
    trust_cache_owner: bool = False
    """True if others may own the cache folder, or write to it."""
    chosen: Mapping[str, object] = field(default_factory=dict)
    """What differs from the defaults, by the keys of a configuration file, as JSON has it."""
    reread: "Callable[[], MountConfig] | None" = None
    """Reads the configuration again. Blocks. Raises UserError if it is wrong."""
    reopen_log: Callable[[], None] = lambda: None
    """Opens the log file again, which may have been renamed."""
    dropped_log_lines: Callable[[], int] = lambda: 0
    """Returns how many lines of the log were dropped because the log blocked."""


class Mounted:
    """Serves a mount: its background tasks, and the commands that concern it as a whole."""

    def __init__(
        self,
        config: MountConfig,
        cache: CacheDir,
        repository: NbdRepository,
        parts: Parts,
        session: KernelSession,
        backings: passthrough.Backings,
        metrics: "MetricsServer | None",
        overlays: OverlayScan,
        keeper: Keeper,
        connection: Connection,
        present: PresentFiles,
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._present = present
        self.hands_over = False
        """True if another daemon goes on with the mount."""
        self._handing_over = trio.Event()
        self._overlays = overlays
        self._reread = trio.Event()
        """Set when the configuration has been read again, and renewed then."""
        self._cache = cache
        self._repository = repository
        self._parts = parts
        self._session = session
        self._backings = backings
        self._metrics = metrics
        self._used = trio.Event()
        self._answering = trio.CancelScope()
        """The scope of the kernel's requests that are being answered."""
        parts.room.may_evict = not session.detached
        self._detaching = trio.Lock()
        self._unmounting = trio.CapacityLimiter(2)
        """Limits the threads that unmount. They are separate so that a disk that stalls cannot
        take them."""
        own: dict[str, Handler] = {
            "query-mount": self._query_mount,
            "detach": self._detach,
            "upgrade": self._upgrade,
        }
        where = (
            mounts.detached_socket_path(keeper.pid)
            if session.detached
            else mounts.socket_path(config.mountpoint)
        )
        self._control = ControlServer(
            where, socket.socket(fileno=connection.control_fd), parts.commands.handlers | own
        )
        assembly.wire(parts, self._control.emit, on_use=lambda: self._used.set())

    async def serve(self, notes: Sequence[str]) -> None:
        """Answer the kernel until it is unmounted.

        Args:
            notes: what the user should know although it is mounted.
        """
        keep_running = self._parts.supervisor.keep_running
        async with trio.open_nursery() as nursery:
            await assembly.start(self._parts, nursery)
            nursery.start_soon(log_failure, "opening what an earlier daemon left", self._resume)
            nursery.start_soon(self._control.run)
            await nursery.start(self._unmount_on_signal)
            await nursery.start(self._reload_on_signal)
            nursery.start_soon(keep_running, "looking at the repository", self._refresh)
            nursery.start_soon(keep_running, "saving when images were used", self._save_uses)
            if self._metrics is not None:
                nursery.start_soon(keep_running, "serving metrics", self._serve_metrics)
            self._keeper.serving(notes, self._config.options.io_timeout_s)
            nursery.start_soon(self._be_alive)
            nursery.start_soon(self._hand_over)
            with self._answering:
                await pyfuse3.main(max_tasks=MAX_REQUESTS)
            with trio.move_on_after(LAST_ANSWERS_S):
                await self._control.all_answered()
            nursery.cancel_scope.cancel()

    async def _resume(self) -> None:
        await self._parts.filesystem.resume()
        self._keeper.restored()

    async def _be_alive(self) -> None:
        """Tell the keeper from time to time that the loop turns."""
        while True:
            self._keeper.alive(self._status_line())
            await trio.sleep(ALIVE_S)

    async def _hand_over(self) -> None:
        """Stop to answer when another daemon is to go on.

        Requests under way are not answered: the keeper gives them to the next one.
        """
        await self._handing_over.wait()
        await self._control.all_answered()
        self._present.stays = True
        pyfuse3.terminate()
        self._answering.cancel()

    async def _serve_metrics(self) -> None:
        from lazyfs.report.metrics import Mount

        assert self._metrics is not None
        parts = self._parts
        mount = Mount(
            self._config.mountpoint,
            parts.filesystem,
            parts.population,
            self._repository.statistics,
            self._backings,
            parts.room,
            self._config.dropped_log_lines,
        )
        await self._metrics.run(mount.picture)

    async def _save_uses(self) -> None:
        """Save from time to time when images were used. Nothing wakes up while none is used."""
        while True:
            await self._used.wait()
            await trio.sleep(SAVE_USES_S)
            self._used = trio.Event()
            await self._parts.filesystem.save_uses()

    async def _refresh(self) -> None:
        """Look at the repository's list from time to time, more often while it cannot be had."""
        backoff = Backoff(first=1.0, limit=self._config.refresh_s)
        filesystem = self._parts.filesystem
        while True:
            lost = bool(filesystem.list_trouble) or not self._repository.connected
            wait_s = self._config.refresh_s
            with trio.move_on_after(min(backoff.next(), wait_s) if lost else wait_s):
                await self._reread.wait()
                continue  # with another interval, perhaps
            try:
                await filesystem.refresh()
                backoff.reset()
            except errors.LazyfsError as error:
                logger.debug("no list: %s", error)
            except OSError as error:
                logger.warning("the list could not be taken in: %s", error)

    async def _unmount_on_signal(self, task_status: trio.TaskStatus[None]) -> None:
        session = self._session
        with trio.open_signal_receiver(*ENDING) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            task_status.started()
            async for number in signals:
                logger.info("%s: unmounting %s", signal.Signals(number).name, session.mountpoint)
                try:
                    unmounted = await trio.to_thread.run_sync(
                        session.unmount, False, limiter=self._unmounting
                    )
                    if unmounted:
                        # The connection does not end if it is mounted elsewhere, too.
                        await trio.sleep(LAST_ANSWERS_S)
                    logger.warning(
                        "files are open, or it is mounted elsewhere; they fail from now on"
                    )
                    await self._stop_answering()
                except OSError as error:
                    if error.errno == errno.EBUSY:
                        logger.warning(
                            "files are open on %s; they fail from now on", session.mountpoint
                        )
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(
                            unmount_quietly, session, limiter=self._unmounting
                        )
                    await self._stop_answering()

    async def _reload_on_signal(self, task_status: trio.TaskStatus[None]) -> None:
        """At SIGHUP, open the log file again, and apply what has changed in the configuration."""
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            task_status.started()
            async for _ in signals:
                self._config.reopen_log()
                logger.info("SIGHUP: the log is reopened")
                if self._config.reread is not None:
                    await log_failure("reading the configuration again", self._reload)

    async def _reload(self) -> None:
        old = self._config
        assert old.reread is not None
        try:
            new = await trio.to_thread.run_sync(old.reread)
            if new.limits != old.limits:
                self._parts.room.set_limits(new.limits)
        except (errors.LazyfsError, OSError) as error:
            logger.warning("the configuration stays as it was: %s", error)
            return
        if new.options.fill_rate != old.options.fill_rate:
            self._parts.filesystem.set_rate(new.options.fill_rate)
        self._overlays.set_folders(new.overlays)
        logging.getLogger().setLevel(new.log_level.upper())
        self._config = replace(
            old,
            refresh_s=new.refresh_s,
            limits=new.limits,
            overlays=new.overlays,
            log_level=new.log_level,
            chosen=_reloaded(old.chosen, new.chosen),
            options=replace(old.options, fill_rate=new.options.fill_rate),
        )
        if later := _not_reloaded(old, new):
            logger.warning("this needs a new mount to take effect: %s", ", ".join(later))
        reread, self._reread = self._reread, trio.Event()
        reread.set()
        self._parts.population.wake()
        logger.info("the configuration is applied")

    async def _stop_answering(self) -> None:
        """Take no more requests, and end those under way after LAST_ANSWERS_S.

        They may wait for a disk or a repository that never answers.
        """
        pyfuse3.terminate()
        await trio.sleep(LAST_ANSWERS_S)
        self._answering.cancel()

    def _message(self) -> str:
        parts = self._parts
        trouble = self._silence() or parts.filesystem.list_trouble or self._repository.trouble
        return (
            trouble
            or parts.supervisor.message
            or parts.population.paused
            or parts.room.trouble()
            or self._keeper.upgrade_trouble
        )

    def _silence(self) -> str:
        """Return since when the repository does not answer reads that wait, or ""."""
        now = time.monotonic()
        waiting_s = max(
            trio.current_time() - self._parts.filesystem.totals.waiting_since,
            now - self._repository.waiting_since,
        )
        silent_s = min(waiting_s, now - self._repository.heard_at)
        if silent_s < SILENT_S:
            return ""
        why = f": {self._repository.trouble}" if self._repository.trouble else ""
        return f"{self._config.repository} is not answering since {silent_s:.0f} s{why}"

    def _status_line(self) -> str:
        config = self._config
        where = "detached from" if self._session.detached else "on"
        message = self._message()
        return f"{config.repository} {where} {config.mountpoint}{f': {message}' if message else ''}"

    # -- control commands

    async def _query_mount(self, arguments: dict[str, Any]) -> object:
        return {
            "mountpoint": self._config.mountpoint,
            "cache_dir": self._config.cache_dir,
            "repository": self._config.repository,
            "connected": self._repository.connected
            and not self._parts.filesystem.list_trouble
            and not self._silence(),
            "control_socket": self._control.path,
            "pid": self._keeper.pid,
            "daemon_pid": os.getpid(),
            "restarts": self._keeper.restarts,
            "version": lazyfs.__version__,
            "upgrade_trouble": self._keeper.upgrade_trouble,
            "reconnects": self._repository.reconnects,
            "device": self._session.device,
            "metrics": self._metrics.address if self._metrics else "",
            "detached": self._session.detached,
            "passthrough": not self._backings.trouble,
            "passthrough_trouble": self._backings.trouble,
            "room": asdict(self._parts.room.statistics()),
            "message": self._message(),
            "options": dict(self._config.chosen),
            "rate_limit": self._parts.filesystem.rate_limit,
        }

    async def _upgrade(self, arguments: dict[str, Any]) -> object:
        """Let a daemon of another installed version go on."""
        python = arguments["python"]
        if not os.path.isabs(python):  # whether it is there, the keeper finds out
            raise CommandError(f"{python} is not an absolute path")
        if self._session.detached:
            raise CommandError("detached: the mount ends with the last file that is open")
        self._keeper.hand_over([python, "-P", "-m", "lazyfs"])
        self.hands_over = True
        self._handing_over.set()
        return {}

    async def _detach(self, arguments: dict[str, Any]) -> object:
        """Unmount lazily.

        Fails while an open image is not whole, because once unmounted nobody would see how it gets
        on, unless that is wanted.
        """
        async with self._detaching:
            return await self._detach_once(arguments.get("force", False))

    async def _detach_once(self, force: bool) -> object:
        if self._session.detached:
            raise CommandError("detached already")
        images = self._parts.filesystem.open_images()
        filling = sorted(
            image.record.path for image in images if image.record.state is not State.WHOLE
        )
        if filling and not force:
            raise CommandError(f"open and not whole: {', '.join(filling)}")
        # The socket moves first, because another daemon may want its place after the unmount.
        self._control.move(mounts.detached_socket_path(self._keeper.pid))
        try:
            unmounted = await trio.to_thread.run_sync(
                self._session.unmount, True, limiter=self._unmounting
            )
        except OSError as error:
            self._control.move(mounts.socket_path(self._config.mountpoint))
            raise CommandError(f"cannot unmount: {error.strerror}") from error
        if not unmounted:
            raise CommandError("somebody else has unmounted it just now")
        self._cache.tell_detached()
        self._parts.room.may_evict = False
        if self._metrics is not None:  # another daemon may want the port
            self._metrics.close()
        logger.info("detached: %s open_images=%d", self._config.mountpoint, len(images))
        return {"open_count": sum(image.open_count for image in images)}


_RELOADED = frozenset({"refresh", "max-cache", "min-free", "overlays", "fill-rate", "log-level"})
"""The keys that take effect when the configuration is read again."""


def _reloaded(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, object]:
    """Return what is chosen after the configuration was read again."""
    kept = {name: value for name, value in old.items() if name not in _RELOADED}
    return kept | {name: value for name, value in new.items() if name in _RELOADED}


def _not_reloaded(old: MountConfig, new: MountConfig) -> list[str]:
    """Return the keys whose values are others now, and take no effect."""
    names = old.chosen.keys() | new.chosen.keys()
    changed = {name for name in names if old.chosen.get(name) != new.chosen.get(name)}
    for name in ("repository", "mountpoint"):
        if getattr(old, name) != getattr(new, name):
            changed.add(name)
    return sorted(changed - _RELOADED)


def unmount_quietly(session: KernelSession) -> None:
    """Unmount lazily. What fails is only logged, because something worse is being reported."""
    try:
        session.unmount(lazy=True)
    except OSError as error:
        logger.debug("unmount: %s", error)
