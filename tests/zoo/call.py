"""Building and running a model of the zoo the same way each time: seeds, dtypes, inputs, outputs, gradients."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .entry import Entry, Inputs
from .sites import find_sites


def seed(value: int = 0) -> None:
    """All generators that models draw from, in eval mode too."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def build(entry: Entry, dtype: torch.dtype) -> nn.Module:
    """The model of an entry, the same each time, in eval mode and with every floating parameter trainable."""
    seed(0)
    model = entry.make().to(dtype).eval()
    if entry.options.as_trained:
        _as_trained(model, entry)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


@torch.no_grad()
def _as_trained(model: nn.Module, entry: Entry) -> None:
    """Scales of 0 or 1e-6 and biases of 0 cut off or hide what lies before them: give them the noise of training.

    Weights that are to be adapted keep their zeros, which are a case of their own.
    """
    sites = find_sites(model, entry.options.parameters).values()
    weights = {id(model.get_submodule(site.path)._parameters.get(site.name)) for site in sites}
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        constant = parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())
        if constant and parameter.is_floating_point() and id(parameter) not in weights:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))


def make_inputs(entry: Entry, dtype: torch.dtype) -> Inputs:
    seed(1)
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, entry.inputs())


def run(entry: Entry, model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Floating outputs of one call, from the same random state and on fresh copies of the inputs."""
    args, kwargs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
    seed(2)
    call = entry.options.call
    output = model(*args, **kwargs) if call is None else call(model, *args, **kwargs)
    found = float_tensors(output)
    if not found:
        raise ValueError(f"the output ({type(output).__name__}) holds no floating tensor")
    return found


def float_tensors(output: Any) -> list[Tensor]:
    """Floating tensors of an output of any structure; complex ones as pairs. Caches and the like are left out."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            found += [leaf] if leaf.is_floating_point() else []
        elif isinstance(leaf, Mapping):
            found += float_tensors(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += float_tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found


def backward(outputs: list[Tensor]) -> bool:
    """Backward of a random projection of all outputs (a plain sum is constant after a normalisation).

    Returns whether any output was part of a graph.
    """
    generator = torch.Generator().manual_seed(3)
    total = None
    for output in outputs:
        if output.requires_grad and output.numel() > 0:
            weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
            finite = torch.where(output.isfinite() & (output.abs() < 1e30), output, torch.zeros_like(output))
            term = (finite * weight).sum() / output.numel() ** 0.5
            total = term if total is None else total + term
    if total is None:
        return False
    total.backward()
    return True


def clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers go back to what they were: a pass in train mode moves BatchNorm statistics and power iterations."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                buffer.copy_(value)
                module._buffers[name] = buffer


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Train mode and back, module by module, without a trace in the buffers."""
    modes = {module: module.training for module in model.modules()}
    with buffers_kept(model):
        try:
            model.train()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference of two lists of outputs, each measured by its norm; infinite for other shapes."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    return max((_relative(a.detach().double(), b.detach().double()) for a, b in zip(found, wanted, strict=True)))


def _relative(a: Tensor, b: Tensor) -> float:
    finite = b.isfinite() & (b.abs() < 1e30)  # masks hold -inf or the lowest number
    if not torch.equal(finite, a.isfinite() & (a.abs() < 1e30)):
        return float("inf")
    a, b = a[finite], b[finite]
    size = b.norm().item()
    return (a - b).norm().item() / size if size > 1e-12 else (a - b).norm().item()
