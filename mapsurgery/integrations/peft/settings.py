"""The configuration of a PEFT adapter: what of it is understood, and a refusal of the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_UNDERSTOOD = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("modules_to_save", "bias", "init_lora_weights"),
    )
)
_WITHOUT_EFFECT = frozenset(
    (
        # Which layers there are is said by the tensors, how a weight lies by the layer, what the base is by the user.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"),
        # Options of a run, of a start that is over, or of a feature that has a switch of its own.
        *("runtime_config", "eva_config", "megatron_core", "qalora_group_size"),
    )
)
_STARTS = {"True": "lora", "False": "lora", "gaussian": "lora", "eva": "lora", "orthogonal": "lora"}
"""init_lora_weights -> the update; after these starts the base is as it was."""
_STARTS_FROM_W = {"pissa": "pissa", "olora": "olora"}


@dataclass(frozen=True)
class Settings:
    """What a PEFT configuration says of the adapter's numbers.

    Attributes:
        update: name of the update family: with "pissa" and "olora" PEFT takes the start out of the base when it loads.
        patterns: PEFT's regular expressions with their ranks, and with their alphas.
    """

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    update: str
    modules_to_save: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, path: str) -> int:
        """Rank of the layer that PEFT calls so."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """lora_alpha of the layer that PEFT calls so."""
        return _by_pattern(self.alpha_pattern, path, self.alpha)


def _by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The first whose key matches the end of the name from a dot on, as PEFT searches."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def read_settings(config: Mapping[str, Any]) -> Settings:
    """The settings in a PEFT configuration.

    Raises:
        ValueError: a value is missing or of the wrong kind, or asks for what there is no counterpart of; names it.
    """
    if str(config.get("peft_type", "")).removeprefix("PeftType.") != "LORA":
        raise ValueError(f"the PEFT adapter is of peft_type {config.get('peft_type')!r}: only LORA (and DoRA) converts")
    unknown = {k: v for k, v in config.items() if k not in _UNDERSTOOD | _WITHOUT_EFFECT and v not in _OFF}
    if unknown:
        said = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise ValueError(f"the PEFT adapter uses what has no counterpart here: {said}")
    if config.get("bias", "none") != "none":
        raise ValueError(f'the PEFT adapter has bias={config["bias"]!r}, which trains biases of the base: only "none"')
    modules = _value(config, "modules_to_save", list | tuple | set | None, None) or ()
    return Settings(
        rank=_value(config, "r", int),
        alpha=_value(config, "lora_alpha", int | float),
        rslora=_value(config, "use_rslora", bool, False),
        dora=_value(config, "use_dora", bool, False),
        dropout=_value(config, "lora_dropout", int | float, 0.0),
        update=_update(config.get("init_lora_weights", True)),
        modules_to_save=tuple(str(name) for name in modules),
        rank_pattern=_patterns(config, "rank_pattern", int),
        alpha_pattern=_patterns(config, "alpha_pattern", int | float),
    )


_OFF: tuple[Any, ...] = (None, False, {}, [], (), set(), "")
"""Values that switch a feature off."""


def _value(config: Mapping[str, Any], name: str, kind: Any, *default: Any) -> Any:
    if name not in config and default:
        return default[0]
    value = config.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"the PEFT configuration has {name}={value!r}")
    return value


def _patterns(config: Mapping[str, Any], name: str, kind: Any) -> dict[str, Any]:
    pattern = _value(config, name, Mapping | None, None) or {}
    for key in pattern:
        _value(pattern, key, kind)
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{name} of the PEFT configuration has {key!r}, no regular expression: {error}") from None
    return dict(pattern)


def _update(start: Any) -> str:
    """The update family that a PEFT adapter with this start loads as."""
    known = _STARTS | _STARTS_FROM_W
    if str(start) not in known:
        raise ValueError(
            f"the PEFT adapter has init_lora_weights={start!r}, a start that is unknown here or leaves a base that "
            "cannot be made again: convert it in PEFT first, with path_initial_model_for_weight_conversion of its "
            "save_pretrained"
        )
    return known[str(start)]
