"""Hostile export names become safe paths, and no two of them are the same or in each other's
way."""

import hashlib
import json
from collections.abc import Callable
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core import export_name, shown_file
from lazyfs.core.export_name import NAME_MAX, PATH_MAX, RESERVED

# No NUL: an export's name is a C string to libnbd.
fragments = st.one_of(
    st.sampled_from(
        [
            "a",
            "b",
            "/",
            "/",
            "//",
            ".",
            "..",
            "%",
            "%%",
            "%61",
            "%25",
            "%2F",
            "%00",
            "%~",
            ".lazyfs",
            "lost+found",
        ]
    ),
    st.sampled_from(
        ["\t", "\n", "\x7f", "\x85", "\u202e", "é", "😀", "\ud800", "\udc80", "~" + "0" * 32]
    ),
    st.sampled_from(
        ["a" * 255, "a" * 256, "é" * 127, "é" * 128, "%" * 85, "%" * 86, "😀" * 64, "x/" * 1600]
    ),
)
hostile = st.one_of(
    st.lists(fragments, max_size=5).map("".join),
    st.text(alphabet="ab/%.\t", max_size=6),
    st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=300),
)


class Mount:
    """Has a file at each path that is taken, and a folder at everything above one."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def is_free(self, path: str) -> bool:
        parts = path.split("/")
        above = {"/".join(parts[:i]) for i in range(1, len(parts))}
        is_folder = any(other.startswith(path + "/") for other in self.taken)
        return path not in self.taken and not is_folder and not above & self.taken

    def allot(self, export: str, suffix: str = "") -> str:
        path = export_name.file_name(export, self.is_free, suffix)
        assert self.is_free(path), (
            f"{export!r} shown as {path!r}, which is not free beside {self.taken}"
        )
        self.taken.add(path)
        return path


def check_safe(path: str) -> None:
    assert len(path.encode()) <= PATH_MAX
    components = path.split("/")
    assert components[0] not in RESERVED
    for component in components:
        assert component not in ("", ".", "..")
        assert len(component.encode()) <= NAME_MAX
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in component)


def decode(path: str) -> str:
    """Return what a person would read in `path`."""
    return unquote_to_bytes(path).removesuffix(b"\0").decode("utf-8", "surrogatepass")


suffixes = st.sampled_from(sorted(shown_file.SUFFIX.values()))


@given(hostile, st.booleans())
def test_every_shown_name_is_a_safe_relative_path(export: str, clash: bool) -> None:
    check_safe(export_name.file_name(export))
    check_safe(export_name.file_name(export, lambda path: not clash))
    check_safe(export_name.file_name(export, lambda path: "/" not in path))


@settings(max_examples=200)
@given(st.lists(hostile, unique=True, max_size=12))
def test_no_two_exports_are_in_each_others_way(exports: list[str]) -> None:
    mount = Mount()
    for export in exports:
        check_safe(mount.allot(export))
    assert len(mount.taken) == len(exports)


@settings(max_examples=200)
@given(st.lists(st.text(alphabet="a/%.\t", max_size=4), unique=True, max_size=40))
def test_nor_are_many_short_ones(exports: list[str]) -> None:
    mount = Mount()
    shown = {export: mount.allot(export) for export in exports}
    assert {export: decode(path) for export, path in shown.items()} == {
        export: export for export in exports
    }


@given(hostile)
def test_a_shown_name_decodes_to_the_export_unless_shortened(export: str) -> None:
    forms: list[Callable[[str], bool]] = [
        lambda path: True,
        lambda path: "/" not in path,
        lambda path: False,
    ]
    for is_free in forms:
        path = export_name.file_name(export, is_free)
        assert "%~" in path or decode(path).removesuffix("\0") == export


@pytest.mark.parametrize(
    ("export", "path"),
    [
        ("ubuntu", "ubuntu"),
        ("team/ubuntu-24.04", "team/ubuntu-24.04"),
        ("Grüße/日本 😀", "Grüße/日本 😀"),
        ("100%", "100%25"),
        ("../x", "..%2Fx"),
        ("/x", "%2Fx"),
        ("x/", "x%2F"),
        ("a//b", "a%2F%2Fb"),
        ("a/./b", "a%2F.%2Fb"),
        (".", "%2E"),
        ("..", "%2E."),
        ("...", "..."),
        ("/", "%2F"),
        ("", "%00"),
        (".lazyfs", "%2Elazyfs"),
        (".lazyfs/x", ".lazyfs%2Fx"),
        ("x/.lazyfs", "x/.lazyfs"),
        ("lost+found", "%6Cost+found"),
        ("tab\t", "tab%09"),
        ("\x85", "%C2%85"),
        ("\udce9", "%ED%B3%A9"),  # a byte that is not UTF-8, as Python decodes it
    ],
)
def test_names_beside_nothing_else(export: str, path: str) -> None:
    assert export_name.file_name(export) == path


@pytest.mark.parametrize(
    ("first", "then", "path"),
    [
        ("a", "a/b", "a%2Fb"),
        ("a/b", "a", "%61"),
        ("a/b", "a/b/c", "a%2Fb%2Fc"),
        ("a/b/c", "a/b", "a%2Fb"),
        ("é/b", "é", "%C3%A9"),
        ("%/b", "%", "%25%00"),
        ("\t/b", "\t", "%09%00"),
    ],
)
def test_names_that_clash(first: str, then: str, path: str) -> None:
    mount = Mount()
    assert mount.allot(first) == export_name.file_name(first)
    assert mount.allot(then) == path


def test_the_last_form_of_a_long_name_differs_too() -> None:
    for start in ("a", "%"):
        mount = Mount()
        long = start * 300
        folder = mount.allot(long + "/b")
        file = mount.allot(long)
        assert "%~" in file
        assert file != folder.split("/")[0]


def test_long_components_are_shortened_each_by_itself() -> None:
    path = export_name.file_name("a" * 256 + "/" + "b" * 255 + "/" + "é" * 128)
    first, second, third = path.split("/")
    assert len(first) == 255
    assert first.startswith("a" * 221 + "%~")
    assert second == "b" * 255
    assert third.startswith("é" * 110 + "%~")


def test_a_path_too_long_for_folders_is_one_name() -> None:
    part = "x" * 127 + "/"
    assert "/" in export_name.file_name(part * (PATH_MAX // 128 - 1) + "y" * 128)
    path = export_name.file_name(part * (PATH_MAX // 128) + "y")
    assert "/" not in path
    assert path.startswith("x" * 127 + "%2Fx")


def test_a_path_too_deep_for_folders_is_one_name() -> None:
    deep = "a/" * (export_name.MAX_DEPTH - 1)
    assert export_name.file_name(deep + "a") == deep + "a"
    path = export_name.file_name(deep + "a/a")
    assert "/" not in path
    assert path.startswith("a%2Fa%2F")


# -- --names sha1


@given(st.lists(hostile, unique=True, max_size=8), st.sampled_from(["", ".qcow2"]))
def test_sha1_names_are_the_hash_and_nothing_else(exports: list[str], suffix: str) -> None:
    for export in exports:
        expected = hashlib.sha1(export.encode("utf-8", "surrogatepass")).hexdigest()
        assert (
            export_name.shown_path(export, export_name.SHA1, lambda path: True, suffix) == expected
        )


def test_sha1_is_that_of_nova() -> None:
    """Source: nova/virt/libvirt/imagecache.py, get_cache_fname:
    hashlib.sha1(image_id.encode('utf-8')).hexdigest()."""
    path = export_name.shown_path(
        "155d900f-4e14-4e4c-a73d-069cbf4541e6", export_name.SHA1, lambda path: True, ""
    )
    assert path == "f2d1a8250ed3d4b744a8250dab8f6840179d502a"


def test_a_sha1_that_is_taken_by_another_name_gets_another() -> None:
    mount = Mount()
    name = hashlib.sha1(b"disk").hexdigest()
    mount.taken.add(name)  # an export of that very name, shown by an earlier mount as it is
    path = export_name.shown_path("disk", export_name.SHA1, mount.is_free, "")
    assert path == f"%{ord(name[0]):02X}{name[1:]}"
    assert mount.is_free(path)


def test_other_names_are_as_ever() -> None:
    assert (
        export_name.shown_path("team/disk", export_name.EXPORT, lambda path: True, ".qcow2")
        == "team/disk.qcow2"
    )


# -- with a suffix, as of qcow2 images


@given(hostile, suffixes)
def test_a_name_with_a_suffix_is_safe_too_and_ends_with_it(export: str, suffix: str) -> None:
    forms: list[Callable[[str], bool]] = [
        lambda path: True,
        lambda path: "/" not in path,
        lambda path: False,
    ]
    for is_free in forms:
        path = export_name.file_name(export, is_free, suffix)
        check_safe(path)
        assert path.endswith(suffix)
        assert "%~" in path or decode(path.removesuffix(suffix)).rstrip("\0") == export


mixed_names = st.one_of(
    st.sampled_from(
        [
            "a",
            "a.qcow2",
            "a.qcow2.qcow2",
            "a/b",
            "a.qcow2/b",
            "%61",
            "%61.qcow2",
            "",
            ".qcow2",
            "%",
            "%.qcow2",
        ]
    ),
    st.sampled_from(
        [
            "a.qcow2/",
            "%.qcow2/b",
            "%25.qcow2/b",
            ".qcow2/b",
            "%00.qcow2",
            "%00",
            "a.qcow2%00",
            "a%00",
            "/b",
        ]
    ),
    st.tuples(
        st.text(alphabet="a/%.", max_size=3),
        st.sampled_from(["", ".qcow2", ".qcow2/a", ".qcow2%00"]),
    ).map("".join),
    hostile,
    st.builds(
        lambda start, end: start * end,
        st.sampled_from(["a", "é", "%", "a.qcow2/"]),
        st.integers(245, 260),
    ),
)


@settings(max_examples=400)
@given(st.lists(st.tuples(mixed_names, suffixes), unique_by=lambda pair: pair[0], max_size=20))
def test_in_a_mixed_cache_no_two_exports_are_in_each_others_way(
    exports: list[tuple[str, str]],
) -> None:
    """Each mount of one cache may have another --format."""
    mount = Mount()
    for export, suffix in exports:
        check_safe(mount.allot(export, suffix))
    assert len(mount.taken) == len(exports)


RAW, QCOW2 = "", ".qcow2"


@pytest.mark.parametrize(
    ("exports", "paths"),
    [
        ([("a.qcow2", RAW), ("a", QCOW2)], ["a.qcow2", "%61.qcow2"]),
        ([("a", QCOW2), ("a.qcow2", RAW)], ["a.qcow2", "%61.qcow2"]),
        ([("a.qcow2", QCOW2), ("a", QCOW2)], ["a.qcow2.qcow2", "a.qcow2"]),
        ([("a", RAW), ("a/b", QCOW2)], ["a", "a%2Fb.qcow2"]),
        ([("a", QCOW2), ("a/b", QCOW2)], ["a.qcow2", "a/b.qcow2"]),
        ([("a/b", QCOW2), ("a", QCOW2)], ["a/b.qcow2", "a.qcow2"]),
        ([("a.qcow2/b", RAW), ("a", QCOW2)], ["a.qcow2/b", "%61.qcow2"]),
        (
            [("a.qcow2/b", RAW), ("a.qcow2", RAW), ("a", QCOW2)],
            ["a.qcow2/b", "%61.qcow2", "%61%00.qcow2"],
        ),
        (
            [("a.qcow2/b", RAW), ("a", QCOW2), ("a.qcow2", RAW)],
            ["a.qcow2/b", "%61.qcow2", "%61.qcow2%00"],
        ),
        ([("", RAW), ("", QCOW2)][1:], ["%00.qcow2"]),
        ([(".", QCOW2), ("..", QCOW2)], ["%2E.qcow2", "%2E..qcow2"]),
        ([(".lazyfs", QCOW2), ("lost+found", QCOW2)], ["%2Elazyfs.qcow2", "%6Cost+found.qcow2"]),
        ([("/a", QCOW2), ("a/", QCOW2)], ["%2Fa.qcow2", "a%2F.qcow2"]),
        ([("a" * 249, QCOW2)], ["a" * 249 + ".qcow2"]),
    ],
)
def test_names_with_a_suffix(exports: list[tuple[str, str]], paths: list[str]) -> None:
    mount = Mount()
    assert [mount.allot(export, suffix) for export, suffix in exports] == paths


def test_a_suffix_counts_towards_the_length_of_a_name_and_a_path() -> None:
    (folder, name) = export_name.file_name("b" * 256 + "/" + "a" * 250, suffix=QCOW2).split("/")
    assert (len(folder), len(name)) == (255, 255)
    assert name.startswith("a" * 215 + "%~")
    assert not folder.endswith(QCOW2)
    folders = ("x" * 127 + "/") * (PATH_MAX // 128 - 1)
    room = PATH_MAX - len(folders) - len(QCOW2)
    assert "/" in export_name.file_name(folders + "y" * room, suffix=QCOW2)
    assert "/" not in export_name.file_name(folders + "y" * (room + 1), suffix=QCOW2)


# -- URIs for QEMU; what QEMU makes of them is in component/test_qcow2_files.py


@given(
    st.sampled_from(
        [
            "nbd://host",
            "nbd://host:10810/",
            "nbd://[::1]",
            "nbd+unix:///?socket=/run/a%20b?c",
            "nbds://h",
        ]
    ),
    hostile.filter(lambda export: not export.startswith("/")),
)
def test_the_uri_of_an_export_names_it_and_nothing_else(repository: str, export: str) -> None:
    uri = export_name.qemu_uri(repository, export)
    assert uri.isascii()
    assert uri.isprintable()
    parts, server = urlsplit(uri), urlsplit(repository)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == (
        server.scheme,
        server.netloc,
        server.query,
        "",
    )
    assert unquote(parts.path.removeprefix("/"), errors="surrogatepass") == export


@pytest.mark.parametrize(
    ("repository", "server"),
    [
        ("nbd://host", {"type": "inet", "host": "host", "port": "10809"}),
        ("nbd://[::1]:10810/", {"type": "inet", "host": "::1", "port": "10810"}),
        ("nbd+unix:///?socket=/run/a%20b+c", {"type": "unix", "path": "/run/a b+c"}),
        ("nbd+unix:///?x=y&socket=/run/s", {"type": "unix", "path": "/run/s"}),
    ],
)
@given(export=hostile.map(lambda name: f"/{name}"))
def test_an_export_whose_slash_qemu_would_drop_is_described_in_json(
    repository: str, server: dict[str, str], export: str
) -> None:
    name = export_name.qemu_uri(repository, export)
    assert name.isascii()
    assert name.isprintable()
    file = {"driver": "nbd", "server": server, "export": export}
    assert json.loads(name.removeprefix("json:")) == {"driver": "raw", "file": file}


@pytest.mark.parametrize(
    "repository",
    [
        "nbds://host",
        "nbd+vsock://2",
        "nbds+unix:///?socket=/s",
        "nbds+vsock://2",
        "nbd://host:99999",
        "nbd+unix:///?x",
    ],
)
def test_where_qemu_has_no_address_such_an_export_gets_a_name_that_opens_nothing(
    repository: str,
) -> None:
    for export in ("/", "/a", "//a/b"):
        assert export_name.qemu_uri(repository, export).startswith("nbd:the-name")
