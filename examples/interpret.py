"""What fine-tuning does to each layer of a vision transformer: trains on MNIST digits, tracks, prints and draws.

    python examples/interpret.py --output outputs/interpret                 # MAP on a packaged ViT-S/14
    python examples/interpret.py --model vit_base_patch16_224 --method dora # any timm ViT, from its hub

Writes history.safetensors, a heat map of layers over steps, and magnitude over direction as in DoRA's analysis.
docs/interpretation.md shows and explains them. Needs timm, matplotlib, and the package that packaged.mnist names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from packaged import VISION_MODELS, mnist
from torch import Tensor, nn
from torch.nn import functional as F

import mapsurgery


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm ViT, packaged or from the hub")
    parser.add_argument("--img-size", type=int, default=56, help="side of the input image (default 56)")
    parser.add_argument("--targets", nargs="+", default=["*attn*", "*mlp*"], metavar="GLOB", help="layers to adapt")
    parser.add_argument("--method", default="map", help="map, lora or dora")
    parser.add_argument("--update", default="lora", help="update family, such as lora, pissa, loha")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=5, help="steps from one record to the next (default 5)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/interpret"), help="folder of what is written")
    return parser.parse_args(argv)


def build_model(name: str, img_size: int) -> tuple[nn.Module, list[str]]:
    """A pretrained timm model with a new head for ten classes, of zeros, and the names of the head's parameters."""
    model: Any
    if name in VISION_MODELS:
        model = VISION_MODELS[name](10, img_size)
    else:
        model = timm.create_model(name, pretrained=True, num_classes=10, img_size=img_size)
    head = set(model.get_classifier().parameters())
    for parameter in head:
        nn.init.zeros_(parameter)
    return model, [name for name, parameter in model.named_parameters() if parameter in head]


def digits(img_size: int) -> tuple[Tensor, Tensor]:
    """MNIST images (n, 3, img_size, img_size), float32, and labels (n,)."""
    images = mnist()
    pixels = F.interpolate(images.pixels[:, None].float() / 255, size=img_size, mode="bilinear", antialias=True)
    return ((pixels - 0.45) / 0.25).expand(-1, 3, -1, -1), images.labels


def train(model: nn.Module, tracker: mapsurgery.Tracker, args: argparse.Namespace) -> float:
    """Train on random batches; returns the mean loss of the last tenth of the steps."""
    images, labels = digits(args.img_size)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=args.lr))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    random = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    tracker.update(0)
    for step in range(1, args.steps + 1):
        batch = torch.randint(len(labels), (args.batch_size,), generator=random)
        loss = F.cross_entropy(model(images[batch].to(args.device)), labels[batch].to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tracker.update(step)  # a logger would take tracker.latest() where this says True
        losses.append(loss.detach())
    return torch.stack(losses)[-max(1, args.steps // 10) :].mean().item()


def main(argv: list[str] | None = None) -> None:
    """Train, print the report, write the history and the pictures."""
    args = parse(argv)
    torch.manual_seed(0)
    model, head = build_model(args.model, args.img_size)
    model.to(args.device)
    mapsurgery.patch(model, args.targets, rank=args.rank, method=args.method, update=args.update, train=head)
    tracker = mapsurgery.track(model, every=args.every)
    loss = train(model, tracker, args)
    print(mapsurgery.report(model))
    print(f"loss over the last tenth of {args.steps} steps: {loss:.3f}")
    args.output.mkdir(parents=True, exist_ok=True)
    tracker.save(args.output / "history.safetensors")
    mapsurgery.plots.heat_map(tracker, "change", args.output / "change.png")
    mapsurgery.plots.magnitude_direction(tracker, args.output / "magnitude_direction.png")
    print(f"wrote history.safetensors, change.png and magnitude_direction.png to {args.output}")


if __name__ == "__main__":
    main()
