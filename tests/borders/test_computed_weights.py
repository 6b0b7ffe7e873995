"""Weights that torch's hooks and parametrisations compute: outside of a forward they are those of now."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from homes import COMPUTED, Case, of_cases
from torch import Tensor, nn

import mapsurgery

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

HOOKED = [case for case in COMPUTED if case.name.startswith(("old_", "pruned"))]
Change = Callable[[nn.Module, Case], None]


def _loads(model: nn.Module, case: Case) -> None:
    torch.manual_seed(7)
    other = case.make().state_dict()
    missing, unexpected = model.load_state_dict(other, strict=False)
    assert not unexpected and all("adapter" in name for name in missing)


def _casts(model: nn.Module, case: Case) -> None:
    model.double()


def _verifies(model: nn.Module, case: Case) -> None:
    mapsurgery.verify(model, case.data())
    _loads(model, case)


def _loads_disabled(model: nn.Module, case: Case) -> None:
    with mapsurgery.disabled(model):
        model(case.data())
    _loads(model, case)


@of_cases(*[case for case in COMPUTED if case.name != "pruned"])  # which merge refuses
@pytest.mark.parametrize("change", [_loads, _casts, _verifies, _loads_disabled])
def test_merge_takes_the_weight_of_now(case: Case, change: Change) -> None:
    """The merged model computes what the adapted one computes now, not what the last forward left."""
    model = case.patch(case.built())
    model(case.data())
    change(model, case)
    data = case.data().to(next(model.parameters()).dtype)
    expected = copy.deepcopy(model.state_dict())
    merged = mapsurgery.merge(model)(data)
    mapsurgery.unmerge(model)
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(merged, model(data), rtol=1e-4, atol=1e-5)


@of_cases(*HOOKED)
def test_reports_and_files_have_the_weight_of_now(case: Case, tmp_path) -> None:
    model = case.patch(case.built())
    model(case.data())
    _loads(model, case)
    before = mapsurgery.report(model)
    mapsurgery.save(model, tmp_path / "a.safetensors")
    model(case.data())
    assert str(mapsurgery.report(model)) == str(before)
    fresh = case.built()
    _loads(fresh, case)
    mapsurgery.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(case.data()), model(case.data()))


@of_cases(*HOOKED)
def test_unpatch_leaves_the_hook_at_work(case: Case) -> None:
    model = case.patch(case.built())
    model(case.data())
    _loads(model, case)
    plain = case.built()
    _loads(plain, case)
    mapsurgery.unpatch(model)
    torch.testing.assert_close(model(case.data()), plain(case.data()))


class Packs(nn.Linear):
    """Writes its weight into a state_dict itself, and looks at it in a hook."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.seen: list[Tensor] = []
        self.register_state_dict_pre_hook(lambda module, *_: module.seen.append(module.weight.detach().clone()))
        self._register_load_state_dict_pre_hook(self.before_loading)

    def before_loading(self, *_: object) -> None:
        self.seen.append(self.weight.detach().clone())

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.detach()
        destination[f"{prefix}bias"] = self.bias.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.seen.append(self.weight.detach().clone())


@pytest.mark.parametrize("packed", [False, True])
def test_a_module_that_saves_itself_saves_the_frozen_weight(packed: bool) -> None:
    """While it is saved or loaded, `weight` reads as the Parameter."""
    model = nn.Sequential(Packs(6, 5))
    W = model[0].weight.detach().clone()
    mapsurgery.patch(model, "*", rank=2)
    with torch.no_grad():
        model[0].adapter.B.add_(1)
    output = model(torch.ones(2, 6))
    state = copy.deepcopy(model[0].state_dict() if packed else model.state_dict())
    assert torch.equal(state["weight" if packed else "0.weight"], W)
    assert not torch.equal(model[0].weight, W)
    (model[0] if packed else model).load_state_dict(state)
    assert torch.equal(model(torch.ones(2, 6)), output)
    assert model[0].seen and all(torch.equal(seen, W) for seen in model[0].seen)


def geometric() -> tuple[nn.Module, tuple[Tensor, ...]]:
    nn_ = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lin, self.gat = nn_.GCNConv(6, 8), nn_.Linear(8, 8), nn_.GATConv(8, 4)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.gat(self.lin(self.conv(x, edges).relu()), edges)

    torch.manual_seed(0)
    return Net().eval(), (torch.randn(4, 6), edges)


def test_torch_geometrics_layers_load_what_they_saved() -> None:
    """Its Linear has a `_save_to_state_dict` and a `__deepcopy__` of its own."""
    plain, inputs = geometric()
    base = copy.deepcopy(plain.state_dict())
    model, _ = geometric()
    mapsurgery.patch(model, (), parameters=["*.weight", "*.lin.weight"], rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.B"):
                parameter.add_(torch.randn_like(parameter))
    output = model(*inputs)
    assert not torch.allclose(output, plain(*inputs))
    state = copy.deepcopy(model.state_dict())
    assert all(torch.equal(state[name], t) for name, t in base.items())
    model.load_state_dict(state)
    assert torch.equal(model(*inputs), output)
    torch.testing.assert_close(copy.deepcopy(model)(*inputs), output)
    copied = copy.deepcopy(model)
    mapsurgery.merge(copied)
    torch.testing.assert_close(copied(*inputs), output, rtol=1e-4, atol=1e-5)
    mapsurgery.unpatch(model)
    assert torch.equal(model(*inputs), plain(*inputs))
