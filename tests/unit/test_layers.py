"""What may import what, read from the source without running it."""

import ast
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import lazyfs

PACKAGES = {
    "__main__": "",
    "cli": (
        "mount_helper main verbs mounting configuration mount_options status watching status_view image_verbs map_view"
        " pivoting upgrading unmounting checking doctor waiting progress values arguments printing"
    ),
    "keeper": "",
    "daemon": "",
    "mounted": "",
    "assembly": "",
    "report": "metrics_server metrics service_manager tracebacks background_log",
    "qemu": "pivot pivot_steps pivot_survey monitor overlay_scan",
    "control": "stand_in server commands jobs client",
    "kernel": "fuse_adapter complaints present_files passthrough _replies channel _keeper session",
    "cache": "cache_check check_report adopting cache_dir catalog_file catalog sqlite_paths reserve store.raw store.qcow2 store.cache_file store.write_behind store.unkept beneath",
    "repository": "lookups nbd_repository sole_connection nbd_filler nbd_source fill_thread nbd_handle describing nbd_connect tls nbd_buffers",
    "engine": (
        "room operations verifying filesystem identifying population sizes name_tree supervision slices"
        " image.image_map image.image image.populating image.handles image.filling image.image_statistics"
        " image.digest_check image.partial_cache"
        " context backing_files threads"
        " fetch.demand_reader fetch.extents fetch.demand_fetch fetch.fill_port fetch.cache_writer fetch.samples fetch.block_table fetch.under_way fetch.waiting_reads fetch.zeroes"
        " fetch.write_queue"
        " budget map_memory pace totals use_clock interfaces"
    ),
    "host": "writeback fd_store leaving control_socket open_files fuse_limits image_lock process_files descriptors mounts mountinfo peer",
    "core": (
        "image_record lifecycle qemu_arguments qemu_graph pivot_choice inode_number control_schema metric_schema histogram qmp_wire"
        " config_file config_key eviction overlay digest looking shown_file qcow2_layout map_file export_name repository_uri in_flight fetch_plan pacing"
        " extent_map block_map byte_range escaping"
    ),
    "errors": "",
    "units": "",
    "__init__": "",
}
"""The packages, and modules of the top level, from the top down; and for each package its modules
from the top down.

A module may import what is printed below it, in its own package and in others. `cache` and
`repository` stand above `engine`, because they implement what `engine.interfaces` asks for: so the
engine cannot choose one of them.
"""

ORDER = [f"{package}.{module}" if modules else package
         for package, modules in PACKAGES.items() for module in modules.split() or [""]]  # fmt: skip

CHOSEN = ("cache", "repository")
MAY_CHOOSE = ("cli.checking", "daemon", "mounted", *CHOSEN)
"""Who may import from a package of CHOSEN. Everybody else is given objects that implement
`engine.interfaces`."""

INNER = ("engine", "core")
NOT_INNER = {"nbd", "prometheus_client", "pyfuse3", "qemu", "socket"}
"""What no module of INNER imports: it speaks to the world through `engine.interfaces`."""

IMPURE = {
    "asyncio", "concurrent", "datetime", "fcntl", "io", "mmap", "multiprocessing", "nbd", "os", "outcome", "pathlib",
    "prometheus_client", "pyfuse3", "qemu", "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "subprocess", "sys",
    "tempfile", "threading", "time", "trio",
}  # fmt: skip
"""What the core does without: it neither waits, nor touches the machine, nor reads a clock."""

MAX_LINES = 500
LONG = "# Longer than 500 lines: "

PACKAGE = Path(lazyfs.__file__).parent


def name_of(path: Path) -> str:
    """`lazyfs/core/pacing.py` -> `core.pacing`; every `__init__.py` -> `__init__`."""
    return (
        "__init__"
        if path.stem == "__init__"
        else ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    )


def imports(tree: ast.AST, package: str = "lazyfs") -> Iterator[str]:
    """Every module that is imported anywhere in `tree`: at its top, in a function, or for types
    only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                # `from lazyfs import errors` names a module, `from lazyfs import __version__` does
                # not.
                whole = f"{base}.{alias.name}"
                yield whole if is_ours(whole) and whole.removeprefix("lazyfs.") in ORDER else base


def is_ours(module: str) -> bool:
    return module == "lazyfs" or module.startswith("lazyfs.")


def own(tree: ast.AST, package: str) -> set[str]:
    """The imported modules of lazyfs, named as in ORDER."""
    found = {module for module in imports(tree, package) if is_ours(module)}
    return {
        "__init__" if is_package(module) else module.removeprefix("lazyfs.") for module in found
    }


def is_package(module: str) -> bool:
    return (
        module == "lazyfs" or (PACKAGE / module.removeprefix("lazyfs.").replace(".", "/")).is_dir()
    )


def others(tree: ast.AST, package: str) -> set[str]:
    """The top-level names of everything else that is imported."""
    return {module.split(".")[0] for module in imports(tree, package) if not is_ours(module)}


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    """Whether module `name` is one of `packages`, or in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(name: str, source: str, package: str = "lazyfs") -> list[str]:
    """Say what module `name` must not do and does."""
    tree = ast.parse(source)
    ours, theirs = own(tree, package), others(tree, package)
    found = []
    if is_in(name, INNER):  # first: it holds for a module that nobody has put into PACKAGES, too
        found += [
            f"{name} imports {module}, and is inside" for module in sorted(theirs & NOT_INNER)
        ]
    if is_in(name, ("core", "errors", "units")):
        found += impurities(name, tree, theirs)
    if name not in ORDER:
        return [*found, f"{name} is not in PACKAGES"]
    found += [
        f"{name} imports {module}, which is not in PACKAGES" for module in sorted(ours - set(ORDER))
    ]
    above = {module for module in ORDER if ORDER.index(module) <= ORDER.index(name)}
    found += [f"{name} imports {module}, which is not below it" for module in sorted(ours & above)]
    if not is_in(name, MAY_CHOOSE):
        chosen = [module for module in sorted(ours) if is_in(module, CHOSEN)]
        found += [f"{name} imports {module}; only the daemon chooses it" for module in chosen]
    lines = source.count("\n")
    if lines > MAX_LINES and LONG not in source:
        found.append(
            f"{name} has {lines} lines; split it by idea, or say why not in a line that begins with {LONG!r}"
        )
    return found


def impurities(name: str, tree: ast.AST, theirs: set[str]) -> Iterator[str]:
    """Say what a module of the core must not do and does."""
    allowed = {"os"} if name == "errors" else set()
    yield from (
        f"{name} imports {module}, and is pure" for module in sorted((theirs & IMPURE) - allowed)
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            yield f"{name} is async, and is pure"
        elif isinstance(node, ast.Name) and node.id in ("open", "print", "input"):
            yield f"{name} uses {node.id}, and is pure"


def module_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_keeps_to_its_layer(path: Path) -> None:
    package = ".".join(["lazyfs", *path.parent.relative_to(PACKAGE).parts])
    assert violations(name_of(path), path.read_text(), package) == []


def test_no_module_is_named_twice() -> None:
    counts = Counter(ORDER)
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_module_in_the_order_exists() -> None:
    there = {name_of(path) for path in module_files()} | {"kernel._replies", "kernel._keeper"}
    assert set(ORDER) <= there


def test_what_the_rules_name_exists() -> None:
    for name in (*MAY_CHOOSE, *CHOSEN, *INNER):
        assert any(is_in(module, (name,)) for module in ORDER), name


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("util", "", "util is not in PACKAGES"),
        ("engine.util", "", "engine.util is not in PACKAGES"),
        ("engine.util", "import pyfuse3", "engine.util imports pyfuse3, and is inside"),
        ("core.util", "import time", "core.util imports time, and is pure"),
        ("engine.room", "import lazyfs.util", "engine.room imports util, which is not in PACKAGES"),
        ("engine.room", "from lazyfs.util import x", "engine.room imports util, which is not in PACKAGES"),
        ("engine.room", "from lazyfs import daemon", "engine.room imports daemon, which is not below it"),
        ("engine.sizes", "def f():\n    from lazyfs.engine.filesystem import F",
         "engine.sizes imports engine.filesystem, which is not below it"),
        ("engine.room", "if TYPE_CHECKING:\n    import lazyfs.cli.main",
         "engine.room imports cli.main, which is not below it"),
        ("engine.sizes", "from . import population", "engine.sizes imports engine.population, which is not below it"),
        ("engine.sizes", "from .population import P", "engine.sizes imports engine.population, which is not below it"),
        ("engine.sizes", "import lazyfs.engine.sizes", "engine.sizes imports engine.sizes, which is not below it"),
        ("engine.fetch.cache_writer", "from lazyfs.engine.image import image",
         "engine.fetch.cache_writer imports engine.image.image, which is not below it"),
        ("engine.image.image", "from lazyfs.cache import catalog",
         "engine.image.image imports cache.catalog, which is not below it"),
        ("control.commands", "from lazyfs.cache.store.raw import Raw",
         "control.commands imports cache.store.raw; only the daemon chooses it"),
        ("kernel.fuse_adapter", "from lazyfs.repository import nbd_handle",
         "kernel.fuse_adapter imports repository.nbd_handle; only the daemon chooses it"),
        ("engine.room", "import pyfuse3.asyncio", "engine.room imports pyfuse3, and is inside"),
        ("engine.interfaces", "from nbd import NBD", "engine.interfaces imports nbd, and is inside"),
        ("engine.fetch.extents", "import socket", "engine.fetch.extents imports socket, and is inside"),
        ("repository.nbd_handle", "from lazyfs.repository.nbd_repository import R",
         "repository.nbd_handle imports repository.nbd_repository, which is not below it"),
        ("core.pacing", "import time", "core.pacing imports time, and is pure"),
        ("core.pacing", "from os import path", "core.pacing imports os, and is pure"),
        ("core.pacing", "async def f(): ...", "core.pacing is async, and is pure"),
        ("core.map_file", "open('x')", "core.map_file uses open, and is pure"),
        ("core.block_map", "from lazyfs.core import map_file", "core.block_map imports core.map_file, which is not"),
        ("errors", "import time", "errors imports time, and is pure"),
        ("units", "import os", "units imports os, and is pure"),
        ("__init__", "from lazyfs import units", "__init__ imports units, which is not below it"),
        ("cli.main", "\n" * 501, "cli.main has 501 lines; split it"),
    ],
)  # fmt: skip
def test_a_breach_is_found(name: str, source: str, complaint: str) -> None:
    package = ".".join(["lazyfs", *name.split(".")[:-1]])
    assert violations(name, source, package)[0].startswith(complaint)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli.main", "from lazyfs import __version__, daemon, errors"),
        ("daemon", "from lazyfs.cache import catalog\nfrom lazyfs.cache.store import raw, qcow2"),
        (
            "repository.nbd_repository",
            "from lazyfs.repository import nbd_handle\nimport nbd, trio, os",
        ),
        (
            "engine.image.image",
            "from lazyfs.engine.fetch import block_table\nfrom lazyfs.host import mounts\nimport trio",
        ),
        ("errors", "import os"),
        (
            "core.map_file",
            "import struct, zlib\nfrom .block_map import BlockMap\nfrom lazyfs.units import MiB",
        ),
        ("cli.main", "\n" * 500),
        ("cli.main", f"{LONG}the parser is one table.\n" + "\n" * 600),
    ],
)
def test_what_is_permitted_is_not_complained_about(name: str, source: str) -> None:
    package = ".".join(["lazyfs", *name.split(".")[:-1]])
    assert violations(name, source, package) == []


def test_text_for_people_is_printed_in_one_place() -> None:
    """There it is escaped. What else prints, prints JSON, TOML or the completion."""
    allowed = {"cli/printing.py": 3, "cli/arguments.py": 1, "cli/configuration.py": 1}
    for path in sorted(PACKAGE.rglob("*.py")):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
            and node.args
        ]
        name = str(path.relative_to(PACKAGE))
        assert len(calls) == allowed.get(name, 0), f"{name} prints"
