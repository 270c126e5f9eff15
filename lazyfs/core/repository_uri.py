"""Reads the URI of a repository, and tells whether two URIs lead to the same one.

Source: the NBD URI specification (doc/uri.md of the NBD project), for schemes, port and
parameters.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from urllib.parse import parse_qsl, unquote, urlsplit

DEFAULT_PORT = 10809

TCP, UNIX, VSOCK = "tcp", "unix", "vsock"
_TRANSPORTS = {"": TCP, "+unix": UNIX, "+vsock": VSOCK}
_PARAMETERS = ("socket", "tls-certificates", "tls-psk-file")


@dataclass(frozen=True, slots=True)
class RepositoryUri:
    """Holds the parts of the URI of an NBD server."""

    text: str
    tls: bool
    transport: str
    host: str = ""
    """A name or an address; with vsock, the number of the machine."""
    port: int = DEFAULT_PORT
    socket: str = ""
    """The path of the UNIX socket."""
    user: str = ""
    certificates: str = ""
    """The folder with `ca-cert.pem`, or "" if a shared key is used."""
    psk_file: str = ""
    """The file with the key that is shared with the server, or ""."""

    @property
    def identity(self) -> str:
        """The part that says which repository it is, in one form.

        That is the transport and the address. The user and the parameters for TLS are left out, and
        so is whether TLS is used: they say how to get there, not where.
        """
        if self.transport == UNIX:
            return f"nbd+unix:///?socket={self.socket}"
        host = self.host.lower()
        scheme = "nbd" if self.transport == TCP else "nbd+vsock"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"


def parse(text: str) -> RepositoryUri:
    """Return the parts of the URI of a server.

    Raises:
        ValueError: it is not one that lazyfs can use. The message says what is wrong with it.
    """
    parts = urlsplit(text)
    scheme, _, rest = parts.scheme.partition("+")
    transport = _TRANSPORTS.get(f"+{rest}" if rest else "")
    after = text[len(parts.scheme) :]
    if scheme not in ("nbd", "nbds") or transport is None or not after.startswith("://"):
        raise ValueError(
            f"{text!r} is not an NBD URI such as nbd://HOST or nbd+unix:///?socket=PATH"
        )
    if "\0" in unquote(text):
        raise ValueError(f"{text!r} has a %00, which no name can have")
    if parts.path.strip("/"):
        query = f"/?{parts.query}" if parts.query else ""
        server = f"{parts.scheme}://{parts.netloc}{query}"
        raise ValueError(f"{text!r} names one export; give the server alone: {server}")
    if parts.fragment or text.endswith("#"):
        raise ValueError(f"{text!r} has a #, which means nothing here; write %23 in a name")
    if parts.password is not None:
        raise ValueError("the URI has a password, which NBD does not know; leave it out")
    found = _parameters(parts.query)
    if transport == UNIX:
        if not found.get("socket", "").startswith("/"):
            raise ValueError(f"{text!r} needs an absolute path: {parts.scheme}:///?socket=/PATH")
    elif not parts.hostname:
        raise ValueError(f"{text!r} names no host")
    elif "socket" in found:
        raise ValueError(f"the URI has the parameter socket, which is for {scheme}+unix://")
    try:
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        raise ValueError(f"{text!r} has a port that is no number from 0 to 65535") from None
    if transport == VSOCK and not str(parts.hostname).isdecimal():
        raise ValueError(
            f"{text!r} must name the machine by its number, such as {parts.scheme}://2"
        )
    uri = RepositoryUri(
        text,
        scheme == "nbds",
        transport,
        _host(parts.netloc) if transport != UNIX else "",
        port,
        found.get("socket", ""),
        unquote(parts.username or ""),
        found.get("tls-certificates", ""),
        found.get("tls-psk-file", ""),
    )
    _check_tls(uri, parts.scheme)
    return uri


def _host(netloc: str) -> str:
    """Return the host as it is written. urlsplit() changes it to lower case."""
    address = netloc.rpartition("@")[2]
    host = address[1:].partition("]")[0] if address.startswith("[") else address.partition(":")[0]
    return unquote(host)


def _parameters(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    # A "+" is a plus in the URIs of NBD. It means a space in those of web forms only.
    query = query.replace("+", "%2B")
    for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        if name not in _PARAMETERS:
            near = get_close_matches(name, _PARAMETERS, 1)
            instead = f"did you mean {near[0]}?" if near else f"there are {', '.join(_PARAMETERS)}"
            raise ValueError(f"the URI has the parameter {name!r}; {instead}")
        if not value:
            raise ValueError(f"the URI has the parameter {name} without a value")
        if name in found:
            raise ValueError(f"the URI has the parameter {name} twice")
        found[name] = value
    return found


def _check_tls(uri: RepositoryUri, scheme: str) -> None:
    """Check that the URI says how the server proves who it is.

    Raises:
        ValueError: it does not, or it says so with a scheme that does not use TLS.
    """
    ways = {"tls-certificates": uri.certificates, "tls-psk-file": uri.psk_file}
    given = [name for name, value in ways.items() if value]
    if not uri.tls:
        if given:
            raise ValueError(
                f"the URI has {given[0]}, but {scheme}:// is not encrypted; write "
                f"{scheme.replace('nbd', 'nbds', 1)}://"
            )
        return
    if len(given) > 1:
        raise ValueError("the URI has tls-certificates and tls-psk-file; give one of them")
    if not given and uri.transport != TCP:
        raise ValueError(f"{scheme}:// needs tls-psk-file=FILE, the key that the server knows")
    if not given:
        raise ValueError(
            f"{scheme}:// needs either tls-certificates=FOLDER, with the ca-cert.pem that the "
            "server's certificate is checked with, or tls-psk-file=FILE"
        )
    if not ways[given[0]].startswith("/"):
        raise ValueError(f"{given[0]} in the URI must be an absolute path")
    if uri.psk_file and not uri.user:
        raise ValueError(f"tls-psk-file needs the user of the key: {scheme}://USER@...")
    if uri.certificates and uri.transport != TCP:
        raise ValueError(
            f"{scheme}:// has no host name to compare a certificate with; use tls-psk-file"
        )
