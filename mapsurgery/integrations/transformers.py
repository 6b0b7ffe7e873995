"""transformers' `Trainer` for patched models, and with it any subclass of `Trainer`.

    trainer = AdapterTrainer(model, arguments, train_dataset=data)  # a patched model, quantised or not
    trainer.train()  # checkpoints hold the adapters and what else was trained, and not the base
    trainer.save_model("run")  # then: mapsurgery.load(base, "run/adapter.safetensors")

See docs/tools.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from shutil import copy
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from .._adapter_file import restore, save
from .._optim import param_groups as make_groups
from ..surgery.adapted import AdaptedLayer
from ..surgery.merge import merge, unmerge
from ..surgery.quantised.layer import QuantisedLinear
from ..surgery.record import all_sites, find_patched, find_trained

ADAPTER_NAME = "adapter.safetensors"
"""The file of `mapsurgery.save` in a checkpoint's folder."""


class AdapterTrainer(Trainer):
    """transformers' `Trainer` for a patched model. It mixes with others: ``class Mine(AdapterTrainer, Theirs)``.

    A quantised model is taken. Checkpoints and `save_model` write `ADAPTER_NAME` in place of the model; training goes
    on from them, and the best one is loaded at the end. The optimiser has the groups of `mapsurgery.param_groups`, with
    the learning rate and weight decay of the arguments. What is trained keeps its values and dtypes while the trainer
    is made: TRL's round those of quantised models to bfloat16.

    Args:
        model, args, kwargs: of the trainer; model, or what `model_init` makes, is patched.
        param_groups: further arguments of `mapsurgery.param_groups`, such as ``{"b_lr_factor": 16}``.
        frozen: of `mapsurgery.param_groups` and `mapsurgery.save`.
        save_merged: write the adapted model as a whole beside `ADAPTER_NAME`, for `from_pretrained`: `mapsurgery.merge`
            with one more copy of the adapted weights while it is written. Training goes on to the bit.

    Raises:
        ValueError: the model is not patched; with `save_merged`, quantised, or tied with adapters that differ; in
            `train`, what `mapsurgery.param_groups` refuses, or an optimiser of one's own that leaves out what is to be
            trained.
        NotImplementedError: FSDP or DeepSpeed, which hold parts of parameters.
    """

    model: Any  # the Trainer lets these be None, and so they are nowhere below
    args: Any
    state: Any
    _checking: ExitStack | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        *args: Any,
        param_groups: Mapping[str, Any] | None = None,
        frozen: str = "refuse",
        save_merged: bool = False,
        **kwargs: Any,
    ) -> None:
        self._group_options, self._frozen, self._save_merged = dict(param_groups or {}), frozen, save_merged
        with ExitStack() as self._checking:
            if model is not None:
                self._admit(model)
            super().__init__(model, *args, **kwargs)
        self._checking = None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise NotImplementedError(
                f"{type(self).__name__} saves adapters that are whole in each process, and FSDP or DeepSpeed is on: "
                "use one process, DDP, or the Trainer itself, which saves the whole model"
            )

    def _admit(self, model: nn.Module) -> None:
        find_patched(model)
        if self._save_merged:
            _refuse_to_write_whole(model)
        if self._checking is not None:
            self._checking.enter_context(_known_to_have_adapters(model))
            self._checking.enter_context(_keeping_trained(model))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._admit(model)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        rates = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay, "frozen": self._frozen}
        groups = make_groups(self.model, **(rates | self._group_options))
        if self.optimizer is not None:
            _refuse_untrained(self.model, groups, self.optimizer)
            return super().create_optimizer(model)
        given = self.optimizer_cls_and_kwargs
        kind, options = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if takes_groups(kind, options):
            options = {**options, "params": [*groups, *self._groups_beside_the_model()]}
        elif self._group_options:
            raise ValueError(f"{kind} makes groups of its own: param_groups cannot be passed with it")
        self.optimizer_cls_and_kwargs = kind, options
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given

    def _groups_beside_the_model(self) -> list[dict[str, Any]]:
        return []

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        save(self.model, os.path.join(folder, ADAPTER_NAME), frozen=self._frozen)
        if self._save_merged:
            with _merged(self.model):
                super()._save(folder, state_dict)
            return
        for processing in (self.processing_class, getattr(self.data_collator, "tokenizer", None)):
            if processing is not None:
                processing.save_pretrained(folder)
                break
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = os.path.join(resume_from_checkpoint, ADAPTER_NAME)
        if os.path.isfile(file):
            restore(self.model if model is None else model, file)
        else:  # a checkpoint of the Trainer itself, whose model holds the adapters too
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        file = os.path.join(checkpoint_folder, ADAPTER_NAME)
        if self.is_world_process_zero() and os.path.isfile(file):  # the Trainer copies the files that it knows
            copy(file, os.path.join(self.args.output_dir, ADAPTER_NAME))
        super()._push_from_checkpoint(checkpoint_folder)


@contextmanager
def _known_to_have_adapters(model: nn.Module) -> Iterator[None]:
    """The flag by which the Trainer tells a quantised model with adapters from one without.

    What else reads it takes it for PEFT's (`save_pretrained` among it), so it does not stay.
    """
    flag, before = "_hf_peft_config_loaded", dict(model.__dict__)
    model.__dict__[flag] = True
    try:
        yield
    finally:
        del model.__dict__[flag]
        model.__dict__.update({flag: before[flag]} if flag in before else {})


@contextmanager
def _keeping_trained(model: nn.Module) -> Iterator[None]:
    """Puts back what is trained where it was cast within the block."""
    root, _ = find_trained(model)
    before = [(p, p.detach().clone()) for p in root.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for parameter, value in before:
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Within the block the model is a plain one with the adapted weights."""
    merge(model, keep_base=True)
    try:
        yield
    finally:
        unmerge(model)


def _refuse_to_write_whole(model: nn.Module) -> None:
    """Raises ValueError where `from_pretrained` of the merged model would be another one."""
    quantised = [site.path for site in all_sites(model) if isinstance(site.layer, QuantisedLinear)]
    if quantised:
        raise ValueError(
            f"save_merged=True: {quantised[0]} is quantised and cannot hold what is merged as it is. Save the adapters "
            'alone, and merge them afterwards, with mapsurgery.merge(model, quantised="dequantise") or after '
            "mapsurgery.load on a base that is not quantised"
        )
    for module in model.modules():
        for name, other in getattr(module, "all_tied_weights_keys", {}).items():
            if _adapter_over(module, name) is not _adapter_over(module, other):
                raise ValueError(
                    f"save_merged=True: {name} and {other} are tied but not adapted alike, and from_pretrained would "
                    'tie them again. Patch with tied="share" (the default), or save the adapters alone'
                )


def _adapter_over(module: nn.Module, name: str) -> nn.Module | None:
    path, _, parameter = name.rpartition(".")
    layer = module.get_submodule(path)
    return layer.adapter_of(parameter) if isinstance(layer, AdaptedLayer) and parameter in layer.adapted else None


def takes_groups(kind: Any, options: Mapping[str, Any]) -> bool:
    """Whether an optimiser is made from groups, and not from the model or from its own (GaLore, LOMO, Muon)."""
    is_class = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    return is_class and not {"params", "model", "optimizer_dict"} & options.keys()


def _refuse_untrained(model: nn.Module, groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where an optimiser would never change what is to be trained: made before `patch`, as a rule."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    wanted = [parameter for group in groups for parameter in group["params"]]
    left_out = [names[parameter] for parameter in wanted if parameter not in held]
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise ValueError(
            f"the optimizer leaves out {len(left_out)} of {len(wanted)} parameters that are to be trained, and would "
            f"never change them: {', '.join(left_out[:3])}{more}. Make it after patch, of "
            "mapsurgery.param_groups(model, lr=...), or leave it to the trainer"
        )
