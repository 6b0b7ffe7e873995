"""State dictionaries: of the adapters alone, of the whole patched model, and of the original one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from definition import Snapshot, image, net, to_generic_point, train_steps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mapsurgery


def _patched(**options: object) -> nn.Module:
    return to_generic_point(mapsurgery.patch(net(), ["stem", "body"], rank=2, **options))


def test_the_original_checkpoint_loads_strictly_under_its_original_keys() -> None:
    model, other = _patched(), net(seed=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    result = model.load_state_dict(other.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model.stem.get_parameter("weight"), other.stem.weight)
    assert torch.equal(model.stem.adapter.weight_norm, other.stem.weight.double().norm().float().reshape(1))
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name])
    model.eval(), other.eval()
    with mapsurgery.disabled(model):
        assert torch.equal(model(image()), other(image()))
    mapsurgery.unpatch(model)
    assert torch.equal(model.body[0].weight, other.body[0].weight)


@pytest.mark.parametrize("relative", [True, False])
def test_a_fresh_adapter_on_a_loaded_checkpoint_is_that_checkpoint(relative: bool) -> None:
    model = mapsurgery.patch(net(), "*", rank=2, init=mapsurgery.Init(relative=relative)).eval()
    other = net(seed=1).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(image()), other(image()), rtol=1e-4, atol=1e-4)


def test_loading_does_not_change_the_callers_dictionary() -> None:
    state = net().state_dict()
    keys = list(state)
    _patched().load_state_dict(state)
    assert list(state) == keys


def test_what_the_original_checkpoint_lacks_or_has_too_much_is_still_reported() -> None:
    state = net().state_dict()
    del state["body.0.weight"]
    state["body.9.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        _patched().load_state_dict(state)
    assert "body.0.weight" in str(error.value) and "body.9.weight" in str(error.value)
    assert "adapter.A" not in str(error.value)
    wrong = net().state_dict()
    wrong["body.0.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"body\.0"):
        _patched().load_state_dict(wrong)


def test_a_patched_checkpoint_round_trips_strictly() -> None:
    model = _patched().eval()
    other = mapsurgery.patch(net(seed=1), ["stem", "body"], rank=2).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(image()), model(image()))
    state = model.state_dict()
    del state["stem.adapter.B"]
    with pytest.raises(RuntimeError, match=r"stem\.adapter\.B"):
        other.load_state_dict(state)


def test_the_patched_state_dict_names_every_parameter_and_no_property() -> None:
    model = _patched()
    state = model.state_dict()
    assert state["stem.weight"].data_ptr() == model.stem.get_parameter("weight").data_ptr()
    assert set(state) == {name for name, _ in model.named_parameters()} | {name for name, _ in net().named_buffers()}


def test_a_checkpoint_that_is_not_finite_is_named() -> None:
    state = net().state_dict()
    state["stem.weight"] = torch.full_like(state["stem.weight"], float("nan"))
    with pytest.raises((ValueError, RuntimeError), match="stem"):
        _patched().load_state_dict(state)


def test_adapter_state_dict_holds_what_adapting_changed() -> None:
    model = _patched(train="head.bias")
    names = ("A", "B", "alpha", "beta")
    expected = {f"{layer}.adapter.{n}" for layer in ("stem", "body.0", "body.2") for n in names}
    state = mapsurgery.adapter_state_dict(model)
    assert set(state) == expected | {"head.bias"}
    assert not any(t.requires_grad for t in state.values())
    assert state["stem.adapter.A"].data_ptr() == model.stem.adapter.A.data_ptr()
    train_steps(model, image(), steps=1)
    assert set(mapsurgery.adapter_state_dict(model)) == expected | {
        "head.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_load_adapter_state_dict_gives_the_same_output_bitwise() -> None:
    model = train_steps(_patched(train="head"), image()).eval()
    other = mapsurgery.patch(net(), ["stem", "body"], rank=2, train="head").eval()
    assert mapsurgery.load_adapter_state_dict(other, mapsurgery.adapter_state_dict(model)) is other
    assert torch.equal(other(image()), model(image()))


def test_a_state_in_which_alpha_was_the_magnitude_itself_is_refused() -> None:
    model, other = _patched(), _patched()
    for load, state in (
        (other.load_state_dict, model.state_dict()),
        (lambda state: mapsurgery.load_adapter_state_dict(other, state), mapsurgery.adapter_state_dict(model)),
    ):
        for local in state._metadata.values():
            if "form" in local:
                local["form"] = {"tau": 0.025, "relative": 1.0}
        with pytest.raises((RuntimeError, ValueError), match="alpha_start=0.*version of mapsurgery that saved it"):
            load(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("stem.adapter.A"), r"missing: stem\.adapter\.A"),
        (lambda s: s.update({"stem.adapter.C": torch.zeros(1)}), r"unknown: stem\.adapter\.C"),
        (lambda s: s.update({"body.0.weight": torch.zeros(12, 8)}), r"unknown: body\.0"),
        (
            lambda s: s.update({"stem.adapter.A": torch.zeros(3, 27)}),
            r"stem\.adapter\.A has shape \(3, 27\).*\(2, 27\)",
        ),
        (lambda s: s.pop("head.bias"), r"missing: head\.bias"),
    ],
    ids=["missing", "unknown", "weight", "shape", "trained"],
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(change, message: str) -> None:
    model = _patched(train="head.bias")
    state = {name: t + 1 for name, t in mapsurgery.adapter_state_dict(model).items()}
    change(state)
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        mapsurgery.load_adapter_state_dict(model, state)
    snapshot.assert_holds(model)


@pytest.mark.parametrize("other", [mapsurgery.Init(relative=False), mapsurgery.Init(gain=2.0)], ids=["units", "gain"])
def test_an_adapter_of_another_form_is_refused(other: mapsurgery.Init) -> None:
    source = to_generic_point(mapsurgery.patch(net(), "*", rank=2, init=other))
    model = mapsurgery.patch(net(), "*", rank=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="tau="):
        mapsurgery.load_adapter_state_dict(model, mapsurgery.adapter_state_dict(source))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="tau="):
        model.load_state_dict(source.state_dict())


def test_an_adapter_cannot_be_put_into_a_model_on_meta() -> None:
    state = mapsurgery.adapter_state_dict(mapsurgery.patch(net(), "*", rank=2))
    with torch.device("meta"):
        model = mapsurgery.patch(net(), "*", rank=2)
    with pytest.raises(ValueError, match="meta"):
        mapsurgery.load_adapter_state_dict(model, state)


@pytest.mark.parametrize("value", [[0.0], torch.zeros(2, 8, dtype=torch.int64)], ids=["list", "integers"])
def test_a_value_that_is_no_floating_tensor_is_named(value: object) -> None:
    model = mapsurgery.patch(net(), "body.0", rank=2)
    state = {**mapsurgery.adapter_state_dict(model), "body.0.adapter.A": value}
    with pytest.raises(ValueError, match=r"body\.0\.adapter\.A"):
        mapsurgery.load_adapter_state_dict(model, state)


@pytest.mark.parametrize("computed", [False, True], ids=["plain", "parametrised"])
def test_an_adapter_of_another_base_is_refused_and_nothing_changes(computed: bool) -> None:
    def make(seed: int) -> nn.Module:
        model = net(seed=seed)
        if computed:
            nn.utils.parametrizations.weight_norm(model.stem)
        return mapsurgery.patch(model, "*stem", rank=2)

    state = mapsurgery.adapter_state_dict(make(0))
    model = make(1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"another base: stem has \|\|W\|\|_F = .*, the adapter was trained on"):
        mapsurgery.load_adapter_state_dict(model, state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    mapsurgery.load_adapter_state_dict(model, dict(state))  # without metadata nothing is known of the base


def test_the_base_is_known_through_torch_save(tmp_path: Path) -> None:
    torch.save(mapsurgery.adapter_state_dict(mapsurgery.patch(net(), "*stem", rank=2)), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    with pytest.raises(ValueError, match="another base"):
        mapsurgery.load_adapter_state_dict(mapsurgery.patch(net(seed=1), "*stem", rank=2), state)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float32, "stem.adapter.B holds NaN or infinite values"),
        (float("-inf"), torch.float32, "stem.adapter.B holds NaN or infinite values"),
        (1e6, torch.float16, "stem.adapter.B holds values that are infinite in torch.float16"),
    ],
    ids=["NaN", "infinity", "overflow"],
)
def test_numbers_that_do_not_fit_change_nothing(value: float, dtype: torch.dtype, message: str) -> None:
    state = mapsurgery.adapter_state_dict(mapsurgery.patch(net(), "*stem", rank=2))
    state["stem.adapter.B"] = torch.full_like(state["stem.adapter.B"], 0.5)
    state["stem.adapter.B"][-1, -1] = value
    model = mapsurgery.patch(net(), "*stem", rank=2, dtype=dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        mapsurgery.load_adapter_state_dict(model, state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["RuntimeError", "Ctrl-C"])
def test_a_copy_that_fails_half_way_is_taken_back(error: BaseException) -> None:
    """All of the tensors, or none, whatever the device does."""

    class Failing(TorchDispatchMode):
        copies = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                self.copies += 1
                if self.copies == 3:
                    raise error
            return func(*args, **(kwargs or {}))

    model = mapsurgery.patch(net(), "*", rank=2)
    state = mapsurgery.adapter_state_dict(mapsurgery.patch(net(), "*", rank=2))
    for name in state:
        state[name] = state[name] + 1
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(type(error)), Failing():
        mapsurgery.load_adapter_state_dict(model, state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_checkpoint_that_lacks_some_adapters_says_so() -> None:
    """One without any is the original's: nothing is missing. One with some is of a patched model, which has all."""
    whole = _patched()
    state = {name: t.clone() for name, t in whole.state_dict().items() if not name.startswith("stem.adapter")}
    with pytest.raises(RuntimeError, match=r"Missing key.*stem\.adapter\.A.*stem\.adapter\.alpha"):
        _patched().load_state_dict(state)
    result = _patched().load_state_dict(state, strict=False)
    assert {name.rpartition(".")[2] for name in result.missing_keys} == {"A", "B", "alpha", "beta"}
    part = {name.removeprefix("body."): t for name, t in state.items() if name.startswith("body.")}
    assert not _patched().body.load_state_dict(part).missing_keys
    del state["body.0.adapter.B"]
    assert "body.0.adapter.B" in _patched().load_state_dict(state, strict=False).missing_keys


def test_statistics_that_overflow_are_refused() -> None:
    """A mask may hold -inf; a number that becomes infinite in the dtype of its place may not."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return mapsurgery.patch(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "0", rank=2)

    state = mapsurgery.adapter_state_dict(make())
    state["1.running_var"] = torch.full((4,), 1e6)
    with pytest.raises(ValueError, match=r"1\.running_var holds values that are infinite in torch.float16"):
        mapsurgery.load_adapter_state_dict(make().half(), dict(state))
    state["1.running_var"] = torch.full((4,), float("inf"))
    mapsurgery.load_adapter_state_dict(make(), state)
