"""accelerate's `save_state` and `load_state` for patched models: what was trained, and not the base.

    adapter_states(accelerator)  # once; then save_state and load_state as ever

See docs/tools.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import MODEL_NAME, SAFE_MODEL_NAME
from torch import nn

from .._adapter_file import ADAPTER_NAME, restore_each, save
from ..surgery.record import patched_parts

_HANDLES = "_mapsurgery_state_hooks"
"""Attribute of an accelerator whose states hold adapters."""


def adapter_states(accelerator: Accelerator, *, frozen: str = "refuse") -> None:
    """Let the states of an accelerator hold the adapters of its patched models in the place of these models.

    Models that are not patched are written and read as before, and so is the rest of a state. `load_state` also takes
    states that hold the whole of a patched model. Called again for an accelerator, it replaces the call before.

    Args:
        accelerator: models may be prepared before or after.
        frozen: of `mapsurgery.save`.

    Raises:
        ValueError: in `save_state`, no model is patched, or what `mapsurgery.save` refuses; in `load_state`, a file is
            damaged or does not fit its model, as in `mapsurgery.load`; in both, the folder has files of whole models,
            too, that stand for the same models. No file and no model is changed then.
        NotImplementedError: FSDP, DeepSpeed or Megatron-LM, whose models accelerate writes by itself.
    """
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise NotImplementedError(
            f"with {kind} accelerate writes models by itself, in pieces: leave adapter_states out, and states hold the "
            "whole model"
        )

    def writing(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        files = _files(models, folder)
        if not files:
            raise ValueError(f"none of the {len(models)} models of the accelerator is patched: call mapsurgery.patch")
        _refuse_both(models, files.values(), folder)
        each_node = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if each_node else accelerator.is_main_process:
            for i, file in files.items():
                save(models[i], file, frozen=frozen)
        for i in reversed(files):
            del weights[i]

    def reading(models: list[nn.Module], folder: str) -> None:
        files = {i: file for i, file in _files(models, folder).items() if os.path.isfile(file)}
        if files:
            _refuse_both(models, files.values(), folder)
        restore_each([(models[i], file) for i, file in files.items()])
        for i in reversed(files):
            del models[i]

    for handle in getattr(accelerator, _HANDLES, ()):
        handle.remove()
    handles = [accelerator.register_save_state_pre_hook(writing), accelerator.register_load_state_pre_hook(reading)]
    setattr(accelerator, _HANDLES, handles)


def _refuse_both(models: list[nn.Module], files: Iterable[str], folder: str) -> None:
    """Raises ValueError where a folder holds more whole models than those that have no file of adapters.

    accelerate numbers the models that it writes, and leaves what another run wrote.
    """
    adapters = [os.path.basename(file) for file in files]
    numbers = [f"_{i}" if i else "" for i in range(len(models) - len(adapters), len(models))]
    names = [name for i in numbers for name in (f"{SAFE_MODEL_NAME}{i}.safetensors", f"{MODEL_NAME}{i}.bin")]
    whole = [name for name in names if os.path.exists(os.path.join(folder, name))]
    if whole:
        raise ValueError(
            f"{folder} has {', '.join(whole)} of a state that holds whole models, where {', '.join(adapters)} is in "
            "their place, and which of them load_state should take cannot be told: use a folder for each, or remove "
            "the files that are not wanted"
        )


def _files(models: list[nn.Module], folder: str) -> dict[int, str]:
    """The files of the patched models, by the models' places: `ADAPTER_NAME`, then "adapter_1.safetensors" ..."""
    patched = [i for i, model in enumerate(models) if patched_parts(model)]
    name, ending = os.path.splitext(ADAPTER_NAME)
    return {i: os.path.join(folder, f"{name}_{i}{ending}" if i else ADAPTER_NAME) for i in patched}
