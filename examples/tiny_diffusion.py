"""A tiny diffusion model of small grey images, trained here on real ones, with a word for each class.

It stands in for Stable Diffusion where no model hub can be reached: diffusers' own UNet and schedulers, prompts of two
words ("digit 3"; "digit" for any), and one more word, `SUBJECT`, that the training never shows. One class is left out
of the training too: it is the subject that DreamBooth then ties to that word.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusion_loss import Noised, add_noise
from image_data import ImageSplits, Samples
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

SUBJECT = "sks"
"""The word without a meaning, as in DreamBooth's own examples."""
NOUNS = {"mnist": "digit", "fashion-mnist": "garment"}
"""The class of all classes of each data set, and so the first word of its prompts."""
GENERIC_SHARE = 0.1
"""Share of the training images whose prompt is the noun alone."""
WORDS_IN_PROMPT = 2
SIDE = 16
PATCH = 2
"""Images become (PATCH^2, SIDE/PATCH, SIDE/PATCH) by rearranging pixels: a VAE's place, at no cost."""


@dataclass(frozen=True)
class Recipe:
    """How the base model comes about; a cached file is used only where all of it is equal."""

    data: str = "mnist"
    subject: str = "5"
    """The class that the base never sees."""
    steps: int = 1500
    batch_size: int = 32
    lr: float = 2e-3
    channels: tuple[int, ...] = (32, 64)
    words: int = 32
    """Width of a word's embedding."""
    seed: int = 0


class Base(nn.Module):
    """The UNet and the table of words, trained together and cached together."""

    def __init__(self, recipe: Recipe, vocabulary: list[str]) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.vocabulary = ["", *vocabulary]  # "" fills prompts up
        self.words = nn.Embedding(len(self.vocabulary), recipe.words)
        self.unet = UNet2DConditionModel(
            sample_size=SIDE // PATCH,
            in_channels=PATCH**2,
            out_channels=PATCH**2,
            block_out_channels=recipe.channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (len(recipe.channels) - 1)),
            up_block_types=(*["CrossAttnUpBlock2D"] * (len(recipe.channels) - 1), "UpBlock2D"),
            cross_attention_dim=recipe.words,
            attention_head_dim=4,
            norm_num_groups=8,
        )

    def token_ids(self, prompts: list[str]) -> Tensor:
        """Words of each prompt as indices of the table, int64 (n, WORDS_IN_PROMPT).

        Raises:
            ValueError: a word that the table lacks, or too many words.
        """
        rows = []
        for prompt in prompts:
            words = prompt.split()
            unknown = [word for word in words if word not in self.vocabulary]
            if unknown or not 1 <= len(words) <= WORDS_IN_PROMPT:
                known = ", ".join(self.vocabulary[1:])
                raise ValueError(f"prompt {prompt!r}: write one or {WORDS_IN_PROMPT} of the words {known}")
            words += [""] * (WORDS_IN_PROMPT - len(words))
            rows.append([self.vocabulary.index(word) for word in words])
        return torch.tensor(rows)


class TinyDiffusion:
    """A base model with the methods that DreamBooth needs, those of `diffusion_models.HubModel`."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.device = base.words.weight.device
        self.denoiser: Any = base.unet  # to be replaced by what is adapted, never adapted itself
        self.scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (n, 1, SIDE, SIDE) in [0, 1] as (n, PATCH^2, SIDE/PATCH, SIDE/PATCH) in [-1, 1]."""
        return F.pixel_unshuffle(images.to(self.device) * 2 - 1, PATCH)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """One row for each prompt."""
        return {"encoder_hidden_states": self.base.words(self.base.token_ids(prompts).to(self.device))}

    def add_noise(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """See `diffusion_loss.add_noise`."""
        return add_noise(self.scheduler, clean, generator)

    def inputs(self, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the denoiser's forward."""
        return {"sample": sample, "timestep": timesteps, **condition, "return_dict": False}

    def predict(self, noised: Noised, condition: dict[str, Tensor]) -> Tensor:
        """The denoiser's prediction, in the shape of ``noised.target``."""
        return self.denoiser(**self.inputs(noised.sample, noised.timesteps, condition))[0]

    @torch.no_grad()
    def generate(self, prompts: list[str], seed: int, steps: int) -> Tensor:
        """An image for each prompt by DDIM: float (n, 1, SIDE, SIDE) in [0, 1]."""
        self.denoiser.eval()
        scheduler: Any = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        condition = self.encode_prompts(prompts)
        shape = (len(prompts), PATCH**2, SIDE // PATCH, SIDE // PATCH)
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        for timestep in scheduler.timesteps:
            prediction = self.denoiser(**self.inputs(sample, timestep, condition))[0]
            sample = scheduler.step(prediction, timestep, sample).prev_sample
        return (F.pixel_shuffle(sample, PATCH) / 2 + 0.5).clamp(0, 1).cpu()

    def fresh_denoiser(self) -> Any:
        """The base's UNet once more, never adapted."""
        return copy.deepcopy(self.base.unet)

    def only_denoiser(self) -> None:
        """Nothing to move away: there is no VAE, and the table of words is small."""


# --- the base model's own training ------------------------------------------------------------------------------------


def images_of(samples: Samples) -> Tensor:
    """Raw grey pixels as float (n, 1, SIDE, SIDE) in [0, 1]."""
    assert isinstance(samples.images, Tensor)  # the packaged sets are tensors
    pixels = samples.images[:, None].float() / 255
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", antialias=True)


def load_base(recipe: Recipe, cache_dir: str | Path, splits: ImageSplits, device: torch.device | None = None) -> Base:
    """The base model of a recipe: from its file in ``cache_dir``, or trained (minutes) and written there.

    Args:
        splits: of the recipe's data; the base sees the training split without the subject's class.

    Raises:
        ValueError: the data has no such noun or class, or the file holds another recipe's model.
    """
    if recipe.data not in NOUNS:
        raise ValueError(f"data {recipe.data!r}: there are {', '.join(NOUNS)}")
    if recipe.subject not in splits.classes:
        raise ValueError(f"subject {recipe.subject!r}: the classes of {recipe.data} are {', '.join(splits.classes)}")
    path = Path(cache_dir) / f"tiny-diffusion-{recipe.data}-without-{recipe.subject}.safetensors"
    base = Base(recipe, [NOUNS[recipe.data], *splits.classes, SUBJECT]).to(device or torch.device("cpu"))
    if path.is_file():
        _check_recipe(path, recipe)
        load_model(base, path)
    else:
        _train_base(base, recipe, splits)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(base, str(path), {"recipe": json.dumps(asdict(recipe))})
    return base.eval().requires_grad_(False)


def _check_recipe(path: Path, recipe: Recipe) -> None:
    with safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get("recipe", "{}")
    wanted = json.dumps(asdict(recipe))
    if stored != wanted:
        raise ValueError(f"{path} was made by the recipe {stored}, wanted is {wanted}: remove the file to train anew")


def _train_base(base: Base, recipe: Recipe, splits: ImageSplits) -> None:
    """Train UNet and words in place; their exponential moving average is what stays."""
    model = TinyDiffusion(base)
    labels = splits.train.labels
    seen = labels != splits.classes.index(recipe.subject)
    latents, labels = model.encode_images(images_of(splits.train)[seen]), labels[seen]
    noun = NOUNS[recipe.data]
    tokens = base.token_ids([*(f"{noun} {name}" for name in splits.classes), noun])
    optimizer = torch.optim.AdamW(base.parameters(), recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, recipe.steps, pct_start=0.05, cycle_momentum=False
    )
    average = EMAModel(base.parameters(), decay=0.995)
    random = torch.Generator().manual_seed(recipe.seed)
    for _ in tqdm(range(recipe.steps), "training the base model", leave=False, disable=None):
        rows = torch.randint(len(latents), (recipe.batch_size,), generator=random)
        generic = torch.rand(recipe.batch_size, generator=random) < GENERIC_SHARE
        prompts = torch.where(generic, len(splits.classes), labels[rows])
        noised = model.add_noise(latents[rows], random)
        prediction = model.predict(noised, {"encoder_hidden_states": base.words(tokens[prompts].to(model.device))})
        loss = F.mse_loss(prediction, noised.target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        average.step(base.parameters())
    average.copy_to(base.parameters())
