"""Configurations of transformers' models shrunk by rule: the same parts, in a size that runs in a moment."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 64
FIRST_SPECIAL, LAST_SPECIAL = 1, 15
"""Special tokens are spread over these ids; the inputs' ordinary tokens begin above."""

_RULES: tuple[tuple[str, Any], ...] = (
    # name of the attribute -> value, tried in order; a callable is given the default
    (r".*(dropout|drop_?rate|drop_path|layerdrop|eps|theta|factor|std|range|scale|ratio|prob|momentum).*", None),
    (r"n_group", lambda v: min(v, 2)),
    (r"topk_group", lambda v: 1),
    (r".*(_type|_types|_period|_offset|_index|indices|_idx|_group|n_group|version|dtype|version_id)", None),
    (r"num_feat_extract_layers|num_conv_pos.*", None),
    (r"num_kv_shared_layers", 0),
    (r"qk_head_dim", 16),
    (r"(.*_)?window_size", lambda v: min(v, 2)),
    (r"(num|n)_?(key_value|kv)_?heads?", 2),
    (r".*(num|n)_.*key_value_heads", 2),
    (r"mamba_n_heads|mamba_num_heads|mamba_d_head", 8),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"linear_num_(key|value)_heads", 4),
    (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|num_query_heads|nhead)", HEADS),
    (r"(.*_)?num_(image|channel|mel).*channels.*|num_channels|in_channels|in_chans|image_channels", None),
    (r".*(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_blocks|layers|depth)", LAYERS),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|(.*_)?head_dim|d_kv|(.*_)?attention_head_dim|key_dim|value_dim", 8),
    (r".*lora_rank|.*low_rank.*", 8),
    (r"(.*_)?(num_experts_per_tok|moe_top_?k|num_experts_per_token|top_k|moe_topk|moe_k)", lambda v: min(v, 2)),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(.*_)?n_shared_experts|num_shared_experts|first_k_dense_replace|.*num_dense_layers", lambda v: min(v, 1)),
    (r"vocab_size|(.*_)?vocab_size|vocab_size_per_layer_input|char_vocab_size", VOCABULARY),
    (r"type_vocab_size", None),
    (r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_length)", 64),
    (r"max_(source|target)_positions|max_window_layers|context_length", 64),
    (r"sliding_window|attention_window|local_window_size|.*chunk_size.*", lambda v: min(v, 4)),
    (r".*(image_size|img_size|input_resolution)", 32),
    (r".*patch_size", lambda v: 8 if v > 4 else v),
    (r".*(state_size|d_state|ssm_state_size)", 8),
    (r"time_step_rank|dt_rank|mamba_dt_rank", 4),
    (r".*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim|feedforward_dim|ffn_size|inner_dim)", 40),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|projection_dim|dim_model|emb_dim)", WIDTH),
    (r"dim|width|channels|.*(embedding_dim|projection_size|_dim|_width|_channels|_size)", WIDTH),
    (r".*num_(queries|latents|query_tokens)", 6),
)

_LISTS: tuple[tuple[str, Any], ...] = (
    (r".*(depths|num_blocks|layers_per.*|num_layers)", lambda v: 1),
    (r".*(num_attention_heads|num_heads|heads)", lambda v: 2),
    (r".*(hidden_sizes|embed_dims?|channels|hidden_dims?|widths|dims|conv_dim)", lambda v: WIDTH),
)


def tiny(cls: type[PreTrainedConfig], overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A configuration of this class with everything shrunk; `overrides` by name, nested as dicts."""
    overrides = dict(overrides or {})
    default = cls()
    values: dict[str, Any] = {}
    specials = iter(range(FIRST_SPECIAL, LAST_SPECIAL + 1))
    for name, value in _own_values(default).items():
        below = overrides.pop(name, None)
        if isinstance(value, PreTrainedConfig) and not isinstance(below, PreTrainedConfig):
            values[name] = tiny(type(value), below)
        elif below is not None:
            values[name] = below
        elif name.endswith("token_id") or name.endswith("token_index"):
            values[name] = next(specials, LAST_SPECIAL) if isinstance(value, int) else value
        else:
            values[name] = _shrunk(name, value)
    _agree(values, default)
    return cls(**(values | overrides))


def _own_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What its class's constructor may be given: values of the configuration, not those that all have in common."""
    common = set(vars(PreTrainedConfig())) | {"ignore_keys_at_rope_validation"}
    common -= {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
    plain = vars(config)
    return {name: value for name, value in plain.items() if not name.startswith("_") and name not in common}


def _shrunk(name: str, value: Any) -> Any:
    """The value a rule gives; anything no rule knows stays."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return _by_rule(_RULES, name, value)
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        return type(value)(_by_rule(_LISTS, name, v) for v in value)
    if name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        return _every_kind(value)
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    return value


def _by_rule(rules: tuple[tuple[str, Any], ...], name: str, value: int) -> int:
    for pattern, small in rules:
        if re.fullmatch(pattern, name):
            found = small(value) if callable(small) else small
            return value if found is None or (value < found and value > 0) else found
    return value


def _every_kind(kinds: Any) -> Any:
    """The first layer of each kind, two at least."""
    found = list(dict.fromkeys(kinds))
    return found if len(found) >= LAYERS else found * LAYERS


def _agree(values: dict[str, Any], default: PreTrainedConfig) -> None:
    """Lists with an item for each layer, and the number of layers."""
    if isinstance(values.get("kv_lora_rank"), int):  # latent attention: a key for each query
        values["num_key_value_heads"] = HEADS
    before, now = getattr(default, "num_hidden_layers", None), values.get("num_hidden_layers")
    for name, value in values.items():
        if isinstance(value, list) and len(value) == before and now and "types" not in name:
            values[name] = value[:now]
    lengths = [len(v) for k, v in values.items() if k in ("layer_types", "layers_block_type") and isinstance(v, list)]
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if lengths and name in values:
            values[name] = max(lengths)
    kinds = values.get("mlp_layer_types")
    if isinstance(kinds, list) and lengths:
        values["mlp_layer_types"] = (kinds * max(lengths))[: max(lengths)]
