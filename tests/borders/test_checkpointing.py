"""Activation checkpointing of transformers, timm, diffusers and torch on models with a frozen base: gradients of the
adapters before, in and after the recomputed part are those of the same model without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import transformers
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mapsurgery

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_(en|dis)able.*:FutureWarning", "ignore:None of the inputs have requires_grad"
)


def _patched(model: nn.Module, targets: str | list[str]) -> Any:
    """In float64 and train mode, with adapters that have moved from their start, so that no gradient is 0."""
    mapsurgery.patch(model.double(), targets, rank=2).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def _grads(model: nn.Module) -> dict[str, Tensor]:
    """Of what is trained: each has one."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values()), [name for name in grads if grads[name] is None]
    return {name: grad for name, grad in grads.items() if grad is not None}


def _step(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gradients of one step."""
    model.zero_grad()
    output = model(**inputs)
    tensor = output if isinstance(output, Tensor) else output[0]
    torch.manual_seed(1)
    (tensor * torch.randn_like(tensor)).sum().backward()
    return _grads(model)


def _assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


IDS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _t5(kind: str) -> tuple[nn.Module, dict[str, Any], list[str]]:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return model, {"input_ids": IDS, "labels": IDS}, ["*.q", "*.v", "lm_head"]


def _speech(kind: str) -> tuple[nn.Module, dict[str, Any], list[str]]:
    config = getattr(transformers, f"{kind}Config")(
        **{name: value for name, value in SIZES.items() if not name.endswith("_prob")},
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        feat_extract_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_buckets=8,
        max_bucket_distance=16,
    )
    wave = torch.randn(2, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return getattr(transformers, f"{kind}Model")(config), {"input_values": wave}, ["*.q_proj", "*.v_proj"]


def _llama() -> tuple[nn.Module, dict[str, Any], list[str]]:
    sizes = {name: value for name, value in SIZES.items() if not name.endswith("_prob")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=1))
    return model, {"input_ids": IDS, "labels": IDS}, ["*_proj", "lm_head"]


def _bert() -> tuple[nn.Module, dict[str, Any], list[str]]:
    model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **SIZES))
    return model, {"input_ids": IDS}, ["*.query", "*.value"]


def _vit() -> tuple[nn.Module, dict[str, Any], list[str]]:
    model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return model, {"pixel_values": pixels}, ["*attention*"]


def _whisper() -> tuple[nn.Module, dict[str, Any], list[str]]:
    parts = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in [("layers", 2), ("ffn_dim", 24)]}
    config = transformers.WhisperConfig(
        vocab_size=40,
        d_model=16,
        **parts,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=10,
        dropout=0.0,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": sound, "labels": IDS}, ["*.q_proj", "*.v_proj"]


def _reformer() -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Reversible blocks: a Function of transformers' own, whatever checkpointing is asked for."""
    config = transformers.ReformerConfig(
        attn_layers=["local", "local"],
        attention_head_size=8,
        num_attention_heads=2,
        hidden_size=16,
        feed_forward_size=24,
        vocab_size=40,
        axial_pos_embds=False,
        max_position_embeddings=16,
        local_attn_chunk_length=4,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        is_decoder=True,
    )
    ids = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(2))
    return transformers.ReformerModel(config), {"input_ids": ids}, ["*.query", "*.value"]


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any], list[str]]]] = {
    **{kind: lambda kind=kind: _t5(kind) for kind in ("T5", "UMT5")},
    **{kind: lambda kind=kind: _speech(kind) for kind in ("Wav2Vec2", "Hubert", "WavLM")},
    "Llama": _llama,
    "Bert": _bert,
    "ViT": _vit,
    "Whisper": _whisper,
}


CASES = [(name, reentrant) for name in MODELS for reentrant in (True, False)]
CASES.remove(("WavLM", True))  # transformers' layers hand on what the layer before computed: torch recurses for ever


@pytest.mark.parametrize(("name", "reentrant"), CASES)
def test_gradients_of_transformers_models_are_those_without_checkpointing(name: str, reentrant: bool) -> None:
    model, inputs, targets = MODELS[name]()
    model = _patched(model, targets)
    expected = _step(model, inputs)
    for mode in dict.fromkeys([reentrant, False, reentrant]):  # a model may be switched
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode})
        _assert_same(_step(model, inputs), expected)
        _assert_same(_step(model, inputs), expected)
    model.gradient_checkpointing_disable()
    _assert_same(_step(model, inputs), expected)


def test_reversible_blocks_of_transformers_learn_from_the_first_step() -> None:
    """Reformer's are a Function of transformers' own; what the model appends to lists comes once."""
    model, inputs, targets = _reformer()
    model = _patched(model, targets)
    uncut = copy.deepcopy(model)
    uncut.embeddings.word_embeddings.weight.requires_grad_()
    expected = _step(uncut, inputs)
    del expected["embeddings.word_embeddings.weight"]
    _assert_same(_step(model, inputs), expected)
    inputs["output_hidden_states"] = True
    assert len(model(**inputs).hidden_states) == len(uncut(**inputs).hidden_states)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_checkpointing_of_timm(name: str) -> None:
    sizes = {"vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 12}}
    model = timm.create_model(name, **sizes.get(name, {}), num_classes=5)
    model = _patched(model, "*attn*" if "vit" in name else "layer*.conv2")
    inputs = {"x": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    expected = _step(model, inputs)
    model.set_grad_checkpointing()
    _assert_same(_step(model, inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_checkpointing_of_diffusers(reentrant: bool) -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    model = _patched(unet, ["*.to_q", "*.to_v", "*conv1"])
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, dtype=torch.float64),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 3, 8, dtype=torch.float64),
    }
    expected = _step(model, inputs)
    model.enable_gradient_checkpointing(lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant))
    _assert_same(_step(model, inputs), expected)


def test_the_reducer_of_ddp_sees_each_adapter_once(tmp_path: Path) -> None:
    model, inputs, targets = MODELS["Bert"]()
    model = _patched(model, targets)
    expected = _step(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            _step(parallel, inputs)
            _assert_same(_grads(model), expected)
    finally:
        dist.destroy_process_group()
