"""Keeps a mount: holds what must outlive a daemon, and starts one daemon after the other.

This is the process that users, systemd and signals know. It holds the kernel's connection, the
descriptors that daemons leave to their successors, the maps of what is present, and every request
that is not answered yet (the C module `kernel/_keeper`, whose threads never need the interpreter).
Its daemon is a child, and does everything else.

    start       the first daemon looks at the repository, and then asks to be mounted
    a daemon    that ends without saying why, or is silent, is replaced by another
    end         the kernel's connection ends -> the daemon saves and ends -> this process ends

This imports neither trio, pyfuse3 nor nbd, so that it stays small and simple. Nothing in it may use
the mount, because its own answers may be needed for that.
"""

# Longer than 500 lines: it is one loop, whose parts all decide about the same few things.

import errno
import json
import logging
import os
import resource
import select
import selectors
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from lazyfs import errors
from lazyfs.control.stand_in import StandIn
from lazyfs.core import qmp_wire
from lazyfs.core.pacing import Backoff
from lazyfs.host import mounts, writeback
from lazyfs.host.control_socket import ControlSocket
from lazyfs.host.leaving import is_gone, wants_to_end
from lazyfs.kernel import session as kernel_session
from lazyfs.kernel._keeper import Keeper as DataPath
from lazyfs.kernel.channel import DESCRIPTOR, VERSION, Channel, Gone, Message
from lazyfs.kernel.session import ENDING
from lazyfs.report import service_manager
from lazyfs.units import KiB

logger = logging.getLogger(__name__)

TICK_S = 1.0

SILENT_TICKS = 10
"""A daemon that has said nothing in so many seconds hangs, and is ended. It says something every
two seconds, from its event loop, of which no step takes longer than 0.1 s, with 100,000 exports as
well. The rest is for a host that is so busy that nothing gets its turn. It is counted in ticks of
this process, so a host that was asleep, or both processes stopped, do not count."""

START_TICKS = 60
"""The same for one that has started, and does not answer requests yet. A catalog with 100,000
images takes some seconds, and a busy disk may make minutes of them."""

STAND_IN_S = 3.0
"""After so long without a daemon that answers, this process answers on the control socket. A daemon
is replaced within half a second; clients wait for that."""

TRIAL_S = 10.0
"""How long a daemon of another version may take until it answers requests. It takes half a second,
and some seconds for a catalog with 100,000 images."""

LAST_WORDS_S = 1.0
"""How long a daemon that hangs has to log where it hangs."""

LIVED_S = 1.0
"""A daemon that has answered requests for so long is replaced at once. One that ends earlier, as if
a request that is repeated had ended it, is replaced after a pause, which grows with each that
does."""

FIRST_PAUSE_S = 0.2
MAX_SHORT_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0
"""The pauses; the short one is for a daemon that has answered requests, however briefly. What is
present is read meanwhile, so a daemon that cannot start costs only those who wait for the
repository. All are unmeasured."""

THREADS = 4
"""How many threads wait for requests, if there are as many CPUs. More start while some of them wait
for a disk. It is unmeasured on more than two CPUs."""

MARGIN_S = 5.0
"""How much later than the daemon this process fails a read. The daemon's error says more."""

_FORWARDED = (signal.SIGHUP, signal.SIGUSR1)
"""Signals that are the daemon's: read the configuration again; say where it is."""

_HARMLESS = (
    signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR,
    signal.SIGSTKFLT, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)  # fmt: skip
"""Signals that would end this process and leave a dead mount, and that say nothing of a crash."""


_UNANSWERED = struct.Struct("=QqII??6x")
"""struct unanswered of kernel/keeper.h."""

_KINDS = {"user": errors.UserError, "lasting": errors.LastingError, "usage": errors.UsageError}
"""The errors with which a daemon can fail to begin, as the channel names them."""

_Answer = tuple[Message | None, Sequence[int]]
"""What a daemon is answered, and the descriptors beside it. None if it has been answered."""


@dataclass(frozen=True, slots=True)
class KeeperConfig:
    """Holds what the keeper needs to know of a mount."""

    mountpoint: str
    cache_dir: str
    repository: str
    passthrough: bool
    program: Sequence[str]
    """The command before `words`, until an upgrade."""
    words: Sequence[str]
    """The arguments of `lazyfs`."""
    folder: int | None
    """A descriptor of the folder where it is started, if its arguments are relative to that."""
    reopen_log: Callable[[], None]
    """Opens the log file again, which may have been renamed."""
    left: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The descriptors that a keeper of this mount has left, which was killed, by their names."""
    stale: Sequence[str] = ()
    """The names of what the service manager still keeps of a mount that is gone."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """Holds what the next daemon needs of a file that is shown."""

    by: int
    """Which daemon has shown it: the first, the second and so on."""
    fds: tuple[int, ...]
    """The map in memory and the cache file, or nothing if there is no map."""
    name: str
    """Under which the service manager keeps the cache file."""


class _Daemon:
    """Holds a daemon that was started."""

    def __init__(self, process: "subprocess.Popen[bytes]", channel: Channel) -> None:
        self.process = process
        self.channel = channel
        self.pidfd = os.pidfd_open(process.pid)
        self.attached = False
        """True once it gets the kernel's requests."""
        self.serving_since: float | None = None
        self.silent_ticks = 0
        self.failure: errors.UserError | None = None
        self.ends_for_good = False
        self.hands_over_to: Sequence[str] | None = None
        self.killed_for = ""
        """Why it was ended from here, or ""."""

    def close(self) -> None:
        self.channel.close()
        os.close(self.pidfd)


class Keeper:
    """Keeps one mount, from its start to its end. Everything is done in one thread."""

    def __init__(self, config: KeeperConfig, on_ready: Callable[[Sequence[str]], None]) -> None:
        """`on_ready` is called once, when the mount answers, with what the user should know."""
        self._config = config
        self._on_ready: Callable[[Sequence[str]], None] | None = on_ready
        self._selector = selectors.DefaultSelector()
        self._service = service_manager.Attendance(service_manager.own())
        self._session: kernel_session.KernelSession | None = None
        self._path: DataPath | None = None
        self._counters_fd = _first(config.left, "counters") or os.memfd_create("counters")
        self._opened_fd = _first(config.left, "opened") or os.memfd_create("opened")
        self._control: ControlSocket | None = None
        self._kept: dict[str, int] = {}
        """The descriptors that daemons leave to their successors, by name."""
        self._shown: dict[int, _Shown] = {}
        """What is shown, by inode."""
        self._orphans: dict[int, Message] = {}
        """What daemons say of files that are shown, and whose images have lost their names."""
        self._stand_in: StandIn | None = None
        self._trouble = ""
        """Why the latest daemon has ended, or does not answer. It is "" while one answers."""
        self._answered_at = time.monotonic()
        """When a daemon that answers requests was heard last."""
        self._daemon: _Daemon | None = None
        self._started = 0
        """How many daemons have been started."""
        self._start_at: float | None = None
        """When the next daemon is to be started, if there is none."""
        self._program: Sequence[str] = config.program
        self._before: Sequence[str] | None = None
        """The program before an upgrade, until the new one answers requests."""
        self._trial_until = 0.0
        self._upgrade_trouble = ""
        self._pause = Backoff(first=FIRST_PAUSE_S, limit=MAX_PAUSE_S)
        self._signals: list[int] = []
        self._ending = False
        self._result: int | None = None
        """The exit code, once everything is over."""
        self._timeout_ms: int | None = None
        self._status = ""
        self._ticked_at = time.monotonic()
        self._asked: dict[str, Callable[[_Daemon, Message, list[int]], _Answer]] = {
            "hello": self._greet,
            "orphans": self._list_orphans,
            "take": self._take,
            "mount": self._connect,
            "known": self._known,
            "show": self._show,
            "withdraw": self._withdrawn,
        }
        self._told: dict[str, Callable[[_Daemon, Message, list[int]], None]] = {
            "keep": self._keep,
            "serving": self._serving,
            "restored": self._restored,
            "orphan": self._orphan,
            "keep name": self._keep_name,
            "alive": self._alive,
            "failed": self._failed,
            "ending": self._ends,
            "handing over": self._hands_over,
        }

    # -- the loop

    def run(self) -> int:
        """Keep the mount until it is unmounted; return the exit code.

        Raises:
            UserError: it could not be mounted. Nothing was left behind.
        """
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._watch_signals()
        try:
            for name in self._config.stale:
                self._service.forget(name)
            if self._config.left:
                self._take_over()
            self._start_daemon()
            while self._result is None:
                for key, _ in self._selector.select(self._wait_s()):
                    key.data()
                self._heed_signals()
                if time.monotonic() >= self._ticked_at + TICK_S:
                    self._tick()
                if self._start_at is not None and time.monotonic() >= self._start_at:
                    self._start_again()
        finally:
            self._clean_up()
        return self._result

    def _wait_s(self) -> float:
        now = time.monotonic()
        wait_s = self._ticked_at + TICK_S - now
        if self._start_at is not None:
            wait_s = min(wait_s, self._start_at - now)
        return max(wait_s, 0.0)

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()
        if self._path is not None:
            self._let_go(self._path, int(TICK_S * 1000))
        if self._daemon is not None:
            self._watch(self._daemon)
        silent = self._ticked_at >= self._answered_at + STAND_IN_S
        if silent and self._control is not None and self._stand_in is None:
            self._stand_in = StandIn(self._control.socket, self._answer_for_daemon)
        self._service.lives(self._message() if self._stand_in else self._status)

    def _let_go(self, path: DataPath, for_ms: int) -> None:
        """End the waits of those who want to end, and of reads that wait for too long.

        The kernel tells of a signal only in some kinds of reads: neither in direct reads nor in
        those of readahead (fs/fuse/file.c, Linux 6.18). And not every signal is to end a wait:
        QEMU gets timers' while it opens an image, and takes EINTR for a failure.

        Args:
            path: the requests.
            for_ms: look at those that wait for so long. What was interrupted is looked at anyway.
        """
        expired = 0
        for unique, age_ms, opcode, pid, direct, interrupted in _UNANSWERED.iter_unpack(
            path.unanswered(for_ms)
        ):
            reads = opcode == kernel_session.FUSE_READ
            # Other requests have no limit while there is a daemon: it has its own.
            limited = reads or self._daemon is None or self._daemon.serving_since is None
            late = self._timeout_ms is not None and age_ms >= self._timeout_ms
            if limited and late:
                expired += path.fail(unique, errno.EIO)
            elif not reads and not interrupted:
                continue
            # Nobody waits for the readahead of a thread that has ended, but until it ends the file
            # stays open. A direct read may be asynchronous, and others of its process wait for it.
            elif pid and (wants_to_end(pid) or (reads and not direct and is_gone(pid))):
                path.fail(unique, errno.EINTR)
        if expired:
            logger.warning("requests have failed, because no daemon has answered: %d", expired)

    def _give_up_lookups(self) -> None:
        """End the waits for names, because the daemon cannot end before they do.

        Before Linux 6.16 a thread of it may wait in the kernel for a folder that a lookup holds,
        and for that lookup's answer (`forget_names`).
        """
        assert self._path is not None
        given_up = 0
        for unique, _, opcode, *_ in _UNANSWERED.iter_unpack(self._path.unanswered(0)):
            if opcode != kernel_session.FUSE_READ:
                given_up += self._path.fail(unique, errno.EINTR)
        logger.warning("the daemon cannot end; lookups that were given up: %d", given_up)

    def _message(self) -> str:
        silent_s = time.monotonic() - self._answered_at
        why = self._trouble or "it says nothing"
        replaced = f", replaced {self._started - 1} times" if self._started > 1 else ""
        return (
            f"the daemon has not answered for {silent_s:.0f} s ({why}{replaced}); "
            "what is present is read meanwhile"
        )

    def _answer_for_daemon(self, command: str) -> object:
        """Answer a control command. Called in other threads."""
        config, session = self._config, self._session
        assert session is not None
        if command != "query-mount":
            raise qmp_wire.CommandError(self._message())
        daemon = self._daemon
        return {
            "mountpoint": config.mountpoint,
            "cache_dir": config.cache_dir,
            "repository": config.repository,
            "device": session.device,
            "connected": False,
            "pid": os.getpid(),
            "daemon_pid": 0 if daemon is None else daemon.process.pid,
            "restarts": max(self._started - 1, 0),
            "message": self._message(),
        }

    def _watch(self, daemon: _Daemon) -> None:
        """End a daemon that hangs, or one of another version that does not come up."""
        daemon.silent_ticks += 1
        if self._before is not None and time.monotonic() > self._trial_until:
            daemon.killed_for = f"it did not answer in {TRIAL_S:g} s"
            daemon.process.kill()
            return
        starts = daemon.serving_since is None and not self._ending
        limit = START_TICKS if starts else SILENT_TICKS
        if daemon.silent_ticks < limit or self._session is None:
            return
        if not daemon.killed_for:
            daemon.killed_for = f"it was silent for {daemon.silent_ticks} s"
            logger.error("the daemon hangs, and is ended: pid=%d", daemon.process.pid)
            daemon.process.send_signal(signal.SIGABRT)  # its threads say where they are
            daemon.process.send_signal(signal.SIGCONT)
            return
        if daemon.silent_ticks >= limit + LAST_WORDS_S / TICK_S:
            daemon.process.kill()
        if daemon.silent_ticks >= limit + 3 * LAST_WORDS_S / TICK_S and self._path is not None:
            self._give_up_lookups()

    # -- signals

    def _watch_signals(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

        def drain() -> None:
            with suppress(BlockingIOError):
                ours.recv(4096)

        self._selector.register(ours, selectors.EVENT_READ, drain)
        self._wakeup = theirs  # stays open
        for number in (*ENDING, *_FORWARDED):
            signal.signal(number, lambda number, _frame: self._signals.append(number))
        for number in _HARMLESS:
            signal.signal(number, lambda _number, _frame: None)

    def _heed_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGHUP:
                self._config.reopen_log()
            if number not in ENDING:
                if self._daemon is not None and self._daemon.serving_since is not None:
                    self._daemon.process.send_signal(number)
                continue
            self._ending = True
            if self._daemon is not None:
                self._daemon.process.send_signal(number)
            else:
                self._give_up()

    def _give_up(self) -> None:
        """End the mount without a daemon. What is open fails from now on."""
        self._start_at = None
        if self._session is not None:
            try:
                self._session.unmount(lazy=True)
            except OSError as error:
                logger.warning("cannot unmount %s: %s", self._config.mountpoint, error)
        self._result = 0

    # -- daemons

    def _start_again(self) -> None:
        try:
            self._start_daemon()
        except OSError as error:  # no memory, too many processes, or no such interpreter
            if self._before is not None:
                self._program, self._before = self._before, None
                self._upgrade_trouble = f"the upgrade has failed: {error}"
                self._start_at = time.monotonic()
                return
            self._trouble = f"none can be started: {error.strerror}"
            self._start_at = time.monotonic() + self._pause.next()
            logger.warning("no daemon can be started: %s", error)

    def _start_daemon(self) -> None:
        self._start_at = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [*self._program, *self._config.words],
                # By its descriptor: the path may lead into the mount, where nobody answers now.
                cwd="/" if self._config.folder is None else f"/proc/self/fd/{self._config.folder}",
                env={**os.environ, DESCRIPTOR: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                # A signal from the terminal comes through this process.
                process_group=0,
            )
        daemon = self._daemon = _Daemon(process, Channel(ours))
        self._started += 1
        self._selector.register(daemon.channel, selectors.EVENT_READ, lambda: self._hear(daemon))
        self._selector.register(daemon.pidfd, selectors.EVENT_READ, lambda: self._ended(daemon))

    def _hear(self, daemon: _Daemon) -> None:
        try:
            message, fds = daemon.channel.receive()
        except Gone:
            self._selector.unregister(daemon.channel)  # its pidfd says the rest
            return
        except (OSError, ValueError) as error:  # it may wait for an answer to this
            logger.warning("a message of the daemon was lost: %s", error)
            daemon.killed_for = f"a message was lost: {error}"
            daemon.process.kill()
            self._selector.unregister(daemon.channel)
            return
        try:
            self._obey(daemon, message, fds)
        except Exception:  # whatever a daemon says must not end the mount
            logger.exception("a message of the daemon was not understood, a bug in lazyfs")

    def _ended(self, daemon: _Daemon) -> None:
        """Go on after a daemon has ended."""
        with suppress(KeyError):  # what it has said before
            while daemon.channel in self._selector.get_map():
                self._hear(daemon)
        self._selector.unregister(daemon.pidfd)
        code = daemon.process.wait()
        daemon.close()
        self._daemon = None
        if self._path is not None and daemon.attached:
            self._path.detach()
        if self._path is None:
            self._report_failure(daemon, code)
        elif self._path.ended() or daemon.ends_for_good:
            self._result = max(code, 0)
        elif self._ending:
            self._give_up()
        elif daemon.hands_over_to is not None:
            self._upgrade_to(daemon.hands_over_to)
        else:
            self._replace(daemon, code)

    def _report_failure(self, daemon: _Daemon, code: int) -> None:
        if daemon.failure is not None:
            raise daemon.failure
        if self._ending and code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)  # as a process that has no child would end
        raise errors.UserError(
            f"the daemon ended with exit code {code} and left no word; the log may say more"
        )

    def _upgrade_to(self, program: Sequence[str]) -> None:
        if self._before is None:
            self._before = self._program
        self._program, self._upgrade_trouble = program, ""
        self._trial_until = time.monotonic() + TRIAL_S
        logger.info("upgrade: the next daemon is %s", " ".join(program))
        self._start_again()

    def _replace(self, daemon: _Daemon, code: int) -> None:
        why = daemon.killed_for or (
            str(daemon.failure)
            if daemon.failure is not None
            else f"killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exit code {code}"
        )
        self._trouble = why
        if self._before is not None:
            self._upgrade_trouble = f"the upgrade to {self._program[0]} has failed: {why}"
            logger.error("%s; the version before it starts again", self._upgrade_trouble)
            self._program, self._before = self._before, None
            self._start_again()
            return
        since = daemon.serving_since
        if since is not None and time.monotonic() > since + LIVED_S:
            self._pause.reset()
            pause_s = 0.0
        elif code == -signal.SIGKILL and not daemon.killed_for:
            # Somebody did it, or the kernel for lack of memory: no fault of its own.
            pause_s = FIRST_PAUSE_S
        else:
            pause_s = self._pause.next()
            if since is not None:  # it can start, at least
                pause_s = min(pause_s, MAX_SHORT_PAUSE_S)
        self._start_at = time.monotonic() + pause_s
        logger.error("the daemon has ended (%s); another one starts in %.1f s", why, pause_s)

    # -- what a daemon asks for

    def _obey(self, daemon: _Daemon, message: Message, fds: list[int]) -> None:
        """Do what a daemon asks for. What is left in `fds` is closed."""
        daemon.silent_ticks = 0
        if daemon.serving_since is not None:
            self._hear_from_daemon()
        what = message.pop("do")
        try:
            if (ask := self._asked.get(what)) is not None:
                try:
                    answer = ask(daemon, message, fds)
                except Exception as error:
                    answer = {"failed": str(error)}, []
                    raise
                finally:
                    self._answer(daemon, *answer)
            elif (tell := self._told.get(what)) is not None:
                tell(daemon, message, fds)
            else:
                logger.error("a daemon says what this keeper does not understand: %s", what)
        finally:
            for fd in fds:
                os.close(fd)

    def _hear_from_daemon(self) -> None:
        """Note that a daemon answers."""
        self._answered_at, self._trouble = time.monotonic(), ""
        if self._stand_in is not None:
            self._stand_in.stop()
            self._stand_in = None

    def _answer(self, daemon: _Daemon, message: Message | None, fds: Sequence[int] = ()) -> None:
        if message is not None:
            with suppress(Gone):
                daemon.channel.send(message, fds)

    def _greet(self, _daemon: _Daemon, message: Message, _fds: list[int]) -> _Answer:
        if message["version"] != VERSION:
            logger.error("the daemon speaks version %s, not %d", message["version"], VERSION)
        hello = {
            "version": VERSION,
            "pid": os.getpid(),
            "mounted": self._session is not None,
            "mountpoint": self._config.mountpoint,
            "cache_dir": self._config.cache_dir,
            "restarts": self._started - 1,
            "upgrade_trouble": self._upgrade_trouble,
        }
        return hello, []

    def _list_orphans(self, daemon: _Daemon, _message: Message, _fds: list[int]) -> _Answer:
        fd = _as_json("orphans", list(self._orphans.values()))  # a message has not room for all
        try:
            self._answer(daemon, {}, [fd])
        finally:
            os.close(fd)
        return None, []

    def _keep(self, _daemon: _Daemon, message: Message, fds: list[int]) -> None:
        name = message["name"]
        if (old := self._kept.get(name)) is not None:
            os.close(old)
            self._service.forget(f"kept-{name}")
        self._kept[name] = fds.pop()
        self._service.keep(f"kept-{name}", self._kept[name])

    def _take(self, _daemon: _Daemon, message: Message, _fds: list[int]) -> _Answer:
        kept = self._kept.get(message["name"])
        return {}, [] if kept is None else [kept]

    def _connect(self, daemon: _Daemon, _message: Message, _fds: list[int]) -> _Answer:
        """Mount if that is still to be done, and give the daemon the connection."""
        if self._session is None:
            try:
                self._mount()
            except errors.UserError as error:
                return {"error": str(error)}, []
        session, path, control = self._session, self._path, self._control
        assert session is not None
        assert path is not None
        assert control is not None
        with ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(theirs)
            stack.enter_context(ours)
            done_fd = os.memfd_create("done")
            stack.callback(os.close, done_fd)
            opened_fd = os.memfd_create("opened")
            stack.callback(os.close, opened_fd)
            os.write(opened_fd, path.opened())
            init = kernel_session.encode_init_in(session.flags)
            path.attach(ours.fileno(), done_fd, init)
            ours.detach()  # it is the C code's now
            daemon.attached = True
            if path.ended():  # it was unmounted while this daemon started
                path.hang_up()
            fds = [session.fd, theirs.fileno(), done_fd]
            fds += [self._counters_fd, control.socket.fileno(), opened_fd]
            self._answer(daemon, {"device": session.device, "flags": session.flags}, fds)
        return None, []

    def _mount(self) -> None:
        config = self._config
        session = kernel_session.mount(config.mountpoint, config.repository, config.passthrough)
        try:
            control = ControlSocket(mounts.socket_path(config.mountpoint))
            self._receive(session, control)
        except BaseException:
            with suppress(OSError):
                session.unmount(lazy=True)
            raise
        facts = {
            "mountpoint": config.mountpoint,
            "cache_dir": config.cache_dir,
            "device": session.device,
            "flags": session.flags,
        }
        state = _as_json("mount", facts)
        for name, fd in (
            ("fuse", session.fd),
            ("mount", state),
            ("control", control.socket.fileno()),
            ("counters", self._counters_fd),
            ("opened", self._opened_fd),
        ):
            self._service.keep(name, fd)
        os.close(state)

    def _receive(self, session: kernel_session.KernelSession, control: ControlSocket) -> None:
        """Take requests of the kernel from now on."""
        threads = min(THREADS, os.cpu_count() or 1)
        path = DataPath(session.fd, self._counters_fd, self._opened_fd, threads)
        self._session, self._path, self._control = session, path, control
        self._selector.register(path, selectors.EVENT_READ, self._connection_ended)

        def interrupted() -> None:
            os.eventfd_read(path.interrupts_fd())
            self._let_go(path, int(TICK_S * 1000))

        self._selector.register(path.interrupts_fd(), selectors.EVENT_READ, interrupted)

    def _take_over(self) -> None:
        """Go on where a keeper was killed, with what it has left to the service manager."""
        left = self._config.left
        self._service.knows(left)
        facts = state_of(left)
        session = kernel_session.KernelSession(
            facts["mountpoint"], left["fuse"][0], facts["device"], facts["flags"]
        )
        where = (
            mounts.detached_socket_path(os.getpid())
            if session.detached
            else mounts.socket_path(session.mountpoint)
        )
        self._kept = {
            name.removeprefix("kept-"): fds[0]
            for name, fds in left.items()
            if name.startswith("kept-")
        }
        self._receive(session, ControlSocket(where, left["control"][0]))
        for name, fds in left.items():
            if name.startswith("shown-"):
                self._show_left(name, fds[0], left)
            elif name.startswith("orphan-"):
                orphan = _read_json(fds[0])
                self._orphans[orphan["inode"]] = orphan
        if not session.resend():
            logger.error("reads that were under way are lost: the kernel is older than Linux 6.9")
        logger.warning("another keeper was killed, and this one goes on: %s", session.mountpoint)

    def _show_left(self, name: str, fd: int, left: Mapping[str, Sequence[int]]) -> None:
        assert self._path is not None
        inode, *where = (int(number) for number in name.removeprefix("shown-").split("-"))
        map_fd = _first(left, name.replace("shown", "map", 1))
        size, data_offset, data_size, block_shift, _ = where
        if block_shift and map_fd is None:
            self._service.forget(name)
            return  # the map was not kept: nobody knows what is present
        kept = () if map_fd is None else (os.dup(map_fd), os.dup(fd))
        self._path.show(
            inode,
            size,
            data_offset,
            data_size,
            block_shift,
            os.dup(fd),
            -1 if map_fd is None else os.dup(map_fd),
        )
        self._shown[inode] = _Shown(0, kept, name)

    def _connection_ended(self) -> None:
        assert self._path is not None
        self._selector.unregister(self._path)
        self._service.stops()
        if self._path.ended() == errno.ECONNABORTED:
            logger.error(
                "somebody has aborted the FUSE connection: files that are open fail from now on"
            )
        self._path.hang_up()
        if self._daemon is None:
            self._start_at = None
            self._result = 0

    def _show(self, _daemon: _Daemon, message: Message, fds: list[int]) -> _Answer:
        assert self._path is not None
        inode = message["inode"]
        if len(fds) != message["has_file"] + message["has_map"]:
            raise ValueError(f"{len(fds)} descriptors to show inode {inode}")
        fd = fds[0] if message["has_file"] else -1
        map_fd = fds[-1] if message["has_map"] else -1
        self._forget(inode)
        kept: tuple[int, ...] = ()
        numbers = [message[key] for key in ("size", "data_offset", "data_size", "block_shift")]
        numbers.append(time.monotonic_ns())  # so that no map is taken for that of another file
        name = "-".join(map(str, ("shown", inode, *numbers)))
        try:
            if map_fd >= 0 and fd >= 0:
                # A daemon may be told that data was lost, and end before it says so.
                kept = os.dup(map_fd), writeback.reopen(fd)
                self._service.keep(name.replace("shown", "map", 1), map_fd)
            if fd >= 0 and self._service.wanted:
                # Opened by itself: of two that are the same, systemd keeps the first, and a whole
                # image is shown under two numbers.
                own = writeback.reopen(fd)
                self._service.keep(name, own)
                os.close(own)
            self._path.show(
                inode,
                message["size"],
                message["data_offset"],
                message["data_size"],
                message["block_shift"],
                fd,
                map_fd,
            )
            fds.clear()  # they are the C module's now
        except OSError as error:
            logger.warning("reads of it go through the daemon: inode=%d reason=%s", inode, error)
        self._shown[inode] = _Shown(self._started, kept, name)
        return {}, []

    def _known(self, _daemon: _Daemon, message: Message, _fds: list[int]) -> _Answer:
        known = self._shown.get(message["inode"])
        return {}, () if known is None else known.fds

    def _withdrawn(self, _daemon: _Daemon, message: Message, _fds: list[int]) -> _Answer:
        self._withdraw(message["inode"])
        return {}, []

    def _withdraw(self, inode: int) -> None:
        assert self._path is not None
        self._path.withdraw(inode)
        self._forget(inode)

    def _keep_name(self, _daemon: _Daemon, message: Message, _fds: list[int]) -> None:
        self._forget_orphan(message["inode"])

    def _forget_orphan(self, inode: int) -> None:
        if self._orphans.pop(inode, None) is not None:
            self._service.forget(f"orphan-{inode}")

    def _forget(self, inode: int) -> None:
        self._forget_orphan(inode)
        if (known := self._shown.pop(inode, None)) is not None:
            self._service.forget(known.name)
            self._service.forget(known.name.replace("shown", "map", 1))
            for fd in known.fds:
                os.close(fd)

    def _restored(self, _daemon: _Daemon, _message: Message, _fds: list[int]) -> None:
        for inode in [i for i, one in self._shown.items() if one.by != self._started]:
            if inode not in self._orphans:
                self._withdraw(inode)

    def _orphan(self, _daemon: _Daemon, message: Message, _fds: list[int]) -> None:
        inode = message["inode"]
        self._orphans[inode] = message
        if self._service.wanted:
            facts = _as_json("orphan", message)
            self._service.keep(f"orphan-{inode}", facts)
            os.close(facts)

    def _alive(self, _daemon: _Daemon, message: Message, _fds: list[int]) -> None:
        self._status = message["status"]

    def _failed(self, daemon: _Daemon, message: Message, _fds: list[int]) -> None:
        daemon.failure = _KINDS[message["kind"]](message["message"])

    def _ends(self, daemon: _Daemon, _message: Message, _fds: list[int]) -> None:
        daemon.ends_for_good = True
        self._service.stops()

    def _hands_over(self, daemon: _Daemon, message: Message, _fds: list[int]) -> None:
        daemon.hands_over_to = message["program"]

    def _serving(self, daemon: _Daemon, message: Message, _fds: list[int]) -> None:
        """Tell everybody that the mount answers, the first time."""
        daemon.serving_since = time.monotonic()
        self._hear_from_daemon()
        self._before = None  # if it is of another version, that works
        self._timeout_ms = int((message["io_timeout_s"] + MARGIN_S) * 1000)
        on_ready, self._on_ready = self._on_ready, None
        if on_ready is None:
            return
        on_ready(message["notes"])

        if not self._service.wanted:
            return
        # In a process of its own: a thread that waits for the mount could not be killed, and this
        # process would hang with it. (The kernel waits for the answer of a request that was taken.)
        asking = subprocess.Popen(
            ["stat", "--", os.path.join(self._config.mountpoint, ".")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        pidfd = os.pidfd_open(asking.pid)

        def answered() -> None:
            self._selector.unregister(pidfd)
            os.close(pidfd)
            if asking.wait() == 0:
                self._service.ready(self._status)
            else:  # it has been unmounted already
                logger.warning("the mount does not answer")

        self._selector.register(pidfd, selectors.EVENT_READ, answered)

    # -- the end

    def _clean_up(self) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is not None:  # something has failed here
            daemon.process.kill()
            daemon.process.wait()
        self._service.forget_all()
        if self._stand_in is not None:
            self._stand_in.stop()
        if self._control is not None:
            self._control.remove(
                mounts.socket_path(self._config.mountpoint),
                mounts.detached_socket_path(os.getpid()),
            )


def _first(left: Mapping[str, Sequence[int]], name: str) -> int | None:
    return left[name][0] if name in left else None


def _as_json(name: str, value: object) -> int:
    """Return a descriptor of memory that has a value as JSON."""
    fd = os.memfd_create(name)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps(value).encode())
    return fd


def _read_json(fd: int) -> dict[str, Any]:
    facts = json.loads(os.pread(fd, 64 * KiB, 0))
    assert isinstance(facts, dict)
    return facts


def state_of(left: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return what a keeper that was killed has left about its mount, or {} if the mount is gone."""
    needed = ("fuse", "mount", "control", "opened", "counters", "kept-root", "kept-lock")
    if not all(name in left for name in needed):
        return {}
    poller = select.poll()
    poller.register(left["fuse"][0], select.POLLIN)
    ended = any(events & select.POLLERR for _, events in poller.poll(0))
    return {} if ended else _read_json(left["mount"][0])


def keep(config: KeeperConfig, on_ready: Callable[[Sequence[str]], None]) -> int:
    """Mount, call `on_ready` when the mount answers, and return the exit code after its end.

    `on_ready` is given what the user should know although it is mounted, a line each.

    Raises:
        UserError: it could not be mounted. Nothing was left behind.
    """
    os.umask(0o022)  # for the folder of control sockets
    keeper = Keeper(config, on_ready)
    os.chdir("/")
    return keeper.run()
