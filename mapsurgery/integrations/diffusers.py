"""Pipelines of diffusers with patched parts: LoRA files of diffusers, both ways, and adapters of the library itself.

    save_lora_weights(pipe, "run")  # parts patched with method "lora" or "dora": pipe.load_lora_weights("run") loads it
    load_lora_weights(pipe, "run")  # what diffusers, PEFT and the trainers that diffusers can read wrote
    save_adapters(pipe, "run")  # whatever the method: a file of mapsurgery.save for each patched part
    load_adapters(pipe, "run")

See docs/tools.md.
"""

from __future__ import annotations

import json
import os
from typing import Any, TypeVar

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._adapter_file import loading, save
from .._atomic_write import write_whole
from .._tensor_file import content_of
from ..interrupts import undone_by
from ..surgery.adapted import AdaptedLayer
from ..surgery.all_or_nothing import make
from ..surgery.record import all_sites
from ..surgery.reducers import refuse_reduced
from .peft import to_peft_config, to_peft_state_dict
from .peft.reader import loading as loading_peft

Pipeline = TypeVar("Pipeline", bound=Any)
Path = str | os.PathLike[str]


def save_lora_weights(pipe: Any, folder: Path, *, weight_name: str = LORA_WEIGHT_NAME_SAFE) -> None:
    """Write the LoRA of a pipeline's patched parts as one file of diffusers, which `pipe.load_lora_weights` takes.

    Its metadata says the scaling of each layer. The file appears whole or not at all, in a folder that is made if its
    parent exists.

    Args:
        pipe: a pipeline of diffusers with parts that are patched with method "lora" or "dora".
        weight_name: of the file in the folder, a ".safetensors".

    Raises:
        ValueError: the name has another ending; nothing is patched; a part is that the pipeline loads no LoRA into;
            something beside the adapters was trained, for which such a file has no place; or what `to_peft_state_dict`
            refuses, a part with method "map" first of all: merge it (`mapsurgery.merge`), or keep it with
            `save_adapters`. Nothing is written.
    """
    if not weight_name.endswith(".safetensors"):
        raise ValueError(f"weight_name must end in .safetensors, the format that is written, got {weight_name!r}")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for name, part in _patched(pipe).items():
        if name not in pipe._lora_loadable_modules:
            raise ValueError(
                f"{name} is patched, and a {type(pipe).__name__} loads LoRA only into "
                f"{', '.join(pipe._lora_loadable_modules)}: merge it (mapsurgery.merge), or use save_adapters"
            )
        try:
            config, state = to_peft_config(part), to_peft_state_dict(part, prefix=f"{name}.")
        except ValueError as error:
            raise ValueError(f"{name} of the pipeline: {error}; save_adapters keeps any adapter") from error
        if config["modules_to_save"]:
            raise ValueError(
                f"{name} has trained {', '.join(config['modules_to_save'][:5])} beside its adapters, for which a LoRA "
                "file of diffusers has no place: use save_adapters"
            )
        diverged = [key for key, t in state.items() if not t.isfinite().all()]
        if diverged:
            raise ValueError(f"what was trained holds NaN or infinite values, nothing was saved: {diverged[0]}")
        if isinstance(part, PreTrainedModel):
            state = _as_transformers_reads(name, state)
        tensors |= {key: t.cpu().contiguous().clone() for key, t in state.items()}
        metadata |= {f"{name}.{key}": value for key, value in config.items()}
    text = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}
    folder = _made(folder)
    write_whole({os.path.join(folder, weight_name): content_of(tensors, text)})


def load_lora_weights(pipe: Pipeline, source: Any, **options: Any) -> Pipeline:
    """Patch the parts of a fresh pipeline as a LoRA says that diffusers can load, and put the LoRA into them.

    diffusers reads the file, with PEFT, whatever format it converts (that of its training scripts, kohya's and others);
    what it makes of it becomes adapters of this library, of method "lora" or "dora", and is taken out again.

    Args:
        source, options: as of `pipe.load_lora_weights`: a folder, a file, a repository or a dictionary; `weight_name`.

    Returns:
        The same pipeline.

    Raises:
        ValueError: a part is patched already or holds a LoRA of PEFT's, nothing in the file is for this pipeline, or
            what `from_peft_state_dict` refuses. The pipeline is then as it was.
        TypeError: an `adapter_name`, as adapters of this library have none.
    """
    from peft import get_peft_model_state_dict

    if "adapter_name" in options:
        raise TypeError(
            f"adapter_name={options['adapter_name']!r}: adapters of mapsurgery have no names, a part has one set; "
            "leave it out, or use pipe.load_lora_weights for LoRAs of PEFT's by name"
        )

    parts = {name: part for name, part in _parts(pipe).items() if name in pipe._lora_loadable_modules}
    for name, part in parts.items():
        refuse_reduced(part)
        if _is_patched(part) or getattr(part, "peft_config", None):
            what = "patched already: unpatch it first (mapsurgery.unpatch)"
            other = "adapted by PEFT: fuse that or unload it first (pipe.fuse_lora, pipe.unload_lora_weights)"
            raise ValueError(f"{name} of the pipeline is {what if _is_patched(part) else other}")
    flags = [(p, p.requires_grad) for part in parts.values() for p in part.parameters()]

    def unload() -> None:
        pipe.unload_lora_weights()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    with undone_by(unload):
        pipe.load_lora_weights(source, adapter_name=_NAME, **options)
        found = {}
        for name, part in parts.items():
            config = getattr(part, "peft_config", {}).get(_NAME)
            if config is not None:
                state = get_peft_model_state_dict(part, adapter_name=_NAME)
                state = {key: t.detach().clone() for key, t in state.items()}
                if config.use_dora and isinstance(part, PreTrainedModel):
                    state |= _magnitudes(pipe, name, source, options, state)
                found[name] = state, config.to_dict()
    if not found:
        raise ValueError(f"the LoRA holds nothing for a {type(pipe).__name__}: {', '.join(parts)}")
    make(*(loading_peft(parts[name], *lora) for name, lora in found.items()))
    return pipe


_NAME = "mapsurgery"


def _magnitudes(pipe: Any, name: str, source: Any, options: dict[str, Any], state: Any) -> dict[str, Tensor]:
    """DoRA's magnitudes of a text encoder from the file: transformers loses those without ".weight" in their names."""
    read = pipe.lora_state_dict(source, **options)
    tensors = read[0] if isinstance(read, tuple) else read
    found = {key.removeprefix(f"{name}.").removesuffix(".weight"): tensor for key, tensor in tensors.items()}
    return {key: found[key if key in found else f"text_model.{key}"] for key in state if key.endswith(_DORA)}


def save_adapters(pipe: Any, folder: Path, *, frozen: str = "refuse") -> None:
    """Write a file of `mapsurgery.save` for each patched part of a pipeline: "unet.safetensors", and so on.

    Args:
        folder: made if its parent exists.
        frozen: of `mapsurgery.save`.

    Raises:
        ValueError: nothing is patched, the folder holds a file for a part that is not, a part holds a LoRA of PEFT's
            or was patched while it did, or what `mapsurgery.save` refuses. Nothing is written.
    """
    patched = _patched(pipe)
    for name, part in patched.items():
        inner = next((site.path for site in all_sites(part) if "base_layer" in site.path.split(".")), None)
        if inner is not None:
            raise ValueError(
                f"{name} was patched while it held a LoRA of PEFT's: no plain pipeline has a layer called {inner}. "
                "mapsurgery.merge puts the adapters into the weights; for a file, patch first and load the LoRA then"
            )
        if getattr(part, "peft_config", None):
            raise ValueError(
                f"{name} holds a LoRA of PEFT's, which no plain pipeline has: pipe.unload_lora_weights() first. Where "
                "it was loaded after patch, PEFT has frozen the adapters: frozen='keep' then saves them as they are"
            )
    folder = os.path.realpath(os.fspath(folder))
    for name in _parts(pipe):
        if name not in patched and os.path.exists(_file(folder, name)):
            raise ValueError(f"{_file(folder, name)} exists and {name} is not patched: load_adapters would load it")
    _made(folder)
    for name, part in patched.items():
        save(part, _file(folder, name), frozen=frozen)


def load_adapters(pipe: Pipeline, folder: Path, *, base: str = "refuse") -> Pipeline:
    """Patch the parts of a fresh pipeline for which `save_adapters` wrote files.

    Args:
        base: of `mapsurgery.load`.

    Returns:
        The same pipeline.

    Raises:
        FileNotFoundError: there is no file for any part.
        ValueError: what `mapsurgery.load` refuses. The pipeline is then as it was.
    """
    parts = _parts(pipe)
    files = {name: file for name in parts if os.path.exists(file := _file(os.fspath(folder), name))}
    if not files:
        raise FileNotFoundError(f"{folder} holds no adapters for a part of the pipeline: {', '.join(parts)}")
    make(*(loading(parts[name], file, base) for name, file in files.items()))
    return pipe


def _as_transformers_reads(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's LoRA, whose keys diffusers rewrites and transformers loads: it wants DoRA's full names.

    Raises:
        ValueError: diffusers cannot tell what it is.
    """
    try:
        convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    except ValueError as error:
        raise ValueError(
            f"diffusers reads no LoRA of {name} in which none of the layers of its attention has one ({error}): adapt "
            "a q_proj, k_proj, v_proj or out_proj too, or use save_adapters"
        ) from error
    return {f"{key}.weight" if key.endswith(_DORA) else key: tensor for key, tensor in state.items()}


_DORA = "lora_magnitude_vector"


def _file(folder: str, name: str) -> str:
    return os.path.join(folder, f"{name}.safetensors")


def _made(folder: Path) -> str:
    path = os.path.realpath(os.fspath(folder))
    if not os.path.isdir(path):
        os.mkdir(path)
    return path


def _parts(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _is_patched(part: nn.Module) -> bool:
    return any(isinstance(module, AdaptedLayer) for module in part.modules())


def _patched(pipe: Any) -> dict[str, nn.Module]:
    found = {name: part for name, part in _parts(pipe).items() if _is_patched(part)}
    if not found:
        raise ValueError(
            f"no part of the {type(pipe).__name__} is patched ({', '.join(_parts(pipe))}): call mapsurgery.patch on one"
        )
    return found
