"""timm: of each module of timm.models, the model with the fewest parameters, at the smallest image that it takes.

The choice stands in timm_smallest.json; `PYTHONPATH=tests python -m zoo.timm_models` makes it anew (some minutes).
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .entry import Entry, args, floats

CHOICE = Path(__file__).with_name("timm_smallest.json")
SIZES = (32, 64, 96, 128, 192, 224, 256, 384, 448, 512)

SMALLER: dict[str, dict[str, Any]] = {
    "beit": {"depth": 2},
    "deepseek_vit": {"depth": 2, "embed_dim": 64, "num_heads": 4},
    "gemma4_vit": {"depth": 2, "embed_dim": 96, "num_heads": 4},
    "naflexvit": {"depth": 2},
    "qwen3_vit": {"depth": 2},
    "vgg": {"mlp_ratio": 0.02},
    "vision_transformer_sam": {"depth": 2},
}
"""Modules without a small model: fewer blocks of the smallest, or narrower ones."""


def entries() -> list[Entry]:
    return [_entry(module, **chosen) for module, chosen in json.loads(CHOICE.read_text()).items()]


def _entry(module: str, model: str, size: int, options: dict[str, Any]) -> Entry:
    options = {**options, **SMALLER.get(module, {})}
    make = functools.partial(timm.create_model, model, pretrained=False, num_classes=5, **options)
    return Entry(f"timm/{module}", "timm", make, lambda: args(floats(2 if size <= 128 else 1, 3, size, size)))


def _parameters(name: str) -> int:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _counted(names: list[str]) -> dict[str, int]:
    """Parameters of each model; those that cannot be built on meta are left out, and named."""
    found = {}
    for name in names:
        try:
            found[name] = _parameters(name)
        except Exception as error:  # whatever a constructor does with values, which meta tensors have not
            print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return found


@torch.no_grad()
def _runs(model: nn.Module, size: int) -> bool:
    try:
        return bool(model(torch.randn(1, 3, size, size)).isfinite().all())
    except Exception:  # the size does not fit: what is raised differs from model to model
        return False


def _built(name: str, options: dict[str, Any]) -> nn.Module | None:
    try:
        return timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    except Exception:  # no such option, or a size that its windows do not fit
        return None


def smallest(names: list[str]) -> dict[str, Any]:
    """The model with the fewest parameters and the smallest image it takes, told to the constructor if need be."""
    counts = _counted(names)
    for name in sorted(counts, key=lambda name: counts[name]):
        for size in SIZES:
            for options in ({}, {"img_size": size}):
                model = _built(name, options)
                if model is not None and _runs(model, size):
                    return {"model": name, "size": size, "options": options}
    raise ValueError(f"none of {names} runs")


def main() -> None:
    found = {}
    for module in timm.list_modules():
        started = time.monotonic()
        found[module] = smallest(timm.list_models(module=module))
        print(f"{module}: {found[module]} ({time.monotonic() - started:.0f} s)", flush=True)
    CHOICE.write_text("{\n" + ",\n".join(f'  "{m}": {json.dumps(found[m])}' for m in found) + "\n}\n")


if __name__ == "__main__":
    main()
