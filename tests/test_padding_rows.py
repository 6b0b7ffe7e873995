"""The row at `padding_idx` of an embedding is not trained, and so it is in W' what it is in W, to the bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from definition import STARTS, start_name, to_generic_point, weight_of
from test_families import METHODS, UPDATES, options
from torch import Tensor, nn
from torch.nn import functional as F

import mapsurgery
from mapsurgery.integrations.peft import from_peft_state_dict, to_peft_config, to_peft_state_dict

ROW = 2
IDS = torch.tensor([[1, ROW, 3, 4], [ROW, 5, 8, 0]])


class Scaled(nn.Embedding):
    """With a forward of its own, as BART's: it reads the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


KINDS = {"embedding": nn.Embedding, "own_forward": Scaled, "bag": nn.EmbeddingBag}
every_kind = pytest.mark.parametrize("kind", KINDS)


def _layer(kind: str = "embedding", padding_idx: int | None = ROW, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(4)
    layer = KINDS[kind](9, 6, padding_idx=padding_idx)
    nn.init.normal_(layer.weight)  # a pretrained model's row is rarely 0
    return layer.to(dtype)


def _train(model: nn.Module, ids: Tensor = IDS) -> nn.Module:
    """Steps that move every row which has a gradient, and by decay also what has none."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(ids)
        (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
        optimizer.step()
    return model


def _assert_kept(layer: nn.Module, W: Tensor) -> None:
    assert torch.equal(layer.weight[ROW], W[ROW])
    others = torch.arange(len(W)) != ROW
    assert (layer.weight != W)[others].any(1).all()
    if isinstance(layer, nn.Embedding):
        scale = 3 if isinstance(layer, Scaled) else 1
        assert torch.equal(layer(IDS)[0, 1], W[ROW] * scale)
        torch.testing.assert_close(layer(IDS).double(), weight_of(layer)[IDS] * scale, rtol=1e-2, atol=1e-2)


def _lives(layer: nn.Module, tmp_path: Path, kind: str, **arguments: object) -> None:
    """What the row goes through in the life of an adapter."""
    W = layer.weight.detach().clone()
    mapsurgery.patch(layer, "*", rank=2, **arguments)
    _train(layer)
    _assert_kept(to_generic_point(layer), W)
    found = weight_of(layer)
    measured = mapsurgery.report(layer).layers[""]
    assert measured["change"] == pytest.approx(((found - W).norm() / W.norm()).item(), rel=1e-3)
    mapsurgery.save(layer, tmp_path / "a.safetensors")
    fresh = mapsurgery.load(_layer(kind), tmp_path / "a.safetensors")
    assert torch.equal(fresh(IDS), layer(IDS))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        _assert_kept(twin, W)
    expected = layer(IDS)
    mapsurgery.merge(layer)
    assert torch.equal(layer.weight[ROW], W[ROW])
    torch.testing.assert_close(layer(IDS), expected)
    mapsurgery.unmerge(layer)
    assert torch.equal(layer.get_parameter("weight")[ROW], W[ROW])
    _assert_kept(layer, W)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("method", METHODS)
def test_the_row_stays_with_every_family(method: str, update: str, tmp_path: Path) -> None:
    _lives(_layer(), tmp_path, "embedding", **options(method, update))


@pytest.mark.parametrize("update", ["lora", "dense"])
@pytest.mark.parametrize("method", ["map", "lora", "dora_exact"])
@pytest.mark.parametrize("kind", ["own_forward", "bag"])
def test_the_row_stays_in_the_weight_that_a_forward_reads(kind: str, method: str, update: str, tmp_path: Path) -> None:
    _lives(_layer(kind), tmp_path, kind, **options(method, update))


@pytest.mark.parametrize("init", STARTS, ids=start_name)
@every_kind
def test_the_row_stays_with_every_start(kind: str, init: mapsurgery.Init, tmp_path: Path) -> None:
    _lives(_layer(kind), tmp_path, kind, init=init)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["map", "dora"])
@every_kind
def test_the_row_stays_in_other_dtypes(kind: str, method: str, dtype: torch.dtype) -> None:
    layer = _layer(kind, dtype=dtype)
    W = layer.weight.detach().clone()
    _assert_kept(to_generic_point(mapsurgery.patch(layer, "*", rank=2, method=method, update="dense")), W)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight[ROW], W[ROW])
    assert torch.equal(mapsurgery.merge(layer).weight[ROW], W[ROW])


@pytest.mark.parametrize("update", ["lora", "dense"])
@every_kind
def test_gradients_are_those_of_the_weight_with_its_row_left_out(kind: str, update: str) -> None:
    layer = to_generic_point(mapsurgery.patch(_layer(kind, dtype=torch.float64), "*", rank=2, update=update))
    own = list(layer.adapter.trained_parameters().values())
    layer.adapter.read_by([None])  # W' with the row that the formula gives
    formula = layer.adapter("effective_weight", layer.get_parameter("weight")) + 0
    layer.adapter.read_by([ROW])
    direction = torch.randn(9, 6, dtype=torch.float64)
    seen = direction.clone()
    seen[ROW] = 0
    expected = torch.autograd.grad((formula * seen).sum(), own)
    for want, got in zip(expected, torch.autograd.grad((layer.weight * direction).sum(), own), strict=True):
        torch.testing.assert_close(got, want)


class Tied(nn.Module):
    """A head, or a second embedding, with the weight of the first."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = _layer(), head
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x) if isinstance(self.head, nn.Linear) else x + self.head(ids.roll(1, 1))


def test_a_head_that_shares_the_adapter_trains_the_row_as_it_trains_the_weight() -> None:
    plain, model = (Tied(nn.Linear(6, 9, bias=False)) for _ in range(2))
    W = plain.embed.weight.detach().clone()
    assert not torch.equal(_train(plain).embed.weight[ROW], W[ROW])
    mapsurgery.patch(model, "*", rank=2, update="dense")
    _train(model)
    row = model.head.weight[ROW] + 0
    assert not torch.equal(row, W[ROW])
    assert torch.equal(model.embed(IDS)[0, 1], row) and torch.equal(model.embed.weight[ROW], row)
    through_embedding = torch.autograd.grad(model.embed(torch.tensor([ROW])).sum(), [model.embed.adapter.T])
    assert not through_embedding[0].any()
    expected = model(IDS)
    mapsurgery.merge(model)
    torch.testing.assert_close(model.embed.weight[ROW], row)
    torch.testing.assert_close(model(IDS), expected)


@pytest.mark.parametrize(("other", "kept"), [(ROW, True), (3, False), (None, False)])
def test_embeddings_that_share_an_adapter_keep_the_row_that_all_of_them_pass_over(
    other: int | None, kept: bool, tmp_path: Path
) -> None:
    plain, model = (Tied(nn.Embedding(9, 6, padding_idx=other)) for _ in range(2))
    W = plain.embed.weight.detach().clone()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(IDS).square().sum().backward()
    optimizer.step()
    assert torch.equal(plain.embed.weight[ROW], W[ROW]) is kept
    _train(mapsurgery.patch(model, "*", rank=2, update="dense"))
    for layer in (model.embed, model.head):
        assert torch.equal(layer.weight[ROW], W[ROW]) is kept
        assert torch.equal(layer(IDS)[0, 1], layer.weight[ROW])
    mapsurgery.save(model, tmp_path / "a.safetensors")
    fresh = mapsurgery.load(Tied(nn.Embedding(9, 6, padding_idx=other)), tmp_path / "a.safetensors")
    assert torch.equal(fresh(IDS), model(IDS))
    model.head.padding_idx = ROW
    _assert_kept(model.embed, W)


def test_separate_adapters_of_a_tied_weight_keep_the_row_in_the_embedding_alone() -> None:
    model = Tied(nn.Linear(6, 9, bias=False))
    W = model.embed.weight.detach().clone()
    _train(mapsurgery.patch(model, "*", rank=2, update="dense", tied="separate"))
    assert torch.equal(model.embed.weight[ROW], W[ROW])
    assert not torch.equal(model.head.weight[ROW], W[ROW])


@every_kind
def test_another_padding_idx_after_patch_keeps_another_row(kind: str) -> None:
    layer = _layer(kind, padding_idx=4)
    W = layer.weight.detach().clone()
    to_generic_point(mapsurgery.patch(layer, "*", rank=2))
    layer.padding_idx = ROW - 9  # counted from the end, as torch allows
    _assert_kept(layer, W)
    moved = layer(IDS)
    copied = copy.deepcopy(layer)
    mapsurgery.merge(copied)
    torch.testing.assert_close(copied(IDS), moved)
    layer.padding_idx = None
    assert not torch.equal(layer.weight[ROW], W[ROW])
    assert not torch.equal(layer.weight[4], W[4])


@pytest.mark.usefixtures("_fresh_compiler")
@every_kind
def test_the_row_stays_in_graphs(kind: str) -> None:
    model = nn.Sequential(_layer(kind))
    W = model[0].weight.detach().clone()
    to_generic_point(mapsurgery.patch(model, "*", rank=2))
    expected = model(IDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (IDS,)).module()
    for form in (compiled, exported):
        torch.testing.assert_close(form(IDS), expected)
    if kind == "embedding":
        assert torch.equal(compiled(IDS)[0, 1], W[ROW]) and torch.equal(exported(IDS)[0, 1], W[ROW])


def test_reading_the_weight_elsewhere_gives_the_kept_row() -> None:
    layer = _layer()
    W = layer.weight.detach().clone()
    to_generic_point(mapsurgery.patch(layer, "*", rank=2, init="random"))
    assert torch.equal(F.linear(torch.eye(6), layer.weight)[:, ROW], W[ROW])


def test_a_file_is_refused_where_another_row_is_kept(tmp_path: Path) -> None:
    layer = to_generic_point(mapsurgery.patch(_layer(), "*", rank=2))
    mapsurgery.save(layer, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has padding_idx 2 in the file, whose row stays the base's, and None here"):
        mapsurgery.load(_layer(padding_idx=None), tmp_path / "a.safetensors")
    other = mapsurgery.patch(_layer(padding_idx=3), "*", rank=2)
    with pytest.raises(ValueError, match="padding_idx=2, this one has .* padding_idx=3; .* on the same padding_idx"):
        mapsurgery.load_adapter_state_dict(other, mapsurgery.adapter_state_dict(layer))


def test_peft_gets_the_row_unchanged_and_may_not_bring_another() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(_layer())
    W = model[0].weight.detach().clone()
    to_generic_point(mapsurgery.patch(model, "*", rank=2, method="lora"))
    theirs = peft.get_peft_model(nn.Sequential(_layer()), peft.LoraConfig(**to_peft_config(model)))
    state = to_peft_state_dict(model)
    peft.set_peft_model_state_dict(theirs, state)
    torch.testing.assert_close(theirs(IDS), model(IDS))
    assert torch.equal(theirs(IDS)[0, 1], W[ROW])
    next(t for name, t in state.items() if "embedding_A" in name)[:, ROW] = 1
    with pytest.raises(ValueError, match=f"changes row {ROW} of its weight, its padding_idx"):
        from_peft_state_dict(nn.Sequential(_layer()), state, to_peft_config(model))
