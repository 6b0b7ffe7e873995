"""Every key of the unpatched model's state_dict exists in the patched one, with the same meaning, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from homes import (
    ADAPTER_KEY,
    COMPUTED,
    PLAIN,
    QUANTISED,
    Case,
    adapter_tensors,
    ids,
    of_cases,
    registered,
    trained,
    with_adapters_of,
)
from modules import Tied
from torch import Tensor, nn

import mapsurgery

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*matmul_4bit.*:DeprecationWarning"),
]
every_case = of_cases(*PLAIN, *COMPUTED, *QUANTISED)
float_case = of_cases(*PLAIN, *COMPUTED)


def same(a: Any, b: Any) -> bool:
    """Two entries of a state_dict (torchao's are tensors of a class of their own) hold the same."""
    if hasattr(a, "dequantize") and type(a) not in (Tensor, nn.Parameter):
        return torch.equal(a.dequantize(), b.dequantize())
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def other_base(case: Case) -> nn.Module:
    """A second base of one structure, larger by far, so that a norm of the first one shows."""
    model = case.built(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


@every_case
def test_parameters_stay_the_same_objects_under_the_same_names(case: Case) -> None:
    """named_parameters of the patched model leads to the very Parameters of before, ties included."""
    model = case.built()
    before = list(model.named_parameters(remove_duplicate=False))
    case.patch(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before)
    assert all(ADAPTER_KEY.fullmatch(name) for name in set(after) - {name for name, _ in before})


@every_case
def test_the_state_dict_has_the_same_tensors_under_the_same_keys(case: Case) -> None:
    """The plain keys in their order, the same memory behind them, and the adapters' own four beside them."""
    model = case.built()
    before, again = model.state_dict(), model.state_dict()
    case.patch(model)
    after = model.state_dict()
    assert [key for key in after if key in before] == list(before)
    for key, value in before.items():
        assert same(after[key], value), key
        if type(value) is Tensor and value.numel() and value.data_ptr() == again[key].data_ptr():
            assert after[key].data_ptr() == value.data_ptr(), key
    new = set(after) - set(before)
    assert new and all(ADAPTER_KEY.fullmatch(key) for key in new), sorted(new)


@every_case
def test_adapters_add_no_buffer(case: Case) -> None:
    """No buffer comes, persistent or not: they cost DDP a broadcast in each forward."""
    model = case.built()
    before = dict(model.named_buffers())
    case.patch(model)
    assert set(dict(model.named_buffers())) == set(before)


@float_case
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_the_original_checkpoint_loads_and_is_the_base(case: Case, assign: bool) -> None:
    """Strict, and the outputs are those of that base patched afresh with the same adapter: ||W|| is taken anew."""
    model, other = case.patch(case.built()), other_base(case)
    model(case.data())
    adapters = {name: p.detach().clone() for name, p in adapter_tensors(model).items()}
    result = model.load_state_dict(other.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(p, adapters[name]) for name, p in adapter_tensors(model).items())
    assert all(same(model.state_dict()[key], value) for key, value in other.state_dict().items())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ADAPTER_KEY.fullmatch(name)}
    expected = other.requires_grad_(False)(case.data())  # attention takes another kernel where nothing is trained
    with mapsurgery.disabled(model):
        assert torch.equal(model(case.data()), expected)
    assert torch.equal(model(case.data()), with_adapters_of(model, case.patch(other_base(case)))(case.data()))


@float_case
def test_unpatch_after_a_checkpoint_is_that_checkpoint(case: Case) -> None:
    """Buffers that arrived with the other base (u and v of a spectral norm, a mask) stay the other's."""
    model, other = case.patch(case.built()), other_base(case)
    model.load_state_dict(other.state_dict())
    mapsurgery.unpatch(model)
    assert torch.equal(model.requires_grad_(True)(case.data()), other(case.data()))


@float_case
def test_the_patched_checkpoint_loads_into_the_base(case: Case) -> None:
    """With strict=False nothing is missing and only the adapters are unexpected; the base arrives exactly."""
    model, base = case.patch(case.built()), case.built(seed=1)
    result = base.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys
    assert set(result.unexpected_keys) == set(model.state_dict()) - set(base.state_dict())
    assert all(ADAPTER_KEY.fullmatch(key) for key in result.unexpected_keys)
    assert torch.equal(base(case.data()), case.built()(case.data()))


@float_case
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_the_patched_checkpoint_loads_into_a_patched_model(case: Case, assign: bool) -> None:
    """A whole state_dict carries base and adapters to a model that had others."""
    model, other = case.patch(case.built()), trained(case.patch(other_base(case)), seed=301)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = other.load_state_dict(state, strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other(case.data()), model(case.data()))


@of_cases(*QUANTISED)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_quantised_checkpoint_loads_as_it_does_without_adapters(case: Case, assign: bool) -> None:
    """What the plain layer takes or refuses, the adapted one takes or refuses."""

    def load(model: nn.Module) -> tuple[list[str], list[str]] | str:
        try:
            return tuple(model.load_state_dict(case.built(seed=1).state_dict(), assign=assign))
        except Exception as error:
            return type(error).__name__

    plain, model = case.built(), case.patch(case.built())
    expected = load(plain)
    assert load(model) == expected
    if not isinstance(expected, str):
        with mapsurgery.disabled(model):
            assert torch.equal(model(case.data()), plain(case.data()))
        assert torch.equal(model(case.data()), with_adapters_of(model, case.patch(case.built(seed=1)))(case.data()))


def test_what_a_checkpoint_lacks_is_reported_under_the_plain_name() -> None:
    """A missing, a surplus and a misshapen entry are named as in the plain model; an adapter that is half there too."""
    model = mapsurgery.patch(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), "*", rank=2)
    state = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).state_dict()
    result = model.load_state_dict({key: t for key, t in state.items() if key != "0.weight"}, strict=False)
    assert result.missing_keys == ["0.weight"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"2\.weight"'):
        model.load_state_dict({**state, "2.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        model.load_state_dict({**state, "1.weight": torch.zeros(3, 3)})
    half = {key: value for key, value in model.state_dict().items() if key != "0.adapter.B"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.adapter\.B"'):
        model.load_state_dict(half)


def test_an_adapter_of_two_layers_is_in_the_state_dict_once() -> None:
    """Under its first holder; loaded from there it is still one for both, also with assign=True."""
    torch.manual_seed(0)
    model = trained(mapsurgery.patch(Tied(), "*", rank=2))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    own = {f"{layer}.adapter.{name}" for layer in ("embed", "body") for name in ("A", "B", "alpha", "beta")}
    assert {key for key in state if "adapter" in key} == own
    assert {"embed.weight", "out.weight"} <= set(state)
    for assign in (False, True):
        fresh = mapsurgery.patch(Tied(), "*", rank=2)
        assert not any(fresh.load_state_dict(state, strict=True, assign=assign))
        assert torch.equal(fresh(ids()), model(ids()))
        assert fresh.out.adapter.A is fresh.embed.adapter.A
    assert {name for name, _ in model.named_parameters() if "adapter" in name} == own


@pytest.mark.parametrize("method", ["map", "lora", "dora"])
def test_every_method_adds_its_own_tensors_alone(method: str) -> None:
    """Keys beside the plain ones are parameters of the adapter, whatever the method."""
    model = nn.Sequential(nn.Linear(6, 5))
    base = set(model.state_dict())
    mapsurgery.patch(model, "*", rank=2, method=method)
    new = set(model.state_dict()) - base
    assert base <= set(model.state_dict()) and new == set(dict(model.named_parameters())) - base
    assert all(key.startswith("0.adapter.") for key in new)


def test_the_registered_parameter_is_the_frozen_weight() -> None:
    """layer._parameters["weight"] is the Parameter of before, though layer.weight reads as W'."""
    layer = nn.Linear(6, 5)
    before = layer.weight
    model = trained(mapsurgery.patch(nn.Sequential(layer), "*", rank=2))
    assert registered(layer) is before and not before.requires_grad
    assert not torch.equal(model[0].weight, before)
