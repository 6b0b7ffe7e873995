"""The graph is cut where nothing before a block requires a gradient: reversible blocks, reentrant checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from ..entry import Entry, ids
from .common import hazard, rows


class _Reversible(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1), undone in backward; no parameter is an input, as in Reformer and RevViT."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        ctx.blocks = blocks
        with torch.no_grad():
            a, b = x.chunk(2, -1)
            for f, g in blocks:
                a = a + f(b)
                b = b + g(a)
        ctx.save_for_backward(a, b)
        return torch.cat([a, b], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        a, b = ctx.saved_tensors
        da, db = grad.chunk(2, -1)
        for f, g in reversed(ctx.blocks):
            with torch.enable_grad():
                a = a.detach().requires_grad_()
                moved = g(a)
                moved.backward(db)
            b = b - moved.detach()
            da = da + a.grad
            with torch.enable_grad():
                b = b.detach().requires_grad_()
                moved = f(b)
                moved.backward(da)
            a = a.detach() - moved.detach()
            db = db + b.grad
        return torch.cat([da, db], -1), None


class Reversible(nn.Module):
    """Embedded tokens, with no gradient of their own where the embedding is frozen, then reversible blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]) for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(_Reversible.apply(self.embed(ids), self.blocks))


class Checkpointed(nn.Module):
    """Reentrant or not, on blocks after a stem."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Embedding(24, 8)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x)
        return self.head(x)


class CheckpointedSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.blocks, 2, self.stem(x), use_reentrant=True)


def entries() -> list[Entry]:
    def tokens() -> Any:
        return ((ids(2, 5),), {})

    # The stem is left alone, as users do: then nothing before the first block requires a gradient.

    return [
        *hazard("graph_reversible", Reversible, tokens),
        *hazard("graph_reversible_frozen_stem", Reversible, tokens, exclude=("embed",)),
        *hazard("graph_checkpoint_reentrant", lambda: Checkpointed(True), tokens),
        *hazard("graph_checkpoint_reentrant_frozen_stem", lambda: Checkpointed(True), tokens, exclude=("embed",)),
        *hazard("graph_checkpoint_frozen_stem", lambda: Checkpointed(False), tokens, exclude=("embed",)),
        *hazard("graph_checkpoint_sequential", CheckpointedSequence, rows(4, 8)),
        *hazard("graph_checkpoint_sequential_frozen_stem", CheckpointedSequence, rows(4, 8), exclude=("stem",)),
    ]
