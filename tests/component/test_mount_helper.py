"""mount.lazyfs: how it translates mount(8)'s options to those of `lazyfs mount`."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lazyfs import errors
from lazyfs.cli import arguments, mount_helper, mount_options
from lazyfs.cli.mount_helper import translate
from lazyfs.cli.verbs import VERBS


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], []),
        (["rw"], []),
        (["rw,noatime,noexec,nosuid,nodev,config=main,_netdev,nofail,user"], ["--config=main"]),
        (["ro,defaults,x-systemd.automount,X-mount.mkdir,noauto"], []),
        (["fill-rate=50M,no-populate"], ["--fill-rate=50M", "--no-populate"]),
        (["fill-rate=50M", "mode=0440,uid=5"], ["--fill-rate=50M", "--mode=0440", "--uid=5"]),
        (["cache-dir=/a=b"], ["--cache-dir=/a=b"]),
        ([",,ro,"], []),
    ],
)
def test_options_become_words(options: list[str], words: list[str]) -> None:
    assert translate(options) == words
    arguments.parsers(VERBS).top.parse_args(["mount", "nbd://h", "/mnt", *words])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("frobnicate", "option 'frobnicate' is not known; there are allow-evict, "),
        (
            "cache-dir=/a,b",
            "a value with a comma cannot be given here: put it in a file, and say config=NAME",
        ),
        ("foreground", "option 'foreground' is not known"),
        ("ready-fd=3", "not known"),
        ("help", "not known"),
        ("repository=nbd://h", "not known"),
        ("remount", "cannot change a mount; unmount it with lazyfs umount"),
        ("suid", "not known"),
        ("fill-rate", "option fill-rate needs a value: fill-rate=..."),
        ("no-populate=yes", "option no-populate takes no value"),
    ],
)
def test_what_is_not_known_is_an_error(options: str, says: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        translate([options])
    assert says in str(caught.value)


def test_sloppy_leaves_out_what_is_not_known() -> None:
    assert translate(["frobnicate,remount,uid=5"], sloppy=True) == ["--uid=5"]


def test_every_key_can_be_given_as_an_option() -> None:
    for key in mount_options.mount_keys():
        if not key.required and key.name != "foreground":
            option = key.name if key.is_flag else f"{key.name}=x"
            assert translate([option]) == [f"--{option}"]


def helper(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lazyfs.cli.mount_helper", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 1, "required"),
        (("nbd://h", "/mnt", "-o", "frobnicate"), 1, "frobnicate"),
        (("nbd://h", "/mnt", "-N", "7"), 1, "unrecognized"),
        (("http://h", "/mnt", "-o", "rw"), 1, "not an NBD URI"),
        (("nbd://h", "/mnt", "-o", "uid=x"), 1, "not a user or group number"),
        (("nbd://h", "/nonexistent/mnt", "-o", "rw"), 32, "does not exist"),
        (
            ("nbd://h", "/mnt", "-o", "config=/nonexistent.toml"),
            32,
            "cannot read the configuration",
        ),
    ],
)
def test_exit_codes_are_those_of_mount(words: tuple[str, ...], code: int, says: str) -> None:
    done = helper(*words)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert says in done.stderr


def test_fake_mounts_nothing_and_verbose_says_what_it_would() -> None:
    done = helper("nbd://h", "/mnt", "-f", "-v", "-n", "-o", "rw,uid=5", "-t", "fuse.lazyfs")
    assert (done.returncode, done.stderr) == (
        0,
        "mount.lazyfs: lazyfs mount nbd://h /mnt --uid=5\n",
    )


def test_the_package_installs_the_helper() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["mount.lazyfs"].partition(":")
    assert (module, getattr(mount_helper, function)) == (mount_helper.__name__, mount_helper.main)
    assert project["tool"]["setuptools"]["package-data"]["lazyfs"] == ["data/*"]
