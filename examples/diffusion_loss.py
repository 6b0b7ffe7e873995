"""What a diffusion model is trained on: noised samples, targets of each kind of prediction, and DreamBooth's loss.

The same formulas as in diffusers' own training scripts (``examples/dreambooth`` there), for both kinds of scheduler.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

LOGIT_MEAN, LOGIT_STD, MODE_SCALE = 0.0, 1.0, 1.29
"""Of the densities over timesteps of flow matching (Stable Diffusion 3, arXiv 2403.03206, section 3.1)."""


class Noised(NamedTuple):
    """A batch on its way: ``sample`` and ``target`` (b, ...) as the clean batch, ``timesteps`` and ``weight`` (b,)."""

    sample: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor
    """Of each sample's loss."""


def add_noise(
    scheduler: Any, clean: Tensor, generator: torch.Generator, flow_weighting: str = "logit_normal"
) -> Noised:
    """Draw noise and a timestep for each sample, mix them, and say what the model has to predict.

    Args:
        scheduler: a ``FlowMatchEulerDiscreteScheduler`` (target: noise - clean), or one with ``add_noise`` as
            ``DDPMScheduler``'s, whose ``prediction_type`` is epsilon, v_prediction or sample.
        clean: float (b, ...), latents of the VAE in the scale that the model takes.
        generator: on the CPU, so that every device draws the same.
        flow_weighting: of flow matching: logit_normal, mode, none (densities of timesteps), sigma_sqrt or cosmap
            (weights of the loss).

    Raises:
        ValueError: another ``prediction_type``.
    """
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return _flow(scheduler, clean, noise, generator, flow_weighting)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(clean),), generator=generator).to(clean.device)
    sample = scheduler.add_noise(clean, noise, timesteps)
    target = _ddpm_target(scheduler, clean, noise, timesteps)
    return Noised(sample, timesteps, target, torch.ones(len(clean), device=clean.device))


def _ddpm_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    if kind == "sample":
        return clean
    raise ValueError(f"the scheduler's prediction_type is {kind!r}; there are epsilon, v_prediction and sample")


def _flow(scheduler: Any, clean: Tensor, noise: Tensor, generator: torch.Generator, weighting: str) -> Noised:
    """Rectified flow: sample = (1 - sigma) clean + sigma noise, its velocity is noise - clean."""
    density = compute_density_for_timestep_sampling(
        weighting, len(clean), LOGIT_MEAN, LOGIT_STD, MODE_SCALE, generator=generator
    )
    drawn = (density * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps.cpu()[drawn].to(clean.device)
    sigmas = scheduler.sigmas.cpu()[drawn].to(clean)
    spread = sigmas.reshape(-1, *[1] * (clean.dim() - 1))
    sample = (1 - spread) * clean + spread * noise
    return Noised(sample, timesteps, noise - clean, compute_loss_weighting_for_sd3(weighting, sigmas))


def prior_preservation_loss(
    prediction: Tensor, noised: Noised, instances: int, prior_loss_weight: float = 1.0
) -> Tensor:
    """DreamBooth's loss (arXiv 2208.12242, equation 2): of the subject, plus that of the class times its weight.

    Args:
        prediction: float (b, ...), of the whole batch.
        noised: the batch; its first ``instances`` samples show the subject, the rest the class.
        instances: how many samples show the subject; all of them without prior preservation.
        prior_loss_weight: lambda of the paper.

    Returns:
        A scalar, computed in float32.

    Raises:
        ValueError: ``instances`` is not between 1 and b.
    """
    if not 1 <= instances <= len(prediction):
        raise ValueError(
            f"instances = {instances}, but the batch has {len(prediction)} samples, the first of the subject"
        )
    errors = (prediction.float() - noised.target.float()).square().flatten(1).mean(dim=1) * noised.weight
    loss = errors[:instances].mean()
    if instances < len(errors):
        loss = loss + prior_loss_weight * errors[instances:].mean()
    return loss
