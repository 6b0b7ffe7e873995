"""TRL's trainers for patched models. The reference model costs no second copy: it is the same model.

    from mapsurgery.integrations.trl import DPOTrainer  # in place of trl's

    trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)  # a patched model

See docs/tools.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trl
from peft import PeftConfig, PeftModel
from torch import nn

from .._adapter_file import restore, save
from ..surgery.merge import merge, unmerge
from ..surgery.patch import disabled
from ..surgery.record import find_patched, find_trained, patched_parts
from .transformers import ADAPTER_NAME, AdapterTrainer

REFERENCE_NAME = "reference.safetensors"
"""The file of `mapsurgery.save` in a checkpoint's folder that holds the adapters of the reference."""

_POLICY, _REFERENCE = "default", "ref"
"""TRL's names of PEFT's adapters: what is trained, and a copy of it as it was given."""


class AsPeftModel(PeftModel):
    """A patched model in the shape in which TRL, transformers and accelerate expect one with adapters.

    They ask `isinstance(model, PeftModel)`, and then call what is defined here; everything else is the model's own. It
    holds the model and leaves no trace on it; TRL does (a fused `forward`, `model_tags`). What PEFT would do with
    adapters of its own raises AttributeError.
    """

    prefix = "no parameter has this name"
    """Of adapters among the parameters of a merged model, which has none."""

    base_model: Any

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)  # PeftModel's own makes adapters
        find_patched(model)
        self.base_model = _Holder(model)
        self.base_model.peft_config = {_POLICY: PeftConfig()}
        self._is_prompt_learning, self._adapters_disabled = False, False
        self.active_adapter = _POLICY
        self._copies: dict[str, list[tuple[nn.Module, str, Any]]] = {}  # of Parameters, with their places

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.generate(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the adapters alone, as PEFT does: `ADAPTER_NAME`. Then: ``mapsurgery.load(base, file)``.

        Of a merged model it writes the whole, for `from_pretrained`.
        """
        if not patched_parts(self):
            self.base_model.model.save_pretrained(save_directory, *args, **kwargs)
        elif kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            save(self, os.path.join(save_directory, ADAPTER_NAME), frozen="keep")

    def add_adapter(self, adapter_name: str, *_: Any, **__: Any) -> None:
        """Keep what is trained as it is now: adapters and what `train` named, kilobytes as a rule."""
        self.peft_config[adapter_name] = self.peft_config[_POLICY]
        root, _record = find_trained(self)
        own = [(m, name, p) for m in root.modules() for name, p in m._parameters.items() if p is not None]
        trained = [(module, name, p) for module, name, p in own if p.requires_grad]
        copies = {p: nn.Parameter(p.detach().clone()) for *_, p in trained}
        self._copies[_POLICY] = trained
        self._copies[adapter_name] = [(module, name, copies[p]) for module, name, p in trained]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        leaving, coming = self._copies[self.active_adapter], self._copies[adapter_name]
        self._copies[self.active_adapter] = [(module, name, module._parameters[name]) for module, name, _ in leaving]
        places: dict[Any, Any] = {parameter: module._parameters[name] for module, name, parameter in coming}
        # Trainers move the model after they had it copied.
        here = {p: p if p.device == q.device else nn.Parameter(p.detach().to(q.device)) for p, q in places.items()}
        self._copies[adapter_name] = [(module, name, here[parameter]) for module, name, parameter in coming]
        for module, name, parameter in self._copies[adapter_name]:
            module._parameters[name] = parameter
        self.active_adapter = adapter_name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        with disabled(self):
            yield

    def merge_adapter(self) -> None:
        merge(self, keep_base=True)

    def unmerge_adapter(self) -> None:
        unmerge(self)


class _Holder(nn.Module):
    """Between the two, as PEFT has it: names begin with ``base_model.model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class _WithReference(AdapterTrainer):
    """A trainer whose reference is the model as it was given: the base, where the adapters are new.

    TRL makes the reference of a model with PEFT's adapters in the same way. Checkpoints hold the adapters of the
    reference, too, so that training goes on with the same one.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(AsPeftModel(model), *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and _REFERENCE in self.model.peft_config:
            with self._as_reference():
                save(self.model, os.path.join(output_dir or self.args.output_dir, REFERENCE_NAME), frozen="keep")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = os.path.join(resume_from_checkpoint, REFERENCE_NAME)
        if _REFERENCE in self.model.peft_config and os.path.isfile(file):
            with self._as_reference():
                restore(self.model, file)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        self.model.set_adapter(_REFERENCE)
        try:
            yield
        finally:
            self.model.set_adapter(_POLICY)


class SFTTrainer(AdapterTrainer, trl.SFTTrainer):
    """`trl.SFTTrainer` with what `AdapterTrainer` does."""


class RewardTrainer(AdapterTrainer, trl.RewardTrainer):
    """`trl.RewardTrainer` with what `AdapterTrainer` does. Name the new head in `train` of `patch`."""


class DPOTrainer(_WithReference, trl.DPOTrainer):
    """`trl.DPOTrainer` with what `AdapterTrainer` does, and a reference that is the model itself."""


class KTOTrainer(_WithReference, trl.KTOTrainer):
    """`trl.KTOTrainer` with what `AdapterTrainer` does, and a reference that is the model itself."""


class GRPOTrainer(_WithReference, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with what `AdapterTrainer` does, and a reference that is the model itself."""


class RLOOTrainer(_WithReference, trl.RLOOTrainer):
    """`trl.RLOOTrainer` with what `AdapterTrainer` does, and a reference that is the model itself."""
