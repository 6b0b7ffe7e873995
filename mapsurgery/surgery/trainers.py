"""transformers' Trainer and quantised models: it takes those with PEFT's adapters alone; its error names no others."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn

_TRAINER, _OURS = "transformers.trainer", "mapsurgery.integrations.transformers"


def advice(model: nn.Module) -> str | None:
    """What to say of a model that the Trainer refuses to train; None of others."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    return (
        f"transformers quantised this {type(model).__name__}, and its Trainer refuses to train such a model with other "
        f"adapters than PEFT's. Use `from {_OURS} import AdapterTrainer` in its place, or before it among the bases of "
        "a trainer of your own; a training loop of your own needs nothing"
    )


def warn(model: nn.Module, stacklevel: int) -> None:
    """Give the advice where it seems to be needed: the Trainer was imported, and ours was not."""
    text = advice(model)
    if text and _TRAINER in sys.modules and _OURS not in sys.modules:
        warnings.warn(text, stacklevel=stacklevel + 1)
