"""Who wants to end, told from /proc."""

import os
import signal
import subprocess
import sys

import pytest

from lazyfs.host.leaving import is_gone, wants_to_end

STOPPED = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets its background jobs ignore SIGINT
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, [int(number) for number in sys.argv[1:]])
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize(
    ("sent", "blocked", "expected"),
    [
        (signal.SIGTERM, [], True),
        (signal.SIGINT, [], True),
        (signal.SIGALRM, [], False),
        (signal.SIGTERM, [signal.SIGTERM], False),
        (None, [], False),
    ],
)
def test_a_process_that_cannot_heed_its_signal(
    sent: int | None, blocked: list[int], expected: bool
) -> None:
    command = [sys.executable, "-c", STOPPED, *(str(int(number)) for number in blocked)]
    with subprocess.Popen(command) as process:
        try:
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            if sent is not None:
                process.send_signal(sent)
            assert wants_to_end(process.pid) is expected
            assert not is_gone(process.pid)
        finally:
            process.kill()
    assert is_gone(process.pid)
    assert not wants_to_end(process.pid)
