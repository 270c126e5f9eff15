"""Tells whether a read means that somebody uses an image, or only looks at it.

`file *`, a virus scanner and `virsh pool-refresh` open every image and read a little at its edges.
If that began the population of each of them, the whole repository would be fetched, and images that
are in use would be evicted for it.
"""

from lazyfs.core.shown_file import ShownFile
from lazyfs.units import MiB

EDGE = 8 * MiB
"""Debian 12's `file` reads the first and the last 7 MiB of a file whose kind it does not know
(file-5.44, seen with strace), and the kernel up to a MiB ahead of that, which nobody can tell from
a read. Partition tables and the headers and footers of image formats take much less."""

LOOK_S = 10.0
"""A program that looks at a file has closed it after this time."""


def is_at_an_edge(shown: ShownFile, offset: int) -> bool:
    """Return whether a read that begins at `offset` of the file shown is at one of its edges.

    Those of a small image are a quarter of it, so that each image has something between them.
    """
    edge = min(EDGE, (shown.size - shown.metadata_size) // 4)
    return offset < shown.metadata_size + edge or offset >= shown.size - edge
