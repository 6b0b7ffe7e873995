"""safetensors files, read once: what was checked is what is used.

safetensors itself maps a file into memory, where another process may change or cut it after it was checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as serialised
from torch import Tensor

from ._atomic_write import Content

CHECKSUM = "checksum"
"""Key of the metadata: of all tensors, and of the rest of the metadata."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (16, 32, 64)},
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}
_MOST_DIMENSIONS = 64  # of a tensor of torch
_LONGEST_HEADER = 100_000_000  # as in safetensors


def content_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], beside: str = "") -> Content:
    """A safetensors file, with a checksum in its metadata. Args: beside: a text that is to be read with it."""
    plain, storages = {}, set()
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        place = t.untyped_storage().data_ptr()
        plain[name] = t.clone() if place in storages else t  # safetensors refuses what shares memory
        storages.add(place)
    data = memoryview(serialised(plain, dict(metadata)))
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(bytes(data[8 : 8 + length])), data[8 + length :]
    header["__metadata__"] = {**metadata, CHECKSUM: _checksum(header, metadata, body, beside)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, body]


def _checksum(header: Mapping[str, Any], metadata: Mapping[str, str], body: Any, beside: str) -> str:
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    rest = {name: text for name, text in metadata.items() if name != CHECKSUM}
    digest = hashlib.sha256(json.dumps([entries, rest, beside], sort_keys=True).encode())  # in hardware, mostly
    digest.update(body)
    return digest.hexdigest()


class OtherChecksum(ValueError):
    """A file is not as it was written, or not the one that was written with another."""


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was read, and checked in itself.

    Attributes:
        metadata: texts by name.
        shapes: what the file holds, as tensors on meta.
        size: bytes of all tensors.
    """

    path: str
    metadata: dict[str, str]
    shapes: dict[str, Tensor]
    size: int
    _header: dict[str, Any]
    _handle: BinaryIO

    def read(self, beside: str = "") -> dict[str, Tensor]:
        """The tensors, in memory of their own.

        Args: beside: the text that was written with it.

        Raises:
            ValueError: the file was cut meanwhile, or is not as it was written.
        """
        body = bytearray(self.size)
        if self._handle.readinto(body) != self.size:  # type: ignore[attr-defined]
            raise ValueError(f"{self.path} was cut while it was read: another process writes to it")
        known = self.metadata.get(CHECKSUM)
        if known is not None and known != _checksum(self._header, self.metadata, body, beside):
            raise OtherChecksum(
                f"{self.path} is damaged, or was changed while it was read: its checksum is another"
                + (" (it and the file beside it may come from two adapters)" if beside else "")
            )
        return {name: self._tensor(name, shape, body) for name, shape in self.shapes.items()}

    def _tensor(self, name: str, like: Tensor, body: bytearray) -> Tensor:
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        start, end = self._header[name]["data_offsets"]
        if start % like.itemsize or like.dtype == torch.bool:  # bytes at any place, and of any value
            body, start = bytearray(body[start:end]), 0
        if like.dtype == torch.bool:
            return torch.frombuffer(body, dtype=torch.uint8).ne(0).reshape(like.shape)
        return torch.frombuffer(body, dtype=like.dtype, count=like.numel(), offset=start).reshape(like.shape)


def refuse_too_large(file: TensorFile, model: Any) -> None:
    """Raises ValueError, before anything of it is read, for what is larger than any adapter of a model.

    Factors of full rank are at most a few times as large as the weights.
    """
    largest = 64 * sum(t.numel() for t in (*model.parameters(), *model.buffers())) + 2**20
    if file.size > largest:
        raise ValueError(
            f"{file.path} announces {file.size:,} bytes of tensors, more than any adapter of this model has "
            f"({largest:,}): it is of another model, or damaged"
        )


def open_file(path: str) -> BinaryIO:
    """A regular file, to be read.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError, OSError: it is not there, may not be read, or is none.
    """
    return open(path, "rb", opener=_open)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """A file with its header read.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, OSError: it is not there, is no file, or cannot be read.
        ValueError: it is no complete safetensors file.
    """
    path = os.fsdecode(path)
    with open_file(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        header, start = _header(path, handle, size)
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise _broken(path, "its metadata is not a dictionary of texts")
        shapes = _shapes(path, {k: v for k, v in header.items() if k != "__metadata__"}, size - start)
        yield TensorFile(path, metadata, shapes, size - start, header, handle)


def _open(path: str, flags: int) -> int:
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody writes to would block
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise (IsADirectoryError if stat.S_ISDIR(mode) else OSError)(f"{path} is {kind}, not a file of adapters")
    return handle


def _broken(path: str, reason: str) -> ValueError:
    return ValueError(f"{path} is not a complete safetensors file (truncated or damaged): {reason}")


def _header(path: str, handle: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    length = int.from_bytes(handle.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise _broken(path, f"it has {size} bytes, and its header would have {length}")
    try:
        header = json.loads(handle.read(length))
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise _broken(path, f"its header is a {type(header).__name__}, not a dictionary")
    return header, 8 + length


def _shapes(path: str, entries: dict[str, Any], size: int) -> dict[str, Tensor]:
    """What the entries announce, which is to be all of the bytes."""
    spans, shapes = [], {}
    for name, entry in entries.items():
        shape, span, dtype = _parts(path, name, entry)
        if span[1] - span[0] != math.prod(shape) * dtype.itemsize:
            raise _broken(path, f"{name} has {span[1] - span[0]} bytes, and shape {shape} of {dtype}")
        spans.append(span)
        if math.prod(max(n, 1) for n in shape) >= 2**62:
            raise _broken(path, f"{name} has shape {shape}")
        shapes[name] = torch.empty(shape, dtype=dtype, device="meta")
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _broken(path, f"the numbers of its tensors overlap, or leave bytes out, at {min(start, end)}")
        end = stop
    if end != size:
        raise _broken(path, f"its tensors have {end} bytes, and {size} are there")
    return shapes


def _parts(path: str, name: str, entry: Any) -> tuple[list[int], list[int], torch.dtype]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the entry of {name} is {str(entry)[:80]}")
    shape, span = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(span) or len(span) != 2 or span[0] > span[1]:
        raise _broken(path, f"{name} has shape {str(shape)[:80]} and bytes {str(span)[:80]}")
    if len(shape) > _MOST_DIMENSIONS:
        raise _broken(path, f"{name} has {len(shape)} dimensions, a tensor at most {_MOST_DIMENSIONS}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise _broken(path, f"{name} is of dtype {str(entry['dtype'])[:40]!r}, which is none of {', '.join(_DTYPES)}")
    return shape, span, _DTYPES[entry["dtype"]]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
