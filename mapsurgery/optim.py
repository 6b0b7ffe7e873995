"""Optimiser groups: `param_groups`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .methods import Adapter
from .surgery import record


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels, but no bias and no norm, which may have several dimensions too."""
    return parameter.dim() > 1 and "bias" not in name and "norm" not in type(module).__name__.lower()


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    magnitude_lr_factor: float = 1.0,
    b_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, with every trained parameter of a patched model in exactly one.

    No weight decay on alpha and beta (decaying alpha shrinks the pretrained weight itself), biases and norms. Their own
    learning rate for the magnitudes, and for B (LoRA+, arXiv 2402.12354: a higher one than A's).

    Args:
        lr: of A and of the parameters that `train` named.
        weight_decay: of A, B and trained matrices.
        magnitude_lr_factor: learning rate of alpha and beta, as a multiple of lr.
        b_lr_factor: learning rate of B, as a multiple of lr.

    Returns:
        Dictionaries with "params", "lr", "weight_decay" and "name"; empty groups are left out.

    Raises:
        ValueError: the model is not patched or its weights are not loaded, a base weight was unfrozen, or a rate or
            factor is negative.
    """
    for name, value in [
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("magnitude_lr_factor", magnitude_lr_factor),
        ("b_lr_factor", b_lr_factor),
    ]:
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")
    root, memory = record.find_patched(model)
    for site in record.intact_sites(root, memory):
        if site.adapter.pending:
            raise ValueError(
                f"{site.path}: its weight is not loaded yet (meta device); load the weights, then make the groups"
            )
    settings = {
        "down": (lr, weight_decay),
        "up": (lr * b_lr_factor, weight_decay),
        "magnitude": (lr * magnitude_lr_factor, 0.0),
        "decay": (lr, weight_decay),
        "no_decay": (lr, 0.0),
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        roles = module.ROLES if isinstance(module, Adapter) else {}
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            members[roles.get(name) or ("decay" if _decays(module, name, parameter) else "no_decay")].append(parameter)
    return [
        {"params": params, "lr": settings[name][0], "weight_decay": settings[name][1], "name": name}
        for name, params in members.items()
        if params
    ]
