"""transformers' `Trainer` for patched models, and with it any subclass of `Trainer`.

    trainer = AdapterTrainer(model, arguments, train_dataset=data)  # a patched model, quantised or not
    trainer.train()  # checkpoints hold the adapters and what else was trained, and not the base
    trainer.save_model("run")  # then: mapsurgery.load(base, "run/adapter.safetensors")

See docs/tools.md.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from shutil import copy
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .._adapter_file import ADAPTER_NAME, restore, save
from .._optim import param_groups as make_groups
from ..interrupts import undone_by
from ..methods import Adapter
from ..surgery.adapted import AdaptedLayer
from ..surgery.merge import is_merged, merge, unmerge
from ..surgery.quantised.layer import QuantisedLinear
from ..surgery.record import all_sites, find_patched, find_trained, refuse_disabled


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
        ValueError: the model is not patched; with `save_merged`, it is quantised, tied with adapters that differ, or
            cannot be written as it is; in `train`, what `mapsurgery.param_groups` refuses, adapters that are disabled,
            an optimiser of one's own that leaves out what is to be trained, or a checkpoint whose model or optimiser
            does not fit: nothing is changed then.
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
        refuse_disabled(all_sites(self.model), "train")
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # of an earlier run, whose checkpoint this one overwrites
            for name in _whole_models(folder):
                os.remove(os.path.join(folder, name))
        super()._save_checkpoint(model, trial)

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
        whole = _whole_models(folder)
        if whole:  # a base may lie here, on purpose
            warnings.warn(
                f"{folder} has {whole[0]}, which was there before: from_pretrained reads that model, and not the "
                f"adapted one, whose adapters are in {ADAPTER_NAME} now. Save into another folder, or with save_merged",
                stacklevel=2,
            )
        for processing in (self.processing_class, getattr(self.data_collator, "tokenizer", None)):
            if processing is not None:
                processing.save_pretrained(folder)
                break
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        patched = self.model if model is None else model
        file = os.path.join(resume_from_checkpoint, ADAPTER_NAME)
        self._refuse_other_groups(resume_from_checkpoint)
        if os.path.isfile(file):
            _refuse_second_adapters(patched, resume_from_checkpoint)
            restore(patched, file)
        else:  # a checkpoint of the Trainer itself, whose model holds the adapters too
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))

    def _refuse_other_groups(self, folder: str) -> None:
        """Raises ValueError where a checkpoint's optimiser has other groups. It is loaded after the model."""
        file = os.path.join(folder, OPTIMIZER_NAME)
        if not os.path.isfile(file):
            return
        state = torch.load(file, map_location="meta", weights_only=True)
        made_here = self.optimizer is None
        own: Any = self.create_optimizer() if made_here else self.optimizer
        given, wanted = _described(state["param_groups"]), _described(own.param_groups)
        if given != wanted:
            self.optimizer = None if made_here else self.optimizer
            raise ValueError(
                f"the optimizer in {folder} has groups of {given} parameters, and this trainer's has {wanted}: go on "
                "with the trainer and the param_groups that wrote it (transformers' own Trainer makes other groups), "
                f"or remove {OPTIMIZER_NAME} there to go on with a new optimizer"
            )

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

    def take_back() -> None:
        model.__dict__.pop(flag, None)
        model.__dict__.update({flag: before[flag]} if flag in before else {})

    with undone_by(take_back):
        model.__dict__[flag] = True
        yield


@contextmanager
def _keeping_trained(model: nn.Module) -> Iterator[None]:
    """Puts back what is trained where it was cast within the block."""
    root, _ = find_trained(model)
    before = [(p, p.detach().clone()) for p in root.parameters() if p.requires_grad]

    def put_back() -> None:
        for parameter, value in before:
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)

    with undone_by(put_back):
        yield


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Within the block the model is a plain one with the adapted weights."""
    with undone_by(lambda: unmerge(model) if is_merged(model) else None):
        merge(model, keep_base=True)
        yield


def _described(groups: list[dict[str, Any]]) -> str:
    return ", ".join(f"{len(group['params'])} {group.get('name', '')}".strip() for group in groups)


def _whole_models(folder: str) -> list[str]:
    """Names of the files by which a folder holds the weights of a whole model, if it does."""
    pattern = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
    return sorted(filter(pattern.fullmatch, os.listdir(folder))) if os.path.isdir(folder) else []


def _refuse_second_adapters(model: nn.Module, folder: str) -> None:
    """Raises ValueError where the Trainer itself wrote adapters into a checkpoint, with their base, beside ours."""
    single, index = (os.path.join(folder, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    names: set[str] = set()
    if os.path.isfile(single):
        with safe_open(single, framework="pt") as handle:
            names = set(handle.keys())
    elif os.path.isfile(index):
        with open(index, encoding="utf-8") as read:
            names = set(json.load(read)["weight_map"])
    if names & {site.entry(name) for site in all_sites(model) for name in site.adapter.own_tensors()}:
        raise ValueError(
            f"{folder} has adapters twice, in {ADAPTER_NAME} and in a whole model that transformers' own Trainer wrote "
            f"there: remove {ADAPTER_NAME} to go on from the latter, or the files of the model to go on from the former"
        )


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
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                generation.save_pretrained(folder)
            except ValueError as error:
                raise ValueError(f"save_merged=True: the model's generation_config cannot be saved: {error}") from error
    if not hasattr(model, "save_pretrained"):  # the Trainer writes its state_dict with safetensors
        _refuse_shared_memory(model)


def _refuse_shared_memory(model: nn.Module) -> None:
    places: dict[tuple[Any, Any], str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        written = {**module._parameters, **module._buffers} if not isinstance(module, Adapter) else {}
        for name, tensor in written.items():
            if tensor is None or name in module._non_persistent_buffers_set or type(tensor.data) is not torch.Tensor:
                continue
            entry = f"{path}.{name}".lstrip(".")
            other = places.setdefault((tensor.device, tensor.data_ptr() or entry), entry)
            if other != entry:
                raise ValueError(
                    f"save_merged=True: {other} and {entry} share memory, and safetensors refuses to write that. Save "
                    "the adapters alone, or give the model a save_pretrained of its own"
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
