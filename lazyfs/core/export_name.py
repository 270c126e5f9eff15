"""How the name of an export becomes the name of a file on the mount.

Export names are chosen by whoever runs the repository, so they can contain anything. Most names
are shown as they are, and a "/" in a name makes a folder. All other names are percent-encoded, so
that every shown name is a safe path and no two exports share one:

    export              shown as              reason
    team/ubuntu-24.04   team/ubuntu-24.04     folders
    100%                100%25                "%" is always encoded, so decoding is unambiguous
    ../x                ..%2Fx                an empty, "." or ".." component: no folders at all
    .lazyfs             %2Elazyfs             reserved
    (empty)             %00                   the default export: an empty C string is only its NUL
    tab<TAB>            tab%09                control characters
    a/a/... (over 32)   a%2Fa%2F...           too deep for folders, so it is shown flat
    (over 255 bytes)    <start>%~<sha256>     too long for a file's name; 32 digits of the SHA-256
    a/b beside a        a%2Fb                 a clash: `a` is a file already
    a beside a/b        %61                   a clash: `a` is a folder already
    % beside %/b        %25%00                the same clash, where "%" is encoded in any case

With `--names sha1` the shown name is the SHA-1 of the export's name, in hex. OpenStack Nova names
its base files in this way (by the SHA-1 of the image's id), and looks for exactly that name.
Therefore such names have no folders and no suffix, whatever the format of the image.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import SplitResult, quote, unquote, urlsplit

NAME_MAX = 255
PATH_MAX = 3072
"""The longest shown path in bytes. Linux accepts 4,095 bytes for a whole path; the difference is
left for the path of the mountpoint."""

MAX_DEPTH = 32
"""How many parts a path may have. A name with more is shown flat: each part is a folder in memory,
and a repository of 300 names with 1,500 parts each took 1.5 GB."""

RESERVED = frozenset({".lazyfs", "lost+found"})
"""Names at the top of the cache directory that no image may get: `.lazyfs` is our own state, and
mkfs creates `lost+found`."""

EXPORT, SHA1 = "export", "sha1"
NAMES = (EXPORT, SHA1)
"""The ways to name images: after their exports, or by the SHA-1 of the export's name."""

_HASH_HEX = 32
_NBD_PORT = 10809  # registered with IANA


def qemu_uri(repository: str, export: str) -> str:
    """Return the name by which QEMU opens `export`, in the form that a qcow2's header needs.

    This is a URI in most cases. QEMU drops leading slashes of the export's name in a URI, so for
    a name with a leading slash the result is a description in JSON instead. QEMU 7.2 has no such
    description for repositories with TLS or vsock. For those the result is a name that opens
    nothing, so that QEMU cannot open another export by mistake.
    """
    parts = urlsplit(repository)
    if export.startswith("/"):
        server = _qemu_server(parts)
        if server is None:
            return "nbd:the-name-of-the-export-begins-with-a-slash"
        # The header gives the format "raw", so QEMU accepts only a raw node here.
        node = {"driver": "raw", "file": {"driver": "nbd", "server": server, "export": export}}
        return "json:" + json.dumps(node, separators=(",", ":"))
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}/{quote(export, errors='surrogatepass')}{query}"


def _qemu_server(parts: SplitResult) -> dict[str, str] | None:
    """Return the repository's address as QEMU's SocketAddress, or None if it has no such form."""
    if parts.scheme == "nbd+unix":
        for parameter in re.split("[&;]", parts.query):
            key, _, value = parameter.partition("=")
            if key == "socket":
                return {"type": "unix", "path": unquote(value, errors="surrogateescape")}
    if parts.scheme == "nbd" and parts.hostname is not None:
        with suppress(ValueError):  # The port is not a number, or too large.
            return {
                "type": "inet",
                "host": unquote(parts.hostname),
                "port": str(parts.port or _NBD_PORT),
            }
    return None


def shown_path(export: str, names: str, is_free: Callable[[str], bool], suffix: str) -> str:
    """Return the path, relative to the mountpoint, under which `export` is shown.

    Args:
        names: one of NAMES.
        is_free: as for `file_name`.
        suffix: as for `file_name`. Names by SHA1 do not get it.
    """
    if names == SHA1:
        hashed = hashlib.sha1(export.encode("utf-8", "surrogatepass"), usedforsecurity=False)
        # This name can be taken only by an image that an earlier mount named in another way.
        return file_name(hashed.hexdigest(), is_free)
    return file_name(export, is_free, suffix)


def is_named(export: str, path: str, names: str) -> bool:
    """Return whether an image at `path` has its name in that way, which is one of NAMES."""
    return (path == shown_path(export, SHA1, lambda _path: True, "")) == (names == SHA1)


def file_name(
    export: str, is_free: Callable[[str], bool] = lambda path: True, suffix: str = ""
) -> str:
    """Return the path, relative to the mountpoint, under which `export` is shown.

    Args:
        is_free: returns whether an image may get a path. It may not if the path is taken, is a
            folder, or lies below a file.
        suffix: the end of the name, which is kept however the rest is encoded or shortened. At
            most 16 bytes.
    """
    for candidate in (_folders(export, suffix), _flat(export, suffix)):
        if candidate is not None and is_free(candidate):
            return candidate
    first, flat = _encode_byte(export[:1]), _encode(export).replace("/", "%2F")
    # If encoding the first character changes nothing, an encoded NUL is added. No export's name
    # contains a NUL, because names are C strings.
    last = flat + "%00" if flat.startswith(first) else first + flat[1:]
    if not is_free(_shorten(last, suffix)):
        # Example: "a" with the suffix beside the export "a.suffix" without one, while both clash
        # with a folder of that name.
        last += "%00"
    return _shorten(last, suffix)


def _folders(export: str, suffix: str) -> str | None:
    encoded = _encode(export)
    components = encoded.split("/")
    if any(part in ("", ".", "..") for part in components) or components[0] in RESERVED:
        return None
    if len(components) > MAX_DEPTH:
        return None
    if len(encoded.encode()) + len(suffix) > PATH_MAX:
        return None
    *folders, last = components
    return "/".join([*map(_shorten, folders), _shorten(last, suffix)])


def _flat(export: str, suffix: str) -> str:
    flat = _encode(export).replace("/", "%2F")
    if flat == "":
        return "%00" + suffix
    if flat in (".", "..") or flat in RESERVED:
        return _encode_byte(flat[:1]) + flat[1:] + suffix
    return _shorten(flat, suffix)


def _encode(text: str) -> str:
    return "".join(
        _encode_byte(c) if c == "%" or unicodedata.category(c) in ("Cc", "Cs") else c for c in text
    )


def _encode_byte(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _shorten(component: str, suffix: str = "") -> str:
    raw, room = component.encode(), NAME_MAX - len(suffix)
    if len(raw) <= room:
        return component + suffix
    digest = hashlib.sha256(raw).hexdigest()[:_HASH_HEX]
    start = raw[: room - _HASH_HEX - 2].decode(errors="ignore")
    # Percent-encoding never makes "%~", so a shortened name cannot clash with another kind of name.
    return f"{start}%~{digest}{suffix}"
