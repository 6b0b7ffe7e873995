#!/usr/bin/env python3
"""Teach a diffusion model a subject from a few images (DreamBooth, arXiv 2208.12242) with MAP, beside LoRA.

    python examples/dreambooth.py --model stabilityai/stable-diffusion-xl-base-1.0 --instance-images path/to/my-dog \
        --instance-prompt "a photo of sks dog" --class-prompt "a photo of a dog" --amp bf16 --gradient-checkpointing
    python examples/dreambooth.py --model black-forest-labs/FLUX.1-dev ...      # and SD 1, 2, 3
    python examples/dreambooth.py --model packaged                             # works without a network

Of a packaged model the script first trains the base, a tiny diffusion model of digits (minutes, once: it is cached),
without one class; a few images of that class are then the subject.

The script shows the plan, adapts and verifies the denoiser, trains it with prior preservation on images that the base
draws of the class, saves the adapter, and proves that a fresh denoiser which loads the file predicts the same, and so
does the merged one. Then it draws with the base, LoRA (peft) and MAP from the same noise: a picture, and the cosine
similarity of features to real images. It exits with 1 if a proof or the verification fails, with 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import adapting
import torch
from command import exit_code
from dreambooth_task import Scores, Task, ceiling, encode, example_inputs, generate, scores_of, train
from image_features import load_features
from image_grid import save_grid
from PIL import Image
from runtime import Runtime, add_runtime_options
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

import mapsurgery

MERGE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of a prediction that merging may cause, in units of the largest one, by the weights' dtype."""
LORA_SCALING = 2
"""alpha/r of the LoRA beside."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
GRID_SUBJECTS = 8
"""Images of the subject in each row of the picture; one of every other prompt follows."""


HUB_ONLY = ("instance_images", "test_images", "class_images", "resolution")
"""Options that the packaged model does not have."""


class Defaults(NamedTuple):
    """Values of options that suit large and tiny models differently."""

    lr: float
    steps: int
    batch_size: int
    sampling_steps: int
    features: str


HUB = Defaults(1e-4, 500, 1, 30, "vit_small_patch16_224.dino")  # rate and steps of diffusers' LoRA scripts
PACKAGED = Defaults(5e-3, 200, 8, 20, "tf_efficientnet_lite0")


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Teach a diffusion model a subject with MAP, beside LoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_options(parser.add_argument_group("model and images"))
    adapters = parser.add_argument_group("adapters")
    adapting.add_options(adapters, targets=["*attn*"])
    parser.set_defaults(targets=None, lr=None)  # what suits the model, unless somebody says otherwise
    adapters.add_argument("--no-lora", action="store_true", help="leave out the LoRA beside")
    _add_training_options(parser.add_argument_group("training"))
    args = parser.parse_args(argv)
    for name, value in (PACKAGED if args.model == "packaged" else HUB)._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    given = [name for name in HUB_ONLY if getattr(args, name) is not None]
    missing = [name for name in ("instance_images", "instance_prompt") if getattr(args, name) is None]
    if args.model == "packaged" and given:
        parser.error(f"--model packaged has images of its own: --{given[0].replace('_', '-')} is for other models")
    if args.model != "packaged" and missing:
        parser.error(f"--model {args.model} needs --{missing[0].replace('_', '-')}")
    return args


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="packaged", help="hub name or folder of a diffusers pipeline; or packaged")
    group.add_argument("--instance-images", type=Path, metavar="FOLDER", help="the subject, to train on")
    group.add_argument("--test-images", type=Path, metavar="FOLDER", help="the subject, to compare to; else the former")
    group.add_argument("--instance-prompt", help='with a rare word for the subject: "a photo of sks dog"')
    group.add_argument("--class-prompt", help='of the class: "a photo of a dog"; without it a hub model has no prior')
    group.add_argument(
        "--class-images", type=Path, metavar="FOLDER", help="of the class; the base draws what is missing into it"
    )
    group.add_argument("--class-count", type=adapting.positive, default=64, help="images of the class")
    group.add_argument("--resolution", type=adapting.positive, help="pixels of a side; the model's own if left out")
    group.add_argument("--features", help="timm network for the score; DINO's or the packaged EfficientNet if left out")
    group.add_argument("--data", default="mnist", help="packaged: mnist or fashion-mnist")
    group.add_argument("--subject", default="5", help="packaged: the class that the base never sees")
    group.add_argument("--instances", type=adapting.positive, default=10, help="packaged: images to train on")
    group.add_argument("--base-steps", type=adapting.positive, default=1500, help="packaged: training of the base")
    group.add_argument("--output", type=Path, default=Path("outputs/dreambooth"), help="folder for all files")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--steps", type=adapting.positive, help=f"{HUB.steps}, or {PACKAGED.steps} of the packaged model"
    )
    group.add_argument(
        "--batch-size",
        type=adapting.positive,
        help=f"{HUB.batch_size} or {PACKAGED.batch_size} of the subject, and as many of the class",
    )
    group.add_argument("--prior-loss-weight", type=float, default=1.0)
    group.add_argument("--images-per-prompt", type=adapting.positive, default=8, help="drawn for the score")
    group.add_argument(
        "--sampling-steps",
        type=adapting.positive,
        help=f"of the denoiser for each drawn image; {HUB.sampling_steps} or {PACKAGED.sampling_steps}",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--seed", type=int, default=0)
    add_runtime_options(group)


# --- the task ---------------------------------------------------------------------------------------------------------


def load_images(folder: Path, side: int) -> Tensor:
    """All images of a folder, by name: resized and cropped to a square, float (n, 3, side, side) in [0, 1].

    Raises:
        FileNotFoundError: no folder, or no image in it.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{folder}: no folder with images ({', '.join(sorted(SUFFIXES))})")
    images = []
    for path in paths:
        with Image.open(path) as image:
            pixels = transforms.to_dtype(transforms.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)
        images.append(transforms.center_crop(transforms.resize(pixels, [side], antialias=True), [side, side]))
    return torch.stack(images)


def class_images(model: Any, args: argparse.Namespace) -> Tensor:
    """Images of the class from ``--class-images``, after the base has drawn those that are missing there."""
    folder = args.class_images or args.output / "class-images"
    folder.mkdir(parents=True, exist_ok=True)
    present = len([path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES])
    missing = args.class_count - present
    if missing > 0:
        print(f"the base draws {missing} images of {args.class_prompt!r} into {folder}")
        drawn = model.generate([args.class_prompt] * missing, args.seed + present, args.sampling_steps)
        for number, image in enumerate(drawn, start=present):
            transforms.to_pil_image(image).save(folder / f"{number:05d}.png")
    return load_images(folder, model.resolution)


def hub_task(args: argparse.Namespace, runtime: Runtime) -> Task:
    """A pipeline from the hub or a folder, and the images of the command line."""
    from diffusion_models import load_model

    for folder in (args.instance_images, args.test_images or args.instance_images):
        load_images(folder, 8)  # before a large model is loaded for nothing
    model = load_model(args.model, args.resolution, runtime.device, runtime.amp or torch.float32)
    features = load_features(args.features, device=runtime.device)
    instances = load_images(args.instance_images, model.resolution)
    real = load_images(args.test_images, model.resolution) if args.test_images else instances
    references = {args.instance_prompt: features(real)}
    classes = None
    if args.class_prompt:
        prior = class_images(model, args)
        references[args.class_prompt] = features(prior)
        classes = encode(model, prior, args.class_prompt)
    return Task(
        model=model,
        subject_prompt=args.instance_prompt,
        instances=encode(model, instances, args.instance_prompt),
        classes=classes,
        features=features,
        references=references,
        targets=("*attn*",),
        exclude=model.without_effect(),
        batch_size=args.batch_size,
        sampling_steps=args.sampling_steps,
        runtime=runtime,
    )


def packaged_task(args: argparse.Namespace, runtime: Runtime) -> Task:
    """The tiny model, whose file is kept in the folder of ``--output``."""
    from packaged_subject import load_task
    from tiny_diffusion import Recipe

    task = load_task(
        args.output,
        Recipe(args.data, args.subject, args.base_steps),
        instances=args.instances,
        class_images=args.class_count,
        instance_prompt=args.instance_prompt,
        class_prompt=args.class_prompt,
        features=args.features,
        sampling_steps=args.sampling_steps,
        runtime=runtime,
        seed=args.seed,
    )
    task.batch_size = args.batch_size
    return task


def prepare(args: argparse.Namespace) -> Task:
    """Find model and images; every mistake in an option shows here, before anything is trained."""
    if args.threads:
        torch.set_num_threads(args.threads)
    runtime = Runtime.choose(args.device, args.amp)
    task = packaged_task(args, runtime) if args.model == "packaged" else hub_task(args, runtime)
    task.prior_loss_weight = args.prior_loss_weight
    task.images_per_prompt = args.images_per_prompt
    args.targets = args.targets or list(task.targets)
    args.exclude = [*args.exclude, *task.exclude]
    mapsurgery.plan(task.model.denoiser, **adapting.settings(args))  # finds what is wrong with the options
    prior = 0 if task.classes is None else len(task.classes.latents)
    print(f"{args.model}: {len(task.instances.latents)} images of {task.subject_prompt!r}, {prior} of the class")
    print(f"{task.runtime}\n")
    return task


# --- proofs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prediction(denoiser: nn.Module, inputs: dict[str, Any], task: Task) -> Tensor:
    """What the denoiser predicts without training noise, float32; without autocast, whose rounding would hide W'."""
    denoiser.eval()
    exact = next(denoiser.parameters()).dtype == torch.float32
    with (Runtime.of(denoiser) if exact else task.runtime).autocast():
        return denoiser(**inputs)[0].float()


def report_proof(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> bool:
    """Print how far two predictions are apart, and whether that is within ``tolerance`` of the largest one."""
    difference = (expected - actual).abs().max().item()
    allowed = tolerance * expected.abs().max().item()
    holds = difference <= allowed  # false for NaN, as it should be
    same = "bitwise equal" if torch.equal(expected, actual) else f"allowed {allowed:.1e}"
    print(f"  {'PROVED' if holds else 'FAILED'}  {name}: max |difference| of predictions {difference:.1e} ({same})")
    return holds


def prove(denoiser: nn.Module, task: Task, path: Path, inputs: dict[str, Any]) -> bool:
    """Save -> load into a fresh denoiser, and merge, must both leave the predictions as they are. Merges it."""
    expected = prediction(denoiser, inputs, task)
    fresh = prediction(mapsurgery.load(task.build(), path), inputs, task)
    loaded = report_proof("save -> load into a fresh denoiser", expected, fresh, tolerance=0.0)
    dtype = next(denoiser.parameters()).dtype
    merged = prediction(mapsurgery.merge(denoiser), inputs, task)
    return report_proof("merge into plain layers", expected, merged, MERGE_TOLERANCE[dtype]) and loaded


# --- the whole --------------------------------------------------------------------------------------------------------


def fresh_denoiser(task: Task, args: argparse.Namespace) -> nn.Module:
    """The base's denoiser, in the place of the one before."""
    denoiser: Any = task.build()
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    task.model.denoiser = denoiser
    task.model.only_denoiser()
    return denoiser


def peft_lora(denoiser: nn.Module, args: argparse.Namespace) -> nn.Module:
    """LoRA of peft on the same layers with the same rank, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [layer.path for layer in mapsurgery.plan(denoiser, args.targets, exclude=args.exclude).layers]
    denoiser.requires_grad_(False)
    config = LoraConfig(r=args.rank, lora_alpha=LORA_SCALING * args.rank, target_modules=layers)
    return inject_adapter_in_model(config, denoiser)


def trained_parameters(denoiser: nn.Module) -> int:
    """Number of values that training changes."""
    return sum(parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad)


class Results:
    """Rows of the table and of the picture, filled one model after the other."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.pictures: dict[str, Tensor] = {}
        real = ceiling(task)
        self.lines = [f"  {'':<16}{'subject':>9}{'prior':>9}{'trained':>12}{'s per step':>12}"]
        self.lines.append(_line("real images", real))

    def add(self, name: str, denoiser: nn.Module, trained: int = 0, seconds: float = 0.0) -> None:
        """Draw with a denoiser and score what it draws."""
        images = generate(denoiser, self.task, self.seed)
        self.lines.append(_line(name, scores_of(images, self.task), trained, seconds))
        subject = images.pop(self.task.subject_prompt)[:GRID_SUBJECTS]
        self.pictures[name] = torch.cat([subject, *(of_prompt[:1] for of_prompt in images.values())])


def _line(name: str, scores: Scores, trained: int = 0, seconds: float = 0.0) -> str:
    cost = f"{trained:>12,}{seconds:>12.3f}" if trained else ""
    prior = "-" if scores.prior is None else f"{scores.prior:.4f}"
    return f"  {name:<16}{scores.subject:>9.4f}{prior:>9}{cost}"


def timed_training(denoiser: nn.Module, task: Task, groups: list[dict[str, Any]], args: argparse.Namespace) -> float:
    """Train, print the loss of the first and last tenth, and return the seconds per step."""
    start = time.perf_counter()
    losses = train(denoiser, task, groups, args.lr, args.steps, args.seed)
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    print(f"  {args.steps} steps, lr {args.lr:g}: loss {first:.4f} at first, {last:.4f} at last")
    return (time.perf_counter() - start) / args.steps


def run_adapted(task: Task, args: argparse.Namespace, results: Results) -> bool:
    """Patch, verify, train, save, draw and prove; whether both proofs hold."""
    denoiser = fresh_denoiser(task, args)
    adapting.adapt(denoiser, args)
    inputs = example_inputs(task, args.seed)
    with task.runtime.autocast():
        print(f"{mapsurgery.verify(denoiser, **inputs)}\n\ntraining with {args.method}")
    seconds = timed_training(denoiser, task, adapting.groups(denoiser, args), args)
    path = args.output / f"{args.method}.safetensors"
    mapsurgery.save(denoiser, path)
    results.add(args.method.upper(), denoiser, trained_parameters(denoiser), seconds)
    print(f"\nproofs, on noised real images ({path}):")
    return prove(denoiser, task, path, inputs)


def run_peft_lora(task: Task, args: argparse.Namespace, results: Results) -> None:
    """The same training with LoRA."""
    torch.manual_seed(args.seed)
    denoiser = peft_lora(fresh_denoiser(task, args), args)
    print("\ntraining with LoRA (peft)")
    groups = [{"params": [p for p in denoiser.parameters() if p.requires_grad]}]
    seconds = timed_training(denoiser, task, groups, args)
    results.add("LoRA (peft)", denoiser, trained_parameters(denoiser), seconds)


def run(task: Task, args: argparse.Namespace) -> bool:
    """Draw with the base, with MAP and with LoRA; whether the proofs hold."""
    results = Results(task, args.seed)
    results.add("base", task.model.denoiser)
    holds = run_adapted(task, args, results)
    if not args.no_lora:
        run_peft_lora(task, args, results)
    print("\nmean cosine of features to real images:\n" + "\n".join(results.lines))
    picture = args.output / "grid.png"
    save_grid(results.pictures, picture)
    print(f"\npicture in {picture}")
    return holds


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit code: 1 for a failed proof or verification, 2 for a wrong option."""
    args = parse_args(argv)
    return exit_code(lambda: prepare(args), lambda prepared: run(prepared, args))


if __name__ == "__main__":
    sys.exit(main())
