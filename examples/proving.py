"""Proofs that a saved or merged model computes what the trained one does."""

from __future__ import annotations

import torch
from torch import Tensor


def report_proof(name: str, expected: Tensor, actual: Tensor, tolerance: float, what: str = "logits") -> bool:
    """Print how far two sets of numbers are apart, and whether that is within ``tolerance`` of the largest."""
    difference = (expected - actual).abs().max().item()
    allowed = tolerance * expected.abs().max().item()
    holds = difference <= allowed  # false for NaN, as it should be
    same = "bitwise equal" if torch.equal(expected, actual) else f"allowed {allowed:.1e}"
    print(f"  {'PROVED' if holds else 'FAILED'}  {name}: max |difference| of {what} {difference:.1e} ({same})")
    return holds
