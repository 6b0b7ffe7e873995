"""What a forward that is not the library's does with the weight of its layer: it is run once, on numbers of no meaning.

An adapter acts in a forward that reads ``weight`` by its name when it runs. One that closed over the Parameter or over
a packed copy leaves it inert; one that writes into the weight would write into W', which is computed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from .adapted import AdaptedLayer, Effective
from .forwards import carried_forward, described, rebind_forward
from .paths import child_name

INERT = "so that the adapter would do nothing"
WRITES = "its forward changes the weight itself"

Inputs = Callable[[torch.dtype, torch.device], tuple[Tensor, ...]]

_TILE = 1 << 14


class _StandIn(nn.Module):
    """In the place of an adapter: what its layer's forward reads is a leaf of any numbers, large ones."""

    enabled, is_meta = True, False
    leaf: Tensor
    before: Tensor

    def __init__(self, like: Tensor, seed: int) -> None:
        super().__init__()
        tile = 10 * torch.randn(_TILE, generator=torch.Generator().manual_seed(seed))
        numbers = tile.to(like.device, like.dtype).repeat(-(-like.numel() // _TILE))[: like.numel()]
        self.__dict__["leaf"] = numbers.reshape(like.shape).requires_grad_()
        self.__dict__["before"] = self.leaf.detach().clone()

    def forward(self, product: str, weight: Tensor, *args: Any) -> Tensor:
        return self.leaf.to(weight.dtype)

    @property
    def written(self) -> bool:
        after = self.leaf.detach()
        return not after.is_meta and (after.shape != self.before.shape or not torch.equal(after, self.before))


def found_out(module: nn.Module, name: str, mixin: type[AdaptedLayer], inputs: Sequence[Inputs]) -> str | None:
    """Why the forward that a layer runs leaves an adapter of `name` without effect, or None if it does not.

    Args: mixin: that of a layer that keeps its forward; inputs: forms that its type takes, the usual one first.

    Raises:
        NotTried: it ran on none of these inputs.
    """
    weight = module._parameters.get(name)
    if weight is None or isinstance(weight, FakeTensor) or weight.is_meta:
        raise NotTried
    for form in inputs:
        try:
            return _tried(module, name, mixin, form(weight.dtype, weight.device))
        except _Failed:
            continue
    raise NotTried


class NotTried(Exception):
    """No input was found that the forward takes."""


class _Failed(Exception):
    pass


def _tried(module: nn.Module, name: str, mixin: type[AdaptedLayer], inputs: tuple[Tensor, ...]) -> str | None:
    outputs: list[list[Tensor]] = []
    for seed in (0, 1):
        found, stand_in = _once(module, name, mixin, inputs, False, seed)
        if stand_in.written:
            return f"{WRITES} (seen in eval mode)"
        if any(t.requires_grad and _leads_to(t, stand_in.leaf) for t in found):
            break
        outputs.append(found)
    else:
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*outputs, strict=False)):
            return f"its forward{_named(module)} does not read its {name} when it runs, {INERT}"
    try:
        stand_in = _once(module, name, mixin, inputs, True, 0)[1]
    except _Failed:  # training may need more of an input
        return None
    return f"{WRITES} (seen in training mode)" if stand_in.written else None


def _once(
    module: nn.Module, name: str, mixin: type[AdaptedLayer], inputs: tuple[Tensor, ...], training: bool, seed: int
) -> tuple[list[Tensor], _StandIn]:
    """What the forward gives, and what stood in for W'."""
    with _standing_in(module, name, mixin, training, seed) as stand_in, torch.random.fork_rng(_cuda(inputs)):
        torch.default_generator.manual_seed(0)
        output = _run(module, inputs)
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)], stand_in


def _run(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The forward of the object or of its class, without hooks of torch."""
    own = carried_forward(module) or MethodType(type(module).forward, module)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for mode in (torch.inference_mode(False), torch.enable_grad()):
                stack.enter_context(mode)
            stack.enter_context(torch.autocast(inputs[0].device.type, enabled=False))
            if "torch._dynamo" in sys.modules:  # else nothing is compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return own(*inputs)
    except Exception as error:  # whatever it needs that these inputs have not: another form is tried, or none
        raise _Failed from error


def _leads_to(output: Tensor, leaf: Tensor) -> bool:
    """Whether autograd's graph has a way from here to there."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return output is leaf


def _named(module: nn.Module) -> str:
    own = carried_forward(module)
    return "" if own is None else f" (the object's own, {described(own)})"


def _cuda(inputs: tuple[Tensor, ...]) -> list[torch.device]:
    return [t.device for t in inputs[:1] if t.is_cuda]


@contextmanager
def _standing_in(
    module: nn.Module, name: str, mixin: type[AdaptedLayer], training: bool, seed: int
) -> Iterator[_StandIn]:
    """A block in which a layer is as an adapted one, with copies of all that it holds; it is given back as it was."""
    parts = list(module.modules())
    before = {part: dict(part.__dict__) for part in parts}
    original = type(module)
    weight = module._parameters[name]
    assert weight is not None
    try:
        for part in parts:
            for kind, value in before[part].items():
                if isinstance(value, dict):
                    part.__dict__[kind] = value.copy()
            part.__dict__["training"] = training
            _copy_tensors(part, weight)
        module._parameters[name] = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        body = {"original_class": original, "adapted": (name,), name: Effective(name)}
        module.__class__ = type(original.__name__, (mixin, original), body)
        rebind_forward(module, original)
        stand_in = module._modules[child_name(name)] = _StandIn(weight, seed)
        yield stand_in
    finally:
        module.__class__ = original
        for part, attributes in before.items():
            part.__dict__.clear()
            part.__dict__.update(attributes)


def _copy_tensors(part: nn.Module, but: Tensor) -> None:
    for name, parameter in part._parameters.items():
        if parameter is not None and parameter is not but:
            part._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for name, buffer in part._buffers.items():
        part._buffers[name] = None if buffer is None else buffer.detach().clone()
