"""What may import what, read from the source without running it."""

import ast
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import lazyfs

ROWS = [
    "__main__",
    "mount_helper",
    "cli",
    "arguments",
    "configuration",
    "image_verbs",
    "watching",
    "status_view",
    "map_view",
    "unmounting",
    "waiting",
    "daemon",
    "cache_check",
    "metrics_server",
    "metrics",
    "service_manager",
    "control_commands",
    # edges
    "supervisor",
    "fuse_adapter",
    "passthrough",
    "_passthrough",
    "kernel_session",
    "control_server",
    "pivot",
    "pivot_steps",
    "pivot_survey",
    "qemu_monitor",
    "control_client",
    "open_files",
    "process_files",
    # engine
    "room",
    "filesystem",
    "verifying",
    "jobs",
    "image_map",
    "name_tree",
    "sizes",
    "population",
    "image",
    "surroundings",
    "filling",
    "partial_cache",
    "reading",
    "image_statistics",
    "digest_check",
    "fetcher",
    "keeping",
    "demand_fetch",
    "extents",
    "write_queue",
    "events",
    "budget",
    "pace",
    "totals",
    # I/O
    "overlay_scan",
    "cache_dir",
    "catalog",
    "repository",
    "fill_thread",
    "nbd_handle",
    "nbd_buffers",
    "store.raw",
    "store.qcow2",
    "store.cache_file",
    "store.write_behind",
    "store.unkept",
    "mounts",
    # what the engine asks of the I/O, which implements it
    "interfaces",
    # core
    "core.lifecycle",
    "core.qemu_arguments",
    "core.qemu_graph",
    "core.pivot_choice",
    "core.inode_number",
    "core.control_schema",
    "core.metric_schema",
    "core.histogram",
    "core.qmp_wire",
    "core.config_file",
    "core.config_key",
    "core.eviction",
    "core.overlay",
    "core.digest",
    "core.shown_file",
    "core.qcow2_layout",
    "core.map_file",
    "core.export_name",
    "core.fetch_plan",
    "core.pacing",
    "core.extent_map",
    "core.block_map",
    "core.byte_range",
    # base
    "errors",
    "units",
    "__init__",
]
"""Every module; one may import only those printed below it. `__init__` stands for each package's own file."""

ENGINE = {"room", "filesystem", "population", "image", "image_statistics", "fetcher", "pace", "totals", "interfaces"}
IO = {"overlay_scan", "cache_dir", "catalog", "repository", "fill_thread", "nbd_handle", "store.raw", "store.qcow2"}
MAY_CHOOSE_IO = IO | {"daemon", "cache_check"}

IMPURE = {
    "asyncio", "concurrent", "datetime", "fcntl", "io", "mmap", "multiprocessing", "nbd", "os", "outcome", "pathlib",
    "prometheus_client", "pyfuse3", "qemu", "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "subprocess", "sys",
    "tempfile", "threading", "time", "trio",
}  # fmt: skip
"""What the core does without: it neither waits, nor touches the machine, nor reads a clock."""

MAX_LINES = 500

PACKAGE = Path(lazyfs.__file__).parent


def name_of(path: Path) -> str:
    """`lazyfs/core/pacing.py` -> `core.pacing`; every `__init__.py` -> `__init__`."""
    return "__init__" if path.stem == "__init__" else ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree: ast.AST, package: str = "lazyfs") -> Iterator[str]:
    """Every module that is imported anywhere in `tree`: at its top, in a function, or for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                # `from lazyfs import errors` names a module, `from lazyfs import __version__` does not.
                whole = f"{base}.{alias.name}"
                yield whole if is_ours(whole) and whole.removeprefix("lazyfs.") in ROWS else base


def is_ours(module: str) -> bool:
    return module == "lazyfs" or module.startswith("lazyfs.")


def own(tree: ast.AST, package: str) -> set[str]:
    """The imported modules of lazyfs, named as in ROWS."""
    packages = {"lazyfs", "lazyfs.core", "lazyfs.store"}
    found = {module for module in imports(tree, package) if is_ours(module)}
    return {"__init__" if module in packages else module.removeprefix("lazyfs.") for module in found}


def others(tree: ast.AST, package: str) -> set[str]:
    """The top-level names of everything else that is imported."""
    return {module.split(".")[0] for module in imports(tree, package) if not is_ours(module)}


def violations(name: str, source: str, package: str = "lazyfs") -> list[str]:
    """Say what module `name` must not do and does."""
    if name not in ROWS:
        return [f"{name} is not in ROWS"]
    tree = ast.parse(source)
    ours, theirs = own(tree, package), others(tree, package)
    found = [f"{name} imports {module}, which is not in ROWS" for module in sorted(ours - set(ROWS))]
    above = {row for row in ROWS if ROWS.index(row) <= ROWS.index(name)}
    found += [f"{name} imports {module}, which is not below it" for module in sorted(ours & above)]
    if name not in MAY_CHOOSE_IO:
        found += [f"{name} imports {module}; only daemon chooses I/O" for module in sorted(ours & IO)]
    if name in ENGINE:
        found += [
            f"{name} imports {module}, and is engine"
            for module in sorted(theirs & {"nbd", "prometheus_client", "pyfuse3"})
        ]
    if name.startswith("core.") or name in ("errors", "units"):
        allowed = {"os"} if name == "errors" else set()
        found += [f"{name} imports {module}, and is pure" for module in sorted((theirs & IMPURE) - allowed)]
        for node in ast.walk(tree):
            if isinstance(node, ast.AsyncFunctionDef):
                found.append(f"{name} is async, and is pure")
            elif isinstance(node, ast.Name) and node.id in ("open", "print", "input"):
                found.append(f"{name} uses {node.id}, and is pure")
    lines = source.count("\n")
    if lines > MAX_LINES:
        found.append(f"{name} has {lines} lines; split it")
    return found


def module_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_keeps_to_its_layer(path: Path) -> None:
    package = ".".join(["lazyfs", *path.parent.relative_to(PACKAGE).parts])
    assert violations(name_of(path), path.read_text(), package) == []


def test_basenames_are_unique() -> None:
    counts = Counter(path.stem for path in module_files() if path.stem != "__init__")
    assert [name for name, count in counts.items() if count > 1] == []
    assert len(set(ROWS)) == len(ROWS)
    assert len({row.split(".")[-1] for row in ROWS}) == len(ROWS)


def test_the_rows_that_rules_name_exist() -> None:
    assert set(ROWS) >= ENGINE | IO | MAY_CHOOSE_IO


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("util", "", "util is not in ROWS"),
        ("image", "import lazyfs.util", "image imports util, which is not in ROWS"),
        ("image", "from lazyfs.util import x", "image imports util, which is not in ROWS"),
        ("image", "from lazyfs import daemon", "image imports daemon, which is not below it"),
        ("image", "def f():\n    from lazyfs.filesystem import F", "image imports filesystem, which is not below it"),
        ("image", "if TYPE_CHECKING:\n    import lazyfs.cli", "image imports cli, which is not below it"),
        ("image", "from . import population", "image imports population, which is not below it"),
        ("image", "from .population import P", "image imports population, which is not below it"),
        ("image", "import lazyfs.image", "image imports image, which is not below it"),
        ("image", "from lazyfs import catalog", "image imports catalog; only daemon chooses I/O"),
        ("filesystem", "from lazyfs.store.raw import Raw", "filesystem imports store.raw; only daemon chooses I/O"),
        ("filesystem", "from lazyfs.store import raw", "filesystem imports store.raw; only daemon chooses I/O"),
        ("cli", "from lazyfs import cache_dir", "cli imports cache_dir; only daemon chooses I/O"),
        ("fetcher", "import pyfuse3.asyncio", "fetcher imports pyfuse3, and is engine"),
        ("interfaces", "from nbd import NBD", "interfaces imports nbd, and is engine"),
        ("totals", "import prometheus_client", "totals imports prometheus_client, and is engine"),
        ("nbd_handle", "from lazyfs.repository import R", "nbd_handle imports repository, which is not below it"),
        ("core.pacing", "import time", "core.pacing imports time, and is pure"),
        ("core.pacing", "from os import path", "core.pacing imports os, and is pure"),
        ("core.pacing", "async def f(): ...", "core.pacing is async, and is pure"),
        ("core.map_file", "open('x')", "core.map_file uses open, and is pure"),
        ("core.block_map", "from lazyfs.core import map_file", "core.block_map imports core.map_file, which is not"),
        ("errors", "import time", "errors imports time, and is pure"),
        ("units", "import os", "units imports os, and is pure"),
        ("__init__", "from lazyfs import units", "__init__ imports units, which is not below it"),
        ("cli", "\n" * 501, "cli has 501 lines; split it"),
    ],
)
def test_a_breach_is_found(name: str, source: str, complaint: str) -> None:
    [found] = violations(name, source)
    assert found.startswith(complaint)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli", "from lazyfs import __version__, daemon, errors"),
        ("daemon", "from lazyfs import catalog, filesystem, repository\nfrom lazyfs.store import raw, qcow2"),
        ("repository", "from lazyfs import interfaces, nbd_handle\nimport nbd, trio, os"),
        ("image", "from lazyfs import fetcher, interfaces, mounts\nfrom lazyfs.core import block_map\nimport trio"),
        ("errors", "import os"),
        ("core.map_file", "import struct, zlib\nfrom .block_map import BlockMap\nfrom lazyfs.units import MiB"),
        ("cli", "\n" * 500),
    ],
)
def test_what_is_permitted_is_not_complained_about(name: str, source: str) -> None:
    package = "lazyfs.core" if name.startswith("core.") else "lazyfs"
    assert violations(name, source, package) == []
