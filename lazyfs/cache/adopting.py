"""Recognises plain files of whole images that a lost catalog does not know any more.

lazyfs leaves plain files without write bits, under names that lead back to those of the exports. A
name that is a hash does not, and the format of a file that is called .qcow2 is not certain, so such
files are left alone. Whether the bytes are right, only `verify` can tell.
"""

import stat
from collections.abc import Iterator, Sequence
from urllib.parse import unquote

from lazyfs.cache import cache_dir
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.store.cache_file import WRITE_BITS
from lazyfs.core import shown_file
from lazyfs.core.export_name import EXPORT, shown_path
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import State
from lazyfs.engine.filesystem import DEFAULT_BLOCK_SIZE
from lazyfs.engine.interfaces import UNKNOWN
from lazyfs.units import SECTOR


def lost_images(root: Beneath, records: Sequence[ImageRecord]) -> Iterator[ImageRecord]:
    """Yield a record for each plain file that seems to be a whole image without one.

    Args:
        root: the cache directory.
        records: the images that are known.
    """
    for path in list(cache_dir.foreign_files(root, records)):
        found = root.stat(path)
        export = unquote(path, errors="surrogateescape")
        plain = stat.S_ISREG(found.st_mode) and not found.st_mode & WRITE_BITS
        same_name = shown_path(export, EXPORT, lambda _path: True, "") == path
        if plain and same_name and not path.endswith(shown_file.SUFFIX[shown_file.QCOW2]):
            yield ImageRecord(
                inode=0,
                export=export,
                path=path,
                size=found.st_size,
                identity=UNKNOWN,
                format=shown_file.RAW,
                state=State.WHOLE,
                error="",
                block_size=DEFAULT_BLOCK_SIZE,
                created_ns=found.st_mtime_ns,
                present_bytes=found.st_blocks * SECTOR,
                last_used_ns=found.st_mtime_ns,
                meant=True,
            )
