"""Which images the overlays of a host need, with files that qemu-img made."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import servers

from lazyfs import errors
from lazyfs.host import mounts
from lazyfs.qemu import overlay_scan
from lazyfs.qemu.overlay_scan import OverlayScan

TIMEOUT_S = 20.0


class Host:
    """Has folders, a "mount" that must not be touched, and a list of every path that was asked
    for."""

    def __init__(self, top: Path) -> None:
        servers.requires("qemu-img")
        self.top = top
        self.vms = top / "vms"
        self.mnt = top / "mnt"
        self.cache = top / "cache"
        self.images = top / "images"
        """Where qemu-img finds what the mount would show."""
        for folder in (self.vms, self.mnt, self.cache, self.images):
            folder.mkdir()
        self.asked: list[str] = []
        self.strangers: list[str] = []
        self.mounts = [mounts.Mount(str(self.mnt), "nbd://host", "0:99")]

    def create(self, path: str | Path, backing: str, backing_format: str = "raw") -> Path:
        """Make an overlay without looking at its backing file."""
        made = self.vms / path
        made.parent.mkdir(parents=True, exist_ok=True)
        command = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-u",
            "-b",
            backing,
            "-F",
            backing_format,
        ]
        subprocess.run([*command, made, "1M"], check=True, timeout=TIMEOUT_S)
        return made

    def scan(self, *folders: Path) -> set[str]:
        scan = OverlayScan(
            [str(folder) for folder in folders or [self.vms]],
            str(self.mnt),
            str(self.cache),
            lambda: self.mounts,
            lambda: self.strangers,
        )
        del self.asked[:]
        found = scan.backing_files()
        assert not [
            path for path in self.asked if path == str(self.mnt) or path.startswith(f"{self.mnt}/")
        ]
        return set(found)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made, real_readlink = Host(tmp_path), os.readlink
    for name in ("open", "lstat", "stat", "readlink", "scandir", "listdir"):
        real = getattr(os, name)

        def tell(path: object, *args: object, real: object = real, **kwargs: Any) -> object:
            if isinstance(path, str | bytes | os.PathLike):
                folder = kwargs.get("dir_fd")
                top = ""
                with suppress(OSError):  # the path of a folder may be too long for the kernel
                    top = "" if folder is None else real_readlink(f"/proc/self/fd/{folder}")
                made.asked.append(os.path.abspath(os.path.join(top, os.fsdecode(path))))
            return real(path, *args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(os, name, tell)
    yield made
    monkeypatch.undo()


def test_overlays_of_images(host: Host) -> None:
    host.create("a.qcow2", f"{host.mnt}/debian-12")
    host.create("deep/er/b.qcow2", f"{host.mnt}/team/ubuntu.qcow2", "qcow2")
    host.create("no-suffix", f"{host.mnt}/rocky")
    host.create("elsewhere.qcow2", "/srv/other")
    host.create("network.qcow2", "nbd://host/debian-11")
    assert host.scan() == {"debian-12", "team/ubuntu.qcow2", "rocky"}
    assert str(host.mnt.parent) in host.asked  # the promise of `scan` is about something


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_both_versions_of_qcow2(host: Host, version: str) -> None:
    command = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-o",
        f"compat={version},cluster_size=512",
    ]
    command += ["-b", f"{host.mnt}/a", "-F", "raw"]
    subprocess.run([*command, host.vms / "x", "1M"], check=True, timeout=TIMEOUT_S)
    assert host.scan() == {"a"}


def test_a_header_that_qemu_img_has_rewritten(host: Host) -> None:
    """The overlay has a feature table, bitmaps, and a long name that was moved."""
    path = host.create("a.qcow2", "/x")
    name = f"{host.mnt}/{'y' * 200}/{'z' * 200}"
    command: list[str | Path] = [
        "qemu-img",
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-b",
        name,
        "-F",
        "raw",
        path,
    ]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    subprocess.run(["qemu-img", "bitmap", "--add", path, "one"], check=True, timeout=TIMEOUT_S)
    assert host.scan() == {f"{'y' * 200}/{'z' * 200}"}


def test_chains(host: Host) -> None:
    """Overlays in the folder and in others form a chain, also through symlinks; raw ends it."""
    outside = host.top / "outside"
    outside.mkdir()
    host.create(outside / "base.qcow2", f"{host.mnt}/a")
    host.create("middle.qcow2", str(outside / "base.qcow2"), "qcow2")
    host.create("top.qcow2", "middle.qcow2", "qcow2")
    assert host.scan() == {"a"}
    host.create(outside / "two.qcow2", f"{host.mnt}/b")
    (host.top / "link").symlink_to(outside)
    (outside / "alias").symlink_to("two.qcow2")
    host.create("linked.qcow2", "../link/alias", "qcow2")
    assert host.scan() == {"a", "b"}
    host.create(outside / "guest-wrote-this", f"{host.mnt}/c")
    host.create("raw.qcow2", str(outside / "guest-wrote-this"), "raw")
    assert host.scan() == {"a", "b"}


def test_chains_that_end_nowhere(host: Host) -> None:
    host.create("self.qcow2", "self.qcow2", "qcow2")
    host.create("one.qcow2", "two.qcow2", "qcow2")
    host.create("two.qcow2", "one.qcow2", "qcow2")
    host.create("gone.qcow2", "/nowhere/at/all", "qcow2")
    host.create("file-as-folder.qcow2", "self.qcow2/x", "qcow2")
    (host.vms / "loop").symlink_to("loop")
    host.create("loops.qcow2", "loop", "qcow2")
    os.mkfifo(host.vms / "pipe")
    host.create("piped.qcow2", "pipe", "qcow2")
    host.create("folder.qcow2", ".", "qcow2")
    host.create("device.qcow2", "/dev/tty", "qcow2")
    host.create("good.qcow2", f"{host.mnt}/a")
    assert host.scan() == {"a"}


def test_names_in_many_forms(host: Host) -> None:
    host.create("relative/a.qcow2", "../../mnt/a")
    host.create("dots.qcow2", f"{host.mnt}/../mnt//./x/../b")
    host.create("file.qcow2", f"file:{host.mnt}/c")
    (host.top / "images-link").symlink_to(host.mnt)
    host.create("symlink.qcow2", f"{host.top}/images-link/d")
    (host.top / "up").symlink_to(host.mnt.parent)
    host.create("two-links.qcow2", f"{host.top}/up/images-link/team/e")
    (host.top / "one-image").symlink_to(host.mnt / "f")
    host.create("image-link.qcow2", f"{host.top}/one-image")
    host.create("plain.qcow2", f"{host.cache}/g")
    host.create("out-again.qcow2", f"{host.mnt}/team/../../cache/h")
    host.create("colon.qcow2", f"{host.mnt}/with:colon")
    assert host.scan() == {"a", "b", "c", "d", "team/e", "f", "g", "h", "with:colon"}


def test_json_names(host: Host) -> None:
    nested = {"driver": "raw", "file": {"driver": "file", "filename": f"{host.mnt}/a"}}
    flat = {"driver": "qcow2", "file.driver": "file", "file.filename": f"{host.mnt}/b"}
    chain = {"driver": "qcow2", "file": {"driver": "file", "filename": "/x"}, "backing": nested | {"file": {
        "driver": "file", "filename": f"{host.mnt}/c"}}}  # fmt: skip
    nbd = {
        "driver": "raw",
        "file": {"driver": "nbd", "host": "h", "port": "10809", "export": f"{host.mnt}/no"},
    }
    for index, options in enumerate([nested, flat, chain, nbd]):
        host.create(
            f"{index}.qcow2", f"json:{json.dumps(options)}", "raw" if index in (0, 3) else "qcow2"
        )
    assert host.scan() == {"a", "b", "c"}


def test_other_files_are_ignored(host: Host) -> None:
    (host.vms / "notes.txt").write_text("QFI but not really")
    (host.vms / "empty").touch()
    (host.vms / "short").write_bytes(b"QFI\xfb\0\0\0\3")
    (host.vms / "random").write_bytes(b"QFI\xfb" + os.urandom(5000))
    for image_format in ("raw", "vmdk", "vdi", "qed", "vhdx", "qcow"):
        command = ["qemu-img", "create", "-q", "-f", image_format, host.vms / image_format, "1M"]
        subprocess.run(command, check=True, timeout=TIMEOUT_S)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", host.vms / "none.qcow2", "1M"],
        check=True,
        timeout=20,
    )
    os.mkfifo(host.vms / "pipe")
    assert host.scan() == set()
    for name in ("empty", "short", "random"):
        host.create(f"over-{name}", name, "qcow2")
    assert host.scan() == set()


def test_symlinks_below_the_folder_are_not_followed(host: Host) -> None:
    outside = host.top / "outside"
    outside.mkdir()
    host.create(outside / "a.qcow2", f"{host.mnt}/a")
    (host.vms / "folder").symlink_to(outside)
    (host.vms / "file.qcow2").symlink_to(outside / "a.qcow2")
    assert host.scan() == set()
    assert host.scan(host.vms, outside) == {"a"}


def test_the_mount_below_the_folder_is_left_alone(host: Host) -> None:
    host.create("a.qcow2", f"{host.mnt}/a")
    host.create(host.mnt / "b.qcow2", f"{host.mnt}/b")
    other = host.top / "other-mount"
    host.create(other / "c.qcow2", f"{host.mnt}/c")
    host.mounts.append(mounts.Mount(str(other), "nbd://other", "0:100"))
    assert host.scan(host.top) == {"a"}
    assert str(other) not in host.asked
    # A chain that leads to another lazyfs mount ends there.
    host.create("over-other.qcow2", f"{other}/c.qcow2", "qcow2")
    assert host.scan() == {"a"}


def test_a_mountpoint_is_no_prefix_of_its_neighbours(host: Host) -> None:
    host.create("a.qcow2", f"{host.mnt}-2/a")
    host.create("b.qcow2", str(host.mnt))
    assert host.scan() == set()


# -- what cannot be read


def test_a_folder_that_is_not_there(host: Host) -> None:
    with pytest.raises(
        errors.UserError, match=r"gone cannot be read \(No such file or directory\)"
    ):
        host.scan(host.vms, host.top / "gone")


def test_a_folder_that_is_a_file(host: Host) -> None:
    (host.top / "file").touch()
    with pytest.raises(errors.UserError, match="Not a directory"):
        host.scan(host.top / "file")


@pytest.mark.parametrize("what", ["folder", "overlay", "chain", "way"])
def test_what_this_user_may_not_read(what: str) -> None:
    """This runs as another user, because root may read everything."""
    top = Path(tempfile.mkdtemp(prefix="lazyfs-overlays-", dir="/tmp"))
    try:
        top.chmod(0o755)
        host = Host(top)
        host.create("a.qcow2", f"{host.mnt}/a")
        secret = host.vms / "secret" if what in ("folder", "overlay") else top / "secret"
        host.create(secret / "b.qcow2", f"{host.mnt}/b")
        if what in ("chain", "way"):
            host.create("c.qcow2", str(secret / "b.qcow2"), "qcow2")
        for path in host.vms.rglob("*"):
            path.chmod(0o755)
        (secret if what in ("folder", "way") else secret / "b.qcow2").chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
            try:
                check_secret(host, what)
            finally:
                os.seteuid(0)
            secret.chmod(0o755)
            (secret / "b.qcow2").chmod(0o644)
            assert host.scan() == {"a", "b"}
        else:
            check_secret(host, what)
            secret.chmod(0o755)
    finally:
        shutil.rmtree(top)


def check_secret(host: Host, what: str) -> None:
    if what in ("chain", "way"):  # an overlay can name any file
        assert host.scan() == {"a"}
    else:
        with pytest.raises(errors.UserError, match=r"secret.*Permission denied"):
            host.scan()


def test_a_tree_that_is_too_deep_hides_only_itself(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.create("a.qcow2", f"{host.mnt}/a")
    name, fd = "d" * 200, os.open(host.vms, os.O_RDONLY)
    for _ in range(overlay_scan.MAX_DEPTH + 5):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    try:
        assert host.scan() == {"a"}
        assert "too deep" in caplog.text
    finally:
        subprocess.run(["rm", "-rf", host.vms / name], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a device")
def test_a_device_that_does_not_open_ends_its_chain(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    device = host.top / "device"
    os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(200, 0))
    host.create("a.qcow2", f"{host.mnt}/a")
    host.create("strange.qcow2", str(device), "qcow2")
    assert host.scan() == {"a"}
    assert f"{device} of an overlay cannot be read" in caplog.text


def test_what_other_users_have_mounted_is_not_looked_at(host: Host) -> None:
    host.create("a.qcow2", f"{host.mnt}/a")
    private = host.vms / "private"
    host.create(private / "b.qcow2", f"{host.mnt}/b")
    host.create("c.qcow2", str(private / "b.qcow2"), "qcow2")
    host.strangers.append(str(private))
    assert host.scan() == {"a"}
    assert not [path for path in host.asked if path.startswith(str(private))]


def test_folders_that_protect_nothing_are_told(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    assert host.scan() == set()
    assert "--overlays protects nothing" in caplog.text


def test_files_that_vanish_meanwhile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(5):
        host.create(f"{index}.qcow2", f"{host.mnt}/{index}")
    (host.vms / "folder").mkdir()
    real = os.open

    def vanish(path: object, *args: object, **kwargs: object) -> int:
        if str(path).endswith("3.qcow2"):
            (host.vms / "3.qcow2").unlink()
            (host.vms / "folder").rmdir()
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", vanish)
    assert host.scan() == {"0", "1", "2", "4"}


def test_a_lease_on_an_overlay_hides_only_that(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever owns a file can hold a lease on it for ever."""
    host.create("a.qcow2", f"{host.mnt}/a")
    leased = host.create("leased.qcow2", f"{host.mnt}/b")
    host.create("chain.qcow2", str(leased), "qcow2")
    script = (
        "import fcntl, signal, sys; signal.signal(signal.SIGIO, signal.SIG_IGN); "
        "f = open(sys.argv[1], 'r+b'); fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK); "
        "print(flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, leased], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        try:
            assert host.scan() == {"a"}
        finally:
            holder.kill()
    assert "leased.qcow2 cannot be read" in caplog.text
