"""Merging: exact, in place, never at another's expense; and taking it back."""

from __future__ import annotations

import copy
import pickle
import signal
from typing import Any

import pytest
import torch
from definition import Snapshot, image, net, to_generic_point, train_steps, weight_of
from test_patch import _tied
from torch import nn

import mapsurgery


def _patched(**options: object) -> nn.Module:
    return to_generic_point(mapsurgery.patch(net(), ["stem", "body"], rank=2, **options)).eval()


def test_a_merged_model_is_plain_torch_and_computes_the_adapted_output() -> None:
    model, plain = _patched().double(), net()
    expected = model(image().double())
    names = list(plain.state_dict())
    assert mapsurgery.merge(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == names and "_mapsurgery" not in model.__dict__
    torch.testing.assert_close(model(image().double()), expected, rtol=1e-12, atol=1e-12)
    plain.double().eval().load_state_dict(model.state_dict())
    assert torch.equal(plain(image().double()), model(image().double()))


def test_merge_restores_requires_grad_and_keeps_trained_values() -> None:
    model = net()
    model.norm.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    mapsurgery.patch(model, "body", rank=2, train="head")
    train_steps(model, image())
    head = model.head.weight.detach().clone()
    mapsurgery.merge(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert torch.equal(model.head.weight, head)


def test_merge_writes_into_the_weights_own_memory() -> None:
    model = _patched()
    places = [layer.get_parameter("weight") for layer in (model.stem, model.body[0])]
    mapsurgery.merge(model)
    assert model.stem.weight is places[0] and model.body[0].weight is places[1]


@pytest.mark.parametrize(
    "layout",
    ["channels_last", "strided", "sliced", "transposed_kernel"],
)
def test_a_convolution_of_any_memory_layout_is_merged_in_place(layout: str) -> None:
    layer = nn.Conv2d(6, 8, 3)
    weight = layer.weight.detach().clone()
    storage = {
        "channels_last": lambda: weight.to(memory_format=torch.channels_last),
        "strided": lambda: torch.stack([weight, torch.full_like(weight, 7.0)], -1)[..., 0],
        "sliced": lambda: torch.cat([weight, torch.full_like(weight, 7.0)], 1)[:, :6],
        "transposed_kernel": lambda: weight.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]()
    layer.weight = nn.Parameter(storage)
    assert torch.equal(layer.weight, weight)
    to_generic_point(mapsurgery.patch(layer, "*", rank=2))
    expected, stride = weight_of(layer), storage.stride()
    mapsurgery.merge(layer)
    assert layer.weight.data_ptr() == storage.data_ptr() and layer.weight.stride() == stride
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-6)
    rest = torch.as_strided(storage, (storage.untyped_storage().nbytes() // 4,), (1,), 0)
    assert (rest == 7).sum() == (0 if layout in ("channels_last", "transposed_kernel") else weight.numel())


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize("other", ["out", "second", "buffer", "view"])
def test_merging_never_changes_another_holder_of_the_weight(other: str, keep_base: bool) -> None:
    model = _tied()
    if other == "second":  # both holders adapted
        model.embed = nn.Linear(6, 11, bias=False)
        model.embed.weight = model.out.weight
        holders = ["out", "embed"]
    else:
        holders = ["out"]
    if other == "buffer":
        model.register_buffer("copy", model.out.weight.detach())
    if other == "view":
        model.part = nn.Linear(6, 3, bias=False)
        model.part.weight = nn.Parameter(model.out.weight.detach()[4:7])
    original = model.out.weight.detach().clone()
    to_generic_point(mapsurgery.patch(model, holders, rank=2, tied="separate"))
    expected = {name: model.get_submodule(name).weight.detach().clone() for name in holders}
    mapsurgery.merge(model, keep_base=keep_base)
    for name in holders:
        torch.testing.assert_close(model.get_submodule(name).weight, expected[name], rtol=1e-5, atol=1e-6)
    if other != "second":
        assert torch.equal(model.embed.weight, original)
    if other == "buffer":
        assert torch.equal(model.copy, original)
    if other == "view":
        assert torch.equal(model.part.weight, original[4:7])


def test_rows_of_zeros_are_that_again_after_unmerging_dora() -> None:
    layer = nn.Embedding(40, 6).double()
    with torch.no_grad():
        layer.weight[::2] = 0
    model = to_generic_point(mapsurgery.patch(layer, "*", rank=2, method="dora"))
    ids = torch.arange(40)
    expected = model(ids).detach()
    for _ in range(2):
        mapsurgery.unmerge(mapsurgery.merge(model))
        assert not model.get_parameter("weight")[::2].any()
        torch.testing.assert_close(model(ids), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", ["verify", "keep_base"])
def test_a_length_of_zero_can_be_unmerged_whatever_was_merged_before(before: str) -> None:
    model = to_generic_point(mapsurgery.patch(net(), "body", rank=2, method="dora"))
    if before == "verify":  # which merges for a moment
        mapsurgery.verify(model, image())
    else:
        mapsurgery.unmerge(mapsurgery.merge(model, keep_base=True))
    adapter = model.body[0].adapter
    with torch.no_grad():
        adapter.m[0] = -adapter.__dict__["_row_lengths"][0]
    W = model.body[0].get_parameter("weight").detach().clone()
    mapsurgery.unmerge(mapsurgery.merge(model))
    torch.testing.assert_close(model.body[0].get_parameter("weight").detach(), W)


def test_merging_a_frozen_tied_weight_leaves_it_frozen() -> None:
    model = _tied().requires_grad_(False)
    mapsurgery.patch(model, "out", rank=2)
    mapsurgery.merge(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_parts_of_one_storage_that_do_not_overlap_are_merged_in_place() -> None:
    shared = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(shared[:4]), nn.Parameter(shared[4:])
    to_generic_point(mapsurgery.patch(model, "*", rank=2))
    expected = [weight_of(layer).float() for layer in model]
    mapsurgery.merge(model)
    for layer, want in zip(model, expected, strict=True):
        torch.testing.assert_close(layer.weight, want, rtol=1e-5, atol=1e-5)
    assert model[0].weight.data_ptr() == shared.data_ptr()


@pytest.mark.parametrize("name", ["A", "B", "alpha", "beta"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_named_and_nothing_is_merged(name: str, bad: float) -> None:
    model = _patched()
    with torch.no_grad():
        getattr(model.body[2].adapter, name).view(-1)[0] = bad
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=rf"body\.2: {name} "):
        mapsurgery.merge(model)
    snapshot.assert_holds(model)


def test_unmerge_is_exact_to_the_bit_with_the_base_kept() -> None:
    model = _patched(train="head")
    snapshot = Snapshot(model)
    mapsurgery.merge(model, keep_base=True)
    assert mapsurgery.unmerge(model) is model
    snapshot.assert_holds(model)


def test_unmerge_without_the_base_is_right_to_the_rounding_of_merging() -> None:
    model = _patched()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    output = model(image()).detach()
    mapsurgery.merge(model)
    mapsurgery.unmerge(model)
    assert list(dict(model.named_parameters())) == list(expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(image()), output, rtol=1e-4, atol=1e-5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in expected if n.rpartition(".")[2] in ("A", "B", "alpha", "beta")
    }


def test_unmerge_gives_a_tie_back() -> None:
    model = _tied()
    to_generic_point(mapsurgery.patch(model, "out", rank=2, tied="separate"))
    mapsurgery.merge(model)
    assert model.out.weight is not model.embed.weight
    mapsurgery.unmerge(model)
    mapsurgery.unpatch(model)
    assert model.out.weight is model.embed.weight


def test_unpatch_after_unmerge_is_the_original_bitwise() -> None:
    model = net()
    snapshot = Snapshot(model)
    to_generic_point(mapsurgery.patch(model, "*", rank=2))
    mapsurgery.merge(model, keep_base=True)
    mapsurgery.unmerge(model)
    mapsurgery.unpatch(model)
    snapshot.assert_holds(model)


def test_a_base_that_alpha_wipes_out_is_kept_for_unmerge() -> None:
    model = _patched()
    with torch.no_grad():
        model.body[2].adapter.alpha.fill_(-1)
    base = model.body[2].get_parameter("weight").clone()
    mapsurgery.unmerge(mapsurgery.merge(model))
    assert torch.equal(model.body[2].get_parameter("weight"), base)


def test_a_final_merge_leaves_no_trace() -> None:
    model = _patched()
    expected = model(image())
    mapsurgery.merge(model, final=True)
    torch.testing.assert_close(model(image()), expected, rtol=1e-5, atol=1e-6)
    assert b"mapsurgery" not in pickle.dumps([module.__dict__ for module in model.modules()])
    with pytest.raises(ValueError, match="merged"):
        mapsurgery.unmerge(model)
    with pytest.raises(ValueError, match="keep_base"):
        mapsurgery.merge(_patched(), keep_base=True, final=True)


def test_an_unmerge_that_fails_midway_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _patched()
    expected = model(image())
    mapsurgery.merge(model)
    adapter = mapsurgery.methods.Adapter
    original = adapter.unmerge_from
    calls = []

    def failing(self: nn.Module, *args: torch.Tensor) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError("midway")
        original(self, *args)

    monkeypatch.setattr(adapter, "unmerge_from", failing)
    with pytest.raises(MemoryError, match="midway"):
        mapsurgery.unmerge(model)
    torch.testing.assert_close(model(image()), expected, rtol=1e-4, atol=1e-5)
    mapsurgery.unmerge(model)
    torch.testing.assert_close(model(image()), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model.body[2], mapsurgery.AdaptedLayer)


def test_an_interrupt_comes_after_the_merge_not_within(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _patched()
    expected = model(image())
    original = type(model.stem.adapter).merge_into

    def interrupted(*args: Any) -> None:
        original(*args)
        if not isinstance(model.stem, mapsurgery.AdaptedLayer):  # the rehearsal is over
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(type(model.stem.adapter), "merge_into", interrupted)
    # A process that a shell starts in the background ignores the signal unless it says otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            mapsurgery.merge(model)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(isinstance(module, mapsurgery.AdaptedLayer) for module in model.modules())
    torch.testing.assert_close(model(image()), expected, rtol=1e-5, atol=1e-6)


def test_unmerge_is_refused_where_there_is_nothing_to_take_back() -> None:
    with pytest.raises(ValueError, match="merged"):
        mapsurgery.unmerge(net())
    model = mapsurgery.merge(_patched())
    mapsurgery.patch(model, "head", rank=2)
    with pytest.raises(ValueError, match="patched again"):
        mapsurgery.unmerge(model)


def test_a_merged_model_can_be_patched_merged_and_copied_again() -> None:
    model = mapsurgery.merge(_patched())
    output = model(image())
    twin = copy.deepcopy(model)
    mapsurgery.patch(model, "*", rank=2)
    assert torch.allclose(model(image()), output, atol=1e-6)
    mapsurgery.merge(model)
    mapsurgery.unmerge(twin)
    assert isinstance(twin.body[0], mapsurgery.AdaptedLayer) and type(model.body[0]) is nn.Linear


def test_a_merged_model_that_was_cast_unmerges_into_its_new_dtype() -> None:
    model = mapsurgery.merge(_patched(), keep_base=True).double()
    mapsurgery.unmerge(model)
    model(image().double())


def test_zero_weights_merge_and_unmerge() -> None:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    to_generic_point(mapsurgery.patch(layer, "*", rank=2))
    expected = weight_of(layer)
    mapsurgery.merge(layer)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-7)
    mapsurgery.unmerge(layer)
    assert layer.get_parameter("weight").abs().max() < 1e-6


def test_large_weights_are_merged_block_by_block_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from mapsurgery.ops import operators

    weight, A, B = torch.randn(13, 7), torch.randn(2, 7), torch.randn(13, 2)
    rest = torch.tensor([0.9]), torch.tensor([0.4])
    whole, blocks = weight.clone(), weight.clone()
    operators.merge_(whole, A, B, *rest)
    monkeypatch.setattr(operators, "_MERGE_ELEMENTS", 21)
    operators.merge_(blocks, A, B, *rest)
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-7)
    operators.unmerge_(blocks, A, B, *rest)
    torch.testing.assert_close(blocks, weight, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_expanded_is_refused_or_merged_but_never_half() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.randn(4, 1).expand(4, 4))
    try:
        to_generic_point(mapsurgery.patch(model, "*", rank=2))
        mapsurgery.merge(model)
    except (ValueError, RuntimeError):
        pass
    assert len({isinstance(layer, mapsurgery.AdaptedLayer) for layer in model}) == 1


def test_a_merge_that_fails_midway_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _patched()
    snapshot = Snapshot(model)
    last = model.body[2].adapter
    original = type(last).merge_into

    def failing(adapter: nn.Module, *args: torch.Tensor) -> None:
        if adapter is last:
            raise MemoryError("midway")
        original(adapter, *args)

    monkeypatch.setattr(type(last), "merge_into", failing)
    with pytest.raises(MemoryError, match="midway"):
        mapsurgery.merge(model, keep_base=True)
    snapshot.assert_holds(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("undoing", [False, True], ids=["merge", "unmerge"])
def test_what_fails_midway_gives_back_the_identical_bits(
    dtype: torch.dtype, undoing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _patched().to(dtype)
    if undoing:
        mapsurgery.merge(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    name = "unmerge_from" if undoing else "merge_into"
    original, calls = getattr(mapsurgery.methods.Adapter, name), []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("midway")
        original(*args)

    monkeypatch.setattr(mapsurgery.methods.Adapter, name, failing)
    with pytest.raises(MemoryError, match="midway"):
        mapsurgery.unmerge(model) if undoing else mapsurgery.merge(model)
    after = model.state_dict()
    assert len(calls) == 3 and after.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())


def test_a_part_of_a_patched_model_is_not_undone_by_itself() -> None:
    model = _patched()
    for operation in (mapsurgery.merge, mapsurgery.unpatch):
        with pytest.raises(ValueError, match="part of a patched model"):
            operation(model.body)


def test_unmerge_is_refused_where_a_part_was_patched_again() -> None:
    model = _patched()
    mapsurgery.merge(model, keep_base=True)
    mapsurgery.patch(model.body, "*", rank=1)
    with pytest.raises(ValueError, match=r"patched again.*body\.0"):
        mapsurgery.unmerge(model)
