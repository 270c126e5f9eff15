"""The one C module; everything else is in pyproject.toml.

It is optional: without a compiler or libfuse's headers lazyfs is installed all the same, and works
without passthrough.
"""

import shlex
import subprocess

from setuptools import Extension, setup


def _flags(what: str) -> list[str]:
    try:
        done = subprocess.run(
            ["pkg-config", what, "fuse3"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []  # the compiler will say what is missing, and the installation goes on
    return shlex.split(done.stdout)


setup(
    ext_modules=[
        Extension(
            "lazyfs.kernel._passthrough",
            ["lazyfs/kernel/_passthrough.c"],
            extra_compile_args=["-std=c11", "-Wall", "-Wextra", *_flags("--cflags")],
            extra_link_args=_flags("--libs"),
            optional=True,
        )
    ]
)
