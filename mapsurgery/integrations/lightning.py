"""Lightning's checkpoints of patched models, which hold what was trained and not the base.

    Trainer(callbacks=[AdapterCheckpoint()])  # every checkpoint of the trainer, and `ckpt_path=`

It serves `pytorch_lightning` and `lightning.pytorch`. See docs/tools.md.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from typing import Any, TypeVar

from torch import Tensor, nn

from .._state_dict import Pairs, adapter_state_dict, fitting, places_of, write
from ..methods import Adapter
from ..surgery.record import all_sites, find_patched, patched_parts, persistent_buffers, refuse_disabled

_newer = "lightning.pytorch" in sys.modules or find_spec("pytorch_lightning") is None
_lightning: Any = import_module("lightning.pytorch" if _newer else "pytorch_lightning")
_Callback: Any = _lightning.Callback
_CheckpointIO: Any = _lightning.plugins.CheckpointIO
_AVERAGING: Any = getattr(_lightning.callbacks, "WeightAveraging", ())  # older ones have none
_HOLD_PIECES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")

Module = TypeVar("Module", bound=nn.Module)


class AdapterCheckpoint(_Callback):
    """Lets a Trainer write what was trained of its LightningModule, without the base, and go on from it.

    Of each patched part of the module, checkpoints hold what `mapsurgery.adapter_state_dict` gives; of the rest, what
    they held before. So does each that this trainer writes later. The module itself stays as it is: its state_dict is
    whole, and another trainer's checkpoints are. Where nothing is patched (any more), checkpoints are whole.

    The module may be patched as a whole or in parts, until `configure_model` is through.

    Raises:
        ValueError: in `fit`, nothing of the module is patched, or its adapters are disabled; with `ckpt_path=`, what
            `adapters_only` refuses; it comes after a callback that averages weights.
        NotImplementedError: a strategy that holds parts of parameters (FSDP, DeepSpeed, ModelParallelStrategy).
    """

    def __init__(self) -> None:
        super().__init__()
        self._hooks: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        strategy = trainer.strategy
        if any(cls.__name__ in _HOLD_PIECES for cls in type(strategy).__mro__):
            raise NotImplementedError(
                f"AdapterCheckpoint writes adapters that are whole in each process, and {type(strategy).__name__} "
                "splits them: use one device or DDP, or leave the callback out: then checkpoints hold the whole model"
            )
        if _keep not in pl_module._state_dict_hooks.values():
            for earlier in takewhile(lambda callback: callback is not self, trainer.callbacks):
                if isinstance(earlier, _AVERAGING):  # it has copied the module, which takes no adapters alone yet
                    raise ValueError(f"AdapterCheckpoint must come before {type(earlier).__name__} among the callbacks")
            self._hooks = _taking_adapters(pl_module)
        if not isinstance(strategy.checkpoint_io, _WithoutBase):
            strategy.checkpoint_io = _WithoutBase(strategy)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        parts = _parts(pl_module)
        if not parts:
            name = type(pl_module).__name__
            raise ValueError(f"nothing in the {name} is patched: call mapsurgery.patch on it or a part")
        for part in parts.values():
            refuse_disabled(all_sites(part), "train")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")


class _WithoutBase(_CheckpointIO):
    """Writes a strategy's checkpoints without the base; else it is the one that was there before."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.given = strategy, strategy.checkpoint_io

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        for entry in ("state_dict", "current_model_state"):  # the latter beside averages, which are in the former then
            if entry in checkpoint:
                _keep(self.strategy.lightning_module, checkpoint[entry], "")
        self.given.save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return self.given.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.given.remove_checkpoint(*args, **kwargs)

    def teardown(self) -> None:
        self.given.teardown()


def adapters_only(module: Module) -> Module:
    """Let the state_dict of a LightningModule hold what was trained, and take such a one.

    Call it in the module's `__init__`, and `load_from_checkpoint` takes a checkpoint of `AdapterCheckpoint`. Of each
    patched part of the module the state_dict then has what `mapsurgery.adapter_state_dict` gives; what lies outside of
    them it has as before. `load_state_dict` takes that, and also a state_dict of the whole module. While nothing is
    patched (after `merge`, `unpatch`), both are as before.

    Returns:
        The same module.

    Raises:
        ValueError: in `load_state_dict`, what `mapsurgery.load_adapter_state_dict` refuses, before anything changes.
    """
    if _keep not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_keep)
        _taking_adapters(module)
    return module


def _taking_adapters(module: nn.Module) -> list[Any]:
    """Let load_state_dict take adapters alone. Returns: the hooks' handles."""
    loading = _Loading()
    return [
        module.register_load_state_dict_pre_hook(loading.before),
        module.register_load_state_dict_post_hook(loading.after),
    ]


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """What was patched in a module, by what the names of its tensors begin with."""
    return {f"{path}." if path else "": part for path, part in patched_parts(module).items()}


class _Keys:
    """The keys that the parts of a module have in a state_dict of the whole; `of`: the tensors', by their ids."""

    def __init__(self, module: nn.Module, parts: Iterable[nn.Module]) -> None:
        inside = {inner for part in parts for inner in part.modules()}
        self.adapters: set[str] = set()
        self.base: set[str] = set()
        self.of: dict[int, str] = {}
        for path, inner in module.named_modules(remove_duplicate=False):
            if inner in inside:
                own = {f"{path}.{n}".lstrip("."): t for n, t in (*inner._parameters.items(), *inner._buffers.items())}
                (self.adapters if isinstance(inner, Adapter) else self.base).update(own)
                self.of.update({id(tensor): key for key, tensor in own.items()})

    def __contains__(self, key: str) -> bool:
        """A quantised weight has keys below its own."""
        parts = key.split(".")
        return key in self.adapters or any(".".join(parts[:end]) in self.base for end in range(len(parts), 0, -1))


def _keep(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any = None) -> None:
    """Leave of a module's state_dict, or of one with its keys, what was trained. A hook after state_dict."""
    parts = _parts(module)
    keys = _Keys(module, parts.values())
    inside = [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) in keys]
    whole = {key.removeprefix(prefix): state_dict.pop(key) for key in inside}
    if not whole:
        return
    for path, part in parts.items():
        state: Any = adapter_state_dict(part)
        places = _places(part)
        for name in state:
            state_dict[f"{prefix}{path}{name}"] = whole[keys.of[id(places[name][0])]]
        if hasattr(state_dict, "_metadata"):
            state_dict._metadata.update({f"{prefix}{path}{name}": said for name, said in state._metadata.items()})


class _Loading:
    """Hooks around load_state_dict. `alone`: the keys' prefix where what is loaded holds no base, or None."""

    alone: str | None = None

    def before(self, module: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        parts = _parts(module)
        given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        places = {f"{path}{name}" for path, part in parts.items() for name in _places(part)}
        self.alone = prefix if given.isdisjoint(_Keys(module, parts.values()).base - places) else None
        if self.alone is None:
            return
        elsewhere = module.state_dict().keys() - places
        pairs: Pairs = []
        for path, part in parts.items():
            names = [key.removeprefix(path) for key in given - elsewhere if key.startswith(path)]
            pairs += fitting(part, _state_of(part, state_dict, f"{prefix}{path}", names))
        write(pairs)
        for key in given - elsewhere:
            if key.startswith(tuple(parts)):
                del state_dict[f"{prefix}{key}"]

    def after(self, module: nn.Module, incompatible: Any) -> None:
        if self.alone is not None:
            keys, start = _Keys(module, _parts(module).values()), len(self.alone)
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key[start:] not in keys]


def _places(part: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return places_of(*find_patched(part))


def _state_of(part: nn.Module, state_dict: Any, prefix: str, names: Iterable[str]) -> OrderedDict[str, Tensor]:
    """The state of a part. Buffers that it leaves out are those from `patch`."""
    _, record = find_patched(part)
    before = record.originals.tensors
    state = OrderedDict((name, t) for name in persistent_buffers(part) if (t := before.get(name)) is not None)
    state.update({name: state_dict[prefix + name] for name in names})
    metadata = getattr(state_dict, "_metadata", None) or {}
    state._metadata = {  # type: ignore[attr-defined]
        key.removeprefix(prefix): said for key, said in metadata.items() if key.startswith(prefix)
    }
    return state
