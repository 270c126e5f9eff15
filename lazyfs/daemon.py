"""Builds a mount from the concrete classes, and takes it down in order: the composition root.

mount        cache directory opened and locked -> exports listed -> mounted -> "ready"
detach       unmounted lazily -> open files are served -> the last is closed -> as after unmount
unmount      kernel's connection ends -> jobs and population end -> checkpoint of every image,
             hand-off of what is complete -> catalog closed -> exit

A crash at any point loses only what was cached after the last checkpoint.
"""

import gc
import logging
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from lazyfs.kernel import passthrough  # isort: skip  # before pyfuse3
import pyfuse3
import trio

from lazyfs import assembly, errors
from lazyfs.assembly import Parts
from lazyfs.cache.cache_dir import CacheDir, Opened
from lazyfs.core import repository_uri
from lazyfs.core.export_name import SHA1, is_named
from lazyfs.engine.backing_files import BackingFiles
from lazyfs.engine.supervision import call_beside
from lazyfs.host import fuse_limits
from lazyfs.kernel.channel import CannotMount, Gone, Keeper
from lazyfs.kernel.fuse_adapter import FuseAdapter
from lazyfs.kernel.present_files import PresentFiles
from lazyfs.kernel.session import ENDING, MAX_BACKGROUND, KernelSession
from lazyfs.mounted import ALIVE_S, MountConfig, Mounted, unmount_quietly
from lazyfs.qemu.overlay_scan import OverlayScan
from lazyfs.report import tracebacks
from lazyfs.repository import tls
from lazyfs.repository.lookups import Resolver
from lazyfs.repository.nbd_repository import NbdRepository

if TYPE_CHECKING:
    from lazyfs.report.metrics_server import MetricsServer

logger = logging.getLogger(__name__)

FIRST_LIST_S = 10.0
"""How long a mount waits for a repository of which no name of the list comes. After that it starts
from the catalog."""

MARGIN_S = 2.0
"""How much earlier than the kernel's limit a read fails by itself. The kernel looks every 15 s, but
a request that is one jiffy too old at that moment ends the whole mount."""


def _within_kernel_limits(config: MountConfig) -> MountConfig:
    """Lower how many reads wait, and how long, to what the kernel allows."""
    queue = fuse_limits.background_requests(MAX_BACKGROUND)
    config = replace(config, options=replace(config.options, queue=queue))
    limit_s = fuse_limits.request_timeout_s()
    io_timeout_s = config.options.io_timeout_s
    if not limit_s or io_timeout_s <= limit_s - MARGIN_S:
        return config
    lowered_s = max(1.0, limit_s - MARGIN_S)
    logger.warning(
        "reads wait %g s for the repository, not %g s, because /proc/sys/fs/fuse limits requests "
        "to %d s",
        lowered_s,
        io_timeout_s,
        limit_s,
    )
    return replace(config, options=replace(config.options, io_timeout_s=lowered_s))


def _report_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Log what libnbd or a thread cannot raise to us. The default is to print it on stderr."""
    if kind is UnicodeDecodeError and trace is None:
        return  # libnbd cannot pass on the name of an export; `NbdRepository` counts those names
    logger.error("uncaught", exc_info=(kind, error, trace))


def serve(config: MountConfig, keeper: Keeper) -> None:
    """Mount, or go on where another daemon has ended; return when it has been unmounted.

    Raises:
        UserError: it cannot begin. The message says why.
    """
    tls.check_files(repository_uri.parse(config.repository))
    os.umask(0o022)  # for the folders of whole images
    config = _within_kernel_limits(config)
    _raise_file_limit()
    sys.excepthook = _report_uncaught
    gc.disable()  # with 100,000 exports, collections that found nothing took 2.2 s of 2.6
    root_fd, lock_fd = keeper.take(ROOT), keeper.take(LOCK)
    known = root_fd is not None and lock_fd is not None
    cache = CacheDir(
        config.cache_dir,
        config.mountpoint,
        config.repository,
        config.file_attributes,
        config.moved,
        config.trust_cache_owner,
        Opened(root_fd, lock_fd) if root_fd is not None and lock_fd is not None else None,
        keeper.pid,
    )
    try:
        if not known:
            keeper.keep(ROOT, cache.root.fd)
            keeper.keep(LOCK, cache.lock_fd)
        os.chdir("/")
        _survive_signals()
        daemon = _Daemon(config, cache, keeper)
        trio.run(daemon.run, strict_exception_groups=True)
        if not daemon.hands_over:
            keeper.ending()
    except BaseExceptionGroup as group:
        for_user, others = group.split(errors.UserError)
        if for_user is None or others is not None:
            raise
        raise _first(for_user) from None
    finally:
        cache.close()


ROOT, LOCK = "root", "lock"
"""The names under which the keeper keeps the cache directory and its lock."""

_HARMLESS = (
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF,
    signal.SIGIO, signal.SIGPWR,
    signal.SIGSTKFLT, signal.SIGHUP, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)  # fmt: skip
"""Signals that would end the daemon, and that say nothing of a crash."""


def _survive_signals() -> None:
    """Let no signal end the daemon, but for those that unmount, and those of a crash.

    They get a handler, because programs that the daemon starts would inherit that they are ignored.
    """
    for number in _HARMLESS:
        signal.signal(number, lambda _number, _frame: None)


def _first(group: BaseExceptionGroup[errors.UserError]) -> errors.UserError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, errors.UserError)
    return error


def _raise_file_limit() -> None:
    """Allow as many open files as possible.

    Each partial image takes two files and up to three sockets.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Daemon:
    """Builds the parts of a mount, mounts, serves, and takes everything down again."""

    def __init__(self, config: MountConfig, cache: CacheDir, keeper: Keeper) -> None:
        self._config = config
        self._cache = cache
        self._keeper = keeper
        self.hands_over = False
        """True if another daemon goes on with the mount."""
        self._overlays = OverlayScan(config.overlays, config.mountpoint, config.cache_dir)

    async def run(self) -> None:
        """Mount, unless another daemon has, and serve until it is unmounted.

        Raises:
            UserError: it could not be mounted.
        """
        config, cache = self._config, self._cache
        root = trio.lowlevel.current_root_task()
        trio.socket.set_custom_hostname_resolver(Resolver())
        signal.signal(signal.SIGUSR1, lambda _number, _frame: tracebacks.log_soon(root))
        metrics = self._metrics_server()
        async with trio.open_nursery() as nursery:
            repository = NbdRepository(config.repository, nursery, config.options.io_timeout_s)
            present = PresentFiles(self._keeper)
            parts = assembly.build(
                mountpoint=config.mountpoint,
                repository=repository,
                stores=cache,
                catalog=cache.catalog,
                records=cache.records,
                options=config.options,
                limits=config.limits,
                backing_files=BackingFiles(self._overlays.backing_files).find,
                nursery=nursery,
                present=present,
            )
            parts.filesystem.totals.read_elsewhere = present.reads
            try:
                if not self._keeper.mounted:
                    await self._first_list(parts, repository)
                gc.freeze()  # later collections need not look at what is here to stay
                gc.enable()
                await self._mount(repository, parts, metrics, present)
            finally:  # neither the kernel nor a job reads images any more
                with trio.CancelScope(shield=True):
                    # It may take long to save much on a slow disk.
                    await call_beside(self._be_alive, parts.filesystem.aclose)
                nursery.cancel_scope.cancel()

    async def _be_alive(self) -> None:
        while True:
            with suppress(Gone):
                self._keeper.alive("saving what was fetched")
            await trio.sleep(ALIVE_S)

    def _metrics_server(self) -> "MetricsServer | None":
        address = self._config.metrics
        try:
            return None if address is None else _metrics_server(address)
        except errors.UserError as error:
            if not self._keeper.mounted:
                raise
            # Whoever has files open must not suffer from that.
            logger.warning("%s; the mount goes on without metrics", error)
            return None

    async def _first_list(self, parts: Parts, repository: NbdRepository) -> None:
        began = time.monotonic()

        async def give_up_when_silent() -> None:
            until = began + FIRST_LIST_S
            while until > time.monotonic():
                await trio.sleep(until - time.monotonic())
                until = max(began, repository.listed_at) + FIRST_LIST_S
            patience.cancel()

        try:
            with trio.CancelScope() as patience:
                await call_beside(give_up_when_silent, parts.filesystem.refresh)
                return
            reason = f"{self._config.repository} does not answer"
        except (errors.LazyfsError, OSError) as error:
            reason = str(error)
        if not self._cache.records:
            raise errors.UserError(
                f"{reason}; nothing of it is cached here, so there is nothing to show"
            )
        parts.filesystem.list_trouble = reason
        logger.warning("%s; the mount comes up with what is in the catalog", reason)

    async def _mount(
        self,
        repository: NbdRepository,
        parts: Parts,
        metrics: "MetricsServer | None",
        present: PresentFiles,
    ) -> None:
        config = self._config
        # Until `_unmount_on_signal` runs, a signal would end the daemon, and another would start.
        signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, signal.SIGHUP})
        try:
            connection = self._keeper.mount()
        except CannotMount as error:
            raise errors.UserError(str(error)) from None
        session = KernelSession(
            config.mountpoint, connection.fuse_fd, connection.device, connection.flags
        )
        try:
            backings = passthrough.Backings(session, config.passthrough, self._cache.lock_fd)
            logger.info("passthrough: %s", f"off, {backings.trouble}" if backings.trouble else "on")
            adapter = FuseAdapter(
                parts.filesystem,
                config.file_attributes,
                self._cache.root.fd,
                parts.operations,
                backings,
                session.forget_names,
                config.allow_evict,
            )
            mounted = Mounted(
                config,
                self._cache,
                repository,
                parts,
                session,
                backings,
                metrics,
                self._overlays,
                self._keeper,
                connection,
                present,
            )
            present.count_in(connection.counters_fd)
            await adapter.restore(connection.opened, self._keeper.orphans, present)
            passthrough.connect(connection)
            pyfuse3.init(adapter, f"/dev/fd/{connection.relay_fd}", set())
            try:
                await mounted.serve(self._notes(parts))
            finally:
                pyfuse3.close(unmount=False)
            self.hands_over = mounted.hands_over
        except BaseException:
            if not self._keeper.mounted:
                unmount_quietly(session)
            raise
        what = "handed over" if self.hands_over else "unmounted"
        logger.info("%s: %s", what, config.mountpoint)

    def _notes(self, parts: Parts) -> list[str]:
        """Return what the user should know although it is mounted."""
        notes = []
        if trouble := parts.filesystem.list_trouble:
            notes.append(f"{trouble}; the images that are known from before are shown")
        if self._cache.downgraded:
            notes.append(
                "this cache was filled over TLS, and without it nobody proves what comes now"
            )
        chosen, records = self._config.chosen, self._cache.records
        wanted = self._config.options.format
        others = sum(record.format != wanted for record in records)
        if "format" in chosen and others:
            notes.append(
                f"--format {wanted} is for images new to this cache: {others} known ones stay as "
                f"they are (lazyfs prefetch --format {wanted} changes those of which nothing is "
                "cached)"
            )
        others = sum(not is_named(record.export, record.path, SHA1) for record in records)
        if "names" in chosen and others:
            notes.append(
                f"--names sha1 is for images new to this cache: {others} known ones keep their "
                "names; another --cache-dir gives all of them new ones"
            )
        if "mode" in self._config.chosen and (others := self._cache.more_open()):
            notes.append(
                f"--mode is for files that become whole from now on: more users may read {others} "
                f"in {self._config.cache_dir} that are whole already (chmod or evict them)"
            )
        images = list(parts.filesystem.names.images())
        if [image.record.export for image in images] == [""]:
            shown = images[0].record.path
            notes.append(
                f"the repository has a single export without a name, shown as {shown}; a server of "
                "images gives each a name, such as nbdkit file dir=FOLDER, or qemu-nbd -x NAME"
            )
        for note in notes:
            logger.info("%s", note)
        return notes


def _metrics_server(address: str) -> "MetricsServer":
    """Listen at `address`.

    Raises:
        UserError: prometheus_client is missing, or the address cannot be used.
    """
    try:
        # Imported here, because most mounts need neither the package nor the 12 ms to load it.
        from lazyfs.report import metrics_server
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise errors.UserError(
            "--metrics needs prometheus_client: pip install prometheus_client"
        ) from error
    server = metrics_server.MetricsServer(address)
    logger.info("metrics: http://%s/metrics", server.address)
    return server
