"""Kernels that one adapted layer launches in a training step, forward and backward, by torch's profiler.

    python benchmarks/launches.py --device cuda

The methods are those of train_step.py. The frozen layer computes its output and the gradient of its input.
"""

from __future__ import annotations

from collections import Counter

import torch
from common import Row, make_parser, print_paths, randomise_zeros, start, table, write_results
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from train_step import METHODS
from workloads import share_weights

CHOICES = ("frozen", "lora-bf16", "lora", "dora", "map", "mapsurgery-lora")
LAYERS = {
    "Linear": lambda width: nn.Linear(width, width, bias=False),
    "Linear with bias": lambda width: nn.Linear(width, width),
    "Conv2d 3x3": lambda width: nn.Conv2d(width // 8, width // 8, 3, padding=1),
    "Conv2d 1x1": lambda width: nn.Conv2d(width // 8, width // 8, 1, bias=False),
}
STEPS = 5


def make_input(layer: nn.Module, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows for a Linear, images of 16 pixels for a convolution."""
    shape = (tokens, width) if isinstance(layer, nn.Linear) else (max(1, tokens // 256), width // 8, 16, 16)
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def profiled(model: nn.Module, x: Tensor, device: torch.device) -> list[tuple[str, float, int]]:
    """Name, microseconds and number of each kernel (on the CPU: of each operator) in one forward and backward."""

    def step() -> None:
        y = model(x)
        y.backward(grad)

    grad = torch.randn_like(model(x))
    for _ in range(3):
        step()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as trace:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    time, count = Counter[str](), Counter[str]()
    for event in trace.events():
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA:
            time[event.name] += event.self_device_time_total if cuda else event.self_cpu_time_total
            count[event.name] += 1
    return [(name, time[name] / STEPS, round(count[name] / STEPS)) for name in sorted(time, key=time.get, reverse=True)]


COLUMNS = {"layer": "layer", "method": "method", "launches": "launches", "us": "µs", "names": "kernels"}
NOTES = (
    "Launches and their time in one forward and backward of one layer; gradients accumulate, as in the second of two "
    "micro-batches. On a CPU: torch's operators instead of kernels."
)


def main(argv: list[str] | None = None) -> int:
    """Profiles every method on every layer, one after the other."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=4096, help="of the Linear layers; convolutions: channels / 8")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the input")
    arguments = parser.parse_args(argv)
    device, run = start(arguments, **{key: getattr(arguments, key) for key in ("width", "tokens", "rank")})
    rows: list[Row] = []
    for kind, make in LAYERS.items():
        base = nn.Sequential(make(arguments.width)).to(device, torch.bfloat16).requires_grad_(False)
        x = make_input(base[0], arguments.tokens, arguments.width, torch.bfloat16, device)
        for method in CHOICES:
            model = METHODS[method](share_weights(base), ["0"], arguments.rank)
            randomise_zeros(model)
            found = profiled(model, x, device)
            names = "; ".join(f"{count} x {name[:100]} {us:.1f} µs" for name, us, count in found)
            counts = {"launches": sum(count for *_, count in found), "us": sum(us for _, us, _ in found)}
            rows.append({"layer": kind, "method": method, **counts, "names": names})
    print(table("One layer, forward and backward", rows, {key: COLUMNS[key] for key in list(COLUMNS)[:-1]}))
    paths = write_results(arguments.out, "launches", arguments.tag, rows, COLUMNS, run, NOTES)
    print_paths(paths)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
