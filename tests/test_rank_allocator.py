"""AdaLoRA's allocation is peft's on the same gradients; its state can be saved."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from definition import Net, image, net, train_steps
from torch import nn

import mapsurgery
from mapsurgery.surgery import record

SCHEDULE = {"total_steps": 20, "warmup": 3, "final": 5, "interval": 2, "beta1": 0.85, "beta2": 0.8}


def _model(method: str = "lora") -> nn.Module:
    return mapsurgery.patch(net(), "body", rank=4, method=method, update="adalora")


def _adapters(model: nn.Module) -> dict[str, Any]:
    return record.adapters_of(model)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, allocator: Any, seed: int) -> None:
    """A training step with random gradients."""
    random = torch.Generator().manual_seed(seed)
    for adapter in _adapters(model).values():
        for p in adapter.own_parameters().values():
            p.grad = torch.randn(p.shape, generator=random)
    optimizer.step()
    allocator.step()
    optimizer.zero_grad()


def test_masks_are_those_of_peft_on_the_same_gradients() -> None:
    peft = pytest.importorskip("peft")
    model = _model()
    twin = copy.deepcopy(mapsurgery.unpatch(copy.deepcopy(model)))
    config = peft.AdaLoraConfig(
        target_modules=["body.0", "body.2"], init_r=4, target_r=2, total_step=20, tinit=3, tfinal=5, deltaT=2,
        beta1=0.85, beta2=0.8,
    )  # fmt: skip
    theirs = peft.get_peft_model(twin, config)
    layers = {path: theirs.base_model.model.get_submodule(path) for path in ("body.0", "body.2")}
    pairs = {}
    for path, adapter in _adapters(model).items():
        for name, other in (("P", "lora_B"), ("lam", "lora_E"), ("Q", "lora_A")):
            pairs[adapter.get_parameter(name)] = getattr(layers[path], other)["default"]
    with torch.no_grad():
        for own, other in pairs.items():
            other.copy_(own.reshape(other.shape))
    allocator = mapsurgery.RankAllocator(model, 2, **SCHEDULE)
    optimizers = [torch.optim.AdamW(ps, lr=0.05) for ps in (list(pairs), list(pairs.values()))]
    random, seen = torch.Generator().manual_seed(0), []
    for step in range(20):
        for own, other in pairs.items():
            own.grad = torch.randn(own.shape, generator=random)
            other.grad = own.grad.reshape(other.shape)
        for optimizer in optimizers:
            optimizer.step()
        allocator.step()
        theirs.base_model.update_and_allocate(step)
        for own, other in pairs.items():
            torch.testing.assert_close(own.detach(), other.detach().reshape(own.shape), rtol=1e-6, atol=1e-7)
        seen.append(sum(int((a.lam == 0).sum()) for a in _adapters(model).values()))
    assert seen[:4] == [0] * 4 and seen[-5:] == [4] * 5  # 8 of λ, 4 in the end
    assert any(0 < gone < 4 for gone in seen)
    kept = {path: sum(mask) for path, mask in zip(layers, config.rank_pattern.values(), strict=True)}
    assert allocator.ranks() == kept and sum(kept.values()) == 4


def test_budgets_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator as Theirs

    model = _model()
    config = peft.AdaLoraConfig(
        target_modules=["body.0", "body.2"], init_r=4, target_r=1, total_step=20, tinit=3, tfinal=5, deltaT=2
    )
    theirs = Theirs(peft.get_peft_model(net(), config), config, "default")
    ours = mapsurgery.RankAllocator(model, 1, **SCHEDULE)
    assert [ours.budget(step) for step in range(20)] == [theirs.budget_schedule(step)[0] for step in range(20)]


@pytest.mark.parametrize("method", ["map", "lora", "dora"])
def test_training_ends_at_the_target_with_the_masked_values_at_zero(method: str) -> None:
    model = _model(method)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, 1e-2))
    allocator = mapsurgery.RankAllocator(model, 1.5, **SCHEDULE)
    assert allocator.ranks() == {"body.0": 4, "body.2": 4}
    for _ in range(20):
        loss = model(image()).square().mean() + 0.1 * mapsurgery.orthogonality_loss(model)
        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    ranks = allocator.ranks()
    assert sum(ranks.values()) == 3
    for path, adapter in _adapters(model).items():
        assert (adapter.lam != 0).sum() == ranks[path]


def test_a_run_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    first = _model()
    models = [first, copy.deepcopy(first)]
    allocators = [mapsurgery.RankAllocator(model, 2, **SCHEDULE) for model in models]
    optimizers = [torch.optim.SGD(mapsurgery.param_groups(model, 0.1)) for model in models]
    for step in range(9):
        for trio in zip(models, optimizers, allocators, strict=True):
            _step(*trio, seed=step)
    file = io.BytesIO()
    torch.save(allocators[1].state_dict(), file)
    file.seek(0)
    allocators[1] = mapsurgery.RankAllocator(models[1], 2, **SCHEDULE)
    allocators[1].load_state_dict(torch.load(file))
    for step in range(9, 20):
        for trio in zip(models, optimizers, allocators, strict=True):
            _step(*trio, seed=step)
    assert all(a.equal(b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert allocators[0].ranks() == allocators[1].ranks()


def test_a_state_of_another_model_is_refused() -> None:
    model = _model()
    allocator = mapsurgery.RankAllocator(model, 2, **SCHEDULE)
    _step(model, torch.optim.SGD(model.parameters(), lr=0.1), allocator, seed=0)
    state = allocator.state_dict()
    other = mapsurgery.patch(net(), "body", rank=2, update="adalora")
    with pytest.raises(ValueError, match=r"body.0.P has shape \(12, 4\), here \(12, 2\)"):
        mapsurgery.RankAllocator(other, 1, **SCHEDULE).load_state_dict(state)
    other = mapsurgery.patch(net(), "body.0", rank=4, update="adalora")
    with pytest.raises(ValueError, match="body.2.P .* here no such layer"):
        mapsurgery.RankAllocator(other, 1, **SCHEDULE).load_state_dict(state)


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("td,emd->tm", x, self.up)


def test_the_matrices_of_a_stack_compete_with_each_other() -> None:
    torch.manual_seed(0)
    model = mapsurgery.patch(_Stack(), [], rank=2, parameters="up", update="adalora")
    allocator = mapsurgery.RankAllocator(model, 1, **SCHEDULE)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(20):
        random = torch.Generator().manual_seed(step)
        for p in model.adapter_up.own_parameters().values():
            p.grad = torch.randn(p.shape, generator=random)
        with torch.no_grad():
            model.adapter_up.lam.grad[1].mul_(1e-6)  # the second matrix has next to no importance
            model.adapter_up.P.grad[1].mul_(1e-6)
            model.adapter_up.Q.grad[1].mul_(1e-6)
        optimizer.step()
        allocator.step()
    assert allocator.ranks() == {"up": 3}
    assert (model.adapter_up.lam[1] == 0).all()


def test_a_layer_that_took_no_part_in_a_step_counts_as_unimportant_there() -> None:
    model = _model()
    adapters = _adapters(model)
    allocator = mapsurgery.RankAllocator(model, 2, **SCHEDULE)
    optimizer = torch.optim.SGD(mapsurgery.param_groups(model, 0.1))
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p in adapters["body.0"].own_parameters().values():
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
        allocator.step()
    assert allocator.ranks() == {"body.0": 4, "body.2": 0}
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="before zero_grad"):
        mapsurgery.RankAllocator(model, 2, **SCHEDULE).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 4.5}, "target_rank must be from 0 to 4, .* got 4.5"),
        ({"target_rank": -1}, "target_rank.*-1"),
        ({"warmup": -1}, "warmup -1"),
        ({"final": 0}, "final 0"),
        ({"warmup": 15}, "warmup 15, final 5, total_steps 20"),
        ({"interval": 0}, "interval.*0"),
        ({"beta1": 1.0}, "beta1 must be between 0 and 1, got 1.0"),
        ({"beta2": 0}, "beta2.*0"),
    ],
)
def test_bad_numbers_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mapsurgery.RankAllocator(_model(), **{"target_rank": 2, **SCHEDULE, **options})


def test_another_family_is_refused_by_name() -> None:
    model = mapsurgery.patch(net(), "*", rank=2)
    for call in (lambda: mapsurgery.RankAllocator(model, 1, **SCHEDULE), lambda: mapsurgery.orthogonality_loss(model)):
        with pytest.raises(ValueError, match="stem: its update is 'lora'"):
            call()


def test_the_orthogonality_loss_is_pefts() -> None:
    peft = pytest.importorskip("peft")
    model = _model()
    assert mapsurgery.orthogonality_loss(model).item() < 1e-5  # factors start orthonormal
    train_steps(model, image(), lr=0.05)
    config = peft.AdaLoraConfig(
        target_modules=["body.0", "body.2"], init_r=4, total_step=9, tinit=1, tfinal=1, orth_reg_weight=0.5
    )
    theirs = peft.get_peft_model(_WithLoss(), config)
    layers = {path: theirs.base_model.model.get_submodule(path) for path in ("body.0", "body.2")}
    with torch.no_grad():
        for path, adapter in _adapters(model).items():
            layers[path].lora_A["default"].copy_(adapter.Q)
            layers[path].lora_B["default"].copy_(adapter.P)
    model.zero_grad()
    loss = mapsurgery.orthogonality_loss(model)
    theirs_loss = theirs.base_model(image()).loss
    torch.testing.assert_close(0.5 * loss, theirs_loss)
    loss.backward()
    theirs_loss.backward()
    for path, adapter in _adapters(model).items():
        torch.testing.assert_close(0.5 * adapter.P.grad, layers[path].lora_B["default"].grad)
        torch.testing.assert_close(0.5 * adapter.Q.grad, layers[path].lora_A["default"].grad)


class _Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


class _WithLoss(Net):
    """A model whose own loss is 0, as peft adds its term to an output's loss."""

    def forward(self, x: torch.Tensor) -> _Output:
        return _Output(0 * super().forward(x).sum())
