"""Patched models as files that run without their Python: `export`."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._atomic_write import folder_beside
from ._example import arguments
from .interrupts import undone_by
from .surgery.merge import merge
from .surgery.record import all_sites, find_patched, intact_sites

_SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
_NAMESPACE = "mapsurgery"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote; ``str()`` of it is a message.

    Attributes:
        files: the file asked for, and the weights beside it where ONNX needs a second one (2 GiB and more).
        format: "pt2", "aoti" or "onnx".
        merged: the file holds W' instead of W, A, B, alpha and beta.
        operators: operators of mapsurgery that are called by the program; none means that it runs without the library.
        size: bytes of all files.
        deviation: largest absolute difference of any output from the model's own on the example.
        relative_deviation: that of each output over the largest value in it, the largest of these.
    """

    files: tuple[Path, ...]
    format: str
    merged: bool
    operators: tuple[str, ...]
    size: int
    deviation: float
    relative_deviation: float

    def __str__(self) -> str:
        what = {"pt2": "torch.export program", "aoti": "AOTInductor package", "onnx": "ONNX model"}[self.format]
        needs = f"calls {', '.join(self.operators)}" if self.operators else "needs no mapsurgery to run"
        return (
            f"{self.files[0]}: {what}, {'merged' if self.merged else 'adapters apart'}, {_human(self.size)}; {needs}; "
            f"largest deviation from eager on the example {self.deviation:.2g} (relative {self.relative_deviation:.2g})"
        )


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    dynamic_shapes: Any = None,
    format: str = "pt2",
    merged: bool = False,
    operators: bool | None = None,
    strict: bool = False,
) -> Exported:
    """Write a patched model in eval mode to one file, load that file and compare it with the model on the example.

    The model is left as it was. With `merged`, W' is computed in a copy that shares every tensor with the model but the
    adapted weights: merging in place and back would not be exact to the bit.

    Args:
        path: ends in .pt2 ("pt2", "aoti") or .onnx. Written beside its destination and renamed, so that a failure
            leaves what was there.
        example_inputs: positional arguments of the model's forward as a tuple, keyword arguments as a mapping (a
            dictionary, transformers' BatchEncoding), or a single tensor. A tuple or mapping that the forward's
            signature cannot take so is its one argument.
        dynamic_shapes: as for ``torch.export.export``; None: the shapes of the example only.
        format: "pt2", a program that ``torch.export.load`` reads; "aoti", a package compiled for this machine's kind of
            processor, for C++ or ``torch._inductor.aoti_load_package``; "onnx" (``pip install mapsurgery[onnx]``).
        merged: the file holds the merged weights and plain layers; else A, B, alpha and beta stay tensors of their own,
            under their names in the state_dict.
        operators: whether the program calls the operators of mapsurgery, and so needs the library where it runs, or
            core ATen operators alone. None: core ATen for "pt2" and "onnx", which are made to be carried elsewhere, and
            operators for "aoti", whose program is built for one place and gets the native kernels there.
        strict: as for ``torch.export.export``.

    Returns:
        A printable `Exported`.

    Raises:
        ValueError: the model is not patched or in training mode, an adapter is disabled, on meta or not finite, the
            format is unknown, the path has another suffix, `operators` does not go with the rest, or the model does not
            run on `example_inputs`. Nothing is written.
        ImportError: packages that "onnx" needs are missing.
        OSError: the file cannot be written.
        Exception: whatever torch raises if it cannot export the model.
    """
    keeps = _checked_operators(format, merged, operators)
    destination = _checked_path(path, format)
    _check_packages(format)
    _check_model(model)
    args, kwargs = _arguments(model, example_inputs)
    with torch.no_grad():
        expected = _run(model, args, kwargs)
        with _merged_copy(model) if merged else _itself(model) as source:
            program = torch.export.export(source, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
        if not (keeps or merged or format == "onnx"):  # whose exporter does the same
            program = program.run_decompositions()
        with _beside(destination) as temporary:
            found = _WRITERS[format](program, temporary, args, kwargs)
            written = sorted(temporary.parent.iterdir(), key=lambda file: file == temporary)
            size = sum(file.stat().st_size for file in written)
            for file in written:  # the model itself last: it names the others
                os.replace(file, destination.parent / file.name)
    absolute, relative = _deviation(found, expected)
    files = tuple(destination.parent / file.name for file in reversed(written))
    called = _operators_of(program) if keeps else ()
    return Exported(files, format, merged, called, size, absolute, relative)


# Checks, before anything is computed or written ------------------------------------------------------------------


def _checked_operators(format: str, merged: bool, operators: bool | None) -> bool:
    """Whether operators of the library are kept."""
    if format not in _SUFFIXES:
        raise ValueError(f"format must be one of {', '.join(map(repr, _SUFFIXES))}, got {format!r}")
    if operators and merged:
        raise ValueError("a merged model calls no operator of mapsurgery: leave out operators=True or merged=True")
    if operators and format == "onnx":
        raise ValueError("ONNX knows no operator of mapsurgery: leave out operators=True")
    return not merged and (format == "aoti" if operators is None else operators)


def _checked_path(path: str | os.PathLike[str], format: str) -> Path:
    destination = Path(os.path.realpath(os.fspath(path)))  # a link stays one
    if destination.suffix != _SUFFIXES[format]:
        raise ValueError(f"a file of format {format!r} must end in {_SUFFIXES[format]}, got {os.fspath(path)!r}")
    if destination.is_dir():
        raise IsADirectoryError(f"{destination} is a folder: give the path of a file")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"the folder {destination.parent} does not exist: make it before exporting")
    if not os.access(destination.parent, os.W_OK):
        raise PermissionError(f"cannot write into the folder {destination.parent}: choose another path")
    return destination


def _check_packages(format: str) -> None:
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"export to ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _check_model(model: nn.Module) -> None:
    root, record = find_patched(model)
    if model.training:
        raise ValueError("the model is in training mode, dropout and batch statistics would be exported: model.eval()")
    for site in intact_sites(root, record):
        adapter = site.adapter
        if not adapter.enabled:
            raise ValueError(f"{site.path} is disabled: export outside of mapsurgery.disabled")
        if adapter.pending or adapter.weight_norm.is_meta:
            raise ValueError(f"{site.path}: its weight is not loaded (meta device): load it before exporting")
        for name, parameter in adapter.own_parameters().items():
            if not parameter.isfinite().all():
                raise ValueError(f"{site.path}: {name} holds NaN or infinite values")


def _arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if not isinstance(example, Tensor | tuple | Mapping):
        raise ValueError(
            f"example_inputs must be a tensor, a tuple of positional or a dictionary of keyword arguments, "
            f"got {type(example).__name__}"
        )
    return arguments(model, example)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The model's own outputs on the example."""
    try:
        outputs = _tensors(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))  # a model may fill a cache it is given
    except Exception as error:
        raise ValueError(f"the model does not run on example_inputs: {type(error).__name__}: {error}") from error
    if not outputs:
        raise ValueError("the model's output on example_inputs holds no tensor to compare")
    return outputs


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


# The model that is exported --------------------------------------------------------------------------------------


@contextmanager
def _itself(model: nn.Module) -> Iterator[nn.Module]:
    yield model


@contextmanager
def _merged_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A merged copy that holds adapted weights of its own and shares the other tensors."""
    adapted = {id(site.base) for site in all_sites(model)}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in adapted}
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]

    def put_back() -> None:
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)

    with undone_by(put_back):  # merging gives back those from before `patch`, here of shared parameters
        yield merge(copy.deepcopy(model, shared), final=True)


# Writing: each writes the program to a file, loads it, and returns its outputs on the example --------------------


def _write_pt2(program: Any, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    torch.export.save(program, path)
    return _tensors(torch.export.load(path).module()(*copy.deepcopy(args), **copy.deepcopy(kwargs)))


_UPDATABLE = {
    # Else a vector of up to 8 elements (alpha, beta) is written into the code, and an update of it changes nothing.
    "always_keep_tensor_constants": True,
    # The defaults; folding would keep what was computed from the first adapter.
    "freezing": False,
    "aot_inductor.use_runtime_constant_folding": False,
}
"""Settings of Inductor under which the adapters can be exchanged in a compiled package."""


def _write_aoti(program: Any, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    aoti_compile_and_package(program, package_path=str(path), inductor_configs=_UPDATABLE)
    return _tensors(aoti_load_package(str(path))(*copy.deepcopy(args), **copy.deepcopy(kwargs)))


_ONNX_LIMIT = 2**31 - 2**24
"""Bytes of weights that one protobuf file holds, less room for the graph."""


def _write_onnx(program: Any, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    import onnxruntime

    onnx_program: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    weights = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    onnx_program.save(str(path), external_data=weights > _ONNX_LIMIT)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    given = {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}
    return [torch.as_tensor(value) for value in session.run(None, given)]


_WRITERS: dict[str, Callable[..., list[Tensor]]] = {"pt2": _write_pt2, "aoti": _write_aoti, "onnx": _write_onnx}


@contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside the destination, on the same file system."""
    with folder_beside(str(destination)) as folder:
        yield Path(folder) / destination.name


# What was written ------------------------------------------------------------------------------------------------


def _operators_of(program: Any) -> tuple[str, ...]:
    """Names of the operators of this library that a program calls, in subgraphs (branches, checkpoints) too."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes}
    names = {t.name() for t in targets if isinstance(t, torch._ops.OpOverload)}
    return tuple(sorted(name for name in names if name.startswith(f"{_NAMESPACE}::")))


def _deviation(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Largest absolute and relative difference; NaN if a number is NaN on one side only."""
    absolute = relative = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.numel() == 0:
            continue
        a, b = a.to(b.device).double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())  # of a mask's infinities the difference is NaN
        difference = torch.where(same, 0.0, (a - b).abs()).max().item()
        size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        absolute = _larger(absolute, difference)
        relative = _larger(relative, difference / size if size else difference)
    return absolute, relative


def _larger(a: float, b: float) -> float:
    return b if b > a or b != b else a


def _human(size: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.3g} GiB"
