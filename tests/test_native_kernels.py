"""Every operator, as the dispatcher runs it, against the reference evaluated in float64 on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mapsurgery.ops.schemas import SCHEMAS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import mapsurgery
from mapsurgery.ops import reference

ops = torch.ops.mapsurgery
native = pytest.mark.skipif(not mapsurgery.native_info().cpu, reason="no native library is loaded")

# Relative Frobenius error that rounding to the dtype explains (unit roundoff: 1e-16, 6e-8, 4e-3, 5e-4).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
ALL_NEEDED = (True, True, True, True, True)


def exact(value):
    """The same value in float64 on the CPU."""
    return value.detach().cpu().double() if isinstance(value, Tensor) else value


def assert_close(got: Tensor, want: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Relative Frobenius error; `scale` is the size of what `want` is a difference of."""
    assert got.shape == want.shape
    error = (exact(got) - want).norm().item()
    assert error <= tolerance * max(want.norm().item(), scale), f"error {error:.3g}, norm {want.norm().item():.3g}"


def assert_all_close(got, want, tolerance: float) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Adapters stay float32 under a narrow base."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def adapter(m, K, rank, weight, dtype, tau=0.0, relative=True, beta=0.3):
    """A, B, alpha, beta, weight_norm, tau, relative."""
    device = weight.device
    A, B = torch.randn(rank, K, dtype=dtype, device=device), torch.randn(m, rank, dtype=dtype, device=device)
    acc = reference.accumulate_dtype(dtype)
    norm = weight.double().norm().to(acc).reshape(1)
    unit = torch.ones_like(norm) if relative else norm
    return A, B / 10, 1.1 * unit, beta * unit, norm, tau, relative


def check_linear(x, weight, bias, args, needs=ALL_NEEDED) -> None:
    """Forward and backward of map_linear against the reference."""
    tolerance = TOLERANCE[x.dtype]
    out = ops.map_linear(x, weight, bias, *args)
    want = reference.map_linear(*map(exact, (x, weight, bias, *args)))
    assert out[0].dtype == x.dtype and out[0].is_contiguous()
    assert_all_close(out, want, tolerance)

    grad = torch.randn_like(out[0])
    A, B = args[:2]
    saved = (x, out[1], weight, A, B, *out[2:])
    exact_saved = [exact(value) for value in (grad, *saved)]
    got = ops.map_linear_backward(grad, *saved, *needs)
    want = reference.map_linear_backward(*exact_saved, *needs)
    rows = exact(grad).reshape(-1, grad.shape[-1])
    GB, GW = rows @ exact(B), rows @ exact(weight)
    scales = exact(out[2]).abs()
    down = exact(x).reshape(-1, x.shape[-1])
    # What the norm's own gradient is subtracted from, and what inner products cancel in.
    size_c = GB.norm() * exact(out[1]).norm()
    size = {
        "dA": scales[reference.S_D] * GB.norm() * down.norm() + scales[reference.RADIAL] * size_c,
        "dB": scales[reference.S_D] * rows.norm() * exact(out[1]).norm() + scales[reference.RADIAL] * size_c,
        "dalpha": scales[reference.DS_W] * down.norm() * GW.norm(),
        "dbeta": scales[reference.DS_D] * size_c,
    }
    names = ("dx", "dweight", "dbias", "dA", "dB", "dalpha", "dbeta")
    dtypes = (x.dtype, weight.dtype, x.dtype, A.dtype, B.dtype, out[2].dtype, out[2].dtype)
    for name, dtype, g, w in zip(names, dtypes, got, want, strict=True):
        assert g.dtype == dtype or g.numel() == 0, name
        assert_close(g, w, 2 * tolerance, float(size.get(name, 0.0)))


# ---- schemas


def test_schemas_in_use_are_those_of_schemas_py():
    for name, schema in SCHEMAS.items():
        got = torch._C.parse_schema(str(getattr(ops, name).default._schema))
        assert str(got) == str(torch._C.parse_schema(f"mapsurgery::{name}{schema}"))


@native
def test_every_operator_has_a_native_cpu_kernel():
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mapsurgery::{name}", "CPU")


@pytest.mark.skipif(not mapsurgery.native_info().cuda, reason="no native CUDA library is loaded")
def test_every_operator_has_a_native_cuda_kernel():
    """No GPU is needed to see it. Of squared_norm, torch's own reduction is one read of the weight."""
    for name in SCHEMAS.keys() - {"squared_norm"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mapsurgery::{name}", "CUDA"), name


# ---- norm and scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 33, 64, 256])
def test_lowrank_norm(device, dtype, rank):
    A, B = torch.randn(rank, 300, device=device).to(dtype), torch.randn(190, rank, device=device).to(dtype)
    got = ops.lowrank_norm(A, B)
    assert [t.dtype for t in got] == [reference.accumulate_dtype(dtype)] * 3
    assert_all_close(got, reference.lowrank_norm(exact(A), exact(B)), 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("m, K, rank", [(4096, 11008, 16), (70000, 5, 4), (1, 1, 1), (7, 1, 300)])
def test_lowrank_norm_of_long_and_short_factors(device, m, K, rank):
    A, B = torch.randn(rank, K, device=device), torch.randn(m, rank, device=device)
    assert_all_close(ops.lowrank_norm(A, B), reference.lowrank_norm(exact(A), exact(B)), 2e-5)


@pytest.mark.parametrize("m, K, rank", [(0, 5, 2), (5, 0, 2), (5, 4, 0), (0, 0, 0)])
def test_lowrank_norm_of_empty_factors_is_zero(device, m, K, rank):
    norm, gram_a, gram_b = ops.lowrank_norm(torch.randn(rank, K, device=device), torch.randn(m, rank, device=device))
    assert norm.item() == 0 and gram_a.shape == gram_b.shape == (rank, rank)
    scales = ops.map_scales(
        torch.randn(rank, K, device=device),
        torch.randn(m, rank, device=device),
        *torch.ones(3, 1, device=device),
        0,
        True,
    )[0]
    assert scales.isfinite().all()


def test_lowrank_norm_takes_any_strides(device):
    A = torch.randn(300, 24, device=device)[::2, ::3].t()
    B = torch.randn(8, 90, device=device).t()
    assert_all_close(ops.lowrank_norm(A, B), reference.lowrank_norm(exact(A), exact(B)), 2e-6)


def test_large_half_factors_do_not_overflow(device):
    A = torch.full((4, 5000), 200.0, device=device, dtype=torch.float16)
    B = torch.full((5000, 4), 200.0, device=device, dtype=torch.float16)
    assert_close(ops.lowrank_norm(A, B)[0], reference.lowrank_norm(exact(A), exact(B))[0], 2e-6)


@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("case", ["plain", "B = 0", "A = B = 0", "w = 0", "B = 0, w = 0"])
def test_scales(device, tau, relative, case):
    A, B = torch.randn(4, 30, device=device), torch.randn(20, 4, device=device)
    B = B * 0 if "B = 0" in case else B
    A = A * 0 if "A = " in case else A
    norm = torch.full((1,), 0.0 if "w = 0" in case else 7.0, device=device)
    scalars = (torch.full((1,), 1.5, device=device), torch.full((1,), -0.2, device=device), norm, tau, relative)
    assert_all_close(ops.map_scales(A, B, *scalars), reference.map_scales(*map(exact, (A, B, *scalars))), 2e-6)


MANY = [(40, 150, 3), (300, 20, 40), (7, 9, 1), (33, 130, 65), (0, 5, 2), (20, 30, 0), (64, 4096, 8), *[(5, 6, 2)] * 12]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scales_of_many_layers_are_those_of_each_bit_for_bit(device, dtype):
    layers = []
    for i, (m, K, rank) in enumerate(MANY):
        A, B = torch.randn(rank, K, device=device).to(dtype), torch.randn(m, rank, device=device).to(dtype)
        A = A.t().contiguous().t() if i % 2 else A
        layers.append((A, B, *torch.rand(3, 1, device=device), 0.1 * (i % 3), i % 4 > 0))
    results = ops.map_scales_many(*map(list, zip(*layers, strict=True)))
    for layer, *got in zip(layers, *results, strict=True):
        for g, w in zip(got, ops.map_scales(*layer), strict=True):
            assert g.dtype == w.dtype and torch.equal(g, w)
        assert_all_close(got, reference.map_scales(*map(exact, layer)), 1e-11 if dtype == torch.float64 else 5e-6)


@native
def test_the_scales_of_many_layers_refuse_lists_that_do_not_fit(device):
    A, B, one = torch.randn(2, 5, device=device), torch.randn(4, 2, device=device), torch.ones(1, device=device)
    with pytest.raises(RuntimeError, match="beta has 1 entries, but A has 2"):
        ops.map_scales_many([A, A], [B, B], [one, one], [one], [one, one], [0.0, 0.0], [True, True])
    with pytest.raises(RuntimeError, match="the dtype of the first A"):
        ops.map_scales_many([A, A.double()], [B, B.double()], *[[one, one]] * 3, [0.0, 0.0], [True, True])


# ---- with given scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17])
def test_given_scales_leave_the_bits_of_map_linear(device, dtype, rows):
    weight = torch.randn(80, 96, device=device).to(dtype)
    x, bias = torch.randn(rows, 96, device=device).to(dtype), torch.randn(80, device=device).to(dtype)
    args = adapter(80, 96, 8, weight, factor_dtype(dtype), tau=0.1)
    y, h, *given = ops.map_linear(x, weight, bias, *args)
    got = ops.map_linear_given(x, weight, bias, *args, *given)
    assert torch.equal(got[0], y) and torch.equal(got[1], h)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_space", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_given_scales_leave_the_bits_of_map_conv(device, dtype, weight_space, kernel):
    weight = torch.randn(8, 6, kernel, kernel, device=device).to(dtype)
    x, bias = torch.randn(2, 6, 9, 8, device=device).to(dtype), torch.randn(8, device=device).to(dtype)
    args = adapter(8, 6 * kernel**2, 3, weight, factor_dtype(dtype), tau=0.1)
    conv = ([1, 1], [0, 0], [1, 1], 1, weight_space)
    y, h, *given = ops.map_conv(x, weight, bias, *args, *conv)
    got = ops.map_conv_given(x, weight, bias, *args, *conv, *given)
    assert torch.equal(got[0], y) and torch.equal(got[1], h)


# ---- map_linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 64, 256])
@pytest.mark.parametrize("tau, relative", [(0.0, True), (0.1, True), (0.0, False)])
def test_map_linear(device, dtype, rank, tau, relative):
    weight = torch.randn(80, 96, device=device).to(dtype)
    x, bias = torch.randn(3, 17, 96, device=device).to(dtype), torch.randn(80, device=device).to(dtype)
    check_linear(x, weight, bias, adapter(80, 96, rank, weight, factor_dtype(dtype), tau, relative))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (0, 96), (2, 0, 96), (2, 3, 4, 96)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_map_linear_takes_any_leading_dimensions(device, shape, with_bias):
    weight = torch.randn(80, 96, device=device)
    bias = torch.randn(80, device=device) if with_bias else None
    check_linear(torch.randn(shape, device=device), weight, bias, adapter(80, 96, 4, weight, torch.float32))


@pytest.mark.parametrize("m, K, rank", [(1, 1, 1), (1, 9, 3), (9, 1, 3)])
def test_map_linear_with_single_dimensions(device, m, K, rank):
    weight = torch.randn(m, K, device=device)
    bias = torch.randn(m, device=device)
    check_linear(torch.randn(6, K, device=device), weight, bias, adapter(m, K, rank, weight, torch.float32))


@native
@pytest.mark.parametrize("m, K, rank", [(5, 0, 2), (0, 5, 2), (5, 4, 0)])
def test_map_linear_with_empty_dimensions(device, m, K, rank):
    weight = torch.randn(m, K, device=device)
    x, args = torch.randn(6, K, device=device), adapter(m, K, rank, weight, torch.float32)
    bias = torch.randn(m, device=device)
    out = ops.map_linear(x, weight, bias, *args)
    assert_all_close(out, reference.map_linear(*map(exact, (x, weight, bias, *args))), 5e-6)
    saved = (x, out[1], weight, *args[:2], *out[2:])
    grads = ops.map_linear_backward(out[0], *saved, *ALL_NEEDED)
    shapes = [x.shape, weight.shape, bias.shape, args[0].shape, args[1].shape, (1,), (1,)]
    assert [grad.shape for grad in grads] == shapes
    assert all(grad.isfinite().all() for grad in grads)


def strided(t: Tensor, layout: str) -> Tensor:
    """t with the same values in memory of another layout."""
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = t.new_full((*t.shape[:-2], 2 * t.shape[-2], 3 * t.shape[-1]), float("nan"))
    view = wide[..., ::2, ::3]
    return view.copy_(t)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_map_linear_takes_any_strides(device, layout, dtype):
    weight = strided(torch.randn(80, 96, device=device).to(dtype), layout)
    x = strided(torch.randn(3, 17, 96, device=device).to(dtype), layout)
    A, B, *rest = adapter(80, 96, 8, weight, torch.float32)
    bias = torch.randn(160, device=device).to(dtype)[::2]
    check_linear(x, weight, bias, (strided(A, layout), strided(B, layout), *rest))
    check_linear(torch.randn(96, device=device).to(dtype).expand(5, 96), weight, bias, (A, B, *rest))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("with_bias", [True, False])
def test_strides_of_single_dimensions_say_nothing(device, rows, with_bias):
    """Legal for torch, which does not look at them; a BLAS would refuse them as leading dimensions."""

    def column(n: int) -> Tensor:
        return torch.randn(n, device=device).as_strided((n, 1), (1, 0))

    weight, bias = column(6), torch.randn(6, device=device) if with_bias else None
    _, _, *rest = adapter(6, 1, 1, weight, torch.float32)
    A = torch.randn(1, device=device).as_strided((1, 1), (0, 5))
    check_linear(column(rows), weight, bias, (A, column(6), *rest))


# Sizes around those of the CPU's blocks: of rows (2, 4, 32, 128), of columns (a vector, a tile), of the rank (2, 16).
THIN = [(8, 33, 65, 1), (45, 70, 9, 3), (131, 1030, 519, 16), (700, 40, 1, 5), (4500, 17, 24, 8), (40, 65, 33, 17)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("T, K, m, rank", THIN)
@pytest.mark.parametrize("sliced", [False, True])
def test_products_with_thin_matrices(device, dtype, T, K, m, rank, sliced):
    weight = torch.randn(m, K, dtype=dtype, device=device)
    x = torch.randn(T, K + 3, dtype=dtype, device=device)[:, 3 if sliced else 0 :][:, :K]
    x = x if sliced else x.contiguous()
    check_linear(x, weight, None, adapter(m, K, rank, weight, dtype, tau=0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 5, 16, 17])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_products_with_thin_matrices_in_convolutions(device, dtype, rank, stride, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 40, 30, 31, dtype=dtype, device=device).contiguous(memory_format=layout)
    weight = torch.randn(37, 40, 1, 1, dtype=dtype, device=device)
    args = adapter(37, 40, rank, weight, dtype, tau=0.1)
    check_conv(x, weight, None, args, ([stride] * 2, [0] * 2, [1] * 2, 1, False))


@pytest.mark.parametrize("K, m", [(3, 34000), (34000, 3)])
def test_a_wide_layer_of_many_rows(device, K, m):
    """More blocks along the columns than a GPU runs at once: each goes through several tiles of rows."""
    weight, x = torch.randn(m, K, device=device), torch.randn(300, K, device=device)
    check_linear(x, weight, None, adapter(m, K, 2, weight, torch.float32, tau=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 16])
def test_rows_at_an_odd_address(device, dtype, rank):
    """Of a width that could be read in wide accesses, if it did not start between two of them."""
    weight = torch.randn(64, 128, device=device).to(dtype)
    x = torch.randn(40 * 128 + 1, device=device).to(dtype)[1:].view(40, 128)
    check_linear(x, weight, None, adapter(64, 128, rank, weight, torch.float32))


@pytest.mark.parametrize("rank", [3, 8, 16, 33])
def test_h_of_any_strides(device, rank):
    """As torch.compile may keep it."""
    weight, x = torch.randn(64, 128, device=device), torch.randn(40, 128, device=device)
    args = adapter(64, 128, rank, weight, torch.float32)
    y, h, *saved = ops.map_linear(x, weight, None, *args)
    want = ops.map_linear_backward(y, x, h, weight, *args[:2], *saved, *ALL_NEEDED)
    got = ops.map_linear_backward(y, x, strided(h, "sliced"), weight, *args[:2], *saved, *ALL_NEEDED)
    assert_all_close(got, [exact(grad) for grad in want], 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 8, 17])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_magnitude_that_is_nan_shows_in_every_output(device, dtype, rank, name):
    """However few the rows: torch's small products on a CPU forget a factor of NaN."""
    weight, place = torch.randn(12, 10, device=device).to(dtype), {"alpha": 2, "beta": 3}[name]
    args = list(adapter(12, 10, rank, weight, factor_dtype(dtype)))
    args[place] = args[place] * float("nan")
    kernel, conv = weight.reshape(12, 10, 1, 1), ([1, 1], [0, 0], [1, 1], 1, False)
    for rows in (1, 2, 5, 40):
        x = torch.randn(rows, 10, device=device).to(dtype)
        y, h, *saved = ops.map_linear(x, weight, None, *args)
        dx = ops.map_linear_backward(torch.ones_like(y), x, h, weight, *args[:2], *saved, *ALL_NEEDED)[0]
        assert y.isnan().all() and dx.isnan().all()
        assert ops.map_conv(x[:, :, None, None], kernel, None, *args, *conv)[0].isnan().all()


@pytest.mark.parametrize("T", [4, 40])
def test_rank_0_is_the_base_alone(device, T):
    weight, x = torch.randn(6, 5, device=device), torch.randn(T, 5, device=device)
    check_linear(x, weight, None, adapter(6, 5, 0, weight, torch.float32))


@native
def test_a_factor_of_0_drops_what_overflowed():
    """As BLAS does, whichever gradients are asked for."""
    weight, x = torch.full((20, 30), 100.0), torch.randn(40, 30)
    A, B, alpha, *rest = adapter(20, 30, 4, weight, torch.float32)
    _, h, *saved = ops.map_linear(x, weight, None, A, B, 0 * alpha, *rest)
    saved = (torch.full((40, 20), 1e37), x, h, weight, A, B / 1e10, *saved)
    for needs in (ALL_NEEDED, (True, False, False, False, False)):
        assert ops.map_linear_backward(*saved, *needs)[0].isfinite().all()


@native
def test_lazily_copied_inputs_are_read_by_several_threads():
    """torch refuses to make the copy within a parallel loop."""
    weight = torch.randn(8, 256)
    args = adapter(8, 256, 4, weight, torch.float32)
    x = torch._lazy_clone(torch.randn(4096, 256))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check_linear(x, weight, None, args)
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("T", [40, 700, 4500])
def test_the_number_of_threads_does_not_change_a_sum(T):
    """Of the low-rank half; products with the frozen weight are BLAS's."""
    weight, x, grad = torch.randn(300, 520), torch.randn(T, 520), torch.randn(T, 300)
    args = adapter(300, 520, 8, weight, torch.float32)

    def run(threads):
        torch.set_num_threads(threads)
        _, h, *saved = ops.map_linear(x, weight, None, *args)
        _, _, _, dA, dB, *_ = ops.map_linear_backward(grad, x, h, weight, *args[:2], *saved, *ALL_NEEDED)
        return h, dA, dB

    before = torch.get_num_threads()
    try:
        one, three = run(1), run(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_map_linear_casts_the_weight_to_the_input(device):
    weight = torch.randn(80, 96, device=device)
    x = torch.randn(5, 96, device=device, dtype=torch.bfloat16)
    check_linear(x, weight, torch.randn(80, device=device), adapter(80, 96, 8, weight, torch.float32))


@native
def test_a_large_scale_of_the_update_does_not_overflow_half(device):
    x, weight = 300 * torch.randn(4, 256, device=device), torch.randn(64, 256, device=device) / 50
    A, B, *rest = adapter(64, 256, 4, weight, torch.float32)
    args = (A, B / 1e3, *rest)  # one small step from B = 0 with tau = 0: s_d is in the hundreds
    out = ops.map_linear(x.half(), weight.half(), None, *args)[0]
    assert_close(out, reference.map_linear(*map(exact, (x, weight, None, *args)))[0], 4e-3)


@pytest.mark.parametrize("needed", range(5))
def test_map_linear_backward_gives_what_is_needed_and_no_more(device, needed):
    weight = torch.randn(80, 96, device=device)
    needs = tuple(i == needed for i in range(5))
    check_linear(torch.randn(7, 96, device=device), weight, None, adapter(80, 96, 4, weight, torch.float32), needs)


def test_map_linear_backward_of_an_expanded_gradient(device):
    weight = torch.randn(80, 96, device=device)
    args = adapter(80, 96, 4, weight, torch.float32)
    x = torch.randn(7, 96, device=device)
    out = ops.map_linear(x, weight, None, *args)
    grad = torch.ones((), device=device).expand(7, 80)
    saved = (x, out[1], weight, *args[:2], *out[2:])
    got = ops.map_linear_backward(grad, *saved, *ALL_NEEDED)
    assert_all_close(got, reference.map_linear_backward(*map(exact, (grad, *saved)), *ALL_NEEDED), 2e-5)


def test_the_start_is_the_base_bit_for_bit(device):
    weight, x = torch.randn(80, 96, device=device), torch.randn(7, 96, device=device)
    A, B, _, beta, norm, *_ = adapter(80, 96, 4, weight, torch.float32)
    args = (A, torch.zeros_like(B), torch.ones_like(beta), beta, norm, 0.1, True)
    bias = torch.randn(80, device=device)
    assert torch.equal(ops.map_linear(x, weight, None, *args)[0], x @ weight.t())
    assert torch.equal(ops.effective_weight(weight, *args, None)[0], weight)
    if device.type == "cpu":
        assert torch.equal(ops.map_linear(x, weight, bias, *args)[0], torch.nn.functional.linear(x, weight, bias))


# ---- map_conv

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


def check_conv(x, weight, bias, args, conv, needs=ALL_NEEDED) -> None:
    tolerance = 3 * TOLERANCE[x.dtype]
    out = ops.map_conv(x, weight, bias, *args, *conv)
    assert_all_close(out, reference.map_conv(*map(exact, (x, weight, bias, *args)), *conv), tolerance)
    grad = torch.randn_like(out[0])
    saved = (x, out[1], weight, *args[:2], *out[2:])
    got = ops.map_conv_backward(grad, *saved, *conv, *needs)
    want = reference.map_conv_backward(*map(exact, (grad, *saved)), *conv, *needs)
    scales = exact(out[2]).abs()
    inner = exact(x).norm() * grad.double().norm().item()  # inner products cancel: measured against their factors
    sizes = {
        5: scales[reference.DS_W] * inner * exact(weight).norm(),
        6: scales[reference.DS_D] * inner * scales[reference.NORM],
    }
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(g, w, tolerance, float(sizes.get(i, 0.0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_space", [True, False])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_map_conv(device, dtype, weight_space, shape, channels_last):
    spatial, channels_in, channels_out, kernel, *conv, groups = shape
    if channels_last and spatial == 1:
        pytest.skip("no channels-last format for one dimension")
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spatial, torch.contiguous_format)
    layout = layout if channels_last else torch.contiguous_format
    x = torch.randn(2, channels_in, *[9, 8, 5][:spatial], device=device).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(channels_out, channels_in // groups, *[kernel] * spatial, device=device).to(dtype)
    weight = weight.contiguous(memory_format=layout)
    args = adapter(channels_out, weight[0].numel(), 3, weight, factor_dtype(dtype), tau=0.1)
    bias = torch.randn(channels_out, device=device).to(dtype)
    check_conv(x, weight, bias, args, (*[[value] * spatial for value in conv], groups, weight_space))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("rank", [3, 33])
def test_a_convolution_with_beta_0_is_the_scaled_base(device, dtype, kernel, rank):
    """torch's baddbmm forgets its beta where alpha is 0 in half precision on a CPU."""
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((2, 6, 9, 8), (40, 6, kernel, kernel)))
    args = adapter(40, 6 * kernel**2, rank, weight, factor_dtype(dtype), beta=0.0)
    check_conv(x, weight, None, args, ([1, 1], [kernel // 2] * 2, [1, 1], 1, False))


@pytest.mark.parametrize("weight_space", [True, False])
@pytest.mark.parametrize("kernel_stride", [(3, 1), (1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("needed", range(5))
def test_map_conv_backward_gives_what_is_needed_and_no_more(device, weight_space, kernel_stride, needed):
    kernel, stride = kernel_stride
    weight = torch.randn(8, 6, kernel, kernel, device=device)
    args = adapter(8, 6 * kernel**2, 2, weight, torch.float32)
    needs = tuple(i == needed for i in range(5))
    conv = ([stride] * 2, [kernel // 2] * 2, [1, 1], 1, weight_space)
    check_conv(torch.randn(2, 6, 7, 7, device=device), weight, None, args, conv, needs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "strided"])
@pytest.mark.parametrize("x_channels_last", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_any_layout_through_a_pointwise_convolution(device, layout, x_channels_last, stride):
    x = torch.randn(3, 6, 7, 8, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if x_channels_last else x
    weight = torch.randn(8, 6, 1, 1, device=device)
    args = adapter(8, 6, 2, weight, torch.float32)
    conv = ([stride] * 2, [0, 0], [1, 1], 1, False)
    out = ops.map_conv(x, weight, None, *args, *conv)
    shape = out[0].shape
    grad = {
        "contiguous": torch.randn(shape, device=device),
        "channels_last": torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last),
        "expanded": torch.randn(1, device=device).expand(shape),
        "strided": torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., ::2],
    }[layout]
    saved = (x, out[1], weight, *args[:2], *out[2:])
    got = ops.map_conv_backward(grad, *saved, *conv, *ALL_NEEDED)
    want = reference.map_conv_backward(*map(exact, (grad, *saved)), *conv, *ALL_NEEDED)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, TOLERANCE[torch.float32], float(exact(x).norm() * exact(grad).norm()))


@pytest.mark.parametrize("weight_space", [True, False])
@pytest.mark.parametrize("kernel_stride", [(1, 1), (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("spatial", [1, 2, 3])
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
    args = adapter(8, 6 * kernel**spatial, 3, weight, torch.float32, tau=0.1)
    conv = ([stride] * spatial, [kernel // 2] * spatial, [1] * spatial, 1, weight_space)

    def run(x, weight, args):
        y, h, *saved = ops.map_conv(x, weight, None, *args, *conv)
        return y, h, *ops.map_conv_backward(y, x, h, weight, *args[:2], *saved, *conv, *ALL_NEEDED)

    real = run(x, weight, args)
    with FakeTensorMode() as mode:
        fake = run(*tree_map_only(Tensor, mode.from_tensor, (x, weight, args)))

    def strides(results):
        names = ("y", "h", "dx", "dweight", "dbias", "dA", "dB", "dalpha", "dbeta")
        found = ([step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in results)
        return dict(zip(names, found, strict=True))

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
    A, B, *rest = adapter(256, 256, 2, torch.ones(2, 2), torch.float32)
    unchanged = (A, 0 * B, torch.ones(1), torch.zeros(1), torch.ones(1), 0.1, True)
    same = ops.effective_weight(weight, *unchanged, torch.float16)[0]
    assert torch.equal(same.nan_to_num(1.0), weight.nan_to_num(1.0)) and torch.equal(same.isnan(), weight.isnan())
    assert torch.equal(
        ops.effective_weight(weight, *unchanged, torch.float32)[0].nan_to_num(1.0), weight.float().nan_to_num(1.0)
    )


def test_float32_is_rounded_to_float16_as_torch_rounds():
    halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).double()
    between = (halves[1:] + halves[:-1]) / 2  # ties, and their neighbours on both sides
    near = torch.cat([between, between * (1 + 1e-6), between * (1 - 1e-6), torch.tensor([65519.0, 65520.0, 1e9, 1e-9])])
    weight = torch.cat([near, -near]).float()[:, None]
    m = weight.shape[0]
    unchanged = (torch.ones(1, 1), torch.zeros(m, 1), torch.ones(1), torch.zeros(1), torch.ones(1), 0.1, True)
    assert torch.equal(ops.effective_weight(weight, *unchanged, torch.float16)[0], weight.half())


# ---- effective weight and merging


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_effective_weight(device, dtype, out_dtype, layout):
    weight = torch.randn(70, 130, device=device).to(dtype)
    weight = weight if layout == "contiguous" else strided(weight, layout)
    args = adapter(70, 130, 19, weight, factor_dtype(dtype), tau=0.1)
    out = ops.effective_weight(weight, *args, out_dtype)
    tolerance = max(TOLERANCE[out[0].dtype], TOLERANCE[factor_dtype(dtype)]) / 2  # one rounding
    want = reference.effective_weight(*map(exact, (weight, *args)), None)
    assert out[0].dtype == (out_dtype or dtype)
    assert out[0].stride() == reference.effective_weight(weight, *args, out_dtype)[0].stride()
    assert_close(out[0], want[0], tolerance)

    grad = torch.randn_like(out[0])
    saved = (weight, *args[:2], *out[1:])
    got = ops.effective_weight_backward(grad, *saved, True)
    want = reference.effective_weight_backward(*map(exact, (grad, *saved)), True)
    scales = exact(out[1]).abs()
    sizes = {
        3: scales[reference.DS_W] * exact(grad).norm() * exact(weight).norm(),
        4: scales[reference.DS_D] * exact(grad).norm() * scales[reference.NORM],
    }
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(g, w, 4 * TOLERANCE[weight.dtype if i == 0 else args[0].dtype], float(sizes.get(i, 0.0)))


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
    args = adapter(m, K, rank, original, factor_dtype(dtype), tau=0.1)
    tolerance = TOLERANCE[dtype] / 2

    assert ops.merge_(weight, *args) is None
    assert_close(weight, reference.effective_weight(*map(exact, (original, *args)), None)[0], tolerance)
    ops.unmerge_(weight, *args)
    assert_close(weight, exact(original), 3 * tolerance)
    weight.fill_(sentinel)
    assert (store == store[0, 0]).all()


@pytest.mark.parametrize("m, K, rank", [(0, 5, 2), (5, 0, 2), (5, 4, 0), (1, 1, 1), (1, 1000, 3), (1000, 1, 3)])
def test_merge_of_empty_and_single_dimensions(device, m, K, rank):
    weight = torch.randn(m, K, device=device)
    args = adapter(m, K, rank, weight, torch.float32)
    want = reference.effective_weight(*map(exact, (weight, *args)), None)[0]
    ops.merge_(weight, *args)
    assert_close(weight, want, 5e-6)


@native
def test_merge_needs_little_memory():
    weight = torch.randn(2048, 2048).to(torch.bfloat16)
    args = adapter(2048, 2048, 8, weight, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.merge_(weight, *args)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < weight.nbytes / 10


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_merge_needs_little_gpu_memory():
    weight = torch.randn(2048, 2048, device="cuda").to(torch.bfloat16)
    args = adapter(2048, 2048, 8, weight, torch.float32)
    ops.merge_(weight, *args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.merge_(weight, *args)
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 10


# ---- determinism


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 64])
def test_two_runs_give_the_same_bits(device, dtype, rank):
    weight = torch.randn(256, 512, device=device).to(dtype)
    x, args = torch.randn(600, 512, device=device).to(dtype), adapter(256, 512, rank, weight, torch.float32)

    def run():
        out = ops.map_linear(x, weight, None, *args)
        saved = (x, out[1], weight, *args[:2], *out[2:])
        return [*out, *ops.map_linear_backward(out[0], *saved, *ALL_NEEDED), *ops.lowrank_norm(*args[:2])]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


# ---- bad arguments


def good_arguments(device):
    weight = torch.randn(6, 5, device=device)
    A, B, alpha, beta, norm, *_ = adapter(6, 5, 2, weight, torch.float32)
    x, bias = torch.randn(3, 5, device=device), torch.randn(6, device=device)
    return {"x": x, "weight": weight, "bias": bias, "A": A, "B": B, "alpha": alpha, "beta": beta, "weight_norm": norm}


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
        ("alpha", lambda t: t.expand(2)),
        ("beta", lambda t: t.long()),
        ("weight_norm", lambda t: t[:0]),
    ],
)
def test_a_bad_argument_is_named(device, name, change):
    if device.type == "cuda" and not mapsurgery.native_info().cuda:
        pytest.skip("no native CUDA library is loaded")
    args = good_arguments(device)
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=rf"mapsurgery: .*\b{name}\b"):
        ops.map_linear(*args.values(), 0.0, True)


@native
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_tensors_on_two_devices_are_refused():
    args = good_arguments("cuda")
    args["A"] = args["A"].cpu()
    with pytest.raises(RuntimeError, match=r"B is on cuda:0, but A is on cpu"):
        ops.map_linear(*args.values(), 0.0, True)


@native
def test_an_expanded_weight_cannot_be_merged_in_place():
    args = good_arguments("cpu")
    rest = [args[name] for name in ("A", "B", "alpha", "beta", "weight_norm")]
    with pytest.raises(RuntimeError, match="weight .* is expanded along dimension 0"):
        ops.merge_(args["weight"][:1].expand(6, 5), *rest, 0.0, True)


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


@pytest.mark.parametrize("broken", [False, True])
def test_a_missing_or_broken_library_is_said_once(tmp_path, broken):
    package = Path(mapsurgery.__file__).parent
    copy = tmp_path / "mapsurgery"
    copy.mkdir()
    for path in package.iterdir():
        if path.suffix not in (".so", ".pyc") and path.name != "__pycache__":
            (copy / path.name).symlink_to(path)
    # Files that are links resolve to the original folder: _native.py must be a file of its own.
    (copy / "_native.py").unlink()
    (copy / "_native.py").write_bytes((package / "_native.py").read_bytes())
    if broken:
        (copy / "libmapsurgery.so").write_bytes(b"not a library")
    code = "import mapsurgery; mapsurgery.native_info(); import mapsurgery.ops; print(mapsurgery.native_info().cpu)"
    result = run_python(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == "False", result.stderr
    assert result.stderr.count("in pure torch:") == 1
    assert ("invalid ELF header" in result.stderr or "too short" in result.stderr) == broken
