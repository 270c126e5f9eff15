"""Which files there are (with hostile names, new ones, many of them), and who may do what with
them."""

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest
from lab import Lab, MiB, wait_until

HOSTILE = ["plain", "..", ".", "../x", "/abs", "a/b", "a", "x//y", ".lazyfs", ".lazyfs/lock", "lost+found", "100%",
           "tab\there", "\x1b[31mred", "é/ü", "n" * 300, "deep/" * 40 + "end"]  # fmt: skip


def test_hostile_names_are_safe_files(lab: Lab) -> None:
    listing = lab.folder / "names"
    listing.write_text("".join(f"{name}\n" for name in HOSTILE))
    server = lab.serve_with("eval", f"list_exports=cat {listing}", "get_size=echo 4096",
                            "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none")  # fmt: skip
    before = sorted(os.listdir(lab.folder))
    lab.mount(server.uri)
    shown = sorted(
        os.path.relpath(os.path.join(folder, name), lab.mnt)
        for folder, _, names in os.walk(lab.mnt)
        for name in names
    )
    assert len(shown) == len(HOSTILE)
    assert {
        "plain",
        "..%2Fx",
        "%2Fabs",
        "a",
        "a%2Fb",
        "x%2F%2Fy",
        "%2Elazyfs",
        "100%25",
        "tab%09here",
    } <= set(shown)
    for name in shown:
        assert (lab.mnt / name).read_bytes() == bytes(4096)
    by_name = {image["name"]: image for image in lab.status()["images"]}
    assert set(by_name) == set(HOSTILE)
    wait_until(lambda: all(i["state"] == "whole" for i in lab.status()["images"]), "all are whole")
    lab.lazyfs("status", lab.mnt)
    lab.umount()
    for name in shown:
        assert (lab.mnt / name).stat().st_size == 4096
    assert sorted(set(os.listdir(lab.folder)) - {"lazyfs.log"}) == sorted(
        set(before) - {"lazyfs.log"}
    )


def test_export_names_that_are_not_utf8_are_left_out(lab: Lab) -> None:
    listing = lab.folder / "names"
    listing.write_bytes(b"good\nbad\xff\xfename\n")
    server = lab.serve_with("eval", f"list_exports=cat {listing}", "get_size=echo 4096")
    lab.mount(server.uri)
    assert os.listdir(lab.mnt) == ["good"]
    assert "not UTF-8" in lab.log.read_text()
    assert "uncaught" not in lab.log.read_text()


def test_images_come_and_go_without_a_remount(lab: Lab) -> None:
    lab.image("first", 1 * MiB)
    server = lab.serve()
    lab.mount(server.uri, "--refresh", "0.3", "--no-populate")
    assert os.listdir(lab.mnt) == ["first"]
    second = lab.image("second", 1 * MiB)
    wait_until(lambda: "second" in os.listdir(lab.mnt), "the new image shows")
    assert (lab.mnt / "second").read_bytes() == second.read_bytes()
    (lab.repository / "first").unlink()
    second.unlink()
    wait_until(
        lambda: os.listdir(lab.mnt) == ["second"], "an image without a cache goes, one with stays"
    )
    assert "not in the repository" in lab.image_status("second")["error"]


@pytest.mark.slow
def test_ten_thousand_exports(lab: Lab) -> None:
    for i in range(10_000):
        (lab.repository / f"image-{i:05}").touch()
    os.truncate(lab.repository / "image-09000", 1 << 30)
    server = lab.serve_with("file", f"dir={lab.repository}")
    lab.mount(server.uri)
    assert sorted(os.listdir(lab.mnt)) == [f"image-{i:05}" for i in range(10_000)]
    long_list = subprocess.run(
        ["ls", "-l", lab.mnt], capture_output=True, text=True, check=True
    ).stdout
    assert long_list.count("image-") == 10_000
    assert (lab.mnt / "image-09000").stat().st_size == 1 << 30
    assert len(lab.status()["images"]) == 10_000
    assert lab.daemon is not None
    assert len(os.listdir(f"/proc/{lab.daemon_pid}/fd")) < 50


def test_files_are_read_only_and_look_as_asked(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    lab.mount(lab.serve().uri, "--mode", "0640", "--uid", "1234", "--gid", "4321")
    found = (lab.mnt / "dense").stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (found.st_uid, found.st_gid) == (1234, 4321)
    for attempt in (
        lambda: (lab.mnt / "dense").open("r+b"),
        lambda: (lab.mnt / "new").touch(),
        lambda: (lab.mnt / "dense").unlink(),
        lambda: os.truncate(lab.mnt / "dense", 0),
    ):
        with pytest.raises(OSError, match="Read-only") as failure:
            attempt()
        assert failure.value.errno == errno.EROFS
    with pytest.raises(FileNotFoundError):
        (lab.mnt / ".lazyfs").stat()
    options = next(
        line for line in Path("/proc/mounts").read_text().splitlines() if f" {lab.mnt} " in line
    )
    assert {"nosuid", "nodev", "noatime"} <= set(options.split()[3].split(","))


def test_foreign_files_are_refused(lab: Lab) -> None:
    lab.image("dense", 1 * MiB)
    server = lab.serve()
    (lab.mnt / "mine").write_text("precious")
    refused = lab.lazyfs("mount", server.uri, lab.mnt, check=False)
    assert refused.returncode == 1
    assert "'mine'" in refused.stderr
    assert "--cache-dir" in refused.stderr
    assert refused.stderr.count("\n") == 1
    lab.mount(server.uri, "--cache-dir", lab.folder / "cache")
    assert os.listdir(lab.mnt) == ["dense"]
    lab.umount()
    assert (lab.mnt / "mine").read_text() == "precious"


@pytest.mark.slow
def test_a_foreign_file_in_the_way_of_a_whole_image_is_not_touched(lab: Lab) -> None:
    source = lab.image("dense", 1 * MiB)
    cache = lab.folder / "cache"
    lab.mount(lab.serve().uri, "--cache-dir", cache, "--fill-rate", "400K")
    (lab.mnt / "dense").open("rb").close()
    (cache / "dense").write_text("precious")
    wait_until(lambda: "in the way" in lab.image_status("dense")["error"], "status says so")
    assert (lab.mnt / "dense").read_bytes() == source.read_bytes()
    assert (cache / "dense").read_text() == "precious"
    (cache / "dense").unlink()
    lab.wait_for_state("dense", "whole")
    assert (cache / "dense").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("options", "size", "advice"),
    [
        ((), 1 << 50, "mount with a larger --block-size"),
        ((), (1 << 50) + 1, "too large for lazyfs"),
        (("--format", "qcow2"), 1 << 49, "mount with a larger --cluster-size"),
        (("--format", "qcow2"), (1 << 49) + 1, "too large for lazyfs"),
    ],
)
def test_an_image_too_large_for_its_blocks_is_refused_with_a_reason(
    lab: Lab, options: tuple[str, ...], size: int, advice: str
) -> None:
    """A size that a stranger claims must not cost so much memory."""
    server = lab.serve_with("eval", "list_exports=echo huge", f"get_size=echo {size}")
    lab.mount(server.uri, *options)
    (path,) = lab.mnt.iterdir()
    assert path.stat().st_size >= size
    with pytest.raises(OSError, match="Input/output error"):
        path.open("rb")
    assert advice in lab.image_status("huge")["error"]


@pytest.mark.parametrize(("image_format", "name"), [("raw", "large"), ("qcow2", "large.qcow2")])
def test_a_file_system_that_cannot_hold_such_a_file_is_named_in_status(
    lab: Lab, image_format: str, name: str
) -> None:
    """ext4 ends at 16 TiB.

    Here a limit of the process (RLIMIT_FSIZE) gives the same error, EFBIG.
    """
    small = lab.image("small", 1 * MiB)
    lab.image("large", 100 * MiB)
    cache = lab.folder / "cache"
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 20, 50 << 20))"
    program = ("-c", f"{limit}\nfrom lazyfs.cli import main as cli\nsys.exit(cli.main())")
    server = lab.serve()
    lab.mount(server.uri, "--format", image_format, "--cache-dir", cache, program=program)
    path = lab.mnt / name
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            path.open("rb")
    expected = f"the cache's file system cannot hold a file of {path.stat().st_size} bytes"
    assert lab.image_status("large")["error"] == expected
    assert small.read_bytes() in (lab.mnt / name.replace("large", "small")).read_bytes()
    lab.wait_for_state("small", "whole")
    assert not list((cache / ".lazyfs/partial").glob("*.qcow2*"))
    lab.umount()
    lab.mount(server.uri, "--cache-dir", cache, program=program)
    wait_until(lambda: lab.image_status("large")["error"] == expected, "and so after a restart")
    lab.umount()
    lab.mount(server.uri, "--cache-dir", cache)
    path.open("rb").close()
    assert lab.image_status("large")["error"] == ""
