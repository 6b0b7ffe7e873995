"""Whatever forward an object carries, before or after `patch`: the adapter acts in it, or is refused by name."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from homes import PLAIN, QUANTISED, Case, adapter_tensors, of_cases, trained, with_adapters_of
from small_models import unet
from torch import Tensor, nn
from torch.nn import functional as F

import mapsurgery

accelerate = pytest.importorskip("accelerate")

Wrapper = Callable[[nn.Module], Any]


def _lambda(layer: nn.Module) -> None:
    before = layer.forward
    layer.forward = lambda *args, **kwargs: before(*args, **kwargs)


def _partial(layer: nn.Module) -> None:
    layer.forward = functools.partial(type(layer).forward, layer)


def _of_another_class(layer: nn.Module) -> None:
    """As the kernels package puts a faster forward on a layer."""
    before = type(layer).forward

    class Kernel(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return before(self, *args, **kwargs)

    layer.forward = MethodType(Kernel.forward, layer)


def _compiled(layer: nn.Module) -> None:
    layer.forward = torch.compile(layer.forward, backend="eager")


def _accelerates(layer: nn.Module) -> None:
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())


def _accelerates_over_a_lambda(layer: nn.Module) -> None:
    _lambda(layer)
    _accelerates(layer)


def _diffusers(layer: nn.Module) -> None:
    hooks = importlib.import_module("diffusers.hooks")
    hooks.HookRegistry.check_if_exists_or_initialize(layer).register_hook(hooks.ModelHook(), "a_hook")


CASES = [
    case
    for case in PLAIN
    if case.name in ("linear", "linear_own_forward", "conv2d", "transformers_conv1d", "embedding")
] + QUANTISED


def _layer(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if type(m) not in (nn.Sequential,))


def _grown(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """Gradients of the adapter."""
    model.zero_grad()
    model(case.data()).square().sum().backward()
    return {name: p.grad for name, p in adapter_tensors(model).items()}


@of_cases(*CASES)
@pytest.mark.parametrize("when", ["before", "after", "captured_before"])
@pytest.mark.parametrize("wrap", [_lambda, _accelerates, _diffusers], ids=lambda w: w.__name__)
def test_the_adapter_acts_and_learns_in_a_forward_of_the_objects_own(case: Case, when: str, wrap: Wrapper) -> None:
    """Output and gradients are those of the adapted model without the wrapper; `unpatch` leaves the base."""
    base = case.built()
    plain = base(case.data())
    reference = case.patch(case.built())
    model = case.built()
    layer = _layer(model)
    if when == "before":
        wrap(layer)
        case.patch(model)
    elif when == "after":
        case.patch(model)
        wrap(layer)
    else:
        wrap(layer)
        late = {name: layer.__dict__.pop(name) for name in ("forward", "_old_forward") if name in layer.__dict__}
        case.patch(model)
        for name, value in late.items():
            setattr(layer, name, value)
    with_adapters_of(reference, model)
    assert (reference(case.data()) - plain).norm() > 0.01 * plain.norm()
    for _ in range(2):  # the first call may find out, the second must be like it
        torch.testing.assert_close(model(case.data()), reference(case.data()), rtol=1e-4, atol=1e-5)
    found, expected = _grown(model, case), _grown(reference, case)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4)
    with mapsurgery.disabled(model):
        torch.testing.assert_close(model(case.data()), plain, rtol=1e-6, atol=1e-6)
    mapsurgery.unpatch(model)
    assert torch.equal(model(case.data()), plain)
    assert "forward" in layer.__dict__


@of_cases(*[case for case in CASES if case.name in ("linear", "packed")])
@pytest.mark.parametrize("when", ["before", "after", "captured_before"])
@pytest.mark.parametrize("wrap", [_partial, _of_another_class, _accelerates_over_a_lambda], ids=lambda w: w.__name__)
def test_so_it_does_in_others(case: Case, when: str, wrap: Wrapper) -> None:
    test_the_adapter_acts_and_learns_in_a_forward_of_the_objects_own(case, when, wrap)


@of_cases(*[case for case in CASES if case.name in ("linear", "packed")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_adapter_acts_in_a_compiled_forward(case: Case, when: str, _fresh_compiler: None) -> None:
    """`layer.forward = torch.compile(layer.forward)`, around torch's forward or around the adapted one."""
    model, reference = case.built(), case.patch(case.built())
    if when == "before":
        _compiled(_layer(model))
    case.patch(model)
    if when == "after":
        _compiled(_layer(model))
    with_adapters_of(reference, model)
    torch.testing.assert_close(model(case.data()), reference(case.data()), rtol=1e-4, atol=1e-5)


def _closed_over_the_parameter(layer: nn.Linear) -> None:
    weight, bias = layer.weight, layer.bias
    layer.forward = lambda x: F.linear(x, weight, bias)


def _closed_over_a_copy(layer: nn.Linear) -> None:
    packed, bias = layer._parameters["weight"].detach().half(), layer.bias
    layer.forward = lambda x: F.linear(x, packed.float(), bias)


def _of_the_registered(layer: nn.Linear) -> None:
    layer.forward = lambda x: F.linear(x, layer._parameters["weight"], layer.bias)


INERT = [_closed_over_the_parameter, _closed_over_a_copy, _of_the_registered]


class Registered(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._parameters["weight"], self.bias)


def two(first: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(first or nn.Linear(6, 5), nn.Linear(5, 4))


@pytest.mark.parametrize("wrap", [*INERT, None], ids=lambda w: "class" if w is None else w.__name__)
def test_a_forward_that_does_not_read_its_weight_is_refused_by_name(wrap: Wrapper | None) -> None:
    model = two(Registered(6, 5) if wrap is None else None)
    if wrap is not None:
        wrap(model[0])
    before, state = dict(model[0].__dict__), torch.get_rng_state()
    planned = mapsurgery.plan(model, "*")
    assert [layer.path for layer in planned.layers] == ["1"]
    assert "does not read its weight" in planned.skipped[0].reason and planned.skipped[0].path == "0"
    assert model[0].__dict__.keys() == before.keys() and all(model[0].__dict__[k] is v for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="does not read its weight"):
        mapsurgery.patch(model, "0")


@pytest.mark.parametrize("wrap", INERT[1:])
def test_such_a_forward_put_on_after_patch_raises_when_it_is_called(wrap: Wrapper) -> None:
    model = mapsurgery.patch(two(), "*", rank=2)
    wrap(model[0])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^0: the forward that its object carries"):
            model(torch.randn(2, 6))
    with mapsurgery.disabled(model):
        model(torch.randn(2, 6))
    del model[0].forward
    model(torch.randn(2, 6)).sum().backward()


def test_the_plan_says_that_dropout_does_not_apply() -> None:
    model = two()
    _lambda(model[0])
    own, ours = mapsurgery.plan(model, "*", dropout=0.5, rank=2).layers
    assert own.own_forward and own.notes == ("own forward", "no dropout") and str(own.way) == "effective"
    assert not ours.own_forward and ours.notes == ()


def test_dropout_that_a_later_forward_takes_away_is_said() -> None:
    model = two()
    _lambda(model[0])
    wrapped = model[0].__dict__.pop("forward")  # it holds the forward of before
    mapsurgery.patch(model, "*", dropout=0.5, rank=2)
    model[0].forward = wrapped
    with pytest.warns(UserWarning, match="the dropout of 0's adapter does not apply"):
        model(torch.randn(2, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 6))


@of_cases(*CASES)
def test_a_wrapper_that_kept_the_adapted_forward_goes_on(case: Case) -> None:
    """After `unpatch` and `merge` it runs the plain forward, after another `patch` the adapted one."""
    plain = case.built()(case.data())
    model = case.patch(case.built())
    _lambda(_layer(model))
    adapted = model(case.data())
    mapsurgery.unpatch(model)
    assert torch.equal(model(case.data()), plain)
    case.patch(model)
    torch.testing.assert_close(model(case.data()), adapted, rtol=1e-5, atol=1e-5)
    mapsurgery.merge(model, quantised="dequantise" if case in QUANTISED else "refuse")
    error = 0.02 if case.name == "bnb_8bit" else 1e-5  # its kernel rounds x, too
    assert (model(case.data()) - adapted).norm() <= error * adapted.norm()


@of_cases(*QUANTISED)
@pytest.mark.parametrize("choice", ["dequantise", "requantise"])
def test_merging_under_a_forward_of_the_packed_weight_is_refused(case: Case, choice: str) -> None:
    model = case.built()
    _lambda(_layer(model))
    case.patch(model)
    adapted = model(case.data())
    with pytest.raises(ValueError, match="carries a forward of its own"):
        mapsurgery.merge(model, quantised=choice)
    assert torch.equal(model(case.data()), adapted)


@of_cases(*[case for case in CASES if case.name in ("linear", "packed")])
def test_hooks_of_diffusers_come_and_go(case: Case) -> None:
    """Registered before `patch` and removed after it: `module.forward = <the bound forward of before>`."""
    model, reference = case.built(), case.patch(case.built())
    layer = _layer(model)
    _diffusers(layer)
    case.patch(model)
    with_adapters_of(reference, model)
    expected = reference(case.data())
    layer._diffusers_hook.remove_hook("a_hook")
    torch.testing.assert_close(model(case.data()), expected, rtol=1e-5, atol=1e-5)
    _diffusers(layer)
    torch.testing.assert_close(model(case.data()), expected, rtol=1e-5, atol=1e-5)
    layer._diffusers_hook.remove_hook("a_hook")
    mapsurgery.unpatch(model)
    assert torch.equal(model(case.data()), case.built()(case.data()))


@of_cases(*[case for case in CASES if case.name in ("linear", "packed")])
def test_an_own_forward_can_be_deleted_after_patch(case: Case) -> None:
    model, reference = case.built(), case.patch(case.built())
    _lambda(_layer(model))
    case.patch(model)
    with_adapters_of(reference, model)
    del _layer(model).forward
    torch.testing.assert_close(model(case.data()), reference(case.data()))


def noisy() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([3]),
        torch.randn(2, 5, 16, generator=generator),
    )


def stored(model: nn.Module, compute: torch.dtype = torch.float32) -> nn.Module:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    return model


@pytest.mark.parametrize("order", ["patch_then_store", "store_then_patch"])
def test_a_base_that_diffusers_stores_in_eight_bits_is_adapted(order: str, tmp_path: Path) -> None:
    """An adapter of the float32 model acts as on a model with the rounded weights in float32; all of it learns."""
    pytest.importorskip("diffusers")
    file = tmp_path / "a.safetensors"
    model = trained(mapsurgery.patch(unet(), "*attn*", rank=2))
    mapsurgery.save(model, file)
    base = stored(unet())
    plain, state = base(*noisy()).sample, base.state_dict()
    rounded = unet()
    rounded.load_state_dict({name: t.float() for name, t in state.items()})
    torch.testing.assert_close(rounded(*noisy()).sample, plain)
    expected = with_adapters_of(model, mapsurgery.patch(rounded, "*attn*", rank=2))(*noisy()).sample
    model = unet()
    if order == "patch_then_store":
        stored(mapsurgery.load(model, file))
    else:
        mapsurgery.load(stored(model), file)
    for _ in range(2):
        assert (model(*noisy()).sample - expected).norm() < 0.01 * (expected - plain).norm()
    with pytest.raises(ValueError, match="stored as float8_e4m3fn" if order == "patch_then_store" else "of its own"):
        mapsurgery.merge(model, quantised="dequantise")
    mapsurgery.report(model)
    layer = model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert layer.get_parameter("weight") is layer._parameters["weight"]
    with mapsurgery.disabled(model):
        assert torch.equal(model(*noisy()).sample, plain)
    mapsurgery.save(model, file)
    for fresh in (stored(unet()), unet()):
        mapsurgery.load(fresh, file)
    mapsurgery.unpatch(model)
    assert torch.equal(model(*noisy()).sample, plain)
    assert model.state_dict().keys() == state.keys()
    assert all(
        torch.equal(a.float(), b.float()) for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )


@pytest.mark.parametrize("order", ["patch_then_store", "store_then_patch"])
def test_adapters_of_a_stored_base_learn(order: str) -> None:
    """Gradients are those on the rounded weights in float32. (Through stored convolutions torch itself fails.)"""
    hooks = pytest.importorskip("diffusers.hooks")

    def keep(model: nn.Module) -> None:
        casts = {"skip_modules_pattern": None, "skip_modules_classes": (nn.Conv2d, nn.GroupNorm, nn.LayerNorm)}
        hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, **casts)

    rounded, model = unet(), unet()
    keep(rounded)
    state = {name: t.float() for name, t in rounded.state_dict().items()}
    rounded = unet()
    rounded.load_state_dict(state)
    if order == "patch_then_store":
        keep(mapsurgery.patch(model, "*attn*", rank=2))
    else:
        keep(model)
        mapsurgery.patch(model, "*attn*", rank=2)
    with_adapters_of(trained(model), mapsurgery.patch(rounded, "*attn*", rank=2))
    for each in (rounded, model):
        each(*noisy()).sample.square().sum().backward()
    expected = adapter_tensors(rounded)
    for name, parameter in adapter_tensors(model).items():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-2, atol=1e-4)


def test_a_stored_base_may_compute_in_bfloat16() -> None:
    pytest.importorskip("diffusers")
    model = mapsurgery.patch(stored(unet(), torch.bfloat16), "*attn*", rank=2)
    x, t, context = noisy()
    before = model(x.bfloat16(), t, context.bfloat16()).sample
    trained(model)
    assert (model(x.bfloat16(), t, context.bfloat16()).sample - before).abs().max() > 0.01


def test_stored_convolutions_are_refused_by_name() -> None:
    pytest.importorskip("diffusers")
    skipped = {s.path: s.reason for s in mapsurgery.plan(stored(unet()), "*").skipped}
    assert "float8_e4m3fn" in skipped["conv_in"]
    with pytest.raises(ValueError, match="conv_in"):
        mapsurgery.patch(stored(unet()), "conv_in")
