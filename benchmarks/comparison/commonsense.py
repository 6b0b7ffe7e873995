"""Commonsense reasoning: SmolLM2 on ARC-Easy, answered by the choice that it holds for the most likely."""

from __future__ import annotations

import copy
from statistics import mean

import finetune_commonsense as example
import torch
from torch import Tensor, nn

from .packed_choices import Packed, choice_log_likelihoods, log_likelihoods, pack, split_model
from .task import Options, Task, required

LAYERS = 6
"""Adapted are the uppermost: with all 30, a training would take five times as long."""
TRAIN, VALIDATION, TEST = 192, 80, 160
BATCH = 8


def load(options: Options) -> Task:
    """The questions are parted at random, the same way every time."""
    folder = required(options.commonsense, "--commonsense")
    whole, tokenizer = example.load_model("packaged")
    lower, pretrained = split_model(whole.to(options.device).eval(), len(whole.model.layers) - LAYERS)
    data = example.load_task([folder], tokenizer, train_samples=TRAIN, test_samples=VALIDATION + TEST)
    (held_out,) = data.test.values()
    train = [pack(lower, each.prompt, [each.choices[each.answer]], options.device) for each in data.train]
    packed = [(pack(lower, each.prompt, each.choices, options.device), each.answer) for each in held_out]
    splits = {"validation": packed[:VALIDATION], "test": packed[VALIDATION:]}

    def loss(model: nn.Module, indices: Tensor, _random: torch.Generator) -> Tensor:
        return -torch.cat(log_likelihoods(model, [train[i] for i in indices.tolist()])).mean()

    return Task(
        name="commonsense",
        about=f"SmolLM2-135M-Instruct, ARC-Easy, all projections of the upper {LAYERS} layers",
        model=lambda: copy.deepcopy(pretrained),
        targets=tuple(example.TARGETS),
        head=(),
        head_lr=0.0,
        loss=loss,
        score=lambda model, split: accuracy(model, splits[split]),
        useless=0.25,
        samples=TRAIN,
        epochs=1,
        batch=BATCH,
    )


def accuracy(model: nn.Module, questions: list[tuple[Packed, int]]) -> float:
    """Share of the questions whose right choice has the largest likelihood."""
    right = []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        found = log_likelihoods(model, [question for question, _ in batch])
        for (question, answer), values in zip(batch, found, strict=True):
            right.append(int(choice_log_likelihoods(question, values).argmax()) == answer)
    return mean(right)
