"""resize_token_embeddings of an adapted embedding or head works, or is refused before anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from homes import REFUSALS, registered, trained
from small_models import gpt2, llama, logits, t5, tokens
from torch import Tensor, nn

import mapsurgery

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama_embedding": (llama, "*embed_tokens"),
    "llama_head": (llama, "*lm_head"),
    "llama_all": (llama, "*"),
    "llama_tied_all": (lambda: llama(tied=True), "*"),
    "llama_tied_embedding": (lambda: llama(tied=True), "*embed_tokens"),
    "gpt2_all": (gpt2, "*"),
    "t5_all": (t5, "*"),
}
every_model = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)
SIZES = [{"new_num_tokens": 70}, {"new_num_tokens": 50}, {"new_num_tokens": 65, "pad_to_multiple_of": 16}]
every_size = pytest.mark.parametrize("asked", SIZES, ids=["more", "fewer", "padded"])


def rows_asked(asked: dict[str, int]) -> int:
    return 80 if "pad_to_multiple_of" in asked else asked["new_num_tokens"]


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refusal must leave: objects, numbers, classes and what the layers say of their sizes."""
    modules = dict(model.named_modules())
    return {
        "parameters": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "numbers": {n: p.detach().clone() for n, p in model.state_dict().items()},
        "modules": {n: (id(m), type(m)) for n, m in modules.items()},
        "sizes": {n: [getattr(m, k, None) for k in ("num_embeddings", "out_features")] for n, m in modules.items()},
        "vocabulary": (model.config.vocab_size, getattr(model, "vocab_size", None)),
        "grad": {n: p.requires_grad for n, p in model.named_parameters()},
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = state(model)
    numbers = before.pop("numbers"), after.pop("numbers")
    assert before == after
    assert set(numbers[0]) == set(numbers[1])
    assert all(torch.equal(numbers[1][n], value) for n, value in numbers[0].items())


@every_model
@every_size
def test_resizing_what_is_adapted_works_or_changes_nothing(make, targets: str, asked: dict, tmp_path: Path) -> None:
    """As many rows as said, new tokens run, and the model can be saved; or an error, and everything as it was."""
    model = trained(mapsurgery.patch(make(), targets, rank=2))
    before, output = state(model), logits(model)
    try:
        model.resize_token_embeddings(**asked)
    except REFUSALS as refusal:
        assert len(str(refusal)) > 20
        assert_unchanged(before, model)
        assert torch.equal(logits(model), output)
        return
    rows, inside, outside = rows_asked(asked), model.get_input_embeddings(), model.get_output_embeddings()
    assert inside.num_embeddings == rows and model.config.vocab_size == rows
    assert inside.weight.shape[0] == outside.weight.shape[0] == rows
    assert registered(inside).shape[0] == registered(outside).shape[0] == rows
    newest = torch.full((1, 3), rows - 1)
    assert logits(model, newest).shape == (1, 3, rows)
    known = min(rows, 64)
    kept = tokens() % known
    assert logits(model, kept)[..., :known].isfinite().all()
    model.train()
    model(input_ids=newest, labels=newest).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    model.eval()
    mapsurgery.save(model, tmp_path / "a.safetensors")
    model.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m").eval()
    mapsurgery.load(again, tmp_path / "a.safetensors")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("make", "targets"),
    [(llama, "*proj*"), (lambda: llama(tied=True), "*proj*"), (gpt2, "*attn*")],
    ids=["llama", "llama_tied", "gpt2"],
)
@every_size
def test_resizing_beside_adapters_works_as_ever(make, targets: str, asked: dict, tmp_path: Path) -> None:
    """Embeddings that are not adapted: rows, outputs of the tokens that were there, saving."""
    plain, model = make(), trained(mapsurgery.patch(make(), targets, rank=2))
    reference: list[Tensor] = []
    for each in (plain, model):
        torch.manual_seed(3)
        each.resize_token_embeddings(**asked, mean_resizing=False)
        reference.append(each.get_input_embeddings().weight.detach())
    rows = rows_asked(asked)
    assert torch.equal(*reference) and reference[1].shape[0] == rows == model.config.vocab_size
    with mapsurgery.disabled(model):
        ids = tokens() % min(rows, 64)
        assert torch.equal(logits(model, ids), logits(plain, ids))
    model.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(again, ids), logits(plain, ids))
    mapsurgery.save(model, tmp_path / "a.safetensors")
    mapsurgery.load(again, tmp_path / "a.safetensors")
    assert torch.equal(logits(again, ids), logits(model, ids))


@every_model
def test_resizing_to_the_same_size_changes_nothing(make, targets: str) -> None:
    """Scripts call it with len(tokenizer), which often is what the model has."""
    model = trained(mapsurgery.patch(make(), targets, rank=2))
    output = logits(model)
    try:
        model.resize_token_embeddings(64)
    except REFUSALS as refusal:
        assert len(str(refusal)) > 20
    assert torch.equal(logits(model), output)


@every_model
def test_a_resized_model_can_be_patched(make, targets: str) -> None:
    """Resize first, which is what a refusal should say."""
    model = make()
    model.resize_token_embeddings(70, mean_resizing=False)
    expected = logits(model)
    mapsurgery.patch(model, targets, rank=2)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert model.get_input_embeddings().weight.shape[0] == 70


def test_an_embedding_put_in_the_place_of_an_adapted_one_is_noticed() -> None:
    """set_input_embeddings takes the adapter out of the model: save says so."""
    model = trained(mapsurgery.patch(llama(), ["*embed_tokens", "*q_proj"], rank=2))
    model.set_input_embeddings(nn.Embedding(70, 32))
    with pytest.raises(ValueError, match="embed_tokens"):
        mapsurgery.adapter_state_dict(model)
