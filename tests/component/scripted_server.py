"""An NBD server in Python that does what a script says, for what no real server can be made to do.

Source: the NBD protocol, "Newstyle negotiation".
"""

import errno
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from servers import DEADLINE_S

OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META = 2, 3, 6, 7, 8, 10
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_UNKNOWN = 2**31 + 1, 2**31 + 2, 2**31 + 6
INFO_EXPORT, INFO_DESCRIPTION = 0, 2

OPTION = struct.Struct(">8sII")
REPLY = struct.Struct(">QIII")


class Conversation:
    """The server's side of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def greet(self) -> None:
        """Greet: fixed newstyle, no zeroes."""
        self.send(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        self.receive(4)

    def option(self) -> tuple[int, bytes]:
        """Wait for the client's next option."""
        magic, option, length = OPTION.unpack(self.receive(OPTION.size))
        assert magic == b"IHAVEOPT"
        return option, self.receive(length)

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(REPLY.pack(0x3E889045565A9, option, kind, len(data)) + data)

    def list(self, *names: bytes) -> None:
        """Answer NBD_OPT_LIST."""
        for name in names:
            self.reply(OPT_LIST, REP_SERVER, struct.pack(">I", len(name)) + name)
        self.reply(OPT_LIST, REP_ACK)

    def info(self, option: int, size: int, description: bytes = b"") -> None:
        """Answer NBD_OPT_INFO or NBD_OPT_GO."""
        self.reply(option, REP_INFO, struct.pack(">HQH", INFO_EXPORT, size, 3))
        if description:
            self.reply(option, REP_INFO, struct.pack(">H", INFO_DESCRIPTION) + description)
        self.reply(option, REP_ACK)

    def refuse(self, option: int, kind: int = REP_ERR_UNSUP) -> None:
        self.reply(option, kind)

    def until_gone(self) -> None:
        """Send nothing more until the client hangs up."""
        while self.connection.recv(4096):
            pass

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.connection.recv(length - len(data))
            if not more:
                raise ConnectionResetError(errno.ECONNRESET, "the client is gone")
            data += more
        return data


Request = Callable[["Conversation", bytes, int, int], None]


def transmission(
    size: int, answer: Request, structured: bool = False
) -> Callable[["Conversation"], None]:
    """Return a script that serves one export.

    `answer` gets the handle, offset and length of each read request.
    """

    def script(conversation: Conversation) -> None:
        conversation.greet()
        while True:
            option, _ = conversation.option()
            if option == OPT_GO:
                conversation.info(option, size)
                break
            if option == OPT_STRUCTURED_REPLY and structured:
                conversation.reply(option, REP_ACK)
            else:
                conversation.refuse(option)
        while True:
            header = conversation.receive(28)
            if header[6:8] != b"\0\0":  # NBD_CMD_DISC
                return
            answer(
                conversation,
                header[8:16],
                int.from_bytes(header[16:24], "big"),
                int.from_bytes(header[24:], "big"),
            )

    return script


def simple_reply(handle: bytes, error: int = 0) -> bytes:
    """Return the header of a simple reply."""
    return b"\x67\x44\x66\x98" + error.to_bytes(4, "big") + handle


def no_data(handle: bytes) -> bytes:
    """Return a structured reply that ends without any data: one chunk NBD_REPLY_TYPE_NONE, done."""
    return struct.pack(">IHH8sI", 0x668E33EF, 1, 0, handle, 0)


class ScriptedServer:
    """Runs a script with each client, in a thread for each, and hangs up when the script ends."""

    def __init__(self, path: Path, script: Callable[[Conversation], None]) -> None:
        self.path = path
        self.clients = 0
        self.failures: list[BaseException] = []
        self._script = script
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(64)
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.clients += 1
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._script(Conversation(connection))
        except OSError:
            pass  # clients come and go
        except BaseException as error:
            self.failures.append(error)
        finally:
            connection.close()

    def kill(self) -> None:
        for one in [self._listening, *self._connections]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "a script does not end"
        self._listening.close()
        assert not self.failures, self.failures
