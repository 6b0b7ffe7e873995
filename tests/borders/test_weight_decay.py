"""Weight decay of optimisers that know nothing of adapters pulls W' to W, never W to 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from homes import trained
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import mapsurgery

SIZE = 12
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
    "NAdam": lambda p, **options: torch.optim.NAdam(p, decoupled_weight_decay=True, **options),
}
_INITS = {
    "relative": mapsurgery.Init(),
    "absolute": mapsurgery.Init(relative=False),
    "paper": mapsurgery.Init("zero"),
    "random": mapsurgery.Init("random", relative=False),
}
every_init = pytest.mark.parametrize("init", _INITS.values(), ids=_INITS)


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
    return mapsurgery.patch(model, "*", **{"rank": 2, **options})


def distance(layer: nn.Module) -> float:
    W, W_ = layer.get_parameter("weight").detach(), layer.weight.detach()
    return ((W_ - W).norm() / W.norm()).item()


def idle(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps of which the loss says nothing."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for _ in range(steps):
        optimizer.step()


@pytest.mark.parametrize("options", [*({"init": init} for init in _INITS.values()), {"method": "dora"}], ids=str)
@pytest.mark.parametrize("make", _OPTIMIZERS.values(), ids=_OPTIMIZERS)
def test_idle_steps_leave_the_base(make: Callable[..., Any], options: dict[str, Any]) -> None:
    model = net(**options)
    before = [layer.get_parameter("weight").detach().clone() for layer in (model[0], model[2])]
    idle(model, make(model.parameters(), lr=1e-3, weight_decay=0.1), 100)
    for layer, W in zip((model[0], model[2]), before, strict=True):
        if "method" in options:  # which divides lengths by lengths
            torch.testing.assert_close(layer.weight, W, rtol=1e-6, atol=0)
        else:
            assert torch.equal(layer.weight, W) and layer.adapter.alpha.item() == 0


@every_init
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decay_pulls_a_trained_adapter_to_the_base(init: mapsurgery.Init, dtype: torch.dtype) -> None:
    model = trained(net(init=init, dtype=dtype))
    before = distance(model[0]), model[0].adapter.alpha.abs().item()
    idle(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), 300)
    assert distance(model[0]) < 0.3 * before[0] and model[0].adapter.alpha.abs().item() < 0.1 * before[1]


@pytest.mark.parametrize("method", ["map", "lora", "dora"])
@pytest.mark.parametrize("update", ["lora", "vera", "loha", "lokr", "adalora", "flora", "dense"])
def test_it_does_so_in_every_family_whose_update_is_0_at_the_start(method: str, update: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3) if update == "flora" else nn.Linear(SIZE, SIZE))
    layer = trained(mapsurgery.patch(model, "*", rank=2, method=method, update=update))[0]
    with torch.no_grad():
        for p in layer.adapter.own_parameters().values():
            p.add_(0.1)
    before = distance(layer)
    idle(layer, torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=1.0), 60)
    assert distance(layer) < 0.1 * before


class Idle(nn.Module):
    """Its loss depends on all parameters, and is 0 whatever they are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": 0 * self.model(x).sum()}


@every_init
def test_the_trainer_decays_an_adapter_to_its_base(init: mapsurgery.Init, tmp_path: Path) -> None:
    model = trained(net(init=init))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=60,
        weight_decay=0.1,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(Idle(model), arguments, train_dataset=[{"x": torch.randn(SIZE)} for _ in range(8)])
    before = distance(model[0])
    trainer.train()
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decays[id(model[0].adapter.alpha)] == 0.1  # the Trainer knows nothing of it
    assert distance(model[0]) < 0.5 * before


def test_an_untouched_model_is_its_base_after_training_with_accelerate() -> None:
    model = Idle(net())
    before = model.model[0].get_parameter("weight").detach().clone()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    for _ in range(20):
        accelerator.backward(prepared(torch.randn(3, SIZE))["loss"])
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.model[0].weight, before)


def test_param_groups_decay_no_magnitude() -> None:
    model = trained(net())
    alphas = [layer.adapter.alpha.detach().clone() for layer in (model[0], model[2])]
    idle(model, torch.optim.AdamW(mapsurgery.param_groups(model, lr=1e-2, weight_decay=0.1)), 50)
    assert all(torch.equal(layer.adapter.alpha, a) for layer, a in zip((model[0], model[2]), alphas, strict=True))
