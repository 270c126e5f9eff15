"""Handles pyfuse3's requests: each handler checks, calls the engine, and translates the result.

This is the only place where errors become errnos.

The kernel must take the file system for a writable one, because otherwise it would refuse utime(2).
Users of a cache directory call that to say that a file is in use. It is allowed, and so is
unlink(2) with `--allow-evict`. All other changes are refused here with EROFS.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lazyfs.kernel import passthrough  # isort: skip  # before pyfuse3
import pyfuse3

from lazyfs import errors
from lazyfs.core import inode_number, shown_file
from lazyfs.core.eviction import Obstacle
from lazyfs.core.lifecycle import State
from lazyfs.engine.filesystem import Filesystem
from lazyfs.engine.image.handles import Handle, LostHandle
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Export, FileAttributes
from lazyfs.engine.name_tree import Folder, Node
from lazyfs.engine.operations import Operations, Refused
from lazyfs.engine.totals import PRESENT, Read
from lazyfs.kernel.channel import Orphan
from lazyfs.kernel.complaints import Complaints
from lazyfs.kernel.present_files import PresentFiles
from lazyfs.units import SECTOR

logger = logging.getLogger(__name__)

SETTLED_TIMEOUT_S = 3600.0
"""How long the kernel may cache what does not change unless we tell it."""
FILLING_TIMEOUT_S = 1.0
"""How old the result of `du` may be for an image that is being filled."""
LARGEST_FILE = 2**63 - 1
"""The largest size in bytes that can be shown. With a qcow2's metadata, the size that an
untrusted repository states may be larger. Such an image cannot be opened."""

XATTR_PREFIX = "user.lazyfs."
_XATTR_PREFIX_BYTES = XATTR_PREFIX.encode()


class FuseAdapter(pyfuse3.Operations):
    """Answers the requests for one mount.

    The handle of an open file is its inode number, so another process could go on with it. A file
    that is opened by its second inode number is the plain file. The kernel reads it by itself if it
    can.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        filesystem: Filesystem,
        attributes: FileAttributes,
        root_fd: int,
        operations: Operations,
        backings: passthrough.Backings,
        forget_names: Callable[[], bool],
        allow_evict: bool,
    ) -> None:
        """Answer requests for the images of `filesystem`.

        Args:
            filesystem: the images.
            attributes: how files appear.
            root_fd: the cache directory, for statfs.
            operations: called for utime(2) and unlink(2).
            backings: lets the kernel read plain files.
            forget_names: does what `KernelSession.forget_names` does.
            allow_evict: whether unlink(2) evicts.
        """
        super().__init__()
        self._filesystem = filesystem
        self._totals = filesystem.totals
        self._file_attributes = attributes
        self._root_fd = root_fd
        self._backings = backings
        self._forget_names = forget_names
        self._allow_evict = allow_evict
        self._operations = operations
        self._open: dict[int, list[Handle]] = {}
        """The open handles, by the inode number by which they were opened. The handles of one
        number are interchangeable."""
        self._mounted_ns = time.time_ns()
        self._complaints = Complaints(filesystem.totals.clock)

    def init(self) -> None:
        """Start to notify the kernel, which listens from now on because libfuse is ready."""
        self._filesystem.names.on_invalid_entry = self._invalidate_entry
        self._filesystem.on_invalid_attributes = _invalidate_attributes

    async def restore(
        self,
        opened: Iterable[tuple[int, int, int]],
        orphans: Iterable[Orphan],
        present: PresentFiles,
    ) -> None:
        """Open what the kernel has open, because an earlier daemon has opened it.

        What cannot be opened again is closed as usual, and its reads fail.

        Args:
            opened: each inode, how many times it is open, and its backing id, or 0.
            orphans: those of them, or of earlier ones, that no catalog knows.
            present: has what is present of orphans, and withdraws what nobody has open any more.
        """
        known = {one.inode: one for one in orphans}
        for inode in known.keys() - {inode for inode, _, _ in opened}:
            present.withdraw(inode)
        for inode, count, backing_id in opened:
            handles = self._open.setdefault(inode, [])
            for _ in range(count):
                handles.append(await self._restored(inode, known.get(inode), present))
            if inode_number.is_whole(inode):
                self._backings.restored(inode, backing_id, count)

    async def _restored(self, inode: int, orphan: Orphan | None, present: PresentFiles) -> Handle:
        try:
            node = self._filesystem.names.node(inode)
            if isinstance(node, Image):
                return await self._filesystem.reopen(node, inode_number.is_whole(inode))
            if orphan is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        except (errors.LazyfsError, OSError) as error:
            logger.warning("an open file is lost: inode=%d reason=%s", inode, error)
            return LostHandle(error)

        def closed() -> None:
            if inode not in self._open:
                present.withdraw(inode)

        export = Export(orphan.export, orphan.size, orphan.identity)
        shown = shown_file.of(orphan.format, orphan.size, orphan.block_size)
        samples = present.samples_of(orphan, shown) if orphan.may_fetch else None
        return self._filesystem.orphan(export, shown, samples, closed)

    # -- names and attributes

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name, and ask for its size if that is not known."""
        with self._translated("lookup", parent_inode):
            child = self._folder(parent_inode).entries.get(os.fsdecode(name))
            if child is None:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self._described(child, child.shown_inode)

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode."""
        with self._translated("getattr", inode):
            return await self._described(self._node(inode), inode)

    async def _described(self, node: Node, inode: int) -> pyfuse3.EntryAttributes:
        if isinstance(node, Image):
            await self._filesystem.sizes.learn([node])
            if node.record.size is None:
                raise pyfuse3.FUSEError(errno.EIO)
        return self._attributes(node, inode)

    def _attributes(self, node: Node, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.generation = 0
        entry.st_uid = self._file_attributes.uid
        entry.st_gid = self._file_attributes.gid
        if isinstance(node, Folder):
            changed_ns = max(self._mounted_ns, node.changed_ns)
            entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = changed_ns
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755)
            entry.st_nlink = 1  # as btrfs has it: nobody counts the folders in it
            entry.entry_timeout = entry.attr_timeout = SETTLED_TIMEOUT_S
            return entry
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | self._file_attributes.mode)
        entry.st_nlink = 0 if node.retired else 1
        entry.st_size = min(node.record.file_size or 0, LARGEST_FILE)
        entry.st_blksize = node.record.block_size
        entry.st_blocks = max(-(-node.allocated_bytes() // SECTOR), int(node.may_have_data))
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = node.record.created_ns
        if self._allow_evict:
            # Whoever cleans up a cache directory takes the mtime for the last use.
            entry.st_mtime_ns = max(node.record.created_ns, node.record.last_used_ns)
        # The kernel does not cache a name without a size, so it is looked up again when more than
        # the name is wanted.
        entry.entry_timeout = SETTLED_TIMEOUT_S if node.record.size is not None else 0
        filling = node.record.state in (State.PARTIAL, State.FAILED)
        changing = filling or self._allow_evict
        entry.attr_timeout = FILLING_TIMEOUT_S if changing else entry.entry_timeout
        return entry

    # -- folders

    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        """Open a folder."""
        with self._translated("opendir", inode):
            return pyfuse3.FileHandleT(self._folder(inode).inode)

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        """List a folder from a position on.

        This never waits for sizes, because `ls` needs none.
        """
        with self._translated("readdir", fh):
            folder = self._folder(fh)
            if start_id == 0:
                images = [node for node in folder.entries.values() if isinstance(node, Image)]
                unknown = [image for image in images if image.record.size is None]
                if unknown:
                    self._filesystem.sizes.learn_soon(unknown)
            for position, name, node in self._filesystem.names.entries_after(folder, start_id):
                attributes = self._attributes(node, node.shown_inode)
                if not pyfuse3.readdir_reply(
                    token, pyfuse3.FileNameT(os.fsencode(name)), attributes, position
                ):
                    break

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Close a folder. There is nothing to do."""

    # -- files

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """Open an image.

        The page cache keeps what it has, because the bytes of an inode never change.
        """
        with self._translated("open", inode):
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise pyfuse3.FUSEError(errno.EROFS)
            image = self._image(inode)
            with self._totals.opening():
                if inode_number.is_whole(inode):
                    handle: Handle = await self._open_whole(image, inode)
                else:
                    handle = await self._filesystem.open(image)
            self._open.setdefault(inode, []).append(handle)
            return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def _open_whole(self, image: Image, inode: int) -> Handle:
        whole = await self._filesystem.open_whole(image)
        try:
            self._backings.opened(inode, whole.file.fileno())
        except BaseException:
            await whole.aclose()
            raise
        return whole

    async def read(self, fh: pyfuse3.FileHandleT, offset: int, size: int) -> bytes:
        """Read from an image."""
        began = self._totals.clock()
        with self._translated("read", fh, offset):
            handle = self._open[fh][-1]
            data = handle.read_now(offset, size)
            if data is not None:
                self._totals.reads[PRESENT].observe(self._totals.clock() - began)
                return data
            with Read(self._totals) as read:
                return await handle.read(offset, size, read)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Close an image."""
        with self._translated("release", fh):
            handles = self._open[fh]
            handle = handles.pop()
            if not handles:
                del self._open[fh]
            try:
                if inode_number.is_whole(fh):
                    self._backings.released(fh)
            finally:
                await handle.aclose()

    async def forget(self, inode_list: object) -> None:
        """Do nothing when the kernel drops inodes.

        Our inodes exist as long as they have a name or are open.
        """

    # -- what changes something: a use, an eviction, or nothing

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Take the times that are set for an image as its last use.

        Without --allow-evict the times that are shown do not change. They belong to the bytes,
        which do not change either.
        """
        with self._translated("setattr", inode):
            node = self._node(inode)
            others = (
                fields.update_size or fields.update_mode or fields.update_uid or fields.update_gid
            )
            if others or not isinstance(node, Image):
                raise pyfuse3.FUSEError(errno.EROFS)
            await self._operations.touch(
                node, attr.st_mtime_ns if fields.update_mtime else attr.st_atime_ns
            )
            return await self._described(node, inode)

    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        """Evict an image.

        Its name stays, because its export stays. The next lookup finds it with nothing cached.
        """
        if not self._allow_evict:
            raise pyfuse3.FUSEError(errno.EROFS)
        with self._translated("unlink", parent_inode):
            image = self._folder(parent_inode).entries.get(os.fsdecode(name))
            if image is None:
                raise pyfuse3.FUSEError(errno.ENOENT)
            if isinstance(image, Folder):
                raise pyfuse3.FUSEError(errno.EISDIR)
            try:
                await self._operations.unlink(image)
            except errors.UserError as refusal:
                logger.info("not evicted: image=%s reason=%s", image.record.export, refusal)
                pinned = isinstance(refusal, Refused) and refusal.obstacle is Obstacle.PINNED
                raise pyfuse3.FUSEError(errno.EPERM if pinned else errno.EBUSY) from refusal

    async def _refuse(self, *_positional: Any, **_named: Any) -> Any:
        """Refuse a change with EROFS."""
        raise pyfuse3.FUSEError(errno.EROFS)

    create = mknod = mkdir = rmdir = symlink = link = rename = write = setxattr = removexattr = (
        _refuse
    )

    # -- extended attributes

    async def getxattr(
        self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """Return one of the attributes of lazyfs.

        There are no other namespaces here, such as security or system. ENOTSUP tells that to `ls
        -l`, which then asks once per file system and not for two attributes of each file.
        """
        if not name.startswith(_XATTR_PREFIX_BYTES):
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR if name.startswith(b"user.") else errno.ENOTSUP)
        with self._translated("getxattr", inode):
            value = _xattrs(self._node(inode)).get(os.fsdecode(name))
            if value is None:
                raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
            return value.encode("utf-8", "surrogatepass")

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """Return no names.

        What is listed here would be copied by `cp -a`, `rsync -X` and `tar --xattrs`, and say wrong
        things about the copy. Whoever asks for an attribute of lazyfs by its name gets it.
        """
        with self._translated("listxattr", inode):
            self._node(inode)
            return []

    # -- the file system

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Report the file system that holds the cache."""
        with self._translated("statfs", 0):
            room = os.fstatvfs(self._root_fd)
            reply = pyfuse3.StatvfsData()
            for name in (
                "f_bsize",
                "f_frsize",
                "f_blocks",
                "f_bfree",
                "f_bavail",
                "f_files",
                "f_ffree",
                "f_favail",
            ):
                setattr(reply, name, getattr(room, name))
            reply.f_namemax = 255
            return reply

    # -- inside

    @contextmanager
    def _translated(self, what: str, inode: int, offset: int = 0) -> Iterator[None]:
        """Turn errors into errnos.

        A bug becomes EIO, and a traceback in the log, because it must not end the mount.
        """
        try:
            yield
        except pyfuse3.FUSEError:
            raise
        except errors.NoSpace as error:
            self._complaints.warn(what, inode, offset, error)
            raise pyfuse3.FUSEError(errno.ENOSPC) from error
        except errors.LazyfsError as error:
            self._complaints.warn(what, inode, offset, error)
            raise pyfuse3.FUSEError(errno.EIO) from error
        except OSError as error:
            self._complaints.warn(what, inode, offset, error)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except MemoryError as error:
            self._complaints.warn(what, inode, offset, error)
            raise pyfuse3.FUSEError(errno.ENOMEM) from error
        except Exception as error:
            logger.exception("%s failed, a bug in lazyfs: inode=%d offset=%d", what, inode, offset)
            raise pyfuse3.FUSEError(errno.EIO) from error

    def _invalidate_entry(self, folder: Folder, name: str) -> None:
        _invalidate_attributes(folder.inode)  # its time has changed
        if not self._forget_names():
            # pyfuse3 does this in a thread of its own, because the kernel takes the folder's lock,
            # and a lookup that we serve may hold that.
            pyfuse3.invalidate_entry_async(
                pyfuse3.InodeT(folder.inode),
                pyfuse3.FileNameT(os.fsencode(name)),
                ignore_enoent=True,
            )

    def _node(self, inode: int) -> Node:
        node = self._filesystem.names.node(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return node

    def _folder(self, inode: int) -> Folder:
        node = self._node(inode)
        if not isinstance(node, Folder):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return node

    def _image(self, inode: int) -> Image:
        node = self._node(inode)
        if not isinstance(node, Image):
            raise pyfuse3.FUSEError(errno.EISDIR)
        return node


def _xattrs(node: Node) -> dict[str, str]:
    """Return the extended attributes of a file. Folders have none."""
    if isinstance(node, Folder):
        return {}
    record = node.record
    values = {
        "state": record.state.value,
        "present": str(node.present_bytes),
        "export": record.export,
        "digest": record.digest,
    }
    return {
        XATTR_PREFIX + name: value for name, value in values.items() if value or name != "digest"
    }


def _invalidate_attributes(inode: int) -> None:
    # Only attributes are made invalid, because that takes no lock. ENOENT means that the kernel
    # does not know the inode, and EINVAL that it is unmounted.
    with suppress(OSError):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=True)
