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
from typing import Any, TypeVar

from torch import Tensor, nn

from .._state_dict import Pairs, adapter_state_dict, fitting, places_of, write
from ..methods import Adapter
from ..surgery.paths import module_paths
from ..surgery.record import find_patched, persistent_buffers, record_of

_newer = "lightning.pytorch" in sys.modules or find_spec("pytorch_lightning") is None
_Callback: Any = import_module("lightning.pytorch" if _newer else "pytorch_lightning").Callback
_HOLD_PIECES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")

Module = TypeVar("Module", bound=nn.Module)


class AdapterCheckpoint(_Callback):
    """Lets a Trainer write what `adapters_only` keeps of its LightningModule, and go on from it.

    The module may be patched as a whole or in parts, until `configure_model` is through.

    Raises:
        ValueError: in `fit`, nothing of the module is patched; with `ckpt_path=`, what `adapters_only` refuses.
        NotImplementedError: a strategy that holds parts of parameters (FSDP, DeepSpeed, ModelParallelStrategy).
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        kind = type(trainer.strategy)
        if any(cls.__name__ in _HOLD_PIECES for cls in kind.__mro__):
            raise NotImplementedError(
                f"AdapterCheckpoint writes adapters that are whole in each process, and {kind.__name__} splits them: "
                "use one device or DDP, or leave the callback out: then checkpoints hold the whole model"
            )
        adapters_only(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        _parts(pl_module)


def adapters_only(module: Module) -> Module:
    """Let the state_dict of a LightningModule hold what was trained, and take such a one.

    `AdapterCheckpoint` calls it. Call it in the module's `__init__`, and `load_from_checkpoint` takes such a checkpoint
    too. Of each patched part of the module the state_dict then has what `mapsurgery.adapter_state_dict` gives; what
    lies outside of them it has as before. `load_state_dict` takes that, and also a state_dict of the whole module.

    Returns:
        The same module.

    Raises:
        ValueError: in `load_state_dict`, what `mapsurgery.load_adapter_state_dict` refuses, before anything changes;
            in both, nothing is patched.
    """
    if _keep not in module._state_dict_hooks.values():
        loading = _Loading()
        module.register_state_dict_post_hook(_keep)
        module.register_load_state_dict_pre_hook(loading.before)
        module.register_load_state_dict_post_hook(loading.after)
    return module


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """What was patched in a module, by what the names of its tensors begin with."""
    found = {paths[0]: part for part, paths in module_paths(module).items() if record_of(part) is not None}
    if not found:
        raise ValueError(f"nothing in the {type(module).__name__} is patched: call mapsurgery.patch on it or a part")
    return {f"{path}." if path else "": part for path, part in found.items()}


class _Keys:
    """The keys that the parts of a module have in a state_dict of the whole."""

    def __init__(self, module: nn.Module, parts: Iterable[nn.Module]) -> None:
        inside = {inner for part in parts for inner in part.modules()}
        self.adapters: set[str] = set()
        self.base: set[str] = set()
        for path, inner in module.named_modules(remove_duplicate=False):
            if inner in inside:
                keys = self.adapters if isinstance(inner, Adapter) else self.base
                keys |= {f"{path}.{name}".lstrip(".") for name in (*inner._parameters, *inner._buffers)}

    def __contains__(self, key: str) -> bool:
        """A quantised weight has keys below its own."""
        parts = key.split(".")
        return key in self.adapters or any(".".join(parts[:end]) in self.base for end in range(len(parts), 0, -1))


def _keep(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """Hook after state_dict."""
    parts = _parts(module)
    keys = _Keys(module, parts.values())
    for key in [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) in keys]:
        del state_dict[key]
    for path, part in parts.items():
        state: Any = adapter_state_dict(part)
        state_dict.update({f"{prefix}{path}{name}": tensor for name, tensor in state.items()})
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
