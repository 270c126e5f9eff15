"""What those who may write to the cache folder can reach through a lazyfs that runs as root."""

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from lab import KiB, Lab, wait_until

SIZE = 4 * KiB
NOBODY = 65534
SECRET = b"secret".ljust(SIZE, b"!")
CONTENT = b"* * * * * root id\n".ljust(SIZE, b"#")


class Attack:
    """A cache folder of another user, who can change what is in it while it is mounted."""

    def __init__(self, lab: Lab, beside: bool) -> None:
        self.lab = lab
        self.folder = lab.folder / "cache" if beside else lab.mnt
        self.folder.mkdir(exist_ok=True)
        os.chown(self.folder, NOBODY, NOBODY)
        self.fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        """The attacker had the folder open before anything was mounted over it."""
        self.outside = lab.folder / "outside"
        self.outside.mkdir(mode=0o700)
        content = lab.folder / "content"
        content.write_bytes(CONTENT)
        names = lab.folder / "names"
        names.write_text("team/disk\n")
        server = lab.serve_with(
            "eval",
            f"list_exports=cat {names}",
            f"get_size=echo {SIZE}",
            f"pread=dd if={content} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
        )
        options: list[str | Path] = ["--cache-dir", self.folder] if beside else []
        lab.mount(server.uri, *options, "--trust-cache-owner", "--no-passthrough")
        self.image = lab.mnt / "team" / "disk"

    def lead_outside(self, name: str) -> None:
        """Put a symbolic link to the folder outside in the place of a folder of the cache."""
        with suppress(FileNotFoundError):
            os.rename(name, f"{name}.old", src_dir_fd=self.fd, dst_dir_fd=self.fd)
        os.symlink(self.outside, name, dir_fd=self.fd)

    def make_whole(self) -> None:
        self.lab.lazyfs("prefetch", self.image, "--wait")


@pytest.fixture(params=["beside", "below"])
def attack(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Attack]:
    made = Attack(lab, request.param == "beside")
    yield made
    os.close(made.fd)


def test_nothing_is_written_outside(attack: Attack) -> None:
    attack.lead_outside("team")
    lab = attack.lab
    lab.lazyfs("prefetch", attack.image)
    wait_until(lambda: lab.image_status("team/disk")["error"], "it cannot be put there")
    assert attack.image.read_bytes() == CONTENT
    assert "a file is where its folder belongs" in lab.image_status("team/disk")["error"]
    assert list(attack.outside.iterdir()) == []


def test_nothing_is_read_from_outside(attack: Attack) -> None:
    attack.make_whole()
    (attack.outside / "disk").write_bytes(SECRET)
    attack.lead_outside("team")
    done = subprocess.run(["cat", attack.image], capture_output=True, check=False, timeout=60)
    assert b"secret" not in done.stdout


def test_nothing_is_removed_outside(attack: Attack) -> None:
    attack.make_whole()
    (attack.outside / "disk").write_bytes(SECRET)
    attack.lead_outside("team")
    attack.lab.lazyfs("evict", attack.image, check=False)
    assert (attack.outside / "disk").read_bytes() == SECRET


def test_the_state_is_the_one_that_was_opened(attack: Attack) -> None:
    """Another state folder is not looked at until the next mount, which refuses it."""
    (attack.outside / "partial").mkdir()
    attack.lead_outside(".lazyfs")
    attack.make_whole()
    assert attack.image.read_bytes() == CONTENT
    attack.lab.lazyfs("evict", attack.image)
    assert [path.name for path in attack.outside.rglob("*")] == ["partial"]
    attack.lab.umount()
    options: list[str | Path] = []
    if attack.folder != attack.lab.mnt:
        options = ["--cache-dir", attack.folder]
    done = attack.lab.lazyfs(
        "mount", "nbd://localhost:1", attack.lab.mnt, *options, "--trust-cache-owner", check=False
    )
    assert "/.lazyfs is not a folder of this user" in done.stderr
    assert [path.name for path in attack.outside.rglob("*")] == ["partial"]


@pytest.mark.parametrize(
    ("owner", "mode", "said"),
    [
        (NOBODY, 0o755, f"is user {NOBODY}'s"),
        (0, 0o775, "is writable by others"),
        (0, 0o757, "is writable by others"),
    ],
)
def test_root_refuses_a_folder_in_which_others_can_put_images(
    lab: Lab, owner: int, mode: int, said: str
) -> None:
    lab.image("disk", SIZE)
    cache = lab.folder / "cache"
    cache.mkdir()
    os.chown(cache, owner, owner)
    cache.chmod(mode)
    uri = lab.serve().uri
    done = lab.lazyfs("mount", uri, lab.mnt, "--cache-dir", cache, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "--trust-cache-owner" in done.stderr
    assert list(cache.iterdir()) == []
    lab.mount(uri, "--cache-dir", cache, "--trust-cache-owner")
    assert Path(lab.mnt / "disk").exists()


def test_what_the_readme_says_lets_only_a_group_read(lab: Lab) -> None:
    lab.image("disk", SIZE)
    lab.mount(lab.serve().uri, "--mode", "0440", "--gid", str(NOBODY))
    script = "import os, sys; os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(65533); "
    script += "print(len(open(sys.argv[1], 'rb').read()))"
    for group, allowed in ((NOBODY, True), (65532, False)):
        done = subprocess.run(
            ["/usr/bin/python3", "-I", "-c", script, "disk", str(group)],
            cwd=lab.mnt, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode == 0) == allowed, done.stderr


def test_who_may_read_whole_images_from_before_is_said(lab: Lab) -> None:
    lab.image("disk", SIZE)
    server = lab.serve()
    lab.mount(server.uri)
    (lab.mnt / "disk").read_bytes()
    lab.wait_for_state("disk", "whole")
    lab.umount()
    lab.mount(server.uri, "--mode", "0440")
    assert any("more users may read 1" in note for note in lab.notes)
    lab.umount()
    (lab.mnt / "disk").chmod(0o440)
    lab.mount(server.uri, "--mode", "0440")
    assert lab.notes == []


def test_a_log_file_is_not_for_everybody(lab: Lab) -> None:
    lab.image("disk", SIZE)
    lab.mount(lab.serve().uri)
    assert lab.log.stat().st_mode & 0o007 == 0


# -- a repository at its limits


REPLY = struct.Struct(">QIII")
LIST, INFO, GO = 3, 6, 7


class ManyExports:
    """Serves more exports than nbdkit lists. All have 4 KiB of "x"."""

    def __init__(self, path: Path, names: Iterator[bytes]) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self._list = b"".join(
            REPLY.pack(0x3E889045565A9, LIST, 2, 4 + len(name))
            + len(name).to_bytes(4, "big")
            + name
            for name in names
        ) + REPLY.pack(0x3E889045565A9, LIST, 1, 0)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError, struct.error), client, client.makefile("rb") as asked:

            def reply(option: int, kind: int, data: bytes = b"") -> None:
                client.sendall(REPLY.pack(0x3E889045565A9, option, kind, len(data)) + data)

            client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
            asked.read(4)
            while True:
                _, option, length = struct.unpack(">8sII", asked.read(16))
                asked.read(length)
                if option == LIST:
                    client.sendall(self._list)
                elif option in (INFO, GO):
                    reply(option, 3, struct.pack(">HQH", 0, SIZE, 3))
                    reply(option, 1)
                    if option == GO:
                        break
                else:
                    reply(option, 2**31 + 1)
            while (header := asked.read(28)) and header[6:8] == b"\0\0":
                length = int.from_bytes(header[24:], "big")
                client.sendall(struct.pack(">II", 0x67446698, 0) + header[8:16] + b"x" * length)


def test_a_repository_at_its_limits_takes_a_limited_amount_of_memory(lab: Lab) -> None:
    """100,000 exports with 8 MiB of names. What is beyond is left out, and said."""
    lab.allow(200)
    names = (f"{number:06}-{'n' * 70}".encode() for number in range(110_000))
    server = ManyExports(lab.folder / "many.sock", names)
    try:
        lab.mount(server.uri, "--no-populate")
        assert len(os.listdir(lab.mnt)) == 100_000
        assert "lists 10000 exports more than lazyfs takes" in lab.log.read_text()
        assert lab.daemon is not None
        status = Path(f"/proc/{lab.daemon_pid}/status").read_text()
        resident = int(status.partition("VmRSS:")[2].split()[0]) * KiB
        assert resident < 350 * 1024 * KiB, "300 MiB more than a mount without images"
        assert (lab.mnt / f"000007-{'n' * 70}").read_bytes() == b"x" * SIZE
        lab.umount()
    finally:
        server.close()
