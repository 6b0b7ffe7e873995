"""A gradient at the inputs of a model whose first layers are frozen, where its own code would otherwise cut the graph.

Reentrant activation checkpointing and reversible blocks run their part of the model without autograd, inside a
`torch.autograd.Function`, and build the graph in the backward, but only if one of the Function's inputs requires a
gradient. In a model with a frozen base none does, and every adapter in there would silently learn nothing. So adapted
layers look, where autograd is off, whether they run inside such a Function. Then the root of the patched model runs its
forward once more, with floating inputs and outputs of embeddings that require a gradient, and does so at once from then
on. Where no graph is cut, nothing is changed and nothing costs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_map_only

from ..methods import Adapter

_FLAGS = ("gradient_checkpointing", "grad_checkpointing")
"""Attributes by which transformers, diffusers and timm say that a module recomputes activations."""


@dataclass
class Call:
    """One forward of the root that is running.

    Attributes:
        learning: it runs with autograd.
        source: its inputs and embeddings are made to require a gradient.
        cut: an adapted layer ran inside a Function none of whose inputs requires a gradient.
    """

    learning: bool
    source: bool
    cut: bool = False


@dataclass
class Watch:
    """State of one patched model, shared by its adapters and hooks.

    Attributes:
        calls: the forwards of the root that are running: one may call another.
        needed: the model is known to cut its graph.
        warned: that nothing could be done about it.
    """

    calls: list[Call] = field(default_factory=list)
    needed: bool = False
    warned: bool = False

    def saw(self, adapter: Adapter) -> None:
        """An adapted layer runs; called where autograd is off."""
        if self.calls:
            call = self.calls[-1]
            call.cut = call.cut or (call.learning and _cut_off())
        elif adapter.training and not self.warned and _cut_off():
            self.warn(adapter.layer_name, "the model was not run through its own forward")

    def warn(self, name: str, why: str) -> None:
        if self.warned:
            return
        self.warned = True
        warnings.warn(
            f"the adapter of {name} will not learn: it runs in a part of the model (reentrant checkpointing, "
            f"reversible blocks) none of whose inputs requires a gradient, and {why}. "
            "Make an input of that part require a gradient",
            stacklevel=2,
        )


def _cut_off() -> bool:
    """Whether a custom Function's forward is running, the outermost one with no input that requires a gradient.

    The outermost, since within it autograd is off and says nothing of what the backward will do.
    """
    frame: FrameType | None = sys._getframe(2)
    outermost: Any = None
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            ctx = frame.f_locals.get(code.co_varnames[0])
            outermost = ctx if isinstance(ctx, FunctionCtx) else outermost
        frame = frame.f_back
    return outermost is not None and not any(outermost.needs_input_grad)


class _Before:
    """Pre-hook of the root."""

    def __init__(self, watch: Watch, model: nn.Module) -> None:
        self.watch = watch
        self.flagged = [m for m in model.modules() if any(flag in m.__dict__ for flag in _FLAGS)]

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        flagged = any(getattr(module, flag, False) for module in self.flagged for flag in _FLAGS)
        learning = torch.is_grad_enabled()
        call = Call(learning, source=learning and (self.watch.needed or flagged))
        self.watch.calls.append(call)
        return tree_map_only(Tensor, _requiring_grad, (args, kwargs)) if call.source else None


class _After:
    """Post-hook of the root, also of a forward that failed."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or not self.watch.calls:
            return None
        call = self.watch.calls[-1]
        try:
            return self._with_gradient(call, model, args, kwargs) if call.cut and output is not None else None
        finally:
            self.watch.calls.pop()

    def _with_gradient(self, call: Call, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """The forward once more, without the hooks, which have run."""
        output = None
        if not call.source:
            self.watch.needed, call.source, call.cut = True, True, False
            args, kwargs = tree_map_only(Tensor, _requiring_grad, (args, kwargs))
            output = model.forward(*args, **kwargs)
        if call.cut:
            self.watch.warn("a layer", "neither the model's tensor inputs nor its embeddings lead there")
        return output


class _AfterEmbedding:
    """Post-hook of an embedding, whose ids can carry no gradient."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or not self.watch.calls or not self.watch.calls[-1].source:
            return None
        return tree_map_only(Tensor, _requiring_grad, output)


def _requiring_grad(x: Tensor) -> Tensor:
    """The same numbers with a gradient; a copy, so that the model may write into it and the caller's is left alone."""
    floating = x.is_floating_point() or x.is_complex()
    if not floating or x.requires_grad or not torch.is_grad_enabled():
        return x
    return x.detach().requires_grad_().clone()


_OWN = (_Before, _After, _AfterEmbedding)
_NO_HOOKS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Their fast path is taken only where they have no hooks; and they cut no graph."""


def install(model: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Watch a model that was just patched."""
    watch = Watch()
    for adapter in adapters:
        adapter.watch = watch
    if isinstance(model, _NO_HOOKS):
        return
    model.register_forward_pre_hook(_Before(watch, model), with_kwargs=True)
    model.register_forward_hook(_After(watch), with_kwargs=True, always_call=True)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.register_forward_hook(_AfterEmbedding(watch))


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.watch = None
        _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        _remove(module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)


def _remove(hooks: dict[int, Any], *marks: dict[int, bool]) -> None:
    for key in [key for key, hook in hooks.items() if isinstance(hook, _OWN)]:
        del hooks[key]
        for mark in marks:
            mark.pop(key, None)
