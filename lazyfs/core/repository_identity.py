"""Tells whether two URIs lead to the same repository.

Source: the NBD URI specification (doc/uri.md of the NBD project): default port, parameters.
"""

from urllib.parse import parse_qs, urlsplit

DEFAULT_PORT = 10809


def identity(uri: str) -> str:
    """Return the part of a repository's URI that says which repository it is.

    That is the transport and the address. User names, passwords and parameters for TLS are left
    out, and so is whether TLS is used: they say how to get there, not where.
    """
    parts = urlsplit(uri)
    transport = parts.scheme.removeprefix("nbds").removeprefix("nbd")
    if transport == "+unix":
        socket = parse_qs(parts.query).get("socket", [""])[0]
        return f"nbd+unix:///?socket={socket}"
    try:
        port = parts.port
    except ValueError:  # it is no number; connecting will say so
        port = None
    host = (parts.hostname or "").lower()
    return f"nbd{transport}://{f'[{host}]' if ':' in host else host}:{port or DEFAULT_PORT}"
