"""The file that the mount shows for an image: which of its bytes are made up, and which are the export's.

raw      the export as it is
qcow2    the finished qcow2: metadata computed from the size, then the export, then zeroes up to a whole cluster
"""

from dataclasses import dataclass
from typing import Protocol

from lazyfs.core import qcow2_layout
from lazyfs.core.byte_range import ByteRange
from lazyfs.units import MiB

RAW, QCOW2 = "raw", "qcow2"
FORMATS = (RAW, QCOW2)
SUFFIX = {RAW: "", QCOW2: ".qcow2"}
"""Of the file's name."""
MAX_BLOCK_SIZE = {RAW: 4 * MiB, QCOW2: qcow2_layout.MAX_CLUSTER_SIZE}
"""Of an image's blocks. For raw no more, as a reader waits for a whole block."""


class ShownFile(Protocol):
    """A file that never changes, whatever of it is present."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        ...

    @property
    def metadata_size(self) -> int:
        """Bytes that are made up and take room on the disk."""
        ...

    def split(self, wanted: ByteRange) -> list[bytes | ByteRange]:
        """Return the bytes of `wanted`, which lies in the file, in order: as they are, or as a range of the export."""
        ...


def of(image_format: str, export_size: int, cluster_size: int) -> ShownFile:
    """Return the file for an export of `export_size` bytes."""
    if image_format == RAW:
        return RawFile(export_size)
    return Qcow2File(export_size, qcow2_layout.layout(export_size, cluster_size))


@dataclass(frozen=True, slots=True)
class RawFile:
    """The export, byte for byte."""

    size: int
    metadata_size: int = 0

    def split(self, wanted: ByteRange) -> list[bytes | ByteRange]:
        """Return all as one range."""
        return [wanted] if wanted.length else []


@dataclass(frozen=True, slots=True)
class Qcow2File:
    """The finished qcow2."""

    export_size: int
    layout: qcow2_layout.Layout

    @property
    def size(self) -> int:
        """Whole clusters."""
        return self.layout.file_size

    @property
    def metadata_size(self) -> int:
        """All before the data."""
        return self.layout.data_offset

    def split(self, wanted: ByteRange) -> list[bytes | ByteRange]:
        """Return metadata, a range of the export, and zeroes: any of them."""
        data = self.layout.data_offset
        data_end = data + self.export_size
        parts: list[bytes | ByteRange] = []
        if wanted.start < data:
            parts.append(qcow2_layout.finished(self.layout, wanted.start, min(wanted.end, data)))
        inside = ByteRange(max(wanted.start, data) - data, min(wanted.end, data_end) - data)
        if inside.start < inside.end:
            parts.append(inside)
        if wanted.end > data_end:
            parts.append(bytes(wanted.end - max(wanted.start, data_end)))
        return parts
