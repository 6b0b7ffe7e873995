"""What one adapted Linear must compute and move in a training step, the time that this predicts, and the time it takes.

    python benchmarks/floor.py --shapes vit_small llama_tiny

For each shape and method: the arithmetic of the dense and of the low-rank products, and the bytes that the passes over
activations and weights read and write. The prediction is arithmetic over the rate of a large matrix product plus bytes
over the bandwidth of a copy, both measured in this run; nothing overlaps and no cache helps. NOTES.md has the formulas.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import (
    Row,
    Stamps,
    make_optimizer,
    make_parser,
    median,
    paired_ratio,
    print_paths,
    start,
    table,
    write_results,
)
from ops import Ceilings, measure_ceilings
from torch import Tensor, nn
from train_step import METHODS

SHAPES: dict[str, list[tuple[int, int, int]]] = {  # (tokens, in_features, out_features)
    "test": [(16, 32, 48)],
    "vit_small": [(1576, 384, 1152), (1576, 384, 384), (1576, 384, 1536), (1576, 1536, 384)],
    "vit_base": [(1576, 768, 2304), (1576, 768, 768), (1576, 768, 3072), (1576, 3072, 768)],
    "vit_large": [(1576, 1024, 3072), (1576, 1024, 1024), (1576, 1024, 4096), (1576, 4096, 1024)],
    "llama_tiny": [(1024, 256, 256), (1024, 256, 688), (1024, 688, 256)],
    "llama_8b_short": [(512, 4096, 4096), (512, 4096, 14336), (512, 14336, 4096)],
    "llama_8b": [(1, 4096, 4096), (64, 4096, 4096), (64, 4096, 14336), (8192, 4096, 4096), (8192, 4096, 14336)],
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations and elements read or written, of forward and backward together."""

    flops: int
    elements: int


def frozen_work(T: int, K: int, m: int, rank: int) -> Work:
    """y = x W^T and G W: the products that every adapter needs."""
    return Work(4 * T * m * K, 2 * (T * (K + m) + m * K))


def lora_work(T: int, K: int, m: int, rank: int) -> Work:
    """Beyond the frozen layer, as peft computes it. Per token, reads and writes of rows of K and m numbers:

    h = x A^T: K; u = h B^T: m; u *= s: 2 m; y += u (a new tensor): 3 m; s G: 2 m; (s G) B: m; (s G)^T h: m;
    gh A: K; its sum with G W: 3 K; gh^T x: K.
    """
    base = frozen_work(T, K, m, rank)
    return Work(base.flops + 6 * T * rank * (K + m), base.elements + T * (6 * K + 10 * m))


MOST_RANK_IN_ONE_PASS = 16  # `kMostRank` of csrc/cpu/thin.cpp


def map_work(T: int, K: int, m: int, rank: int) -> Work:
    """Beyond the frozen layer, here, by matrix products: h = x A^T: K; y += s_d h B^T in place: 2 m; G B: m; G^T h: m;
    <x, G W>: 2 K; G W = s_w G W + s_d (G B) A in place: 2 K; (G B)^T x: K; and the two Gram matrices, twice.
    """
    base = frozen_work(T, K, m, rank)
    gram = 4 * rank * rank * (K + m)
    return Work(base.flops + 6 * T * rank * (K + m) + gram, base.elements + T * (6 * K + 4 * m))


def one_pass_map_work(T: int, K: int, m: int, rank: int) -> Work:
    """The same where each large matrix is read once, as on the CPU in float32: G for G B and G^T h; x and G W, which is
    written, for the rest of backward.
    """
    by_products = map_work(T, K, m, rank)
    return Work(by_products.flops, by_products.elements - T * (2 * K + m))


WORK: dict[str, Callable[[int, int, int, int], Work]] = {"frozen": frozen_work, "lora": lora_work, "map": map_work}


def works(rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[int, int, int, int], Work]]:
    """What each method must compute and move on this device."""
    one_pass = device.type == "cpu" and dtype == torch.float32 and rank <= MOST_RANK_IN_ONE_PASS
    return WORK | ({"map": one_pass_map_work} if one_pass else {})


def predicted_ms(work: Work, dtype: torch.dtype, ceilings: Ceilings) -> float:
    """Arithmetic and bytes at the measured ceilings, one after the other."""
    return 1e3 * (work.flops / ceilings.rates[dtype] + work.elements * dtype.itemsize / ceilings.bandwidth)


class One(nn.Module):
    """A model of a single layer, for methods that adapt models."""

    def __init__(self, K: int, m: int) -> None:
        super().__init__()
        self.layer = nn.Linear(K, m, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def make(method: str, base: One, rank: int) -> nn.Module:
    """The layer under a method; `frozen` is the layer itself, whose input has a gradient anyway."""
    model = copy.deepcopy(base)
    return model if method == "frozen" else METHODS[method](model, ["layer"], rank)


def timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor, grad: Tensor, device: torch.device
) -> Stamps:
    """Forward and backward; the optimiser's step and the end of the gradients come after the time."""
    stamps = Stamps(device)
    stamps.mark()
    model(x).backward(grad)
    stamps.mark()
    if optimizer is not None:
        optimizer.step()
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    return stamps


def measure_shape(
    shape: tuple[int, int, int], rank: int, dtype: torch.dtype, device: torch.device, rounds: int, ceilings: Ceilings
) -> list[Row]:
    """One row for each method, from interleaved rounds."""
    T, K, m = shape
    base = One(K, m).to(device, dtype).requires_grad_(False)
    models = {method: make(method, base, rank) for method in WORK}
    optimizers = {method: make_optimizer(model) for method, model in models.items()}
    x, grad = (
        torch.randn(T, K, device=device, dtype=dtype, requires_grad=True),
        torch.randn(T, m, device=device).to(dtype),
    )
    for method, model in models.items():
        timed_step(model, optimizers[method], x, grad, device).milliseconds()
    times: dict[str, list[float]] = {method: [] for method in WORK}
    for _ in range(rounds):
        for method, model in models.items():
            times[method] += timed_step(model, optimizers[method], x, grad, device).milliseconds()
    work_of = works(rank, dtype, device)
    predictions = {method: predicted_ms(work(T, K, m, rank), dtype, ceilings) for method, work in work_of.items()}
    return [
        {
            "tokens": T,
            "in_features": K,
            "out_features": m,
            "rank": rank,
            "dtype": str(dtype).removeprefix("torch."),
            "method": method,
            "gflop": work(T, K, m, rank).flops / 1e9,
            "mib": work(T, K, m, rank).elements * dtype.itemsize / 2**20,
            "predicted_ms": predictions[method],
            "ms": median(times[method]),
            "predicted_to_frozen": predictions[method] / predictions["frozen"],
            "to_frozen": paired_ratio(times[method], times["frozen"]),
            "predicted_to_lora": predictions[method] / predictions["lora"],
            "to_lora": paired_ratio(times[method], times["lora"]),
        }
        for method, work in work_of.items()
    ]


COLUMNS = {
    "tokens": "T",
    "in_features": "in",
    "out_features": "out",
    "dtype": "dtype",
    "method": "method",
    "gflop": "GFLOP",
    "mib": "MiB moved",
    "predicted_ms": "predicted ms",
    "ms": "ms",
    "predicted_to_frozen": "predicted x frozen",
    "to_frozen": "x frozen",
    "predicted_to_lora": "predicted x LoRA",
    "to_lora": "x LoRA",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, repeats=15)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["vit_small", "llama_tiny"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    arguments = parser.parse_args(argv)
    (device, run), dtype = start(arguments, repeats=arguments.repeats), DTYPES[arguments.dtype]
    ceilings = measure_ceilings(device, [dtype], tiny=arguments.shapes == ["test"])
    run["copy_gb_per_s"] = round(ceilings.bandwidth / 1e9, 2)
    run["matmul_gflop_per_s"] = round(ceilings.rates[dtype] / 1e9, 1)
    print(f"copy {run['copy_gb_per_s']} GB/s (read and written), products {run['matmul_gflop_per_s']} GFLOP/s")
    rows = [
        row
        for name in arguments.shapes
        for shape in SHAPES[name]
        for row in measure_shape(shape, arguments.rank, dtype, device, arguments.repeats, ceilings)
    ]
    print(table("floor", rows, COLUMNS))
    notes = (
        "Predicted: FLOPs over the rate of a large product plus bytes over the bandwidth of a copy, no overlap. An "
        "AdamW step lies between timed steps."
    )
    print_paths(write_results(arguments.out, "floor", arguments.tag, rows, COLUMNS, run, notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
