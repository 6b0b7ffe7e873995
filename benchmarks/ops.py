"""Each operator of torch.ops.mapsurgery beside its definition in plain torch, that compiled, and the floor.

    python benchmarks/ops.py                                  # small shapes on a CPU, large ones on a GPU
    python benchmarks/ops.py --operators lowrank_linear merge_ --dtype bf16

The floor of an operator is the larger of two times: the bytes that it must read and write over the bandwidth of a copy,
and its arithmetic over the rate of a large matrix product, both measured on this device in this run. Every result is
compared with the definition in float64 before anything is timed. benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import (
    Row,
    Stamps,
    allow_many_compilations,
    free_memory,
    iqr,
    make_parser,
    median,
    print_paths,
    start,
    table,
    write_results,
)
from torch import Tensor
from torch.nn import functional as F

import mapsurgery.ops
from mapsurgery.ops import operators

OPS = torch.ops.mapsurgery
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # ||result - reference|| / ||reference||, TF32 included
SETTINGS = (0.05, True)  # tau and relative, as the default start has them
NEEDS = (True, False, False, True)  # need_x, need_weight, need_bias, need_factors; need_s_w, with the norm alone

Args = tuple[Any, ...]
Function = Callable[..., Any]

CALLS: dict[str, Callable[[str], Function]] = {
    "op": lambda name: getattr(OPS, name).default,
    "reference": lambda name: getattr(operators, name),
}
"""By what an implementation is called: operator's name -> function."""

# --- cost -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one call must at least do: bytes to read and write once each, multiply-adds counted as two operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Ceilings:
    """Measured on this device: bytes per second of a large copy, operations per second of a large product by dtype."""

    bandwidth: float
    rates: dict[torch.dtype, float]

    def milliseconds(self, costs: Sequence[Cost], dtype: torch.dtype) -> float:
        """The floor of calls that follow one another."""
        return 1e3 * sum(max(cost.bytes / self.bandwidth, cost.flops / self.rates[dtype]) for cost in costs)

    def limit(self, costs: Sequence[Cost], dtype: torch.dtype) -> str:
        """Which of the two the floor consists of, for the most part."""
        moved = sum(cost.bytes for cost in costs) / self.bandwidth
        return "bytes" if moved > sum(cost.flops for cost in costs) / self.rates[dtype] else "FLOPs"


def _best_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Quickest of a few timed calls after two that are not timed: a ceiling is the best that was seen."""
    for _ in range(2):
        call()
    stamps = Stamps(device)
    stamps.mark()
    for _ in range(repeats):
        call()
        stamps.mark()
    return min(stamps.milliseconds()) / 1e3


def measure_ceilings(device: torch.device, dtypes: Iterable[torch.dtype], tiny: bool) -> Ceilings:
    """Bandwidth of a device-to-device copy (read and written bytes) and rate of a square product, on random data."""
    cuda = device.type == "cuda"
    count = 2**20 if tiny else (2**28 if cuda else 2**25)  # far beyond any cache, unless tiny
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * 4 * count / _best_seconds(partial(torch.Tensor.copy_, target, source), device)
    del source, target
    side = 256 if tiny else (8192 if cuda else 1024)
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates[dtype] = 2 * side**3 / _best_seconds(partial(torch.mm, a, b, out=out), device)
    return Ceilings(bandwidth, rates)


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One operator on one shape in one dtype.

    Attributes:
        inputs: makes one set of arguments; implementations: name -> function of such a set.
        costs: of the operator's calls (forward, backward).
        comparable: implementations whose results are those of the operator, in the same order.
    """

    operator: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], Args]
    implementations: dict[str, Function]
    costs: tuple[Cost, ...]
    comparable: tuple[str, ...] = ("op", "reference", "compiled")


def bytes_of(dtype: torch.dtype, *counts: float) -> float:
    """Bytes of so many numbers."""
    return torch.finfo(dtype).bits // 8 * sum(counts)


def factors(m: int, K: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A and B for a random weight of unit variance; the update is as large as the weight."""
    return torch.randn(rank, K, device=device) / rank**0.5, torch.randn(m, rank, device=device)


def scalars(m: int, K: int, device: torch.device, norm: bool) -> Args:
    """s_w and s_d that are 1; with the norm what `map_scales` makes such of: alpha, beta, ||W||_F and its settings."""
    one = torch.ones(1, device=device)
    return (one * 0, one, one * math.sqrt(m * K), *SETTINGS) if norm else (one, one.clone())


def factor_cost(m: int, K: int, rank: int, norm: bool) -> Cost:
    """Reading the float32 factors, and with the norm their Gram matrices."""
    return Cost(bytes_of(torch.float32, rank * (m + K)), 2 * rank**2 * (m + K) * norm)


def scales_cases(m: int, K: int, rank: int, device: torch.device) -> dict[str, Case]:
    """map_scales: float32 factors whatever the layer's dtype."""

    def inputs() -> Args:
        return *factors(m, K, rank, device), *scalars(m, K, device, norm=True)

    runs = {name: call("map_scales") for name, call in CALLS.items()}
    cost = factor_cost(m, K, rank, norm=True)
    return {"map_scales": Case("map_scales", f"{m}x{K} r{rank}", torch.float32, inputs, runs, (cost,))}


def like(y: Tensor) -> Tensor:
    """A gradient for y with part of y in it, so that the gradients of scalars are no sums that cancel."""
    return (y + y.float().std() * torch.randn_like(y)).to(y.dtype)


def product(call: Callable[[str], Function], name: str, norm: bool, back: bool) -> Function:
    """An operator as a layer runs it, of (x, weight, bias, A, B, `scalars`, settings); first grad, if `back`.

    Args: name: lowrank_linear or lowrank_conv; norm: `map_scales` before it, and its gradient within the backward, as
    method "map" has it, else as "lora"; back: with the closed-form backward.
    """
    forward, backward = call(name), call(f"{name}_backward")

    def both(grad: Tensor | None, x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, *rest: Any) -> Any:
        given, settings = (rest[:5], rest[5:]) if norm else (rest[:2], rest[2:])
        s_w, s_d, *kept = call("map_scales")(A, B, *given) if norm else given
        y, h = forward(x, weight, bias, A, B, s_w, s_d, *settings)
        if grad is None:
            return y
        return y, backward(grad, x, h, weight, A, B, s_w, s_d, kept, *settings, *NEEDS, norm)

    return both if back else partial(both, None)


def by_autograd(function: Function, trained: int) -> Function:
    """The public function with autograd around it, as a training step calls it; trained: scalars that are."""

    def both(grad: Tensor, x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, *rest: Any) -> Any:
        leaves = [t.detach().requires_grad_() for t in (x, A, B, *rest[:trained])]
        x, A, B, *numbers = leaves
        y = function(x, weight, bias, A, B, *numbers, *rest[trained:])
        return y.detach(), torch.autograd.grad(y, leaves, grad)

    return both


def linear_cases(
    T: int, m: int, K: int, rank: int, norm: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Case]:
    """lowrank_linear on T tokens, or with the norm map_linear; forward, and forward with backward."""

    def inputs() -> Args:
        x = torch.randn(T, K, device=device).to(dtype)
        weight, bias = torch.randn(m, K, device=device).to(dtype), torch.randn(m, device=device).to(dtype)
        return x, weight, bias, *factors(m, K, rank, device), *scalars(m, K, device, norm)

    def both_inputs() -> Args:
        args = inputs()
        return like(forwards["reference"](*args)), *args

    forwards, boths = (
        {run: product(call, "lowrank_linear", norm, back) for run, call in CALLS.items()} for back in (False, True)
    )
    fixed = factor_cost(m, K, rank, norm)
    down_up, dense = 2 * T * rank * (m + K), 2 * T * m * K
    forward = Cost(bytes_of(dtype, T * K, m * K, m, T * m, T * rank) + fixed.bytes, dense + down_up + fixed.flops)
    backward = Cost(
        bytes_of(dtype, T * m, T * K, T * rank, m * K, T * K) + 2 * fixed.bytes,  # grad, x, h, W, dx; A, B, dA, dB
        dense + 2 * down_up + fixed.flops,
    )
    name, function = (
        ("map_linear", mapsurgery.ops.map_linear) if norm else ("lowrank_linear", mapsurgery.ops.lowrank_linear)
    )
    make = partial(Case, shape=f"{T}x{K} -> {m} r{rank}", dtype=dtype)
    return {
        name: make(
            f"{name} fwd",
            inputs=inputs,
            implementations={**forwards, "base": lambda x, weight, bias, *_: F.linear(x, weight, bias)},
            costs=(forward,),
        ),
        f"{name}_backward": make(
            f"{name} fwd+bwd",
            inputs=both_inputs,
            implementations={
                **boths,
                "autograd": by_autograd(function, 2 if norm else 0),
                "base": lambda grad, x, weight, bias, *_: (F.linear(x, weight, bias), grad @ weight),
            },
            costs=(forward, backward),
        ),
    }


@dataclass(frozen=True)
class ConvShape:
    """A square 2d convolution of stride 1 that keeps the size of its input."""

    batch: int
    channels: int
    out: int
    side: int
    kernel: int
    groups: int = 1

    @property
    def columns(self) -> int:
        """K: columns of the weight as a matrix."""
        return self.channels // self.groups * self.kernel**2

    @property
    def settings(self) -> Args:
        """stride, padding, dilation, groups."""
        return [1, 1], [self.kernel // 2] * 2, [1, 1], self.groups

    def __str__(self) -> str:
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.batch}x{self.channels}x{self.side}^2 -> {self.out} k{self.kernel}{groups}"


def conv_costs(shape: ConvShape, rank: int, norm: bool, dtype: torch.dtype, weight_space: bool) -> tuple[Cost, Cost]:
    """Forward and backward of lowrank_conv in one of its two spaces."""
    positions, m, K = shape.batch * shape.side**2, shape.out, shape.columns
    x, y, h = positions * shape.channels, positions * m, positions * rank * shape.groups
    fixed = factor_cost(m, K, rank, norm)
    dense, build = 2 * positions * m * K, 2 * m * K * rank
    down_up = 2 * positions * rank * (shape.groups * K + m)
    inner = 0 if weight_space else h
    forward = Cost(
        bytes_of(dtype, x, m * K, y, inner) + fixed.bytes, dense + fixed.flops + (build if weight_space else down_up)
    )
    # Weight space: dx and dW, W' anew, and the two products of dW with the factors.
    extra = dense + 3 * build if weight_space else 2 * down_up
    backward = Cost(bytes_of(dtype, y, x, m * K, inner, x) + 2 * fixed.bytes, dense + fixed.flops + extra)
    return forward, backward


def conv_cases(
    shape: ConvShape, weight_space: bool, rank: int, norm: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Case]:
    """lowrank_conv in one of its spaces, or with the norm map_conv; forward, and forward with backward."""
    m, K = shape.out, shape.columns
    rank = min(rank, m, K)

    def inputs() -> Args:
        x = torch.randn(shape.batch, shape.channels, shape.side, shape.side, device=device).to(dtype)
        weight = torch.randn(m, K, device=device).to(dtype).reshape(m, -1, shape.kernel, shape.kernel)
        numbers = scalars(m, K, device, norm)
        return x, weight, None, *factors(m, K, rank, device), *numbers, *shape.settings, weight_space

    def both_inputs() -> Args:
        args = inputs()
        return like(forwards["reference"](*args)), *args

    def base(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return torch.convolution(x, weight, None, *shape.settings[:3], False, [0, 0], shape.groups)

    def base_both(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Args:
        conv = (*shape.settings[:3], False, [0, 0], shape.groups, [True, False, False])
        return base(x, weight), torch.ops.aten.convolution_backward(grad, x, weight, None, *conv)[0]

    forwards, boths = (
        {run: product(call, "lowrank_conv", norm, back) for run, call in CALLS.items()} for back in (False, True)
    )
    name, function = ("map_conv", mapsurgery.ops.map_conv) if norm else ("lowrank_conv", mapsurgery.ops.lowrank_conv)
    chosen = weight_space == operators.conv_weight_space(m, K, rank, shape.groups)
    space = ("weight" if weight_space else "activation") + (" *" if chosen else "")
    if chosen:  # the public function chooses the space by itself
        public = by_autograd(function, 2 if norm else 0)
        boths["autograd"] = lambda *args: public(*args[:-1])
    forward, backward = conv_costs(shape, rank, norm, dtype, weight_space)
    make = partial(Case, shape=f"{shape} r{rank}, {space}", dtype=dtype)
    return {
        name: make(f"{name} fwd", inputs=inputs, implementations={**forwards, "base": base}, costs=(forward,)),
        f"{name}_backward": make(
            f"{name} fwd+bwd",
            inputs=both_inputs,
            implementations={**boths, "base": base_both},
            costs=(forward, backward),
        ),
    }


def in_place(function: Function) -> Function:
    """An in-place operator as a function that returns what it changed."""

    def run(weight: Tensor, *args: Any) -> Tensor:
        function(weight, *args)
        return weight

    return run


def weight_cases(m: int, K: int, rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Case]:
    """effective_weight and its backward, merge_ and unmerge_."""

    def inputs() -> Args:
        weight = torch.randn(m, K, device=device).to(dtype)
        return weight, *factors(m, K, rank, device), *scalars(m, K, device, norm=False)

    def build(call: Callable[[str], Function]) -> Function:
        return lambda *args: call("effective_weight")(*args, None)

    def both(call: Callable[[str], Function]) -> Function:
        def run(grad: Tensor, *args: Any) -> Any:
            # The first result, the gradient of the frozen weight, is not asked for.
            return build(call)(*args), call("effective_weight_backward")(grad, *args, False)[1:]

        return run

    def both_inputs() -> Args:
        args = inputs()
        return like(build(CALLS["reference"])(*args)), *args

    fixed = factor_cost(m, K, rank, norm=False)
    forward = Cost(bytes_of(dtype, 2 * m * K) + fixed.bytes, 2 * m * K * rank)
    backward = Cost(bytes_of(dtype, 2 * m * K) + 2 * fixed.bytes, 4 * m * K * rank + 2 * m * K)
    make = partial(Case, shape=f"{m}x{K} r{rank}", dtype=dtype)
    once = partial(make, inputs=inputs, costs=(forward,))
    scaled = {"base": lambda weight, *_: weight.mul_(1.0)}
    return {
        "effective_weight": once(
            "effective_weight fwd",
            implementations={**{run: build(call) for run, call in CALLS.items()}, "base": lambda W, *_: W.clone()},
        ),
        "effective_weight_backward": make(
            "effective_weight fwd+bwd",
            inputs=both_inputs,
            implementations={run: both(call) for run, call in CALLS.items()},
            costs=(forward, backward),
        ),
        **{
            name: once(name, implementations={**{run: in_place(call(name)) for run, call in CALLS.items()}, **scaled})
            for name in ("merge_", "unmerge_")
        },
    }


# Per size: (tokens, m, K) of Linear layers and weights, and convolutions.
LINEARS = {
    "tiny": [(8, 24, 16)],
    "small": [(1576, 1536, 384), (512, 1536, 576)],  # ViT-S on 8 images, an MLP of SmolLM-135M
    "large": [(25216, 3072, 768), (4096, 4096, 4096), (4096, 14336, 4096)],  # ViT-B on 128 images, layers of Llama 3 8B
}
CONVS = {
    "tiny": [ConvShape(2, 16, 16, 5, 3), ConvShape(2, 8, 8, 5, 3, groups=8)],
    "small": [ConvShape(2, 64, 64, 56, 3), ConvShape(2, 96, 96, 28, 3, groups=96)],
    "large": [
        ConvShape(64, 64, 64, 56, 3),
        ConvShape(64, 256, 256, 14, 3),
        ConvShape(64, 256, 1024, 14, 1),
        ConvShape(64, 192, 192, 28, 3, groups=192),
    ],
}
OPERATORS = (
    "map_scales",
    "lowrank_linear",
    "map_linear",
    "lowrank_conv",
    "map_conv",
    "effective_weight",
    "merge_",
    "unmerge_",
)
"""map_linear and map_conv: `map_scales` and the product, as MAP's layers run them."""


def make_cases(size: str, operators: Sequence[str], rank: int, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """All cases of a size, forward before backward."""
    found: list[tuple[str, Case]] = []
    for T, m, K in LINEARS[size]:
        r = min(rank, m, K)
        found += scales_cases(m, K, r, device).items()
        found += weight_cases(m, K, r, dtype, device).items()
        for norm in (False, True):
            found += linear_cases(T, m, K, r, norm, dtype, device).items()
    for shape in CONVS[size]:
        for weight_space in (False, True):
            for norm in (False, True):
                found += conv_cases(shape, weight_space, rank, norm, dtype, device).items()
    order = {name: index for index, name in enumerate(OPERATORS)}
    chosen = [(order[name.removesuffix("_backward")], case) for name, case in found]
    wanted = {order[name] for name in operators}
    return [case for index, case in sorted(chosen, key=lambda pair: pair[0]) if index in wanted]


# --- correctness ----------------------------------------------------------------------------------------------------


def flatten(result: Any) -> list[Tensor]:
    """Tensors of a nested result that hold anything."""
    if isinstance(result, Tensor):
        return [result] if result.numel() else []
    return [t for part in result for t in flatten(part)] if isinstance(result, tuple | list) else []


def copied(args: Args, dtype: torch.dtype | None = None) -> Args:
    """Arguments with tensors copied, in another dtype if given."""
    return tuple(a.to(dtype, copy=True) if isinstance(a, Tensor) and dtype else _clone(a) for a in args)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def worst_error(function: Function, args: Args, truth: list[Tensor]) -> float:
    """Largest ||result - truth|| / ||truth|| over the results.

    Raises:
        RuntimeError: as many results as there should be did not come, or not in their shapes.
    """
    results = flatten(function(*copied(args)))
    if [t.shape for t in results] != [t.shape for t in truth]:
        raise RuntimeError(f"shapes {[tuple(t.shape) for t in results]}, not {[tuple(t.shape) for t in truth]}")
    errors = [((r.double() - t).norm() / t.norm()).item() for r, t in zip(results, truth, strict=True)]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def check(case: Case, functions: dict[str, Function]) -> dict[str, float]:
    """Error of every implementation that computes the same as the operator, against the reference in float64.

    Raises:
        RuntimeError: one is wrong.
    """
    args = case.inputs()
    truth = flatten(case.implementations["reference"](*copied(args, torch.float64)))
    errors = {name: worst_error(functions[name], args, truth) for name in case.comparable if name in functions}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[case.dtype]}
    if wrong:
        raise RuntimeError(f"wrong results: relative error {wrong}, at most {TOLERANCE[case.dtype]} is rounding")
    return errors


# --- timing ---------------------------------------------------------------------------------------------------------


def input_sets(case: Case, device: torch.device, tiny: bool) -> list[Args]:
    """So many sets of arguments that going round them leaves none in a cache; at most 32."""
    first = case.inputs()
    size = sum(t.numel() * t.element_size() for t in flatten(first))
    enough = 0 if tiny else (2**28 if device.type == "cuda" else 2**26)
    return [first, *(case.inputs() for _ in range(min(31, enough // max(1, size))))]


def timed(function: Function, sets: list[Args], device: torch.device, calls: int) -> float:
    """Milliseconds per call of so many calls in a row, going round the sets."""
    stamps = Stamps(device)
    if device.type == "cpu":
        for index in range(calls):
            args = sets[index % len(sets)]
            move_scalars(args)
            stamps.mark()
            function(*args)
            stamps.mark()
        return sum(stamps.milliseconds()[::2]) / calls
    torch.cuda.synchronize()
    stamps.mark()
    for index in range(calls):
        function(*sets[index % len(sets)])
    stamps.mark()
    return stamps.milliseconds()[0] / calls


@torch.no_grad()
def move_scalars(args: Args) -> None:
    """Change the numbers in their last digits, as an optimiser does.

    A library for CPUs may compile a kernel for each new number that it is given; on a GPU they are read by address.
    """
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.shape == (1,):
            tensor.mul_(1 + 1e-6 * random.gauss(0, 1))


def captured(function: Function, sets: list[Args]) -> Callable[[], None]:
    """A CUDA graph of one call on each set; replaying it leaves out what the host costs."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()  # a first call outside the graph, off the default stream, makes libraries' workspaces
    with torch.cuda.stream(side):
        function(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in sets:
            function(*args)
    return graph.replay


def peak_extra(function: Function, args: Args, device: torch.device) -> int | None:
    """CUDA: most memory that a call holds above its arguments, results included. CPU: None."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*args)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def graph_times(functions: dict[str, Function], sets: list[Args], repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds per call in a replayed CUDA graph, or why there is no graph."""
    found: dict[str, Any] = {}
    for name, function in functions.items():
        if name == "autograd":
            continue
        try:
            replay = captured(function, sets)
            replay()
            found[name] = median(timed(replay, [()], device, 1) for _ in range(repeats)) / len(sets)
        except Exception as error:  # whatever cannot be captured; its eager time still counts
            torch.cuda.synchronize()
            found[name] = f"not captured: {type(error).__name__}: {error}".splitlines()[0]
    return found


def measure(
    case: Case, functions: dict[str, Function], device: torch.device, arguments: argparse.Namespace
) -> list[Row]:
    """Interleaved rounds over the implementations of a case; one row each."""
    errors = check(case, functions)
    sets = input_sets(case, device, arguments.size == "tiny")
    peaks = {name: peak_extra(function, sets[0], device) for name, function in functions.items()}
    quick = {name: timed(function, sets, device, 2) for name, function in functions.items()}
    calls = {name: max(1, min(1000, round(arguments.min_ms / max(ms, 1e-4)))) for name, ms in quick.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for index in range(arguments.repeats):
        for offset in range(len(names)):
            name = names[(index + offset) % len(names)]
            times[name].append(timed(functions[name], sets, device, calls[name]))
    with_graphs = device.type == "cuda" and not arguments.no_graphs
    graphs = graph_times(functions, sets, arguments.repeats, device) if with_graphs else {}
    return [
        {
            "operator": case.operator,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "implementation": name,
            "ms": median(times[name]),
            "iqr_ms": iqr(times[name]),
            "graph_ms": graphs.get(name),
            "peak_bytes": peaks[name],
            "relative_error": errors.get(name),
            "calls": calls[name],
            "input_sets": len(sets),
        }
        for name in functions
    ]


def compiled(function: Function) -> Function:
    """torch.compile of a reference, for one shape at a time."""
    return torch.compile(function, dynamic=False)


def functions_of(case: Case, wanted: Sequence[str]) -> dict[str, Function]:
    """The implementations of a case to be timed, in the order asked for."""
    known = dict(case.implementations)
    if "compiled" in wanted:
        known["compiled"] = compiled(known["reference"])
    return {name: known[name] for name in wanted if name in known}


def add_ratios(rows: list[Row], case: Case, ceilings: Ceilings) -> None:
    """Enter the floor and the ratios to it, to the reference and to the frozen layer."""
    times = {row["implementation"]: row["ms"] for row in rows}
    floor = ceilings.milliseconds(case.costs, case.dtype)
    for row in rows:
        row |= {"floor_ms": floor, "limit": ceilings.limit(case.costs, case.dtype), "to_floor": row["ms"] / floor}
        for name in ("reference", "base"):
            row[f"to_{name}"] = row["ms"] / times[name] if name in times else None
        if isinstance(row["graph_ms"], float):
            row["graph_to_floor"] = row["graph_ms"] / floor
        row["peak_mib"] = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20


def run_case(case: Case, ceilings: Ceilings, device: torch.device, arguments: argparse.Namespace) -> list[Row]:
    """Rows of a case; one with the error if it fails."""
    try:
        rows = measure(case, functions_of(case, arguments.implementations), device, arguments)
        add_ratios(rows, case, ceilings)
    except Exception as error:  # the other operators still count
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{case.operator} {case.shape}: {message}", file=sys.stderr)
        dtype = str(case.dtype).removeprefix("torch.")
        rows = [{"operator": case.operator, "shape": case.shape, "dtype": dtype, "error": message}]
    torch.compiler.reset()
    free_memory(device)
    return rows


COLUMNS = {
    "operator": "operator",
    "shape": "shape",
    "dtype": "dtype",
    "implementation": "runs as",
    "ms": "ms",
    "iqr_ms": "IQR",
    "to_reference": "x reference",
    "to_base": "x base",
    "floor_ms": "floor ms",
    "limit": "limit",
    "to_floor": "x floor",
    "graph_ms": "graph ms",
    "graph_to_floor": "x floor",
    "peak_mib": "peak MiB",
    "relative_error": "error",
    "error": "failed",
}
NOTES = (
    "Medians per call over interleaved rounds; IQR is the distance of the quartiles. op: the operator as loaded, "
    "native or not. autograd: the public function with its backward by autograd. base: the same layer frozen "
    "(forward, gradient of x), or for weights a copy or a pass in place. graph: in a replayed CUDA graph, without the "
    "host's part. peak: memory above the arguments, results included. error: against the definition in float64. An "
    "asterisk marks the space that the library chooses. A ratio to the floor under 1 means that data stayed in a cache."
)
IMPLEMENTATIONS = ("op", "autograd", "reference", "compiled", "base")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, repeats=15)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="one or several (default fp32; on CUDA bf16 too)")
    parser.add_argument("--size", choices=LINEARS, help="shapes (default small on CPU, large on CUDA)")
    parser.add_argument("--no-graphs", action="store_true", help="CUDA: leave out the times in a CUDA graph")
    parser.add_argument("--min-ms", type=float, default=5.0, help="least time of one measurement (default 5 ms)")
    arguments = parser.parse_args(argv)
    cuda = arguments.device == "cuda"
    arguments.size = arguments.size or ("large" if cuda else "small")
    arguments.dtype = arguments.dtype or (["bf16", "fp32"] if cuda else ["fp32"])
    return arguments


def describe_ceilings(ceilings: Ceilings) -> dict[str, float]:
    """Ceilings in the units of data sheets."""
    rates = {f"product_{str(k).removeprefix('torch.')}_tflops": v / 1e12 for k, v in ceilings.rates.items()}
    return {"copy_gb_per_s": ceilings.bandwidth / 1e9, **rates}


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if an operator failed or gave wrong results."""
    arguments = parse(argv)
    device, run = start(arguments, size=arguments.size, repeats=arguments.repeats)
    if "compiled" in arguments.implementations:
        allow_many_compilations()
    dtypes = [DTYPES[name] for name in arguments.dtype]
    # float32 always: map_scales has it whatever the layer's dtype.
    ceilings = measure_ceilings(device, {torch.float32, *dtypes}, arguments.size == "tiny")
    run |= describe_ceilings(ceilings)
    print(", ".join(f"{name} {value:.4g}" for name, value in describe_ceilings(ceilings).items()))
    rows: list[Row] = []
    done: set[tuple[str, str, torch.dtype]] = set()
    for dtype in dtypes:
        for case in make_cases(arguments.size, arguments.operators, arguments.rank, dtype, device):
            key = (case.operator, case.shape, case.dtype)
            if key not in done:  # map_scales is the same in every dtype of the layer
                rows += run_case(case, ceilings, device, arguments)
                done.add(key)
                paths = write_results(arguments.out, "ops", arguments.tag, rows, COLUMNS, run, NOTES)
    columns = {key: head for key, head in COLUMNS.items() if key != "operator"}
    for operator in dict.fromkeys(row["operator"] for row in rows):
        print(table(operator, [row for row in rows if row["operator"] == operator], columns))
    print_paths(paths)
    return int(any(row.get("error") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
