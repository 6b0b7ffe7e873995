"""Models and data of whole training steps. Nothing here imports mapsurgery: any version of it can run the same work.

Weights and data are random: neither changes the work.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and one batch for it.

    Attributes:
        make: builds the model on the CPU, in float32.
        data: (batch, size, dtype, device) -> the loss of a model on one fixed random batch.
        size: side of the images or length of the sequences, unless --size is given.
        cpu_batch, cuda_batch: samples, unless --batch is given.
        inside: adapted are the Linear and Conv2d layers whose path starts with one of these.
        blocks: paths of the lists of blocks that --checkpoint recomputes one by one.
    """

    make: Callable[[int], nn.Module]
    data: Callable[[int, int, torch.dtype, torch.device], Loss]
    size: int
    cpu_batch: int
    cuda_batch: int
    inside: tuple[str, ...]
    blocks: tuple[str, ...]

    def targets(self, model: nn.Module) -> list[str]:
        """Paths of the layers that every method adapts."""
        kinds = (nn.Linear, nn.Conv2d)
        return [name for name, m in model.named_modules() if isinstance(m, kinds) and name.startswith(self.inside)]


CLASSES = 100


def image_data(batch: int, size: int, dtype: torch.dtype, device: torch.device) -> Loss:
    """Random images and labels; cross-entropy."""
    images = torch.randn(batch, 3, size, size).to(device, dtype)
    labels = torch.randint(CLASSES, (batch,)).to(device)
    return lambda model: F.cross_entropy(model(images).float(), labels)


def embedded_text_data(width: int, batch: int, size: int, dtype: torch.dtype, device: torch.device) -> Loss:
    """Random embeddings in, random targets for the last hidden state: no vocabulary, which no adapter touches."""
    embeddings = torch.randn(batch, size, width).to(device, dtype)
    wanted = torch.randn(batch, size, width).to(device, dtype)
    return lambda model: F.mse_loss(model(inputs_embeds=embeddings, use_cache=False).last_hidden_state, wanted)


def timm_model(name: str, size: int, **options: object) -> nn.Module:
    """A timm model with random weights."""
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def vit(name: str, size: int, **options: object) -> nn.Module:
    """A timm ViT for images of this size."""
    return timm_model(name, size, img_size=size, **options)


def llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, size: int) -> nn.Module:
    """The blocks of a Llama, with random weights and next to no vocabulary."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(size, 32),
        pad_token_id=None,
    )
    return LlamaModel(config)


def _vit(name: str, size: int, cpu_batch: int, cuda_batch: int, **options: object) -> Workload:
    make = partial(vit, name, **options)
    return Workload(make, image_data, size, cpu_batch, cuda_batch, ("blocks.",), ("blocks",))


def _llama(shape: tuple[int, int, int, int, int], size: int, cpu_batch: int, cuda_batch: int) -> Workload:
    data = partial(embedded_text_data, shape[0])
    return Workload(partial(llama, *shape), data, size, cpu_batch, cuda_batch, ("layers.",), ("layers",))


def _resnet(name: str, size: int, cpu_batch: int, cuda_batch: int) -> Workload:
    stages = tuple(f"layer{i}" for i in range(1, 5))
    # A last BatchNorm of zeros, the usual start of training from nothing, would keep gradients out of the branches.
    make = partial(timm_model, name, zero_init_last=False)
    return Workload(make, image_data, size, cpu_batch, cuda_batch, ("conv1", *(f"{s}." for s in stages)), stages)


WORKLOADS: dict[str, Workload] = {
    "vit_test": _vit("vit_tiny_patch16_224", 32, 2, 2, depth=2),
    "vit_small": _vit("vit_small_patch16_224", 224, 8, 128),
    "vit_base": _vit("vit_base_patch16_224", 224, 2, 128),
    "llama_test": _llama((64, 128, 2, 4, 2), 8, 2, 2),
    "llama_tiny": _llama((256, 688, 4, 4, 4), 128, 8, 32),
    "llama_135m": _llama((576, 1536, 30, 9, 3), 128, 1, 16),  # the shape of SmolLM-135M
    "llama_8b": _llama((4096, 14336, 4, 32, 8), 1024, 1, 4),  # four of the 32 layers of Llama 3 8B
    "resnet_test": _resnet("resnet10t", 32, 2, 2),
    "resnet50": _resnet("resnet50", 224, 2, 64),
}


@dataclass(frozen=True)
class Model:
    """A workload as the command line names it, NAME or NAME:BATCH or NAME:BATCHxSIZE.

    Raises:
        argparse.ArgumentTypeError: no such workload, or batch and size are not positive numbers.
    """

    name: str
    batch: int | None = None
    size: int | None = None

    @staticmethod
    def parse(text: str) -> Model:
        name, colon, shape = text.partition(":")
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f"no model is called {name!r}; there are {', '.join(WORKLOADS)}")
        found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", shape)
        if colon and not found:
            raise argparse.ArgumentTypeError(f"{text!r}: after the colon stands BATCH or BATCHxSIZE, as in {name}:8x64")
        return Model(name, *(int(n) if n else None for n in found.groups())) if found else Model(name)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Random numbers from a seed inside, and as before outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def make_base(workload: Workload, size: int, dtype: str, device: torch.device) -> nn.Module:
    """The frozen model that all methods share."""
    with seeded(), device:
        model = workload.make(size)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    return model.to(device, kind).requires_grad_(False).train()


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules and buffers that holds the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
