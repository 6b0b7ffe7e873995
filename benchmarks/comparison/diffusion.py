"""Subject-driven generation: DreamBooth teaches a small diffusion model of digits one that it never saw."""

from __future__ import annotations

import dataclasses

import torch
from dreambooth_task import draw_batch, loss_of
from dreambooth_task import score as similarity
from packaged_subject import REFERENCES, load_task
from torch import Tensor, nn

from .task import Options, Task


def load(options: Options) -> Task:
    """Validation and test compare with different real images, and draw from different noise."""
    task = load_task(options.cache)
    half = REFERENCES // 2
    held_out = {
        "validation": (1, {prompt: real[:half] for prompt, real in task.references.items()}),
        "test": (2, {prompt: real[half:] for prompt, real in task.references.items()}),
    }

    def loss(model: nn.Module, _indices: Tensor, random: torch.Generator) -> Tensor:
        task.model.denoiser = model
        return loss_of(task, draw_batch(task, random), random)

    def score(model: nn.Module, split: str) -> float:
        seed, references = held_out[split]
        return similarity(model, dataclasses.replace(task, references=references), seed)

    return Task(
        name="diffusion",
        about="UNet of 16-pixel digits, a digit it never saw, linear layers of attention and feed-forward",
        model=task.build,
        targets=("*attn*", "*.ff.*"),
        head=(),
        head_lr=0.0,
        loss=loss,
        score=score,
        useless=0.0,
        samples=len(task.instances.latents),
        epochs=150,
        batch=8,
    )
