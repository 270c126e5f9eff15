"""Makes libnbd authenticate the server with TLS, and says by name what is wrong when it cannot.

libnbd 1.14 goes on without looking at the server's certificate where it does not find those of the
user. So the files are looked at here before every connection, and libnbd is told each of them.
"""

import math
import os
import re
import socket
import ssl
import stat
import struct
import threading
import time

import nbd
from nbd import NBD

from lazyfs import errors
from lazyfs.core.repository_uri import RepositoryUri
from lazyfs.units import MiB

MAX_FILE = 4 * MiB
"""The longest file of certificates or keys. All authorities that Debian trusts take 220 KiB."""

_DIAGNOSE_S = 5.0
"""How long finding out the reason of a failure may take. It is unmeasured: a few round trips."""

# Source: the NBD protocol (doc/proto.md), "Fixed newstyle negotiation".
_MAGIC = b"NBDMAGICIHAVEOPT"
_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_LIST, _STARTTLS = 3, 5
_ACK = 1


def check_files(uri: RepositoryUri) -> None:
    """Check that the files which the URI names can be used. Blocks.

    Raises:
        LastingError: one is missing, or says nothing that could be used.
    """
    if uri.certificates:
        authorities = os.path.join(uri.certificates, "ca-cert.pem")
        _read(authorities)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(authorities)
        except ssl.SSLError:
            raise errors.LastingError(
                f"{authorities} has no certificate, or a damaged one"
            ) from None
        mine = [os.path.join(uri.certificates, f"client-{what}.pem") for what in ("cert", "key")]
        if any(os.path.lexists(path) for path in mine):
            for path in mine:
                _read(path)
    if uri.psk_file:
        keys = dict(line.partition(b":")[::2] for line in _read(uri.psk_file).splitlines())
        key = keys.get(os.fsencode(uri.user))
        if key is None:
            raise errors.LastingError(
                f"{uri.psk_file} has no key of {uri.user!r}; each line of it is USER:KEY"
            )
        if not re.fullmatch(rb"([0-9A-Fa-f]{2})+", key):
            raise errors.LastingError(
                f"the key of {uri.user!r} in {uri.psk_file} is no hexadecimal number of whole bytes"
            )


def _read(path: str) -> bytes:
    try:
        # O_NONBLOCK is for the case that it is a FIFO, which would wait for somebody who writes.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise errors.LastingError(f"{path}, which TLS needs, is no plain file")
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise errors.LastingError(
            f"cannot read {path}, which TLS needs: {error.strerror}"
        ) from error
    if len(data) > MAX_FILE:
        raise errors.LastingError(f"{path}, which TLS needs, is longer than {MAX_FILE} bytes")
    return data


def require(handle: NBD, uri: RepositoryUri) -> None:
    """Let an unconnected handle take only an encrypted connection to a server that proves itself.

    Raises:
        LastingError: as for `check_files`.
    """
    check_files(uri)
    handle.set_tls(nbd.TLS_REQUIRE)
    handle.set_tls_verify_peer(True)
    if uri.certificates:
        handle.set_tls_certificates(uri.certificates)
    else:
        handle.set_tls_username(uri.user)
        handle.set_tls_psk_file(uri.psk_file)


def why_not(uri: RepositoryUri, said: str) -> str:
    """Return why a connection with TLS could not be made. Blocks for _DIAGNOSE_S at most.

    libnbd says little. With certificates, the server is asked again in Python, which says more. For
    the same failure that is done once in ASK_AGAIN_S. Thread-safe.

    Args:
        uri: the server.
        said: what libnbd says, or "" if the server hung up without a word.
    """
    if uri.psk_file:
        return _about_key(uri, said)
    at, found = _answers.get((uri.text, said), (-math.inf, ""))
    if time.monotonic() > at + ASK_AGAIN_S:
        # In a thread, because looking up a name cannot be interrupted.
        answer: list[str] = []
        thread = threading.Thread(
            target=lambda: answer.append(_diagnosed(uri, said)), name="tls", daemon=True
        )
        thread.start()
        thread.join(_DIAGNOSE_S)
        found = answer[0] if answer else ""
        _answers.clear()  # there is one server, and its trouble changes
        _answers[uri.text, said] = time.monotonic(), found
    return found or said or "the server hung up"


ASK_AGAIN_S = 60.0
"""How long what was found out about a failure is believed. It is unmeasured."""

_answers: dict[tuple[str, str], tuple[float, str]] = {}
"""When what was found out, by the server and what libnbd says."""


def _diagnosed(uri: RepositoryUri, said: str) -> str:
    try:
        return _ask_again(uri)
    except (OSError, ValueError) as error:
        return "" if said else f"the server hung up: {error}"


def _about_key(uri: RepositoryUri, said: str) -> str:
    if "Insufficient credentials" in said:
        return "the server does TLS with certificates, not with keys (tls-certificates)"
    if not said:
        return "the server hung up, or does not do TLS"
    if "gnutls" in said:
        return (
            f"the server refuses the key of {uri.user!r} in {uri.psk_file}, or it does TLS with "
            f"certificates ({said})"
        )
    return said


def _ask_again(uri: RepositoryUri) -> str:
    """Return what is wrong with the server's certificate, or with ours, or "".

    Raises:
        OSError, ValueError: the server cannot be reached, or does not speak NBD.
    """
    context = ssl.create_default_context(cafile=os.path.join(uri.certificates, "ca-cert.pem"))
    mine = [os.path.join(uri.certificates, f"client-{what}.pem") for what in ("cert", "key")]
    if all(os.path.exists(path) for path in mine):
        context.load_cert_chain(mine[0], mine[1], _no_password)
    with socket.create_connection((uri.host, uri.port), _DIAGNOSE_S) as connection:
        if not _starts_tls(connection):
            return "the server does not do TLS"
        try:
            with context.wrap_socket(connection, server_hostname=uri.host) as secured:
                return _about_us(secured, uri)
        except ssl.SSLCertVerificationError as error:
            return (
                f"the server's certificate is refused: {error.verify_message.rstrip('.')} "
                f"(checked for {uri.host!r} with {uri.certificates}/ca-cert.pem)"
            )
        except TimeoutError:
            raise
        except OSError:
            return "the server breaks off TLS; it may want a key, not certificates (tls-psk-file)"


def _no_password() -> str:
    """Refuse to ask for one on the terminal, as OpenSSL would."""
    raise ValueError("the client's key is encrypted")


def _about_us(secured: ssl.SSLSocket, uri: RepositoryUri) -> str:
    """Return what the server says about our certificate, or "".

    With TLS 1.3 it says so only after the handshake, instead of an answer.
    """
    try:
        secured.sendall(_OPTION.pack(b"IHAVEOPT", _LIST, 0))
        if secured.recv(1):
            return ""
    except TimeoutError:
        return ""
    except OSError:
        pass
    return (
        "the server refuses this host's certificate, or wants one "
        f"(client-cert.pem and client-key.pem in {uri.certificates})"
    )


def _starts_tls(connection: socket.socket) -> bool:
    """Return whether the server is ready for TLS on this new connection."""
    with connection.makefile("rb") as answers:
        if answers.read(16) != _MAGIC:
            raise ValueError("it does not speak the NBD protocol")
        answers.read(2)
        connection.sendall(struct.pack(">I", 1))
        connection.sendall(_OPTION.pack(b"IHAVEOPT", _STARTTLS, 0))
        reply = answers.read(_REPLY.size)
    return len(reply) == _REPLY.size and _REPLY.unpack(reply)[2] == _ACK
