"""What befalls an adapter between `patch` and `merge`, for every method and update family: late weights, other
checkpoints, quantised bases, copies, construction without `patch`.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from definition import to_generic_point, weight_by
from test_families import UPDATES, every_update, main_methods, main_updates, options
from test_quantised import K, Packed4, source
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mapsurgery
from mapsurgery import updates
from mapsurgery.surgery.quantised.kinds import dequantised


def net() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def rows() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(6))


@main_methods
@main_updates
@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_meta_model_is_the_base_once_its_weights_arrive(how: str, update: str, method: str) -> None:
    original = net()
    with torch.device("meta"):
        model = mapsurgery.patch(nn.Sequential(*net()), "*", rank=2, **options(method, update))
    if how == "to_empty":
        model.to_empty(device="cpu").load_state_dict(original.state_dict())
    else:
        model.load_state_dict(original.state_dict(), assign=True)
    torch.testing.assert_close(model(rows()), original(rows()))
    if update == "vera":
        assert model[0].adapter.A is model[2].adapter.A
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert not mapsurgery.verify(model, rows()).failures


@main_methods
@main_updates
def test_another_checkpoint_under_a_fresh_adapter_is_the_new_base(update: str, method: str) -> None:
    if update.startswith(("pissa", "olora")):
        pytest.skip("starts from parts of the first W, as its paper has it: its update is 0 on any base")
    other = net()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.7).add_(torch.randn_like(p) * 0.05)
    model = mapsurgery.patch(net(), "*", rank=2, **options(method, update))
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(rows()), other(rows()))


@main_methods
@main_updates
def test_a_whole_checkpoint_and_a_pickle_bring_everything(update: str, method: str) -> None:
    model = to_generic_point(mapsurgery.patch(net(), "*", rank=2, **options(method, update)))
    expected = model(rows())
    again = mapsurgery.patch(net(), "*", rank=2, **options(method, update))
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(again(rows()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(rows()), expected)
    assert torch.equal(copy.deepcopy(model)(rows()), expected)


@main_methods
@main_updates
def test_an_adapter_of_another_kind_is_refused(update: str, method: str) -> None:
    model = mapsurgery.patch(net(), "*", rank=2, **options(method, update))
    state = mapsurgery.adapter_state_dict(model)
    other = {"method": mapsurgery.Lora(alpha=9.0)} if method != "lora" else {"method": "map"}
    with pytest.raises(ValueError, match="does not fit|was trained with"):
        mapsurgery.load_adapter_state_dict(mapsurgery.patch(net(), "*", rank=2, **other), state)


@main_methods
@main_updates
def test_a_quantised_base_runs_on_its_own_kernel(update: str, method: str) -> None:
    original = Packed4(source())
    layer = mapsurgery.patch(nn.Sequential(copy.deepcopy(original)), "*", rank=2, **options(method, update))
    x = torch.randn(4, K)
    torch.testing.assert_close(layer(x), original(x), rtol=1e-5, atol=1e-5)
    to_generic_point(layer)
    W_ = weight_by(layer[0].adapter, dequantised(layer[0]))
    expected = nn.functional.linear(x.double(), W_, original.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer[0].adapter.own_parameters().values())
    mapsurgery.merge(layer, quantised="dequantise")
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@every_update
def test_a_fake_model_can_be_patched(update: str) -> None:
    for method in ("map", "lora"):
        with FakeTensorMode():
            model = mapsurgery.patch(net(), "*", rank=2, **options(method, update))
            assert model(torch.randn(5, 8)).shape == (5, 3)


@main_methods
@main_updates
def test_a_zero_weight_gets_an_update(update: str, method: str) -> None:
    layer = nn.Linear(8, 6)
    nn.init.zeros_(layer.weight)
    original = copy.deepcopy(layer)
    mapsurgery.patch(layer, "*", rank=2, **options(method, update))
    assert torch.equal(layer(rows()), original(rows()))
    if update.startswith(("pissa", "olora")):
        return  # no part of 0 leads anywhere: `verify` says so
    assert not mapsurgery.verify(layer, rows()).failures


def test_vera_draws_one_pair_of_matrices_for_all_layers_of_a_shape() -> None:
    model = mapsurgery.patch(net(), "*", rank=2, update="vera")
    first, second, last = (model[i].adapter for i in (0, 2, 4))
    assert first.A is second.A is last.A and first.B is second.B and last.B.shape == (3, 2)
    assert not first.A.requires_grad and set(mapsurgery.adapter_state_dict(model)) == {
        f"{i}.adapter.{name}" for i in (0, 2, 4) for name in ("b", "d", "alpha", "beta")
    }
    copied = copy.deepcopy(model).double()
    assert copied[0].adapter.A is copied[2].adapter.A and copied[0].adapter.A is not first.A
    other = mapsurgery.patch(net(), "*", rank=2, update=updates.Vera(seed=1))
    assert not torch.equal(other[0].adapter.A, first.A)
    separate = mapsurgery.patch(net(), "*", rank=2, update="vera")
    assert torch.equal(separate[0].adapter.A, first.A) and separate[0].adapter.A is not first.A


def test_a_file_of_vera_with_other_numbers_is_refused(tmp_path, monkeypatch) -> None:
    model = mapsurgery.patch(net(), "*", rank=2, update="vera")
    mapsurgery.save(model, tmp_path / "a.safetensors")
    monkeypatch.setattr(updates.vera, "_first", lambda seed: 0.5)
    with pytest.raises(ValueError, match="first_random_number"):
        mapsurgery.load(net(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("update", ["lora", "vera"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_change_what_a_file_means(update: str, default: torch.dtype, tmp_path) -> None:
    model = net()
    torch.set_default_dtype(default)
    try:
        to_generic_point(mapsurgery.patch(model, "*", rank=2, update=update))
        mapsurgery.save(model, tmp_path / "a.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(mapsurgery.load(net(), tmp_path / "a.safetensors")(rows()), model(rows()))


def test_files_say_names_and_options(tmp_path) -> None:
    chosen = {"method": mapsurgery.Dora(alpha=3.0, exact=True), "update": updates.LoKr(factor=2)}
    model = mapsurgery.patch(net(), "*", rank=2, **chosen)
    mapsurgery.save(model, tmp_path / "a.safetensors")
    loaded = mapsurgery.load(net(), tmp_path / "a.safetensors")
    adapter = loaded[0].adapter
    assert (adapter.method, adapter.update) == (chosen["method"], chosen["update"])
    assert set(UPDATES) >= set(updates.REGISTRY)
