"""A scheduled beta is what the schedule says, is not trained, and goes on where it was."""

from __future__ import annotations

import pytest
import torch
from definition import image, net, train_steps
from torch import nn

import mapsurgery
from mapsurgery.contrib import BetaSchedule, linear_warmup
from mapsurgery.surgery import record


def _model(relative: bool = True, **options: object) -> nn.Module:
    init = mapsurgery.Init(relative=relative)
    return mapsurgery.patch(net(), "*", rank=2, method=mapsurgery.Map(train_beta=False), init=init, **options)


def _betas(model: nn.Module) -> list[float]:
    """In units of ||W||_F."""
    return [layer["beta"] for layer in mapsurgery.report(model).layers.values()]


@pytest.mark.parametrize("relative", [True, False])
def test_beta_follows_the_function_and_training_leaves_it(relative: bool) -> None:
    model = _model(relative)
    schedule = BetaSchedule(model, lambda step: 0.3 / (step + 1))
    for step in range(3):
        assert _betas(model) == pytest.approx([0.3 / (step + 1)] * 4, rel=1e-6)
        train_steps(model, image(), steps=1)
        schedule.step()
    if not relative:
        norm = model.head.adapter.weight_norm.item()
        assert model.head.adapter.beta.item() == pytest.approx(0.3 / 4 * norm, rel=1e-6)
    assert mapsurgery.report(model).layers["head"]["change"] > 0


def test_warmup_rises_from_a_beta_that_learns() -> None:
    function = linear_warmup(0.2, steps=4)
    assert [function(step) for step in range(6)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    model = _model()
    schedule = BetaSchedule(model, function)
    model(image()).square().mean().backward()
    assert all(site.adapter.B.grad.any() for site in record.all_sites(model))
    schedule.step()
    assert _betas(model) == pytest.approx([0.1] * 4)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        linear_warmup(0.2, steps=0)


def test_a_zero_weight_has_the_unit_one() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    mapsurgery.patch(layer, "*", rank=2, method=mapsurgery.Map(train_beta=False), init=mapsurgery.Init(relative=False))
    BetaSchedule(layer, lambda step: 0.7)
    assert layer.adapter.beta.item() == pytest.approx(0.7)


def test_the_state_leads_back_to_the_step() -> None:
    function = linear_warmup(0.4, steps=10)
    first = BetaSchedule(_model(), function)
    for _ in range(3):
        first.step()
    model = _model()
    second = BetaSchedule(model, function)
    second.load_state_dict(first.state_dict())
    assert second.current == 3 and _betas(model) == pytest.approx([0.16] * 4)
    second.step()
    assert _betas(model) == pytest.approx([0.2] * 4)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_step_follows_without_compiling_again() -> None:
    model = _model()
    schedule = BetaSchedule(model, lambda step: 0.5 * step)
    train_steps(model, image(), steps=1)
    compiled = torch.compile(model.eval(), backend="aot_eager")
    compiled(image())
    schedule.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(image()), model(image()))


def test_what_cannot_be_scheduled_is_named() -> None:
    with pytest.raises(ValueError, match=r"stem: beta is trained.*Map\(train_beta=False\)"):
        BetaSchedule(mapsurgery.patch(net(), "*", rank=2), lambda step: 0.1)
    with pytest.raises(ValueError, match="stem: method 'lora' has no beta"):
        BetaSchedule(mapsurgery.patch(net(), "*", rank=2, method="lora"), lambda step: 0.1)
    with pytest.raises(ValueError, match="patch first"):
        BetaSchedule(net(), lambda step: 0.1)
    with torch.device("meta"):
        model = mapsurgery.patch(nn.Sequential(nn.Linear(4, 4)), "*", rank=2, method=mapsurgery.Map(train_beta=False))
    with pytest.raises(ValueError, match="0: .*meta"):
        BetaSchedule(model, lambda step: 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True, torch.tensor(0.1)])
def test_a_function_that_gives_no_number_is_named_and_changes_nothing(value: object) -> None:
    model = _model()
    with pytest.raises(ValueError, match="for step 0, not a finite number"):
        BetaSchedule(model, lambda step: value)  # type: ignore[arg-type, return-value]
    assert _betas(model) == pytest.approx([0.1] * 4)


def test_a_step_that_fails_is_not_taken() -> None:
    model = _model()
    schedule = BetaSchedule(model, lambda step: 0.2 if step == 0 else float("nan"))
    with pytest.raises(ValueError, match="gave nan for step 1"):
        schedule.step()
    assert schedule.current == 0 and _betas(model) == pytest.approx([0.2] * 4)
