"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping

from .interrupts import undone_by, uninterrupted

try:
    import fcntl
except ImportError:  # not Unix: what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

_PREFIX, _SUFFIX = ".mapsurgery-", ".tmp"

Content = Iterable[bytes | bytearray | memoryview]
"""Of a file, in pieces."""


def write_whole(contents: Mapping[str, Content]) -> None:
    """Write every file under a temporary name beside its destination, then rename them all.

    A crash while they are written leaves the old files, and the next call removes what a killed one left; an existing
    file keeps its mode, a link stays one.

    Args: contents: by destination.

    Raises:
        FileNotFoundError: the folder of a destination does not exist.
        OSError: a destination is no file (a folder, a device, a pipe), or cannot be written.
    """
    targets = {os.path.realpath(os.fsdecode(path)): content for path, content in contents.items()}
    for path in targets:
        _refuse_strange(path)
    folders = dict.fromkeys(os.path.dirname(path) for path in targets)
    for folder in folders:
        _remove_abandoned(folder)
    written: dict[str, tuple[int, str]] = {}

    def remove() -> None:
        while written:
            path, (handle, temporary) = next(iter(written.items()))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            del written[path]
            os.close(handle)

    with undone_by(remove):
        for path, content in targets.items():
            with uninterrupted():
                written[path] = _temporary(os.path.dirname(path))
            _write(*written[path], content, path)
        with uninterrupted():
            while written:
                path, (handle, temporary) = next(iter(written.items()))
                os.replace(temporary, path)
                del written[path]
                os.close(handle)
            for folder in folders:
                _sync(folder)


@contextlib.contextmanager
def folder_beside(path: str) -> Iterator[str]:
    """A temporary folder on the file system of a destination; that of a killed process goes as its files do."""
    parent = os.path.dirname(os.path.realpath(path))
    _remove_abandoned(parent)
    made: list[tuple[int, str]] = []

    def remove() -> None:
        while made:
            handle, folder = made[-1]
            shutil.rmtree(folder, ignore_errors=True)
            made.pop()
            os.close(handle)

    with undone_by(remove):
        with uninterrupted():
            folder = tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent)
            made.append((os.open(folder, os.O_RDONLY), folder))
            _lock(made[0][0])
        yield folder


def _refuse_strange(path: str) -> None:
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the folder {folder} does not exist: make it before saving to {path}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder: give the name of a file in it")
    if os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is a device, a pipe or a socket: give the name of a file")


def _temporary(folder: str) -> tuple[int, str]:
    """A new file, open, and locked for as long as it is: by that it is told from an abandoned one."""
    while True:
        handle, temporary = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=folder)
        if _lock(handle) is not False and os.fstat(handle).st_nlink:
            return handle, temporary
        os.close(handle)  # another process took it for abandoned, before it was locked


def _lock(handle: int) -> bool | None:
    """Whether this process locks the file now; None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _remove_abandoned(folder: str) -> None:
    """Remove what killed processes left, as far as this one may."""
    names: list[str] = []
    with contextlib.suppress(PermissionError):  # one may write into a folder that one may not list
        names = os.listdir(folder)
    for name in names:
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            continue
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):  # another user's, or gone by now
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(handle):
                    shutil.rmtree(path) if stat.S_ISDIR(os.fstat(handle).st_mode) else os.unlink(path)
            finally:
                os.close(handle)


def _write(handle: int, temporary: str, content: Content, path: str) -> None:
    try:
        with open(handle, "wb", closefd=False) as file:
            for piece in content:
                file.write(piece)
            file.flush()
        with _where_possible():
            os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
    with _where_possible():
        os.chmod(temporary, _file_mode(path))


def _sync(folder: str) -> None:
    """The names, too, are to be there after a crash of the system."""
    with _where_possible():
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _where_possible() -> Iterator[None]:
    """What not every file system can do, or lets this user do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES):
            raise


def _file_mode(path: str) -> int:
    """That of the file to be replaced, else what open() gives a new one: mkstemp's are private to the user."""
    if os.path.exists(path):
        return stat.S_IMODE(os.stat(path).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
