"""Every operator, as the dispatcher runs it, against its definition evaluated in float64 on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import mapsurgery
from mapsurgery.ops import operators
from mapsurgery.ops.registration import SCHEMAS

ops = torch.ops.mapsurgery
native = pytest.mark.skipif(not mapsurgery.native_info().cpu, reason="no native library is loaded")

# Relative Frobenius error that rounding to the dtype explains (unit roundoff: 1e-16, 6e-8, 4e-3, 5e-4).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
ALL_NEEDED = (True, True, True, True, True)


def exact(values):
    """The same values in float64 on the CPU."""
    return tree_map_only(Tensor, lambda t: t.detach().cpu().double(), values)


def absolute(values):
    return tree_map_only(Tensor, torch.abs, exact(values))


def assert_close(got: Tensor, want: Tensor, tolerance: float, size: float = 0.0) -> None:
    """Relative Frobenius error; `size` is that of the terms that `want` is a sum of, where they cancel."""
    assert got.shape == want.shape
    error = (exact(got) - want).norm().item()
    assert error <= tolerance * max(want.norm().item(), size), f"error {error:.3g}, norm {want.norm().item():.3g}"


def assert_all_close(got, want, tolerance: float) -> None:
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Adapters stay float32 under a narrow base."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Adapter(NamedTuple):
    A: Tensor
    B: Tensor
    s_w: Tensor
    s_d: Tensor
    norm: list[Tensor]


def factors(m, K, rank, weight, dtype, tau=0.0, relative=True, beta=0.3):
    """A, B, alpha, beta, weight_norm, tau, relative."""
    device = weight.device
    A, B = torch.randn(rank, K, dtype=dtype, device=device), torch.randn(m, rank, dtype=dtype, device=device)
    norm = weight.double().norm().to(operators.accumulate_dtype(dtype)).reshape(1)
    unit = torch.ones_like(norm) if relative else norm
    return A, B / 10, 0.1 * unit, beta * unit, norm, tau, relative


def adapter(m, K, rank, weight, dtype, *args, **kwargs) -> Adapter:
    A, B, *rest = factors(m, K, rank, weight, dtype, *args, **kwargs)
    s_w, s_d, *norm = ops.map_scales(A, B, *rest)
    return Adapter(A, B, s_w, s_d, norm)


def check_product(x, weight, bias, adapter: Adapter, conv: Sequence = (), needs=ALL_NEEDED) -> None:
    """Forward and backward of lowrank_linear, or of lowrank_conv with stride ...; with the norm and without."""
    name, tolerance = ("lowrank_conv", 3) if conv else ("lowrank_linear", 1)
    tolerance *= TOLERANCE[x.dtype]
    *tensors, norm = adapter
    args = (x, weight, bias, *tensors, *conv)
    y, h = getattr(ops, name)(*args)
    assert_all_close((y, h), getattr(operators, name)(*exact(args)), tolerance)
    assert y.dtype == h.dtype == x.dtype and (conv or y.is_contiguous())

    grad = torch.randn_like(y)
    backward, defined = getattr(ops, f"{name}_backward"), getattr(operators, f"{name}_backward")
    dtypes = (x.dtype, weight.dtype, x.dtype, *[tensors[0].dtype] * 2, *[norm[0].dtype] * 2)
    for through in (norm, []):
        args = (grad, x, h, weight, *tensors, through, *conv, *needs)
        sizes = absolute(args)
        if through:
            sizes[8][0][2] *= -1  # what the norm adds is subtracted
        got, want, sizes = backward(*args), defined(*exact(args)), defined(*sizes)
        for i, (g, w, size, dtype) in enumerate(zip(got, want, sizes, dtypes, strict=True)):
            assert g.dtype == dtype or g.numel() == 0, i
            assert_close(g, w, 2 * tolerance, size.norm().item() if i > 2 else 0.0)


# ---- registration


@native
def test_every_operator_has_a_native_cpu_kernel():
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mapsurgery::{name}", "CPU")


@pytest.mark.skipif(not mapsurgery.native_info().cuda, reason="no native CUDA library is loaded")
def test_every_operator_has_a_native_cuda_kernel():
    """No GPU is needed to see it. Of these two, torch's own operations are quick on a GPU."""
    for name in SCHEMAS.keys() - {"squared_norm", "fingerprint"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mapsurgery::{name}", "CUDA"), name


# ---- scales


def check_scales(A, B, *scalars, tolerance: float) -> None:
    got = ops.map_scales(A, B, *scalars)
    assert [t.dtype for t in got] == [operators.accumulate_dtype(A.dtype)] * 5
    assert_all_close(got, operators.map_scales(*exact((A, B, *scalars))), tolerance)
    ds = 1e3 * torch.randn(2, 1, device=A.device).to(got[0].dtype)  # above the smallest numbers of float16
    args = (*ds, A, B, *got[2:])
    assert_all_close(ops.map_scales_backward(*args), operators.map_scales_backward(*exact(args)), 2 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 33, 64, 256])
def test_scales_of_any_rank(device, dtype, rank):
    weight = torch.randn(190, 300, device=device)
    args = factors(190, 300, rank, weight, torch.float32, tau=0.1)
    scalars = [t.double() if dtype == torch.float64 else t for t in args[2:5]]
    tolerance = {torch.float64: 1e-11, torch.float32: 4e-6}.get(dtype, TOLERANCE[dtype])
    check_scales(args[0].to(dtype), args[1].to(dtype), *scalars, *args[5:], tolerance=tolerance)


@pytest.mark.parametrize("m, K, rank", [(4096, 11008, 16), (70000, 5, 4), (1, 1, 1), (7, 1, 300)])
def test_scales_of_long_and_short_factors(device, m, K, rank):
    ones = torch.ones(3, 1, device=device)
    check_scales(
        torch.randn(rank, K, device=device), torch.randn(m, rank, device=device), *ones, 0.0, True, tolerance=4e-5
    )


@pytest.mark.parametrize("m, K, rank", [(0, 5, 2), (5, 0, 2), (5, 4, 0), (0, 0, 0)])
def test_scales_of_empty_factors_are_finite(device, m, K, rank):
    ones = torch.ones(3, 1, device=device)
    A, B = torch.randn(rank, K, device=device), torch.randn(m, rank, device=device)
    s_w, s_d, slopes, gram_a, gram_b = ops.map_scales(A, B, *ones, 0, True)
    assert (
        s_w.isfinite() and s_d.isfinite() and slopes.isfinite().all() and gram_a.shape == gram_b.shape == (rank, rank)
    )
    grads = ops.map_scales_backward(s_w, s_d, A, B, slopes, gram_a, gram_b)
    assert [grad.shape for grad in grads] == [A.shape, B.shape, (1,), (1,)]
    assert all(grad.isfinite().all() for grad in grads)


def test_scales_take_any_strides(device):
    A, B = torch.randn(300, 24, device=device)[::2, ::3].t(), torch.randn(8, 90, device=device).t()
    check_scales(A, B, *torch.ones(3, 1, device=device), 0.0, True, tolerance=4e-6)


def test_large_half_factors_do_not_overflow(device):
    A = torch.full((4, 5000), 200.0, device=device, dtype=torch.float16)
    got = ops.map_scales(A, A.t().contiguous(), *torch.ones(3, 1, device=device), 0.0, True)
    assert_all_close(got, operators.map_scales(*exact((A, A.t(), *torch.ones(3, 1), 0.0, True))), 2e-6)


@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("case", ["plain", "B = 0", "A = B = 0", "w = 0", "B = 0, w = 0"])
def test_scales_at_the_edges(device, tau, relative, case):
    A, B = torch.randn(4, 30, device=device), torch.randn(20, 4, device=device)
    B = B * 0 if "B = 0" in case else B
    A = A * 0 if "A = " in case else A
    norm = torch.full((1,), 0.0 if "w = 0" in case else 7.0, device=device)
    scalars = (torch.full((1,), 1.5, device=device), torch.full((1,), -0.2, device=device), norm, tau, relative)
    check_scales(A, B, *scalars, tolerance=4e-6)


# ---- lowrank_linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 64, 256])
@pytest.mark.parametrize("tau, relative", [(0.1, True), (0.0, False)])
def test_linear(device, dtype, rank, tau, relative):
    weight = torch.randn(80, 96, device=device).to(dtype)
    x, bias = torch.randn(3, 17, 96, device=device).to(dtype), torch.randn(80, device=device).to(dtype)
    check_product(x, weight, bias, adapter(80, 96, rank, weight, factor_dtype(dtype), tau, relative))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (0, 96), (2, 0, 96), (2, 3, 4, 96)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_takes_any_leading_dimensions(device, shape, with_bias):
    weight = torch.randn(80, 96, device=device)
    bias = torch.randn(80, device=device) if with_bias else None
    check_product(torch.randn(shape, device=device), weight, bias, adapter(80, 96, 4, weight, torch.float32))


@native
@pytest.mark.parametrize("m, K, rank", [(1, 1, 1), (1, 9, 3), (9, 1, 3), (5, 0, 2), (0, 5, 2), (5, 4, 0)])
@pytest.mark.parametrize("rows", [6, 40])
def test_linear_with_single_and_empty_dimensions(device, m, K, rank, rows):
    weight, bias = torch.randn(m, K, device=device), torch.randn(m, device=device)
    x = torch.randn(rows, K, device=device)
    for b in (bias, None):
        check_product(x, weight, b, adapter(m, K, rank, weight, torch.float32))


def strided(t: Tensor, layout: str) -> Tensor:
    """t with the same values in memory of another layout."""
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = t.new_full((*t.shape[:-2], 2 * t.shape[-2], 3 * t.shape[-1]), float("nan"))
    view = wide[..., ::2, ::3]
    return view.copy_(t)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 33])
def test_linear_takes_any_strides(device, layout, dtype, rank):
    weight = strided(torch.randn(80, 96, device=device).to(dtype), layout)
    x = strided(torch.randn(3, 17, 96, device=device).to(dtype), layout)
    own = adapter(80, 96, rank, weight, torch.float32)
    bias = torch.randn(160, device=device).to(dtype)[::2]
    check_product(x, weight, bias, own._replace(A=strided(own.A, layout), B=strided(own.B, layout)))
    check_product(torch.randn(96, device=device).to(dtype).expand(5, 96), weight, bias, own)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("with_bias", [True, False])
def test_strides_of_single_dimensions_say_nothing(device, rows, with_bias):
    """Legal for torch, which does not look at them; a BLAS would refuse them as leading dimensions."""

    def column(n: int) -> Tensor:
        return torch.randn(n, device=device).as_strided((n, 1), (1, 0))

    weight, bias = column(6), torch.randn(6, device=device) if with_bias else None
    own = adapter(6, 1, 1, weight, torch.float32)
    check_product(
        column(rows),
        weight,
        bias,
        own._replace(A=torch.randn(1, device=device).as_strided((1, 1), (0, 5)), B=column(6)),
    )


# Sizes around those of the CPU's blocks: of rows (2, 4, 32, 128), of columns (a vector, a tile), of the rank (2, 16).
THIN = [(8, 33, 65, 1), (45, 70, 9, 3), (131, 1030, 519, 16), (700, 40, 1, 5), (4500, 17, 24, 8), (40, 65, 33, 17)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("T, K, m, rank", THIN)
@pytest.mark.parametrize("sliced", [False, True])
def test_products_with_thin_matrices(device, dtype, T, K, m, rank, sliced):
    weight = torch.randn(m, K, dtype=dtype, device=device)
    x = torch.randn(T, K + 3, dtype=dtype, device=device)[:, 3 if sliced else 0 :][:, :K]
    x = x if sliced else x.contiguous()
    check_product(x, weight, None, adapter(m, K, rank, weight, dtype, tau=0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 5, 16, 17])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_products_with_thin_matrices_in_convolutions(device, dtype, rank, stride, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 40, 30, 31, dtype=dtype, device=device).contiguous(memory_format=layout)
    weight = torch.randn(37, 40, 1, 1, dtype=dtype, device=device)
    own = adapter(37, 40, rank, weight, dtype, tau=0.1)
    check_product(x, weight, None, own, ([stride] * 2, [0] * 2, [1] * 2, 1, False))


@pytest.mark.parametrize("K, m", [(3, 34000), (34000, 3)])
def test_a_wide_layer_of_many_rows(device, K, m):
    """More blocks along the columns than a GPU runs at once: each goes through several tiles of rows."""
    weight, x = torch.randn(m, K, device=device), torch.randn(300, K, device=device)
    check_product(x, weight, None, adapter(m, K, 2, weight, torch.float32, tau=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 16])
def test_rows_at_an_odd_address(device, dtype, rank):
    """Of a width that could be read in wide accesses, if it did not start between two of them."""
    weight = torch.randn(64, 128, device=device).to(dtype)
    x = torch.randn(40 * 128 + 1, device=device).to(dtype)[1:].view(40, 128)
    check_product(x, weight, None, adapter(64, 128, rank, weight, torch.float32))


@pytest.mark.parametrize("rank", [3, 8, 16, 33])
def test_h_and_grams_of_any_strides(device, rank):
    """As torch.compile may keep them."""
    weight, x = torch.randn(64, 128, device=device), torch.randn(40, 128, device=device)
    *own, norm = adapter(64, 128, rank, weight, torch.float32)
    y, h = ops.lowrank_linear(x, weight, None, *own)
    want = ops.lowrank_linear_backward(y, x, h, weight, *own, norm, *ALL_NEEDED)
    relaid = [norm[0], *(strided(gram, "sliced") for gram in norm[1:])]
    got = ops.lowrank_linear_backward(y, x, strided(h, "sliced"), weight, *own, relaid, *ALL_NEEDED)
    assert_all_close(got, exact(want), 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 8, 17])
@pytest.mark.parametrize("name", ["s_w", "s_d"])
def test_a_scalar_that_is_nan_shows_in_every_output(device, dtype, rank, name):
    """However few the rows: torch's small products on a CPU forget a factor of NaN."""
    weight = torch.randn(12, 10, device=device).to(dtype)
    own = adapter(12, 10, rank, weight, factor_dtype(dtype))
    *own, norm = own._replace(**{name: getattr(own, name) * float("nan")})
    kernel, conv = weight.reshape(12, 10, 1, 1), ([1, 1], [0, 0], [1, 1], 1, False)
    for rows in (1, 2, 5, 40):
        x = torch.randn(rows, 10, device=device).to(dtype)
        y, h = ops.lowrank_linear(x, weight, None, *own)
        dx = ops.lowrank_linear_backward(torch.ones_like(y), x, h, weight, *own, norm, *ALL_NEEDED)[0]
        assert y.isnan().all() and dx.isnan().all()
        assert ops.lowrank_conv(x[:, :, None, None], kernel, None, *own, *conv)[0].isnan().all()


@native
def test_a_factor_of_0_drops_what_overflowed():
    """As BLAS does, whichever gradients are asked for."""
    weight, x = torch.full((20, 30), 100.0), torch.randn(40, 30)
    A, B, s_w, s_d, norm = adapter(20, 30, 4, weight, torch.float32)
    _, h = ops.lowrank_linear(x, weight, None, A, B, 0 * s_w, s_d)
    saved = (torch.full((40, 20), 1e37), x, h, weight, A, B / 1e10, 0 * s_w, s_d, norm)
    for needs in (ALL_NEEDED, (True, False, False, False, False)):
        assert ops.lowrank_linear_backward(*saved, *needs)[0].isfinite().all()


@native
def test_lazily_copied_inputs_are_read_by_several_threads():
    """torch refuses to make the copy within a parallel loop."""
    weight = torch.randn(8, 256)
    own = adapter(8, 256, 4, weight, torch.float32)
    x = torch._lazy_clone(torch.randn(4096, 256))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check_product(x, weight, None, own)
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("T", [40, 700, 4500])
def test_the_number_of_threads_does_not_change_a_sum(T):
    """Of the low-rank half; products with the frozen weight are BLAS's."""
    weight, x, grad = torch.randn(300, 520), torch.randn(T, 520), torch.randn(T, 300)
    *own, norm = adapter(300, 520, 8, weight, torch.float32)

    def run(threads):
        torch.set_num_threads(threads)
        _, h = ops.lowrank_linear(x, weight, None, *own)
        _, _, _, dA, dB, *_ = ops.lowrank_linear_backward(grad, x, h, weight, *own, norm, *ALL_NEEDED)
        return h, dA, dB

    before = torch.get_num_threads()
    try:
        one, three = run(1), run(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_linear_casts_the_weight_to_the_input(device):
    weight = torch.randn(80, 96, device=device)
    x = torch.randn(5, 96, device=device, dtype=torch.bfloat16)
    check_product(x, weight, torch.randn(80, device=device), adapter(80, 96, 8, weight, torch.float32))


@native
@pytest.mark.parametrize("rank", [4, 20])
def test_a_large_scale_of_the_update_does_not_overflow_half(device, rank):
    x, weight = 300 * torch.randn(4, 256, device=device), torch.randn(64, 256, device=device) / 50
    A, B, *rest = factors(64, 256, rank, weight, torch.float32)
    B = B / 1e3  # one small step from B = 0 with tau = 0: s_d is in the hundreds
    s_w, s_d, *_ = ops.map_scales(A, B, *rest)
    y = ops.lowrank_linear(x.half(), weight.half(), None, A, B, s_w, s_d)[0]
    assert_close(y, operators.lowrank_linear(*exact((x, weight, None, A, B, s_w, s_d)))[0], 4e-3)


@pytest.mark.parametrize("needed", range(5))
@pytest.mark.parametrize("rank", [4, 33])
@pytest.mark.parametrize("conv", [(), ([1] * 2, [1] * 2), ([1] * 2, [0] * 2), ([2] * 2, [0] * 2)], ids=str)
@pytest.mark.parametrize("weight_space", [False, True])
def test_a_backward_gives_what_is_needed_and_no_more(device, needed, rank, conv, weight_space):
    if not conv and weight_space:
        pytest.skip("of convolutions")
    needs = tuple(i == needed for i in range(5))
    kernel = 2 * conv[1][0] + 1 if conv else None
    weight = torch.randn(40, 6, *[kernel] * 2, device=device) if conv else torch.randn(80, 96, device=device)
    own = adapter(len(weight), weight[0].numel(), rank, weight, torch.float32)
    x = torch.randn(2, 6, 7, 7, device=device) if conv else torch.randn(7, 96, device=device)
    check_product(x, weight, None, own, (*conv, [1] * 2, 1, weight_space) if conv else (), needs)


def test_the_gradient_of_a_sum_is_one_number_in_memory(device):
    weight, x = torch.randn(80, 96, device=device), torch.randn(7, 96, device=device)
    *own, norm = adapter(80, 96, 4, weight, torch.float32)
    _, h = ops.lowrank_linear(x, weight, None, *own)
    args = (torch.ones((), device=device).expand(7, 80), x, h, weight, *own, norm, *ALL_NEEDED)
    assert_all_close(ops.lowrank_linear_backward(*args), operators.lowrank_linear_backward(*exact(args)), 2e-5)


def test_the_start_is_the_base_bit_for_bit(device):
    weight, x, bias = (torch.randn(shape, device=device) for shape in ((80, 96), (7, 96), (80,)))
    A, B, _, beta, norm, *_ = factors(80, 96, 4, weight, torch.float32)
    B = torch.zeros_like(B)
    s_w, s_d, *_ = ops.map_scales(A, B, torch.zeros_like(beta), beta, norm, 0.1, True)
    assert torch.equal(ops.lowrank_linear(x, weight, None, A, B, s_w, s_d)[0], x @ weight.t())
    assert torch.equal(ops.effective_weight(weight, A, B, s_w, s_d, None), weight)
    if device.type == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            rows, W, b = (t[:2].to(dtype) if t is x else t.to(dtype) for t in (x, weight, bias))
            assert torch.equal(ops.lowrank_linear(rows, W, b, A, B, s_w, s_d)[0], F.linear(rows, W, b))


# ---- lowrank_conv

CONVOLUTIONS = [  # spatial dimensions, channels in, out, kernel, stride, padding, dilation, groups
    (1, 6, 8, 3, 1, 1, 1, 1),
    (2, 6, 8, 3, 2, 1, 1, 1),
    (2, 6, 8, 3, 1, 2, 2, 2),
    (2, 8, 8, 3, 1, 1, 1, 8),
    (2, 6, 8, 1, 1, 0, 1, 1),
    (2, 6, 8, 1, 2, 0, 1, 1),  # a matrix product on every other position
    (2, 6, 8, 1, 1, 1, 1, 1),  # zeros around a 1x1 kernel
    (2, 6, 8, 1, 1, 0, 1, 2),
    (1, 6, 8, 1, 3, 0, 1, 1),
    (3, 4, 6, 1, 2, 0, 1, 1),
    (3, 4, 6, 2, 2, 1, 1, 2),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_space", [True, False])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_conv(device, dtype, weight_space, shape, channels_last):
    spatial, channels_in, channels_out, kernel, *conv, groups = shape
    if channels_last and spatial == 1:
        pytest.skip("no channels-last format for one dimension")
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spatial, torch.contiguous_format)
    layout = layout if channels_last else torch.contiguous_format
    x = torch.randn(2, channels_in, *[9, 8, 5][:spatial], device=device).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(channels_out, channels_in // groups, *[kernel] * spatial, device=device).to(dtype)
    weight = weight.contiguous(memory_format=layout)
    own = adapter(channels_out, weight[0].numel(), 3, weight, factor_dtype(dtype), tau=0.1)
    bias = torch.randn(channels_out, device=device).to(dtype)
    check_product(x, weight, bias, own, (*[[value] * spatial for value in conv], groups, weight_space))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("rank", [0, 3, 33])
def test_a_convolution_with_beta_0_is_the_scaled_base(device, dtype, kernel, rank):
    """torch's baddbmm forgets its beta where alpha is 0 in half precision on a CPU."""
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((2, 6, 9, 8), (40, 6, kernel, kernel)))
    *own, _ = adapter(40, 6 * kernel**2, rank, weight, factor_dtype(dtype), beta=0.0)
    conv = ([1, 1], [kernel // 2] * 2, [1, 1], 1, False)
    if rank == 0 and kernel > 1:
        pytest.skip("torch has no convolution of no channels")
    args = (x, weight, None, *own, *conv)
    want = 1.1 * F.conv2d(exact(x), exact(weight), padding=kernel // 2)
    assert_close(ops.lowrank_conv(*args)[0], want, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "strided"])
@pytest.mark.parametrize("x_channels_last", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_any_layout_through_a_pointwise_convolution(device, layout, x_channels_last, stride):
    x = torch.randn(3, 6, 7, 8, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if x_channels_last else x
    weight = torch.randn(8, 6, 1, 1, device=device)
    *own, norm = adapter(8, 6, 2, weight, torch.float32)
    conv = ([stride] * 2, [0, 0], [1, 1], 1, False)
    y, h = ops.lowrank_conv(x, weight, None, *own, *conv)
    grad = {
        "contiguous": torch.randn(y.shape, device=device),
        "channels_last": torch.randn(y.shape, device=device).contiguous(memory_format=torch.channels_last),
        "expanded": torch.randn(1, device=device).expand(y.shape),
        "strided": torch.randn(*y.shape[:-1], 2 * y.shape[-1], device=device)[..., ::2],
    }[layout]
    args = (grad, x, h, weight, *own, norm, *conv, *ALL_NEEDED)
    got, want = ops.lowrank_conv_backward(*args), operators.lowrank_conv_backward(*exact(args))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, TOLERANCE[torch.float32], float(exact(x).norm() * exact(grad).norm()))


@pytest.mark.parametrize("weight_space", [True, False])
@pytest.mark.parametrize("kernel_stride", [(1, 1), (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(
    "spatial", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("order", ["x", "weight", "x and weight", "neither", "x outermost last"])
def test_traced_convolutions_have_the_strides_of_real_ones(device, weight_space, kernel_stride, spatial, order):
    """A compiled graph is planned for the strides of fake tensors, and what comes next reads with them."""

    def channels_last(t: Tensor) -> Tensor:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    kernel, stride = kernel_stride
    x = torch.randn(2, 6, *[9, 8, 7][:spatial], device=device)
    weight = torch.randn(8, 6, *[kernel] * spatial, device=device)
    x = channels_last(x) if "x" in order.split("and")[0].split() else x
    x = x.movedim(0, -1).contiguous().movedim(-1, 0) if order == "x outermost last" else x
    weight = channels_last(weight) if "weight" in order else weight
    own = adapter(8, 6 * kernel**spatial, 3, weight, torch.float32, tau=0.1)
    conv = ([stride] * spatial, [kernel // 2] * spatial, [1] * spatial, 1, weight_space)

    def run(x, weight, own):
        *tensors, norm = own
        y, h = ops.lowrank_conv(x, weight, None, *tensors, *conv)
        return y, h, *ops.lowrank_conv_backward(y, x, h, weight, *tensors, norm, *conv, *ALL_NEEDED)

    real = run(x, weight, own)
    with FakeTensorMode() as mode:
        fake = run(*tree_map_only(Tensor, mode.from_tensor, (x, weight, own)))

    def strides(results):
        return [[step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in results]

    assert strides(fake) == strides(real)


# ---- norms and conversions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squared_norm(dtype):
    weight = torch.randn(33, 70, 3).to(dtype)
    for view in (
        weight,
        weight.transpose(0, 2),
        weight[:, ::2],
        weight[:0],
        weight[0, 0, 0],
        weight.expand(2, 33, 70, 3),
    ):
        want = view.double().square().sum().item()
        assert ops.squared_norm(view).item() == pytest.approx(want, rel=1e-12)
        assert mapsurgery.ops.frobenius_norm(view) == pytest.approx(want**0.5, rel=1e-12)


@pytest.mark.parametrize("value", [1e30, 1e-30, float("inf"), float("nan"), 0.0])
def test_the_norm_of_extreme_weights(value):
    want = torch.full((5, 7), value).double().norm().item()
    assert mapsurgery.ops.frobenius_norm(torch.full((5, 7), value)) == pytest.approx(want, rel=1e-12, nan_ok=True)


def test_every_float16_is_read_and_written_as_it_is():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = bits.view(torch.float16).reshape(256, 256)
    unchanged = (torch.randn(2, 256), torch.zeros(256, 2), torch.ones(1), torch.zeros(1))
    same = ops.effective_weight(weight, *unchanged, torch.float16)
    assert torch.equal(same.nan_to_num(1.0), weight.nan_to_num(1.0)) and torch.equal(same.isnan(), weight.isnan())
    assert torch.equal(
        ops.effective_weight(weight, *unchanged, torch.float32).nan_to_num(1.0), weight.float().nan_to_num(1.0)
    )


def test_float32_is_rounded_to_float16_as_torch_rounds():
    halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).double()
    between = (halves[1:] + halves[:-1]) / 2  # ties, and their neighbours on both sides
    near = torch.cat([between, between * (1 + 1e-6), between * (1 - 1e-6), torch.tensor([65519.0, 65520.0, 1e9, 1e-9])])
    weight = torch.cat([near, -near]).float()[:, None]
    m = weight.shape[0]
    unchanged = (torch.ones(1, 1), torch.zeros(m, 1), torch.ones(1), torch.zeros(1))
    assert torch.equal(ops.effective_weight(weight, *unchanged, torch.float16), weight.half())


# ---- effective weight and merging


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("rank", [5, 19])
def test_effective_weight(device, dtype, out_dtype, layout, rank):
    weight = torch.randn(70, 130, device=device).to(dtype)
    weight = weight if layout == "contiguous" else strided(weight, layout)
    *own, _ = adapter(70, 130, rank, weight, factor_dtype(dtype), tau=0.1)
    out = ops.effective_weight(weight, *own, out_dtype)
    tolerance = max(TOLERANCE[out.dtype], TOLERANCE[factor_dtype(dtype)]) / 2  # one rounding
    assert out.dtype == (out_dtype or dtype)
    assert out.stride() == operators.effective_weight(weight, *own, out_dtype).stride()
    assert_close(out, operators.effective_weight(*exact((weight, *own)), None), tolerance)

    args = (torch.randn_like(out), weight, *own, True)
    got, want = ops.effective_weight_backward(*args), operators.effective_weight_backward(*exact(args))
    sizes = operators.effective_weight_backward(*absolute(args))
    for i, (g, w, size) in enumerate(zip(got, want, sizes, strict=True)):
        assert_close(g, w, 4 * TOLERANCE[weight.dtype if i == 0 else own[0].dtype], size.norm().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 64, 256])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_merge_and_unmerge_write_the_weight_and_nothing_else(device, dtype, rank, layout):
    m, K, sentinel = 70, 600, 12345.0
    original = torch.randn(m, K, device=device).to(dtype)
    store = torch.full((3 * K + 10, 3 * K + 10), sentinel, device=device).to(dtype)
    if layout == "contiguous":
        weight = store.view(-1)[7 : 7 + m * K].view(m, K)
    elif layout == "transposed":
        weight = store[3 : 3 + K, 5 : 5 + m].t()
    else:
        weight = store[3 : 3 + 2 * m : 2, 5 : 5 + 3 * K : 3]
    weight.copy_(original)
    *own, _ = adapter(m, K, rank, original, factor_dtype(dtype), tau=0.1)
    tolerance = TOLERANCE[dtype] / 2

    assert ops.merge_(weight, *own) is None
    assert_close(weight, operators.effective_weight(*exact((original, *own)), None), tolerance)
    ops.unmerge_(weight, *own)
    assert_close(weight, exact(original), 3 * tolerance)
    weight.fill_(sentinel)
    assert (store == store[0, 0]).all()


@pytest.mark.parametrize("m, K, rank", [(0, 5, 2), (5, 0, 2), (5, 4, 0), (1, 1, 1), (1, 1000, 3), (1000, 1, 3)])
def test_merge_of_empty_and_single_dimensions(device, m, K, rank):
    weight = torch.randn(m, K, device=device)
    *own, _ = adapter(m, K, rank, weight, torch.float32)
    want = operators.effective_weight(*exact((weight, *own)), None)
    ops.merge_(weight, *own)
    assert_close(weight, want, 5e-6)


@native
def test_merge_needs_little_memory():
    weight = torch.randn(2048, 2048).to(torch.bfloat16)
    *own, _ = adapter(2048, 2048, 8, weight, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.merge_(weight, *own)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < weight.nbytes / 10


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_merge_needs_little_gpu_memory():
    weight = torch.randn(2048, 2048, device="cuda").to(torch.bfloat16)
    *own, _ = adapter(2048, 2048, 8, weight, torch.float32)
    ops.merge_(weight, *own)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.merge_(weight, *own)
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 10


# ---- determinism


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 64])
def test_two_runs_give_the_same_bits(device, dtype, rank):
    weight = torch.randn(256, 512, device=device).to(dtype)
    x, args = torch.randn(600, 512, device=device).to(dtype), factors(256, 512, rank, weight, torch.float32)

    def run():
        s_w, s_d, *norm = ops.map_scales(*args)
        own = (*args[:2], s_w, s_d)
        y, h = ops.lowrank_linear(x, weight, None, *own)
        return [y, h, s_d, *norm, *ops.lowrank_linear_backward(y, x, h, weight, *own, norm, *ALL_NEEDED)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


# ---- scalars that move

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def test_no_product_of_half_precision_takes_a_scalar():
    """oneDNN compiles a product anew for each value of a factor: all that go to torch with one are in one place."""
    calls = {}
    for path in CSRC.rglob("*.*"):
        text = path.read_text()
        for found in re.findall(r"(?:addmm_out|baddbmm_out)\([^;]*\);", text):
            calls.setdefault(path.name, []).append(re.sub(r"\s+", " ", found))
    constant = calls.pop("aten.h")
    assert len(constant) == 2 and all(call.endswith("b.get(), 1, 1)); "[:-1]) for call in constant), constant
    assert list(calls) == ["device.h"] and len(calls["device.h"]) == 2
    blas = (CSRC / "cpu" / "device.h").read_text()
    assert blas.count("check_blas(out);") == 2  # which refuses half precision


# ---- errors


@native
@pytest.mark.parametrize("groups, padding, dilation, weight_space", [(1, 0, 1, False), (2, 1, 3, True)])
def test_a_convolution_larger_than_its_input_reads_as_in_torch(device, groups, padding, dilation, weight_space):
    x, weight = torch.randn(1, 6, 2, 4, device=device), torch.randn(8, 6 // groups, 3, 3, device=device)
    *own, _ = adapter(8, weight[0].numel(), 2, weight, torch.float32)
    with pytest.raises(RuntimeError) as torchs:
        F.conv2d(x, weight, padding=padding, dilation=dilation, groups=groups)
    conv = ([1] * 2, [padding] * 2, [dilation] * 2, groups, weight_space)
    with pytest.raises(RuntimeError) as ours:
        ops.lowrank_conv(x, weight, None, *own, *conv)
    assert str(ours.value) == str(torchs.value)


@native
def test_too_large_a_result_reads_as_in_torch():
    """Programs that look for a batch size that fits look at the words."""
    weight = torch.randn(1 << 10, 1)
    *own, _ = adapter(1 << 10, 1, 1, weight, torch.float32)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        ops.lowrank_linear(torch.empty(1, 1).expand(1 << 42, 1), weight, None, *own)


@native
def test_an_error_within_a_product_of_torch_has_its_words():
    x, weight = torch.randn(2, 6, 5, 5), torch.randn(8, 6, 3, 3)
    *own, _ = adapter(8, 54, 2, weight, torch.float32)
    with pytest.raises(RuntimeError) as torchs:
        F.conv2d(x, weight, padding=[-1, 0])
    with pytest.raises(RuntimeError) as ours:
        ops.lowrank_conv(x, weight, None, *own, [1, 1], [-1, 0], [1, 1], 1, False)
    if torch.__version__ >= (2, 13):
        assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize("training", [True, False])
def test_a_gpu_without_memory_raises_torchs_own_error(monkeypatch, training):
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(mapsurgery.ops.autograd, "_lowrank_linear", full)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    mapsurgery.patch(layer, targets=["*"], rank=2)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"), torch.set_grad_enabled(training):
        layer(torch.randn(3, 4))


def good_arguments(device):
    weight = torch.randn(6, 5, device=device)
    A, B, s_w, s_d, _ = adapter(6, 5, 2, weight, torch.float32)
    x, bias = torch.randn(3, 5, device=device), torch.randn(6, device=device)
    return {"x": x, "weight": weight, "bias": bias, "A": A, "B": B, "s_w": s_w, "s_d": s_d}


@native
@pytest.mark.parametrize(
    "name, change",
    [
        ("x", lambda t: t[:, :4]),
        ("x", lambda t: t.long()),
        ("weight", lambda t: t[0]),
        ("weight", lambda t: t.int()),
        ("bias", lambda t: t[:3]),
        ("A", lambda t: t[:, :3]),
        ("A", lambda t: t[None]),
        ("B", lambda t: t.double()),
        ("B", lambda t: t[:, :1]),
        ("s_w", lambda t: t.expand(2)),
        ("s_d", lambda t: t.double()),
        ("s_d", lambda t: t[:0]),
    ],
)
def test_a_bad_argument_is_named(device, name, change):
    if device.type == "cuda" and not mapsurgery.native_info().cuda:
        pytest.skip("no native CUDA library is loaded")
    args = good_arguments(device)
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=rf"mapsurgery: .*\b{name}\b"):
        ops.lowrank_linear(*args.values())


@native
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda norm: norm[:2], "norm must be slopes, gram_a and gram_b of map_scales, or empty; got 2"),
        (lambda norm: [norm[0][:2], *norm[1:]], "slopes has shape"),
        (lambda norm: [*norm[:2], norm[2].double()], "gram_b is Double"),
        (lambda norm: [norm[0], norm[1][:1], norm[2]], "gram_a has shape"),
    ],
)
def test_a_bad_norm_is_named(change, said):
    weight, x = torch.randn(6, 5), torch.randn(3, 5)
    *own, norm = adapter(6, 5, 2, weight, torch.float32)
    y, h = ops.lowrank_linear(x, weight, None, *own)
    with pytest.raises(RuntimeError, match=f"mapsurgery: {said}"):
        ops.lowrank_linear_backward(y, x, h, weight, *own, change(norm), *ALL_NEEDED)


@native
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_tensors_on_two_devices_are_refused():
    args = good_arguments("cuda")
    args["A"] = args["A"].cpu()
    with pytest.raises(RuntimeError, match=r"B is on cuda:0, but A is on cpu"):
        ops.lowrank_linear(*args.values())


@native
def test_an_expanded_weight_cannot_be_merged_in_place():
    args = good_arguments("cpu")
    with pytest.raises(RuntimeError, match="weight .* is expanded along dimension 0"):
        ops.merge_(args["weight"][:1].expand(6, 5), *[args[name] for name in ("A", "B", "s_w", "s_d")])


# ---- loading


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONWARNINGS": "always", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@native
def test_the_native_code_can_be_switched_off(tmp_path):
    code = "import mapsurgery; info = mapsurgery.native_info(); print(info.cpu, info.cuda, info.error)"
    result = run_python(code, tmp_path, MAPSURGERY_NATIVE="0")
    assert result.stdout.split() == ["False", "False", "switched", "off", "by", "MAPSURGERY_NATIVE=0"], result.stderr
    assert "pure torch" not in result.stderr


@native
def test_the_cmake_package_lies_where_its_path_says_or_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    package = Path(mapsurgery.cmake_prefix_path()) / "mapsurgery"
    assert {"mapsurgeryConfig.cmake", "mapsurgeryConfigVersion.cmake"} <= {path.name for path in package.iterdir()}
    monkeypatch.setattr(mapsurgery._native, "_CMAKE_PREFIX", tmp_path)
    with pytest.raises(FileNotFoundError, match="no native library was built: .*'pip install"):
        mapsurgery.cmake_prefix_path()


def test_a_broken_library_is_said_once(tmp_path):
    """One that is missing: test_packaging."""
    package = Path(mapsurgery.__file__).parent
    copy = tmp_path / "mapsurgery"
    copy.mkdir()
    for path in package.iterdir():
        if path.suffix not in (".so", ".pyc") and path.name != "__pycache__":
            (copy / path.name).symlink_to(path)
    # Files that are links resolve to the original folder: _native.py must be a file of its own.
    (copy / "_native.py").unlink()
    (copy / "_native.py").write_bytes((package / "_native.py").read_bytes())
    (copy / "libmapsurgery.so").write_bytes(b"not a library")
    code = "import mapsurgery; mapsurgery.native_info(); import mapsurgery.ops; print(mapsurgery.native_info().cpu)"
    result = run_python(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == "False", result.stderr
    assert result.stderr.count("in pure torch:") == 1
    assert "invalid ELF header" in result.stderr or "too short" in result.stderr
