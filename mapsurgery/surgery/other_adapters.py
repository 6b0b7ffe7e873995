"""Modules of a model that are the adapter of another library (PEFT's LoRA, say), and not the model's own.

They are recognised by the classes and names of their parents, so that no library has to be imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

_OF_THE_MODEL = ("base_model", "model", "lora_model", "base_layer", "original_module", "token_adapter")
"""Under what names a module of PEFT's holds the model, or a layer of it: everything else that it holds is PEFT's."""

_ADAPTERS = re.compile(r"lora_(A|B|a|b|down|up|mid|layer|embedding_.*|magnitude_vector)|(hada|lokr)_.*")
"""What libraries other than PEFT call a module that is a part of an adapter."""


@dataclass
class OtherAdapters:
    """What of a model belongs to the adapters of other libraries.

    Attributes:
        reasons: module -> why it is not adapted.
        held: (module, parameter) -> why this parameter of the model's own is not.
        names: module of such an adapter -> the name that the adapter begins with, in the layer that it changes.
    """

    model: nn.Module
    reasons: dict[nn.Module, str] = field(default_factory=dict)
    held: dict[tuple[nn.Module, str], str] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own: set[nn.Module] = set()
        found: dict[nn.Module, tuple[str, str]] = {}
        waiting = [self.model]
        while waiting:
            module = waiting.pop()
            if module in own:
                continue
            own.add(module)
            self._note(module)
            for name, child in module._modules.items():
                if child is None:
                    continue
                reason = _why_not(module, name)
                if reason is None:
                    waiting.append(child)
                else:
                    found[child] = name, reason
        for module, (name, reason) in found.items():
            for part in module.modules():
                if part not in own:  # what the model holds as well, as PEFT's `word_embeddings`, is the model's
                    self.reasons[part], self.names[part] = reason, name

    def _note(self, module: nn.Module) -> None:
        if not _of_peft(module):
            return
        self.reasons[module] = "a layer of PEFT's: what it wraps can be adapted"
        wrapped = getattr(module, "parameter_name", None)
        base = module._modules.get("base_layer")
        while base is not None and _of_peft(base):
            base = base._modules.get("base_layer")
        if isinstance(wrapped, str) and base is not None:
            self.held[base, wrapped] = "PEFT parametrises it in each forward (target_parameters)"

    def why_not(self, module: nn.Module, parameter: str) -> str | None:
        """Why another library has a better claim to this parameter, or None."""
        return self.reasons.get(module) or self.held.get((module, parameter))

    def frozen_by_patch(self, trained: set[nn.Parameter]) -> str | None:
        """What to say of parameters that these adapters train now and that `patch` freezes; None if there are none."""
        lost = {
            parameter: self.names.get(module, name)
            for module in self.reasons
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad and parameter not in trained
        }
        if not lost:
            return None
        count, globs = sum(p.numel() for p in lost), ", ".join(f'"*{name}*"' for name in dict.fromkeys(lost.values()))
        return f"another library's adapters train {count:,} parameters, which patch freezes; train=[{globs}] keeps them"


def _of_peft(module: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def _why_not(parent: nn.Module, name: str) -> str | None:
    """Why the child of this name is no part of the model proper, or None."""
    if not _of_peft(parent):
        return f"a part of another adapter ({name})" if _ADAPTERS.fullmatch(name) else None
    if name == "original_module" and "modules_to_save" in parent._modules:
        return "PEFT calls the copy of it that it trains (modules_to_save)"
    return None if name in _OF_THE_MODEL else f"a part of PEFT's adapter ({name})"
