"""Builds the native libraries: CMakeLists.txt describes them, this file only drives it.

Environment:
    MAPSURGERY_NATIVE=0        build no native code: the library runs in pure torch
    MAPSURGERY_NATIVE=require  fail where there is no compiler or no CMake, instead of leaving the native code out
    CMAKE_ARGS                 further arguments for CMake, such as -DCMAKE_CUDA_ARCHITECTURES=90
    MAX_JOBS                   parallel compilations
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
# The time of every file in a wheel, unless the environment gives one: the earliest that a zip archive can say.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")


def find_tool(*names):
    """Path of the first of these programs that exists: beside this Python, where pip puts them, else on PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return next((found for name in names if (found := shutil.which(name, path=places))), None)


class Package(build_py):
    """setuptools uses its build folder again: no module or library of an earlier build must not be in it."""

    def run(self):
        shutil.rmtree(Path(self.build_lib) / "mapsurgery", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package; CMake and ninja redo only what has changed."""

    def run(self):
        native = os.environ.get("MAPSURGERY_NATIVE", "1")
        if native == "0":
            return
        missing = self._missing_tool()
        if missing is None:
            self._build()
        elif native == "require":
            raise SystemExit(f"mapsurgery: {missing}, and MAPSURGERY_NATIVE=require asks for the native code")
        else:
            self.warn(f"mapsurgery: {missing}: no native code is built, the library will run in pure torch")

    def _missing_tool(self):
        if find_tool("cmake") is None:
            return "CMake was not found"
        if os.environ.get("CXX") is None and find_tool("c++", "g++", "clang++") is None:
            return "no C++ compiler was found"
        if find_tool("ninja", "make") is None:
            return "neither ninja nor make was found"
        return None

    def _build(self):
        target = ROOT if self.editable_mode or self.inplace else Path(self.build_lib).resolve()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
        options = [f"-DPython_EXECUTABLE={sys.executable}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        # CMake keeps what it was told once: another kind of build, and a tree that was moved, get their own folder.
        told = [ROOT, generator[1], *map(os.environ.get, ("CMAKE_ARGS", "CXX", "CXXFLAGS", "CUDACXX", "CUDAFLAGS"))]
        kind = hashlib.sha256(repr(told).encode()).hexdigest()[:8]
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{kind}"
        jobs = ["--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))]
        subprocess.run([cmake, "-S", ROOT, "-B", build, *generator, *options], check=True)
        subprocess.run([cmake, "--build", build, *jobs], check=True)
        subprocess.run([cmake, "--install", build, "--prefix", target], check=True)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """The libraries use no Python ABI: one wheel per platform serves every Python.

    The same sources and tools give the same bytes, wherever and whenever they are built.
    """

    def write_wheelfile(self, *args, **kwargs):
        super().write_wheelfile(*args, **kwargs)
        for path in Path(self.bdist_dir).rglob("*"):  # a umask says what others may do with the checkout
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    license="Apache-2.0",  # here: the table in pyproject.toml ends in 2027, the string there needs setuptools 77
    # Stands for the libraries, so that setuptools runs build_ext and knows that the wheel belongs to a platform.
    ext_modules=[Extension("mapsurgery.native_libraries", sources=[])],
    cmdclass={"build_py": Package, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
