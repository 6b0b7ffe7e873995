#!/usr/bin/env python3
"""Fine-tune any timm image model with MAP, and prove what comes out.

    python examples/finetune_timm.py --model vit_base_patch16_224 --data path/to/images
    python examples/finetune_timm.py --model resnet50 --targets '*conv*' --data path/to/images
    python examples/finetune_timm.py --weights packaged --data mnist --img-size 70      # works without a network

The script shows the plan, fits a linear probe on the frozen features as the baseline, adapts and verifies the model,
trains it, saves the adapter, and then proves two things on real test images: that a fresh model which loads the file
computes the same logits, and so does the model after its adapters were merged. It exits with 1 if either proof fails,
or if the verification before the training finds an adapter that could not act or learn.
"""

from __future__ import annotations

import argparse
import difflib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from adapting import positive
from command import exit_code
from image_data import PACKAGED_SETS, ImageDataset, ImageSplits, Samples, load_splits
from linear_probe import fit_linear_probe
from packaged import VISION_MODELS
from proving import prove
from runtime import Runtime, add_runtime_options
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from training import learning_rate_schedule

import mapsurgery

MERGE_TOLERANCE = 1e-4
"""Largest difference of a logit that merging may cause, in units of the largest logit (float32 rounds W' once)."""
VERIFY_IMAGES = 4

Loader = DataLoader[Any]
"""Yields images (b, 3, h, w) and their classes (b,)."""


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options, with ``auto`` values still in them."""
    parser = argparse.ArgumentParser(
        description="Fine-tune any timm image model with MAP, and prove what comes out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_options(parser.add_argument_group("model and data"))
    _add_adapter_options(parser.add_argument_group("adapters"))
    _add_training_options(parser.add_argument_group("training"))
    args = parser.parse_args(argv)
    if args.weights == "packaged" and args.model not in VISION_MODELS:
        parser.error(f"--weights packaged: there are packaged weights for {', '.join(VISION_MODELS)}, not {args.model}")
    return args


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="vit_small_patch14_dinov2", help="any name that timm.create_model takes")
    group.add_argument(
        "--weights",
        default="hub",
        help="hub (pretrained, downloaded by timm), packaged (from an installed package, see examples/packaged.py), "
        "none (random), or a local .safetensors or .pth file",
    )
    group.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help=f"folder of class subfolders, or of train/ and val/ with these; or {', '.join(PACKAGED_SETS)}",
    )
    group.add_argument("--img-size", type=positive, help="side of the input image; the model's own if left out")
    group.add_argument("--train-samples", type=positive, help="images to train on, drawn at random; all if left out")
    group.add_argument("--test-samples", type=positive, help="images to test on, drawn at random; all if left out")
    group.add_argument("--augment", action="store_true", help="random crops, flips and colours (timm's defaults)")
    group.add_argument("--workers", type=int, default=0, help="processes that load images")


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--targets", nargs="+", default=["*attn*", "*mlp*"], metavar="GLOB", help="layers to adapt")
    group.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="layers to leave alone")
    group.add_argument(
        "--train", nargs="+", metavar="GLOB", help="parameters to train in full; the model's classifier if left out"
    )
    group.add_argument("--rank", type=positive, default=8)
    group.add_argument("--output", type=Path, default=Path("map-adapter.safetensors"), help="file for the adapter")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=positive, default=5)
    group.add_argument("--lr", type=float, default=5e-4, help="highest learning rate")
    group.add_argument("--weight-decay", type=float, default=0.05)
    group.add_argument("--batch-size", type=positive, default=32)
    group.add_argument("--seed", type=int, default=0)
    add_runtime_options(group)
    group.add_argument("--compile", action="store_true", help="train through torch.compile")


# --- model and data ---------------------------------------------------------------------------------------------------


def check_model_name(name: str) -> None:
    """Refuse a name that timm does not know, with the nearest that it does."""
    if ":" in name:  # "hf-hub:...", "local-dir:...": timm looks there
        return
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        raise ValueError(f"--model {name}: timm has no such model; the nearest: {', '.join(nearest) or 'none'}")


def build_model(name: str, weights: str, num_classes: int, img_size: int | None, seed: int) -> nn.Module:
    """A timm model with a new classifier; the same call gives the same weights again."""
    check_model_name(name)
    torch.manual_seed(seed)  # of the classifier, and of everything with --weights none
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    options: dict[str, Any] = {"num_classes": num_classes}
    if img_size and config is not None and config.fixed_input_size:
        options["img_size"] = img_size  # only models of a fixed input size (ViT, Swin ...) know this argument
    if weights == "packaged":
        assert config is not None  # timm knows all of them
        return VISION_MODELS[name](num_classes, img_size or config.input_size[-1])
    if weights == "none":
        return timm.create_model(name, **options)
    if weights == "hub":
        return timm.create_model(name, pretrained=True, **options)
    if not Path(weights).is_file():
        raise FileNotFoundError(f"--weights {weights}: neither a file nor one of hub, packaged, none")
    # timm then resizes position embeddings and drops the old classifier as it does for downloaded weights.
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights}, **options)


def classifier_names(model: Any) -> list[str]:
    """Dotted paths of the model's classifier (several for a distilled model), which fine-tuning trains in full."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


def make_loaders(model: nn.Module, splits: ImageSplits, args: argparse.Namespace) -> tuple[Loader, Loader, Loader]:
    """Batches to train on (shuffled, augmented if asked), the same images plain and in order, and those to test on."""
    config = resolve_data_config({"img_size": args.img_size}, model=model)
    if isinstance(splits.train.images, Tensor):
        config["crop_pct"] = 1.0  # the packaged sets' images are small, and filled to the border
    plain = create_transform(**config)
    augmented = create_transform(**config, is_training=True) if args.augment else plain

    def loader(samples: Samples, transform: Callable[..., Tensor], shuffle: bool) -> Loader:
        order = torch.Generator().manual_seed(args.seed)
        dataset = ImageDataset(samples, transform)
        return DataLoader(dataset, args.batch_size, shuffle=shuffle, num_workers=args.workers, generator=order)

    return loader(splits.train, augmented, True), loader(splits.train, plain, False), loader(splits.test, plain, False)


def batches(loader: Loader, runtime: Runtime, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (b, 3, h, w) and labels (b,) on the device, behind a progress bar where a person watches."""
    for images, labels in tqdm(loader, label, leave=False, disable=None):
        yield images.to(runtime.device), labels.to(runtime.device)


# --- measuring and training -------------------------------------------------------------------------------------------


@torch.no_grad()
def frozen_features(model: Any, loader: Loader, runtime: Runtime, label: str) -> tuple[Tensor, Tensor]:
    """What the classifier would see: features, float32 (n, d), and labels (n,)."""
    model.eval()
    features, labels = [], []
    for images, targets in batches(loader, runtime, label):
        with runtime.autocast():
            features.append(model.forward_head(model.forward_features(images), pre_logits=True).float().flatten(1))
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def accuracy(model: nn.Module, loader: Loader, runtime: Runtime, label: str) -> float:
    """Share of the images that the model classifies rightly."""
    model.eval()
    right, total = 0, 0
    for images, labels in batches(loader, runtime, label):
        with runtime.autocast():
            predicted = model(images).argmax(dim=1)
        right += int((predicted == labels).sum())
        total += len(labels)
    return right / total


def train_mode(model: nn.Module) -> None:
    """Training mode, but frozen BatchNorms keep the statistics of the pretraining."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(any(parameter.requires_grad for parameter in module.parameters()))


class Training(NamedTuple):
    """What came out: accuracy after the last epoch, and the seconds of each step without the loading of images."""

    accuracy: float
    steps: list[float]


def train(model: nn.Module, loader: Loader, test: Loader, args: argparse.Namespace, runtime: Runtime) -> Training:
    """Train the patched model in place; prints a line for each epoch."""
    groups = mapsurgery.param_groups(model, lr=args.lr, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    total = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_schedule(step, total))
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp is torch.float16)
    forward = torch.compile(model) if args.compile else model
    score, seconds = 0.0, []
    for epoch in range(1, args.epochs + 1):
        train_mode(model)
        losses = []
        for images, labels in batches(loader, runtime, f"epoch {epoch}/{args.epochs}"):
            start = time.perf_counter()
            with runtime.autocast():
                loss = F.cross_entropy(forward(images), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            losses.append(loss.detach())
            runtime.synchronize()
            seconds.append(time.perf_counter() - start)
        score = accuracy(model, test, runtime, "testing")
        print(f"  epoch {epoch:>3}/{args.epochs}  loss {torch.stack(losses).mean():.4f}  test accuracy {score:.4f}")
    return Training(score, seconds)


# --- proofs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (b, classes) in full float32, for comparing: no autocast, no TF32, no training noise."""
    model.eval()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        return model(images).float()


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """All that the command line's options resolve to."""

    runtime: Runtime
    build: Callable[[], nn.Module]
    """Makes the model as it is before patching: the same weights each time."""
    model: nn.Module
    settings: dict[str, Any]
    """Arguments of ``mapsurgery.plan`` and ``mapsurgery.patch``."""
    plan: mapsurgery.Plan
    classes: int
    train: Loader
    plain: Loader
    test: Loader


def prepare(args: argparse.Namespace) -> Task:
    """Find data and model, and plan the surgery; every mistake in an option shows here, before any time is spent."""
    if args.threads:
        torch.set_num_threads(args.threads)
    runtime = Runtime.choose(args.device, args.amp)
    splits = load_splits(args.data, args.train_samples, args.test_samples, args.seed)
    classes = len(splits.classes)

    def build() -> nn.Module:
        return build_model(args.model, args.weights, classes, args.img_size, args.seed).to(runtime.device)

    model = build()
    settings = {
        "targets": args.targets,
        "exclude": args.exclude,
        "rank": args.rank,
        "train": classifier_names(model) if args.train is None else args.train,
    }
    plan = mapsurgery.plan(model, **settings)
    counts = f"{len(splits.train.labels):,} images to train on, {len(splits.test.labels):,} to test on"
    print(f"{args.model} ({args.weights} weights) on {args.data}: {classes} classes, {counts}\n{runtime}\n\n{plan}\n")
    return Task(runtime, build, model, settings, plan, classes, *make_loaders(model, splits, args))


def run(task: Task, args: argparse.Namespace) -> bool:
    """Probe, patch, verify, train, save and prove; whether both proofs hold."""
    runtime, model = task.runtime, task.model
    probe = fit_linear_probe(*frozen_features(model, task.plain, runtime, "features"), task.classes)
    baseline = probe.accuracy(*frozen_features(model, task.test, runtime, "features"))
    print(f"before: linear probe on frozen features, test accuracy {baseline:.4f}\n")

    mapsurgery.patch(model, **task.settings)
    images, _ = next(iter(task.plain))
    print(f"{mapsurgery.verify(model, images[:VERIFY_IMAGES].to(runtime.device))}\n")

    print(f"training: {args.epochs} epochs of {len(task.train)} steps, batch {args.batch_size}, lr {args.lr:g}")
    result = train(model, task.train, task.test, args, runtime)
    mapsurgery.save(model, args.output)

    print("\nproofs, on real test images:")
    images, _ = next(iter(task.test))
    images = images.to(runtime.device)
    holds = prove(model, task.build, args.output, lambda model: exact_logits(model, images), MERGE_TOLERANCE)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = [
        ("", "linear probe", "MAP"),
        ("test accuracy", f"{baseline:.4f}", f"{result.accuracy:.4f}"),
        ("trained parameters", f"{probe.parameters:,}", f"{task.plan.trainable_parameters:,}"),
        ("share of the model", "-", f"{task.plan.trainable_share:.2%}"),
        ("file", "-", f"{args.output.stat().st_size / 1e6:.2f} MB of a model of {whole / 1e6:.2f} MB"),
        ("median step", "-", f"{statistics.median(result.steps):.3f} s"),
    ]
    print("\n" + "\n".join(f"  {name:<20}{left:>14}   {right}" for name, left, right in rows))
    print(f"\nsaved to {args.output}")
    return holds


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit code: 1 for a failed proof or verification, 2 for a wrong option."""
    args = parse_args(argv)
    return exit_code(lambda: prepare(args), lambda prepared: run(prepared, args))


if __name__ == "__main__":
    sys.exit(main())
