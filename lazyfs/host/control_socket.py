"""Makes and removes the socket on which a mount takes commands."""

import os
import socket
from contextlib import suppress

from lazyfs import errors

MAX_WAITING = 64
"""How many clients may wait to be accepted, for instance while a daemon is replaced. A host has a
handful of people and scripts that ask."""


class ControlSocket:
    """Holds the socket, which listens, and knows whether it is still where it was made."""

    def __init__(self, path: str, made: int | None = None) -> None:
        """Make it, with mode 0600, or take over one that another process has `made`.

        A socket that is there already is replaced: the caller knows that its process is dead.

        Raises:
            UserError: it cannot be made.
        """
        self._bound: os.stat_result | None = None
        if made is not None:
            self.socket = socket.socket(fileno=made)
            self.socket.listen(MAX_WAITING)  # clients take whoever has done this for its owner
            with suppress(OSError):
                self._bound = os.stat(path)
            return
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            with suppress(FileNotFoundError):
                os.unlink(path)
            old = os.umask(0o177)
            try:
                self.socket.bind(path)
            finally:
                os.umask(old)
            self._bound = os.stat(path)
            self.socket.listen(MAX_WAITING)
        except OSError as error:
            self.socket.close()
            raise errors.UserError(
                f"cannot make the control socket {path}: {error.strerror or error}"
            ) from error

    def remove(self, *paths: str) -> None:
        """Close it, and remove it from where it lies: one of `paths`."""
        self.socket.close()
        for path in paths:
            with suppress(OSError):
                if self._bound and os.path.samestat(os.stat(path), self._bound):
                    os.unlink(path)
