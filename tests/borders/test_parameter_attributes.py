"""What hangs on a Parameter is on what `layer.weight` reads as: its attributes, that it is a Parameter and a leaf."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from homes import REFUSALS, OwnForward, registered, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mapsurgery


class Width:
    """mup's InfShape, as far as a forward asks for it."""

    def width_mult(self) -> float:
        return 4.0


class Readout(nn.Linear):
    """mup's MuReadout: its forward divides by the width that hangs on its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.weight.infshape.width_mult())


class Flagged(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if getattr(self.weight, "no_bias", False) else super().forward(x)


def adapted(cls: type[nn.Linear] = nn.Linear, **attributes: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(cls(8, 6))
    for name, value in attributes.items():
        setattr(model[0].weight, name, value)
    return trained(mapsurgery.patch(model, "*", rank=2))


def data() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=[True, False], ids=["grad", "no_grad"])
def _grad(request: pytest.FixtureRequest):
    with torch.set_grad_enabled(request.param):
        yield


@pytest.mark.parametrize("cls", [nn.Linear, OwnForward])
def test_attributes_of_the_parameter_are_on_what_is_read(cls: type[nn.Linear], _grad: None) -> None:
    width = Width()
    layer = adapted(cls, infshape=width, sequence_parallel=True)[0]
    assert layer.weight.infshape is width and layer.weight.sequence_parallel is True
    assert hasattr(layer.weight, "infshape") and not hasattr(layer.weight, "tensor_model_parallel")
    assert getattr(layer.weight, "tensor_model_parallel", 3) == 3
    layer.weight.partition_dim = 1
    assert registered(layer).partition_dim == 1 and layer.weight.partition_dim == 1
    del layer.weight.partition_dim
    assert not hasattr(registered(layer), "partition_dim")
    with pytest.raises(AttributeError, match="partition_dim"):
        _ = layer.weight.partition_dim
    with mapsurgery.disabled(layer):
        assert layer.weight.infshape is width


@pytest.mark.parametrize("cls", [nn.Linear, OwnForward])
def test_it_is_a_parameter_and_a_leaf(cls: type[nn.Linear], _grad: None) -> None:
    layer = adapted(cls)[0]
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.is_leaf
    assert not isinstance(layer.weight.detach(), nn.Parameter) and not isinstance(layer.weight[0], nn.Parameter)
    assert not isinstance(layer.weight * 1, nn.Parameter)
    assert str(layer.weight).startswith("Parameter containing:")
    copied = copy.deepcopy(layer.weight)
    assert isinstance(copied, nn.Parameter) and torch.equal(copied, layer.weight.detach())


def test_a_computed_weight_is_no_parameter() -> None:
    """As in the plain layer."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)))
    mapsurgery.patch(model, "*", rank=2)
    assert not isinstance(model[0].weight, nn.Parameter) and not model[0].weight.is_leaf


def test_forwards_that_read_attributes_compute_what_they_did(_grad: None) -> None:
    layer = adapted(Readout, infshape=Width())[0]
    torch.testing.assert_close(layer(data()), F.linear(data() / 4, layer.weight, layer.bias))
    layer = adapted(Flagged, no_bias=True)[0]
    torch.testing.assert_close(layer(data()), F.linear(data(), layer.weight))


def test_so_they_do_where_the_weight_cannot_wait() -> None:
    """Under a dispatch mode and under torch.func W' is an ordinary tensor."""
    model = adapted(Flagged, no_bias=True)
    expected = model(data())
    with FlopCounterMode(display=False):
        torch.testing.assert_close(model(data()), expected)
    torch.testing.assert_close(torch.vmap(model)(data()), expected)


@pytest.mark.parametrize("cls", [Flagged, Readout])
def test_so_they_do_compiled(cls: type[nn.Linear], _fresh_compiler: None) -> None:
    model = adapted(cls, no_bias=True, infshape=Width())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(data()), model(data()))


def _ties(layer: nn.Module) -> None:
    nn.Linear(8, 6).weight = layer.weight


def _registers(layer: nn.Module) -> None:
    nn.Module().register_parameter("weight", layer.weight)


def _lists(layer: nn.Module) -> None:
    nn.ParameterList([layer.weight])


def _wraps(layer: nn.Module) -> None:
    nn.Parameter(layer.weight, requires_grad=False)


def _optimises(layer: nn.Module) -> None:
    torch.optim.AdamW([layer.weight])


def _hooks(layer: nn.Module) -> None:
    layer.weight.register_post_accumulate_grad_hook(print)


@pytest.mark.parametrize("take", [_ties, _registers, _lists, _wraps, _optimises, _hooks])
def test_nobody_keeps_the_computed_weight_for_a_parameter(take: Any, _grad: None) -> None:
    """It would be the W' of that moment, which nothing trains."""
    layer = adapted()[0]
    before = {name: p for name, p in layer.named_parameters()}
    with pytest.raises(REFUSALS):
        take(layer)
    assert before.keys() == dict(layer.named_parameters()).keys()


def test_the_parameter_itself_can_be_tied() -> None:
    layer, head = adapted()[0], nn.Linear(8, 6)
    head.weight = layer.get_parameter("weight")
    assert head.weight is registered(layer)
