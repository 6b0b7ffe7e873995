"""layer.weight reads as W', lazily and with gradient, and passes for the Parameter that it stands for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from homes import PLAIN, OwnForward, adapter_tensors, of_cases, registered, trained
from small_models import gpt2, llama, logits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import mapsurgery

PRODUCTS = ("mm", "bmm", "addmm", "matmul", "add", "add_", "mul", "mul_", "copy_", "clone", "sum", "norm")


def adapted(cls: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return trained(mapsurgery.patch(nn.Sequential(cls(8, 6), nn.Linear(6, 4)), "*", rank=2))


def data() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(7))


def computed(events: profile) -> set[str]:
    """What was computed in a profile: the library's operators, and torch's products and sums."""
    names = {event.name for event in events.events()}
    return {n for n in names if n.startswith("mapsurgery::") or n.removeprefix("aten::") in PRODUCTS}


def test_weight_reads_as_the_adapted_weight() -> None:
    """x W'^T + bias is the layer's output, and merging writes the same W'."""
    model = adapted()
    torch.testing.assert_close(F.linear(data(), model[0].weight, model[0].bias), model[0](data()), rtol=1e-5, atol=1e-5)
    read = model[0].weight.detach().clone()
    assert not torch.equal(read, registered(model[0]))
    mapsurgery.merge(model)
    torch.testing.assert_close(model[0].weight.detach(), read, rtol=1e-5, atol=1e-6)


@of_cases(*[case for case in PLAIN if case.name not in ("stack_and_raw_matrix", "tied_separate")])
def test_every_weight_is_a_parameter_for_who_asks(case) -> None:
    """get_parameter by the plain name gives the registered one, the attribute its metadata."""
    plain = case.built()
    names = [name for name, p in plain.named_parameters() if p.dim() > 1]
    model = case.patch(case.built())
    parameters = dict(model.named_parameters())
    for name in names:
        path, _, own = name.rpartition(".")
        weight, home = getattr(model.get_submodule(path), own), parameters[name]
        assert isinstance(weight, Tensor), name
        assert (weight.shape, weight.dtype, weight.device) == (home.shape, home.dtype, home.device)
        assert weight.stride() == home.stride() and weight.layout == home.layout
        assert model.get_parameter(name) is home
        if name + ".adapter" not in parameters and not torch.equal(weight.detach().clone(), home):
            assert weight.requires_grad


def test_metadata_cost_nothing() -> None:
    """shape, dtype, device and their like compute nothing; the first number read does."""
    model = adapted()
    model(data())
    with profile(activities=[ProfilerActivity.CPU]) as events:
        for layer in model:
            weight = layer.weight
            _ = weight.shape, weight.size(0), weight.dtype, weight.device, weight.layout, weight.dim(), weight.ndim
            _ = weight.numel(), weight.stride(), weight.is_cuda, weight.is_meta, weight.requires_grad, weight.itemsize
            _ = weight.is_floating_point(), weight.is_contiguous(), len(weight), weight.element_size(), weight.is_sparse
            _ = isinstance(weight, nn.Parameter), model.get_parameter("0.weight").shape, weight.is_leaf
    assert not computed(events)
    with profile(activities=[ProfilerActivity.CPU]) as events:
        assert model[0].weight[0, 0].item() != 0
    assert computed(events)


def test_gradients_flow_through_what_was_read() -> None:
    """A loss on layer.weight trains the adapter as a loss on W' does, and leaves the frozen weight alone."""
    model = adapted()
    model[0].weight.square().sum().backward()
    first = {name: p.grad.clone() for name, p in adapter_tensors(model[0]).items()}
    model.zero_grad()
    F.linear(torch.eye(8), model[0].weight).square().sum().backward()
    for name, parameter in adapter_tensors(model[0]).items():
        assert first[name].abs().sum() > 0
        torch.testing.assert_close(parameter.grad, first[name], rtol=1e-4, atol=1e-5)
    assert registered(model[0]).grad is None and not registered(model[0]).requires_grad


@pytest.mark.parametrize("view", [lambda w: w.t(), lambda w: w[1:], lambda w: w.view(-1), lambda w: w.chunk(2)[0]])
def test_gradients_flow_through_views_of_it(view) -> None:
    """Readers slice and transpose: the gradient is that of W' sliced."""
    model = adapted()
    view(model[0].weight).square().sum().backward()
    found = {name: p.grad.clone() for name, p in adapter_tensors(model[0]).items()}
    model.zero_grad()
    view(model[0].weight.clone()).square().sum().backward()
    for name, parameter in adapter_tensors(model[0]).items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-6)


def test_a_frozen_read_has_no_gradient() -> None:
    """Under no_grad and inside disabled nothing requires a gradient; there it reads as W."""
    model = adapted()
    with torch.no_grad():
        assert not model[0].weight.requires_grad
    with mapsurgery.disabled(model):
        assert torch.equal(model[0].weight, registered(model[0])) and not model[0].weight.requires_grad


def test_numbers_leave_as_numbers(tmp_path: Path) -> None:
    """numpy, lists, files, copies and prints hold W'."""
    model = adapted()
    expected = model[0].weight.detach().clone()
    assert (model[0].weight.detach().numpy() == expected.numpy()).all()
    assert model[0].weight.tolist() == expected.tolist()
    assert torch.equal(copy.deepcopy(model[0].weight.detach()), expected)
    torch.save(model[0].weight.detach(), tmp_path / "w.pt")
    assert torch.equal(torch.load(tmp_path / "w.pt", weights_only=True), expected)
    assert str(expected) == str(model[0].weight.detach())
    assert torch.equal(torch.stack([layer.weight.detach().flatten()[:4] for layer in model])[0], expected.flatten()[:4])


def test_a_read_before_a_step_is_not_taken_for_one_after() -> None:
    """What was read is W' of then, or refuses: never silently that of the next step."""
    model = adapted()
    expected = model[0].weight.detach().clone()
    with torch.no_grad():
        kept = model[0].weight
        model[0].adapter.B.add_(1)
        try:
            found = kept.clone()
        except RuntimeError as refusal:
            assert "read" in str(refusal)
        else:
            assert torch.equal(found, expected)
        assert not torch.equal(model[0].weight.clone(), expected)


def test_every_name_of_named_parameters_leads_somewhere() -> None:
    """get_parameter answers for each name of named_parameters; the adapters' names lead to the very Parameter."""
    for model in (adapted(), adapted(OwnForward), trained(mapsurgery.patch(gpt2(), "*", rank=2))):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found = model.get_parameter(name)
            assert found.shape == parameter.shape
            assert "adapter" not in name or found is parameter


def test_a_reader_of_shapes_finds_the_plain_model() -> None:
    """Counting, memory and dtype helpers of transformers are those of the plain model and its adapters."""
    plain, model = llama(), trained(mapsurgery.patch(llama(), "*proj*", rank=2))
    own = sum(p.numel() for p in adapter_tensors(model).values())
    assert model.num_parameters() == plain.num_parameters() + own
    assert model.num_parameters(only_trainable=True) == own
    assert model.dtype == plain.dtype and model.device == plain.device
    assert model.get_memory_footprint() == plain.get_memory_footprint() + 4 * own
    assert torch.isfinite(logits(model)).all()
