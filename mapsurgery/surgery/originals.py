"""What is not adapted, as it was at `patch`: `unpatch` gives it back, and `save` knows by it what training moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..methods import Adapter

_SAMPLES = 64


@dataclass(frozen=True)
class Mark:
    """What is remembered of a frozen parameter: torch's counter of writes, its address, shape and some numbers."""

    version: int
    address: int
    sample: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, parameter: Tensor) -> Mark | None:
        """None of one without numbers, or in another form than a plain tensor."""
        plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided
        if not plain or parameter.is_meta or isinstance(parameter, FakeTensor) or parameter.numel() == 0:
            return None
        version = 0 if parameter.is_inference() else parameter._version
        return cls(version, parameter.data_ptr(), sample_of(parameter), parameter.shape)

    def moved(self, parameter: Tensor) -> bool:
        """Whether the parameter holds other numbers, as far as can be told; moving and casting it changes none."""
        now = Mark.of(parameter)
        if now is None or now.sample.shape != self.sample.shape:
            return False
        if now.address == self.address and now.version != self.version:
            return True
        rounded = min((self.sample.dtype, now.sample.dtype), key=lambda dtype: dtype.itemsize)
        before, after = (sample.to(now.sample.device, rounded) for sample in (self.sample, now.sample))
        return not same_numbers(before, after)


def sample_of(parameter: Tensor) -> Tensor:
    """Some of its elements, spread evenly."""
    count = parameter.numel()
    places = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64).long()
    return parameter.detach()[torch.unravel_index(places, parameter.shape)]


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Equal, with NaN equal to NaN."""
    if a.dtype.itemsize == 1:  # float8 knows no comparison
        a, b = a.float(), b.float()
    return bool(((a == b) | ((a != a) & (b != b))).all())


@dataclass
class Originals:
    """Tensors of a patched model, by name, as they were when it was patched, or as a checkpoint of a base brought them.

    Attributes:
        tensors: copies of the trained parameters and persistent buffers, which training changes and `unpatch` gives
            back. None for a tensor on meta.
        marks: of the frozen parameters that are not adapted. None where there is nothing to remember.
    """

    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    marks: dict[str, Mark | None] = field(default_factory=dict)

    def moved(self, name: str, parameter: Tensor) -> bool:
        """Whether a frozen parameter holds other numbers than it did."""
        mark = self.marks[name]
        return mark is not None and mark.moved(parameter)

    def changed(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor differs from its copy; one of which there is no copy counts as changed."""
        before = self.tensors.get(name)
        return before is None or before.shape != tensor.shape or not same_numbers(before.to(tensor), tensor)

    def below(self, path: str) -> Originals:
        """The same with the names that things have in a model that holds this one as `path`."""
        return Originals(
            {f"{path}.{name}": tensor for name, tensor in self.tensors.items()},
            {f"{path}.{name}": mark for name, mark in self.marks.items()},
        )


class _Arrival:
    """Pre-hook of loading into one module: what a checkpoint of a base brings is what was there.

    One that brings adapters holds what was trained since; then all of them are expected.

    Attributes:
        names: of the module's tensors in the model, by their keys in the module.
        load: what the modules of a model share: the load that is going on, and whether it brings adapters, too.
    """

    def __init__(self, names: dict[str, str], originals: Originals, load: dict[str, Any]) -> None:
        self.names, self.originals, self.load = names, originals, load

    def __call__(
        self,
        module: nn.Module,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        errors: list[str],
    ) -> None:
        if self.load.get("errors") is not errors:  # one list for a whole load, whose first module sees all of it
            adapters = {name: part for name, part in module.named_modules() if isinstance(part, Adapter)}
            arrive = any(part.arrives_in(state_dict, f"{prefix}{name}.") for name, part in adapters.items())
            self.load |= {"errors": errors, "adapters": arrive}
        if self.load["adapters"]:
            missing_keys += _lacking(module, state_dict, prefix) if strict else []
            for key, name in self.names.items():
                here = module._parameters.get(key)
                if here is not None and self._writes_the_same(name, here, state_dict.get(prefix + key)):
                    self.originals.marks[name] = Mark(0, 0, sample_of(here), here.shape)
            return
        for key, name in self.names.items():
            value = state_dict.get(prefix + key)
            if value is None:
                continue
            if name in self.originals.tensors:
                self.originals.tensors[name] = value.detach().clone()
            elif type(value) in (Tensor, nn.Parameter) and not value.is_meta and value.numel():
                self.originals.marks[name] = Mark(0, 0, sample_of(value), value.shape)

    def _writes_the_same(self, name: str, here: Tensor, value: Tensor | None) -> bool:
        """Whether a frozen parameter that nothing has moved gets the numbers that it holds: nor will that move it."""
        if self.originals.marks.get(name) is None or self.originals.moved(name, here):
            return False
        if value is None or type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.shape != here.shape:
            return False
        return same_numbers(here.detach(), value.detach().to(here))


def _lacking(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Keys of the module's own adapters of which a state_dict holds none; an adapter names what it lacks of some."""
    found: list[str] = []
    for name, child in module.named_children():
        keys = [f"{prefix}{name}.{key}" for key in child._parameters] if isinstance(child, Adapter) else []
        found += [] if any(key in state_dict for key in keys) else keys
    return found


def install(paths: Mapping[nn.Module, tuple[str, ...]], originals: Originals) -> None:
    """Let what a base's checkpoint brings, into the model or a part of it, be the original."""
    load: dict[str, Any] = {}
    known = originals.tensors.keys() | originals.marks.keys()
    for module, names in paths.items():
        if isinstance(module, torch.jit.ScriptModule | Adapter):
            continue
        own = {key: f"{names[0]}.{key}".lstrip(".") for key in (*module._parameters, *module._buffers)}
        tensors = {key: name for key, name in own.items() if name in known}
        module.register_load_state_dict_pre_hook(_Arrival(tensors, originals, load))


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        hooks = getattr(module, "_load_state_dict_pre_hooks", {})
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), _Arrival)]:
            del hooks[key]
