"""Small modules that hold or return something as few layers do; several tests adapt them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize


class First(nn.Module):
    """The first result of a module that returns several."""

    def __init__(self, layer: nn.Module, repeat: int = 1) -> None:
        super().__init__()
        self.layer, self.repeat = layer, repeat

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.repeat)[0]


class Tied(nn.Module):
    """An embedding and an output layer with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.body(self.embed(ids)))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized() -> nn.Module:
    layer = nn.Linear(6, 5)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer
