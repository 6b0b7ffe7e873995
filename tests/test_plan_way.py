"""The way in which the plan says that a layer is computed, beside the operators that it then runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from definition import to_generic_point
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import mapsurgery
from mapsurgery.updates import REGISTRY

# A layer, its input, the operator that it is fused in, and those of torch that make the output.
_PRODUCTS, _CONVOLUTION = ("aten::mm", "aten::addmm"), ("aten::convolution",)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, tuple[str, ...]]] = {
    "linear": (lambda: nn.Linear(24, 20), lambda: torch.randn(3, 24), "lowrank_linear", _PRODUCTS),
    "transformers_conv1d": (lambda: Conv1D(20, 24), lambda: torch.randn(3, 24), "lowrank_linear", _PRODUCTS),
    "conv": (lambda: nn.Conv2d(24, 40, 3), lambda: torch.randn(1, 24, 5, 5), "lowrank_conv", _CONVOLUTION),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), lambda: torch.randn(1, 6, 9), "lowrank_conv", _CONVOLUTION),
    "embedding": (lambda: nn.Embedding(30, 24), lambda: torch.arange(4), "lowrank_linear", ("aten::embedding",)),
    "transposed": (lambda: nn.ConvTranspose1d(6, 6, 3), lambda: torch.randn(1, 6, 9), "lowrank_conv", _CONVOLUTION),
}


class _Operators(TorchDispatchMode):
    """Names of the operators that run, and of those that read the memory of W."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.memory = W.untyped_storage().data_ptr()
        self.run: set[str] = set()
        self.on_base: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        self.run.add(name)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.untyped_storage().data_ptr() == self.memory for t in tensors):
            self.on_base.add(name)
        return func(*args, **(kwargs or {}))


def _way_of_a_call(layer: nn.Module, x: Tensor, fused: str, products: tuple[str, ...]) -> str:
    with _Operators(layer.get_parameter("weight")) as operators:
        layer(x)
    assert operators.run & {f"mapsurgery::{fused}", *products}
    if f"mapsurgery::{fused}" in operators.run:
        return "fused"
    return "beside" if operators.on_base & set(products) else "effective"


@pytest.mark.parametrize("update", REGISTRY)
@pytest.mark.parametrize(("method", "dropout"), [("map", 0.0), ("map", 0.5), ("lora", 0.5), ("dora", 0.0)])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_way_of_a_layer_is_the_one_that_it_then_goes(kind: str, method: str, update: str, dropout: float) -> None:
    torch.manual_seed(0)
    make, x, fused, products = LAYERS[kind]
    layer, options = make(), {"rank": 2, "method": method, "update": update, "dropout": dropout}
    (planned,) = mapsurgery.plan(layer, "*", **options).layers
    to_generic_point(mapsurgery.patch(layer, "*", **options))
    assert planned.way == _way_of_a_call(layer.train(), x(), fused, products)
    assert planned.way_in_eval == _way_of_a_call(layer.eval(), x(), fused, products)


def test_the_cases_see_every_way() -> None:
    model = nn.ModuleDict({kind: make() for kind, (make, *_) in LAYERS.items()})
    others = {"embedding": "beside", "transposed": "effective"}
    for method in ("map", "lora", "dora"):
        fused = {layer.path: layer.way for layer in mapsurgery.plan(model, "*", rank=2, method=method).layers}
        assert fused == dict.fromkeys(LAYERS, "fused") | others
    dense = {layer.path: layer.way for layer in mapsurgery.plan(model, "*", rank=2, update="dense").layers}
    assert dense == dict.fromkeys(LAYERS, "beside") | others | {"conv": "effective", "depthwise": "effective"}


def _ways_in(table: str) -> dict[str, str]:
    """The first word, and the words of the column "way", of each row."""
    lines = table.splitlines()
    head = next(line for line in lines if "way" in line and "layer" in line)
    start, end = head.index("way"), head.index("rank")
    return {
        line.split()[0]: line[start:end].strip() for line in lines if line[start - 1 : start] == " " and line.strip()
    }


def test_the_table_says_the_way_in_words() -> None:
    model = nn.ModuleDict({kind: make() for kind, (make, *_) in LAYERS.items()})
    ways = _ways_in(mapsurgery.plan(model, "*", rank=2, update="lokr").table())
    assert ways["linear"] == ways["embedding"] == "beside" and ways["conv"] == ways["transposed"] == "effective"
    ways = _ways_in(mapsurgery.plan(model, "*", rank=2, dropout=0.1).table())
    assert ways["linear"] == "beside, in eval mode fused" and ways["embedding"] == "beside"


@pytest.mark.parametrize("update", REGISTRY)
def test_the_way_is_known_of_layers_without_values(update: str) -> None:
    (on_meta,) = mapsurgery.plan(nn.Linear(24, 20, device="meta"), "*", rank=2, update=update).layers
    with FakeTensorMode():
        (fake,) = mapsurgery.plan(nn.Linear(24, 20), "*", rank=2, update=update).layers
        assert fake.way == on_meta.way
    assert on_meta.way in ("fused", "beside")


def test_a_subclass_of_linear_with_groups_of_its_own_is_no_convolution() -> None:
    class Grouped(nn.Linear):
        groups = 4

    (planned,) = mapsurgery.plan(Grouped(24, 20), "*", rank=2, update="dense").layers
    assert planned.way == "beside"
