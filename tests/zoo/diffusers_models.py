"""diffusers: tiny UNets, diffusion transformers, autoencoders and ControlNets, with the inputs of a denoising step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from .entry import Entry, Inputs, args, floats

diffusers.utils.logging.set_verbosity_error()  # each .to() of a model warns otherwise

Make = dict[str, Any]


def _time(*values: int) -> torch.Tensor:
    return torch.tensor(values or (10, 500))


def _image(channels: int = 4, side: int = 8, **more: Callable[[], Any]) -> Callable[[], Inputs]:
    """A batch of latents, a time step and what else the model is told."""
    return lambda: args(floats(2, channels, side, side), _time(), **{name: make() for name, make in more.items()})


def _words(width: int, length: int = 5) -> Callable[[], torch.Tensor]:
    return lambda: floats(2, length, width)


_UNET: Make = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_CONDITIONED: Make = {
    **_UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
_DIT: Make = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}

_UNETS: dict[str, tuple[Make, Callable[[], Inputs]]] = {
    "UNet2DModel": (
        {
            **_UNET,
            "in_channels": 3,
            "out_channels": 3,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        _image(3),
    ),
    "UNet2DConditionModel": (_CONDITIONED, _image(encoder_hidden_states=_words(16))),
    "UNet1DModel": (
        {
            "block_out_channels": (8, 8, 16),
            "in_channels": 8,
            "out_channels": 8,
            "time_embedding_type": "positional",
            "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D", "DownResnetBlock1D"),
            "up_block_types": ("UpResnetBlock1D", "UpResnetBlock1D"),
            "mid_block_type": "MidResTemporalBlock1D",
            "out_block_type": "OutConv1DBlock",
            "flip_sin_to_cos": False,
            "use_timestep_embedding": True,
            "downsample_each_block": False,
            "act_fn": "swish",
            "freq_shift": 1.0,
            "norm_num_groups": 8,
        },
        lambda: args(floats(2, 8, 16), _time()),
    ),
    "UNet3DConditionModel": (
        {
            **_CONDITIONED,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: args(floats(1, 4, 3, 8, 8), _time(10), encoder_hidden_states=floats(1, 5, 16)),
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 16,
            "num_attention_heads": (2, 4),
            "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8,
            "in_channels": 8,
            "out_channels": 4,
        },
        lambda: args(floats(1, 2, 8, 8, 8), _time(10), floats(1, 1, 16), added_time_ids=torch.ones(1, 3)),
    ),
    "I2VGenXLUNet": (
        {
            **{key: value for key, value in _CONDITIONED.items() if key != "attention_head_dim"},
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "block_out_channels": (64, 64),
            "num_attention_heads": 32,
        },
        lambda: args(
            floats(1, 4, 3, 8, 8),
            _time(10),
            fps=torch.tensor([8]),
            image_latents=floats(1, 4, 3, 8, 8),
            image_embeddings=floats(1, 16),
            encoder_hidden_states=floats(1, 5, 16),
        ),
    ),
    "UVit2DModel": (
        {
            "hidden_size": 32,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 16,
            "vocab_size": 30,
            "codebook_size": 28,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 1,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "block_num_heads": 4,
            "sample_size": 8,
        },
        lambda: args(torch.randint(0, 28, (2, 8, 8)), floats(2, 5, 16), floats(2, 16), torch.ones(2, 5)),
    ),
}

_TRANSFORMERS: dict[str, tuple[Make, Callable[[], Inputs]]] = {
    "DiTTransformer2DModel": (
        {**_DIT, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10, "attention_bias": True},
        _image(class_labels=lambda: torch.tensor([1, 3])),
    ),
    "Transformer2DModel": (
        {**_DIT, "in_channels": 16, "norm_num_groups": 8, "cross_attention_dim": 16, "patch_size": None},
        lambda: args(floats(2, 16, 6, 6), encoder_hidden_states=floats(2, 5, 16)),
    ),
    "PixArtTransformer2DModel": (
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "use_additional_conditions": False,
        },
        lambda: args(
            floats(2, 4, 8, 8),
            encoder_hidden_states=floats(2, 5, 12),
            timestep=_time(),
            added_cond_kwargs={"aspect_ratio": None, "resolution": None},
        ),
    ),
    "SD3Transformer2DModel": (
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda: args(floats(2, 4, 8, 8), floats(2, 5, 16), floats(2, 12), _time()),
    ),
    "FluxTransformer2DModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
        },
        lambda: args(
            floats(2, 16, 4),
            floats(2, 5, 16),
            floats(2, 12),
            torch.tensor([0.3, 0.8]),
            torch.randn(16, 3),
            torch.randn(5, 3),
            torch.tensor([1.0, 1.0]),
        ),
    ),
    "AuraFlowTransformer2DModel": (
        {
            **{key: value for key, value in _DIT.items() if key != "num_layers"},
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        lambda: args(floats(2, 4, 8, 8), floats(2, 5, 12), torch.tensor([0.3, 0.8])),
    ),
    "SanaTransformer2DModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        lambda: args(floats(2, 4, 8, 8), floats(2, 5, 8), _time()),
    ),
    "HunyuanDiT2DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        lambda: args(
            floats(2, 4, 8, 8),
            torch.tensor([10.0, 500.0]),
            encoder_hidden_states=floats(2, 4, 8),
            text_embedding_mask=torch.ones(2, 4),
            encoder_hidden_states_t5=floats(2, 4, 8),
            text_embedding_mask_t5=torch.ones(2, 4),
            image_meta_size=torch.ones(2, 6),
            style=torch.tensor([0, 0]),
            image_rotary_emb=[torch.ones(16, 8), torch.zeros(16, 8)],
        ),
    ),
    "CogVideoXTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 4,
            "text_embed_dim": 8,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 5,
        },
        lambda: args(floats(2, 2, 4, 8, 8), floats(2, 5, 8), _time()),
    ),
    "WanTransformer3DModel": (
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        lambda: args(floats(2, 4, 2, 8, 8), _time(), floats(2, 5, 16)),
    ),
    "LTXVideoTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 12,
        },
        lambda: args(floats(2, 16, 4), floats(2, 5, 12), _time(), torch.ones(2, 5), num_frames=1, height=4, width=4),
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "scaling_factor": 1.0,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 16,
        },
        lambda: args(
            floats(2, 4, 8, 8), torch.tensor([0.3, 0.8]), floats(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
        ),
    ),
    "QwenImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: args(
            floats(2, 16, 16),
            floats(2, 5, 16),
            torch.ones(2, 5, dtype=torch.bool),
            torch.tensor([0.3, 0.8]),
            img_shapes=[[(1, 4, 4)]] * 2,
        ),
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
        },
        lambda: args(
            floats(2, 4, 8, 8), floats(2, 5, 8), _time(), *(torch.tensor([[20.0, 20.0]] * 2) for _ in range(3))
        ),
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_key_value_attention_heads": 2,
            "num_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        lambda: args(floats(2, 4, 8), torch.tensor([0.3, 0.8]), floats(2, 5, 8), floats(2, 1, 8)),
    ),
    "LatteTransformer3DModel": (
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "video_length": 2,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 100,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
        },
        lambda: args(floats(2, 4, 2, 8, 8), _time(), floats(2, 5, 8), enable_temporal_attentions=True),
    ),
    "MochiTransformer3DModel": (
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "out_channels": None,
            "qk_norm": "rms_norm",
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "activation_fn": "swiglu",
            "max_sequence_length": 16,
        },
        lambda: args(floats(2, 4, 2, 8, 8), floats(2, 5, 16), _time(), torch.ones(2, 5, dtype=torch.bool)),
    ),
    "PriorTransformer": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 2,
            "embedding_dim": 8,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        lambda: args(floats(2, 8), 2, floats(2, 8), floats(2, 5, 8)),
    ),
    "TransformerTemporalModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "num_layers": 1,
            "norm_num_groups": 8,
        },
        lambda: args(floats(4, 16, 4, 4), num_frames=2),
    ),
}

_BLOCKS: Make = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
}
_AUTOENCODERS: dict[str, tuple[Make, Callable[[], Inputs]]] = {
    "AutoencoderKL": ({**_BLOCKS, "latent_channels": 4, "sample_size": 16}, lambda: args(floats(2, 3, 16, 16))),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "down_block_out_channels": (8, 16),
            "up_block_out_channels": (8, 16),
            "latent_channels": 4,
            "norm_num_groups": 4,
        },
        lambda: args(floats(2, 3, 16, 16), mask=torch.ones(2, 1, 16, 16)),
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        lambda: args(floats(2, 3, 16, 16)),
    ),
    "AutoencoderDC": (
        {
            "in_channels": 3,
            "latent_channels": 4,
            "attention_head_dim": 2,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
        },
        lambda: args(floats(2, 3, 16, 16)),
    ),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4},
        lambda: args(floats(3, 3, 16, 16), num_frames=3),
    ),
    "AutoencoderKLCogVideoX": (
        {
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "temporal_compression_ratio": 4,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        },
        lambda: args(floats(1, 3, 5, 16, 16)),
    ),
    "AutoencoderKLWan": (
        {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        lambda: args(floats(1, 3, 5, 16, 16)),
    ),
    "AutoencoderKLLTXVideo": (
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "decoder_inject_noise": (False,) * 5,
            "upsample_residual": (False,) * 4,
            "upsample_factor": (1,) * 4,
            "patch_size": 1,
            "patch_size_t": 1,
            "encoder_causal": True,
            "decoder_causal": False,
        },
        lambda: args(floats(1, 3, 9, 16, 16)),
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 8,
            "decoder_channels": 8,
            "decoder_input_channels": 4,
            "audio_channels": 1,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
        },
        lambda: args(floats(2, 1, 32)),
    ),
    "VQModel": (
        {**_BLOCKS, "latent_channels": 3, "num_vq_embeddings": 16},
        lambda: args(floats(2, 3, 16, 16)),
    ),
}

_CONTROLNET: Make = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "conditioning_embedding_out_channels": (8, 16),
}
_CONTROLNETS: dict[str, tuple[Make, Callable[[], Inputs]]] = {
    "ControlNetModel": (
        _CONTROLNET,
        _image(encoder_hidden_states=_words(16), controlnet_cond=lambda: floats(2, 3, 16, 16)),
    ),
    "SparseControlNetModel": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "motion_max_seq_length": 8,
            "norm_num_groups": 8,
            "concat_conditioning_mask": False,
            "conditioning_channels": 4,
            "use_simplified_condition_embedding": True,
        },
        lambda: args(floats(1, 4, 2, 8, 8), _time(10), floats(2, 5, 16), floats(1, 4, 2, 8, 8), conditioning_mask=None),
    ),
    "SD3ControlNetModel": (
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 8,
        },
        lambda: args(
            floats(2, 4, 8, 8),
            floats(2, 4, 8, 8),
            encoder_hidden_states=floats(2, 5, 16),
            pooled_projections=floats(2, 12),
            timestep=_time(),
        ),
    ),
    "FluxControlNetModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
        },
        lambda: args(
            floats(2, 16, 4),
            floats(2, 16, 4),
            encoder_hidden_states=floats(2, 5, 16),
            pooled_projections=floats(2, 12),
            timestep=torch.tensor([0.3, 0.8]),
            img_ids=torch.randn(16, 3),
            txt_ids=torch.randn(5, 3),
            guidance=torch.tensor([1.0, 1.0]),
        ),
    ),
    "T2IAdapter": (
        {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2},
        lambda: args(floats(2, 3, 16, 16)),
    ),
}


def _maker(name: str, options: Make) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**options)


def entries() -> list[Entry]:
    every = {**_UNETS, **_TRANSFORMERS, **_AUTOENCODERS, **_CONTROLNETS}
    return [
        Entry(f"diffusers/{name}", "diffusers", _maker(name, options), inputs)
        for name, (options, inputs) in every.items()
    ]
