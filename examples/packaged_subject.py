"""Subject-driven generation without a model hub: a class of digits or garments that the base model never saw.

task = load_task("outputs")
denoiser = mapsurgery.patch(task.build(), task.targets)
train(denoiser, task, mapsurgery.param_groups(denoiser, lr=2e-3), lr=2e-3, steps=200, seed=0)
print(score(denoiser, task, seed=0))
"""

from __future__ import annotations

from pathlib import Path

import torch
from dreambooth_task import Task, encode
from finetune_timm import Runtime
from image_data import load_splits
from image_features import load_features
from tiny_diffusion import NOUNS, SUBJECT, Recipe, TinyDiffusion, images_of, load_base

TARGETS = ("*attn*", "*resnets*conv*")
FEATURE_SIZES = {"vit_small_patch14_dinov2": 70, "tf_efficientnet_lite0": 64}
"""Sides that digits are enlarged to for each packaged network: enough for 16 pixels, and quick."""
WHITENING_IMAGES = 1000
REFERENCES = 32
"""Real images of each class that generated ones are compared to."""


def load_task(
    cache_dir: str | Path,
    recipe: Recipe | None = None,
    *,
    instances: int = 10,
    class_images: int = 64,
    instance_prompt: str | None = None,
    class_prompt: str | None = None,
    features: str = "tf_efficientnet_lite0",
    sampling_steps: int = 20,
    runtime: Runtime | None = None,
    seed: int = 0,
) -> Task:
    """The task, with its base model from ``cache_dir`` (trained and written there by the first call: minutes).

    Args:
        recipe: of the base model, which names the data and the class that is the subject.
        instances: images of the subject to train on.
        class_images: how many the base draws for prior preservation; 0 for none.
        instance_prompt, class_prompt: two words and one; "<noun> sks" and "<noun>" if left out.
        features: packaged network that similarity is measured in, whitened on real images.
        sampling_steps: of the denoiser for each drawn image.
        runtime: device and precision; the CPU in float32 if left out.
        seed: of the drawn class images. Which real images are trained on, and which compared to, is fixed.

    Raises:
        packaged.MissingPackageError: the data or the network's weights are not installed.
        ValueError: an unknown class or word, or more images than there are.
    """
    recipe, runtime = recipe or Recipe(), runtime or Runtime(torch.device("cpu"), None)
    if recipe.data not in NOUNS:
        raise ValueError(f"data {recipe.data!r}: there are {', '.join(NOUNS)}")
    noun = NOUNS[recipe.data]
    extractor = load_features(features, "packaged", FEATURE_SIZES.get(features), runtime.device)
    splits = load_splits(recipe.data)
    extractor.whiten(images_of(splits.train)[:WHITENING_IMAGES])
    model = TinyDiffusion(load_base(recipe, cache_dir, splits, runtime.device))
    instance_prompt, class_prompt = instance_prompt or f"{noun} {SUBJECT}", class_prompt or noun
    subject = splits.classes.index(recipe.subject)
    pool = images_of(splits.train.pick((splits.train.labels == subject).nonzero()[:, 0]))
    if not 1 <= instances <= len(pool):
        raise ValueError(f"{instances} images of the subject were asked for, of the {len(pool)} there are")
    drawn = model.generate([class_prompt] * class_images, seed, sampling_steps) if class_images else None
    references = {}
    for label, name in enumerate(splits.classes):
        real = splits.test.pick((splits.test.labels == label).nonzero()[:REFERENCES, 0])
        references[instance_prompt if label == subject else f"{noun} {name}"] = extractor(images_of(real))
    return Task(
        model=model,
        subject_prompt=instance_prompt,
        instances=encode(model, pool[:instances], instance_prompt),
        classes=None if drawn is None else encode(model, drawn, class_prompt),
        features=extractor,
        references=references,
        targets=TARGETS,
        sampling_steps=sampling_steps,
        runtime=runtime,
    )
