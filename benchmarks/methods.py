"""MAP over several update families beside LoRA, DoRA and DeLoRA: the same search of the learning rate for each.

    python benchmarks/methods.py run vision                        # trains what results/methods.csv lacks; resumable
    python benchmarks/methods.py run text --sst2 FOLDER --methods peft-lora map --seeds 5
    python benchmarks/methods.py time vision                       # time and memory of a step, methods in turns
    python benchmarks/methods.py table                             # prints, writes results/methods.md and the plots

Every method adapts the same layers, trained by the same loop on the same batches (comparison/training.py); the head's
learning rate is the task's, the adapter's alone is searched. It is chosen on validation data by the mean over the
seeds, and the score is that of test data. benchmarks/README.md explains tasks, names and columns.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from common import device_name, markdown, table
from comparison import adapters, plots
from comparison.summary import Summary, Trial, kept, summarise, unequal_search
from comparison.task import Options, Task
from comparison.tasks import TASKS
from comparison.timing import time_methods
from comparison.training import train_once

FOLDER = Path(__file__).resolve().parent
KEY = ("task", "method", "lr", "seed", "setting")
"""Columns that tell one training from another."""
FIELDS = (*KEY, "validation", "test", "trained", "loss", "diverged", "seconds", "environment")
TIME_FIELDS = (
    *("task", "method", "setting", "trained", "step_ms", "iqr_ms", "to_lora", "saved_mib", "state_mib", "rounds"),
    "environment",
)
Row = Mapping[str, str]


# --- files ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a results file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, fields: Sequence[str], row: Mapping[str, object]) -> None:
    """Add a row to a results file in one write, so that several processes may share it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def write(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Replace a results file; whoever reads it meanwhile sees the old one or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def environment(device: torch.device) -> str:
    """What else the numbers depend on."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "peft"))
    return f"{device_name(device)}, {torch.get_num_threads()} threads, {packages}"


# --- run and time ---------------------------------------------------------------------------------------------------


def load_task(args: argparse.Namespace) -> Task:
    """The task, after its methods' names have been checked."""
    if args.threads:
        torch.set_num_threads(args.threads)
    task = TASKS[args.task].load(Options(torch.device(args.device), args.sst2, args.commonsense, args.cache))
    model = task.model()
    for method in args.methods:
        adapters.check_method(model, method, task.targets)
    return task


def run(args: argparse.Namespace) -> None:
    """Train what is not in the results file yet, and append each outcome at once."""
    train_missing(load_task(args), args.methods, args.lrs, args.seeds, args.results / "methods.csv", args.device)


def train_missing(
    task: Task, methods: Sequence[str], lrs: Sequence[float], seeds: int, path: Path, device: str = "cpu"
) -> None:
    """All seeds of the grid, the first seed of every method first: an interrupted search is as fair as it can be."""
    done = {tuple(row[name] for name in KEY) for row in read(path)}
    about = environment(torch.device(device))
    for seed in range(seeds):
        for method in methods:
            for lr in adapters.learning_rates(method, lrs):
                key = (task.name, method, f"{lr:g}", str(seed), task.setting)
                if key not in done:
                    append(path, FIELDS, dict(zip(KEY, key, strict=True)) | _outcome(task, method, lr, seed, about))
                    done.add(key)


def _outcome(task: Task, method: str, lr: float, seed: int, about: str) -> dict[str, object]:
    start = time.perf_counter()
    outcome = train_once(task, method, lr, seed)
    seconds = time.perf_counter() - start
    print(
        f"{task.name} {method} lr {lr:g} seed {seed}: validation {outcome.validation:.4f}, test {outcome.test:.4f}, "
        f"loss {outcome.loss:.3f}, {seconds:.1f} s",
        flush=True,
    )
    return {
        "validation": f"{outcome.validation:.5f}",
        "test": f"{outcome.test:.5f}",
        "trained": outcome.trained,
        "loss": f"{outcome.loss:.4f}",
        "diverged": int(outcome.diverged),
        "seconds": f"{seconds:.1f}",
        "environment": about,
    }


def measure(args: argparse.Namespace) -> None:
    """Time the methods of a task and replace its rows in the file of times."""
    task, path = load_task(args), args.results / "methods_time.csv"
    about = {"environment": environment(torch.device(args.device))}
    rows = [row | about for row in time_methods(task, args.methods, args.rounds)]
    write(path, TIME_FIELDS, [*(row for row in read(path) if row["task"] != task.name), *rows])
    print(table(task.setting, rows, {name: name for name in TIME_FIELDS[1:] if name not in ("setting", "environment")}))


# --- table ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "method": "method",
    "score": "score at the chosen lr",
    "lr": "chosen lr",
    "worst": "worst over the grid",
    "mean": "mean over the grid",
    "kept": "gain kept",
    "diverged": "diverged",
    "trained": "trained",
    "time": "time / LoRA",
    "saved": "saved MiB",
}
NOTES = f"""\
Scores are mean ± standard deviation over the seeds, on test data; the learning rate is the one with the highest mean
score on validation data († at an end of the grid). *worst* and *mean* are of the curve of mean test score over the
logarithm of the learning rate, over the whole grid; *gain kept* is the mean gain over `{adapters.FROZEN}` as a share
of the gain at the chosen rate: 1 is a flat curve. *trained* are the adapter's parameters, without the head; *time* is
the median ratio of a step to `{adapters.REFERENCE}`'s of the same round; *saved* what autograd holds between forward
and backward."""


def table_of(trials: list[Trial], times: Mapping[str, Row]) -> tuple[list[Summary], list[dict[str, object]]]:
    """Summaries of one task's trials, and a row of the table for each."""
    summaries = summarise(trials)
    base = next((summary.best.mean for summary in summaries if summary.method == adapters.FROZEN), math.nan)
    return summaries, [_row(summary, base, times.get(summary.method, {})) for summary in summaries]


def _row(summary: Summary, base: float, timed: Row) -> dict[str, object]:
    row: dict[str, object] = {
        "method": summary.method,
        "score": f"{summary.best.mean:.3f} ± {summary.best.spread:.3f}",
        "trained": summary.trained,
        "time": timed.get("to_lora"),
        "saved": timed.get("saved_mib"),
    }
    if summary.method == adapters.FROZEN:
        return row
    return row | {
        "lr": f"{summary.best.lr:g}{' †' if summary.at_edge else ''}",
        "worst": f"{summary.worst:.3f}",
        "mean": f"{summary.area:.3f}",
        "kept": f"{kept(summary, base):.2f}",
        "diverged": f"{summary.diverged} of {sum(len(point.test) for point in summary.points)}",
    }


def curve_rows(summaries: Iterable[Summary]) -> tuple[list[dict[str, object]], dict[str, str]]:
    """The numbers of the plot: a row per method, its learning rates from the lowest to the highest."""
    rows: list[dict[str, object]] = []
    for summary in summaries:
        if summary.method != adapters.FROZEN:
            cells = {str(i): f"{p.lr:g}: {p.mean:.3f} ± {p.spread:.3f}" for i, p in enumerate(summary.points)}
            rows.append({"method": summary.method, **cells})
    width = max((len(row) - 1 for row in rows), default=0)
    return rows, {"method": "method", **{str(i): f"lr {i + 1}: score" for i in range(width)}}


def section(task: str, rows: list[Row], times: list[Row], folder: Path) -> str:
    """The part of the page about one task: prints its table, draws its plot.

    Raises:
        SystemExit: the rows are of several settings, which cannot be compared; or matplotlib is not installed.
    """
    settings = sorted({row["setting"] for row in rows})
    if len(settings) > 1:
        raise SystemExit(
            f"methods.csv has {task} in several settings; remove the rows of all but one:\n" + "\n".join(settings)
        )
    kind, trials = TASKS[task], [Trial.read(row) for row in rows]
    timed = {row["method"]: row for row in times if row["setting"] == settings[0]}
    summaries, body = table_of(trials, timed)
    curve, heads = curve_rows(summaries)
    unequal = unequal_search(summaries)
    print(table(f"{kind.title}: {kind.measure}", body, COLUMNS), table("", curve, heads), unequal, sep="\n")
    plot = folder.parent / "plots" / f"methods_{task}.png"
    try:
        plots.draw(summaries, f"{kind.title}; {settings[0]}", kind.measure, plot)
    except ModuleNotFoundError:
        raise SystemExit(
            "no plots: matplotlib is not installed (pip install matplotlib, or mapsurgery[plots])"
        ) from None
    about = "; ".join(sorted({row["environment"] for row in (*rows, *timed.values())}))
    search = " and ".join(
        sorted({"{} rates x {} seeds".format(*s.search) for s in summaries if s.method != adapters.FROZEN})
    )
    return "\n\n".join(
        part
        for part in (
            f"## {kind.title}",
            f"{kind.measure}; {settings[0]}; rank {adapters.RANK}; {search}. {about}.",
            unequal,
            markdown(body, COLUMNS),
            f"![{kind.measure} over the learning rate](../plots/{plot.name})",
            markdown(curve, heads),
        )
        if part
    )


def show(args: argparse.Namespace) -> None:
    """Print the tables, write the page and the plots."""
    rows, times = read(args.results / "methods.csv"), read(args.results / "methods_time.csv")
    if not rows:
        raise SystemExit(f"{args.results / 'methods.csv'} has no results: python benchmarks/methods.py run TASK")
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    sections = [
        section(task, [r for r in rows if r["task"] == task], [t for t in times if t["task"] == task], args.results)
        for task in tasks
    ]
    page = ["# Methods", "Printed by `python benchmarks/methods.py table`.", NOTES, *sections]
    (args.results / "methods.md").write_text("\n\n".join(page) + "\n")


# --- command line ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("run", help="train the grid of one task")
    trainer.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    trainer.add_argument(
        "--lrs",
        type=float,
        nargs="+",
        default=list(adapters.LEARNING_RATES),
        help="learning rates, of which each method gets its multiples (default %(default)s)",
    )
    timer = commands.add_parser("time", help="time a training step of each method")
    timer.add_argument("--rounds", type=int, default=9)
    for command, action in ((trainer, run), (timer, measure)):
        command.set_defaults(action=action)
        command.add_argument("task", choices=TASKS)
        command.add_argument("--methods", nargs="+", default=list(adapters.DEFAULT_METHODS), help="default %(default)s")
        command.add_argument("--sst2", type=Path, help="folder of SST-2's tab-separated files (task text)")
        command.add_argument("--commonsense", type=Path, help="folder of ARC-Easy's JSON files (task commonsense)")
        command.add_argument(
            "--cache", type=Path, default=Path("outputs"), help="folder of trained base models (diffusion)"
        )
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--threads", type=int, help="threads of torch on the CPU (default: torch's own choice)")
    shower = commands.add_parser("table", help="print and write the tables and plots")
    shower.set_defaults(action=show)
    for command in (trainer, timer, shower):
        command.add_argument(
            "--results", type=Path, default=FOLDER / "results", help="folder (default benchmarks/results)"
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Carry out one of the commands."""
    args = parse(argv)
    args.action(args)


if __name__ == "__main__":
    main()
