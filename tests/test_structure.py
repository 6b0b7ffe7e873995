"""The layers of the package: each imports only what stands below it, in no circle, and no function hides a module. Few
functions stand between an adapted layer and the C++ code."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mapsurgery

ROOT = Path(mapsurgery.__file__).parent

FLOORS = (
    ("_native", "tables", "named", "progress", "interrupts", "_atomic_write", "_tensor_file"),
    ("ops",),
    ("updates",),
    ("methods",),
    (
        *("surgery", "surgery.paths", "surgery.globs", "surgery.computed", "surgery.cut_graphs"),
        *(
            "surgery.offloaded",
            "surgery.other_adapters",
            "surgery.reducers",
            "surgery.trainers",
            "surgery.forwards",
        ),
    ),
    (
        *("surgery.adapted", "surgery.layers", "surgery.attach", "surgery.resizing", "surgery.probe", "surgery.writes"),
        *("surgery.heads", "surgery.fresh"),
        *("surgery.quantised", "surgery.quantised.kinds", "surgery.quantised.layer", "surgery.quantised.merged"),
    ),
    ("surgery.config", "surgery.planned", "surgery.plan", "surgery.plan_table", "surgery.ties"),
    ("surgery.originals", "surgery.record", "surgery.stand_ins", "surgery.undo", "surgery.patch", "surgery.merge"),
    (
        *(
            "_adapter_file",
            "_base",
            "_state_dict",
            "_report",
            "_measures",
            "_track",
            "_history",
            "_verify",
            "_trial",
            "_example",
            "_export",
            "_optim",
        ),
        *("_rank_allocator", "reuse", "plots"),
    ),
    ("integrations", "contrib", "__main__", ""),
)
"""From the ground up; the name of a package stands for its modules that are not named themselves, "" for the root."""

PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


@functools.cache
def _imports(name: str) -> frozenset[str]:
    """The modules of the package that a module imports, inside functions and for types alone included."""
    found: set[str] = set()
    package = name if PATHS[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(PATHS[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("mapsurgery").lstrip(".") for alias in node.names if _ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and not _ours(node.module or ""):
                continue
            above = package.split(".") if package and node.level else []
            above = above[: len(above) - max(0, node.level - 1)]
            stated = node.module or ""
            base = ".".join([*above, *([stated] if node.level else stated.split(".")[1:])]).strip(".")
            for alias in node.names:
                module = f"{base}.{alias.name}".lstrip(".")
                found.add(module if module in PATHS else base)
    return frozenset(found)


def _ours(name: str) -> bool:
    return name.partition(".")[0] == "mapsurgery"


def _floor(name: str) -> int:
    listed = {entry: i for i, floor in enumerate(FLOORS) for entry in floor}
    while name not in listed and "." in name:
        name = name.rpartition(".")[0]
    assert name in listed, f"{name} has no place in FLOORS"
    return listed[name]


def test_every_module_imports_only_what_stands_below_it() -> None:
    upward = [
        f"{name or 'mapsurgery'} imports {other}"
        for name in PATHS
        for other in _imports(name)
        if _floor(other) > _floor(name)
    ]
    assert not upward


def test_there_is_no_circle() -> None:
    TopologicalSorter({name: _imports(name) - {name} for name in PATHS}).prepare()  # raises CycleError with its names


@pytest.mark.parametrize("folder", [n for n, path in PATHS.items() if path.name == "__init__.py"])
def test_there_is_no_circle_of_folders_and_the_files_beside_them(folder: str) -> None:
    imports: dict[str, set[str]] = {}
    for name in PATHS:
        for other in _imports(name):
            own, others = _child(folder, name), _child(folder, other)
            if own and others and own != others:
                imports.setdefault(own, set()).add(others)
    TopologicalSorter(imports).prepare()


def _child(folder: str, name: str) -> str:
    """What directly in a folder a module is or lies in; "" if it is the folder's own __init__, or elsewhere."""
    prefix = f"{folder}.".lstrip(".")
    return name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""


def test_no_import_within_the_package_waits_in_a_function() -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    waiting = {
        name or "mapsurgery"
        for name, path in PATHS.items()
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, functions)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.level or _ours(node.module or ""))
    }
    assert not waiting


def test_nothing_inside_imports_the_package_itself() -> None:
    assert not [name for name in PATHS if "" in _imports(name) and name]


@pytest.mark.parametrize("name", [n for n, path in PATHS.items() if path.name == "__init__.py"])
def test_no_name_hides_a_module(name: str) -> None:
    package = importlib.import_module(f"mapsurgery.{name}".rstrip("."))
    below = [module.name for module in pkgutil.iter_modules(package.__path__)]
    hidden = [n for n in below if not inspect.ismodule(getattr(package, n, package))]
    assert not hidden, f"{package.__name__} hides its modules {hidden}"


MOST_CALLS = 12
"""Functions of the package from the call of an adapted Linear to C++; under no_grad the watch for cut graphs is one."""


@pytest.mark.parametrize("training", [True, False])
def test_the_way_to_the_operators_is_short(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python benchmarks/calls.py --list` prints the calls."""
    if not mapsurgery.native_info().cpu:
        pytest.skip("no native library is loaded")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    calls = importlib.import_module("calls").forward_calls(training)
    assert calls.before_operator
    assert calls.counts(calls.before_operator)["library"] <= MOST_CALLS, calls.found
