"""The C modules; everything else is in pyproject.toml."""

import shlex
import shutil
import subprocess

from setuptools import Extension, setup

NEEDS = "apt-get install gcc pkg-config libfuse3-dev python3-dev"


def flags(what: str) -> list[str]:
    """Return what pkg-config says of libfuse, or end the installation with one line."""
    if not shutil.which("gcc") and not shutil.which("cc"):
        raise SystemExit(f"lazyfs has C modules, and there is no C compiler: {NEEDS}")
    try:
        done = subprocess.run(
            ["pkg-config", what, "fuse3"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"lazyfs has C modules, and libfuse's headers or pkg-config are missing: {NEEDS}"
        ) from None
    if subprocess.run(["pkg-config", "--atleast-version=3.14", "fuse3"], check=False).returncode:
        raise SystemExit("lazyfs needs libfuse 3.14 or later (fuse_session_custom_io)")
    return shlex.split(done.stdout)


KEEPER = ("_keeper", "keeper", "relay", "requests", "opened", "shown")
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Wconversion"]

setup(
    ext_modules=[
        Extension(
            "lazyfs.kernel._keeper",
            [f"lazyfs/kernel/{name}.c" for name in KEEPER],
            depends=["lazyfs/kernel/keeper.h"],
            extra_compile_args=[*WARNINGS, *flags("--cflags")],
            extra_link_args=["-pthread"],
        ),
        Extension(
            "lazyfs.kernel._replies",
            ["lazyfs/kernel/_replies.c"],
            extra_compile_args=[*WARNINGS, *flags("--cflags")],
            extra_link_args=flags("--libs"),
        ),
    ]
)
