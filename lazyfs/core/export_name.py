"""Export names, which a stranger chose, as file names on the mount.

Most names are shown as they are, "/" making folders. The rest is percent-encoded so that every shown
name is a safe path, and no two exports share one:

    team/ubuntu-24.04   team/ubuntu-24.04     folders
    100%                100%25                "%" is always encoded, so decoding is unambiguous
    ../x                ..%2Fx                an empty, "." or ".." component: no folders at all
    .lazyfs             %2Elazyfs             reserved
    (empty)             %00                   the default export: an empty C string is just its NUL
    tab<TAB>            tab%09                control characters
    (over 255 bytes)    <start>%~<sha256>     cannot be a file name at all
    a/b beside a        a%2Fb                 a clash: `a` is a file already
    a beside a/b        %61                   a clash: `a` is a folder already
    % beside %/b        %25%00                the same, where the first character is encoded anyway

With `--names sha1` the shown name is the SHA-1 of the export's, in hex, as OpenStack Nova names its base files (by the
id of the image): no folders, no suffix, whatever the format, as whoever computes it looks for exactly that name.
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
"""Bytes of a shown path. Linux takes 4,095 for a whole path; the rest is room for the mountpoint."""

RESERVED = frozenset({".lazyfs", "lost+found"})
"""Names at the top of the cache directory that are not ours to give: our state, and mkfs's folder."""

EXPORT, SHA1 = "export", "sha1"
NAMES = (EXPORT, SHA1)
"""How images can be named: after their exports, or by the hash of that."""

_HASH_HEX = 32
_NBD_PORT = 10809  # IANA's


def qemu_uri(repository: str, export: str) -> str:
    """Return the name by which QEMU opens `export`, as it has to be in a qcow2's header: a URI.

    QEMU drops leading slashes of the name in a URI, so for such an export it is a description in JSON; where QEMU 7.2
    has none (TLS, vsock), a name that opens nothing: not another export.
    """
    parts = urlsplit(repository)
    if export.startswith("/"):
        server = _qemu_server(parts)
        if server is None:
            return "nbd:the-name-of-the-export-begins-with-a-slash"
        # The inner node is the raw one that the format in the header asks for; QEMU takes no other for it.
        node = {"driver": "raw", "file": {"driver": "nbd", "server": server, "export": export}}
        return "json:" + json.dumps(node, separators=(",", ":"))
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}/{quote(export, errors='surrogatepass')}{query}"


def _qemu_server(parts: SplitResult) -> dict[str, str] | None:
    """Return a repository's address as QEMU's SocketAddress; None if it has none."""
    if parts.scheme == "nbd+unix":
        for parameter in re.split("[&;]", parts.query):
            key, _, value = parameter.partition("=")
            if key == "socket":
                return {"type": "unix", "path": unquote(value, errors="surrogateescape")}
    if parts.scheme == "nbd" and parts.hostname is not None:
        with suppress(ValueError):  # a port that is none
            return {
                "type": "inet",
                "host": unquote(parts.hostname),
                "port": str(parts.port or _NBD_PORT),
            }
    return None


def shown_path(export: str, names: str, is_free: Callable[[str], bool], suffix: str) -> str:
    """Return the path under which `export` is shown. `names`: one of NAMES; the rest as for `file_name`."""
    if names == SHA1:
        hashed = hashlib.sha1(export.encode("utf-8", "surrogatepass"), usedforsecurity=False)
        # In the way can only be an image that was named differently, by an earlier mount.
        return file_name(hashed.hexdigest(), is_free)
    return file_name(export, is_free, suffix)


def file_name(
    export: str, is_free: Callable[[str], bool] = lambda path: True, suffix: str = ""
) -> str:
    """Return the path, relative to the mountpoint, under which `export` is shown.

    Args:
        is_free: whether a path can be given: it is neither taken, nor a folder, nor below a file.
        suffix: ends the name, whatever becomes of the rest; at most 16 bytes.
    """
    for candidate in (_folders(export, suffix), _flat(export, suffix)):
        if candidate is not None and is_free(candidate):
            return candidate
    first, flat = _encode_byte(export[:1]), _encode(export).replace("/", "%2F")
    # Encoding the first character may change nothing; the NUL that ends a C string does.
    last = flat + "%00" if flat.startswith(first) else first + flat[1:]
    if not is_free(_shorten(last, suffix)):
        last += "%00"  # "a" with a suffix beside "a.suffix" without, both clashing with a folder of that name
    return _shorten(last, suffix)


def _folders(export: str, suffix: str) -> str | None:
    encoded = _encode(export)
    components = encoded.split("/")
    if any(part in ("", ".", "..") for part in components) or components[0] in RESERVED:
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
    # "%~" is never made by percent-encoding, so a shortened name clashes with no other kind.
    return f"{start}%~{digest}{suffix}"
