"""Weights that are zero, or that have no elements."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..entry import Entry
from .common import Holder, hazard, rows


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ZeroHead(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.head = _zeroed(nn.Linear(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.before(x)))


class ZeroResidual(Holder):
    """A branch that starts at zero beside a live one: all of the branch learns only once its end has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), _zeroed(nn.Linear(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x + self.branch(x))


class ZeroConvolution(nn.Module):
    """ControlNet's zero convolutions, and deformable offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.control = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.join = _zeroed(nn.Conv2d(6, 6, 1))
        self.offset = _zeroed(nn.Conv2d(6, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.join(self.control(x))
        shift = self.offset(y)
        return y * (1 + shift.mean(1, keepdim=True)) + shift.sum(1, keepdim=True)


class ZeroExperts(nn.Module):
    """One expert of a stack is zero, the others are not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        stack = torch.randn(3, 5, 6)
        stack[1] = 0
        self.expert_stack = nn.Parameter(stack)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", self.fc(x), self.expert_stack)


class Empty(Holder):
    """Layers without inputs, outputs or rows: nothing to adapt, nothing to break."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Linear(0, 3)
        self.nowhere = nn.Linear(8, 0)
        self.rows = nn.Embedding(0, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x) + self.nothing(x[:, :0]) + self.nowhere(x).sum()


class Tiny(Holder):
    """A single row, a single column, a single number: ranks have no room."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.column, self.number = nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.column(self.number(self.row(self.before(x))).tanh()))


def entries() -> list[Entry]:
    return [
        *hazard("zero_head", ZeroHead, rows(4, 8)),
        *hazard("zero_residual", ZeroResidual, rows(4, 8)),
        *hazard("zero_convolution", ZeroConvolution, rows(2, 3, 6, 6)),
        *hazard("zero_expert", ZeroExperts, rows(4, 6), parameters=("expert_stack",)),
        *hazard("zero_sized", Empty, rows(4, 8)),
        *hazard("one_row_or_column", Tiny, rows(4, 8)),
    ]
