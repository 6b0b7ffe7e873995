#!/usr/bin/env python3
"""Write what the C++ program beside this script reads: an AOTInductor package of a patched, unmerged ViT, and adapters.

    python examples/cpp/export_vit.py outputs/cpp  # vit_tiny_patch16_224 with random weights, for the CPU
    python examples/cpp/export_vit.py outputs/cpp --device cuda --model vit_small_patch16_224 --pretrained

Writes model.pt2, compiled with a first adapter; input.pt and logits.pt, what the model computes of it; adapter.pt, a
second adapter for the same package, and adapter_logits.pt. adapter.safetensors is the second one by `mapsurgery.save`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mapsurgery
from mapsurgery.methods import Adapter

FIXED = (".form", ".weight_norm")
"""Ends of the names of an adapter's tensors that a package is compiled for: they are compared, and not replaced."""

CONSTANTS = {
    # Inductor writes tensors of up to 8 elements, such as alpha and beta, into the code, where nothing can change them.
    "always_keep_tensor_constants": True,
    # The defaults; folding would leave tensors that were computed from the first adapter.
    "freezing": False,
    "aot_inductor.use_runtime_constant_folding": False,
}
"""Settings of Inductor under which every tensor of an adapter remains a constant of the package."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a patched, unmerged ViT for the C++ example.")
    parser.add_argument("output", type=Path, help="folder to write into")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a ViT of timm (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="pretrained weights, downloaded by timm")
    parser.add_argument("--depth", type=int, help="number of blocks, if not the model's own")
    parser.add_argument("--img-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="the package is compiled for it alone")
    return parser.parse_args(argv)


def build_model(args: argparse.Namespace) -> nn.Module:
    """The patched model, in eval mode."""
    depth = {} if args.depth is None else {"depth": args.depth}
    model = timm.create_model(args.model, pretrained=args.pretrained, img_size=args.img_size, **depth).to(args.device)
    mapsurgery.patch(model, targets=["*attn*", "*mlp*"], rank=args.rank, train=["head*"])
    return model.eval()


def train(model: nn.Module, images: Tensor, steps: int = 5) -> None:
    """A few steps on random labels: every tensor of the adapter moves."""
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=0.01))
    for _ in range(steps):
        logits = model(images)
        labels = torch.randint(logits.shape[1], (len(images),), device=images.device)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the C++ program takes as an adapter, for `torch.save`: everything that was trained, and the frozen norms.

    Args: model: patched; tensors come under their names in it, on the CPU.
    """
    state = mapsurgery.adapter_state_dict(model)
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            state[f"{path}.weight_norm"] = module.weight_norm
            state[f"{path}.form"] = torch.tensor([module.init.tau, float(module.init.relative)])
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def adapter_metadata(adapter: dict[str, Tensor]) -> dict[str, str]:
    """How the package names what an adapter consists of: "adapter:<name>" -> "", or the values that are fixed."""
    return {
        f"adapter:{name}": " ".join(map(repr, tensor.tolist())) if name.endswith(FIXED) else ""
        for name, tensor in adapter.items()
    }


def export_package(model: nn.Module, example: Tensor, path: Path) -> None:
    """Compile the model ahead of time, with mapsurgery's operators in it, for any batch size.

    Args: example: (batch, 3, height, width) on the model's device; batch at least 2.
    Raises: RuntimeError: a tensor of the adapter is no constant of the package, and could not be replaced.
    """
    adapter = adapter_tensors(model)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    settings = {**CONSTANTS, "aot_inductor.metadata": adapter_metadata(adapter)}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    constants = torch._inductor.aoti_load_package(str(path)).get_constant_fqns()
    baked = [name for name in adapter if not name.endswith(FIXED) and name not in constants]
    if baked:
        raise RuntimeError(f"{path}: these tensors of the adapter were compiled into the code: {', '.join(baked[:5])}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build_model(args)
    images = torch.randn(3, 3, args.img_size, args.img_size, device=args.device)

    train(model, images)
    export_package(model, images[:2], args.output / "model.pt2")
    torch.save(images.cpu(), args.output / "input.pt")
    with torch.no_grad():
        torch.save(model(images).cpu(), args.output / "logits.pt")

    train(model, images)
    torch.save(adapter_tensors(model), args.output / "adapter.pt")
    mapsurgery.save(model, args.output / "adapter.safetensors")
    with torch.no_grad():
        torch.save(model(images).cpu(), args.output / "adapter_logits.pt")
    print(f"wrote {', '.join(sorted(path.name for path in args.output.iterdir()))} into {args.output}")


if __name__ == "__main__":
    main()
