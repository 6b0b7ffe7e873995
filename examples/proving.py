"""Proofs that a saved or merged model computes what the trained one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import mapsurgery


def report_proof(name: str, expected: Tensor, actual: Tensor, tolerance: float, what: str = "logits") -> bool:
    """Print how far two sets of numbers are apart, and whether that is within ``tolerance`` of the largest."""
    difference = (expected - actual).abs().max().item()
    allowed = tolerance * expected.abs().max().item()
    holds = difference <= allowed  # false for NaN, as it should be
    same = "bitwise equal" if torch.equal(expected, actual) else f"allowed {allowed:.1e}"
    print(f"  {'PROVED' if holds else 'FAILED'}  {name}: max |difference| of {what} {difference:.1e} ({same})")
    return holds


def prove(
    model: nn.Module,
    build: Callable[[], nn.Module],
    path: Path,
    compute: Callable[[nn.Module], Tensor],
    tolerance: float,
    what: str = "logits",
) -> bool:
    """Save -> load into a fresh model, and merge, must both leave what ``compute`` gives as it is. Merges ``model``.

    Args:
        build: makes the model as it was before it was patched.
        path: the adapter's file.
        tolerance: of merging, which rounds W' once; loading must be exact.
    """
    expected = compute(model)
    loaded = compute(mapsurgery.load(build(), path))
    same = report_proof("save -> load into a fresh model", expected, loaded, 0.0, what)
    merged = compute(mapsurgery.merge(model))
    return report_proof("merge into plain layers", expected, merged, tolerance, what) and same
