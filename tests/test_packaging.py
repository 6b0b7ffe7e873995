"""The archives: what an sdist and a wheel hold; both run in a fresh environment, with a compiler and without."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from build import ProjectBuilder
from definition import defined_by
from packaging.requirements import Requirement
from torch import nn
from torch.nn import functional as F

import mapsurgery

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="names of libraries are those of Linux"),
]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
TOP = ("CHANGELOG.md", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
DEVELOPMENT = Path(torch.__file__).parents[1]  # the site-packages of the environment that runs the tests
CONFIG = "mapsurgery/share/cmake/mapsurgery/mapsurgeryConfig"
STALE = (
    *(f"mapsurgery/{name}.so" for name in ("libmapsurgery", "libmapsurgery_cuda", "_C.of_another")),
    f"{CONFIG}.cmake",
)
# What compiles fastest: these builds are for their files and a few numbers.
QUICK = {
    "CMAKE_ARGS": "-DMAPSURGERY_CUDA=OFF -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O0",
    "LDFLAGS": "-static-libstdc++",  # as some machines' compilers do by themselves
    "MAPSURGERY_NATIVE": "require",
}
BUILT = "a folder of pip"  # with spaces, over which no build may stumble


def run(*command: object, cwd: Path, fails: bool = False, **environment: str) -> str:
    """What a command prints; in this environment, but without its choices of compilers and of pure torch."""
    chosen = ("CC", "CXX", "CMAKE_ARGS", "MAPSURGERY_NATIVE")
    env = {name: value for name, value in os.environ.items() if name not in chosen} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def files(*folders: str) -> set[str]:
    """Names of the files below these folders of the repository, less what was built there."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    names = {str(path.relative_to(ROOT)) for path in found}
    return {name for name in names if not re.search(r"__pycache__|\.so$|/share/", name)}


def copy_source(folder: Path) -> Path:
    """What a checkout has that may go into an archive or be in the way of one, without what was built in it."""
    copy = folder / "a source"
    for name in (*TOP, *files("mapsurgery", "csrc"), "tests/conftest.py", "tests/test_packaging.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def leave_stale(*names: Path) -> None:
    """What an earlier build has left, of another kind than those to come."""
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("stale")


def make_environment(folder: Path) -> Path:
    """The Python of a new environment that has all packages of this one but mapsurgery, and none of its programs."""
    venv.create(folder, symlinks=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    for entry in DEVELOPMENT.iterdir():
        if "mapsurgery" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def install(python: Path, archive: Path, tools: str, **environment: str) -> str:
    """What pip says; `tools` is the PATH."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--verbose")
    return run(python, "-m", "pip", "install", *options, archive, cwd=python.parent, PATH=tools, **environment)


@pytest.fixture(scope="session")
def archives(made_once: Callable[..., Path]) -> SimpleNamespace:
    """The sdist that `python -m build` makes of a tree with stale libraries, and a pure wheel that it builds of it."""

    def make(folder: Path) -> None:
        source = copy_source(folder)
        leave_stale(*(source / name for name in (*STALE, "csrc/stale.so")))
        build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
        run(*build, cwd=folder, MAPSURGERY_NATIVE="0")

    folder = made_once("archives", make)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return SimpleNamespace(sdist=sdist, pure_wheel=wheel)


@pytest.fixture(scope="session")
def native(made_once: Callable[..., Path], archives: SimpleNamespace) -> SimpleNamespace:
    """A fresh environment in which pip has installed the sdist with a compiler, and the wheel that it built for it."""

    def make(folder: Path) -> None:
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        (folder / BUILT).mkdir()
        places = {"PIP_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(folder / BUILT)}
        install(make_environment(folder / "fresh"), archives.sdist, tools, **places, **QUICK)

    folder = made_once("native", make)
    (wheel,) = (folder / "cache").rglob("*.whl")
    return SimpleNamespace(python=folder / "fresh" / "bin" / "python", wheel=wheel)


# ---- what they hold


def test_the_sdist_holds_what_the_wheel_is_built_from_and_no_more(archives: SimpleNamespace) -> None:
    with tarfile.open(archives.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        (metadata,) = (m for m in archive if m.name.count("/") == 1 and m.name.endswith("/PKG-INFO"))
        metadata = archive.extractfile(metadata).read().decode()
    of_setuptools = {name for name in names if name.startswith("mapsurgery.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - of_setuptools == {*TOP, *files("mapsurgery", "csrc")}
    assert "License: Apache-2.0\n" in metadata and "License-File: LICENSE\n" in metadata
    assert {"mapsurgery/py.typed", "mapsurgery/ops/schemas.inc"} <= names


@needs_compiler
@pytest.mark.long
def test_the_wheel_holds_the_package_and_the_libraries_of_its_own_build(native: SimpleNamespace) -> None:
    wheel = zipfile.ZipFile(native.wheel)
    names = {re.sub(r"^mapsurgery-[^/]*\.dist-info", "dist-info", name) for name in wheel.namelist()}
    (build_info,) = (name for name in names if name.startswith("mapsurgery/_C."))
    libraries = {"mapsurgery/libmapsurgery.so", build_info}
    libraries |= {f"{CONFIG}{end}.cmake" for end in ("", "-none", "Version")}
    described = {f"dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")}
    assert names == files("mapsurgery") | libraries | described
    for name in wheel.namelist():
        data = wheel.read(name)
        assert data != b"stale"
        for place in (BUILT, DEVELOPMENT):
            assert str(place).encode() not in data, f"{name} names {place}, which is no place of another machine"


def test_a_wheel_takes_nothing_that_another_build_left(tmp_path: Path) -> None:
    """Without native code: none at all, neither from the source tree nor from setuptools' own folder, used again."""
    source = copy_source(tmp_path)

    def built() -> set[str]:
        shutil.rmtree(tmp_path / "wheels", ignore_errors=True)
        options = ("--no-build-isolation", "--no-deps", "-w", tmp_path / "wheels")
        run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=tmp_path, MAPSURGERY_NATIVE="0")
        (wheel,) = (tmp_path / "wheels").glob("*.whl")
        return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    leave_stale(*(source / name for name in STALE))
    assert built() == files("mapsurgery")
    (kept,) = (source / "build").glob("lib*")
    leave_stale(*(kept / name for name in (*STALE, "mapsurgery/gone.py")))  # a module that a later version has not
    assert built() == files("mapsurgery")


def test_what_the_metadata_name_is_pinned_and_is_what_the_examples_import(archives: SimpleNamespace) -> None:
    wheel = zipfile.ZipFile(archives.pure_wheel)
    (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
    required = re.findall(r"^Requires-Dist: ([\w-]+)\S*(?:; extra == \"(\w+)\")?$", metadata, re.MULTILINE)
    assert len(required) == metadata.count("\nRequires-Dist: ")
    to_build = {re.match(r"[\w-]+", name)[0] for name in ProjectBuilder(ROOT).build_system_requires}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name for name, _ in required} | to_build <= pinned
    imports = [node for path in (ROOT / "examples").glob("*.py") for node in ast.parse(path.read_text()).body]
    modules = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    distributions = importlib.metadata.packages_distributions()
    needed = {name.lower() for module in modules for name in distributions.get(module.partition(".")[0], ())}
    assert needed - {"mapsurgery"} <= {name for name, extra in required if extra in ("", "examples")}


@needs_compiler
@pytest.mark.long
def test_the_same_sources_give_the_same_wheel_bit_for_bit(tmp_path: Path) -> None:
    """In folders of two names, with other times of the files, and other permissions, as a umask leaves them."""

    def built(folder: Path, mode: int, time: int) -> Path:
        folder.mkdir()
        source = copy_source(folder)
        for path in (path for path in source.rglob("*") if path.is_file()):
            path.chmod(mode)
            os.utime(path, (time, time))
        options = ("--no-build-isolation", "--no-deps", "-w", folder)
        run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder, **QUICK)
        (wheel,) = folder.glob("*.whl")
        return wheel

    one, other = (
        built(tmp_path / "one", 0o644, 1_600_000_000),
        built(tmp_path / "of another name", 0o600, 1_700_000_000),
    )
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        assert [info.filename for info in first.infolist()] == [info.filename for info in second.infolist()]
        assert [name for name in first.namelist() if first.read(name) != second.read(name)] == []
    assert one.read_bytes() == other.read_bytes()


def test_every_pinned_file_has_its_hash_and_every_requirement_its_pin() -> None:
    """pip then refuses every other file, and whatever is not pinned, on each Python."""
    pins = re.sub(r" \\\n +", " ", (ROOT / "constraints.txt").read_text()).splitlines()
    pins = [line.partition(" --hash=") for line in pins if line and not line.startswith("#")]
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", one) for _, _, hashes in pins for one in hashes.split(" --hash="))
    pinned = [Requirement(text) for text, _, _ in pins]
    assert all(str(pin.specifier).startswith("==") and "*" not in str(pin.specifier) for pin in pinned)
    lines = [
        line for name in ("dev", "packaged") for line in (ROOT / f"requirements-{name}.txt").read_text().splitlines()
    ]
    wanted = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        here = {"python_version": python, "python_full_version": f"{python}.9"}
        there = [pin.name for pin in pinned if pin.marker is None or pin.marker.evaluate(here)]
        assert len(there) == len(set(there))
        assert {one.name for one in wanted if one.marker is None or one.marker.evaluate(here)} <= set(there)


# ---- that they run

STEP = """
import runpy, sys, torch, mapsurgery
layer = mapsurgery.patch(torch.nn.Linear(24, 16), "*", rank=4, init="random")
with torch.no_grad():
    layer.adapter.beta.fill_(0.3)
x = torch.randn(40, 24, requires_grad=True)
y = layer(x)
y.square().sum().backward()
torch.save([x.detach(), y.detach(), x.grad, layer.state_dict()], "numbers.pt")
wide, W, A, B, one = (torch.ones(shape) for shape in ((3, 4), (6, 5), (2, 5), (6, 2), (1,)))
try:
    torch.ops.mapsurgery.lowrank_linear(wide, W, None, A, B, one, one)
except RuntimeError as error:
    print(error)
sys.argv[1:] = ["info"]
runpy.run_module("mapsurgery", run_name="__main__")  # python -m mapsurgery info
"""


def use(python: Path, folder: Path) -> tuple[dict[str, str], str]:
    """The rows of `python -m mapsurgery info`, and all that a process prints which has to compute what is right.

    It sees no compiler, and nothing of this repository.
    """
    printed = run(python, "-W", "always", "-c", STEP, cwd=folder, PATH=str(folder))
    x, y, x_grad, state = torch.load(folder / "numbers.pt")
    layer = mapsurgery.patch(nn.Linear(24, 16), "*", rank=4, init="random")
    layer.load_state_dict(state)
    x = x.double().requires_grad_()
    expected = F.linear(x, defined_by(layer.adapter, state["weight"]), state["bias"].double())
    expected.square().sum().backward()
    assert (expected - F.linear(x, state["weight"].double(), state["bias"].double())).abs().max() > 0.01
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_grad.double(), x.grad, rtol=1e-4, atol=1e-4)
    return {line[:18].strip(): line[19:] for line in printed.splitlines()}, printed


def assert_native(python: Path, folder: Path) -> None:
    info, printed = use(python, folder)
    (site,) = (python.parents[1] / "lib").glob("python3*/site-packages")
    assert info["cpu"] == "True" and info["cpu library"] == str(site / "mapsurgery" / "libmapsurgery.so"), printed
    assert info["version"] == VERSION and info["built with torch"] == torch.__version__.partition("+")[0], printed
    assert "Warning" not in printed
    # It holds a libstdc++ of its own (QUICK): streams of two copies that mix lose the numbers of a message, or crash.
    assert "mapsurgery: x has shape (3, 4), but its dimension -1 must be 5 (the weight's columns)" in printed


def assert_pure(python: Path, folder: Path) -> None:
    info, printed = use(python, folder)
    assert info["cpu"] == "False" and info["error"] == "no native library was built", printed
    assert printed.count("Warning") == 1 and printed.count("mapsurgery runs everything in pure torch: ") == 1, printed


@needs_compiler
@pytest.mark.long
def test_the_wheel_that_pip_built_of_the_sdist_runs_where_no_compiler_is(
    native: SimpleNamespace, tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "fresh")
    install(python, native.wheel, tools="")
    assert_native(python, tmp_path)


@needs_compiler
def test_the_sdist_is_installed_in_pure_torch_where_a_tool_is_missing(
    archives: SimpleNamespace, tmp_path: Path
) -> None:
    """It says so, then and when it is imported; MAPSURGERY_NATIVE=require refuses instead."""
    python, tools = make_environment(tmp_path / "fresh"), tmp_path / "tools"
    tools.mkdir()
    shutil.unpack_archive(archives.sdist, tmp_path)
    build = (python, "setup.py", "build_ext")
    for tool, missing in (
        ("cmake", "CMake was not found"),
        ("c++", "no C++ compiler was found"),
        ("ninja", "neither ninja nor make was found"),
    ):
        place = {"cwd": tmp_path / f"mapsurgery-{VERSION}", "PATH": str(tools)}
        said = run(*build, **place, fails=True, MAPSURGERY_NATIVE="require")
        assert f"mapsurgery: {missing}, and MAPSURGERY_NATIVE=require asks for the native code" in said
        said = run(*build, **place)
        assert f"mapsurgery: {missing}: no native code is built, the library will run in pure torch" in said
        (tools / tool).symlink_to(shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"))
    assert "MAPSURGERY_NATIVE" not in run(*build, **place, MAPSURGERY_NATIVE="0")
    assert "no native code is built" in install(python, archives.sdist, tools="", PIP_NO_CACHE_DIR="1")
    assert_pure(python, tmp_path)
