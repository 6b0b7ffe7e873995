"""A gradient at the inputs of a model whose first layers are frozen, where its own code would otherwise cut the graph.

Reentrant activation checkpointing and reversible blocks run their part of the model without autograd, and build the
graph in the backward, but only if one of their inputs requires a gradient. In a model with a frozen base none does, and
every adapter in there would silently learn nothing. So the root of a patched model watches for adapted layers that run
without autograd while the model as a whole runs with it; where that happens, its floating inputs and the outputs of its
embeddings are made to require a gradient. Where it does not happen, nothing is changed and nothing costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..methods import Adapter

_FLAGS = ("gradient_checkpointing", "grad_checkpointing")
"""Attributes by which transformers, diffusers and timm say that a module recomputes activations."""


@dataclass
class Watch:
    """State of one patched model, shared by its adapters and hooks.

    Attributes:
        learning: a forward of the root is running, with autograd (in eval mode too: some train so).
        cut: an adapted layer ran without autograd in it.
        needed: the model cuts the graph: inputs are made to require a gradient from now on.
        flagged: modules that have a switch for checkpointing.
    """

    learning: bool = False
    cut: bool = False
    needed: bool = False
    flagged: list[nn.Module] = field(default_factory=list)

    def active(self) -> bool:
        """Whether inputs must require a gradient in the forward that is running."""
        return self.needed or any(getattr(module, flag, False) for module in self.flagged for flag in _FLAGS)

    def saw(self) -> None:
        """An adapted layer runs; called where autograd is off."""
        self.cut = self.cut or self.learning


class _Before:
    """Pre-hook of the root."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        watch = self.watch
        watch.learning = torch.is_grad_enabled()
        watch.cut = False
        if not watch.learning or not watch.active():
            return None
        return tree_map_only(Tensor, _requiring_grad, (args, kwargs))


class _After:
    """Post-hook of the root: where the graph was found to be cut for the first time, the forward is run once more."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        watch = self.watch
        if torch.compiler.is_compiling() or not watch.learning:
            return None
        watch.learning = False
        if not watch.cut or watch.active():
            return None
        watch.needed = True
        return model(*args, **kwargs)


class _AfterEmbedding:
    """Post-hook of an embedding, whose ids can carry no gradient."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or not self.watch.learning or not self.watch.active():
            return None
        return tree_map_only(Tensor, _requiring_grad, output)


def _requiring_grad(x: Tensor) -> Tensor:
    """The same numbers with a gradient; a copy, so that the model may write into it and the caller's is left alone."""
    floating = x.is_floating_point() or x.is_complex()
    if not floating or x.requires_grad or not torch.is_grad_enabled():
        return x
    return x.detach().requires_grad_().clone()


_HOOKS = (_Before, _After, _AfterEmbedding)
_NO_HOOKS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Their fast path is taken only where they have no hooks; and they cut no graph."""


def install(model: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Watch a model that was just patched."""
    if isinstance(model, _NO_HOOKS):
        return
    watch = Watch(flagged=[m for m in model.modules() if any(flag in m.__dict__ for flag in _FLAGS)])
    model.register_forward_pre_hook(_Before(watch), with_kwargs=True)
    model.register_forward_hook(_After(watch), with_kwargs=True)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.register_forward_hook(_AfterEmbedding(watch))
    for adapter in adapters:
        adapter.watch = watch


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.watch = None
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _HOOKS)]:
                del hooks[key]
                with_kwargs.pop(key, None)
