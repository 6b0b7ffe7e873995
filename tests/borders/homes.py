"""What the tests of this folder share: a small model for every way in which a layer holds its weight.

Nothing here knows the library beyond its public functions and the names of an adapter's tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from modules import First, Tied, parametrized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import mapsurgery

REFUSALS = (RuntimeError, ValueError, AttributeError, BufferError)
"""What a call that cannot be right may raise. (NotImplementedError is a RuntimeError; DLPack asks for BufferError.)"""

ADAPTER_KEY = re.compile(r"(.*\.)?adapter(_\w+)?\.(A|B|alpha|beta)")


class Pair(nn.Module):
    """A module of two inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(0))


class Experts(nn.Module):
    """Raw parameters: a stack of matrices, and one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))
        self.bank = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("td,edh,ch->tec", x, self.up, self.bank).flatten(1)


class OwnForward(nn.Linear):
    """Reads its weight itself, so that its forward runs on W'."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def named(module: str, name: str) -> Any:
    """A class of a library that takes seconds to import: the processes of a distributed test do not need it."""
    return getattr(importlib.import_module(module), name)


def ids() -> Tensor:
    return torch.tensor([[1, 2, 5], [2, 8, 0]])


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


@dataclass(frozen=True)
class Case:
    """A model, an input, and how it is patched."""

    name: str
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    packages: str = ""

    def __str__(self) -> str:
        return self.name

    def built(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().eval()

    def data(self) -> Tensor:
        torch.manual_seed(100)
        return self.input()

    def patch(self, model: nn.Module) -> nn.Module:
        """Adapt a model, with adapters that have learned something."""
        torch.manual_seed(200)
        return trained(mapsurgery.patch(model, **{"targets": "*", "rank": 2, **self.options}))


@torch.no_grad()
def trained(model: nn.Module, seed: int = 300) -> nn.Module:
    """Move what the adapters train, as training would: the same numbers in each model of one structure."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ADAPTER_KEY.fullmatch(name):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that adapters added, by name."""
    return {name: p for name, p in model.named_parameters() if ADAPTER_KEY.fullmatch(name)}


@torch.no_grad()
def with_adapters_of(model: nn.Module, patched: nn.Module) -> nn.Module:
    """A patched model with the adapters of another one: where A starts depends on the base."""
    theirs = adapter_tensors(model)
    for name, parameter in adapter_tensors(patched).items():
        parameter.copy_(theirs[name])
    return patched


def registered(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    """The frozen W: the Parameter that a layer registers under its own name."""
    parameter = layer._parameters[name]
    assert parameter is not None
    return parameter


RAW = {"targets": (), "parameters": "*"}
PLAIN = [
    Case("linear", lambda: nn.Linear(6, 5), rows(3, 6)),
    Case("linear_own_forward", lambda: OwnForward(6, 5), rows(3, 6)),
    Case("conv1d", lambda: nn.Conv1d(6, 5, 3), rows(2, 6, 7)),
    Case("conv2d", lambda: nn.Conv2d(4, 5, 3, padding=1), rows(2, 4, 5, 5)),
    Case("conv2d_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), rows(2, 4, 5, 5)),
    Case("conv2d_own_forward", lambda: named("timm.layers", "StdConv2d")(4, 5, 3), rows(2, 4, 5, 5)),
    Case("conv3d", lambda: nn.Conv3d(3, 4, 2), rows(2, 3, 3, 3, 3)),
    Case("conv_transpose1d", lambda: nn.ConvTranspose1d(4, 6, 3), rows(2, 4, 5)),
    Case("conv_transpose2d", lambda: nn.ConvTranspose2d(4, 6, 3), rows(2, 4, 5, 5)),
    Case("conv_transpose3d", lambda: nn.ConvTranspose3d(3, 4, 2), rows(2, 3, 3, 3, 3)),
    Case("transformers_conv1d", lambda: named("transformers.pytorch_utils", "Conv1D")(5, 6), rows(3, 6)),
    Case("embedding", lambda: nn.Embedding(9, 6), ids),
    Case("embedding_bag", lambda: nn.EmbeddingBag(9, 6), ids),
    Case("bilinear", lambda: Pair(nn.Bilinear(6, 6, 4)), rows(3, 6)),
    Case("attention", lambda: First(nn.MultiheadAttention(6, 2, batch_first=True), 3), rows(2, 4, 6)),
    Case("attention_apart", lambda: First(nn.MultiheadAttention(6, 2, kdim=6, vdim=6), 3), rows(4, 2, 6)),
    Case("lstm", lambda: First(nn.LSTM(6, 5, 2, bidirectional=True)), rows(4, 2, 6)),
    Case("gru", lambda: First(nn.GRU(6, 5)), rows(4, 2, 6)),
    Case("rnn", lambda: First(nn.RNN(6, 5)), rows(4, 2, 6)),
    Case("lstm_cell", lambda: First(nn.LSTMCell(6, 5)), rows(2, 6)),
    Case("gru_cell", lambda: nn.GRUCell(6, 5), rows(2, 6)),
    Case("rnn_cell", lambda: nn.RNNCell(6, 5), rows(2, 6)),
    Case("stack_and_raw_matrix", Experts, rows(3, 6), RAW),
    Case("tied", Tied, ids),
    Case("tied_separate", Tied, ids, {"tied": "separate"}),
]
COMPUTED = [
    Case("parametrized", parametrized, rows(3, 6)),
    Case("weight_norm", lambda: parametrizations.weight_norm(nn.Conv1d(6, 5, 3)), rows(2, 6, 7)),
    Case("spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), rows(3, 6)),
    Case("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(6, 5)), rows(3, 6)),
    Case("old_weight_norm", lambda: nn.utils.weight_norm(nn.Linear(6, 5)), rows(3, 6)),
    Case("old_spectral_norm", lambda: nn.utils.spectral_norm(nn.Linear(6, 5)), rows(3, 6)),
    Case("pruned", lambda: prune.l1_unstructured(nn.Linear(6, 5), "weight", amount=0.3), rows(3, 6)),
]


def _bnb4() -> nn.Module:
    layer = named("bitsandbytes.nn", "Linear4bit")(64, 32, compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    layer.support_avx512bf16_for_cpu = False  # else the base, in eval mode, packs itself and computes in bfloat16
    return layer.to("cpu")


def _bnb8() -> nn.Module:
    layer = named("bitsandbytes.nn", "Linear8bitLt")(64, 32, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    return layer.to("cpu")


def _torchao() -> nn.Module:
    api, layer = importlib.import_module("torchao.quantization"), nn.Linear(64, 32)
    api.quantize_(layer, api.Int8WeightOnlyConfig())
    return layer


class Packed(nn.Module):
    """A layer of no library, with a quantised weight in buffers."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(32, 64)
        self.in_features, self.out_features, self.bias = 64, 32, None
        self.register_buffer("scale", weight.abs().max() / 127)
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes * self.scale)


QUANTISED = [
    Case("bnb_4bit", _bnb4, rows(3, 64), packages="bitsandbytes"),
    Case("bnb_8bit", _bnb8, rows(3, 64), packages="bitsandbytes"),
    Case("torchao_int8", _torchao, rows(3, 64), packages="torchao"),
    Case("packed", Packed, rows(3, 64)),
]


def of_cases(*cases: Case) -> pytest.MarkDecorator:
    """Parametrise over cases, those whose package is missing skipped."""

    def param(case: Case) -> Any:
        missing = [name for name in case.packages.split() if importlib.util.find_spec(name) is None]
        marks = [pytest.mark.skip(reason=f"{missing[0]} is not installed")] if missing else []
        return pytest.param(case, marks=marks, id=case.name)

    return pytest.mark.parametrize("case", [param(case) for case in cases])
