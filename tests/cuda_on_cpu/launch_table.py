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
# Of x, weight, bias, factors, s_w: a frozen base is the rule. LoRA's scalars are constants.
FROZEN, TRAINED, OF_LORA = (True, False, False, True, True), (True,) * 5, (True, False, False, True, False)
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


def scales(table: Table) -> None:
    for rank in (8, 32, 64):
        A, B, *numbers = adapter(96, 80, rank)
        s_w, s_d, *norm = table.add(f"map_scales, rank {rank}", ops.map_scales, A, B, *numbers)
        table.add(f"map_scales_backward, rank {rank}", ops.map_scales_backward, s_w, s_d, A, B, *norm)


def backward(table: Table, name: str, what: str, tensors: tuple, norm: list[Tensor], how: tuple, trained: bool) -> None:
    """Lines of a backward: MAP's, through the norm, and that of constant scalars."""
    if trained:
        table.add(f"{name}, {what}, all gradients", getattr(ops, name), *tensors, norm, *how, *TRAINED)
    else:
        table.add(f"{name}, {what}", getattr(ops, name), *tensors, norm, *how, *FROZEN)
        table.add(f"{name}, {what}, LoRA", getattr(ops, name), *tensors, [], *how, *OF_LORA)


def linear(table: Table, dtype: torch.dtype, with_bias: bool, rank: int) -> None:
    x, weight = torch.randn(32, 80).to(dtype), torch.randn(96, 80).to(dtype)
    bias = torch.randn(96).to(dtype) if with_bias else None
    A, B, *numbers = adapter(96, 80, rank)
    s_w, s_d, *norm = ops.map_scales(A, B, *numbers)
    own, what = (A, B, s_w, s_d), f"rank {rank}, {str(dtype)[6:]}{', bias' if with_bias else ''}"
    y, h = table.add(f"lowrank_linear, {what}", ops.lowrank_linear, x, weight, bias, *own)
    backward(table, "lowrank_linear_backward", what, (y, x, h, weight, *own), norm, (), with_bias)


def conv(table: Table, dtype: torch.dtype, with_bias: bool, name: str) -> None:
    kernel, padding, weight_space = CONVOLUTIONS[name]
    x, weight = torch.randn(2, 16, 9, 9).to(dtype), torch.randn(24, 16, kernel, kernel).to(dtype)
    bias = torch.randn(24).to(dtype) if with_bias else None
    A, B, *numbers = adapter(24, 16 * kernel**2, 4)
    s_w, s_d, *norm = ops.map_scales(A, B, *numbers)
    how, own = ([1, 1], padding, [1, 1], 1, weight_space), (A, B, s_w, s_d)
    what = f"{name}, {str(dtype)[6:]}{', bias' if with_bias else ''}"
    y, h = table.add(f"lowrank_conv, {what}", ops.lowrank_conv, x, weight, bias, *own, *how)
    backward(table, "lowrank_conv_backward", what, (y, x, h, weight, *own), norm, how, with_bias)


def weights(table: Table, dtype: torch.dtype) -> None:
    weight, (A, B, *numbers), name = torch.randn(96, 80).to(dtype), adapter(96, 80, 8), str(dtype)[6:]
    own = (A, B, *ops.map_scales(A, B, *numbers)[:2])
    w = table.add(f"effective_weight, {name}", ops.effective_weight, weight, *own, None)
    for need, what in ((False, name), (True, f"{name}, all gradients")):
        table.add(f"effective_weight_backward, {what}", ops.effective_weight_backward, w, weight, *own, need)
    table.add(f"merge_, {name}", ops.merge_, weight, *own)
    table.add(f"unmerge_, {name}", ops.unmerge_, weight, *own)


def main() -> None:
    library = mapsurgery.native_info().cpu_library
    assert library, "no native library is loaded"
    table = Table(library)
    scales(table)
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
