"""Models of other libraries, tiny and random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def llama(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Tied, and made of transformers' Conv1D."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    """An encoder and a decoder with one embedding."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def mixtral() -> MixtralForCausalLM:
    """A mixture of experts, stacks of matrices."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return pytest.importorskip("timm").create_model("test_vit", img_size=32).eval()


def convnext() -> nn.Module:
    torch.manual_seed(0)
    return pytest.importorskip("timm").create_model("test_convnext").eval()


def unet() -> nn.Module:
    """Of latents (n, 4, 8, 8), times (n,) and text (n, length, 16)."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """(2, 6, vocabulary)."""
    ids = tokens() if ids is None else ids
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def text_data(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    rows = torch.randint(3, 64, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """Every tensor of two models, bit for bit."""
    found = b.state_dict()
    assert found.keys() == a.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, found[name]), name
