"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Mapping

from safetensors import SafetensorError


def write_whole(writers: Mapping[str, Callable[[str], object]]) -> None:
    """Write every file under a temporary name beside its destination, then rename them all.

    A crash while they are written leaves the old files; an existing file keeps its mode, a link stays one.

    Args: writers: destination -> what writes the content to the path that it is given.

    Raises:
        FileNotFoundError: the folder of a destination does not exist.
        OSError: a file cannot be written.
    """
    targets = {os.path.realpath(path): write for path, write in writers.items()}
    for path in targets:
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"the folder {folder} does not exist: make it before saving to {path}")
    written: dict[str, str] = {}
    try:
        for path, write in targets.items():
            written[path] = _temporary(path)
            _write(write, written[path], path)
        while written:
            path, temporary = next(iter(written.items()))
            os.replace(temporary, path)
            del written[path]
    finally:
        for temporary in written.values():
            os.unlink(temporary)


def _temporary(path: str) -> str:
    handle, temporary = tempfile.mkstemp(prefix=".mapsurgery-", suffix=".tmp", dir=os.path.dirname(path))
    os.close(handle)
    return temporary


def _write(write: Callable[[str], object], temporary: str, path: str) -> None:
    try:
        write(temporary)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"could not write {path}: {error}") from error
    os.chmod(temporary, _file_mode(path))
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())


def _file_mode(path: str) -> int:
    """That of the file to be replaced, else what open() gives a new one: mkstemp's are private to the user."""
    if os.path.exists(path):
        return stat.S_IMODE(os.stat(path).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
