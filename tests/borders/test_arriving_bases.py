"""||W||_F is that of the base which is there: loaded, cast, arrived from meta, changed in place or by another tool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from homes import OwnForward, adapter_tensors, registered, trained, with_adapters_of
from torch import Tensor, nn

import mapsurgery


def net(seed: int = 0, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6), nn.Unflatten(-1, (6, 1)), nn.Conv1d(6, 5, 1), nn.Flatten(), OwnForward(5, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def data() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(7))


def patched(model: nn.Module, **options: object) -> nn.Module:
    torch.manual_seed(1)
    return mapsurgery.patch(model, "*", rank=2, **options)


OTHER = {"seed": 3, "scale": 2.5}


def _load(model: nn.Module) -> None:
    model.load_state_dict(net(**OTHER).state_dict())


def _assign(model: nn.Module) -> None:
    model.load_state_dict(net(**OTHER).state_dict(), assign=True)


def _load_layers(model: nn.Module) -> None:
    for own, theirs in zip(model, net(**OTHER), strict=True):
        own.load_state_dict(theirs.state_dict())


def _copy(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in net(**OTHER).named_parameters():
            parameters[name].copy_(p)


def _data(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, p in net(**OTHER).named_parameters():
        parameters[name].data = p.detach().clone()


def _vector(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    theirs = dict(net(**OTHER).named_parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(theirs.values()), [parameters[n] for n in theirs])


def _registered(model: nn.Module) -> None:
    for own, theirs in zip(model, net(**OTHER), strict=True):
        for name, p in theirs.named_parameters():
            own._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)


def _functional(model: nn.Module) -> None:
    """Each parameter is replaced as accelerate and transformers replace them: a new one under the old name."""
    for own, theirs in zip(model, net(**OTHER), strict=True):
        for name, p in theirs.named_parameters():
            own.register_parameter(name, nn.Parameter(p.detach().clone(), requires_grad=False))


ARRIVALS: dict[str, Callable[[nn.Module], None]] = {
    "load_state_dict": _load,
    "assign": _assign,
    "layer_by_layer": _load_layers,
    "copy_into_parameters": _copy,
    "data_of_parameters": _data,
    "vector_to_parameters": _vector,
    "registered_anew": _registered,
    "register_parameter": _functional,
}


@pytest.mark.parametrize("arrive", ARRIVALS.values(), ids=ARRIVALS)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_the_norm_is_that_of_the_base_that_arrived(arrive: Callable[[nn.Module], None], used: bool) -> None:
    """Outputs are those of the other base patched afresh with the same adapter, wherever it came from."""
    model = trained(patched(net()))
    if used:
        model(data()).sum().backward()
    arrive(model)
    expected = with_adapters_of(model, patched(net(**OTHER)))
    assert torch.equal(model(data()), expected(data()))
    with mapsurgery.disabled(model):
        torch.testing.assert_close(model(data()), net(**OTHER)(data()))  # memory that is aligned otherwise, other sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_keeps_the_adapted_model(dtype: torch.dtype) -> None:
    """model.to(dtype) and back: the base alone is rounded, and outputs stay near."""
    model = trained(patched(net()))
    expected = model(data())
    model.to(dtype)
    assert registered(model[0]).dtype == dtype and model[0].weight.dtype == dtype
    coarse = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(model(data().to(dtype)).float(), expected, rtol=coarse, atol=coarse)


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        model = patched(net())
    assert all(p.is_meta for p in model.parameters())
    return model


def _empty_then_load(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    _load(model)


@pytest.mark.parametrize("arrive", [_assign, _empty_then_load], ids=["assign", "to_empty"])
def test_a_base_that_arrives_on_a_model_patched_on_meta_starts_as_itself(arrive: Callable[[nn.Module], None]) -> None:
    """The start that waited for the weight is taken then: the output is the base's, and adapters have gradients."""
    model = _on_meta()
    arrive(model)
    torch.testing.assert_close(model(data()), net(**OTHER)(data()), rtol=1e-5, atol=1e-5)
    assert not any(p.is_meta for p in model.parameters())
    model(data()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_tensors(model).values())


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
def test_a_whole_checkpoint_arrives_on_a_model_patched_on_meta(assign: bool) -> None:
    """Base and adapters from one state_dict."""
    source, model = trained(patched(net(**OTHER))), _on_meta()
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(model(data()), source(data()))


def test_a_copied_or_pickled_model_has_its_own_norm() -> None:
    """deepcopy, then another base into the copy: each keeps what is right for it."""
    import copy
    import pickle

    model = trained(patched(net()))
    expected = model(data())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _load(other)
        assert torch.equal(other(data()), with_adapters_of(model, patched(net(**OTHER)))(data()))
        assert torch.equal(model(data()), expected)


def test_functional_call_computes_with_the_base_it_is_given() -> None:
    """Another frozen weight by its plain name: W' is made of that one."""
    model, theirs = trained(patched(net())), dict(net(**OTHER).named_parameters())
    output = model(data())
    found = torch.func.functional_call(model, theirs, (data(),))
    torch.testing.assert_close(found, with_adapters_of(model, patched(net(**OTHER)))(data()), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(data()), output)


def test_swapped_parameters_when_loading_are_the_new_base() -> None:
    """torch.__future__.set_swap_module_params_on_conversion: load_state_dict and casts swap the tensors themselves."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = trained(patched(net()))
        _load(model)
        assert torch.equal(model(data()), with_adapters_of(model, patched(net(**OTHER)))(data()))
        model.double()
        assert registered(model[0]).dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
