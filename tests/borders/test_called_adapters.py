"""The child `adapter` is called in each forward of its layer, so that hooks put on it act."""

from __future__ import annotations

import pytest
import torch
from homes import COMPUTED, PLAIN, QUANTISED, Case, of_cases
from torch import nn

import mapsurgery
from mapsurgery.methods import Adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*matmul_4bit.*:DeprecationWarning"),
]


def adapters(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


@of_cases(*PLAIN, *COMPUTED, *QUANTISED)
def test_hooks_on_an_adapter_fire_in_each_forward(case: Case) -> None:
    """Forward hooks before and after, of every adapter, each time the model runs, with and without gradient."""
    model = case.patch(case.built())
    before, after = [], []
    for adapter in adapters(model):
        adapter.register_forward_pre_hook(lambda module, args: before.append(module))
        adapter.register_forward_hook(lambda module, args, output: after.append(module))
    for grad in (True, False):
        before.clear(), after.clear()
        with torch.set_grad_enabled(grad):
            model(case.data())
            assert set(before) == set(after) == set(adapters(model))
            once = len(before)
            model(case.data())
        assert len(before) == 2 * once


@of_cases(*PLAIN, *COMPUTED, *QUANTISED)
def test_hooks_change_no_number(case: Case) -> None:
    """A hooked model computes what it computed without hooks."""
    model = case.patch(case.built())
    expected = model(case.data())
    for adapter in adapters(model):
        adapter.register_forward_hook(lambda module, args, output: None)
    assert torch.equal(model(case.data()), expected)


def test_a_hook_may_replace_the_output() -> None:
    """What a forward hook on a fused layer's adapter returns is the layer's output."""
    torch.manual_seed(0)
    model = mapsurgery.patch(nn.Sequential(nn.Linear(6, 5)), "*", rank=2)
    model[0].adapter.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(model(torch.ones(2, 6)), 2 * nn.functional.linear(torch.ones(2, 6), *_base(model[0])))


def _base(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer._parameters["weight"], layer.bias


def test_a_backward_hook_on_an_adapter_fires() -> None:
    """register_full_backward_hook, by which FSDP and profilers follow a module."""
    torch.manual_seed(0)
    model = mapsurgery.patch(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), "*", rank=2)
    seen = []
    for adapter in adapters(model):
        adapter.register_full_backward_hook(lambda module, inputs, outputs: seen.append(module))
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert set(seen) == set(adapters(model))


def test_inside_disabled_no_adapter_runs() -> None:
    """The base computes alone there."""
    model = mapsurgery.patch(nn.Sequential(nn.Linear(6, 5)), "*", rank=2)
    seen = []
    model[0].adapter.register_forward_hook(lambda module, args, output: seen.append(module))
    with mapsurgery.disabled(model):
        model(torch.ones(2, 6))
    assert not seen
