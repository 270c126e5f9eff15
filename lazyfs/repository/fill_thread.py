"""Moves claims from the repository to the cache file in a thread. This is population's inner
loop.

It uses fixed buffers again and again, keeps a few requests in flight, and polls with libnbd. A new
buffer for each request would halve the speed, because of page faults. One event loop for everything
would cut it to a third.
"""

import math
import threading
import time
from collections.abc import Callable
from ctypes import c_int
from dataclasses import dataclass, field
from typing import Any

import nbd

from lazyfs import errors
from lazyfs.engine.interfaces import Claim, Export, FillWork
from lazyfs.repository import nbd_buffers, nbd_connect
from lazyfs.units import KiB

REQUEST = 512 * KiB
IN_FLIGHT = 2
"""Measured with two threads and `store/write_behind.py`, 2 GiB until whole: 256 KiB x 4 take 2.2
s, 512 KiB x 2 and 1 MiB x 2 take 1.6 s, 2 MiB x 2 take 1.7 s (nbdcopy 1.7 s). Of the two
best, this is the smaller one, because a reader's request comes behind it on the link."""

_POLL_MS = 100
"""How late a stop is noticed, at most."""


@dataclass(slots=True)
class _Slot:
    """Holds a buffer and the claim that is being fetched into it."""

    buffer: nbd_buffers.NbdBuffer | None
    claim: Claim | None = None
    cookies: list[int] = field(default_factory=list)
    waiting: int = 0
    code: int = 0


class FillConnection:
    """Holds one connection and its buffers. It belongs to one thread at a time."""

    def __init__(self, uri: str, export: Export, stall_s: float) -> None:
        self._uri = uri
        self.export = export
        self._stall_s = stall_s
        self._handle: nbd.NBD | Any = None  # Any for the None before `_connect`
        self._max_payload = 0
        self._unit = 1
        self._slots: list[_Slot] = []
        self._last_progress = 0.0
        self.on_progress: Callable[[], None] = lambda: None
        """Called in the thread when bytes have come."""
        self.waiting_since = math.inf
        """Since when the server owes an answer, by `time.monotonic`. It is infinite if it owes
        none."""

    def run(self, work: FillWork, duration_s: float, stop: threading.Event) -> None:
        """Do what `interfaces.Filler.run` promises, until `stop` is set. Needs a connection.

        After an error, or a stop with requests in flight, the connection is dropped. So no late
        reply can reach a buffer that serves another claim.
        """
        try:
            self._work(work, time.monotonic() + duration_s, stop)
        except nbd.Error as error:
            self._give_up(None)
            raise errors.ConnectionLost(self._uri, nbd_connect.reason(error)) from error
        except errors.ExportChanged as error:
            self._give_up(error)
            raise
        except BaseException:
            self._give_up(None)
            raise
        if any(slot.claim for slot in self._slots):
            self._give_up(None)

    def close(self) -> None:
        """Drop the connection and the buffers."""
        # The handle goes first. libnbd closes the socket with it, and nothing writes to the buffers
        # any more.
        self._handle = None
        slots, self._slots = self._slots, []
        for slot in slots:
            if slot.buffer is not None:
                nbd_buffers.give(slot.buffer)

    @property
    def connected(self) -> bool:
        """True if there is a connection to work on."""
        return self._handle is not None

    def adopt(self, handle: nbd.NBD) -> None:
        """Take over a handle that is ready to read the export."""
        self._max_payload = nbd_connect.max_payload(handle)
        self._unit = nbd_connect.alignment(handle)
        self._handle = handle

    def _give_up(self, error: errors.ExportChanged | None) -> None:
        """Drop the connection, and then the claims whose answers it would have brought."""
        slots = self._slots
        self.close()
        for slot in slots:
            if slot.claim:
                slot.claim.drop(error)

    def _work(self, work: FillWork, until: float, stop: threading.Event) -> None:
        self._last_progress = time.monotonic()
        try:
            self._serve(work, until, stop)
        finally:
            self.waiting_since = math.inf

    def _serve(self, work: FillWork, until: float, stop: threading.Event) -> None:
        busy = 0
        while not stop.is_set():
            self.waiting_since = self._last_progress if busy else math.inf
            wait_s, exhausted = 0.0, time.monotonic() > until
            while busy < IN_FLIGHT and not exhausted and not wait_s:
                claim = work.claim(REQUEST)
                if claim is None:
                    exhausted = True
                elif isinstance(claim, float):
                    wait_s = claim
                elif claim.parts:
                    self._start(claim)
                    busy += 1
                else:  # the blocks hold nothing but zeroes
                    self._finish_empty(claim)
            if busy == 0 and exhausted:
                return
            if busy == 0:
                stop.wait(wait_s)
                self._last_progress = time.monotonic()
                continue
            timeout_ms = _POLL_MS if not wait_s else max(1, min(_POLL_MS, int(wait_s * 1000)))
            if self._handle.poll(timeout_ms):  # a part of a long answer is progress as well
                self._last_progress = time.monotonic()
                self.on_progress()
            busy -= self._collect()
            if time.monotonic() - self._last_progress > self._stall_s:
                raise errors.ConnectionLost(self._uri, f"no reply in {self._stall_s:g} s")

    def _finish_empty(self, claim: Claim) -> None:
        try:
            claim.finish()
        except BaseException:
            claim.drop()
            raise

    def _start(self, claim: Claim) -> None:
        try:
            slot = next((slot for slot in self._slots if slot.claim is None), None)
            if slot is None:
                slot = _Slot(None)
                self._slots.append(slot)
        except BaseException:
            claim.drop()
            raise
        slot.claim, slot.waiting = claim, 1  # set first, so it is dropped even if memory runs out
        asked = [part.align_out(self._unit, self.export.size) for part in claim.parts]
        length = asked[-1].end - asked[0].start
        if slot.buffer is None or len(slot.buffer.memory) < length:
            # Blocks may be larger than REQUEST. A buffer grows to the largest claim once, and then
            # stays that large.
            if slot.buffer is not None:
                nbd_buffers.give(slot.buffer)
                slot.buffer = None
            slot.buffer = nbd_buffers.take(max(REQUEST, length))
        buffer = slot.buffer
        pieces = [piece for part in asked for piece in part.split(self._max_payload)]
        slot.claim, slot.waiting, slot.code, slot.cookies = claim, len(pieces), 0, []

        def completed(err: c_int) -> int:
            slot.waiting -= 1
            slot.code = slot.code or err.value
            return 0

        base = asked[0].start
        for piece in pieces:
            target = buffer.target(piece.start - base, piece.end - base)
            slot.cookies.append(self._handle.aio_pread(target, piece.start, completed))

    def _collect(self) -> int:
        """Store what has arrived. Return how many slots became free.

        Raises:
            ConnectionLost: the server has ended the connection, or is about to.
        """
        freed, lost = 0, False
        for slot in self._slots:
            if slot.claim is None or slot.waiting:
                continue
            for cookie in slot.cookies:
                slot.code = nbd_connect.retire(self._handle, cookie) or slot.code
            if slot.code in nbd_connect.LOST:
                lost = True
                continue
            self._last_progress = time.monotonic()
            self._store(slot, slot.claim)
            slot.claim = None  # last, so that it is dropped if a bug made `_store` fail
            freed += 1
        if lost:
            raise errors.ConnectionLost(self._uri, "the server hung up, or is about to")
        return freed

    def _store(self, slot: _Slot, claim: Claim) -> None:
        """Write what has arrived for a claim, and end the claim."""
        base = claim.parts[0].align_out(self._unit, self.export.size).start
        if slot.code:
            claim.drop(errors.RequestFailed(f"reading at {base}", slot.code))
            return
        assert slot.buffer is not None
        try:
            for part in claim.parts:
                claim.write(part.start, slot.buffer.memory[part.start - base : part.end - base])
        except (errors.LazyfsError, OSError) as error:
            claim.drop(error)
        else:
            claim.finish()
