"""What the benchmarks share: command line, the run's description, time stamps, statistics, tables and result files.

Only public functions of mapsurgery are used, so that ab.py can run two versions of it from here.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mapsurgery

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def make_parser(doc: str | None, repeats: int | None = None, rank: bool = True) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has.

    Args:
        doc: docstring of the script.
        repeats: default of --repeats; without it there is no such option.
        rank: whether there is --rank; not where a script chooses the ranks itself.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    if rank:
        parser.add_argument("--rank", type=positive, default=8, help="rank of the adapters (default 8)")
    if repeats is not None:
        parser.add_argument("--repeats", type=positive, default=repeats, help=f"rounds (default {repeats})")
    parser.add_argument("--threads", type=positive, help="threads of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--tf32", action="store_true", help="CUDA: float32 products in TF32 (default: not)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--tag", default="", help="added to the names of the result files")
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on, as an option's type.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def prepare(arguments: argparse.Namespace) -> torch.device:
    """Apply the common options.

    Raises:
        SystemExit: CUDA was asked for and is not there.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    torch.backends.cudnn.allow_tf32 = arguments.tf32
    torch.manual_seed(0)
    return torch.device(arguments.device)


def allow_many_compilations() -> None:
    """torch.compile goes back to eager in silence after 8 variants of one function: raise the limit, and fail at it."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def free_memory(device: torch.device) -> None:
    """Collect garbage and hand cached device memory back, so that one model does not weigh on the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def randomise_zeros(model: nn.Module) -> None:
    """As in the middle of training: no factor is zero, so none of its products can be left out."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.uniform_(-0.01, 0.01)


LR = 1e-4
"""Of every benchmark's AdamW."""


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer | None:
    """AdamW on what the model trains; None where that is nothing.

    Layers take its step between timed calls, so that no call sees the numbers of the one before: a library that
    compiles a kernel for each new number would look quick where they stand still.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # fused: else most of a step is Python's loop over the parameters.
    return torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True) if trained else None


# --- the run's description ------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def native_state(device: torch.device) -> str:
    """Whether native kernels run the operators on this device, in words."""
    info = mapsurgery.native_info()
    loaded = info.cuda if device.type == "cuda" else info.cpu
    return "native" if loaded else f"pure torch ({info.error or f'no native {device.type} library'})"


def native_details() -> dict[str, Any]:
    """How the native libraries were built. Not where they lie: whose folders these are is nobody's business."""
    return {name: value for name, value in asdict(mapsurgery.native_info()).items() if not name.endswith("_library")}


def describe_run(device: torch.device) -> dict[str, Any]:
    """Everything needed to tell one result file from another."""
    # The same of where the results went.
    options = re.sub(r"--out[ =]\S+\s?", "", shlex.join(sys.argv[1:])).strip()
    run: dict[str, Any] = {
        "device": device.type,
        "device_name": device_name(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {options}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("peft", "timm", "transformers", "mapsurgery")},
        "kernels": native_state(device),
        "native": native_details(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        run |= {"cuda": torch.version.cuda, "multiprocessors": properties.multi_processor_count}
    return run


# --- time -----------------------------------------------------------------------------------------------------------


class Stamps:
    """Moments of one measurement: CUDA events on a GPU, the host's clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.moments: list[Any] = []

    def mark(self) -> None:
        """Note the present moment (of the device's queue, on a GPU)."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each mark and the next; waits for the device."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if self.cuda:
            torch.cuda.synchronize()
            return [first.elapsed_time(second) for first, second in pairs]
        return [1e3 * (second - first) for first, second in pairs]


def median(values: Iterable[float]) -> float:
    """Median; NaN of nothing."""
    values = list(values)
    return statistics.median(values) if values else float("nan")


def iqr(values: Sequence[float]) -> float:
    """Distance between the quartiles: how far repetitions spread. NaN of fewer than two."""
    if len(values) < 2:
        return float("nan")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of value / base of the same round: what slows a whole round drops out."""
    return median(value / other for value, other in zip(values, base, strict=True))


# --- output ---------------------------------------------------------------------------------------------------------


def _cell(value: Any) -> Any:
    """A value for people: '-' where there is none."""
    return "-" if value is None or value != value else value


def table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows as text; `columns` maps keys to headings, and columns without any value are left out."""
    from mapsurgery.tables import render  # here: private, so a worker of ab.py must not need it

    used = {key: head for key, head in columns.items() if any(_cell(row.get(key)) not in ("-", "") for row in rows)}
    return render(title, list(used.values()), [[_cell(row.get(key)) for key in used] for row in rows])


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table, with headings and empty columns as in `table`."""
    used = {key: head for key, head in columns.items() if any(_cell(row.get(key)) not in ("-", "") for row in rows)}

    def text(value: Any) -> str:
        value = _cell(value)
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    lines = [list(used.values()), ["---"] * len(used), *[[text(row.get(key)) for key in used] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def slug(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and value != value else value


def write_results(
    folder: Path, name: str, tag: str, rows: Sequence[Row], columns: Mapping[str, str], run: dict[str, Any], notes: str
) -> list[Path]:
    """Write NAME_DEVICE_TORCH[_TAG].csv, .json and .md, each complete in itself; files of that name are replaced.

    Returns:
        Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [name, slug(run["device_name"]), slug(run["torch"]), *([slug(tag)] if tag else [])]
    stem = folder / "_".join(parts)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".csv", ".json", ".md")]
    rows = [{key: _plain(value) for key, value in row.items()} for row in rows]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    context = {key: run[key] for key in ("device_name", "torch", "kernels", "date", "command")}
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, [*keys, *context])
        writer.writeheader()
        writer.writerows({**row, **context} for row in rows)
    paths[1].write_text(json.dumps({"run": run, "notes": notes, "rows": rows}, indent=1) + "\n")
    about = "\n".join(f"- {key}: {value}" for key, value in run.items())
    paths[2].write_text(f"# {name}\n\n{markdown(rows, columns)}\n\n{notes}\n\n{about}\n")
    return paths


def start(arguments: argparse.Namespace, **about: Any) -> tuple[torch.device, dict[str, Any]]:
    """Apply the common options and print what the run depends on.

    Returns:
        The device, and the run's description with `about` added to it.
    """
    device = prepare(arguments)
    run = describe_run(device) | about
    print(describe(run), flush=True)
    return device, run


def print_paths(paths: Iterable[Path]) -> None:
    """Say where the results are."""
    print("\n".join(f"wrote {path}" for path in paths))


def describe(run: Mapping[str, Any]) -> str:
    """The run in a few lines, for the terminal."""
    packages = ", ".join(f"{name} {run[name]}" for name in ("torch", "mapsurgery", "peft", "timm", "transformers"))
    load = "/".join(map(str, run["load_average"]))
    return f"{run['device_name']}, {run['threads']} threads, load {load}\n{packages}\nkernels: {run['kernels']}"
