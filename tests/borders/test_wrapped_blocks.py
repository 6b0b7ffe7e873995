"""What is put around blocks, before `patch` or after it: every call works, files have the names of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import mapsurgery


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.fc(self.norm(x)))


class Scaled(nn.Module):
    """A user's own wrapper, that no list can know."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.0 * self.inner(x)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.BatchNorm1d(8), Block(), nn.Linear(8, 3))


def data() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def _checkpointed(model: nn.Sequential) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda layer: isinstance(layer, Block))
    return model


def _compiled(model: nn.Sequential) -> nn.Module:
    for i in (0, 2):
        model[i] = torch.compile(model[i], backend="eager")
    return model


def _own(model: nn.Sequential) -> nn.Module:
    for i in (0, 2):
        model[i] = Scaled(model[i])
    return model


def _layers(model: nn.Sequential) -> nn.Module:
    """The adapted layer itself is wrapped."""
    for i in (0, 2):
        model[i].fc = torch.compile(model[i].fc, backend="eager")
    return model


def _both(model: nn.Sequential) -> nn.Module:
    return torch.compile(_checkpointed(_compiled(model)), backend="eager")


AFTER = [_checkpointed, _compiled, _own, _layers, _both]
OPTIONS = {"targets": "*fc", "rank": 2, "train": ["*norm*", "3"]}


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(mapsurgery.param_groups(model, 0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(data()).square().sum().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("wrap", AFTER)
def test_wrapped_after_patch(wrap: Callable, tmp_path: Path) -> None:
    expected = trained(mapsurgery.patch(net(), **OPTIONS))
    plain = mapsurgery.patch(net(), **OPTIONS)
    model = trained(wrap(plain))
    torch.testing.assert_close(model(data()), expected(data()))
    state = mapsurgery.adapter_state_dict(model)
    assert [*state] == [*mapsurgery.adapter_state_dict(expected)]
    mapsurgery.save(model, tmp_path / "a.safetensors")
    assert torch.equal(mapsurgery.load(net().eval(), tmp_path / "a.safetensors")(data()), plain(data()))
    mapsurgery.load_adapter_state_dict(mapsurgery.patch(net(), **OPTIONS), state)
    mapsurgery.load_adapter_state_dict(model, mapsurgery.adapter_state_dict(expected))
    assert {*mapsurgery.report(model).layers} == {"0.fc", "2.fc"}
    mapsurgery.verify(model, data())
    output = model(data())
    mapsurgery.merge(model)
    torch.testing.assert_close(model(data()), output)
    mapsurgery.unmerge(model)
    mapsurgery.unpatch(model)
    original = net()
    for parameter, same in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(parameter, same)
        assert parameter.requires_grad
    assert torch.equal(plain[1].running_mean, original[1].running_mean)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("wrap", [_checkpointed, _compiled, _layers])
def test_wrapped_before_patch(wrap: Callable, tmp_path: Path) -> None:
    """Patterns, plans and files have the names of the plain model."""
    model = wrap(net())
    assert [layer.path for layer in mapsurgery.plan(model, targets=["0.fc", "2.fc"]).layers] == ["0.fc", "2.fc"]
    trained(mapsurgery.patch(model, **OPTIONS))
    mapsurgery.save(model, tmp_path / "a.safetensors")
    fresh = mapsurgery.load(net().eval(), tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(data()), model(data()))
    again = mapsurgery.load(wrap(net()).eval(), tmp_path / "a.safetensors")
    torch.testing.assert_close(again(data()), model(data()))


@pytest.mark.usefixtures("_fresh_compiler")
def test_wrapped_while_merged() -> None:
    """A model that was wrapped between merge and unmerge."""
    model = trained(mapsurgery.patch(net(), **OPTIONS))
    expected = model(data())
    mapsurgery.merge(model, keep_base=True)
    _own(model)
    mapsurgery.unmerge(model)
    assert torch.equal(model(data()), expected)
    assert "0.fc.adapter.A" in mapsurgery.adapter_state_dict(model)


def test_a_layer_that_was_replaced_is_still_named() -> None:
    model = mapsurgery.patch(net(), **OPTIONS)
    model[2].fc = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="replaced after patch.*2.fc"):
        mapsurgery.param_groups(model, 1e-3)


def test_deep_copies_and_pickles_of_wrapped_models(tmp_path: Path) -> None:
    import copy

    model = _own(mapsurgery.patch(net(), **OPTIONS))
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        state = mapsurgery.adapter_state_dict(trained(other))
        assert {"0.fc.adapter.A", "0.norm.weight", "3.weight"} <= {*state}
        assert not any("inner" in name for name in state)
    part = copy.deepcopy(model[0])
    assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in model[0].parameters())
