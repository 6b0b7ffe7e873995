"""Prints what each operator launches on a GPU: kernels, products of cuBLAS, and operations of torch by name.

Operations of torch may launch several kernels, or none where there is nothing to do. Run with the emulated library; the
table is committed as launches.txt, which `make cuda-launches` rewrites.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

import mapsurgery

ops = torch.ops.mapsurgery
# Of x, weight, bias, factors, alpha: a frozen base is the rule.
FROZEN, TRAINED = (True, False, False, True, True), (True, True, True, True, True)
CONVOLUTIONS = {
    "3x3": (3, [1, 1], False),
    "3x3, weight space": (3, [1, 1], True),
    "1x1": (1, [0, 0], False),
}


def adapter(m: int, K: int, rank: int) -> tuple:
    """A, B, alpha, beta, weight_norm, tau, relative."""
    return torch.randn(rank, K), torch.randn(m, rank), *torch.ones(3, 1), 0.1, True


class Table:
    """Collects lines: what a call launches."""

    def __init__(self, library: str):
        self.launches = ctypes.CDLL(library).emulated_launches
        self.launches.restype = ctypes.c_char_p
        self.lines: list[str] = []

    def add(self, what: str, operator: Callable[..., tuple[Tensor, ...]], *args) -> tuple[Tensor, ...]:
        self.launches()
        result = operator(*args)
        counted = [line.split(" ", 1) for line in self.launches().decode().splitlines()]
        names = [(int(count), name.replace("aten::", "").removesuffix("_out")) for count, name in counted]
        parts = ", ".join(name if count == 1 else f"{count} {name}" for count, name in names)
        self.lines.append(f"{what:<59} {sum(count for count, _ in names):>2}: {parts}")
        return result


def norms(table: Table) -> None:
    for rank in (8, 64):
        args = adapter(96, 80, rank)
        table.add(f"lowrank_norm, rank {rank}", ops.lowrank_norm, *args[:2])
        table.add(f"map_scales, rank {rank}", ops.map_scales, *args)
        layers = [[value] * 20 for value in args]
        table.add(f"map_scales_many, 20 layers of rank {rank}", ops.map_scales_many, *layers)


def linear(table: Table, dtype: torch.dtype, with_bias: bool, rank: int) -> None:
    x, weight = torch.randn(32, 80).to(dtype), torch.randn(96, 80).to(dtype)
    bias = torch.randn(96).to(dtype) if with_bias else None
    args = adapter(96, 80, rank)
    what = f"rank {rank}, {str(dtype)[6:]}{', bias' if with_bias else ''}"
    y, h, *given = table.add(f"map_linear, {what}", ops.map_linear, x, weight, bias, *args)
    table.add(f"map_linear_given, {what}", ops.map_linear_given, x, weight, bias, *args, *given)
    saved = (y, x, h, weight, *args[:2], *given)
    if not with_bias:
        table.add(f"map_linear_backward, {what}", ops.map_linear_backward, *saved, *FROZEN)
    else:
        table.add(f"map_linear_backward, {what}, all gradients", ops.map_linear_backward, *saved, *TRAINED)


def conv(table: Table, dtype: torch.dtype, with_bias: bool, name: str) -> None:
    kernel, padding, weight_space = CONVOLUTIONS[name]
    x, weight = torch.randn(2, 16, 9, 9).to(dtype), torch.randn(24, 16, kernel, kernel).to(dtype)
    bias = torch.randn(24).to(dtype) if with_bias else None
    args = adapter(24, 16 * kernel**2, 4)
    how = ([1, 1], padding, [1, 1], 1, weight_space)
    what = f"{name}, {str(dtype)[6:]}{', bias' if with_bias else ''}"
    y, h, *given = table.add(f"map_conv, {what}", ops.map_conv, x, weight, bias, *args, *how)
    saved = (y, x, h, weight, *args[:2], *given)
    if not with_bias:
        table.add(f"map_conv_backward, {what}", ops.map_conv_backward, *saved, *how, *FROZEN)
    else:
        table.add(f"map_conv_backward, {what}, all gradients", ops.map_conv_backward, *saved, *how, *TRAINED)


def weights(table: Table, dtype: torch.dtype) -> None:
    weight, args, name = torch.randn(96, 80).to(dtype), adapter(96, 80, 8), str(dtype)[6:]
    w, *given = table.add(f"effective_weight, {name}", ops.effective_weight, weight, *args, None)
    saved = (w, weight, *args[:2], *given)
    table.add(f"effective_weight_backward, {name}", ops.effective_weight_backward, *saved, False)
    table.add(f"effective_weight_backward, {name}, all gradients", ops.effective_weight_backward, *saved, True)
    table.add(f"merge_, {name}", ops.merge_, weight, *args)
    table.add(f"unmerge_, {name}", ops.unmerge_, weight, *args)


def main() -> None:
    library = mapsurgery.native_info().cpu_library
    assert library, "no native library is loaded"
    table = Table(library)
    norms(table)
    for dtype in (torch.float32, torch.bfloat16):
        for with_bias in (False, True):
            linear(table, dtype, with_bias, 8)
            linear(table, dtype, with_bias, 32)
            for name in CONVOLUTIONS:
                conv(table, dtype, with_bias, name)
        weights(table, dtype)
    print("\n".join(table.lines))


if __name__ == "__main__":
    main()
