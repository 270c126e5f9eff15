"""Builds a small, real Debian guest, as an image repository would hold it.

    python tests/vm/guest_image.py OUT

makes OUT/disk.raw (MBR, one ext4 partition with the files of Debian's packages, among them the
whole kernel package) and what starts it: OUT/vmlinuz, OUT/initrd.img, OUT/cmdline. This needs no
privileges, because it mounts nothing and enters no chroot. The same packages give the same bytes.
The packages are kept for the next time in $LAZYFS_TEST_CACHE (by default ~/.cache/lazyfs-tests).

The guest reports what it does on its serial console, one line each:

    LAZYFS-GUEST-START                  its root file system is mounted from the disk
    LAZYFS-GUEST-PASS n                 `VERIFIED_SIZE` bytes of files were read, and have the right checksums
    LAZYFS-GUEST-BEYOND n               the disk goes on for n sectors behind the image's end, and they read as zeros
    LAZYFS-GUEST-OK                     a file was written, too; the guest powers itself off
    LAZYFS-GUEST-FAIL why               (or a kernel panic) anything was wrong; the guest powers itself off

Between passes the guest drops its page cache, so each pass reads the disk again. Arguments on the
kernel's command line: with `guest.verify=0` it makes no pass at all, and with `guest.loop=N` it
makes N more than one. A line typed on the console ends the passes after the next one.
"""

import hashlib
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MiB = 1 << 20
SECTOR = 512

DISK_SIZE = 256 * MiB
PARTITION_OFFSET = 1 * MiB
VERIFIED_SIZE = 40 * MiB
"""The largest size in bytes of the files that are checked; files are taken completely. It is small
enough for a pass to take a second, even in an emulator."""

_KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
_PACKAGES = [
    "busybox-static",  # the initrd's only program
    "base-files", "dash", "coreutils", "libc6", "libc-bin",  # what the guest runs from its disk, ...
    "libacl1", "libattr1", "libgmp10", "libpcre2-8-0", "libselinux1",  # ... and the libraries of coreutils
]  # fmt: skip
# Debian's kernel has ext4 and the serial console built in, but virtio as modules; in the order of
# their dependencies.
_MODULES = [
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
]
# The emulated timers of a busy host are late: without no_timer_check and tsc=reliable the kernel
# may distrust them.
_CMDLINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable random.trust_cpu=on audit=0 "
    "i8042.noaux i8042.nokbd"
)
_EPOCH = 1_700_000_000  # every time stamp in the image
_UUID = "1a2f5000-0000-4000-8000-000000000001"

_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module.ko; done
n=0; while [ ! -b /dev/vda1 ] && [ $n -lt 200 ]; do sleep 0.05; n=$((n + 1)); done
mount -t ext4 /dev/vda1 /mnt || {{ echo LAZYFS-GUEST-FAIL mount; poweroff -f; }}
for folder in proc sys dev; do mount --move /$folder /mnt/$folder; done
mount -t tmpfs run /mnt/run
exec switch_root /mnt /sbin/guest-init
"""

# dash, coreutils and libc are read from the disk under test. So `fail` and the end use only the
# shell's own commands: other programs may not be readable any more.
_GUEST_INIT = """#!/bin/dash
export PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C
stop() { echo "LAZYFS-GUEST-$*"; echo o > /proc/sysrq-trigger; while :; do :; done; }
fail() { stop "FAIL $*"; }
verify=1 loop=0 pass=0
read -r line < /proc/cmdline
for word in $line; do
    case $word in guest.verify=*) verify=${word#*=};; guest.loop=*) loop=${word#*=};; esac
done
echo LAZYFS-GUEST-START
(read -r line < /dev/ttyS0 && : > /run/last-pass) &
while [ "$verify" = 1 ]; do
    last=0; [ "$pass" -ge "$loop" ] || [ -e /run/last-pass ] && last=1
    sha256sum -c --quiet --strict /etc/guest.sha256 || fail "checksum in pass $pass"
    echo "LAZYFS-GUEST-PASS $pass"
    [ $last = 1 ] && break
    pass=$((pass + 1)); echo 3 > /proc/sys/vm/drop_caches || fail "drop_caches"
done
read -r sectors < /sys/block/vda/size || fail "size"
read -r start < /sys/block/vda/vda1/start && read -r length < /sys/block/vda/vda1/size || fail "partition"
end=$((start + length)); beyond=$((sectors - end))
# An overlay may be larger than the image: zeros from its very end, and up to the overlay's.
for from in $end $((sectors > end + 2048 ? sectors - 2048 : end)); do
    count=$((beyond > 2048 ? 2048 : beyond))
    junk=$(dd if=/dev/vda bs=512 skip=$from count=$count status=none | tr -d '\\000' | wc -c) || fail "dd"
    [ "$junk" = 0 ] || fail "$junk bytes of junk behind sector $from"
done
echo "LAZYFS-GUEST-BEYOND $beyond"
mkdir -p /var/lib/guest && seq 1 200000 > /var/lib/guest/written && sync || fail write
stop OK
"""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """Holds a guest that was built into a folder."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def cmdline(self) -> Path:
        return self.folder / "cmdline"


def cache_folder() -> Path:
    """Return where packages are kept between runs."""
    if chosen := os.environ.get("LAZYFS_TEST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazyfs-tests"


def build(folder: Path, cache: Path) -> GuestImage:
    """Build the guest into `folder`, and fetch the packages that `cache` lacks."""
    guest = GuestImage(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary) / "root"
        root.mkdir()
        for package in _packages(cache):
            _run("dpkg-deb", "-x", package, root)
        (image,) = (root / "boot").glob("vmlinuz-*")
        shutil.copyfile(image, guest.kernel)
        guest.initrd.write_bytes(
            _initrd(root, root / "lib/modules" / image.name.removeprefix("vmlinuz-"))
        )
        guest.cmdline.write_text(_CMDLINE + "\n")
        _add_own_files(root)
        built = Path(temporary) / "disk"
        _make_disk(built, root)
        # mke2fs leaves zeros that the host's file system calls data today and a hole tomorrow
        # (unwritten extents). In the copy every block of zeros is a hole, and nothing else is.
        _run("cp", "--sparse=always", built, guest.disk)
        with guest.disk.open("rb") as disk:
            os.fsync(disk.fileno())
    return guest


# -- packages


def _packages(cache: Path) -> list[Path]:
    """Return the packages' files in the cache, in the versions that apt would install now.

    Missing packages are fetched.
    """
    try:
        return _fetched(cache)
    except RuntimeError:
        if os.geteuid() != 0:
            raise
    _run("apt-get", "-q", "update")  # there are no lists yet, or they name versions that have gone
    return _fetched(cache)


def _fetched(cache: Path) -> list[Path]:
    depends = _run("apt-cache", "depends", _KERNEL_METAPACKAGE)
    kernel = re.search(r"Depends: (linux-image-\S+)", depends)
    if kernel is None:
        raise RuntimeError(f"apt does not know {_KERNEL_METAPACKAGE} (apt-get update?): {depends}")
    names = [kernel[1], *_PACKAGES]
    # Lines such as: 'https://...' dash_0.5.12-2_amd64.deb 91848 SHA256:33ea...
    listed = _run("apt-get", "download", "--print-uris", *names)
    wanted = re.findall(r"^'\S+' (([^_\s]+)_\S+) \d+ SHA256:(\S+)$", listed, re.MULTILINE)
    assert sorted(name for _, name, _ in wanted) == sorted(names), listed
    missing = [name for file, name, digest in wanted if not _is_good(cache / file, digest)]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        # Two runs may fetch the same package. Each uses a folder of its own, and a rename replaces
        # a file by an equal one.
        with tempfile.TemporaryDirectory(dir=cache) as private:
            _run(
                "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *missing, cwd=private
            )
            for file in os.listdir(private):
                os.replace(Path(private) / file, cache / file)
    for file, _, digest in wanted:
        if not _is_good(cache / file, digest):
            raise RuntimeError(f"{cache / file} is not what apt promised")
    return sorted(cache / file for file, _, _ in wanted)


def _is_good(path: Path, digest: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


# -- what the guest is made of


def _initrd(root: Path, modules: Path) -> bytes:
    names = [module.rpartition("/")[2] for module in _MODULES]
    entries = [(name, stat.S_IFDIR | 0o755, b"", (0, 0)) for name in ("bin", "dev", "modules")]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)))
    entries.append(
        ("bin/busybox", stat.S_IFREG | 0o755, (root / "bin/busybox").read_bytes(), (0, 0))
    )
    entries.append(
        ("init", stat.S_IFREG | 0o755, _INIT.format(modules=" ".join(names)).encode(), (0, 0))
    )
    for module, name in zip(_MODULES, names, strict=True):
        content = (modules / f"kernel/drivers/{module}.ko").read_bytes()
        entries.append((f"modules/{name}.ko", stat.S_IFREG | 0o644, content, (0, 0)))
    return _cpio(entries)


def _cpio(entries: Iterable[tuple[str, int, bytes, tuple[int, int]]]) -> bytes:
    """Return a newc archive of (name, mode, content, device) entries.

    Source: Documentation/driver-api/early-userspace/buffer-format.rst in the Linux sources.
    """
    archive = bytearray()
    for inode, (name, mode, content, device) in enumerate(
        [*entries, ("TRAILER!!!", 0, b"", (0, 0))], 1
    ):
        fields = (inode, mode, 0, 0, 1, _EPOCH, len(content), 0, 0, *device, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (name.encode() + b"\0", content):
            archive += part
            archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _add_own_files(root: Path) -> None:
    for name in ("proc", "sys", "dev", "run", "tmp"):
        (root / name).mkdir(exist_ok=True)
    (root / "sbin/guest-init").write_text(_GUEST_INIT)
    (root / "sbin/guest-init").chmod(0o755)
    (root / "etc/guest.sha256").write_text("".join(_checksums(root)))


def _checksums(root: Path) -> list[str]:
    """Return sha256sum's lines for files of `VERIFIED_SIZE` in all.

    The files are all over the disk, and in another order than on it.
    """
    files = {
        f"/{path.relative_to(root)}": path
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    left, lines = VERIFIED_SIZE, []
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        content = files[name].read_bytes()
        if 4096 <= len(content) <= left:
            left -= len(content)
            lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    return lines


def _make_disk(disk: Path, root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        os.utime(path, (_EPOCH, _EPOCH), follow_symlinks=False)
    with disk.open("wb") as file:
        file.truncate(DISK_SIZE)
    environment = {
        **os.environ,
        "E2FSPROGS_FAKE_TIME": str(_EPOCH),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    # Few inodes, initialised now: a guest would write zeros into their tables at moments of its own
    # choice.
    extended = (
        f"offset={PARTITION_OFFSET},hash_seed={_UUID},root_owner=0:0,lazy_itable_init=0,nodiscard"
    )
    options = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-m",
        "0",
        "-N",
        "4096",
        "-J",
        "size=8",
        "-U",
        _UUID,
    ]
    length = f"{(DISK_SIZE - PARTITION_OFFSET) // 1024}K"
    _run("mke2fs", *options, "-E", extended, "-d", root, disk, length, environment=environment)
    # mke2fs copies the owner, the ctime, and perhaps an atime that its own reading made. Inodes
    # count up from 11.
    inodes = [2, *range(11, 12 + len({path.lstat().st_ino for path in root.rglob("*")}))]
    values = {"ctime": f"@{_EPOCH}", "atime": f"@{_EPOCH}", "uid": "0", "gid": "0"}
    fields = [
        f"set_inode_field <{inode}> {name} {value}\n"
        for inode in inodes
        for name, value in values.items()
    ]
    script = root.parent / "debugfs-script"
    script.write_text("".join(fields))
    _run(
        "debugfs", "-w", "-f", script, f"{disk}?offset={PARTITION_OFFSET}", environment=environment
    )
    # Source of the layout: "Master boot record" as every BIOS and kernel reads it; addresses as LBA
    # only.
    start, sectors = PARTITION_OFFSET // SECTOR, (DISK_SIZE - PARTITION_OFFSET) // SECTOR
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", start, sectors)
    with disk.open("r+b") as file:
        file.write(bytes(440) + struct.pack("<IH", 0x1A2F5, 0) + entry + bytes(48) + b"\x55\xaa")


def _run(
    *command: str | Path, cwd: str | None = None, environment: dict[str, str] | None = None
) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]), cache_folder())
