"""The file that the mount shows for an image.

Some of its bytes are computed, and the rest are the export's:

    raw      the export as it is
    qcow2    the finished qcow2: metadata that is computed from the size, then the export, then
             zeroes up to a whole cluster
"""

from dataclasses import dataclass
from typing import Protocol

from lazyfs.core import qcow2_layout
from lazyfs.core.byte_range import ByteRange
from lazyfs.units import MiB

RAW, QCOW2 = "raw", "qcow2"
FORMATS = (RAW, QCOW2)
SUFFIX = {RAW: "", QCOW2: ".qcow2"}
"""The suffix of the shown file's name, by format."""
MAX_BLOCK_SIZE = {RAW: 4 * MiB, QCOW2: qcow2_layout.MAX_CLUSTER_SIZE}
"""The largest size of an image's blocks in bytes, by format. Blocks of raw images are not larger,
because a reader waits for a whole block."""


class ShownFile(Protocol):
    """Describes the file that is shown for an image.

    The file is the same whether its data is present or missing.
    """

    @property
    def size(self) -> int:
        """Return the size of the whole file in bytes."""
        ...

    @property
    def metadata_size(self) -> int:
        """Return how many bytes are computed and also need space on the disk."""
        ...

    @property
    def export_part(self) -> ByteRange:
        """Return the part that is the export's, byte for byte. In the cache file it is at the same
        place."""
        ...

    def split(self, wanted: ByteRange) -> list[bytes | ByteRange]:
        """Return the parts of `wanted` in order.

        A part is either the bytes themselves or a range of the export. `wanted` must lie inside
        the file.
        """
        ...


def of(image_format: str, export_size: int, cluster_size: int) -> ShownFile:
    """Return the file that is shown for an export of `export_size` bytes."""
    if image_format == RAW:
        return RawFile(export_size)
    return Qcow2File(export_size, qcow2_layout.layout(export_size, cluster_size))


@dataclass(frozen=True, slots=True)
class RawFile:
    """Shows the export byte for byte."""

    size: int
    metadata_size: int = 0

    @property
    def export_part(self) -> ByteRange:
        """Return all of it."""
        return ByteRange(0, self.size)

    def split(self, wanted: ByteRange) -> list[bytes | ByteRange]:
        """Return all of `wanted` as one range of the export."""
        return [wanted] if wanted.length else []


@dataclass(frozen=True, slots=True)
class Qcow2File:
    """Shows the finished qcow2."""

    export_size: int
    layout: qcow2_layout.Layout

    @property
    def size(self) -> int:
        """Return the size of the whole file in bytes, which is a number of whole clusters."""
        return self.layout.file_size

    @property
    def metadata_size(self) -> int:
        """Return the size of everything before the data, in bytes."""
        return self.layout.data_offset

    @property
    def export_part(self) -> ByteRange:
        """Return the part behind the metadata."""
        return ByteRange(self.layout.data_offset, self.layout.data_offset + self.export_size)

    def split(self, wanted: ByteRange) -> list[bytes | ByteRange]:
        """Return up to three parts: metadata, a range of the export, and zeroes."""
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
