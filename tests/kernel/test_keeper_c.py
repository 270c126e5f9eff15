"""The keeper's C code by itself: warnings of two compilers, its tests under sanitizers, and any
bytes at its entrances."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import servers

KERNEL = Path(__file__).parents[2] / "lazyfs" / "kernel"
SOURCES = [KERNEL / f"{name}.c" for name in ("shown", "opened", "requests", "relay", "keeper")]
HERE = Path(__file__).with_name("keeper_test.c")
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
TESTS = re.findall(r'^        \{"(\w+)", \w+\},$', HERE.read_text(), re.MULTILINE)
SANITIZERS = {"memory": "address,undefined", "threads": "thread"}
FUZZ_S = 3.0


@pytest.fixture(scope="session", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests, with a sanitizer in them."""
    servers.requires("gcc")
    built = tmp_path_factory.mktemp("keeper") / "keeper_test"
    sanitizer = f"-fsanitize={SANITIZERS[request.param]}"
    command = [
        "gcc",
        "-std=c11",
        "-O1",
        "-g",
        sanitizer,
        "-fno-sanitize-recover=all",
        f"-I{KERNEL}",
    ]
    subprocess.run([*command, HERE, *SOURCES, "-pthread", "-o", built], check=True)
    return built


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tests_are_found() -> None:
    assert len(TESTS) >= 9


@pytest.mark.xdist_group("keeper")
@pytest.mark.parametrize("name", TESTS)
def test_under_sanitizers(program: Path, name: str) -> None:
    run(program, name)


@pytest.mark.xdist_group("keeper")
def test_any_bytes_at_the_entrances(program: Path) -> None:
    seed = str(time.time_ns())
    print("seed", seed)
    assert int(run(program, "any_bytes", seed, str(FUZZ_S)).split()[0]) >= 1000


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("name", sorted(path.name for path in KERNEL.glob("*.c")))
def test_no_compiler_warns(compiler: str, name: str) -> None:
    servers.requires(compiler)
    found = subprocess.run(
        ["pkg-config", "--cflags", "fuse3", "python3"], capture_output=True, text=True, check=True
    )
    # Those of the headers of Python itself do not count.
    flags = [flag.replace("-I/", "-isystem/", 1) for flag in found.stdout.split()]
    command = [compiler, *WARNINGS, *flags, "-fsyntax-only", str(KERNEL / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
