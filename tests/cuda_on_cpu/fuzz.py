"""Random calls of every operator against the float64 reference, on the CPU, the emulated GPU or a real one.

    python tests/cuda_on_cpu/fuzz.py --device cuda --seconds 60
    python tests/cuda_on_cpu/fuzz.py --seed 3 --case 17 --kinds linear     # one case again

Inputs are made on the CPU from the seed and then moved, so that a case is the same on every device. The exit code is 1
where any case was bad.

An element may be wrong by a few roundings of its *size*: what the same formula gives with every term made positive. So
cancellation is allowed for, and a term that is missing or taken twice is not. TF32 and sums of reduced precision are
switched off in torch.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mapsurgery
from mapsurgery.ops import operators

ops = torch.ops.mapsurgery
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GRADIENTS = ("dx", "dweight", "dbias", "dA", "dB", "first", "second")  # of s_w and s_d, or of alpha and beta
# A bad GPU kernel may leave a device that fails for ever after.
MOST_BAD_CASES = 20


def unit(*dtypes: torch.dtype) -> float:
    """What one element may be wrong by, in units of its size, where it is computed and stored in these dtypes.

    Up to eight roundings to a narrow dtype lie on the way of an element. Those to the wide ones happen in every step of
    a sum, and a convolution by transforms adds its own.
    """
    return max(torch.finfo(dtype).eps / 2 * (128 if torch.finfo(dtype).bits >= 32 else 8) for dtype in dtypes)


def exact(values):
    """Contiguous copies in float64 on the CPU; other arguments as they are."""

    def one(value):
        dense = torch.contiguous_format
        return (
            value.detach().to("cpu", torch.float64, copy=True, memory_format=dense) if torch.is_tensor(value) else value
        )

    return [one(value) for value in values]


def absolute(values):
    return [value.abs() if isinstance(value, Tensor) else value for value in exact(values)]


def absolute_norm(norm: Sequence[Tensor]) -> list[Tensor]:
    """What the backwards need to add up sizes: there the term of the last slope is subtracted."""
    sizes = absolute(norm)
    if sizes:
        sizes[0][2] *= -1
    return sizes


class Case:
    """One random call: draws its arguments, and compares its results."""

    def __init__(self, kind: str, seed: int, index: int, device: str):
        self.rng = random.Random(f"{kind} {seed} {index}")
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(60))
        self.device = device
        self.drawn: list[str] = []
        self.faults: list[str] = []
        self.worst = 0.0  # of errors, in units of what is allowed
        self.hash = hashlib.sha256()  # of all results

    # ---- arguments

    def happens(self, probability: float) -> bool:
        return self.rng.random() < probability

    def size(self, most: int = 300) -> int:
        edges = [1, 2, 3, 5, 7, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 257, most]
        return self.rng.choice([*(edge for edge in edges if edge <= most), self.rng.randint(1, most)])

    def rank(self) -> int:
        edges = [17, 31, 32, 33, 48, 64, 65, 96, 128, 200, 256, 257, 300]
        return self.rng.randint(1, 17) if self.happens(0.6) else self.rng.choice([*edges, self.rng.randint(1, 64)])

    def normal(self, *shape: int, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=self.generator, dtype=torch.float64) * factor
        return made.to(dtype).to(self.device)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype, factor: float = 1.0, last: bool = False) -> Tensor:
        """Normal numbers in a random layout, channels last among them where `last`; NaN lies between them."""
        made = self.relaid(self.normal(*shape, dtype=dtype, factor=factor), last)
        self.drawn.append(f"{name} {tuple(made.shape)} {made.stride()} {made.dtype}"[:200].replace("torch.", ""))
        return made

    def relaid(self, t: Tensor, last: bool) -> Tensor:
        if last and t.dim() in (4, 5) and self.happens(0.4):
            return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
        layout = self.rng.randrange(9) if t.dim() else 8
        if layout == 0:  # every second element of each dimension
            wide = t.new_full([2 * size + 1 for size in t.shape], math.nan)
            return wide[tuple(slice(1, 1 + 2 * size, 2) for size in t.shape)].copy_(t)
        if layout == 1:  # rows with gaps between them
            wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
            return wide[..., 2 : 2 + t.shape[-1]].copy_(t)
        if layout == 2:  # an address that no wide access can be aligned to
            return t.new_full((t.numel() + 1,), math.nan)[1:].view(t.shape).copy_(t)
        if layout in (3, 4):
            order = self.rng.sample(range(t.dim()), t.dim())
            return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])
        if layout == 5 and t.dim() >= 2:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        return t

    def gradient(self, like: Tensor, last: bool = False) -> Tensor:
        """Of the shape and dtype of `like`; now and then that of a sum, one number in memory."""
        if like.dim() and self.happens(0.1):
            return self.normal(dtype=like.dtype).expand(like.shape)
        return self.tensor("grad", *like.shape, dtype=like.dtype, last=last)

    def adapter(self, m: int, K: int, rank: int, dtype: torch.dtype) -> tuple:
        """A, B, alpha, beta, weight_norm, tau, relative."""
        A, B = self.tensor("A", rank, K, dtype=dtype), self.tensor("B", m, rank, dtype=dtype, factor=0.2)
        acc = operators.accumulate_dtype(dtype)
        relative, tau = self.happens(0.7), self.rng.choice([0.0, 0.05, 1.0])
        norm = abs(self.rng.gauss(5, 2)) + 0.1
        in_units = 1 if relative else norm

        def scalar(value: float, *shape: int) -> Tensor:
            of_dtype = self.rng.choice(DTYPES) if self.happens(0.2) else acc
            return torch.full(shape, value * in_units).to(of_dtype).to(self.device)

        alpha = scalar(0.1, 1)
        beta = scalar(self.rng.choice([0.3, -0.2, 0.0]), 1)
        if self.happens(0.2):
            beta = torch.stack([beta * math.nan, beta, beta * math.nan])[1]
        scalars = f"alpha {alpha.item():.3g} beta {beta.item():.3g} norm {norm:.3g} tau {tau} relative {relative}"
        self.drawn.append(scalars)
        return A, B, alpha, beta, torch.full((1,), norm, device=self.device), tau, relative

    # ---- results

    def check(self, names: Sequence[str], got: Sequence, want: Sequence, sizes: Sequence, allowed: Callable) -> None:
        """Every element; `allowed` is called with the dtype of a result."""
        assert len(names) == len(got) == len(want) == len(sizes)
        for name, g, w, size in zip(names, got, exact(want), exact(sizes), strict=True):
            if g.shape != w.shape:
                self.faults.append(f"{name} has shape {tuple(g.shape)}, not {tuple(w.shape)}")
                continue
            (result,) = exact([g])
            self.hash.update(result.numpy().tobytes())
            # Numbers of float16 below 6e-5 are rounded to a fixed step, those on the way to others as well: hence the
            # mean. Large ones overflow it, as they may.
            step = torch.finfo(g.dtype).smallest_normal * torch.finfo(g.dtype).eps
            size = size + size.mean() / 100
            error = (result - w).abs() / (size * allowed(g.dtype) + step)
            error = torch.where((size > 1e4) & (not result.isfinite().all()), 0, error.nan_to_num(math.inf))
            if error.numel() == 0:
                continue
            worst = error.max().item()
            self.worst = max(self.worst, worst)
            if not worst <= 1:
                at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
                many = f"{int((error > 1).sum())} of {error.numel()}"
                self.faults.append(f"{name}: {many} wrong; at {at} {result[at].item():.6g}, not {w[at].item():.6g}")

    def check_same(self, what: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if g.dtype != w.dtype or not torch.equal(g.nan_to_num(7.0), w.nan_to_num(7.0)):
                self.faults.append(f"{what}: result {i} has other bits")

    def scales(self, args: tuple) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """A, B, s_w and s_d of what `adapter` has drawn, and what goes with the backwards: the norm, or nothing."""
        got = ops.map_scales(*args)
        A, B = args[:2]
        want, (abs_A, abs_B) = operators.map_scales(*exact(args)), absolute(args[:2])
        gram_a, gram_b = abs_A @ abs_A.t(), abs_B.t() @ abs_B
        terms, square = (gram_a * gram_b).sum().item(), (want[3] * want[4]).sum().item()
        condition = terms / square if square > 0 else 1.0
        # Where the norm is rounding alone, anything may come of it.
        growth = math.inf if condition * unit(got[0].dtype) > 0.1 else 1 + 3 * condition
        of_norm = torch.tensor([1.0, growth, growth, growth, 1.0, 1.0], dtype=torch.float64)
        sizes = (want[0].abs(), want[1].abs() * growth, want[2].abs() * of_norm, gram_a, gram_b)
        self.check(("s_w", "s_d", "slopes", "gram_a", "gram_b"), got, want, sizes, unit)
        return (A, B, *got[:2]), list(got[2:]) if self.happens(0.7) else []


def scales(case: Case) -> None:
    """map_scales and its backward."""
    rank = 0 if case.happens(0.05) else case.rank()
    lengths = [0, 1, case.size(), case.size(3000), case.rng.randint(1, 9000)]
    m, K = (min(case.rng.choice(lengths), 700 if rank > 64 else 9000) for _ in range(2))
    args = case.adapter(m, K, rank, case.rng.choice(DTYPES))
    (A, B, s_w, s_d), _ = case.scales(args)
    norm = ops.map_scales(*args)[2:]
    ds_w, ds_d = (case.normal(1, dtype=s_w.dtype) for _ in range(2))
    got = ops.map_scales_backward(ds_w, ds_d, A, B, *norm)
    want = operators.map_scales_backward(*exact((ds_w, ds_d, A, B, *norm)))
    sizes = operators.map_scales_backward(*absolute((ds_w, ds_d, A, B)), *absolute_norm(norm))
    case.check(GRADIENTS[3:], got, want, sizes, lambda of: unit(s_w.dtype, of))


def linear(case: Case, rows: tuple[int, ...] | None = None, m: int | None = None) -> None:
    """lowrank_linear and its backward."""
    shapes = [(), (1,), (case.size(200),), (3, case.size(30)), (2, 1, 5), (0,), (2, 0)]
    rows = case.rng.choice(shapes) if rows is None else rows
    K = 0 if case.happens(0.08) else case.size(300 if m is None else 5)
    rank = 0 if case.happens(0.05) else case.rank() if m is None else 2
    m = (0 if case.happens(0.08) else case.size()) if m is None else m
    dtype = case.rng.choice(DTYPES)
    weight_dtype = dtype if case.happens(0.8) else case.rng.choice(DTYPES)
    wide = dtype == torch.float64 and case.happens(0.8)
    factor_dtype = torch.float64 if wide else case.rng.choice([*DTYPES, *[torch.float32] * 4])
    x = case.tensor("x", *rows, K, dtype=dtype)
    if len(rows) == 1 and case.happens(0.1):
        x = case.normal(K, dtype=dtype).expand(*rows, K)
    weight = case.tensor("weight", m, K, dtype=weight_dtype)
    bias_dtype = case.rng.choice([dtype, dtype, torch.float32])
    bias = case.tensor("bias", m, dtype=bias_dtype) if case.happens(0.6) else None
    args = case.adapter(m, K, rank, factor_dtype)
    acc = operators.accumulate_dtype(factor_dtype)

    own, norm = case.scales(args)
    call = (x, weight, bias, *own)
    y, h = ops.lowrank_linear(*call)
    assert y.dtype == dtype and y.is_contiguous()
    want, sizes = operators.lowrank_linear(*exact(call)), operators.lowrank_linear(*absolute(call))
    case.check(("y", "h"), (y, h), want, sizes, lambda _: unit(dtype, acc))

    needs = tuple(case.happens(0.8) for _ in range(5))
    case.drawn.append(f"needs {needs}, through the norm {bool(norm)}")
    tensors = (case.gradient(y), x, h, weight, *own)
    got = ops.lowrank_linear_backward(*tensors, norm, *needs)
    want = operators.lowrank_linear_backward(*exact(tensors), exact(norm), *needs)
    sizes = operators.lowrank_linear_backward(*absolute(tensors), absolute_norm(norm), *needs)
    case.check(GRADIENTS, got, want, sizes, lambda of: unit(dtype, acc, of))


def conv(case: Case) -> None:
    """lowrank_conv and its backward."""
    rng = case.rng
    spatial, groups = rng.choice([1, 2, 2, 2, 3]), rng.choice([1, 1, 1, 2, 3])
    into, outof = rng.choice([1, 2, 5, 8]), groups * rng.choice([1, 2, 5, 8, 20])
    kernel = [rng.choice([1, 1, 2, 3])] * spatial
    stride, padding, dilation = ([rng.choice(c) for _ in range(spatial)] for c in ([1, 1, 2, 3], [0, 0, 1], [1, 1, 2]))
    conv = (stride, padding, dilation, groups, case.happens(0.4))
    case.drawn.append(f"stride, padding, dilation, groups, weight_space {conv}")
    dtype = rng.choice(DTYPES)
    side = [rng.choice([5, 6, 9, 12]) for _ in range(spatial)]
    x = case.tensor("x", rng.choice([1, 2, 5, 0]), groups * into, *side, dtype=dtype, last=True)
    if kernel[0] == 1 and max(stride) > 1 and case.device == "cpu":
        x = x.contiguous()  # with channels last and few channels torch 2.14 itself writes beyond the weight's gradient
    weight = case.tensor("weight", outof, into, *kernel, dtype=dtype, last=True)
    bias = case.tensor("bias", outof, dtype=dtype) if case.happens(0.6) else None
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    args = case.adapter(outof, into * math.prod(kernel), rng.choice([1, 2, 3, 8, 17, 33]), factor_dtype)

    own, norm = case.scales(args)
    call = (x, weight, bias, *own, *conv)
    y, h = ops.lowrank_conv(*call)
    assert y.dtype == dtype
    want, sizes = operators.lowrank_conv(*exact(call)), operators.lowrank_conv(*absolute(call))
    case.check(("y", "h"), (y, h), want, sizes, lambda _: unit(dtype, factor_dtype))

    needs = tuple(case.happens(0.8) for _ in range(5))
    case.drawn.append(f"needs {needs}, through the norm {bool(norm)}")
    tensors = (case.gradient(y, last=True), x, h, weight, *own)
    got = ops.lowrank_conv_backward(*tensors, norm, *conv, *needs)
    want = operators.lowrank_conv_backward(*exact(tensors), exact(norm), *conv, *needs)
    sizes = operators.lowrank_conv_backward(*absolute(tensors), absolute_norm(norm), *conv, *needs)
    case.check(GRADIENTS, got, want, sizes, lambda of: unit(dtype, factor_dtype, of))


def weight(case: Case, m: int | None = None, K: int | None = None) -> None:
    """effective_weight, its backward, merge_ and unmerge_, which write the weight and nothing else."""
    rank = case.rank() if m is None else 2
    m = (0 if case.happens(0.08) else case.size()) if m is None else m
    K = (0 if case.happens(0.08) else case.size()) if K is None else K
    dtype, out_dtype = case.rng.choice(DTYPES), case.rng.choice([None, *DTYPES])
    factor_dtype = case.rng.choice([*DTYPES, *[torch.float32] * 3])
    acc = operators.accumulate_dtype(torch.promote_types(dtype, factor_dtype))
    scale_dtype = operators.accumulate_dtype(factor_dtype)
    weight = case.tensor("weight", m, K, dtype=dtype)
    args = case.adapter(m, K, rank, factor_dtype)

    own, _ = case.scales(args)
    combined = ops.effective_weight(weight, *own, out_dtype)
    assert combined.dtype == (out_dtype or dtype)
    A, B, s_w, s_d = exact(own)
    update, update_size = s_d * (B @ A), s_d.abs() * (B.abs() @ A.abs())
    (W,) = exact([weight])
    want, size = s_w * W + update, s_w.abs() * W.abs() + update_size
    case.check(["w"], [combined], [want], [size], lambda of: unit(acc, of))

    grad = case.tensor("grad", m, K, dtype=case.rng.choice([combined.dtype, torch.float32]))
    backward_acc = operators.accumulate_dtype(torch.promote_types(grad.dtype, factor_dtype))
    call = (grad, weight, *own, case.happens(0.5))
    got = ops.effective_weight_backward(*call)
    want_backward = operators.effective_weight_backward(*exact(call))
    sizes = operators.effective_weight_backward(*absolute(call))
    case.check(
        GRADIENTS[1:2] + GRADIENTS[3:], got, want_backward, sizes, lambda of: unit(backward_acc, scale_dtype, of)
    )

    memory = torch.as_strided(weight, (weight.untyped_storage().nbytes() // weight.element_size(),), (1,), 0)
    before = memory.clone()
    ops.merge_(weight, *own)
    case.check(["merged"], [weight], [want], [size], lambda of: unit(acc, of))
    (merged,) = exact([weight])
    ops.unmerge_(weight, *own)
    size = (merged.abs() + update_size) / s_w.abs()
    case.check(["unmerged"], [weight], [(merged - update) / s_w], [size], lambda of: unit(acc, of))
    weight.copy_(W)
    case.check_same("memory around the merged weight", [memory], [before])


def large(case: Case) -> None:
    """More elements than the largest grids have threads."""
    if case.happens(0.5):
        linear(case, rows=(case.rng.randint(9000, 9500),), m=case.rng.randint(1000, 1300))
    else:
        m, K = case.rng.randint(2_100_000, 2_200_000), case.rng.randint(1, 3)
        weight(case, *(m, K) if case.happens(0.5) else (K, m))


KINDS: dict[str, Callable[[Case], None]] = {
    "scales": scales,
    "linear": linear,
    "conv": conv,
    "weight": weight,
    "large": large,
}


def run(kind: str, seed: int, index: int, device: str) -> Case:
    """One case; whatever it throws is a fault, too."""
    case = Case(kind, seed, index, device)
    try:
        KINDS[kind](case)
    except Exception as error:  # noqa: BLE001
        case.faults.append(f"{type(error).__name__}: {error}")
    if case.faults:
        again = f"--device {device} --seed {seed} --case {index} --kinds {kind}"
        print(f"BAD {again}\n  " + "\n  ".join([*case.faults, *case.drawn]), flush=True)
    return case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="no case starts later (default: %(default)s)")
    parser.add_argument("--cases", type=int, help="run so many, however long it takes, and print a hash of the results")
    parser.add_argument("--case", type=int, help="run the case of this number alone")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="default: all; large ones on a GPU alone")
    parser.add_argument("--without-cudnn", action="store_true", help="torch's own convolutions")
    options = parser.parse_args()
    kinds = options.kinds or [kind for kind in KINDS if kind != "large" or options.device == "cuda"]
    info = mapsurgery.native_info()
    if not getattr(info, options.device):
        print(f"no native library serves {options.device}: {info.error}", file=sys.stderr)
        return 2
    # On AMX, oneDNN 3.12 multiplies what lies beyond a row of bfloat16 (NaN here), and gets 3-d convolutions wrong.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.enabled = not options.without_cudnn
    torch.backends.cudnn.deterministic = True  # two calls are compared bit for bit

    first = options.case or 0
    count = 1 if options.case is not None else options.cases
    end = math.inf if count else time.monotonic() + options.seconds
    kinds_run, bad, worst, results = Counter[str](), 0, 0.0, hashlib.sha256()
    for index in range(first, first + count) if count else itertools.count():
        if bad == MOST_BAD_CASES or time.monotonic() > end:
            break
        kind = random.Random(f"{options.seed} {index}").choice(kinds)
        case = run(kind, options.seed, index, options.device)
        kinds_run[kind] += 1
        bad += bool(case.faults)
        worst = max(worst, case.worst)
        results.update(case.hash.digest())
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds_run.items()))
    print(f"{kinds_run.total()} cases ({counts}), {bad} bad, largest error {worst:.2f} of what is allowed")
    if options.cases:
        print(f"results {results.hexdigest()}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
