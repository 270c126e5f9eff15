"""Lets SQLite open a path as it is, without looking at each part of it first.

SQLite resolves symbolic links by itself, with lstat(2) of each part of a path. For the state folder
as /proc/self/fd/N that ends at the name of the cache directory, and over that lies the mount: a
daemon that goes on where another has ended would wait for its own answer.

So a VFS is registered that is SQLite's own, but for the one function that makes paths absolute.
SQLite is made for that. The structure is fixed, and later versions of it only add to its end.

Source: sqlite.org, "The OS Interface or VFS", and sqlite3.h, struct sqlite3_vfs.
"""

import _sqlite3
import ctypes
import functools

NAME = "lazyfs"
"""What to open a database with: file:PATH?vfs=lazyfs."""

_OK, _CANNOT_OPEN = 0, 14  # sqlite3.h: SQLITE_OK, SQLITE_CANTOPEN

_FULL_PATHNAME = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
)


class _Vfs(ctypes.Structure):
    """The part of struct sqlite3_vfs that every version has, and what versions 2 and 3 add."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("file_size", ctypes.c_int),
        ("longest_path", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("open", ctypes.c_void_p),
        ("delete", ctypes.c_void_p),
        ("access", ctypes.c_void_p),
        ("full_pathname", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 12),
    )


def _as_it_is(_vfs: int, path: int, room: int, result: int) -> int:
    text = ctypes.string_at(path)
    if len(text) >= room:
        return _CANNOT_OPEN
    ctypes.memmove(result, text + b"\0", len(text) + 1)
    return _OK


_FUNCTION = _FULL_PATHNAME(_as_it_is)
"""Stays alive as long as SQLite may call it."""


@functools.cache
def register() -> _Vfs:
    """Register the VFS, once in a process; return it, which must stay alive.

    Raises:
        OSError: there is no SQLite library that Python uses.
    """
    library = ctypes.CDLL(_sqlite3.__file__)  # which finds it in what that is linked with, too
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    library.sqlite3_vfs_find.argtypes = [ctypes.c_char_p]
    library.sqlite3_vfs_register.argtypes = [ctypes.POINTER(_Vfs), ctypes.c_int]
    vfs = _Vfs()
    default = library.sqlite3_vfs_find(None).contents
    # Functions of a version that this one does not know are left out by its number.
    ctypes.pointer(vfs)[0] = default
    vfs.version = min(default.version, 3)
    vfs.name = NAME.encode()
    vfs.next = None
    vfs.full_pathname = ctypes.cast(_FUNCTION, ctypes.c_void_p).value
    if library.sqlite3_vfs_register(ctypes.byref(vfs), 0) != _OK:
        raise OSError("SQLite does not take another VFS")
    return vfs
