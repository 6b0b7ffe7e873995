"""One training step (forward, backward, optimiser) of whole models: MAP beside peft's LoRA and DoRA, and the floor.

    python benchmarks/train_step.py                                         # small models on this machine's device
    python benchmarks/train_step.py --models llama_8b vit_base:64 llama_8b:1x1 --dtype bf16 --device cuda

Weights and data are random: neither changes the work. All methods adapt the same layers, share the frozen weights, and
take turns in every round, so that what disturbs one disturbs all. benchmarks/README.md explains methods and columns.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from common import (
    LR,
    Row,
    Stamps,
    allow_many_compilations,
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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from workloads import WORKLOADS, Loss, Model, Workload, make_base, seeded, share_weights

import mapsurgery

MIB = 2**20

# --- methods --------------------------------------------------------------------------------------------------------


class PlainMap(nn.Module):
    """MAP as commonly written: W' = alpha W/||W||_F + beta BA/||BA||_F (arXiv 2505.23094), built whole, by autograd.

    Starts as mapsurgery's "random": A and B random, beta 0. ||W||_F is computed once, which such code often forgets.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight
        columns = weight[0].numel()
        rank = min(rank, weight.shape[0], columns)
        self.A = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.B = nn.Parameter(torch.empty(weight.shape[0], rank, device=weight.device))
        for factor in (self.A, self.B):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        norm = weight.detach().float().norm()
        self.register_buffer("weight_norm", norm)
        self.alpha = nn.Parameter(norm.clone().reshape(1))
        self.beta = nn.Parameter(torch.zeros(1, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        layer, delta = self.layer, self.B @ self.A
        base = layer.weight.flatten(1)
        weight = (self.alpha * base / self.weight_norm + self.beta * delta / delta.norm()).to(layer.weight.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        weight = weight.reshape(layer.weight.shape)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _frozen(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    """The floor: forward, and the gradient at the output of every layer that the others adapt, and nothing else.

    A number that adds zero starts the gradient at the first of these outputs; from there on it flows by itself.
    """
    model.register_parameter("probe", nn.Parameter(torch.zeros(1, device=next(model.parameters()).device)))

    def start_gradient(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        return None if output.requires_grad else output + model.probe.to(output.dtype)

    for name in targets:
        model.get_submodule(name).register_forward_hook(start_gradient)
    return model


def _peft(model: nn.Module, targets: list[str], rank: int, dora: bool = False, widen: bool = True) -> nn.Module:
    """peft's LoRA or DoRA; widen: parameters in float32 whatever the model's dtype, peft's default."""
    from peft import LoraConfig, inject_adapter_in_model

    dtype = torch.float32 if widen else next(model.parameters()).dtype
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=dora)
    model = inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def _delora(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    """peft's DeLoRA, which normalises each rank-1 part of its update."""
    from peft import DeloraConfig, inject_adapter_in_model

    return inject_adapter_in_model(DeloraConfig(r=rank, target_modules=targets), model)


def _lycoris(model: nn.Module, targets: list[str], rank: int, dora: bool = False) -> nn.Module:
    """LyCORIS's locon (LoRA on linear layers and convolutions), or its DoRA."""
    from lycoris import LycorisNetwork

    LycorisNetwork.apply_preset({"target_module": [], "target_name": targets, "use_fnmatch": True})
    ranks = {"lora_dim": rank, "conv_lora_dim": rank, "alpha": 2 * rank, "conv_alpha": 2 * rank}
    network = LycorisNetwork(model, network_module="locon", weight_decompose=dora, **ranks)
    if len(network.loras) != len(targets):
        raise RuntimeError(f"LyCORIS adapted {len(network.loras)} of {len(targets)} layers")
    network.apply_to()
    model.add_module("lycoris", network)
    return model


def _ours(
    model: nn.Module, targets: list[str], rank: int, method: str = "map", dtype: torch.dtype | None = None
) -> nn.Module:
    """This library, with its defaults."""
    return mapsurgery.patch(model, targets, method=method, rank=rank, dtype=dtype)


def _map_plain(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    for name in targets:
        model.set_submodule(name, PlainMap(model.get_submodule(name), rank))
    return model


Apply = Callable[[nn.Module, list[str], int], nn.Module]

METHODS: dict[str, Apply] = {
    "frozen": _frozen,
    "lora": _peft,
    "lora-bf16": partial(_peft, widen=False),
    "dora": partial(_peft, dora=True),
    "map": _ours,
    "map-bf16": partial(_ours, dtype=torch.bfloat16),
    "map-plain": _map_plain,
    "mapsurgery-lora": partial(_ours, method="lora"),
    "mapsurgery-dora": partial(_ours, method="dora"),
    "delora": _delora,
    "lycoris-locon": _lycoris,
    "lycoris-dora": partial(_lycoris, dora=True),
}
# LyCORIS is a package of its own, and DeLoRA knows no convolution.
ON_DEMAND = ("mapsurgery-lora", "mapsurgery-dora", "delora", "lycoris-locon", "lycoris-dora")
DTYPES = ("fp32", "bf16", "autocast-bf16")


def default_methods(dtype: str) -> list[str]:
    """All that differ: narrow adapter parameters only where the model is narrow."""
    return [n for n in METHODS if n not in ON_DEMAND and (dtype == "bf16" or not n.endswith("-bf16"))]


# --- one method on one model ----------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A method on a model, ready to take training steps."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    device: torch.device
    times: list[float] = field(default_factory=list)
    processor_times: list[float] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)
    row: Row = field(default_factory=dict)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self, stamps: Stamps | None = None) -> Tensor:
        """One training step; marks its start, the ends of forward and backward, and its own end."""
        mark = stamps.mark if stamps else (lambda: None)
        mark()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        mark()
        loss.backward()
        mark()
        self.optimizer.step()
        mark()
        return loss.detach()

    def measure(self, steps: int) -> None:
        """One round: time per step over a few steps in a row, which the host may queue ahead on a GPU."""
        stamps = Stamps(self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        processor = time.process_time()
        for _ in range(steps):
            self.step(stamps)
        spans = stamps.milliseconds()
        self.processor_times.append(1e3 * (time.process_time() - processor) / steps)
        self.times.append(sum(spans) / steps)
        self.parts.append([sum(spans[i::4]) / steps for i in range(3)])  # spans 3, 7 ...: between two steps


def check(candidate: Candidate) -> float:
    """Two steps, after which every trained parameter must have had a gradient. Returns the loss.

    Two, because LoRA's A gets no gradient while B is 0.

    Raises:
        RuntimeError: a loss or a gradient is not finite, or is missing or zero.
    """
    candidate.step()
    loss = candidate.step().item()
    if not math.isfinite(loss):
        raise RuntimeError(f"loss is {loss}")
    for name, parameter in candidate.trained().items():
        if parameter.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        if not torch.isfinite(parameter.grad).all():
            raise RuntimeError(f"the gradient of {name} is not finite")
        if not parameter.grad.any():
            raise RuntimeError(f"the gradient of {name} is zero")
    return loss


class Saved:
    """A tensor that autograd saved. It dies with the part of the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(candidate: Candidate) -> int:
    """Bytes that autograd holds between forward and backward: unique storages, parameters and buffers left out.

    What a method saves and lets go of within the forward (DoRA's norm of a detached weight) does not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*candidate.model.parameters(), *candidate.model.buffers())}
    seen: list[weakref.ref[Saved]] = []

    def pack(t: Tensor) -> Saved:
        saved = Saved(t)
        seen.append(weakref.ref(saved))
        return saved

    candidate.optimizer.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = candidate.loss()
    storages = [saved.tensor.untyped_storage() for ref in seen if (saved := ref()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}
    del storages
    loss.backward()
    return sum(sizes.values())


def peak_bytes(candidate: Candidate) -> int | None:
    """CUDA: peak of a step above what was allocated before it (weights, adapters, optimiser state). CPU: None."""
    if candidate.device.type != "cuda":
        return None
    candidate.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    candidate.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def state_bytes(candidate: Candidate) -> int:
    """Bytes of trained parameters and of the optimiser's state."""
    state = [t for values in candidate.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in (*candidate.trained().values(), *state))


# --- the run --------------------------------------------------------------------------------------------------------


def recompute_blocks(model: nn.Module, blocks: tuple[str, ...]) -> None:
    """Activation checkpointing, block by block."""
    for path in blocks:
        for block in model.get_submodule(path).children():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def make_candidate(
    name: str, base: nn.Module, workload: Workload, loss: Loss, dtype: str, arguments: argparse.Namespace
) -> Candidate:
    """A method on its own copy of the model's modules."""
    device = next(base.parameters()).device
    with seeded():
        model = METHODS[name](share_weights(base), workload.targets(base), arguments.rank)
    if arguments.checkpoint:
        recompute_blocks(model, workload.blocks)
    if arguments.compile:
        model.compile()
    if name.startswith("map") and name != "map-plain":
        groups = mapsurgery.param_groups(model, lr=LR)
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    # fused: else it is Python's loop over the parameters that is timed on the CPU.
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0, fused=True)

    def loss_of_step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "autocast-bf16"):
            return loss(model)

    return Candidate(name, model, loss_of_step, optimizer, device)


def prepare_candidate(candidate: Candidate, warmup: int) -> None:
    """Check it, measure its memory, and warm it up."""
    candidate.row |= {
        "loss": check(candidate),
        "trained": sum(p.numel() for p in candidate.trained().values()),
        "saved_bytes": saved_bytes(candidate),
        "peak_bytes": peak_bytes(candidate),
        "state_bytes": state_bytes(candidate),
    }
    for _ in range(warmup):
        candidate.step()


def finish_rows(candidates: list[Candidate]) -> None:
    """Enter the times, and the ratios to peft's LoRA and to the frozen model where these ran."""
    by_name = {candidate.name: candidate for candidate in candidates}
    lora, frozen = by_name.get("lora"), by_name.get("frozen")
    for candidate in candidates:
        row, parts = candidate.row, [median(part) for part in zip(*candidate.parts, strict=True)]
        row |= {"step_ms": median(candidate.times), "iqr_ms": iqr(candidate.times)}
        row |= dict(zip(("forward_ms", "backward_ms", "optimizer_ms"), parts, strict=True))
        narrow = by_name.get("lora-bf16")
        for key, other in (("time_to_lora", lora), ("time_to_lora_bf16", narrow), ("time_to_frozen", frozen)):
            row[key] = paired_ratio(candidate.times, other.times) if other is not None else None
        if candidate.device.type == "cpu":
            row["processor_ms"] = median(candidate.processor_times)
            row["processor_to_lora"] = (
                paired_ratio(candidate.processor_times, lora.processor_times) if lora is not None else None
            )
        for key in ("saved", "peak"):
            row[f"{key}_mib"] = None if row[f"{key}_bytes"] is None else row[f"{key}_bytes"] / MIB
            known = lora is not None and bool(lora.row[f"{key}_bytes"])
            row[f"{key}_to_lora"] = row[f"{key}_bytes"] / lora.row[f"{key}_bytes"] if known else None
        row["state_mib"] = row["state_bytes"] / MIB


def run_group(
    model: Model, dtype: str, methods: list[str], device: torch.device, arguments: argparse.Namespace
) -> list[Row]:
    """All methods on one model in one dtype. A method that fails gets a row with its error."""
    name, workload = model.name, WORKLOADS[model.name]
    usual = workload.cuda_batch if device.type == "cuda" else workload.cpu_batch
    batch = model.batch or arguments.batch or usual
    size = model.size or arguments.size or workload.size
    about = {"model": name, "dtype": dtype, "rank": arguments.rank, "batch": batch, "size": size}
    base = make_base(workload, size, dtype, device)
    with seeded():
        loss = workload.data(batch, size, next(base.parameters()).dtype, device)
    candidates: list[Candidate] = []
    failed: list[Row] = []
    for method in methods:
        try:
            candidate = make_candidate(method, base, workload, loss, dtype, arguments)
            prepare_candidate(candidate, arguments.warmup)
            candidates.append(candidate)
        except Exception as error:  # any method of any library, on any device: the others still count
            print(f"{name} {dtype} {method}: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append({**about, "method": method, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
            free_memory(device)
    for index in range(arguments.repeats):
        for offset in range(len(candidates)):  # another one starts each round
            candidates[(index + offset) % len(candidates)].measure(arguments.steps)
    finish_rows(candidates)
    return [{**about, "method": c.name, **c.row, "error": None} for c in candidates] + failed


COLUMNS = {
    "model": "model",
    "dtype": "dtype",
    "batch": "batch",
    "size": "size",
    "method": "method",
    "step_ms": "step ms",
    "iqr_ms": "IQR",
    "time_to_lora": "x LoRA",
    "time_to_lora_bf16": "x LoRA-bf16",
    "time_to_frozen": "x frozen",
    "processor_ms": "CPU ms",
    "processor_to_lora": "x LoRA",
    "forward_ms": "fwd ms",
    "backward_ms": "bwd ms",
    "optimizer_ms": "opt ms",
    "saved_mib": "saved MiB",
    "saved_to_lora": "x LoRA",
    "peak_mib": "peak MiB",
    "peak_to_lora": "x LoRA",
    "state_mib": "state MiB",
    "error": "error",
}
NOTES = (
    "Medians over interleaved rounds; IQR is the distance of the quartiles of the step's time; ratios of times are "
    "medians of the ratios within a round. CPU: processor time of all threads, which other programs disturb less. "
    "saved: bytes that autograd holds after the forward, parameters left out. peak: CUDA only, above what is allocated "
    "before the step. state: trained parameters and AdamW's state. frozen: the floor, forward and the gradient at the "
    "outputs of the adapted layers."
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, repeats=15)
    usual = [Model(name) for name in ("vit_small", "llama_tiny", "resnet50")]
    text = f"NAME[:BATCH[xSIZE]] of {', '.join(WORKLOADS)} (default: {', '.join(model.name for model in usual)})"
    parser.add_argument("--models", nargs="+", type=Model.parse, default=usual, metavar="MODEL", help=text)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that make sense for the dtype")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="of the model; one or several")
    parser.add_argument("--batch", type=positive, help="samples (default: by model and device)")
    parser.add_argument("--size", type=positive, help="side of images, length of sequences (default: by model)")
    parser.add_argument("--steps", type=positive, help="steps in a row per round (default 3 on CUDA, 1 on CPU)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before the rounds (default 2)")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing of every block")
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.steps or (3 if arguments.device == "cuda" else 1)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a method failed on a model."""
    arguments = parse(argv)
    kept = ("compile", "checkpoint", "repeats", "steps")
    device, run = start(arguments, **{key: getattr(arguments, key) for key in kept})
    if arguments.compile:
        allow_many_compilations()
    rows: list[Row] = []
    for dtype in arguments.dtype:
        for model in arguments.models:
            found = run_group(model, dtype, arguments.methods or default_methods(dtype), device, arguments)
            rows += found
            batch, size = found[0]["batch"], found[0]["size"]
            title = (
                f"{model.name}, {dtype}, rank {arguments.rank}, batch {batch}, size {size}, {arguments.repeats} rounds"
            )
            columns = {key: head for key, head in COLUMNS.items() if key not in ("model", "dtype", "batch", "size")}
            print(table(title, found, columns), flush=True)
            paths = write_results(arguments.out, "train_step", arguments.tag, rows, COLUMNS, run, NOTES)
            free_memory(device)
    print_paths(paths)
    return int(any(row["error"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
