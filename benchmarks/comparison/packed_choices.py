"""Questions with all their choices in one sequence, entering a causal language model above its frozen lower layers.

An adapter in the upper layers never changes what the lower ones give: their outputs are computed once, not again for
every step, learning rate and method. And a question is computed once for all of its choices: each choice sees the
question and itself, at the places that it would have alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Packed:
    """One question of t tokens, of which k belong to choices.

    Attributes:
        inputs: outputs of the lower layers, float (t, width).
        positions: places of the tokens, int64 (t,).
        visible: which tokens (second axis) each token sees, bool (t, t).
        sources: for each token of a choice, the one that predicts it, int64 (k,).
        targets: those tokens themselves, int64 (k,).
        owners: the number of their choice, int64 (k,).
    """

    inputs: Tensor
    positions: Tensor
    visible: Tensor
    sources: Tensor
    targets: Tensor
    owners: Tensor


def split_model(model: Any, lower: int) -> tuple[nn.Module, Any]:
    """Take a model built as transformers' Llama apart: its first layers without the last norm, and the rest of it.

    The rest is ``model`` itself, without these layers.
    """
    below = copy.copy(model.model)
    below._modules = dict(model.model._modules)  # else both would share one table of submodules
    below.layers, below.norm = model.model.layers[:lower], nn.Identity()
    model.model.layers = model.model.layers[lower:]
    return below.eval().requires_grad_(False), model


@torch.no_grad()
def pack(lower: Any, prompt: list[int], choices: Sequence[list[int]], device: torch.device) -> Packed:
    """Lay out a question and compute the lower layers' outputs for it."""
    tokens, positions, segments = list(prompt), list(range(len(prompt))), [-1] * len(prompt)
    sources: list[int] = []
    for number, choice in enumerate(choices):
        sources += [len(prompt) - 1, *range(len(tokens), len(tokens) + len(choice) - 1)]
        positions += range(len(prompt), len(prompt) + len(choice))
        segments += [number] * len(choice)
        tokens += choice
    owner, places = torch.tensor(segments, device=device), torch.tensor(positions, device=device)
    visible = ((owner == -1) | (owner[:, None] == owner)).tril()
    ids = torch.tensor(tokens, device=device)
    embeddings = lower.embed_tokens(ids)[None]
    return Packed(
        inputs=_run(lower, embeddings, visible[None], places[None])[0],
        positions=places,
        visible=visible,
        sources=torch.tensor(sources, device=device),
        targets=ids[len(prompt) :],
        owners=owner[len(prompt) :],
    )


def log_likelihoods(model: Any, questions: Sequence[Packed]) -> list[Tensor]:
    """Log-likelihood of every token of every choice, float32 (k,) for each question, with a gradient."""
    length = max(len(question.positions) for question in questions)
    missing = [length - len(question.positions) for question in questions]
    pairs = list(zip(questions, missing, strict=True))
    inputs = torch.stack([F.pad(question.inputs, (0, 0, 0, pad)) for question, pad in pairs])
    positions = torch.stack([F.pad(question.positions, (0, pad)) for question, pad in pairs])
    visible = torch.stack([F.pad(question.visible, (0, pad, 0, pad)) for question, pad in pairs])
    visible |= torch.eye(length, dtype=torch.bool, device=visible.device)  # a row that sees nothing would be NaN
    hidden = _run(model.model, inputs, visible, positions)
    predicting = torch.cat([row[question.sources] for row, question in zip(hidden, questions, strict=True)])
    targets = torch.cat([question.targets for question in questions])
    found = -F.cross_entropy(model.lm_head(predicting).float(), targets, reduction="none")
    return list(found.split([len(question.targets) for question in questions]))


def choice_log_likelihoods(question: Packed, found: Tensor) -> Tensor:
    """Sum over the tokens of each choice: (k,) to (choices,)."""
    return found.new_zeros(int(question.owners.max()) + 1).index_add(0, question.owners, found)


def _run(model: Any, inputs: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    """Layers of a Llama on (n, t, width), under a mask (n, t, t) of their own."""
    mask = torch.zeros_like(visible, dtype=inputs.dtype).masked_fill(~visible, torch.finfo(inputs.dtype).min)
    return model(
        inputs_embeds=inputs, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
