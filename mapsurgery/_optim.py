"""Optimiser groups: `param_groups`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from .methods import Adapter
from .surgery.globs import first_match, nearest
from .surgery.record import (
    Site,
    all_sites,
    find_patched,
    find_trained,
    intact_sites,
    names_of,
    outside,
    refuse_frozen,
    refuse_put_away,
)


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
    layer_lr_factors: Mapping[str, float] | None = None,
    frozen: str = "refuse",
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, with every trained parameter of a patched model in exactly one.

    No weight decay on magnitudes, biases and norms. An optimiser over `model.parameters()` decays the magnitudes too:
    alpha and beta of MAP are 0 in the base, so that it pulls W' towards W (docs/training.md). Their own
    learning rate for the magnitudes, for B (LoRA+, arXiv 2402.12354: a higher one than A's) and what else starts at 0,
    and for layers.

    Args:
        lr: of A and of the parameters that `train` named.
        weight_decay: of A, B and trained matrices.
        magnitude_lr_factor: learning rate of alpha, beta and other magnitudes, as a multiple of lr.
        b_lr_factor: learning rate of B, and of what starts at 0 in other update families, as a multiple of lr.
        layer_lr_factors: {glob: factor} on all rates of the layers that it matches; the first that matches counts.
            Globs are matched as in `patch`, against the adapted layers and the names of other trained parameters.
        frozen: what becomes of adapters, and of what `train` named, that were frozen after `patch` (a model's own
            `freeze_encoder()`): "refuse" is an error, "keep" leaves them out.

    Returns:
        Dictionaries with "params", "lr", "weight_decay" and "name"; empty groups are left out. Where only a part of the
        model was patched, what is trained in the rest of it is in them, and a warning names it.

    Raises:
        ValueError: the model is not patched, its weights are not loaded or were offloaded with the adapters, a base
            weight was unfrozen, something was frozen (see `frozen`) or nothing is trained, a tensor that the adapter's
            family or method keeps fixed was unfrozen, a rate or factor is negative, or a glob matches nothing that is
            trained.
    """
    factors = dict(layer_lr_factors or {})
    for name, value in [
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("magnitude_lr_factor", magnitude_lr_factor),
        ("b_lr_factor", b_lr_factor),
        *((f"layer_lr_factors[{glob!r}]", factor) for glob, factor in factors.items()),
    ]:
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")
    root, record = find_trained(model)
    for site in intact_sites(root, record):
        if site.adapter.pending:
            raise ValueError(
                f"{site.path}: its weight is not loaded yet (meta device); load the weights, then make the groups"
            )
        refuse_put_away(site, "offload before patch to train, or make the groups")
        _refuse_thawed(site)
    refuse_frozen(root, record, frozen, "no optimiser would train them")
    settings = {
        "down": (lr, weight_decay),
        "up": (lr * b_lr_factor, weight_decay),
        "magnitude": (lr * magnitude_lr_factor, 0.0),
        "decay": (lr, weight_decay),
        "no_decay": (lr, 0.0),
    }
    groups: dict[tuple[str, float], list[nn.Parameter]] = {(role, 1.0): [] for role in settings}
    roles = _roles(root)
    if not roles:
        raise ValueError("nothing in the model is trained: every parameter is frozen (requires_grad=False)")
    _say_outside(model)
    for parameter, (role, names) in roles.items():
        glob = first_match(names, factors)
        groups.setdefault((role, 1.0 if glob is None else float(factors[glob])), []).append(parameter)
    _refuse_unmatched(factors, [names for _, names in roles.values()])
    return [
        {
            "params": params,
            "lr": settings[role][0] * factor,
            "weight_decay": settings[role][1],
            "name": role if factor == 1 else f"{role} x{factor:g}",
        }
        for (role, factor), params in groups.items()
        if params
    ]


def _refuse_thawed(site: Site) -> None:
    """Raises ValueError where something of an adapter requires a gradient that is not trained."""
    adapter = site.adapter
    trained = adapter.trained_parameters()
    thawed = [name for name, p in adapter.named_parameters() if p.requires_grad and name not in trained]
    if thawed:
        raise ValueError(
            f"{site.path}: {', '.join(thawed)} of its adapter was unfrozen, which method {adapter.method.name!r} with "
            f"update {adapter.update.name!r} keeps fixed: call requires_grad_(False) on it"
        )


def _say_outside(model: nn.Module) -> None:
    """Warn of what lies beside the patched part of a model: what trains there, and what shares an adapted weight."""
    root, _ = find_patched(model)
    names = [*outside(model, root)]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"only a part of the model was patched, a {type(root).__name__}; {len(names)} parameters outside of it are "
            f"trained as well: {', '.join(names[:5])}{more}. Freeze those that should not be (requires_grad_(False))",
            stacklevel=3,
        )
    adapted = {id(site.layer._parameters.get(site.parameter)): site.path for site in all_sites(model)}
    inner = set(root.modules())
    tied = [
        f"{paths[0]}.{name} with {adapted[id(parameter)]}"
        for module, paths in names_of(model).items()
        for name, parameter in module._parameters.items()
        if module not in inner and parameter is not None and id(parameter) in adapted
    ]
    if tied:
        warnings.warn(
            f"only a part of the model was patched, a {type(root).__name__}; what shares adapted weights outside of it "
            f"computes with the base: {', '.join(tied[:5])}. Patch the whole model",
            stacklevel=3,
        )


def _roles(root: nn.Module) -> dict[nn.Parameter, tuple[str, tuple[str, ...]]]:
    """Every trained parameter with the group that it belongs to and the names that a glob may call it by."""
    sites: dict[int, tuple[str, ...]] = {}
    for site in all_sites(root):  # a tied weight has several
        sites[id(site.adapter)] = sites.get(id(site.adapter), ()) + site.paths
    found: dict[nn.Parameter, tuple[str, tuple[str, ...]]] = {}
    for module, (path, *_) in names_of(root).items():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or parameter in found:
                continue
            if isinstance(module, Adapter):
                role = module.roles.get(name, "decay")
                found[parameter] = ("magnitude" if role == "base" else role, sites[id(module)])
            else:
                role = "decay" if _decays(module, name, parameter) else "no_decay"
                found[parameter] = (role, (f"{path}.{name}".lstrip("."),))
    return found


def _refuse_unmatched(factors: Mapping[str, float], every: list[tuple[str, ...]]) -> None:
    for glob in factors:
        if not any(first_match(names, [glob]) for names in every):
            close = nearest(glob, [name for names in every for name in names])
            raise ValueError(
                f"layer_lr_factors pattern {glob!r} matches nothing that is trained; the nearest: {', '.join(close)}"
            )
