"""What operations on whole models cost: patch, merge, save and their inverses, beside peft's and the memory's speed.

    python benchmarks/surgery.py                              # a Llama of 1e9 parameters in bfloat16, 2 GB
    python benchmarks/surgery.py --size small --repeats 2     # seconds
    python benchmarks/surgery.py --size 8b --device cuda

Weights are random and the model never runs. benchmarks/README.md explains operations and columns.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from common import (
    Row,
    free_memory,
    iqr,
    make_parser,
    median,
    paired_ratio,
    print_paths,
    randomise_zeros,
    start,
    table,
    write_results,
)
from torch import Tensor, nn
from train_step import METHODS, MIB
from workloads import llama, seeded, share_weights

import mapsurgery

# width, inner width, layers, heads, heads of keys and values
SHAPES = {
    "small": (256, 688, 4, 4, 4),
    "1b": (2048, 8192, 16, 32, 8),  # the blocks of Llama 3.2 1B
    "8b": (4096, 14336, 32, 32, 8),  # the blocks of Llama 3 8B
    "70b": (8192, 28672, 80, 64, 8),  # the blocks of Llama 3 70B, on meta only
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = "layers.*"

# --- the model ------------------------------------------------------------------------------------------------------


def meta_llama(size: str, dtype: torch.dtype) -> nn.Module:
    """The blocks of a Llama without memory."""
    with torch.device("meta"):
        return llama(*SHAPES[size], 32).to(dtype).requires_grad_(False)


def random_llama(size: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same with random weights; those of equal shape are equal, as random numbers take longer than their copies."""
    model = meta_llama(size, dtype).to_empty(device=device)
    values: dict[torch.Size, Tensor] = {}
    with seeded(), torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape not in values:
                values[parameter.shape] = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
            parameter.copy_(values[parameter.shape])
    return model


def adapted_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that every method adapts."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("layers.")}


# --- measuring ------------------------------------------------------------------------------------------------------


def _resident(name: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its peak) of this process, on Linux."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, name
    return 1024 * int(found.group(1))


def start_peak(device: torch.device) -> int | None:
    """Forget the peak so far. Returns bytes held now; None where the system tells no peak (only Linux does)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: freed memory must not pass for memory in use
    try:
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        return _resident("VmRSS")
    except OSError:
        return None


def peak_since(before: int | None, device: torch.device) -> int | None:
    """Bytes of the highest point above what `start_peak` found."""
    if before is None:
        return None
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")) - before


@dataclass
class Operation:
    """What was measured of one operation.

    Attributes:
        passed: bytes of weights that must be read and written.
        times, processor_times: seconds, one per round. peaks: bytes above the start, where known.
    """

    name: str
    method: str
    passed: int
    times: list[float] = field(default_factory=list)
    processor_times: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)

    def run(self, function: Callable[[], object], device: torch.device) -> None:
        """Measure it once."""
        before = start_peak(device)
        start, processor = time.perf_counter(), time.process_time()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - start)
        self.processor_times.append(time.process_time() - processor)
        self.peaks.append(peak_since(before, device))


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The least time of a few calls after a first one."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bandwidths(device: torch.device, megabytes: int) -> dict[str, float]:
    """GB/s of a sum (reading) and of a copy (reading and writing) of a tensor too large for the caches."""
    source = torch.ones(megabytes * MIB // 4, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / seconds(source.sum, device)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), device)
    return {"read_gbs": read / 1e9, "copy_gbs": copied / 1e9}


# --- the operations -------------------------------------------------------------------------------------------------


def _each_peft_layer(model: nn.Module, action: str) -> None:
    """peft's `merge` or `unmerge` of every layer, which is what its merge_adapter does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            getattr(module, action)()


class Operations:
    """All operations on one model, round by round."""

    def __init__(self, base: nn.Module, rank: int, folder: Path, device: torch.device) -> None:
        self.base, self.rank, self.device = base, rank, device
        self.targets = list(adapted_layers(base))
        self.weights = sum(layer.weight.nbytes for layer in adapted_layers(base).values())
        self.file = folder / "adapter.safetensors"
        self.measured: dict[tuple[str, str], Operation] = {}

    def measure(self, name: str, method: str, passes: int, function: Callable[[], object]) -> None:
        """`function` once more; passes: how often it must go over the weights."""
        operation = self.measured.setdefault((name, method), Operation(name, method, passes * self.weights))
        operation.run(function, self.device)

    def map(self) -> None:
        """This library's, in a circle: the model is in the end what it was, up to the rounding of `unmerge`.

        That rounding comes last, because `load` refuses a base whose norm is not the one the adapter was saved for.
        """
        model, measure = self.base, partial(self.measure, method="map")
        measure("patch", passes=1, function=lambda: mapsurgery.patch(model, TARGETS, rank=self.rank))
        randomise_zeros(model)
        measure("save", passes=0, function=lambda: mapsurgery.save(model, self.file))
        measure("unpatch", passes=0, function=lambda: mapsurgery.unpatch(model))
        measure("load", passes=1, function=lambda: mapsurgery.load(model, self.file))
        measure("merge", passes=2, function=lambda: mapsurgery.merge(model))
        measure("unmerge", passes=2, function=lambda: mapsurgery.unmerge(model))
        mapsurgery.unpatch(model)

    def peft(self, method: str) -> None:
        """peft's on new modules with the same weights. Patching reads them for DoRA only, for norms of rows."""
        model = share_weights(self.base)
        apply = partial(METHODS[method], model, self.targets, self.rank)
        self.measure("patch", method, int(method == "dora"), apply)
        randomise_zeros(model)
        self.measure("merge", method, 2, partial(_each_peft_layer, model, "merge"))
        self.measure("unmerge", method, 2, partial(_each_peft_layer, model, "unmerge"))

    def round(self, methods: list[str]) -> None:
        """All operations of these methods once."""
        for method in methods:
            if method == "map":
                self.map()
            else:
                self.peft(method)
            free_memory(self.device)

    def rows(self, speeds: dict[str, float]) -> list[Row]:
        """The results so far, in units for people."""
        return [self._row(operation, speeds) for operation in self.measured.values()]

    def _row(self, operation: Operation, speeds: dict[str, float]) -> Row:
        peaks = [peak for peak in operation.peaks if peak is not None]
        lora = self.measured.get((operation.name, "lora"))
        row: Row = {"operation": operation.name, "method": operation.method, "rank": self.rank}
        row |= {"layers": len(self.targets), "ms": 1e3 * median(operation.times)}
        row |= {"iqr_ms": 1e3 * iqr(operation.times), "peak_mib": max(peaks) / MIB if peaks else None}
        row["to_lora"] = paired_ratio(operation.times, lora.times) if lora else None
        row["processor_ms"] = 1e3 * median(operation.processor_times)
        if operation.passed:
            row["gbs"] = operation.passed / median(operation.times) / 1e9
            row["of_memory"] = row["gbs"] / speeds["read_gbs" if operation.passed == self.weights else "copy_gbs"]
        return row


def run_operations(
    base: nn.Module, speeds: dict[str, float], arguments: argparse.Namespace, device: torch.device
) -> list[Row]:
    """Interleaved rounds of all methods, after one on a small model, in which they import what they need."""
    with tempfile.TemporaryDirectory() as folder:
        small = Operations(random_llama("small", DTYPES[arguments.dtype], device), 8, Path(folder), device)
        operations = Operations(base, arguments.rank, Path(folder), device)
        small.round(arguments.methods)
        for _ in range(arguments.repeats):
            operations.round(arguments.methods)
        return operations.rows(speeds)


# --- files ----------------------------------------------------------------------------------------------------------


def file_settings(blocks: int) -> list[tuple[int, int]]:
    """(blocks adapted, rank): some of the blocks at one rank, and all of them at several."""
    return [(blocks // 4, 8), (blocks // 2, 8), (blocks, 2), (blocks, 8), (blocks, 32), (blocks, 128)]


def run_files(base: nn.Module, blocks: int, rank: int, repeats: int, device: torch.device) -> list[Row]:
    """Writing and reading an adapter of the first blocks: time, and bytes in the file."""
    targets = [f"layers.{i}.*" for i in range(blocks)]
    mapsurgery.patch(base, targets, rank=rank)
    adapted = [m for m in base.modules() if isinstance(m, mapsurgery.AdaptedLayer)]
    parameters = sum(p.numel() for p in base.parameters() if p.requires_grad)
    save, load = Operation("save", "map", 0), Operation("load", "map", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        for _ in range(repeats):
            save.run(lambda: mapsurgery.save(base, path), device)
            mapsurgery.unpatch(base)
            load.run(lambda: mapsurgery.load(base, path), device)
        size = path.stat().st_size
    mapsurgery.unpatch(base)
    about: Row = {"method": "map", "rank": rank, "layers": len(adapted), "parameters": parameters, "file_bytes": size}
    return [
        {
            "operation": operation.name,
            **about,
            "ms": 1e3 * median(operation.times),
            "iqr_ms": 1e3 * iqr(operation.times),
            "file_mbs": size / median(operation.times) / 1e6,
        }
        for operation in (save, load)
    ]


# --- models without memory ------------------------------------------------------------------------------------------


def run_meta(size: str, dtype: torch.dtype, methods: list[str], rank: int, repeats: int) -> list[Row]:
    """Patching a model on meta: what is left without weights is the work on modules and names."""
    rows = []
    for method in methods:
        operation = Operation(f"patch of {size} on meta", method, 0)
        for _ in range(repeats):
            model = meta_llama(size, dtype)
            layers = list(adapted_layers(model))
            targets = TARGETS if method == "map" else layers  # peft's patterns are regular expressions
            operation.run(partial(METHODS[method], model, targets, rank), torch.device("cpu"))
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row: Row = {"operation": operation.name, "method": method, "rank": rank, "layers": len(layers)}
        rows.append(row | {"parameters": parameters, "ms": 1e3 * median(operation.times)})
    return rows


COLUMNS = {
    "operation": "operation",
    "method": "method",
    "layers": "layers",
    "rank": "rank",
    "parameters": "trained",
    "ms": "ms",
    "iqr_ms": "IQR",
    "to_lora": "x LoRA",
    "processor_ms": "CPU ms",
    "gbs": "GB/s",
    "of_memory": "of memory's",
    "peak_mib": "peak MiB",
    "file_bytes": "file bytes",
    "file_mbs": "file MB/s",
}
NOTES = (
    "Medians over rounds in which the methods take turns; x LoRA is the median of the ratios in a round. CPU ms: "
    "processor time of all threads, which other programs disturb less. GB/s: bytes of adapted weights that the "
    "operation must read and write (patch and load: once read; merge and unmerge: read and written), over its time; of "
    "memory's: this over the speed of a sum or of a copy of a large tensor. peak: highest memory above that before the "
    "operation, the new adapters included (CPU: resident set of the process, Linux only). peft's LoRA reads no weight "
    "when it patches. load checks the base by its norms, which reads it once."
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--size", choices=[s for s in SHAPES if s != "70b"], default="1b", help="default 1b")
    parser.add_argument("--meta-size", choices=SHAPES, help="the model on meta (default 70b, with --size small small)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default bf16)")
    parser.add_argument("--methods", nargs="+", choices=["lora", "dora", "map"], default=["lora", "dora", "map"])
    arguments = parser.parse_args(argv)
    arguments.meta_size = arguments.meta_size or ("small" if arguments.size == "small" else "70b")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    arguments = parse(argv)
    (device, run), dtype = start(arguments, repeats=arguments.repeats), DTYPES[arguments.dtype]
    speeds = bandwidths(device, 128 if arguments.size == "small" else 512)
    base = random_llama(arguments.size, dtype, device)
    weights = sum(layer.weight.numel() for layer in adapted_layers(base).values())
    about = {"model": f"llama {arguments.size}", "dtype": arguments.dtype, "adapted_weights": weights}
    run |= about | speeds
    print(f"memory: {speeds['read_gbs']:.1f} GB/s read, {speeds['copy_gbs']:.1f} GB/s read and written in a copy")
    print(f"{about['model']}, {arguments.dtype}: {weights:,} weights in {len(adapted_layers(base))} adapted layers")
    rows = run_operations(base, speeds, arguments, device)
    print(table("operations on the whole model", rows, COLUMNS), flush=True)
    files: list[Row] = []
    if "map" in arguments.methods:
        for blocks, rank in file_settings(SHAPES[arguments.size][2]):
            files += run_files(base, blocks, rank, arguments.repeats, device)
        print(table("adapter files", files, COLUMNS), flush=True)
    del base
    free_memory(device)
    meta = run_meta(arguments.meta_size, dtype, arguments.methods, arguments.rank, arguments.repeats)
    print(table("without memory", meta, COLUMNS), flush=True)
    rows = [{"model": about["model"], "dtype": arguments.dtype, **row} for row in (*rows, *files, *meta)]
    paths = write_results(arguments.out, "surgery", arguments.tag, rows, COLUMNS, run, NOTES)
    print_paths(paths)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
