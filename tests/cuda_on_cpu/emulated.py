"""Builds the project's CUDA library for the emulated GPU, and runs a command with a package that loads it.

python tests/cuda_on_cpu/emulated.py address build/cuda_on_cpu/address python tests/cuda_on_cpu/fuzz.py --seconds 30
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
EMULATOR = HERE / "emulator"
LIBRARY = "libmapsurgery.so"
CUBLAS = ("-DMAPSURGERY_CUBLAS",)
SANITIZED = ("-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
VARIANTS: dict[str, Sequence[str]] = {
    "cublas": CUBLAS,
    "plain": (),  # as it is built where there are no headers of cuBLAS
    "address": (*CUBLAS, *SANITIZED, "-fsanitize=address,undefined"),
    "threads": (*CUBLAS, *SANITIZED, "-fsanitize=thread", "-DEMULATOR_THREADS"),  # a program: races.cpp
}


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def cmake_lists() -> str:
    return (PROJECT / "CMakeLists.txt").read_text()


def sources() -> list[Path]:
    """The sources of the CUDA library, as CMakeLists.txt lists them, and the operators' schemas."""
    target = re.search(r"mapsurgery_library\(\s*mapsurgery_cuda\s([^)]*)\)", cmake_lists())
    assert target, "CMakeLists.txt has no mapsurgery_library(mapsurgery_cuda ...)"
    schemas = [path for path in (PROJECT / "csrc").rglob("*.cpp") if "STABLE_TORCH_LIBRARY(" in path.read_text()]
    return [*schemas, *(PROJECT / name for name in target[1].split())]


def compile_object(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """An object of `source`; those of the library call the emulator where they would call CUDA."""
    version = re.search(r"TORCH_TARGET_VERSION=\w+", cmake_lists())
    assert version, "CMakeLists.txt defines no TORCH_TARGET_VERSION"
    of_library = PROJECT / "csrc" in source.parents
    # The library's own headers come last: cuda/launch.cuh is the emulator's.
    includes = [f"-I{path}" for path in (EMULATOR / "include", EMULATOR, PROJECT / "csrc")]
    includes += ["-isystem", str(Path(torch.__file__).parent / "include")]
    prefix = ["-include", str(EMULATOR / "prefix.h"), "-w"] if of_library else ["-Wall", "-Wextra"]
    result = folder / f"{source.name}.o"
    call = [compiler(), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-D{version[0]}", *includes, *prefix]
    run([*call, *flags, "-x", "c++", "-c", str(source), "-o", str(result)])
    return result


def run(call: Sequence[str | None]) -> None:
    """Runs a compiler, whose messages become those of the error."""
    result = subprocess.run(call, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, call))}\n{result.stderr}")


def compile_all(files: Iterable[Path], folder: Path, flags: Sequence[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: compile_object(source, folder, flags), files))


def link(objects: Iterable[Path], result: Path, flags: Sequence[str]) -> Path:
    torch_libraries = Path(torch.__file__).parent / "lib"
    libraries = [f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_libraries}", "-pthread"]
    kind = ["-shared"] if result.suffix == ".so" else []
    run([compiler(), *kind, *flags, "-o", str(result), *map(str, objects), *libraries])
    return result


def emulator_sources() -> list[Path]:
    return sorted(EMULATOR.glob("*.cpp"))


def build(variant: str, folder: Path) -> None:
    """Leaves objects in `folder`, and a copy of mapsurgery whose CPU library is the emulated one; or a program."""
    flags = VARIANTS[variant]
    is_program = variant == "threads"
    files = [*sources(), *emulator_sources(), *([HERE / "races.cpp"] if is_program else [])]
    objects = compile_all(files, folder, flags)
    if is_program:
        link(objects, folder / "races", flags)
        return
    original, copy = PROJECT / "mapsurgery", folder / "mapsurgery"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in original.iterdir():
        if path.suffix not in (".so", ".pyc") and path.name not in ("__pycache__", "_native.py"):
            (copy / path.name).symlink_to(path)
    shutil.copy(original / "_native.py", copy)  # no link, which would resolve to the original folder
    link(objects, copy / LIBRARY, flags)


def environment(variant: str, folder: Path, **more: str) -> dict[str, str]:
    """The environment of a command that imports what `build` has left in `folder`."""
    result = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}
    if variant == "address":
        # The interpreter is not instrumented: the sanitizer has to be there first, and what throws as well.
        names = ("libasan.so", "libubsan.so", "libstdc++.so")
        found = [subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True).strip() for name in names]
        result |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return result


def main() -> int:
    if len(sys.argv) < 4 or sys.argv[1] not in VARIANTS:
        print(f"{__doc__}\nThe first argument is one of {', '.join(VARIANTS)}.", file=sys.stderr)
        return 2
    variant, folder, command = sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:]
    build(variant, folder)
    return subprocess.run(command, env=environment(variant, folder)).returncode


if __name__ == "__main__":
    sys.exit(main())
