"""transformers: one class of each model type that a rule can shrink and call, listed in transformers_runnable.txt.

`PYTHONPATH=tests python -m zoo.transformers_models` tries every type anew and writes the list.
"""

from __future__ import annotations

import importlib
import inspect
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .entry import Entry, Inputs, Options, args, floats
from .tiny_config import LAST_SPECIAL, VOCABULARY, tiny
from .transformers_special import CLASSES, IMAGE_TOKENS, INPUTS, MEL_FIRST, OPTIONS, OVERRIDES, PAIRS

transformers.logging.set_verbosity_error()  # that fused kernels are not installed, for one

RUNNABLE = Path(__file__).with_name("transformers_runnable.txt")

_TASKS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "VIDEO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION",
    "TEXT_TO_WAVEFORM",
)


def entries() -> list[Entry]:
    return [entry(line) for line in RUNNABLE.read_text().split()]


def class_of(model_type: str) -> str | None:
    """Name of the class that stands for a model type: the most particular task first, else the bare model."""
    if model_type in CLASSES:
        return CLASSES[model_type]
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in _TASKS]
    for mapping in [*mappings, modeling_auto.MODEL_MAPPING_NAMES]:
        if model_type in mapping:
            name = mapping[model_type]
            return name if isinstance(name, str) else name[0]
    return None


def entry(model_type: str) -> Entry:
    """The tiny model of a type, with inputs by what its forward takes; nothing is imported before it is made."""

    def make() -> nn.Module:
        return _class(model_type)(configuration(model_type))

    def inputs() -> Inputs:
        return inputs_of(_class(model_type), configuration(model_type))

    options = Options(**OPTIONS.get(model_type, {}))
    return Entry(f"transformers/{model_type}", "transformers", make, INPUTS.get(model_type, inputs), options)


def _class(model_type: str) -> Any:
    return _found(class_of(model_type) or "")


def _found(name: str) -> Any:
    """A class of transformers; parts of models are not exported from the package itself."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    config_class = next(c for t, c in CONFIG_MAPPING.items() if modeling_auto.MODEL_MAPPING_NAMES.get(t) == name)
    module = config_class.__module__.replace(".configuration_", ".modeling_")
    return getattr(importlib.import_module(module), name)


def configuration(model_type: str) -> PreTrainedConfig:
    overrides = OVERRIDES.get(model_type)
    return tiny(CONFIG_MAPPING[model_type], overrides() if callable(overrides) else overrides)


def inputs_of(model_class: Any, config: PreTrainedConfig) -> Inputs:
    """Inputs by the names that the forward takes."""
    if config.model_type in IMAGE_TOKENS:
        return _image_and_text(config)
    main = getattr(model_class, "main_input_name", "input_ids")
    takes = set(inspect.signature(model_class.forward).parameters)
    chosen = [name for name in dict.fromkeys((main, *_also(takes, config))) if name in _MAKERS and name in takes]
    return args(**{name: _MAKERS[name](config) for name in chosen})


def _also(takes: set[str], config: PreTrainedConfig) -> list[str]:
    """Inputs beside the main one: a decoder's, and the other half of a pair of towers."""
    found = []
    if config.is_encoder_decoder or ("decoder_input_ids" in takes and "input_ids" in takes):
        found.append("decoder_input_ids")
    if "decoder_input_ids" in takes and {"input_features", "input_values"} & takes:
        found.append("decoder_input_ids")
    if config.model_type in PAIRS or "logit_scale_init_value" in vars(config):
        found += ["pixel_values", "input_ids"]
    return found


def _image_and_text(config: PreTrainedConfig) -> Inputs:
    place = getattr(config, "image_token_id", None) or config.image_token_index
    images = torch.full((2, IMAGE_TOKENS[config.model_type]), place)
    return args(input_ids=torch.cat([images, _tokens(6)(config)], 1), pixel_values=floats(2, 3, 32, 32))


def _tokens(length: int) -> Callable[[PreTrainedConfig], torch.Tensor]:
    return lambda config: torch.randint(LAST_SPECIAL + 1, VOCABULARY - 4, (2, length))


def _first(config: PreTrainedConfig, *names: str, default: Any) -> Any:
    """An attribute of the configuration or of its parts."""
    parts = [
        getattr(config, part, None) for part in ("vision_config", "audio_config", "encoder_config", "backbone_config")
    ]
    for part in [config, *parts]:
        for name in names:
            if part is not None and getattr(part, name, None) is not None:
                return getattr(part, name)
    return default


def _pixels(config: PreTrainedConfig) -> torch.Tensor:
    size = _first(config, "image_size", default=64)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _first(config, "num_channels", "in_channels", default=3)
    frames = _first(config, "num_frames", "frames_per_clip", default=None)
    return floats(2, *([frames] if isinstance(frames, int) else []), channels, height, width)


def _spectrum(config: PreTrainedConfig) -> torch.Tensor:
    bins = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", default=80)
    positions = _first(config, "max_source_positions", default=32)
    if config.model_type in MEL_FIRST:
        return floats(2, bins, 2 * positions)
    return floats(2, 64, bins)


_MAKERS: dict[str, Callable[[PreTrainedConfig], Any]] = {
    "input_ids": _tokens(7),
    "decoder_input_ids": _tokens(5),
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_features": _spectrum,
    "input_values": lambda config: floats(2, 1600),
}


def _plainly_runs(model_type: str) -> str | None:
    """Why the plain tiny model cannot be judged, or None."""
    try:
        candidate = entry(model_type)
        torch.manual_seed(0)
        model: nn.Module = candidate.make().eval()
        size = sum(p.numel() for p in model.parameters())
        if size > 8_000_000:
            return f"not shrunk: {size:,} parameters"
        args_, kwargs = candidate.inputs()
        with torch.no_grad():
            model(*args_, **kwargs)
    except Exception as error:  # anything: the rule does not fit this type
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


SECONDS = 20
"""That building and calling a tiny model may take."""


def _late(signal_number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    found = []
    chosen = sys.argv[1:] or [t for t in CONFIG_MAPPING_NAMES if class_of(t) is not None]
    for model_type in chosen:
        started = time.monotonic()
        signal.alarm(SECONDS)
        reason = _plainly_runs(model_type)
        signal.alarm(0)
        print(f"{model_type}: {reason or 'runs'} ({time.monotonic() - started:.1f} s)", flush=True)
        found += [model_type] if reason is None else []
    print(f"{len(found)} of {len(chosen)} run")
    if not sys.argv[1:]:
        RUNNABLE.write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main()
