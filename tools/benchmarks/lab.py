"""Provides what the rows need: a repository, servers, lazyfs and its peers.

Each of them has a folder of its own. The repository is in memory, on a tmpfs, so that its disk has
no part in any figure. Caches are on the disk of `folder`.
"""

import asyncio
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

from benchmarks import link
from benchmarks.processes import end, fuse, kept_running, run, running, start, wait_until

MiB = 1 << 20
CHUNK = 4 * MiB


@dataclass
class Mount:
    """A mounted lazyfs."""

    mnt: Path
    cache: Path
    process: "subprocess.Popen[bytes]"
    socket: str

    @property
    def pid(self) -> int:
        return self.process.pid

    def execute(self, name: str, **arguments: Any) -> Any:
        return asyncio.run(self._execute(name, arguments))

    async def _execute(self, name: str, arguments: dict[str, Any]) -> Any:
        client = QMPClient("bench", readbuflen=1 << 30)
        await client.connect(self.socket)
        try:
            return await client.execute(name, arguments)
        finally:
            await client.disconnect()

    def populate(self, names: Sequence[str]) -> float:
        """Prefetch. Return the seconds from the first command until the last image is whole."""
        return asyncio.run(self._populate(names))

    async def _populate(self, names: Sequence[str]) -> float:
        client = QMPClient("bench")
        missing = set(names)
        with client.listener("IMAGE_STATE_CHANGE") as events:
            began = time.perf_counter()
            await client.connect(self.socket)
            for name in names:
                await client.execute("prefetch", {"path": name})
            while missing:
                data: Any = (await asyncio.wait_for(events.get(), 600))["data"]
                if data["state"] == "whole":
                    missing.discard(data["path"])
                elif data["error"]:
                    raise RuntimeError(f"{data['path']}: {data['error']}")
            took = time.perf_counter() - began
        await client.disconnect()
        return took

    def image(self, name: str) -> dict[str, Any]:
        (found,) = self.execute("query-images", path=name)
        assert isinstance(found, dict)
        return found

    def wait_whole(self, name: str) -> None:
        wait_until(lambda: self.image(name)["state"] == "whole", f"{name} is whole")


@dataclass
class Lab:
    """Holds everything that one row uses. All of it is removed when `close` returns."""

    folder: Path
    """A folder on the disk that is measured."""
    memory: Path
    """A folder on a tmpfs."""
    quick: bool
    troubles: list[str] = field(default_factory=list)
    """What a reader of the figures should know."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def repository(self) -> Path:
        return self.memory / "repository"

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def fresh(self, name: str) -> Path:
        """Return a new folder on the disk."""
        path = self.folder / f"{name}{next(self._numbers)}"
        path.mkdir()
        return path

    # -- the repository

    def image(self, name: str, size: int, data_of_four: int = 4) -> Path:
        """Make an image, in which some quarters of each 64 MiB are random bytes.

        The other quarters are holes.
        """
        path = self.repository / name
        if path.exists() and path.stat().st_size == size:
            return path
        self.repository.mkdir(exist_ok=True)
        noise = os.urandom(CHUNK)
        with path.open("wb") as file:
            file.truncate(size)
            for start in range(0, size, 64 * MiB):
                for at in range(start, min(start + 16 * MiB * data_of_four, size), CHUNK):
                    # No two chunks alike, without minutes of urandom.
                    content = at.to_bytes(8, "little") + noise[8:]
                    os.pwrite(file.fileno(), content[: min(CHUNK, size - at)], at)
        return path

    def forget(self, *names: str) -> None:
        for name in names:
            (self.repository / name).unlink(missing_ok=True)

    @contextmanager
    def served(
        self, *filters: str, parameters: Sequence[str] = (), folder: Path | None = None
    ) -> Iterator[str]:
        """Serve the repository with nbdkit on a UNIX socket.

        Yields the URI without the name of an export.
        """
        path = self.memory / f"nbd{next(self._numbers)}.sock"
        command = self._nbdkit(
            "--unix", path, filters=filters, parameters=parameters, folder=folder
        )
        with self._kept(command, ready=path.exists, clear=lambda: path.unlink(missing_ok=True)):
            yield f"nbd+unix:///?socket={path}"

    @contextmanager
    def far(self, delay_ms: int = 0, limited: bool = False) -> Iterator[str]:
        """Serve the repository over a link (`link.made`)."""
        with link.made(delay_ms, limited) as way:
            if not way.prefix:
                with self.served(*way.filters, parameters=way.parameters) as uri:
                    yield uri
                return
            port = 10809
            where = ("--ipaddr", way.address, "--port", port)
            command = self._nbdkit(*where, filters=way.filters, parameters=way.parameters)
            with self._kept([*way.prefix, *command], ready=lambda: _answers(way.address, port)):
                yield f"nbd://{way.address}:{port}"

    def _nbdkit(
        self,
        *where: object,
        filters: Sequence[str],
        parameters: Sequence[str],
        folder: Path | None = None,
    ) -> list[object]:
        command = ["nbdkit", "--foreground", "--readonly", *where, "--threads", "16"]
        command += [f"--filter={name}" for name in filters]
        return [*command, "file", f"dir={folder or self.repository}", *parameters]

    @contextmanager
    def _kept(self, command: Sequence[object], **how: Any) -> Iterator[None]:
        with kept_running(*command, **how) as crashes:
            yield
            if crashes():
                self.troubles.append(f"nbdkit crashed {crashes()} times, and was started again")

    @staticmethod
    def export(uri: str, name: str) -> str:
        """Return the URI of one export of a repository."""
        return uri.replace(":///", f":///{name}") if ":///" in uri else f"{uri}/{name}"

    @staticmethod
    def server(uri: str) -> dict[str, str]:
        """Return where a repository, or one of its exports, is served, as QEMU's SocketAddress."""
        if ":///" in uri:
            return {"type": "unix", "path": uri.partition("socket=")[2]}
        host, _, port = uri.removeprefix("nbd://").partition("/")[0].partition(":")
        return {"type": "inet", "host": host, "port": port}

    # -- lazyfs

    @contextmanager
    def lazyfs(self, uri: str, *options: object, cache: Path | None = None) -> Iterator[Mount]:
        """Mount lazyfs with a cache on the disk."""
        mnt = self.fresh("mnt")
        own = cache is None
        cache = cache or self.fresh("cache")
        read_fd, write_fd = os.pipe()
        command: list[object] = [
            sys.executable,
            "-m",
            "lazyfs",
            "mount",
            uri,
            mnt,
            "--cache-dir",
            cache,
        ]
        command += [
            "--foreground",
            "--ready-fd",
            write_fd,
            "--log-file",
            self.folder / "lazyfs.log",
            *options,
        ]
        process = start(*command, pass_fds=[write_fd])
        os.close(write_fd)
        try:
            with os.fdopen(read_fd) as answer:
                *_notes, said = answer.read().splitlines() or [""]
            if said != "ready":
                raise RuntimeError(f"lazyfs mount: {said}")
            yield Mount(mnt, cache, process, self._socket(mnt))
        finally:
            subprocess.run(
                [sys.executable, "-m", "lazyfs", "umount", mnt], capture_output=True, check=False
            )
            end(process)
            subprocess.run(["umount", "-l", str(mnt)], capture_output=True, check=False)
            if own:
                shutil.rmtree(cache)

    @staticmethod
    def _socket(mnt: Path) -> str:
        from lazyfs.host import mounts

        return mounts.socket_path(str(mnt))

    # -- its peers, each as a file that is read

    @contextmanager
    def nbdfuse(self, uri: str, name: str) -> Iterator[Path]:
        """Mount with libnbd's own FUSE file system, which has no cache except the kernel's."""
        mnt = self.fresh("nbdfuse")
        file = mnt / "nbd"
        with fuse(["nbdfuse", "--readonly", file, self.export(uri, name)], mnt, file):
            yield file

    @contextmanager
    def qsd(self, uri: str, name: str, cache: Path | None = None) -> Iterator[Path]:
        """Run qemu-storage-daemon: nbd -> qcow2 -> copy-on-read -> FUSE export."""
        folder = cache or self.fresh("qsd")
        overlay, shown = folder / "cache.qcow2", folder / "shown"
        shown.touch()
        if not overlay.exists():
            run(
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                overlay,
                (self.repository / name).stat().st_size,
            )
        command = ["qemu-storage-daemon"]
        remote = ",".join(f"server.{key}={value}" for key, value in self.server(uri).items())
        remote += f",export={name},read-only=on"
        command += ["--blockdev", f"nbd,node-name=remote,{remote}"]
        command += ["--blockdev", f"file,node-name=file,filename={overlay},discard=unmap"]
        command += ["--blockdev", "qcow2,node-name=cache,file=file,backing=remote"]
        command += ["--blockdev", "copy-on-read,node-name=top,file=cache"]
        command += ["--export", f"fuse,id=shown,node-name=top,mountpoint={shown},writable=off"]
        try:
            with fuse(command, shown, shown):
                yield shown
        finally:
            if cache is None:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def nbdkit_cow(self, uri: str, name: str) -> Iterator[Path]:
        """Run nbdkit's cow filter, which copies on read, under nbdfuse."""
        path, source = self.memory / f"cow{next(self._numbers)}.sock", uri.partition("socket=")[2]
        command = ["nbdkit", "--foreground", "--unix", path, "--filter=cow"]
        command += ["nbd", f"socket={source}", f"export={name}", "cow-on-read=true"]
        with (
            running(*command, ready=path.exists, env={**os.environ, "TMPDIR": str(self.folder)}),
            self.nbdfuse(f"nbd+unix:///?socket={path}", "") as file,
        ):
            yield file


@contextmanager
def made(folder: Path, quick: bool) -> Iterator[Lab]:
    """Make a lab in temporary folders."""
    with (
        tempfile.TemporaryDirectory(prefix="lazyfs-bench-", dir=folder) as disk,
        tempfile.TemporaryDirectory(prefix="lazyfs-bench-", dir="/dev/shm") as memory,
    ):
        yield Lab(Path(disk), Path(memory), quick)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def cold_read(path: Path, start: int, length: int, piece: int = MiB) -> float:
    """Read a range in order. Return the seconds it took."""
    fd = os.open(path, os.O_RDONLY)
    try:
        began = time.perf_counter()
        for offset in range(start, start + length, piece):
            if not os.pread(fd, min(piece, start + length - offset), offset):
                raise RuntimeError(f"{path} ends at {offset}")
        return time.perf_counter() - began
    finally:
        os.close(fd)


def latencies(path: Path, offsets: Sequence[int], length: int = 4096) -> list[float]:
    """Read at each offset. Return the seconds that each read took."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        found = []
        for offset in offsets:
            began = time.perf_counter()
            data = os.pread(fd, length, offset)
            found.append(time.perf_counter() - began)
            if len(data) != length:
                raise RuntimeError(f"{path}: {len(data)} bytes at {offset}")
        return found
    finally:
        os.close(fd)


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
