"""Adapters that were frozen after `patch` by a model's own methods or by other tools: named, or left by choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import llama, logits
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

import mapsurgery


def whisper() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 16, "max_target_positions": 32}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=64, num_mel_bins=8, **sizes, **heads, **ids, **lengths)
    )


ENCODER = "model.encoder.layers.0.self_attn.k_proj"


def test_a_frozen_encoder_is_named(tmp_path: Path) -> None:
    model = mapsurgery.patch(whisper(), "*attn*")
    model.freeze_encoder()
    with pytest.raises(ValueError, match=f"frozen after patch: {ENCODER}"):
        mapsurgery.param_groups(model, 1e-3)
    with pytest.raises(ValueError, match=f"frozen after patch: {ENCODER}"):
        mapsurgery.save(model, tmp_path / "a.safetensors")
    assert not [*tmp_path.iterdir()]


def test_a_frozen_encoder_is_left_by_choice(tmp_path: Path) -> None:
    model = mapsurgery.patch(whisper(), "*attn*")
    model.freeze_encoder()
    groups = mapsurgery.param_groups(model, 1e-3, frozen="keep")
    inside = {id(p) for group in groups for p in group["params"]}
    assert inside == {id(p) for p in model.parameters() if p.requires_grad}
    mapsurgery.save(model, tmp_path / "a.safetensors", frozen="keep")
    fresh = mapsurgery.load(whisper(), tmp_path / "a.safetensors")
    for name, p in mapsurgery.adapter_state_dict(model).items():
        assert torch.equal(p, mapsurgery.adapter_state_dict(fresh)[name])


def _peft_kbit(model: nn.Module) -> None:
    import peft

    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _diffusers_scripts(model: nn.Module) -> None:
    model.requires_grad_(False)  # unet.requires_grad_(False), as train_text_to_image_lora.py does


def _head_alone(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)


@pytest.mark.parametrize("freeze", [_peft_kbit, _diffusers_scripts, _head_alone])
def test_no_group_without_adapters(freeze: Callable[[nn.Module], None]) -> None:
    model = mapsurgery.patch(llama(), "*proj*")
    freeze(model)
    with pytest.raises(ValueError, match="frozen after patch: model.layers.0.self_attn.q_proj.* and 9 more"):
        mapsurgery.param_groups(model, 1e-3)


def test_nothing_that_trains_is_no_list_of_groups() -> None:
    model = mapsurgery.patch(llama(), "*proj*").requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in the model is trained"):
        mapsurgery.param_groups(model, 1e-3, frozen="keep")


def test_a_model_that_is_frozen_after_training_is_saved(tmp_path: Path) -> None:
    """eval and requires_grad_(False) is what people do with a model that is done."""
    model = mapsurgery.patch(llama(), "*proj*").requires_grad_(False)
    mapsurgery.save(model, tmp_path / "a.safetensors")
    assert torch.equal(logits(mapsurgery.load(llama(), tmp_path / "a.safetensors")), logits(model))


def test_what_train_named_is_named_when_it_is_frozen(tmp_path: Path) -> None:
    model = mapsurgery.patch(llama(), "*q_proj", train=["lm_head"])
    model.lm_head.requires_grad_(False)
    for call in (lambda: mapsurgery.param_groups(model, 1e-3), lambda: mapsurgery.save(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="frozen after patch: lm_head.weight"):
            call()


@pytest.mark.parametrize(
    ("options", "name"),
    [({"method": mapsurgery.Map(train_alpha=False)}, "alpha"), ({"update": "vera"}, "A, B")],
    ids=["alpha", "vera"],
)
def test_what_a_method_keeps_fixed_is_named_when_it_is_unfrozen(options: dict, name: str) -> None:
    model = mapsurgery.patch(llama(), "*q_proj", **options)
    model.model.layers[0].self_attn.q_proj.adapter.requires_grad_(True)
    with pytest.raises(ValueError, match=f"layers.0.self_attn.q_proj: {name} of its adapter was unfrozen"):
        mapsurgery.param_groups(model, 1e-3)


def test_an_unknown_choice_is_named(tmp_path: Path) -> None:
    model = mapsurgery.patch(llama(), "*q_proj")
    with pytest.raises(ValueError, match="frozen must be one of 'refuse', 'keep', got 'leave'"):
        mapsurgery.param_groups(model, 1e-3, frozen="leave")
    with pytest.raises(ValueError, match="frozen must be one of 'refuse', 'keep', got 'leave'"):
        mapsurgery.save(model, tmp_path / "a", frozen="leave")
