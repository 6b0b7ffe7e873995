"""What the rules for transformers' models do not fit: values of a configuration, inputs, classes, options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import ResNetConfig

from .entry import Inputs, args, floats, ids

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _mrope(*section: int) -> dict[str, Any]:
    """Text part of a vision language model, whose rotations are split over time, height and width."""
    return {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": list(section)}}}


def _backbone() -> dict[str, Any]:
    """A small ResNet in the place of the one that would be downloaded."""
    small = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    features = ResNetConfig(**small, out_features=["stage2", "stage3", "stage4"])
    return {"backbone_config": features, "use_timm_backbone": False, "backbone": None}


def _detector() -> dict[str, Any]:
    """DETR and the first of its followers take the last map alone."""
    found = _backbone()
    found["backbone_config"].out_features = ["stage4"]
    return found


def _convolutions() -> dict[str, Any]:
    """wav2vec 2's feature extractor with two convolutions."""
    return {
        "conv_dim": [16, 16],
        "conv_stride": [5, 4],
        "conv_kernel": [8, 4],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_length": 2,
    }


def _sew() -> dict[str, Any]:
    return {**_convolutions(), "squeeze_factor": 2}


OVERRIDES: dict[str, dict[str, Any] | Callable[[], dict[str, Any]]] = {
    "autoformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "informer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "bert": {"is_decoder": True},
    "bit": {"num_groups": 4},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "conditional_detr": _detector,
    "dab-detr": _detector,
    "deformable_detr": _backbone,
    "detr": _detector,
    "table-transformer": _detector,
    "data2vec-audio": _convolutions,
    "hubert": _convolutions,
    "sew": _sew,
    "sew-d": _sew,
    "speecht5": _convolutions,
    "unispeech": _convolutions,
    "unispeech-sat": _convolutions,
    "wav2vec2": _convolutions,
    "wavlm": _convolutions,
    "wav2vec2-bert": {"vocab_size": 64, "feature_projection_input_dim": 80},
    "wav2vec2-conformer": lambda: {**_convolutions(), "vocab_size": 64},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "n_group": None, "topk_group": None},
    "depth_anything": {"neck_hidden_sizes": [16, 16], "reassemble_factors": [4, 2]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2},
    "glm4v": _mrope(2, 1, 1),
    "glm4v_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"rope_parameters": _ROPE},
    "hunyuan_v1_moe": {"rope_parameters": _ROPE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "has_relative_attention_bias": False},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"rope_parameters": _ROPE},
    "mimi": {"upsample_groups": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nystromformer": {"segment_means_seq_len": 7, "num_landmarks": 7},
    "qwen2_vl": _mrope(1, 1, 2),
    "qwen2_5_vl": _mrope(1, 1, 2),
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "paddleocr_vl": _mrope(1, 1, 2),
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "num_buckets": 4,
        "hash_seed": 0,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "max_position_embeddings": 32,
    },
    "sam": {
        "prompt_encoder_config": {"image_embedding_size": 4, "image_size": 32, "patch_size": 8},
        "vision_config": {"num_pos_feats": 16},
    },
    "swin": {"patch_size": 2},
    "donut-swin": {"patch_size": 2},
    "dpt": {"is_hybrid": False, "backbone_out_indices": [0, 1, 1, 1], "neck_hidden_sizes": [16, 16, 16, 16]},
    "textnet": {"image_size": [32, 32]},
    "yolos": {"image_size": [32, 32]},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "hybrid_layer_ids": [1], "num_mem_blocks": 1},
}

CLASSES: dict[str, str] = {
    # Their losses, which the heads build at once, need scipy.
    "eomt": "EomtForUniversalSegmentation",
    "mask2former": "Mask2FormerModel",
    "maskformer": "MaskFormerModel",
}

PAIRS = frozenset({"align", "altclip", "blip", "chinese_clip", "clip", "flava", "groupvit", "kosmos-2", "vilt"})
"""Two towers, or one that wants both kinds of input."""

IMAGE_TOKENS = {
    "aya_vision": 4,
    "cohere2_vision": 4,
    "deepseek_vl": 16,
    "got_ocr2": 1,
    "internvl": 1,
    "janus": 16,
    "llava": 16,
    "ovis2": 16,
    "paligemma": 16,
}
"""Language models that see: how many tokens an image of 32 pixels takes. Others of the kind are given text alone."""

MEL_FIRST = frozenset(
    {"whisper", "qwen2_audio_encoder", "voxtral_encoder", "glmasr_encoder", "voxtral_realtime_encoder"}
)
"""Spectra with their bins before time."""


def _spectra() -> Inputs:
    return args(input_values=floats(2, 64, 32))


def _long() -> Inputs:
    return args(input_ids=ids(2, 32, below=48))


def _past() -> Inputs:
    return args(past_values=floats(2, 32, 1))


INPUTS: dict[str, Callable[[], Inputs]] = {
    "audio-spectrogram-transformer": _spectra,
    "dac": lambda: args(floats(2, 1, 1600)),
    "patchtst": _past,
    "patchtsmixer": _past,
    "bros": lambda: args(input_ids=ids(2, 7, below=48), bbox=torch.rand(2, 7, 4)),
    "reformer": _long,
    "decision_transformer": lambda: args(
        states=floats(2, 5, 17),
        actions=floats(2, 5, 4),
        rewards=floats(2, 5, 1),
        returns_to_go=floats(2, 5, 1),
        timesteps=torch.arange(5).expand(2, 5),
        attention_mask=torch.ones(2, 5),
    ),
    "bark": lambda: args(ids(2, 7, below=48)),
    "layoutlmv3": lambda: args(
        input_ids=ids(2, 7, below=48), bbox=torch.randint(0, 32, (2, 7, 4)), pixel_values=floats(2, 3, 32, 32)
    ),
}

OPTIONS: dict[str, dict[str, Any]] = {}
