"""Layers with a forward of their own, or called in other ways than layer(x)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.layers import ScaledStdConv2d, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from ..entry import Entry
from .common import Holder, hazard, rows


class KeywordCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.embed = nn.Embedding(9, 5)
        self.up = nn.ConvTranspose1d(1, 2, 3)
        self.bilinear = nn.Bilinear(5, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(input=self.conv(input=x).mean((2, 3)))
        y = self.embed(input=torch.arange(x.shape[0]))
        z = self.up(input=x[:, None], output_size=[7])
        return self.bilinear(input1=x, input2=y) + z.sum((1, 2))[:, None]


class Router(nn.Linear):
    """A router that returns a tuple."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(input)
        return logits, logits.softmax(-1).topk(2).values


class ScaledLinear(nn.Linear):
    """A forward with more arguments than the original."""

    def forward(self, input: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        out = F.linear(input * scale, self.weight / 2, self.bias)
        return out if shift is None else out + shift


class CausalConv3d(nn.Conv3d):
    """Causal in time, with a cache of earlier frames (video autoencoders)."""

    def forward(self, input: Tensor, cache: Tensor | None = None) -> Tensor:
        behind = self.kernel_size[0] - 1
        past = cache if cache is not None else input[:, :, :1].expand(-1, -1, behind, -1, -1)
        return super().forward(torch.cat([past, input], 2))


class OwnForwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.causal = CausalConv3d(2, 6, (3, 3, 3), padding=(0, 1, 1))
        self.scaled = ScaledLinear(6, 8)
        self.router = Router(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, last = x[:, :, :2], x[:, :, 2:]
        x = self.causal(first) + self.causal(last, cache=first)
        return self.router(self.scaled(x.mean((2, 3, 4)), 2.0, shift=torch.ones(8, dtype=x.dtype)))


class Unbound(Holder):
    """The class's forward called on the layer, its bound forward, and a partial of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.Linear.forward(self.a, self.before(x)).tanh()
        x = self.b.forward(x).tanh()
        return self.after(functools.partial(nn.Conv1d.forward, self.c)(x[..., None])[..., 0])


class ConvForward(nn.Module):
    """Parents that call conv._conv_forward with the layer's weight, or a changed one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a._conv_forward(x, self.a.weight, self.a.bias)
        return self.b._conv_forward(x, self.b.weight - self.b.weight.mean(), None)


class Hooks(Holder):
    """Forward hooks that change a layer's input and output go on working."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.fc.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        self.fc.register_forward_hook(lambda module, inputs, output: output + inputs[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(self.before(x)))


class InPlace(Holder):
    """Parents that change a layer's output in place (ConvBERT, inplace activations)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.same = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.line = nn.ModuleList([nn.Conv1d(8, 8, k, groups=g, padding=k // 2) for k, g in ((1, 1), (3, 1), (3, 8))])
        self.plane = nn.ModuleList([nn.Conv2d(8, 8, k, groups=g, padding=k // 2) for k, g in ((1, 1), (3, 1), (3, 4))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.before(x))
        x += 0.1
        x = nn.functional.relu(self.same(x[0]), inplace=True)[:, None]
        for conv in self.line:
            x = conv(x.reshape(-1, 8, 1))
            x += 0.1
        for conv in self.plane:
            x = conv(x.reshape(-1, 8, 1, 1)).mul_(2)
        return self.after(x.flatten(1))


class TypeChecks(Holder):
    """Parents that ask what their layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Conv1d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Linear) else layer(x.unsqueeze(-1)).squeeze(-1)
        return self.after(x)


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kinds: list[Any] = [StdConv2d, ScaledStdConv2d, StdConv2dSame, Conv2dSame]
        self.convs = nn.ModuleList([kind(4, 4, 3) for kind in kinds])

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).tanh()
        return x


class PlainSubclass(nn.Linear):
    """A subclass that computes what nn.Linear does, with a constructor of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.note = "kept"


class Subclasses(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.fc = PlainSubclass(8)

    def forward(self, x: Tensor) -> Tensor:
        assert self.fc.note == "kept"
        return self.after(self.fc(self.before(x)))


def entries() -> list[Entry]:
    return [
        *hazard("call_by_keyword", KeywordCalls, rows(2, 3, 5, 5)),
        *hazard("call_own_forwards", OwnForwards, rows(2, 2, 4, 5, 5)),
        *hazard("call_unbound", Unbound, rows(4, 8)),
        *hazard("call_conv_forward", ConvForward, rows(2, 3, 6, 6)),
        *hazard("call_hooks", Hooks, rows(4, 8)),
        *hazard("call_in_place", InPlace, rows(2, 4, 8)),
        *hazard("call_type_checks", TypeChecks, rows(4, 8)),
        *hazard("call_standardised", Standardised, rows(2, 4, 12, 12)),
        *hazard("call_plain_subclass", Subclasses, rows(4, 8)),
    ]
