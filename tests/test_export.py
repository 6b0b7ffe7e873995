"""Exported programs: core ATen after `run_decompositions()`, files that load without the library, and `export`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import CASES, STARTS, Case, Snapshot, image, net, patched_case, start_name, to_generic_point
from exporting import dtypes, not_core, or_torch_cannot, own_operators
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import register_parametrization

import mapsurgery
from mapsurgery.ops import operators

_DYNAMIC = ({0: torch.export.Dim("batch")},)
_LAYERS = ["linear_own_forward", "transformers_conv1d", "conv2d", "conv2d_depthwise"]
few_layers = pytest.mark.parametrize("case", [c for c in CASES if c.name in _LAYERS], ids=str)
every_tracer = pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.long)], ids=["", "strict"]
)


def _patched(**options: Any) -> nn.Module:
    return to_generic_point(mapsurgery.patch(net().eval(), "*", rank=2, **options))


def _small() -> tuple[nn.Module, Tensor]:
    """What is exported in a moment, and its input."""
    return to_generic_point(mapsurgery.patch(nn.Sequential(nn.Linear(5, 4)).eval(), "*", rank=2)), torch.randn(2, 5)


# Decompositions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True], ids=["", "B_is_0"])
@pytest.mark.parametrize("init", STARTS, ids=start_name)
def test_scales_without_float64_are_those_of_the_definition(init: mapsurgery.Init, zero: bool) -> None:
    A, B = torch.randn(2, 7), torch.randn(5, 2) * (not zero)
    numbers = (torch.full((1,), value) for value in (0.9, 0.4, 3.0))
    leaves = [t.requires_grad_() for t in (A, B, *numbers)]
    rest = (init.tau, init.relative)
    found, expected = operators.scales_in(None, *leaves, *rest), operators.map_scales(*leaves, *rest)
    assert {t.dtype for t in found} == {torch.float32}
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    grads = [torch.autograd.grad(2 * s_w + 3 * s_d, leaves[:4]) for s_w, s_d, *_ in (found, expected)]
    for got, want in zip(*grads, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("options", "most"), [({}, 29), ({"init": "zero"}, 54), ({"method": "lora"}, 12)], ids=str)
def test_a_decomposed_linear_layer_is_small(options: dict[str, Any], most: int) -> None:
    """Nothing serves the backward alone, and a softened norm needs no cases: it is never 0."""
    layer = to_generic_point(mapsurgery.patch(nn.Linear(5, 4), "*", rank=2, **options)).eval()
    program = torch.export.export(layer, (torch.randn(3, 5),)).run_decompositions()
    assert sum(node.op == "call_function" for node in program.graph.nodes) <= most


@few_layers
def test_a_layer_becomes_core_aten_in_its_own_dtype(case: Case) -> None:
    _, adapted, x = patched_case(case)
    program = torch.export.export(adapted, (x,))
    decomposed = program.run_decompositions()
    assert not own_operators(decomposed) and not not_core(decomposed)
    assert dtypes(decomposed) <= {torch.float32, torch.bool}
    torch.testing.assert_close(decomposed.module()(x), adapted(x), rtol=1e-5, atol=1e-5)


def test_any_table_leaves_no_operator() -> None:
    program = torch.export.export(_patched(), (image(),))
    expected = {f"mapsurgery::{name}" for name in ("map_scales", "lowrank_linear", "lowrank_conv")}
    assert own_operators(program) == expected
    assert not own_operators(program.run_decompositions({}))


def test_an_exported_embedding_computes_in_float32() -> None:
    model = to_generic_point(mapsurgery.patch(nn.Sequential(nn.Embedding(9, 6)), "*", rank=2))
    ids = torch.tensor([[1, 5, 8]])
    program = torch.export.export(model, (ids,)).run_decompositions()
    assert torch.float64 not in dtypes(program) and not not_core(program)
    torch.testing.assert_close(program.module()(ids), model(ids))


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_decomposed_embedding_bag_is_for_inference_as_with_any_computed_weight() -> None:
    """torch picks the form without a gradient, since a computed weight has none where it decomposes."""
    parametrised = nn.Sequential(nn.EmbeddingBag(9, 6))
    register_parametrization(parametrised[0], "weight", _Twice())
    patched = to_generic_point(mapsurgery.patch(nn.Sequential(nn.EmbeddingBag(9, 6)), "*", rank=2))
    ids = torch.tensor([[1, 5, 8], [2, 2, 0]])
    for model in (parametrised, patched):
        program = torch.export.export(model, (ids,)).run_decompositions().module()
        with torch.no_grad():
            torch.testing.assert_close(program(ids), model(ids))
        with pytest.raises(RuntimeError):
            program(ids)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.long), torch.bfloat16], ids=str)
def test_a_cast_model_is_decomposed_in_its_dtype(dtype: torch.dtype) -> None:
    model, x = _patched().to(dtype), image().to(dtype)
    program = torch.export.export(model, (x,)).run_decompositions()
    assert program.module()(x).dtype == dtype and not own_operators(program)
    assert (torch.float64 in dtypes(program)) == (dtype == torch.float64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=20 * torch.finfo(dtype).eps, atol=0.05)


@every_tracer
def test_a_decomposed_model_takes_any_batch(strict: bool) -> None:
    model = _patched()
    program = torch.export.export(model, (image(),), dynamic_shapes=_DYNAMIC, strict=strict).run_decompositions()
    for n in (1, 2, 9):
        torch.testing.assert_close(program.module()(image(n)), model(image(n)), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_torch_compile_keeps_the_operators() -> None:
    from torch._dynamo.backends.common import aot_autograd

    seen = []
    backend = aot_autograd(fw_compiler=lambda graph, _: seen.append("mapsurgery" in graph.code) or graph.forward)
    torch.compile(mapsurgery.patch(nn.Linear(4, 4), "*", rank=2), backend=backend)(torch.randn(2, 4))
    assert seen == [True]


# Training graphs -----------------------------------------------------------------------------------------------------


@every_tracer
def test_an_exported_program_trains_as_the_model_does(strict: bool) -> None:
    model = mapsurgery.patch(net().double(), "*", rank=2, init="zero").train()
    x = image().double()
    program = torch.export.export(model, (x,), strict=strict)
    trained = program.module()
    trained(x).square().sum().backward()
    model(x).square().sum().backward()
    found = dict(trained.named_parameters())
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert expected and all(grad is not None for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name].grad, grad, rtol=1e-9, atol=1e-10)


def test_a_joint_graph_is_aten_with_the_closed_form_gradients() -> None:
    from torch._functorch.aot_autograd import aot_export_joint_simple

    layer = to_generic_point(mapsurgery.patch(nn.Linear(5, 4).double(), "*", rank=2))
    names, state = list(layer.state_dict()), list(layer.state_dict().values())
    own = {f"adapter.{name}" for name in layer.adapter.own_parameters()}
    x = torch.randn(3, 5, dtype=torch.float64)

    leaves = [t.detach().clone().requires_grad_(name in own) for name, t in zip(names, state, strict=True)]
    joint = aot_export_joint_simple(lambda x, *tensors: _loss(layer, names, x, tensors), (x, *leaves), trace_joint=True)
    assert "mapsurgery" not in joint.code
    (value,), grads = joint((x, *leaves), (torch.ones((), dtype=torch.float64),))
    expected_value = _loss(layer, names, x, leaves)[0]
    expected = torch.autograd.grad(expected_value, [t for t in leaves if t.requires_grad])
    torch.testing.assert_close(value, expected_value)
    found = [grad for grad in grads if grad is not None]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def _loss(layer: nn.Module, names: list[str], x: Tensor, tensors: Any) -> tuple[Tensor]:
    return (functional_call(layer, dict(zip(names, tensors, strict=True)), (x,)).square().sum(),)


# Structure, and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True], ids=["operators", "decomposed"])
def test_unflatten_keeps_the_names_of_modules_and_parameters(decomposed: bool) -> None:
    model = _patched()
    program = torch.export.export(model, (image(),))
    tree = torch.export.unflatten(program.run_decompositions() if decomposed else program)
    assert {name for name, _ in tree.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert {"stem", "body.0", "body.2", "head"} <= {path for path, _ in tree.named_modules()}
    torch.testing.assert_close(tree(image()), model(image()), rtol=1e-5, atol=1e-5)


_WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "mapsurgery":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
import torch

"""


def _without_the_library(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that cannot import mapsurgery."""
    command = [sys.executable, "-I", "-c", _WITHOUT + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


_RUN = """
*programs, operators, x, y = sys.argv[1:]
for program in programs:
    torch.testing.assert_close(torch.export.load(program).module()(torch.load(x)), torch.load(y), rtol=1e-4, atol=1e-5)
try:
    torch.export.load(operators)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_files_run_where_the_library_is_not_or_say_what_is_missing(tmp_path) -> None:
    model = _patched()
    mapsurgery.export(model, tmp_path / "decomposed.pt2", image(), dynamic_shapes=_DYNAMIC)
    mapsurgery.export(model, tmp_path / "merged.pt2", image(), dynamic_shapes=_DYNAMIC, merged=True)
    torch.save(image(7), tmp_path / "x.pt")
    torch.save(model(image(7)).detach(), tmp_path / "y.pt")
    small, x = _small()
    mapsurgery.export(small, tmp_path / "operators.pt2", x, operators=True)
    names = ("decomposed.pt2", "merged.pt2", "operators.pt2", "x.pt", "y.pt")
    done = _without_the_library(_RUN, *(tmp_path / name for name in names))
    assert done.returncode == 0, done.stderr
    assert "error when deserializing" in done.stdout
    assert "failed to resolve torch.ops.mapsurgery." in done.stderr and "import the custom op" in done.stderr


# mapsurgery.export ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"operators": True}, {"merged": True}], ids=["aten", "operators", "merged"])
def test_what_was_written_is_told_and_the_model_is_left_as_it_was(options: dict[str, bool], tmp_path) -> None:
    model = _patched(train="norm")
    snapshot = Snapshot(model)
    path = tmp_path / "m.pt2"
    result = mapsurgery.export(model, path, image(), dynamic_shapes=_DYNAMIC, **options)
    snapshot.assert_holds(model)
    assert result.files == (path,) and result.size == path.stat().st_size and os.listdir(tmp_path) == ["m.pt2"]
    assert result.relative_deviation < 1e-5
    assert bool(result.operators) == ("operators" in options)
    for part in (str(path), "torch.export program", "KiB", f"{result.deviation:.2g}"):
        assert part in str(result)
    program = torch.export.load(path)
    torch.testing.assert_close(program.module()(image(2)), model(image(2)), rtol=1e-5, atol=1e-5)
    assert ("stem.adapter.A" in program.state_dict) != ("merged" in options)


def test_a_merged_copy_shares_what_is_not_adapted() -> None:
    merged_copy = sys.modules["mapsurgery._export"]._merged_copy
    model = to_generic_point(mapsurgery.patch(net().eval(), "body*", rank=2))
    with merged_copy(model) as merged:
        assert merged.stem.weight is model.stem.weight and merged.head.weight is model.head.weight
        assert type(merged.body[0]) is nn.Linear
        assert not torch.equal(merged.body[0].weight, model.body[0].get_parameter("weight"))


def test_keyword_arguments_are_given_as_a_dictionary(tmp_path) -> None:
    model, x = _small()
    result = mapsurgery.export(model, tmp_path / "m.pt2", {"input": x}, dynamic_shapes={"input": {0: _DYNAMIC[0][0]}})
    assert torch.export.load(result.files[0]).module()(input=torch.randn(3, 5)).shape == (3, 4)


def test_a_deviation_is_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["mapsurgery._export"]  # the name itself is the function
    write = module._WRITERS["pt2"]
    monkeypatch.setitem(module._WRITERS, "pt2", lambda *args: [output * 1.5 for output in write(*args)])
    model, x = _small()
    result = mapsurgery.export(model, tmp_path / "m.pt2", x)
    assert result.relative_deviation == pytest.approx(0.5, rel=1e-4) and result.deviation > 0


def _refused(model: nn.Module, path: Any, example: Any = None, **options: Any) -> str:
    folder = Path(path).parent
    before = sorted(os.listdir(folder)) if folder.is_dir() else None
    with pytest.raises((ValueError, OSError, ImportError)) as error:
        mapsurgery.export(model, path, image() if example is None else example, **options)
    assert before is None or sorted(os.listdir(folder)) == before
    return str(error.value)


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = _patched(), tmp_path / "m.pt2"
    assert "'torchscript'" in _refused(model, path, format="torchscript")
    assert "must end in .onnx" in _refused(model, path, format="onnx")
    assert "must end in .pt2" in _refused(model, tmp_path / "m.pt")
    assert "does not exist" in _refused(model, tmp_path / "nowhere" / "m.pt2")
    assert "operators=True" in _refused(model, path, operators=True, merged=True)
    assert "operators=True" in _refused(model, tmp_path / "m.onnx", operators=True, format="onnx")
    assert "is not patched" in _refused(net().eval(), path)
    assert "model.eval()" in _refused(_patched().train(), path)
    assert "does not run on example_inputs" in _refused(model, path, torch.randn(2, 5))
    assert "got list" in _refused(model, path, [image()])
    with mapsurgery.disabled(model):
        assert "is disabled" in _refused(model, path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install onnx onnxscript onnxruntime" in _refused(model, tmp_path / "m.onnx", format="onnx")
    with torch.no_grad():
        model.head.adapter.beta.fill_(float("nan"))
    assert "head: beta holds NaN" in _refused(model, path)


def test_a_failure_leaves_the_file_that_was_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"before")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    model, x = _small()
    assert "No space left" in _refused(model, path, x)
    assert path.read_bytes() == b"before"


# ONNX and AOTInductor ------------------------------------------------------------------------------------------------


def test_the_onnx_exporter_needs_to_know_nothing_of_the_library(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = to_generic_point(mapsurgery.patch(nn.Sequential(nn.Linear(5, 4), nn.ReLU()).eval(), "*", rank=2))
    path, x = str(tmp_path / "m.onnx"), torch.randn(3, 5)
    torch.onnx.export(model, (torch.randn(2, 5),), path, dynamo=True, dynamic_shapes=_DYNAMIC, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_package_of_aotinductor_calls_the_operators_and_names_its_constants(tmp_path) -> None:
    model = to_generic_point(mapsurgery.patch(nn.Sequential(nn.Linear(5, 4)).eval(), "*", rank=2))
    options = {"dynamic_shapes": _DYNAMIC, "format": "aoti"}
    with torch._inductor.config.patch("aot_inductor.precompile_headers", False):  # for one model they cost a half more
        result = or_torch_cannot(
            lambda: mapsurgery.export(model, tmp_path / "m.pt2", torch.randn(2, 5), **options), lambda: _aoti(tmp_path)
        )
    assert result.operators == ("mapsurgery::lowrank_linear", "mapsurgery::map_scales")
    assert result.relative_deviation < 1e-5
    package = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    names = set(package.get_constant_fqns())
    assert {f"0.adapter.{name}" for name in ("A", "B", "alpha", "beta")} | {"0.weight"} <= names
    x = torch.randn(3, 5)
    with torch.no_grad():
        for parameter in model[0].adapter.own_parameters().values():
            parameter.mul_(2)
        state = {name: t for name, t in model.state_dict().items() if name in names}
        package.load_constants(state, check_full_update=False)
        torch.testing.assert_close(package(x), model(x), rtol=1e-5, atol=1e-6)


def _aoti(folder: Path) -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(5, 4)).eval(), (torch.randn(2, 5),))
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "unpatched.pt2"))
