"""examples/cpp: built against the installed CMake package, run without Python on what Python exported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import mapsurgery

EXAMPLE = Path(__file__).parent.parent / "examples" / "cpp"
TORCH = Path(torch.__file__).parent

pytest.importorskip("timm", reason="the example exports a model of timm")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,  # builds and exports for a minute and a half
    pytest.mark.skipif(not mapsurgery.native_info().cpu, reason="no native library is loaded"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the example is built and run as on Linux"),
]


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    """In an empty environment: no PATH, no PYTHONPATH, no virtual environment."""
    return subprocess.run([str(part) for part in command], env={}, capture_output=True, text=True, timeout=60)


def _checked(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def _find_cmake() -> str:
    beside = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)]))
    return cmake or pytest.skip("CMake was not found")


@pytest.fixture(scope="module")
def program(made_once: Callable[..., Path]) -> Path:
    """The program, built against a copy of the package in another place."""
    cmake = _find_cmake()

    def make(folder: Path) -> None:
        installed, moved = Path(mapsurgery.cmake_prefix_path()).parents[1], folder / "moved" / "mapsurgery"
        python = shutil.ignore_patterns("*.py", "__pycache__")
        shutil.copytree(installed, moved, ignore=python)
        # --as-needed drops a library that no symbol is used of, unless the imported target prevents it.
        options = (f"-DTORCH_ROOT={TORCH}", f"-DCMAKE_PREFIX_PATH={folder / 'moved'}", "-DCMAKE_BUILD_TYPE=None")
        _checked(cmake, "-S", EXAMPLE, "-B", folder / "build", *options, "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")
        _checked(cmake, "--build", folder / "build")
        shutil.copytree(moved, folder / "lacks" / "mapsurgery", ignore=shutil.ignore_patterns("libmapsurgery.so"))

    return made_once("cpp_example", make) / "build" / "vit"


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def exported(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> SimpleNamespace:
    """What export_vit.py wrote for a small ViT; `options` are the program's for this package."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if request.param == "cuda" and not mapsurgery.native_info().cuda:
        pytest.skip("no native CUDA library is loaded")
    options = ("--depth", 1, "--img-size", 32, "--device", request.param)
    script = EXAMPLE / "export_vit.py"
    folder = made_once(f"cpp_{request.param}", lambda folder: _checked(sys.executable, script, folder, *options))
    options = (folder / "model.pt2", folder / "input.pt", "--device", request.param)
    return SimpleNamespace(folder=folder, device=request.param, options=options)


def _logits(printed: str) -> Tensor:
    return torch.tensor([[float(number) for number in line.split()] for line in printed.splitlines()])


def test_the_program_computes_what_python_does_and_takes_another_adapter(
    program: Path, exported: SimpleNamespace
) -> None:
    first, second = (torch.load(exported.folder / f"{name}.pt") for name in ("logits", "adapter_logits"))
    assert (first - second).abs().max() > 0.1  # one could not pass for the other
    for expected, options in ((first, ()), (second, ("--adapter", exported.folder / "adapter.pt"))):
        done = _run(program, *exported.options, *options)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(_logits(done.stdout), expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_of_the_adapter_is_replaced(program: Path, exported: SimpleNamespace, tmp_path) -> None:
    """alpha and beta are the ones that Inductor would write into the code: their effect alone has to be seen."""
    adapter = torch.load(exported.folder / "adapter.pt")
    expected = torch.load(exported.folder / "adapter_logits.pt")
    for role in ("adapter.A", "adapter.B", "adapter.alpha", "adapter.beta", "head.weight", "head.bias"):
        torch.save({n: t * 1.5 if n.endswith(role) else t for n, t in adapter.items()}, tmp_path / "adapter.pt")
        done = _run(program, *exported.options, "--adapter", tmp_path / "adapter.pt")
        assert done.returncode == 0, done.stderr
        assert (_logits(done.stdout) - expected).abs().max() > 1e-3, role


A, FORM, NORM = (f"blocks.0.mlp.fc1.adapter.{name}" for name in ("A", "form", "weight_norm"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {n: t for n, t in a.items() if n != A}, f"it has no tensor {A}"),
        (lambda a: {**a, "blocks.2.adapter.A": a[A]}, "the package has no blocks.2.adapter.A"),
        (lambda a: {**a, A: a[A][:4]}, rf"{A} is Float [4, 192], the package has Float [8, 192]"),
        (lambda a: {**a, A: a[A].double()}, rf"{A} is Double [8, 192], the package has Float [8, 192]"),
        (lambda a: {**a, FORM: a[FORM] * 2}, f"{FORM} must be 0.025"),
        (lambda a: {**a, NORM: a[NORM] * 1.001}, f"{NORM} must be "),
        (lambda a: a[A], "an adapter is a dictionary of tensors, this is a Tensor"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "tau", "other base", "no dictionary"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    program: Path, exported: SimpleNamespace, tmp_path, change, message: str
) -> None:
    torch.save(change(torch.load(exported.folder / "adapter.pt")), tmp_path / "bad.pt")
    done = _run(program, *exported.options, "--adapter", tmp_path / "bad.pt")
    assert done.returncode == 1 and done.stdout == ""
    assert f"{tmp_path / 'bad.pt'}: " in done.stderr and message in done.stderr


def test_without_the_operator_library_the_program_says_what_is_missing(
    program: Path, exported: SimpleNamespace, tmp_path: Path
) -> None:
    # The program itself, but for the place where it looks: a folder with all else.
    code = program.read_bytes()
    assert b"/moved/mapsurgery" in code
    shutil.copy(program, tmp_path / "vit")
    (tmp_path / "vit").write_bytes(code.replace(b"/moved/mapsurgery", b"/lacks/mapsurgery"))
    done = _run(tmp_path / "vit", *exported.options)
    assert done.returncode != 0 and "libmapsurgery.so: cannot open shared object file" in done.stderr


def test_a_program_that_does_not_link_the_operators_says_which_one_it_lacks(
    program: Path, exported: SimpleNamespace, tmp_path
) -> None:
    objects = sorted((program.parent / "CMakeFiles" / "vit.dir").glob("*.o"))
    libraries = [TORCH / "lib" / f"lib{name}.so" for name in ("torch", "torch_cpu", "c10")]
    _checked("c++", *objects, "-o", tmp_path / "bare", f"-Wl,-rpath,{TORCH / 'lib'}", *libraries)
    done = _run(tmp_path / "bare", *exported.options)
    assert done.returncode == 1 and "Could not find schema for mapsurgery::" in done.stderr


def test_another_device_a_missing_file_and_a_wrong_option_are_named(program: Path, exported: SimpleNamespace) -> None:
    model, inputs, *_ = exported.options
    other = "cuda" if exported.device == "cpu" else "cpu"
    for arguments, code, message in (
        ((model, inputs, "--device", other), 1, f"model.pt2: compiled for {exported.device}, not for {other}"),
        ((model, "nowhere.pt"), 1, "cannot read nowhere.pt" if exported.device == "cpu" else "compiled for"),
        ((model, inputs, "--adaptor", "x.pt"), 2, "unknown option --adaptor"),
        ((model,), 2, "usage: vit"),
    ):
        done = _run(program, *arguments)
        assert done.returncode == code and message in done.stderr
