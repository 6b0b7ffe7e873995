"""`verify` finds every adapter that does nothing, passes the others, and leaves the model as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext

import numpy
import pytest
import torch
from definition import STARTS, Snapshot, image, net, start_name, to_generic_point, train_steps
from torch import nn
from torch.nn import functional as F

import mapsurgery
from mapsurgery.methods import Adapter


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


def test_an_adapted_head_of_zeros_is_no_alarm() -> None:
    """It hides what is below it for one step, as a trained one does."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    assert not mapsurgery.verify(mapsurgery.patch(model, "*", rank=2), torch.randn(2, 4)).failures
    model[1].adapter.beta.data.zero_()
    with pytest.raises(mapsurgery.VerificationError, match="1 of 2 adapters fail: 1: dead: from where it is now"):
        mapsurgery.verify(model, torch.randn(2, 4))


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


class _RoundedInInference(nn.Module):
    """A layer beside the adapted one multiplies in bfloat16 in inference, and only there: as those in 4 bits do where
    the processor can. What comes out is a small difference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        nn.init.eye_(self.first.weight)
        nn.init.eye_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if torch.is_grad_enabled():
            return self.second(h) - 0.98 * h
        return F.linear(h.bfloat16(), self.second.weight.bfloat16()).float() - 0.98 * h


def test_a_coarser_arithmetic_of_inference_is_no_alarm() -> None:
    """The base's own error does not tell: its numbers are integers, which bfloat16 holds."""
    model = mapsurgery.patch(_RoundedInInference(), "first", rank=2)
    found = mapsurgery.verify(model, torch.randint(-8, 9, (4, 16)).float())
    assert not found.failures and found.notes == ()


def test_a_large_scaling_saturates_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Tanh())])
    mapsurgery.patch(model, "*", rank=2, method=mapsurgery.Lora(alpha=256.0))
    assert not mapsurgery.verify(model, torch.randn(1, 8)).failures


# Who reads W, and what inference computes with ---------------------------------------------------------------------


class _Second(TwoPaths):
    """What becomes of `second` is what the subclasses are about."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.through_second(torch.tanh(self.first(x)))


class ReadsParameters(_Second):
    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) + F.linear(x, self.second._parameters["weight"])


class ReadsByName(_Second):
    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) + F.linear(x, self.get_parameter("second.weight"))


class ReadsInTraining(_Second):
    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(x)
        return y + F.linear(x, self.second._parameters["weight"]) if self.training else y


class ReadsInEval(_Second):
    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) if self.training else F.linear(x, self.second._parameters["weight"], self.second.bias)


CONTEXTS = {
    "float32": (torch.float32, nullcontext),
    "bfloat16": (torch.bfloat16, nullcontext),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
}
in_contexts = pytest.mark.parametrize("context", CONTEXTS)


def _verified(cls: type[nn.Module], context: str = "float32") -> mapsurgery.Verification:
    """The result on a model of this class, which is left as it was to the bit, whatever comes out."""
    dtype, entered = CONTEXTS[context]
    torch.manual_seed(0)
    model = mapsurgery.patch(cls().to(dtype), "*", rank=2)
    snapshot = Snapshot(model)
    try:
        with entered():
            return mapsurgery.verify(model, torch.randn(5, 4, dtype=dtype))
    finally:
        snapshot.assert_holds(model)
        assert all(type(m).__name__ != "Adapter" or type(m) is Adapter for m in model.modules())


@in_contexts
@pytest.mark.parametrize("cls", [ReadsParameters, ReadsByName, ReadsInTraining, ReadsInEval], ids=lambda c: c.__name__)
def test_who_reads_the_frozen_weight_is_found_in_any_precision(cls: type[nn.Module], context: str) -> None:
    with pytest.raises(mapsurgery.VerificationError, match="weight of second behind its back"):
        _verified(cls, context)


@in_contexts
def test_a_right_model_passes_in_any_precision_without_a_note(context: str) -> None:
    result = _verified(TwoPaths, context)
    assert not result.failures and result.notes == ()


class _Inference(_Second):
    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) if torch.is_grad_enabled() else self.fast(x)


class FastOnW(_Inference):
    def fast(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.second._parameters["weight"], self.second.bias)


class FastOnACopy(_Inference):
    def __init__(self) -> None:
        super().__init__()
        self.kept = self.second.weight.detach().clone()

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.kept.to(x.dtype), self.second.bias)


class FastOnCodes(_Inference):
    def __init__(self) -> None:
        super().__init__()
        self.codes = (self.second.weight.detach() * 127).round().to(torch.int8)

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.codes.to(x.dtype) / 127, self.second.bias)


class FastOnWhatItFirstRead(_Inference):
    def __init__(self) -> None:
        super().__init__()
        self.kept = None

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = self.second.weight.detach().clone()
        return F.linear(x, self.kept.to(x.dtype), self.second.bias)


class FastDiscards(_Inference):
    def fast(self, x: torch.Tensor) -> torch.Tensor:
        self.second(x)
        return x


@in_contexts
@pytest.mark.parametrize("cls", [FastOnW, FastOnACopy, FastOnCodes, FastDiscards], ids=lambda c: c.__name__)
def test_a_fast_path_around_a_layer_is_found_in_any_precision(cls: type[nn.Module], context: str) -> None:
    with pytest.raises(mapsurgery.VerificationError, match="inference differs.*bypasses second") as error:
        _verified(cls, context)
    assert list(error.value.verification.failures) == ["second"]


class MergedInEval(_Second):
    """Keeps W' from its first forward in eval mode."""

    lets_go = False

    def __init__(self) -> None:
        super().__init__()
        self.kept = None

    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.kept = None if self.lets_go else self.kept
            return self.second(x)
        if self.kept is None:
            self.kept = self.second.weight.detach().clone()
        return F.linear(x, self.kept, self.second.bias)


class MergedUntilTraining(MergedInEval):
    lets_go = True


class MergedBefore(MergedInEval):
    def __init__(self) -> None:
        super().__init__()
        self.kept = self.second.weight.detach().clone()


class Transposed(MergedBefore):
    def __init__(self) -> None:
        super().__init__()
        self.kept, self.all = None, {"second": [self.second.weight.detach().t().half()]}

    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) if self.training else x @ self.all["second"][0].to(x.dtype) + self.second.bias


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (FastOnWhatItFirstRead, "inference differs.*bypasses second"),
        (MergedInEval, "inference differs.*bypasses second"),
        (MergedUntilTraining, "inference differs.*bypasses second"),
        (MergedBefore, "second: bypassed in eval mode.*`kept`"),
        (Transposed, "second: bypassed in eval mode.*`all`"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_merged_copy_that_is_kept_is_found(cls: type[nn.Module], message: str) -> None:
    with pytest.raises(mapsurgery.VerificationError, match=message):
        _verified(cls)


class MergedByEval(MergedInEval):
    """Merges when it is put into eval mode, and lets go when it trains: right."""

    def train(self, mode: bool = True) -> MergedByEval:
        super().train(mode)
        self.kept = None if mode else self.second.weight.detach().clone()
        return self


def test_a_copy_that_eval_and_train_renew_is_no_alarm() -> None:
    assert not _verified(MergedByEval).failures


def test_an_interrupt_leaves_every_bit() -> None:
    class Interrupted(TwoPaths):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            if self.runs == self.stop:
                raise KeyboardInterrupt
            return super().forward(x)

    model = mapsurgery.patch(Interrupted(), "*", rank=2)
    model.stop = 0
    mapsurgery.verify(model, torch.randn(3, 4))
    snapshot, runs = Snapshot(model), model.runs
    for stop in range(1, runs + 1):
        model.runs, model.stop = 0, stop
        with pytest.raises(KeyboardInterrupt):
            mapsurgery.verify(model, torch.randn(3, 4))
        snapshot.assert_holds(model)
        assert all(type(m.adapter) is Adapter for m in (model.first, model.second))


# Models that eval mode does not differentiate -----------------------------------------------------------------------


class DetachedInEval(_Second):
    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(x)
        return y if self.training else y.detach()


class NoGradInEval(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return super().forward(x)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no backward in eval mode")


class RaisesInEvalBackward(_Second):
    def through_second(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) if self.training else _NoBackward.apply(self.second(x))


class RefusesAutogradInEval(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and torch.is_grad_enabled():
            raise RuntimeError("eval mode needs no_grad")
        return super().forward(x)


@pytest.mark.parametrize(
    "cls", [DetachedInEval, NoGradInEval, RaisesInEvalBackward, RefusesAutogradInEval], ids=lambda c: c.__name__
)
def test_a_model_that_eval_mode_does_not_differentiate_is_judged_by_train_mode(cls: type[nn.Module]) -> None:
    result = _verified(cls)
    assert not result.failures and any("judged by train mode" in note for note in result.notes)


def test_what_train_mode_alone_uses_is_said() -> None:
    assert "used in train mode alone" in _verified(OnlyInTraining).notes[0]


class Faint(TwoPaths):
    """In float16 the gradient of `second` is too small to show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 1e-9 * self.second(x)


class Loud(TwoPaths):
    """And here it is too large, though the output is not."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.second.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x * 1e-3) * 3e3 * 1e2


@pytest.mark.parametrize("cls", [Faint, Loud], ids=lambda c: c.__name__)
def test_a_gradient_that_underflows_or_overflows_is_taken_of_another_loss(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = mapsurgery.patch(cls().half(), "*", rank=2)
    result = mapsurgery.verify(model, torch.randn(5, 4).half())
    assert not result.failures and "another size of the loss" in result.notes[0] and "second" in result.notes[0]


def test_a_scale_of_zero_is_no_underflow() -> None:
    model = mapsurgery.patch(Multiplied().half(), "*", rank=2)
    with pytest.raises(mapsurgery.VerificationError, match="second: dead"):
        mapsurgery.verify(model, torch.randn(3, 4).half())


class Stored(nn.Module):
    """Parameters and buffers in 8 bits beside an adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.stored = nn.Parameter(torch.randn(4, 4).to(torch.float8_e4m3fn))
        self.scale = nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn))
        self.register_buffer("bias", torch.randn(4).to(torch.float8_e5m2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.layer(x), self.stored.float(), self.bias.float()) * (1 + self.scale.float())


@pytest.mark.parametrize("train", [(), "scale"])
def test_parameters_and_buffers_in_8_bits_are_no_obstacle(train: str | tuple[str, ...]) -> None:
    model = mapsurgery.patch(Stored(), "layer", rank=2, train=train)
    before = [t.float().clone() for t in (*model.parameters(), *model.buffers())]
    assert not mapsurgery.verify(model, torch.randn(3, 4)).failures
    assert all(torch.equal(t.float(), b) for t, b in zip((*model.parameters(), *model.buffers()), before, strict=True))


class _HalfDifferentiable(nn.Module):
    """Can be differentiated by nothing, with adapters or without."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _NoBackward.apply(self.layer(x))


def test_a_model_that_cannot_be_differentiated_is_judged_by_what_acts() -> None:
    result = mapsurgery.verify(mapsurgery.patch(_HalfDifferentiable(), "layer", rank=2), torch.randn(3, 4))
    assert "whether they learn was not checked" in str(result) and "for the base too" in result.notes[0]
    with pytest.raises(mapsurgery.VerificationError, match="idle: unused"):
        mapsurgery.verify(mapsurgery.patch(_HalfDifferentiable(), "*", rank=2), torch.randn(3, 4))


# What trains beside the adapters, and what the optimiser holds ------------------------------------------------------


def _classifier() -> nn.Module:
    model = nn.Module()
    model.backbone, model.head, model.spare = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2), nn.Linear(4, 2)
    model.forward = lambda x: model.head(model.backbone(x))
    mapsurgery.patch(model.backbone, "*", rank=2)
    return model


def test_what_trains_beside_the_adapters_is_named() -> None:
    notes = mapsurgery.verify(_classifier(), torch.randn(3, 4)).notes
    assert "4 other parameters train (20 numbers): head.weight, head.bias, spare.weight, spare.bias" in notes
    assert "no gradient reaches spare.weight, spare.bias" in notes
    assert "outside of the part that was patched" in notes[2] and "head.weight" in notes[2]
    model = mapsurgery.patch(TwoPaths(), "first", rank=2, train="second")
    notes = mapsurgery.verify(model, torch.randn(3, 4)).notes
    assert notes == ("2 other parameters train (20 numbers): second.weight, second.bias",)


class _Wrapper:
    """As accelerate's, without param_groups of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("wrap", [lambda o: o, _Wrapper, lambda o: [o]], ids=["itself", "wrapped", "list"])
def test_an_optimiser_from_before_patch_is_refused(wrap: Callable[[torch.optim.Optimizer], object]) -> None:
    model = TwoPaths()
    before = torch.optim.AdamW(model.parameters())
    mapsurgery.patch(model, "first", rank=2, train="second")
    with pytest.raises(mapsurgery.VerificationError, match="first: not in the optimiser: A, B, alpha, beta") as error:
        mapsurgery.verify(model, torch.randn(3, 4), optimizer=wrap(before))
    assert "frozen, though the optimiser holds them: first.weight, first.bias" in error.value.verification.notes
    after = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    notes = mapsurgery.verify(model, torch.randn(3, 4), optimizer=wrap(after)).notes
    assert not [note for note in notes if "optimiser" in note]


def test_an_optimiser_has_to_hold_what_else_trains() -> None:
    model = mapsurgery.patch(TwoPaths(), "first", rank=2, train="second")
    optimizer = torch.optim.SGD(model.first.adapter.parameters(), lr=1.0)
    with pytest.raises(mapsurgery.VerificationError, match="not in the optimiser: second.weight, second.bias"):
        mapsurgery.verify(model, torch.randn(3, 4), optimizer=optimizer)
    with pytest.raises(TypeError, match="param_groups, got int"):
        mapsurgery.verify(model, torch.randn(3, 4), optimizer=1)


# Examples -----------------------------------------------------------------------------------------------------------


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * scale


class TakesOneDict(TakesTwo):
    def forward(self, batch):  # noqa: ANN001, ANN201  # as many models are written
        return super().forward(batch["x"], batch["scale"])


class TakesOneTuple(TakesTwo):
    def forward(self, pair: tuple[torch.Tensor, ...], training: bool = False) -> torch.Tensor:
        return super().forward(*pair)


@pytest.mark.parametrize(
    ("cls", "example"),
    [(TakesTwo, dict), (TakesTwo, tuple), (TakesOneDict, dict), (TakesOneTuple, tuple)],
    ids=lambda c: c.__name__,
)
def test_an_example_is_spread_where_the_forward_takes_it_so(cls: type[nn.Module], example: type) -> None:
    values = {"x": torch.randn(3, 4), "scale": torch.randn(4)}
    given = values if example is dict else tuple(values.values())
    assert not mapsurgery.verify(mapsurgery.patch(cls(), "*", rank=2), given).failures


def test_inputs_are_fresh_in_each_run() -> None:
    class Appends(TakesTwo):
        def forward(self, x: torch.Tensor, seen: list, generator: torch.Generator) -> torch.Tensor:
            seen.append(1)
            x.mul_(2)
            return self.layer(x + torch.randn(x.shape, generator=generator)) * len(seen)

    x, seen, generator = nn.Linear(4, 4)(torch.randn(3, 4)), [], torch.Generator()
    value, state = x.detach().clone(), generator.get_state()
    assert not mapsurgery.verify(mapsurgery.patch(Appends(), "layer", rank=2), x, seen, generator=generator).failures
    assert seen == [] and torch.equal(x, value) and torch.equal(generator.get_state(), state)


def test_nothing_of_a_trial_stays_in_the_cache_of_autocast() -> None:
    model = mapsurgery.patch(TwoPaths(), "first", rank=2, train="second")
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        mapsurgery.verify(model, x)
        assert torch.equal(model(x), before)
