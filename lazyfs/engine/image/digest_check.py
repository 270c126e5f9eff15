"""Compares a complete image with the digest of its export, before it becomes a plain file.

An image whose digest is not known is not compared.
"""

import hashlib
import logging
from collections.abc import Awaitable, Callable

import trio

from lazyfs import errors
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import Cause, State
from lazyfs.engine.interfaces import Store
from lazyfs.units import MiB

logger = logging.getLogger(__name__)

CHUNK = 1 * MiB
"""How much is read and hashed at once, as in verifying.py."""

PIECE = 16 * MiB
"""How much is hashed in one call of a thread. The end of the daemon waits for one such piece: 0.05
s at the 300 MB/s that sha256 reaches without hardware support."""


class WrongDigest(errors.LazyfsError):
    """The bytes of a complete image do not have the digest of its export."""

    def __init__(self, digest: str) -> None:
        super().__init__(digest)
        self.digest = digest

    def __str__(self) -> str:
        return (
            f"its bytes do not have the digest {self.digest}: "
            "evict it to fetch it again without one, or verify --digest the right one"
        )


class DigestCheck:
    """Compares one image with its digest. Trio thread only.

    It remembers the outcome, so each digest is compared once.
    """

    def __init__(
        self,
        record: Callable[[], ImageRecord],
        fail: Callable[[Cause, errors.LazyfsError], Awaitable[None]],
        recover: Callable[[], Awaitable[None]],
        limiter: trio.CapacityLimiter,
    ) -> None:
        """Begin with no outcome.

        Args:
            record: returns the record of the image as it is now.
            fail: fails the image.
            recover: undoes `fail`.
            limiter: limits threads that may be slow.
        """
        self._record = record
        self._fail = fail
        self._recover = recover
        self._limiter = limiter
        self._wanted = self._found = ""

    def is_current(self, record: ImageRecord) -> bool:
        """Return whether the latest outcome was good and concerns the digest that is known now."""
        return record.digest == self._wanted == self._found

    async def passes(self, store: Store) -> bool:
        """Compare the complete image with its digest, if that is known.

        If they differ, the image fails. If it has failed for that reason, and another digest is
        known now and matches, it recovers. No lock is needed, because the bytes of a complete image
        do not change.

        Returns:
            Whether the image may become whole.

        Cancellation: takes effect between two pieces.
        """
        record = self._record()
        if record.state is State.FAILED and record.cause is not Cause.WRONG_DIGEST:
            return False
        if record.digest != self._wanted:
            try:
                self._found = await self._hash(store, record)
            except (errors.CacheCorrupt, OSError) as error:
                logger.warning("cannot hand off: image=%s reason=%s", record.export, error)
                return False
            self._wanted = record.digest
        if self._found != self._wanted:
            await self._fail(Cause.WRONG_DIGEST, WrongDigest(self._wanted))
            return False
        if record.state is State.FAILED:
            await self._recover()
        return True

    async def _hash(self, store: Store, record: ImageRecord) -> str:
        if not record.digest:
            return ""
        assert record.size is not None
        size, name = record.size, record.digest.partition(":")[0]
        hasher = hashlib.new(name)

        def piece(start: int) -> None:
            end = min(start + PIECE, size)
            for offset in range(start, end, CHUNK):
                hasher.update(store.read(offset, min(CHUNK, end - offset)))

        for start in range(0, size, PIECE):
            await trio.to_thread.run_sync(piece, start, limiter=self._limiter)
        return f"{name}:{hasher.hexdigest()}"
