"""How the cost of adapted linear layers grows: MAP beside peft's LoRA and DoRA and the frozen layer, as curves.

    python benchmarks/scaling.py                                                  # all curves on this machine's device
    python benchmarks/scaling.py --curves rank --methods lora map                 # one curve, two methods
    python benchmarks/scaling.py --plot-only benchmarks/results/scaling_X_Y.csv   # the plots again, from the numbers

Curves over tokens, width, rank and number of layers, each with the other three fixed. benchmarks/README.md explains.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
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
    randomise_zeros,
    slug,
    start,
    table,
    write_results,
)
from torch import Tensor, nn
from train_step import METHODS
from workloads import seeded, share_weights

PLOTS = Path(__file__).resolve().parent / "plots"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTITIES = {"train": "training: forward + backward", "eval": "inference: forward, no gradient"}
FEWEST_ROUNDS = 3

# --- points ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A stack of equal square linear layers and its input: tokens x width."""

    tokens: int
    width: int
    rank: int
    layers: int


def powers_of_two(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first ... up to last."""
    return [first << i for i in range(int(math.log2(last / first)) + 1)]


def curves(device: torch.device, tiny: bool) -> dict[str, list[Point]]:
    """Points by curve; a GPU needs more tokens and a wider layer before its kernels take longer than their launch."""
    if tiny:
        base, square, narrow = Point(4, 16, 2, 1), Point(4, 4, 2, 1), Point(2, 16, 2, 1)
        tokens, width, layers = [1, 2], [16, 32], [1, 2]
    else:
        cuda = device.type == "cuda"
        base = Point(2048, 1024, 8, 1) if cuda else Point(256, 512, 8, 1)
        square, narrow = (base if cuda else replace(base, width=256)), Point(16, 64, 8, 1)
        tokens, width, layers = powers_of_two(1, 4096), powers_of_two(64, 4096), powers_of_two(1, 64)
    ranks = sorted({*powers_of_two(1, square.width), 3 * square.width // 4})  # the last ones are above half the width
    return {
        "tokens": [replace(base, tokens=n) for n in tokens],
        "width": [replace(base, width=n) for n in width],
        "rank": [replace(square, rank=n) for n in ranks],
        "layers": [replace(narrow, layers=n) for n in layers],
    }


AXES = {
    "tokens": "tokens in a batch",
    "width": "width (input = output features)",
    "rank": "rank of the adapter",
    "layers": "adapted layers in a row",
}

# --- one method at one point ----------------------------------------------------------------------------------------


def _frozen(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    """The floor: the layers as they are, with the gradient of their input and nothing else."""
    return model


APPLY = {"frozen": _frozen} | {name: METHODS[name] for name in ("lora", "lora-bf16", "dora", "map", "map-bf16")}


def default_methods(dtype: str) -> list[str]:
    """The floor, peft's two and this library, with parameters of the layer's dtype as well where that is narrow."""
    return [name for name in APPLY if dtype == "bf16" or not name.endswith("-bf16")]


def usual_reference(dtype: str, methods: Sequence[str]) -> str:
    """The LoRA to compare with: the fastest form of it, with parameters of the layer's own dtype."""
    narrow = "lora-bf16" if dtype == "bf16" else "lora"
    return narrow if narrow in methods else "lora"


@dataclass
class Candidate:
    """A method on a stack of layers, with an input and the gradient of its output.

    Attributes:
        optimizer: takes a step between the calls; None for the frozen layers.
        steps: calls in a row that make one measurement.
        times, processor_times: milliseconds of a call, by quantity, one per round.
    """

    name: str
    model: nn.Module
    x: Tensor
    grad: Tensor
    optimizer: torch.optim.Optimizer | None
    steps: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    processor_times: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})

    def train(self) -> None:
        """Forward and backward."""
        self.model(self.x).backward(self.grad)

    def use_gradients(self) -> None:
        """The optimiser's step on the gradients of the last call, and their end."""
        if self.optimizer is not None:
            self.optimizer.step()
        self.x.grad = None
        self.model.zero_grad(set_to_none=True)

    def eval(self) -> None:
        """Forward alone; the caller switches gradients off."""
        self.model(self.x)

    def time(self, quantity: str, steps: int) -> tuple[float, float]:
        """Milliseconds of a call, and of the processor in it, over several in a row."""
        self.model.train(quantity == "train")
        call = self.train if quantity == "train" else self.eval
        with torch.set_grad_enabled(quantity == "train"):
            if self.x.is_cuda:
                torch.cuda.synchronize()
            stamps, processor = Stamps(self.x.device), 0.0
            for _ in range(steps):
                if quantity == "train":
                    self.use_gradients()
                start = time.process_time()
                stamps.mark()
                call()
                stamps.mark()
                processor += time.process_time() - start
            elapsed = sum(stamps.milliseconds()[::2])
        return elapsed / steps, 1e3 * processor / steps

    def measure(self, quantity: str) -> None:
        """One round."""
        elapsed, processor = self.time(quantity, self.steps[quantity])
        self.times[quantity].append(elapsed)
        self.processor_times[quantity].append(processor)


def make_base(point: Point, dtype: str, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The frozen layers, which all methods share, an input, and a gradient of the output."""
    with seeded():
        layers = [nn.Linear(point.width, point.width) for _ in range(point.layers)]
        base = nn.Sequential(*layers).to(device, DTYPES[dtype]).requires_grad_(False)
        x, grad = (torch.randn(point.tokens, point.width).to(device, DTYPES[dtype]) for _ in range(2))
    return base, x, grad


def make_candidate(name: str, base: nn.Module, x: Tensor, grad: Tensor, rank: int) -> Candidate:
    """A method on the layers, called once in each way.

    Raises:
        RuntimeError: a gradient is missing, not finite or zero: the method would be timed for too little work.
    """
    targets = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    with seeded():
        model = APPLY[name](share_weights(base), targets, rank)
        randomise_zeros(model)
    candidate = Candidate(name, model, x.clone().requires_grad_(), grad, make_optimizer(model))
    for quantity in QUANTITIES:
        candidate.time(quantity, 1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in {"input": candidate.x, **trained}.items():
        if tensor.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        if not tensor.grad.isfinite().all() or not tensor.grad.any():
            raise RuntimeError(f"the gradient of {name} is zero or not finite")
    return candidate


# --- the run --------------------------------------------------------------------------------------------------------


def run_rounds(candidates: list[Candidate], arguments: argparse.Namespace) -> bool:
    """Interleaved rounds until there are enough or the point's time is over. Returns whether it took too long."""
    start = time.perf_counter()
    for candidate in candidates:
        for quantity in QUANTITIES:
            once = min(candidate.time(quantity, 1)[0] for _ in range(2))
            candidate.steps[quantity] = max(1, math.ceil(arguments.min_ms / max(once, 1e-4)))
    for index in range(arguments.repeats):
        if index >= FEWEST_ROUNDS and time.perf_counter() - start > arguments.point_seconds:
            break
        for quantity in QUANTITIES:
            for offset in range(len(candidates)):  # another one starts each round
                candidates[(index + offset) % len(candidates)].measure(quantity)
    return time.perf_counter() - start > 2 * arguments.point_seconds


def ratio_quartiles(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile of value / base of the same round; all the same of one round."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios


def row_of(candidate: Candidate, quantity: str, others: Mapping[str, Candidate], reference: str) -> Row:
    """Times of a method, and its ratios to LoRA and to the floor where these ran."""
    times, processor = candidate.times[quantity], candidate.processor_times[quantity]
    row: Row = {"quantity": quantity, "method": candidate.name, "ms": median(times), "iqr_ms": iqr(times)}
    for label, name in (("lora", reference), ("frozen", "frozen")):
        other = others.get(name)
        ratios = ratio_quartiles(times, other.times[quantity]) if other is not None else (None, None, None)
        row |= dict(zip((f"to_{label}_q1", f"to_{label}", f"to_{label}_q3"), ratios, strict=True))
    if not candidate.x.is_cuda:
        row["processor_ms"] = median(processor)
        if (other := others.get(reference)) is not None:
            row["processor_to_lora"] = paired_ratio(processor, other.processor_times[quantity])
    return row | {"rounds": len(times), "calls": candidate.steps[quantity], "lora": reference, "error": None}


def run_point(
    curve: str, point: Point, dtype: str, methods: Sequence[str], device: torch.device, arguments: argparse.Namespace
) -> tuple[list[Row], bool]:
    """All methods at one point, and whether a larger point would take too long. A failure is a row with its error."""
    about: Row = {"curve": curve, "dtype": dtype, **vars(point)}
    base, x, grad = make_base(point, dtype, device)
    candidates: list[Candidate] = []
    failed: list[Row] = []
    for name in methods:
        try:
            candidates.append(make_candidate(name, base, x, grad, point.rank))
        except Exception as error:  # any method of any library, on any device: the others still count
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{curve} {point} {name}: {message}", file=sys.stderr)
            failed.append({**about, "device": device.type, "method": name, "error": message})
    too_long = run_rounds(candidates, arguments) if candidates else False
    by_name = {candidate.name: candidate for candidate in candidates}
    reference = usual_reference(dtype, methods)
    rows = [
        {**about, "device": device.type, **row_of(candidate, quantity, by_name, reference)}
        for quantity in QUANTITIES
        for candidate in candidates
    ]
    return rows + failed, too_long


COLUMNS = {
    "curve": "curve",
    "dtype": "dtype",
    "tokens": "tokens",
    "width": "width",
    "rank": "rank",
    "layers": "layers",
    "quantity": "of",
    "method": "method",
    "ms": "ms",
    "iqr_ms": "IQR",
    "to_lora": "x LoRA",
    "to_lora_q1": "q1",
    "to_lora_q3": "q3",
    "to_frozen": "x frozen",
    "to_frozen_q1": "q1",
    "to_frozen_q3": "q3",
    "processor_ms": "CPU ms",
    "processor_to_lora": "x LoRA",
    "rounds": "rounds",
    "error": "error",
}
NOTES = (
    "A stack of square linear layers. train: forward and backward, the gradient of the input included, with an AdamW "
    "step between timed calls; eval: forward in eval mode under no_grad. Medians over interleaved rounds; ratios are "
    "medians of the ratios within a round, q1 and q3 their quartiles. CPU ms: processor time of all threads. frozen: "
    "the layers without an adapter, with the gradient of the input only. In bf16 the ratio is to the LoRA with "
    "bfloat16 parameters, where that ran."
)

# --- plots ----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a result file.

    Raises:
        SystemExit: there is no such file, or it is not one of this script.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    needed = {"curve", "quantity", "method", "to_lora", "to_lora_q1", "to_lora_q3", "device_name"}
    if not rows or not needed <= rows[0].keys():
        raise SystemExit(f"{path} is not a CSV file that benchmarks/scaling.py wrote")
    return rows


def draw(path: Path, folder: Path, tag: str = "") -> list[Path]:
    """One picture per curve and dtype from a CSV file: time over LoRA's, with the band between the quartiles.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = [row for row in read_rows(path) if not row["error"] and row["to_lora"]]
    kinds = dict.fromkeys((row["curve"], row["dtype"], row["device"]) for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for curve, dtype, device in kinds:
        chosen = [row for row in rows if (row["curve"], row["dtype"]) == (curve, dtype)]
        parts = ["scaling", curve, device, *([dtype] if dtype != "fp32" else []), *([slug(tag)] if tag else [])]
        paths.append(folder / ("_".join(parts) + ".png"))
        draw_curve(curve, chosen, paths[-1])
    return paths


COLOURS = {"frozen": "tab:gray", "dora": "tab:orange", "map": "tab:blue", "map-bf16": "tab:cyan"}


def draw_curve(curve: str, rows: list[dict[str, str]], path: Path) -> None:
    """Training on the left, inference on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no window system is asked for
    panels = figure.subplots(1, len(QUANTITIES), sharey=True)
    for panel, (quantity, title) in zip(panels, QUANTITIES.items(), strict=True):
        draw_panel(panel, curve, [row for row in rows if row["quantity"] == quantity])
        panel.set_title(title, fontsize=10)
    reference = rows[0]["lora"]
    panels[0].set_ylabel(f"time / time of {reference} (ratio)")
    panels[0].set_ylim(bottom=0)  # of both, and only now: it ends automatic scaling
    panels[0].legend(fontsize=9)
    first = rows[0]
    fixed = ", ".join(f"{axis} {first[axis]}" for axis in AXES if axis != curve)
    figure.suptitle(f"{first['device_name']}, torch {first['torch']}, {first['dtype']}; {fixed}", fontsize=10)
    figure.savefig(path, dpi=90)


def draw_panel(panel: Any, curve: str, rows: list[dict[str, str]]) -> None:
    """A line and its band per method, and the line at 1 that is LoRA."""
    panel.axhline(1.0, color="black", linewidth=1, linestyle="--", label="LoRA")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: int(row[curve]))
        if method == points[0]["lora"]:
            continue
        x = [int(row[curve]) for row in points]
        middle, low, high = ([float(row[key] or "nan") for row in points] for key in _BAND)
        (line,) = panel.plot(x, middle, marker="o", markersize=3, label=method, color=COLOURS.get(method))
        panel.fill_between(x, low, high, alpha=0.2, linewidth=0, color=line.get_color())
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel(AXES[curve])
    panel.grid(alpha=0.3)


_BAND = ("to_lora", "to_lora_q1", "to_lora_q3")
_INSTALL = "no plots: matplotlib is not installed (pip install matplotlib, or mapsurgery[plots])"

# --- command line ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, repeats=25, rank=False)
    parser.add_argument("--curves", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--methods", nargs="+", choices=APPLY, help="default: all that make sense for the dtype")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="of the layers; one or several")
    parser.add_argument("--size", choices=["tiny", "full"], default="full", help="tiny: to see that it runs")
    parser.add_argument("--min-ms", type=float, default=2.0, help="least time of one measurement (default 2 ms)")
    parser.add_argument(
        "--point-seconds",
        type=float,
        default=10.0,
        help=f"rounds at a point end after this, but not before {FEWEST_ROUNDS}; where these take more than twice as "
        "long, the curve ends (default 10)",
    )
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of the plots (default benchmarks/plots)")
    parser.add_argument("--plot-only", type=Path, metavar="CSV", help="measure nothing, plot these results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a method failed at a point."""
    arguments = parse(argv)
    if arguments.plot_only:
        try:
            print_paths(draw(arguments.plot_only, arguments.plots, arguments.tag))
        except ModuleNotFoundError:
            raise SystemExit(_INSTALL) from None
        return 0
    device, run = start(arguments, repeats=arguments.repeats)
    rows: list[Row] = []
    notes = NOTES
    points = curves(device, arguments.size == "tiny")
    for dtype in arguments.dtype:
        methods = arguments.methods or default_methods(dtype)
        for curve in arguments.curves:
            for point in points[curve]:
                found, too_long = run_point(curve, point, dtype, methods, device, arguments)
                rows += found
                fixed = ", ".join(f"{name} {value}" for name, value in vars(point).items())
                hidden = ("curve", "dtype", *vars(point))
                columns = {key: head for key, head in COLUMNS.items() if key not in hidden}
                print(table(f"{curve}, {dtype}: {fixed}", found, columns), flush=True)
                free_memory(device)
                if too_long and point is not points[curve][-1]:
                    left_out = f"The curve over {curve} in {dtype} ends at {getattr(point, curve)}: its time was over."
                    print(left_out)
                    notes += " " + left_out
                    break
            paths = write_results(arguments.out, "scaling", arguments.tag, rows, COLUMNS, run, notes)
    if any(row.get("to_lora") for row in rows):
        try:
            paths += draw(paths[0], arguments.plots, arguments.tag)
        except ModuleNotFoundError:
            print(_INSTALL, file=sys.stderr)
    else:
        print("no plots: they compare with LoRA, which did not run", file=sys.stderr)
    print_paths(paths)
    return int(any(row["error"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
