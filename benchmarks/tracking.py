"""What `mapsurgery.track` costs: a training step with and without a record of it.

    python benchmarks/tracking.py --threads 1                              # small models on this machine's device
    python benchmarks/tracking.py --models llama_8b --device cuda

Models and steps are those of train_step.py. The variants take turns in every round on one model; benchmarks/README.md
explains them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from common import (
    Row,
    Stamps,
    free_memory,
    iqr,
    make_parser,
    median,
    paired_ratio,
    positive,
    print_paths,
    start,
    table,
    write_results,
)
from train_step import Candidate, make_candidate, prepare_candidate
from workloads import WORKLOADS, make_base, seeded

import mapsurgery
from mapsurgery import MEASURES

NEVER = 2**62
WITHOUT_RANK = [name for name in MEASURES if name != "effective_rank"]
VARIANTS: dict[str, tuple[int, Sequence[str]] | None] = {
    "no tracker": None,
    "between records": (NEVER, tuple(MEASURES)),
    "alpha, beta": (1, ("alpha", "beta")),
    "no effective rank": (1, WITHOUT_RANK),
    "all": (1, tuple(MEASURES)),
}
"""Steps from one record to the next, and what is recorded."""


def measure(candidate: Candidate, tracker: mapsurgery.Tracker | None) -> tuple[float, float]:
    """Milliseconds of one training step with its tracker, and of the tracker's part."""
    stamps = Stamps(candidate.device)
    if candidate.device.type == "cuda":
        torch.cuda.synchronize()
    stamps.mark()
    candidate.step()
    stamps.mark()
    if tracker is not None:
        tracker.update()
    stamps.mark()
    step, update = stamps.milliseconds()
    return step + update, update


def run_model(name: str, device: torch.device, arguments: argparse.Namespace) -> list[Row]:
    """All variants on one model."""
    workload = WORKLOADS[name]
    batch = arguments.batch or (workload.cuda_batch if device.type == "cuda" else workload.cpu_batch)
    base = make_base(workload, workload.size, "fp32", device)
    with seeded():
        loss = workload.data(batch, workload.size, torch.float32, device)
    candidate = make_candidate("map", base, workload, loss, "fp32", arguments)
    prepare_candidate(candidate, warmup=1)
    trackers = {
        variant: None if options is None else mapsurgery.track(candidate.model, options[0], measures=options[1])
        for variant, options in VARIANTS.items()
    }
    for tracker in trackers.values():
        if tracker is not None:
            tracker.update()  # the first step, which every tracker records
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    updates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    order = list(VARIANTS)
    for index in range(arguments.repeats):
        for offset in range(len(order)):  # another one starts each round
            variant = order[(index + offset) % len(order)]
            whole, update = measure(candidate, trackers[variant])
            times[variant].append(whole)
            updates[variant].append(update)
    plain = times["no tracker"]
    layers = len(mapsurgery.report(candidate.model).layers)
    about = {"model": name, "layers": layers, "rank": arguments.rank, "batch": batch}
    return [
        {
            **about,
            "variant": variant,
            "step_ms": median(times[variant]),
            "iqr_ms": iqr(times[variant]),
            "to_plain": paired_ratio(times[variant], plain),
            "update_ms": median(updates[variant]),
            "percent_100": median(updates[variant]) / median(plain),  # times 100 for percent, by 100 steps
        }
        for variant in VARIANTS
    ]


COLUMNS = {
    "model": "model",
    "layers": "adapted layers",
    "batch": "batch",
    "rank": "rank",
    "variant": "recorded in each step",
    "step_ms": "step ms",
    "iqr_ms": "iqr",
    "to_plain": "/ no tracker",
    "update_ms": "update ms",
    "percent_100": "computed: % if every 100 steps",
}
NOTES = (
    "One step is forward, backward, AdamW and the tracker's update; medians of the rounds, and of the ratios within a "
    "round. The last column is (update ms) / (step ms without a tracker): the percentage of one record in a hundred "
    "steps."
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, repeats=15)
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=["vit_small", "llama_tiny"])
    parser.add_argument("--batch", type=positive, help="samples (default: the model's own)")
    arguments = parser.parse_args(argv)
    arguments.checkpoint = arguments.compile = False
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse(argv)
    device, run = start(arguments)
    rows: list[Row] = []
    for name in arguments.models:
        rows += run_model(name, device, arguments)
        free_memory(device)
    print(table("cost of tracking", rows, COLUMNS))
    paths = write_results(arguments.out, "tracking", arguments.tag, rows, COLUMNS, run, NOTES)
    print_paths(paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
