"""Weights that are computed from other parameters: parametrize, weight_norm and spectral_norm, old and new."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ..entry import Entry, ids
from .common import Holder, hazard, rows


def _old(function: str, layer: nn.Module, **options: object) -> nn.Module:
    """The hook-style functions, which warn that they are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(nn.utils, function)(layer, **options)


class Middle(Holder):
    """One parametrised layer between two plain ones."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.fc = wrap(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(self.before(x)).tanh())


class Scaled(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def _custom(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


class PositionalConv(nn.Module):
    """wav2vec 2's: weight_norm over the last dimension of a grouped convolution."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        conv = nn.Conv1d(8, 8, 4, padding=2, groups=2)
        self.conv = _old("weight_norm", conv, dim=2) if old else parametrizations.weight_norm(conv, dim=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x.transpose(1, 2)).transpose(1, 2).tanh())


class Vocoder(nn.Module):
    """HiFi-GAN: weight_norm on transposed convolutions."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        up = nn.ConvTranspose1d(4, 5, 4, stride=2, padding=1)
        self.up = _old("weight_norm", up) if old else parametrizations.weight_norm(up)
        conv = nn.Conv2d(1, 4, 3)
        self.critic = _old("spectral_norm", conv) if old else parametrizations.spectral_norm(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(self.up(x)[:, None].tanh())


class RecurrentNorm(nn.Module):
    """weight_norm on a recurrent matrix."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        rnn = nn.LSTM(6, 5, batch_first=True)
        name = "weight_hh_l0"
        self.rnn = _old("weight_norm", rnn, name=name) if old else parametrizations.weight_norm(rnn, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = parametrizations.weight_norm(nn.Embedding(24, 8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids).tanh()


class Shared(Holder):
    """The parametrised weight is read by the parent as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(self.before(x)).tanh() @ self.fc.weight)


class OtherParameter(Holder):
    """A parametrised bias beside a plain weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        parametrize.register_parametrization(self.fc, "bias", Scaled())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(self.before(x)).tanh())


def entries() -> list[Entry]:
    wraps: dict[str, Callable[[nn.Module], nn.Module]] = {
        "weight_norm_new": parametrizations.weight_norm,
        "weight_norm_old": lambda layer: _old("weight_norm", layer),
        "weight_norm_old_whole": lambda layer: _old("weight_norm", layer, dim=None),
        "spectral_norm_new": parametrizations.spectral_norm,
        "spectral_norm_old": lambda layer: _old("spectral_norm", layer),
        "orthogonal": parametrizations.orthogonal,
        "custom": _custom,
    }
    found = [
        e for name, wrap in wraps.items() for e in hazard(f"computed_{name}", lambda w=wrap: Middle(w), rows(4, 8))
    ]
    for ending, old in (("new", False), ("old", True)):
        found += hazard(f"computed_positional_{ending}", lambda o=old: PositionalConv(o), rows(2, 6, 8))
        found += hazard(f"computed_vocoder_{ending}", lambda o=old: Vocoder(o), rows(2, 4, 5))
        found += hazard(f"computed_recurrent_{ending}", lambda o=old: RecurrentNorm(o), rows(2, 4, 6))
    found += hazard("computed_embedding", Words, lambda: ((ids(2, 5),), {}))
    found += hazard("computed_read_by_parent", Shared, rows(4, 8))
    return found + hazard("computed_bias", OtherParameter, rows(4, 8))
