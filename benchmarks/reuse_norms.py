"""What `mapsurgery.reuse_norms` saves: micro-batches of one training step, and a decode loop, beside peft's LoRA.

    python benchmarks/reuse_norms.py --threads 1                          # every point, on this machine's device
    python benchmarks/reuse_norms.py --widths 512 --ranks 64 --threads 1  # one point

A stack of equal linear layers; the methods take turns in every round. benchmarks/README.md explains.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    Row,
    Stamps,
    free_memory,
    iqr,
    make_optimizer,
    make_parser,
    median,
    paired_ratio,
    print_paths,
    start,
    table,
    write_results,
)
from scaling import Point, make_base, make_candidate
from torch import Tensor, nn

import mapsurgery

Block = Callable[[nn.Module], AbstractContextManager[Any]]

METHODS: dict[str, tuple[str, Block]] = {
    "lora": ("lora", lambda model: nullcontext()),
    "map": ("map", lambda model: nullcontext()),
    "map reused": ("map", mapsurgery.reuse_norms),
}
"""Method of scaling.py, and the block that a step, or a whole decode loop, runs in."""
DECODE = "decode"


@dataclass
class Candidate:
    """A method on a stack of layers, with an input and the gradient of its output.

    Attributes:
        optimizer: takes a step between the timed steps, outside of the block.
        calls: steps, or tokens of a decode loop, that make one measurement, by quantity.
        times: milliseconds of a step or token, by quantity, one per round.
    """

    name: str
    model: nn.Module
    block: Block
    x: Tensor
    grad: Tensor
    optimizer: torch.optim.Optimizer
    calls: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    def train(self, micro_batches: int) -> None:
        """Forward and backward of the micro-batches."""
        with self.block(self.model):
            for _ in range(micro_batches):
                self.model(self.x).backward(self.grad)

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        """One token after the other, in one block."""
        token = self.x[:1].detach()
        with self.block(self.model):
            for _ in range(tokens):
                self.model(token)

    def run(self, quantity: str, calls: int) -> float:
        """Milliseconds of a step or token."""
        self.model.train(quantity != DECODE)
        if self.x.is_cuda:
            torch.cuda.synchronize()
        stamps = Stamps(self.x.device)
        if quantity == DECODE:
            stamps.mark()
            self.decode(calls)
            stamps.mark()
        else:
            for _ in range(calls):
                self.optimizer.step()
                self.model.zero_grad(set_to_none=True)
                stamps.mark()
                self.train(int(quantity))
                stamps.mark()
        return sum(stamps.milliseconds()[::2]) / calls


def make_candidates(point: Point, device: torch.device) -> list[Candidate]:
    """All methods at one point, on the same frozen weights."""
    base, x, grad = make_base(point, "fp32", device)
    made = []
    for name, (method, block) in METHODS.items():
        checked = make_candidate(method, base, x, grad, point.rank)  # its gradients are finite and not zero
        optimizer = make_optimizer(checked.model)
        assert optimizer is not None  # each method trains something
        made.append(Candidate(name, checked.model, block, x, grad, optimizer))
    return made


def run_rounds(candidates: list[Candidate], quantities: Iterable[str], arguments: argparse.Namespace) -> None:
    """Interleaved rounds of all quantities, until there are enough or the point's time is over."""
    for candidate in candidates:
        for quantity in quantities:
            candidate.run(quantity, 2)
            once = candidate.run(quantity, 2)
            fewest = arguments.tokens_of_a_loop if quantity == DECODE else 1
            candidate.calls[quantity] = max(fewest, math.ceil(arguments.min_ms / max(once, 1e-4)))
            candidate.times[quantity] = []
    start = time.perf_counter()
    for index in range(arguments.repeats):
        if index > 2 and time.perf_counter() - start > arguments.point_seconds:
            break
        for quantity in quantities:
            for offset in range(len(candidates)):  # another one starts each round
                candidate = candidates[(index + offset) % len(candidates)]
                candidate.times[quantity].append(candidate.run(quantity, candidate.calls[quantity]))


def run_point(point: Point, device: torch.device, arguments: argparse.Namespace) -> list[Row]:
    """All methods at one width and rank."""
    candidates = make_candidates(point, device)
    quantities = [*map(str, arguments.micro_batches), DECODE]
    run_rounds(candidates, quantities, arguments)
    lora, plain = candidates[0].times, candidates[1].times
    return [
        {
            **vars(point),
            "quantity": quantity if quantity == DECODE else f"step of {quantity}",
            "method": candidate.name,
            "ms": median(times),
            "iqr_ms": iqr(times),
            "to_lora": paired_ratio(times, lora[quantity]),
            "to_map": paired_ratio(times, plain[quantity]),
            "rounds": len(times),
        }
        for quantity in quantities
        for candidate in candidates
        for times in [candidate.times[quantity]]
    ]


COLUMNS = {
    "width": "width",
    "rank": "rank",
    "quantity": "of",
    "method": "method",
    "ms": "ms",
    "iqr_ms": "IQR",
    "to_lora": "x LoRA",
    "to_map": "x MAP",
    "rounds": "rounds",
}
NOTES = (
    "A stack of square linear layers. step of k: forward and backward of k micro-batches, with an AdamW step between "
    "timed steps, the norms computed once for all of them where they are reused. "
    "decode: one token under no_grad, in a block around the whole loop. Medians over interleaved rounds, and of the "
    "ratios within a round."
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, repeats=25, rank=False)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256], help="those above a width are left out")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of a micro-batch (default 64)")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens-of-a-loop", type=int, default=64, help="decoded in one block, at least (default 64)")
    parser.add_argument("--min-ms", type=float, default=2.0, help="least time of one measurement (default 2 ms)")
    parser.add_argument(
        "--point-seconds", type=float, default=20.0, help="rounds at a point end after this (default 20)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse(argv)
    device, run = start(arguments)
    rows: list[Row] = []
    for width in arguments.widths:
        for rank in arguments.ranks:
            if rank <= width:
                rows += run_point(Point(arguments.tokens, width, rank, arguments.layers), device, arguments)
                free_memory(device)
    print(table("reused norms", rows, COLUMNS))
    paths = write_results(arguments.out, "reuse_norms", arguments.tag, rows, COLUMNS, run, NOTES)
    print_paths(paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
