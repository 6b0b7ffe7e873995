"""Loads the native operator libraries, and tells what was loaded.

The library works without them, in pure torch. It never does so in silence: one warning says why, unless the environment
variable ``MAPSURGERY_NATIVE=0`` asked for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_DIRECTORY = Path(__file__).parent
_CPU_LIBRARY = _DIRECTORY / "libmapsurgery.so"
_CUDA_LIBRARY = _DIRECTORY / "libmapsurgery_cuda.so"
_CMAKE_PREFIX = _DIRECTORY / "share" / "cmake"
# pip keeps the wheel of an sdist, native code or not, and installs it again.
REBUILD = "'pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall' and the sdist or checkout"


@dataclass
class NativeInfo:
    """What runs the operators, and how it was built; ``str()`` of it is a table.

    The entries of the build are None where `mapsurgery._C` was not built.
    """

    version: str | None
    torch: str
    cpu: bool = False
    cuda: bool = False
    cpu_library: str | None = None
    cuda_library: str | None = None
    compiler: str | None = None
    build_type: str | None = None
    built_with_torch: str | None = None
    built_with_cuda: str | None = None
    cuda_architectures: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        rows = asdict(self)
        return "\n".join(
            f"{name.replace('_', ' '):<18} {'-' if value is None else value}" for name, value in rows.items()
        )


def _version() -> str | None:
    try:
        return importlib.metadata.version("mapsurgery")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return None


def _build_info() -> dict[str, Any]:
    try:
        build: Any = importlib.import_module("mapsurgery._C")
    except ImportError:
        return {}
    return {
        "compiler": build.compiler,
        "build_type": build.build_type,
        "built_with_torch": build.torch_version,
        "built_with_cuda": build.cuda_version or None,
        "cuda_architectures": build.cuda_architectures or None,
    }


_info: NativeInfo | None = None


def _load(info: NativeInfo) -> None:
    """Loads the libraries and enters the outcome into `info`."""
    if not _CPU_LIBRARY.exists():
        info.error = "no native library was built"
        return
    try:
        torch.ops.load_library(str(_CPU_LIBRARY))
        info.cpu, info.cpu_library = True, str(_CPU_LIBRARY)
        if torch.version.cuda is not None and _CUDA_LIBRARY.exists():
            torch.ops.load_library(str(_CUDA_LIBRARY))
            info.cuda, info.cuda_library = True, str(_CUDA_LIBRARY)
    except OSError as error:
        info.error = (
            f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        )  # torch chains the loader's message


def _warn(info: NativeInfo) -> None:
    """Says once what runs in pure torch and why."""
    what = "CUDA tensors" if info.cpu else "everything"
    built = "; ".join(f"{name} {value}" for name, value in _build_info().items() if value)
    warnings.warn(
        f"mapsurgery runs {what} in pure torch: {info.error} "
        f"(running torch: {info.torch}; built: {built or 'unknown'}). Rebuild with {REBUILD}, "
        "or set MAPSURGERY_NATIVE=0 to choose pure torch.",
        stacklevel=2,
    )


def load() -> bool:
    """Loads the native libraries on the first call. Returns whether they define the schemas of the operators."""
    global _info
    if _info is None:
        _info = NativeInfo(version=_version(), torch=torch.__version__, **_build_info())
        if os.environ.get("MAPSURGERY_NATIVE") == "0":
            _info.error = "switched off by MAPSURGERY_NATIVE=0"
        else:
            _load(_info)
            if _info.error is not None:
                _warn(_info)
    return _info.cpu


def native_info() -> NativeInfo:
    """What runs the operators: which native libraries are loaded and how they were built."""
    load()
    assert _info is not None
    return _info


def cmake_prefix_path() -> str:
    """Folder for CMAKE_PREFIX_PATH, with which a C++ project finds this installation: ``find_package(mapsurgery)``.

    Raises:
        FileNotFoundError: no native library was built.
    """
    if not (_CMAKE_PREFIX / "mapsurgery" / "mapsurgeryConfig.cmake").exists():
        raise FileNotFoundError(
            f"{_CMAKE_PREFIX} has no CMake package, because no native library was built: install mapsurgery with a C++ "
            f"compiler and CMake present, by {REBUILD}"
        )
    return str(_CMAKE_PREFIX)
