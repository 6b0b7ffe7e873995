"""`verify` finds every adapter that does nothing, passes the others, and leaves the model as it was."""

from __future__ import annotations

import copy
import random

import numpy
import pytest
import torch
from definition import STARTS, Snapshot, image, net, start_name, to_generic_point, train_steps
from torch import nn
from torch.nn import functional as F

import mapsurgery


class TwoPaths(nn.Module):
    """`first` always acts; `second` as the subclasses below say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Unused(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


class Discarded(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.second(x)
        return self.first(x)


class Detached(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x).detach()


class Multiplied(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 0 * self.second(x)


class OnlyInTraining(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y) if self.training else y


class NotFinite(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + torch.sqrt(self.second(x) * 0)


class Bypassed(TwoPaths):
    """A fast path for inference that goes round the adapters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.linear(self.first(x), self.second.get_parameter("weight"), self.second.bias)
        return super().forward(x)


def _patched(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return mapsurgery.patch(cls(), ["first", "second"], rank=2)


@pytest.mark.parametrize("init", STARTS, ids=start_name)
@pytest.mark.parametrize("trained", [False, True])
def test_adapters_that_act_pass_from_every_start_and_after_training(init: mapsurgery.Init, trained: bool) -> None:
    model = mapsurgery.patch(net(), "*", rank=2, init=init)
    if trained:
        train_steps(model, image())
    result = mapsurgery.verify(model, image())
    assert result.verdicts == dict.fromkeys(["stem", "body.0", "body.2", "head"], "ok")
    assert not result.failures and str(result) == "4 of 4 adapters act on the output and learn"


@pytest.mark.parametrize(
    ("cls", "verdict"),
    [(Unused, "unused"), (Discarded, "unused"), (Detached, "unused"), (Multiplied, "dead"), (NotFinite, "not finite")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_an_adapter_that_does_nothing_is_named(cls: type[nn.Module], verdict: str) -> None:
    with pytest.raises(mapsurgery.VerificationError, match=f"1 of 2 adapters fail: second: {verdict}") as error:
        mapsurgery.verify(_patched(cls), torch.randn(3, 4))
    result = error.value.verification
    assert list(result.failures) == ["second"] and result.verdicts["first"] == "ok"
    assert "second" in str(result) and "1 of 2" in str(result)


def test_a_layer_that_runs_only_in_training_passes() -> None:
    assert not mapsurgery.verify(_patched(OnlyInTraining), torch.randn(3, 4)).failures


def test_an_inference_path_that_bypasses_the_adapters_is_found() -> None:
    with pytest.raises(mapsurgery.VerificationError, match="inference differs"):
        mapsurgery.verify(_patched(Bypassed), torch.randn(3, 4))


def test_a_frozen_adapter_is_named() -> None:
    model = _patched(TwoPaths)
    model.second.adapter.requires_grad_(False)
    with pytest.raises(mapsurgery.VerificationError, match="second: frozen"):
        mapsurgery.verify(model, torch.randn(3, 4))


def test_an_adapter_at_a_dead_point_is_named() -> None:
    model = _patched(TwoPaths)
    with torch.no_grad():
        model.second.adapter.B.zero_()
        model.second.adapter.beta.zero_()
    with pytest.raises(mapsurgery.VerificationError, match="second: dead: from where it is now"):
        mapsurgery.verify(model, torch.randn(3, 4))


def test_a_disabled_adapter_is_named() -> None:
    model = _patched(TwoPaths)
    with mapsurgery.disabled(model), pytest.raises(ValueError, match="disabled"):
        mapsurgery.verify(model, torch.randn(3, 4))


def test_a_zero_weight_passes_although_alpha_multiplies_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[1].weight)
    mapsurgery.patch(model, "1", rank=2)
    assert not mapsurgery.verify(model, torch.randn(3, 4)).failures


@pytest.mark.parametrize("cls", [TwoPaths, Multiplied, Bypassed], ids=lambda c: c.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_left_as_they_were(cls: type[nn.Module], training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), _patched(cls), nn.Dropout(0.5)).train(training)
    to_generic_point(model)
    model[1].first.adapter.A.grad = torch.ones_like(model[1].first.adapter.A)
    snapshot, state = Snapshot(model), torch.get_rng_state()
    try:
        mapsurgery.verify(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    except mapsurgery.VerificationError:
        assert cls is not TwoPaths
    snapshot.assert_holds(model)
    assert torch.equal(torch.get_rng_state(), state)
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {"1.first.adapter.A"} and (model[1].first.adapter.A.grad == 1).all()


def test_an_error_of_the_model_comes_through_and_leaves_it_as_it_was() -> None:
    model = _patched(TwoPaths)
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError):
        mapsurgery.verify(model, torch.randn(3, 5))
    snapshot.assert_holds(model)


def test_outputs_of_any_structure_and_keyword_inputs_are_understood() -> None:
    class Structured(TwoPaths):
        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict:
            return {"logits": (super().forward(x) * scale, None), "index": torch.arange(3), "name": "x"}

    assert not mapsurgery.verify(_patched(Structured), x=torch.randn(3, 4), scale=2.0).failures


def test_an_output_without_floats_is_refused() -> None:
    class Integers(TwoPaths):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(-1)

    with pytest.raises(ValueError, match="Tensor.*floating"):
        mapsurgery.verify(_patched(Integers), torch.randn(3, 4))


def test_verify_works_inside_no_grad_and_in_other_dtypes() -> None:
    model = _patched(TwoPaths)
    with torch.no_grad():
        assert not mapsurgery.verify(model, torch.randn(3, 4)).failures
        assert not torch.is_grad_enabled()
    for dtype in (torch.float64, torch.bfloat16):
        model = mapsurgery.patch(TwoPaths().to(dtype), "*", rank=2)
        assert not mapsurgery.verify(model, torch.randn(3, 4, dtype=dtype)).failures


def test_a_copy_can_be_verified_while_the_original_trains() -> None:
    model = _patched(TwoPaths)
    assert not mapsurgery.verify(copy.deepcopy(model), torch.randn(3, 4)).failures


class _NoGradInTraining(nn.Module):
    """Runs its first layer without autograd in train mode only, as reentrant checkpointing of frozen inputs does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            x = self.first(x)
        return self.second(x)


def test_a_layer_that_learns_in_eval_mode_only_is_found() -> None:
    model = mapsurgery.patch(_NoGradInTraining(), "*", rank=2)
    with pytest.raises(mapsurgery.VerificationError, match="first: .*train mode"):
        mapsurgery.verify(model, torch.randn(2, 4))


def test_a_new_head_of_zeros_is_no_alarm() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    mapsurgery.verify(mapsurgery.patch(model, "0", rank=2, train="1"), torch.randn(2, 4))
    assert not model[1].weight.any()


class _Noisy(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + torch.randn_like(input))


def test_randomness_in_eval_mode_is_no_alarm() -> None:
    mapsurgery.verify(mapsurgery.patch(nn.Sequential(_Noisy(4, 4)), "*", rank=2), torch.randn(2, 4))


def test_a_train_mode_that_cannot_run_is_noted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    result = mapsurgery.verify(mapsurgery.patch(model, "0", rank=2), torch.randn(1, 4))
    assert "train mode was not checked" in str(result)


class _Captured(nn.Module):
    """Computes with a weight that it took from a layer when it was built, beside calling the layer."""

    def __init__(self, alias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.weights = [self.a.weight.data if alias else self.a.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.linear(self.a(x), self.weights[0]))


@pytest.mark.parametrize("alias", [False, True], ids=["parameter", "memory"])
def test_a_weight_that_was_kept_from_before_patch_is_found(alias: bool) -> None:
    model = mapsurgery.patch(_Captured(alias), "*", rank=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(mapsurgery.VerificationError, match="behind its back"):
        mapsurgery.verify(model, torch.randn(3, 4))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(m.enabled for m in model.modules() if isinstance(m, mapsurgery.methods.Adapter))


def test_verify_leaves_rebound_buffers_inputs_and_random_states() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count = self.count + random.random() + float(numpy.random.rand())
            return self.layer(x)

    model = mapsurgery.patch(Counting(), "*", rank=2)
    x = torch.randn(2, 4, requires_grad=True)
    states = random.getstate(), numpy.random.get_state()[1].tolist()
    mapsurgery.verify(model, x)
    assert model.count == 0 and x.grad is None
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_the_rounding_of_autocast_is_no_alarm() -> None:
    """Of a small update: where W' stands in the place of W, it is W' that autocast rounds, and not W and the update."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    mapsurgery.patch(model, "*", rank=2)
    with torch.no_grad():
        for layer in model:
            layer.adapter.B.normal_(std=1e-4)
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = mapsurgery.verify(model, x)
    assert not found.failures and found.notes == ()
    assert mapsurgery.verify(model, x).notes == ()


def test_a_large_scaling_saturates_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Tanh())])
    mapsurgery.patch(model, "*", rank=2, method=mapsurgery.Lora(alpha=256.0))
    assert not mapsurgery.verify(model, torch.randn(1, 8)).failures
