"""Where and in what precision the examples compute."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from adapting import positive
from torch import nn


def add_runtime_options(parser: argparse._ActionsContainer) -> None:
    """Add ``--device``, ``--amp`` and ``--threads`` to a parser or to one of its groups."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    parser.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="mixed precision; auto is bf16 where the hardware multiplies in it (CUDA, CPUs with AMX or AVX512-BF16)",
    )
    parser.add_argument("--threads", type=positive, help="CPU threads; torch's own choice if left out")


@dataclass(frozen=True)
class Runtime:
    """Where and in what precision to compute."""

    device: torch.device
    amp: torch.dtype | None
    """Autocast's dtype; None computes in float32."""

    @classmethod
    def of(cls, model: nn.Module) -> Runtime:
        """Where the model is (the first of its devices, if there are several), in the precision of its parameters."""
        return cls(next(model.parameters()).device, None)

    @classmethod
    def choose(cls, device: str, amp: str) -> Runtime:
        """Resolve the values of ``--device`` and ``--amp``."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        place = torch.device(device)
        if amp == "auto":
            amp = "bf16" if multiplies_bfloat16(place) else "off"
        return cls(place, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp])

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision as chosen."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next measures finished work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        precision = "float32" if self.amp is None else f"{str(self.amp).removeprefix('torch.')} autocast"
        return f"{name}, {precision}, {torch.get_num_threads()} CPU threads"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply in bfloat16 (without them autocast only costs time)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # torch names these with an underscore, and older versions lack some: absent counts as no.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)
