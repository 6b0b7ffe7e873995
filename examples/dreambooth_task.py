"""Subject-driven generation as a task: a diffusion model, images of a subject, and how well it draws the subject after.

`train` and `score` know nothing of how a denoiser was adapted: any method trains what requires a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from diffusion_loss import Noised, prior_preservation_loss
from image_features import Features, similarity, similarity_within
from runtime import Runtime
from torch import Tensor, nn
from tqdm import tqdm
from training import learning_rate_schedule

MAX_GRAD_NORM = 1.0
"""Gradients are clipped to it, as in diffusers' scripts."""


class DiffusionModel(Protocol):
    """What a task needs of a model: `tiny_diffusion.TinyDiffusion` or one of `diffusion_models`."""

    denoiser: Any

    def encode_images(self, images: Tensor) -> Tensor: ...
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]: ...
    def add_noise(self, clean: Tensor, generator: torch.Generator) -> Noised: ...
    def inputs(self, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> dict[str, Any]: ...
    def predict(self, noised: Noised, condition: dict[str, Tensor]) -> Tensor: ...
    def generate(self, prompts: list[str], seed: int, steps: int) -> Tensor: ...
    def fresh_denoiser(self) -> Any: ...
    def only_denoiser(self) -> None: ...


class Encoded(NamedTuple):
    """Images of one prompt, encoded once: latents (n, ...) and the prompt's tensors, each with a first dimension 1."""

    latents: Tensor
    condition: dict[str, Tensor]


class Batch(NamedTuple):
    """Clean latents (b, ...), of which the first ``instances`` show the subject, and each row's prompt."""

    latents: Tensor
    condition: dict[str, Tensor]
    instances: int


class Scores(NamedTuple):
    """Similarities of generated images to real ones, means of cosines: at most 1."""

    subject: float
    """To images of the subject that were not trained on."""
    prior: float | None
    """To images of what the model drew before: the mean over the prompts; None where there are none."""


@dataclass
class Task:
    """A model and a subject to teach it.

    Attributes:
        subject_prompt: the prompt that shall come to mean the subject.
        instances: images of the subject, to train on.
        classes: images of the class, drawn by the base model; None trains without prior preservation.
        features: what similarity is measured in.
        references: features (n, d) of real images by prompt, the subject's among them.
        targets, exclude: globs of the layers that are adapted, and left, if nobody says otherwise.
    """

    model: DiffusionModel
    subject_prompt: str
    instances: Encoded
    classes: Encoded | None
    features: Features
    references: dict[str, Tensor]
    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    prior_loss_weight: float = 1.0
    batch_size: int = 8
    """Images of the subject in a batch; as many of the class come on top."""
    images_per_prompt: int = 8
    """For scoring, of each other prompt; four times as many of the subject."""
    sampling_steps: int = 20
    """Of the denoiser for each image that is drawn."""
    runtime: Runtime = Runtime(torch.device("cpu"), None)

    def build(self) -> nn.Module:
        """The base's denoiser, fresh and not adapted."""
        return self.model.fresh_denoiser()


def encode(model: DiffusionModel, images: Tensor, prompt: str) -> Encoded:
    """Images (n, c, h, w) in [0, 1] and their prompt, as the denoiser takes them."""
    return Encoded(model.encode_images(images), model.encode_prompts([prompt]))


def draw_batch(task: Task, generator: torch.Generator) -> Batch:
    """``task.batch_size`` images of the subject and as many of the class, drawn at random with repetition."""
    parts = [task.instances] if task.classes is None else [task.instances, task.classes]
    latents, conditions = [], []
    for part in parts:
        rows = torch.randint(len(part.latents), (task.batch_size,), generator=generator)
        latents.append(part.latents[rows.to(part.latents.device)])
        conditions.append({k: v.expand(task.batch_size, *v.shape[1:]) for k, v in part.condition.items()})
    condition = {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}
    return Batch(torch.cat(latents), condition, task.batch_size)


def loss_of(task: Task, batch: Batch, generator: torch.Generator) -> Tensor:
    """DreamBooth's loss of one batch at random timesteps: a scalar."""
    noised = task.model.add_noise(batch.latents, generator)
    with task.runtime.autocast():
        prediction = task.model.predict(noised, batch.condition)
    return prior_preservation_loss(prediction, noised, batch.instances, task.prior_loss_weight)


def example_inputs(task: Task, seed: int = 0) -> dict[str, Any]:
    """Arguments for the denoiser's forward: a noised batch of real images."""
    generator = torch.Generator().manual_seed(seed)
    batch = draw_batch(task, generator)
    noised = task.model.add_noise(batch.latents, generator)
    return task.model.inputs(noised.sample, noised.timesteps, batch.condition)


def train(
    denoiser: nn.Module, task: Task, groups: Iterable[Mapping[str, Any]], lr: float, steps: int, seed: int
) -> list[float]:
    """Train the parameters in ``groups`` on the subject with AdamW; batches, noise and dropout depend on the seed.

    Args:
        denoiser: from ``task.build()``, adapted by any method.
        groups: for the optimiser, as from ``mapsurgery.param_groups``; ``lr`` is for groups without one.

    Returns:
        The loss of each step.
    """
    task.model.denoiser = denoiser
    task.model.only_denoiser()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([dict(group) for group in groups], lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_schedule(step, steps))
    scaler = torch.amp.GradScaler(task.runtime.device.type, enabled=task.runtime.amp is torch.float16)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    denoiser.train()
    for _ in tqdm(range(steps), "training", leave=False, disable=None):
        loss = loss_of(task, draw_batch(task, generator), generator)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        losses.append(loss.detach())
    denoiser.eval()
    return torch.stack(losses).tolist()


def generate(denoiser: nn.Module, task: Task, seed: int) -> dict[str, Tensor]:
    """Images (n, c, h, w) in [0, 1] for each prompt of ``task.references``; the same noise for the same seed."""
    task.model.denoiser = denoiser
    counts = {
        prompt: task.images_per_prompt * (4 if prompt == task.subject_prompt else 1) for prompt in task.references
    }
    images = task.model.generate(
        [prompt for prompt, count in counts.items() for _ in range(count)], seed, task.sampling_steps
    )
    return dict(zip(counts, images.split(list(counts.values())), strict=True))


def scores_of(images: Mapping[str, Tensor], task: Task) -> Scores:
    """Similarity of the images of each prompt to the real ones of the same prompt."""
    return _scores({p: similarity(task.features(images[p]), real) for p, real in task.references.items()}, task)


def ceiling(task: Task) -> Scores:
    """The similarity that real images of the same prompt have to one another."""
    return _scores({prompt: similarity_within(real) for prompt, real in task.references.items()}, task)


def _scores(similarities: dict[str, float], task: Task) -> Scores:
    prior = [value for prompt, value in similarities.items() if prompt != task.subject_prompt]
    return Scores(similarities[task.subject_prompt], sum(prior) / len(prior) if prior else None)


def score(denoiser: nn.Module, task: Task, seed: int) -> float:
    """One number for both aims: the mean of the similarities to the subject and to the prior. Higher is better."""
    subject, prior = scores_of(generate(denoiser, task, seed), task)
    return subject if prior is None else (subject + prior) / 2
