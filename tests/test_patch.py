"""Patching, unpatching and disabling whole models: what changes, what must not, and what a failure leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from definition import Snapshot, image, net, to_generic_point, train_steps
from torch import nn

import mapsurgery
from mapsurgery.surgery import patch as patching


def _tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.body = nn.Linear(6, 6)
            self.out = nn.Linear(6, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.body(self.embed(ids)))

    return Tied()


def test_patch_works_in_place_on_the_same_objects() -> None:
    model = net()
    modules = dict(model.named_modules())
    held = [model.stem, model.body[0]]
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert mapsurgery.patch(model, ["stem", "body"], rank=2) is model
    for path, module in modules.items():
        assert model.get_submodule(path) is module
    assert isinstance(held[0], nn.Conv2d) and isinstance(held[0], mapsurgery.AdaptedLayer)
    assert model.stem.get_parameter("weight").data_ptr() == weights["stem.weight"]  # held, not copied


def test_only_adapters_and_what_train_names_are_trained() -> None:
    model = mapsurgery.patch(net(), "body", rank=2, train=["head.bias", "norm"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"body.{i}.adapter.{name}" for i in (0, 2) for name in ("A", "B", "alpha", "beta")}
    assert trained == adapters | {"head.bias", "norm.weight", "norm.bias"}


def test_every_parameter_name_leads_to_its_parameter() -> None:
    model = mapsurgery.patch(net(), "*", rank=2)
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter


def test_hooks_training_mode_and_attributes_of_a_layer_stay() -> None:
    model = net().eval()
    model.body[0].note = "kept"
    calls = []
    model.body[0].register_forward_hook(lambda *_: calls.append("after"))
    model.body[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    mapsurgery.patch(model, "body", rank=2)
    model(image())
    assert calls == ["before", "after"] and model.body[0].note == "kept"
    assert not any(module.training for module in model.modules())
    mapsurgery.unpatch(model)
    model(image())
    assert calls == ["before", "after"] * 2


def test_unpatch_gives_back_the_model_bitwise_after_training() -> None:
    model = net()
    model.norm.bias.requires_grad_(False)
    snapshot = Snapshot(model)
    output = model.eval()(image())
    model.train()
    mapsurgery.patch(model, ["stem", "body"], rank=2, train=["head", "norm"])
    train_steps(model, image())
    changed = model.state_dict()
    assert not torch.equal(changed["head.weight"], snapshot.state["head.weight"])
    assert not torch.equal(changed["norm.running_mean"], snapshot.state["norm.running_mean"])
    assert mapsurgery.unpatch(model) is model
    snapshot.assert_holds(model)
    assert torch.equal(model.eval()(image()), output)
    assert "_mapsurgery" not in model.__dict__


def test_a_model_that_is_one_layer_can_be_patched() -> None:
    model = nn.Linear(4, 3)
    snapshot = Snapshot(model)
    mapsurgery.patch(model, "*", rank=2)
    assert model.get_parameter("adapter.A") is model.adapter.A
    assert "layer" in str(mapsurgery.report(model))
    mapsurgery.unpatch(model)
    snapshot.assert_holds(model)


def test_a_tie_is_kept_by_patch_and_unpatch() -> None:
    model = _tied()
    snapshot = Snapshot(model)
    ids = torch.arange(5)
    expected = model(ids)
    mapsurgery.patch(model, ["out", "body"], rank=2, tied="separate")
    assert model.out.get_parameter("weight") is model.embed.weight
    assert torch.equal(model(ids), expected)
    mapsurgery.unpatch(model)
    assert model.out.weight is model.embed.weight
    snapshot.assert_holds(model)


def test_a_layer_whose_tied_weight_is_trained_is_not_adapted() -> None:
    with pytest.raises(ValueError, match="'out'.*trained in full"):
        mapsurgery.patch(_tied(), "out", rank=2, train="embed")


def test_unpatch_keeps_the_order_of_parameters_where_the_weight_was_not_the_first() -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    model = nn.Sequential(layer)
    assert list(model.state_dict()) == ["0.bias", "0.weight"]
    snapshot = Snapshot(model)
    mapsurgery.patch(model, "*", rank=2)
    mapsurgery.unpatch(model)
    snapshot.assert_holds(model)


def test_one_module_in_two_places_is_adapted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    snapshot = Snapshot(model)
    mapsurgery.patch(model, "2", rank=2)
    assert model[0] is model[2] and isinstance(model[0], mapsurgery.AdaptedLayer)
    assert not mapsurgery.verify(model, torch.randn(3, 4)).failures
    mapsurgery.unpatch(model)
    snapshot.assert_holds(model)


# Failures leave the model as it was ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_patched(bad: float) -> None:
    model = net()
    with torch.no_grad():
        model.body[2].weight[3, 1] = bad
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"body\.2.*NaN"):
        mapsurgery.patch(model, "*", rank=2)
    snapshot.assert_holds(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_patch_that_fails_midway_is_rolled_back(monkeypatch: pytest.MonkeyPatch, at: int, error: type) -> None:
    model = net()
    model.stem.bias.requires_grad_(False)
    snapshot = Snapshot(model)
    calls = iter(range(10))
    original = patching.attach

    def failing(*args: Any) -> nn.Module:
        if next(calls) == at:
            raise error("midway")
        return original(*args)

    monkeypatch.setattr(patching, "attach", failing)
    with pytest.raises(error, match="midway"):
        mapsurgery.patch(model, "*", rank=2)
    snapshot.assert_holds(model)


def test_a_class_that_cannot_be_derived_from_is_rolled_back() -> None:
    class Closed(nn.Linear):
        def __init_subclass__(cls, **kwargs: object) -> None:
            raise TypeError("no subclasses")

    model = nn.Sequential(nn.Linear(4, 4), Closed(4, 4))
    snapshot = Snapshot(model)
    with pytest.raises(TypeError, match="no subclasses"):
        mapsurgery.patch(model, "*", rank=2)
    snapshot.assert_holds(model)


def test_patching_twice_is_refused_and_changes_nothing() -> None:
    model = mapsurgery.patch(net(), "body", rank=2)
    snapshot = Snapshot(model)
    for target in ("body", "head"):
        with pytest.raises(ValueError, match=r"patched already.*body\.0.*unpatch"):
            mapsurgery.patch(model, target, rank=2)
    with pytest.raises(ValueError, match="patched already"):
        mapsurgery.plan(nn.Sequential(model), "*")
    snapshot.assert_holds(model)


def test_operations_on_a_model_that_is_not_patched_say_so() -> None:
    model = net()
    snapshot = Snapshot(model)
    for operation in (
        mapsurgery.unpatch,
        mapsurgery.merge,
        mapsurgery.unmerge,
        mapsurgery.report,
        mapsurgery.adapter_state_dict,
        lambda m: mapsurgery.save(m, "/nowhere/x"),
        lambda m: mapsurgery.param_groups(m, 1e-3),
        lambda m: mapsurgery.verify(m, image()),
        lambda m: mapsurgery.load_adapter_state_dict(m, {}),
        lambda m: mapsurgery.disabled(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="Net"):
            operation(model)
    snapshot.assert_holds(model)


def test_parts_patched_one_by_one_are_told_apart() -> None:
    model = net()
    mapsurgery.patch(model.body, "*", rank=2)
    mapsurgery.patch(model.head, "*", rank=2)
    with pytest.raises(ValueError, match="body, head"):
        mapsurgery.unpatch(model)
    mapsurgery.unpatch(model.head)
    mapsurgery.unpatch(model)  # the one part that is left
    assert type(model.body[0]) is nn.Linear


# disabled ------------------------------------------------------------------------------------------------------------


def test_disabled_is_the_base_and_ends_with_its_block() -> None:
    model = net().eval()
    base = model(image())
    to_generic_point(mapsurgery.patch(model, "*", rank=2))
    adapted = model(image())
    assert not torch.equal(adapted, base)
    with mapsurgery.disabled(model) as inner:
        assert inner is model and torch.equal(model(image()), base)
        with mapsurgery.disabled(model):
            assert torch.equal(model(image()), base)
        assert torch.equal(model(image()), base)
    assert torch.equal(model(image()), adapted)
    with pytest.raises(KeyError), mapsurgery.disabled(model):
        raise KeyError
    assert torch.equal(model(image()), adapted)


def test_disabled_leaves_what_train_names_as_trained() -> None:
    model = mapsurgery.patch(net(), "body", rank=2, train="head")
    train_steps(model, image())
    model.eval()
    with mapsurgery.disabled(model):
        found = model(image())
    other = net().eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k}, strict=False)
    assert torch.equal(found, other(image()))


def test_two_models_patched_alike_do_not_share_anything() -> None:
    model = mapsurgery.patch(net(), "*", rank=2)
    other = copy.deepcopy(model)
    with mapsurgery.disabled(other):
        assert model.body[0].adapter.enabled and not other.body[0].adapter.enabled
    to_generic_point(other)
    assert not model.body[0].adapter.B.any()
    mapsurgery.unpatch(other)
    assert isinstance(model.body[0], mapsurgery.AdaptedLayer)


# Meta models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["assign", "to_empty"])
@pytest.mark.parametrize("kind", ["soft", "zero", "random"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_meta_model_is_the_base_once_its_weights_arrive(how: str, kind: str, relative: bool) -> None:
    source = net().eval()
    with torch.device("meta"):
        model = net()
    plan = mapsurgery.plan(model, "*", rank=2)
    assert "on meta" in str(plan)
    mapsurgery.patch(model, "*", rank=2, init=mapsurgery.Init(kind, relative=relative))
    with pytest.raises(ValueError, match="meta"):
        mapsurgery.report(model)
    with pytest.raises(ValueError, match="meta"):
        mapsurgery.merge(model)
    if how == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=how == "assign")
    model.eval()
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    torch.testing.assert_close(model(image()), source(image()), rtol=1e-5, atol=1e-6)
    for layer in (model.stem, model.body[0], model.body[2], model.head):
        assert torch.equal(layer.adapter.weight_norm, layer.get_parameter("weight").double().norm().float().reshape(1))
        assert layer.adapter.A.any() and not layer.get_parameter("weight").requires_grad
        assert all(p.requires_grad for p in layer.adapter.own_parameters().values())
    assert not mapsurgery.verify(model, image()).failures


def test_a_meta_model_cannot_be_saved(tmp_path) -> None:
    with torch.device("meta"):
        model = mapsurgery.patch(net(), "*", rank=2)
    with pytest.raises(ValueError, match="stem.*meta"):
        mapsurgery.save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("assign", [True, False])
def test_a_patched_checkpoint_loads_into_a_patched_meta_model(assign: bool) -> None:
    source = to_generic_point(mapsurgery.patch(net(), "*", rank=2)).eval()
    with torch.device("meta"):
        model = net()
    mapsurgery.patch(model, "*", rank=2)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(model.eval()(image()), source(image()))


def test_a_meta_model_can_be_unpatched_and_loaded_afterwards() -> None:
    with torch.device("meta"):
        model = net()
    snapshot = Snapshot(model)
    mapsurgery.patch(model, "*", rank=2)
    mapsurgery.unpatch(model)
    snapshot.assert_holds(model)
    model.load_state_dict(net().state_dict(), assign=True)


def test_a_pattern_that_stays_inside_the_model_of_a_wrapper_is_found_through_it() -> None:
    model = mapsurgery.patch(net(), "body", rank=2)
    wrapped = nn.Sequential(model)
    assert mapsurgery.adapter_state_dict(wrapped).keys() == mapsurgery.adapter_state_dict(model).keys()
    assert mapsurgery.unpatch(wrapped) is wrapped and type(model.body[0]) is nn.Linear
