"""accelerate's `save_state` and `load_state` for patched models: what was trained, and not the base.

    adapter_states(accelerator)  # once; then save_state and load_state as ever

See docs/tools.md.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from torch import nn

from .._adapter_file import restore_each, save
from ..surgery.paths import module_paths
from ..surgery.record import record_of

ADAPTER_NAME = "adapter.safetensors"
"""The file of `mapsurgery.save` in a state's folder; of further models "adapter_1.safetensors" ..., by their order."""


def adapter_states(accelerator: Accelerator, *, frozen: str = "refuse") -> None:
    """Let the states of an accelerator hold the adapters of its patched models in the place of these models.

    Models that are not patched are written and read as before, and so is the rest of a state. `load_state` also takes
    states that hold the whole of a patched model.

    Args:
        accelerator: models may be prepared before or after.
        frozen: of `mapsurgery.save`.

    Raises:
        ValueError: in `save_state`, no model is patched, or what `mapsurgery.save` refuses; in `load_state`, a file is
            damaged or does not fit its model, as in `mapsurgery.load`; no model is changed then.
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
        each_node = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if each_node else accelerator.is_main_process:
            for i, file in files.items():
                save(models[i], file, frozen=frozen)
        for i in reversed(files):
            del weights[i]

    def reading(models: list[nn.Module], folder: str) -> None:
        files = {i: file for i, file in _files(models, folder).items() if os.path.isfile(file)}
        restore_each([(models[i], file) for i, file in files.items()])
        for i in reversed(files):
            del models[i]

    accelerator.register_save_state_pre_hook(writing)
    accelerator.register_load_state_pre_hook(reading)


def _files(models: list[nn.Module], folder: str) -> dict[int, str]:
    """The files of the patched models, by the models' places."""
    patched = [i for i, model in enumerate(models) if any(record_of(m) is not None for m in module_paths(model))]
    name, ending = os.path.splitext(ADAPTER_NAME)
    return {i: os.path.join(folder, f"{name}_{i}{ending}" if i else ADAPTER_NAME) for i in patched}
