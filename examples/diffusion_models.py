"""Text-to-image pipelines of diffusers, by hub name, with the few methods that training their denoiser needs.

Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3 and Flux. What each denoiser is given is what diffusers' own training
scripts (``examples/dreambooth`` there) give it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusion_loss import Noised, add_noise
from torch import Tensor, nn

FLUX_GUIDANCE = 3.5
"""What a guidance-distilled Flux is told in training, as in diffusers' script."""
BATCH = 4
"""Images that the VAE encodes, or the pipeline draws, at a time."""


class HubModel:
    """A pipeline whose ``denoiser`` is trained; a subclass for each kind."""

    part: ClassVar[str] = "unet"
    """The denoiser's name in the pipeline."""

    def __init__(self, pipe: Any, source: str, resolution: int | None = None) -> None:
        """``source`` is where the pipeline came from; ``resolution`` in pixels, the model's own if None.

        Raises:
            ValueError: a resolution that the latents cannot have.
        """
        self.pipe = pipe
        self.source = source
        self.device: torch.device = pipe.device
        self.resolution = resolution or self.own_sample_size() * pipe.vae_scale_factor
        multiple = 2 * pipe.vae_scale_factor
        if self.resolution % multiple:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {multiple}, as {source} needs it")
        self.scheduler = self.training_scheduler()
        pipe.set_progress_bar_config(disable=True)

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer that the pipeline draws with now."""
        return getattr(self.pipe, self.part)

    @denoiser.setter
    def denoiser(self, module: nn.Module) -> None:
        setattr(self.pipe, self.part, module)

    def without_effect(self) -> tuple[str, ...]:
        """Layers of the denoiser whose result it drops: adapters there could not learn."""
        return ()

    def own_sample_size(self) -> int:
        """Side of the latents that the model was trained at."""
        return self.denoiser.config.sample_size

    def training_scheduler(self) -> Any:
        """The noise that the model was trained with, whatever the pipeline draws with."""
        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    def fresh_denoiser(self) -> nn.Module:
        """The pretrained denoiser, read once more."""
        old = self.denoiser
        return type(old).from_pretrained(self.source, subfolder=self.part, dtype=old.dtype).to(self.device)

    def only_denoiser(self) -> None:
        """Keep nothing but the denoiser on the device, until images are drawn again."""
        for name, component in self.pipe.components.items():
            if isinstance(component, nn.Module) and name != self.part:
                component.to("cpu")

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1] as one draw of their latents, in the scale that the denoiser takes."""
        vae = self.pipe.vae
        dtype = vae.dtype
        if dtype != torch.float32:
            vae.to(torch.float32)  # SDXL's overflows in float16
        generator = torch.Generator().manual_seed(0)
        latents = [
            vae.encode(batch.to(self.device) * 2 - 1).latent_dist.sample(generator)
            for batch in images.float().split(BATCH)
        ]
        if dtype != torch.float32:
            vae.to(dtype)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (torch.cat(latents) - shift) * vae.config.scaling_factor

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the denoiser is told of each prompt, one row each."""
        raise NotImplementedError

    def add_noise(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """See `diffusion_loss.add_noise`; in the denoiser's dtype."""
        noised = add_noise(self.scheduler, clean, generator)
        return noised._replace(sample=noised.sample.to(self.denoiser.dtype))

    def inputs(self, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the denoiser's forward."""
        return {"sample": sample, "timestep": timesteps, **condition, "return_dict": False}

    def predict(self, noised: Noised, condition: dict[str, Tensor]) -> Tensor:
        """The denoiser's prediction, in the shape of ``noised.target``."""
        return self.denoiser(**self.inputs(noised.sample, noised.timesteps, condition))[0]

    @torch.no_grad()
    def generate(self, prompts: list[str], seed: int, steps: int) -> Tensor:
        """An image for each prompt, with the pipeline's own sampler and guidance: (n, 3, h, w) in [0, 1]."""
        self.denoiser.eval()
        self.pipe.to(self.device)
        generator = torch.Generator().manual_seed(seed)
        side = self.resolution
        images = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            with torch.autocast(self.device.type, self.denoiser.dtype, enabled=self.denoiser.dtype != torch.float32):
                drawn = self.pipe(
                    batch, height=side, width=side, num_inference_steps=steps, generator=generator, output_type="pt"
                )
            images.append(drawn.images.float().cpu())
        return torch.cat(images)


class StableDiffusion(HubModel):
    """Stable Diffusion 1 and 2 (epsilon or v-prediction)."""

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, _ = self.pipe.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states}


class StableDiffusionXL(HubModel):
    """SDXL: pooled text beside the tokens, and the image's size."""

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def inputs(self, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> dict[str, Any]:
        """Original size, corner of the crop and target size: images are cropped to the resolution beforehand."""
        side = self.resolution
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=sample.dtype, device=sample.device)
        return {
            "sample": sample,
            "timestep": timesteps,
            "encoder_hidden_states": condition["encoder_hidden_states"],
            "added_cond_kwargs": {
                "text_embeds": condition["text_embeds"],
                "time_ids": sizes.expand(len(sample), -1),
            },
            "return_dict": False,
        }


class FlowTransformer(HubModel):
    """A transformer trained by flow matching."""

    part = "transformer"

    def own_sample_size(self) -> int:
        return self.pipe.default_sample_size

    def training_scheduler(self) -> Any:
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5."""

    def without_effect(self) -> tuple[str, ...]:
        last = len(self.denoiser.transformer_blocks) - 1  # it gives no text any more, and asks nothing for it
        return (f"transformer_blocks.{last}.attn.add_q_proj",)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompts, prompts, prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def inputs(self, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> dict[str, Any]:
        return {"hidden_states": sample, "timestep": timesteps, **condition, "return_dict": False}


class Flux(FlowTransformer):
    """Flux.1: latents are packed, 2 x 2 of them in a token."""

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, pooled, _ = self.pipe.encode_prompt(prompts, prompts, device=self.device)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def inputs(self, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> dict[str, Any]:
        """Packed latents, times in [0, 1], positions of tokens, and the guidance where the model was distilled."""
        b, channels, height, width = sample.shape
        words = condition["encoder_hidden_states"].shape[1]
        positions = self.pipe._prepare_latent_image_ids(b, height // 2, width // 2, sample.device, sample.dtype)
        guided = self.denoiser.config.guidance_embeds
        return {
            "hidden_states": self.pipe._pack_latents(sample, b, channels, height, width),
            "timestep": timesteps / 1000,
            **condition,
            "guidance": torch.full((b,), FLUX_GUIDANCE, device=sample.device) if guided else None,
            "txt_ids": torch.zeros(words, 3, device=sample.device, dtype=sample.dtype),
            "img_ids": positions,
            "return_dict": False,
        }

    def predict(self, noised: Noised, condition: dict[str, Tensor]) -> Tensor:
        packed = super().predict(noised, condition)
        height, width = (side * self.pipe.vae_scale_factor for side in noised.sample.shape[-2:])
        return self.pipe._unpack_latents(packed, height, width, self.pipe.vae_scale_factor)


KINDS: dict[str, type[HubModel]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""By the pipeline's class, as the model's ``model_index.json`` names it."""


def load_model(
    source: str,
    resolution: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> HubModel:
    """A pipeline from the hub or a folder, all its parts by ``model_index.json``.

    Args:
        source: hub name, such as "stabilityai/stable-diffusion-xl-base-1.0", or a folder of the same layout.
        resolution: side of the images in pixels; the model's own if None.
        dtype: of the frozen weights.

    Raises:
        OSError: no such model. ValueError: a pipeline of another kind, or a resolution that does not fit.
    """
    config = DiffusionPipeline.load_config(source)
    name = config["_class_name"]
    if name not in KINDS:
        raise ValueError(f"{source} is a {name}; there are {', '.join(KINDS)}")
    pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype).to(device or torch.device("cpu"))
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it would paint over generated images that are to be compared
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    return KINDS[name](pipe, source, resolution)
