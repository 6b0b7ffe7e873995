"""Rebalancing evens the factors' norms out and leaves everything else, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from definition import image, net, train_steps
from torch import nn

import mapsurgery
from mapsurgery.contrib import rebalance
from mapsurgery.contrib.rebalancing import _exponents
from mapsurgery.surgery import record

FACTORS = {
    "lora": ["A", "B"],
    "pissa": ["A", "B"],
    "olora": ["A", "B"],
    "vera": ["d", "b"],
    "loha": ["A1", "B1", "A2", "B2"],
    "lokr": ["C", "D", "D_a", "D_b"],
    "flora": ["U", "G", "V"],
}


def _trained(update: str = "lora", method: str = "map", unbalance: bool = True, **options: object) -> nn.Module:
    """A trained model, whose first factors are then scaled away from the others by no power of two."""
    model = mapsurgery.patch(net(), "*", rank=2, method=method, update=update, **options)
    train_steps(model, image())
    with torch.no_grad():
        for site in record.all_sites(model):
            for name in site.adapter.own_tensors():
                if unbalance and name.rstrip("0") == FACTORS[update][0]:
                    getattr(site.adapter, name).mul_(300)
    return model


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [site.adapter("effective_weight", site.base).detach().clone() for site in record.all_sites(model)]


def _norms(model: nn.Module, update: str) -> list[list[float]]:
    own = [site.adapter.own_parameters() for site in record.all_sites(model)]
    return [[p[name].norm().item() for name in FACTORS[update] if name in p] for p in own]


@pytest.mark.parametrize("method", ["map", "lora", "dora"])
@pytest.mark.parametrize("update", FACTORS)
def test_norms_become_equal_and_outputs_keep_every_bit(update: str, method: str) -> None:
    model = _trained(update, method).eval()
    weights, output = _weights(model), model(image())
    before = _norms(model, update)
    found = rebalance(model)
    assert list(found.exponents) == ["stem", "body.0", "body.2", "head"] and found.skipped == {}
    after = _norms(model, update)
    assert all(max(sizes) > 50 * min(sizes) for sizes in before)
    # Each may be off its goal by up to a factor of sqrt(2), or 2 where there are more than two.
    assert all(max(sizes) < (2.001 if len(sizes) == 2 else 4.001) * min(sizes) for sizes in after)
    assert all(a.equal(b) for a, b in zip(weights, _weights(model), strict=True))
    assert model(image()).equal(output)


def test_the_exponents_are_said_and_the_norms_moved_by_them() -> None:
    model = _trained()
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = rebalance(model)
    for site in _sites(model):
        powers = found.exponents[site.path]
        assert set(powers) == {"A", "B"} and powers["A"][0] == -powers["B"][0] < 0
        for name, p in site.adapter.own_parameters().items():
            assert p.equal(own[site.entry(name)] * 2.0 ** powers.get(name, [0])[0])
    again = rebalance(model)
    assert all(powers == {"A": [0], "B": [0]} for powers in again.exponents.values())


def _sites(model: nn.Module) -> list[record.Site]:
    return record.all_sites(model)


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), True),
        (lambda p: torch.optim.Adam(p, lr=1e-2, eps=0, amsgrad=True), False),
        (lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=0), False),
        (lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=0, momentum=0.9, centered=True), False),
        (lambda p: torch.optim.NAdam(p, lr=1e-2, eps=0), False),
        (lambda p: torch.optim.Adamax(p, lr=1e-2, eps=0), False),
        (lambda p: torch.optim.Adadelta(p, lr=1e-2, eps=1e-30), False),
        (lambda p: torch.optim.Adafactor(p, lr=1e-2), False),
    ],
    ids=["SGD", "Adam", "Adagrad", "RMSprop", "NAdam", "Adamax", "Adadelta", "Adafactor"],
)
def test_the_optimisers_state_is_that_of_a_run_with_the_new_factors(make: object, exact: bool) -> None:
    """The same gradients, scaled as the factors' are, from the start give the state that rebalancing makes."""
    model = _trained()
    optimizer = make([p for p in model.parameters() if p.requires_grad])  # type: ignore[operator]
    twin = copy.deepcopy(model)
    powers = rebalance(twin).exponents
    other = make([p for p in twin.parameters() if p.requires_grad])  # type: ignore[operator]
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        for site, new in zip(_sites(model), _sites(twin), strict=True):
            for name, p in site.adapter.own_parameters().items():
                p.grad = torch.randn(p.shape, generator=random)
                new.adapter.get_parameter(name).grad = p.grad * 2.0 ** -powers[site.path].get(name, [0])[0]
        saved = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        other.step()
        with torch.no_grad():  # the steps themselves are not invariant; the states are compared
            for p, value in zip(model.parameters(), saved, strict=True):
                p.copy_(value)
    rebalance(model, optimizer)
    compared = 0
    for site, new in zip(_sites(model), _sites(twin), strict=True):
        for name, p in site.adapter.own_parameters().items():
            mine, theirs = optimizer.state[p], other.state[new.adapter.get_parameter(name)]
            assert list(mine) == list(theirs)
            for key, value in mine.items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(value, theirs[key], rtol=0 if exact else 1e-6, atol=0)
                    compared += value.dim() > 0
    assert compared >= 2 * 4


def test_gradients_that_are_there_are_scaled_along() -> None:
    model = _trained()
    model.zero_grad()
    model.eval()(image()).square().mean().backward()
    rebalance(model)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(image()).square().mean().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-12)


def test_an_optimiser_with_a_state_of_its_own_is_refused_before_anything_changes() -> None:
    model = _trained()
    optimizer = torch.optim.Rprop([p for p in model.parameters() if p.requires_grad])
    model(image()).square().mean().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="Rprop keeps 'prev' of stem's A"):
        rebalance(model, optimizer)
    assert all(model.get_parameter(name).equal(p) for name, p in before.items())


def test_layers_that_must_stay_say_why() -> None:
    model = mapsurgery.patch(net(), "*", rank=2)
    assert set(rebalance(model).skipped.values()) == {"a factor is 0 or not finite"}
    train_steps(model, image())
    model.stem.adapter.A.requires_grad_(False)
    with torch.no_grad():
        model.head.adapter.B[0, 0] = float("nan")
        model.body[0].adapter.A.mul_(1e30)
        model.body[0].adapter.B[0, 0] = 3e-38  # 2^k would leave the normal numbers, and round
        model.body[0].adapter.A[0, 0] = 1e-38 / 3
    found = rebalance(model)
    assert found.skipped == {
        "stem": "A is frozen",
        "body.0": "A cannot be scaled without rounding in torch.float32",
        "head": "a factor is 0 or not finite",
    }
    assert list(found.exponents) == ["body.2"]


@pytest.mark.parametrize("update", ["adalora", "dense"])
def test_a_family_without_factors_to_scale_is_refused(update: str) -> None:
    model = mapsurgery.patch(net(), "*", rank=2, update=update)
    with pytest.raises(ValueError, match=f"the update {update} has no factors to be scaled"):
        rebalance(model)


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("td,emd->tm", x, self.up)


def test_the_matrices_of_a_stack_are_scaled_one_by_one() -> None:
    model = mapsurgery.patch(_Stack(), [], rank=2, parameters="up")
    adapter = model.adapter_up
    with torch.no_grad():
        adapter.B.normal_()
        adapter.A.mul_(torch.tensor([1000.0, 1.0, 0.0])[:, None, None])
        weight = model.up + 0
        (powers,) = rebalance(model).exponents.values()
        assert (model.up + 0).equal(weight)
    assert powers["A"][0] < -3 and abs(powers["A"][1]) < 3 and powers["A"][2] == 0
    assert powers["B"] == [-k for k in powers["A"]]
    sizes = [factor.flatten(1).norm(dim=1)[:2] for factor in (adapter.A.detach(), adapter.B.detach())]
    assert ((sizes[0] / sizes[1]).log2().abs() <= 1.001).all()


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1.0, 8.0), (5.0, 0.3, 70.0), (1e-30, 1e30, 1.0, 3.0), (0.7, 0.7, 5.0)])
def test_exponents_add_up_to_nothing(sizes: tuple[float, ...]) -> None:
    powers = _exponents(sizes)
    assert sum(powers) == 0
    after = [size * 2.0**k for size, k in zip(sizes, powers, strict=True)]
    assert max(after) < 4.001 * min(after)
    assert _exponents((0.0, 1.0)) == [0, 0]
