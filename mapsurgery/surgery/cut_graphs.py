"""A gradient where a model's own code would cut the graph of a frozen base.

Reentrant activation checkpointing and reversible blocks run their part of the model without autograd, inside a
`torch.autograd.Function`, and build the graph in the backward, but only if one of the Function's inputs requires a
gradient. In a model with a frozen base none does ahead of the first adapter, and every adapter in there would silently
learn nothing. So a Function that is about to run layers on inputs of which none requires a gradient gets one that does,
and adapted layers say whether it ran any; if it ran none, its outputs require no gradient, as without us. The forward
runs once, and nothing else of the model is touched: neither its inputs, nor its embeddings, nor checkpointing of the
other kind, which cuts nothing.

For that, `apply` of some Functions is ours as long as the process holds a patched model: of torch's reentrant
checkpointing, and of those that the files of the patched models name. Another one in which an adapted layer finds
itself cut off is added then, with a warning, since the step that is running can no longer be mended.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import BuiltinMethodType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, FunctionMeta
from torch.utils.checkpoint import CheckpointFunction, check_backward_validity

from ..methods import Adapter

_OWN_CODE = ("torch", "mapsurgery")
"""Packages whose Functions, torch's checkpointing apart, run no layers of a model."""

_SAID = "_mapsurgery_said"
"""Mark on the ctx of a call that the user was told of."""


class Watch:
    """What the adapters of one patched model hold; while there is any, `apply` of some Functions is ours.

    Args: functions: names, "module:class", of Functions that the model's files name.
    """

    def __init__(self, functions: Iterable[str] = ()) -> None:
        self.functions = tuple(functions)
        self.warned = False
        _enter([CheckpointFunction, *filter(None, map(_named, self.functions))])
        weakref.finalize(self, _leave).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy counts for itself."""
        return Watch, (self.functions,)

    def saw(self, adapter: Adapter) -> None:
        """An adapted layer runs; called where autograd is off."""
        if _runs and self._runs_in(adapter):
            return
        if adapter.training and not self.warned:
            call = _cut_by()
            if call is not None and _learns(adapter) and not hasattr(call, _SAID):
                setattr(call, _SAID, True)
                function = type(call)._forward_cls
                self._warn(adapter, function, late=function not in _ours)

    def _runs_in(self, adapter: Adapter) -> bool:
        """Whether Functions that are known of run the adapter; they are told."""
        runs = [run for run in tuple(_runs) if run.thread == threading.get_ident()]
        if runs and _learns(adapter):
            lost = next((run for run in runs if not run.given and not run.reached), None)
            for run in runs:
                run.reached = True
            if lost is not None:
                self._warn(adapter, lost.function, lost.late)
        return bool(runs)

    def _warn(self, adapter: Adapter, function: FunctionMeta, late: bool) -> None:
        """Say that a Function cut the adapter off. Args: late: its next call will not."""
        if late:
            _intercept(function, known=True)
        elif self.warned:
            return
        self.warned = self.warned or not late
        name = function.__qualname__
        hint = f"Further calls of {name}.apply will give one" if late else "Make an input of it require a gradient"
        warnings.warn(
            f"the adapter of {adapter.layer_name} will not learn{' in this step' if late else ''}: {name} runs it "
            "without autograd (reentrant checkpointing, reversible blocks), and none of its inputs requires a gradient."
            f" {hint}",
            stacklevel=4,
        )


def install(model: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Watch a model that was just patched."""
    functions = _functions_of(model)
    watch = Watch(f"{function.__module__}:{function.__qualname__}" for function in functions)
    for function in functions:  # also those that have no name, being defined in a function
        _intercept(function)
    for adapter in adapters:
        adapter.watch = watch


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.watch = None


# Functions whose `apply` is ours ----------------------------------------------------------------------------------

_lock = threading.RLock()  # a Watch may be collected anywhere, also in here
_watches = 0
_ours: weakref.WeakKeyDictionary[FunctionMeta, Any] = weakref.WeakKeyDictionary()
"""Each with what its own `apply` was, None where it inherits it."""
_known: weakref.WeakSet[FunctionMeta] = weakref.WeakSet()
"""Those that have run layers although none of their arguments seemed to lead there."""


def _enter(functions: Iterable[FunctionMeta]) -> None:
    global _watches
    with _lock:
        _watches += 1
        for function in functions:
            _intercept(function)


def _leave() -> None:
    global _watches
    with _lock:
        _watches -= 1
        if _watches:
            return
        for function, own in list(_ours.items()):
            if own is None:
                del function.apply  # type: ignore[attr-defined]
            else:
                function.apply = own  # type: ignore[attr-defined]
        _ours.clear()
        _known.clear()


def _intercept(function: FunctionMeta, known: bool = False) -> None:
    """Let its `apply` be ours. Args: known: it runs layers, whatever its arguments look like."""
    plain = inspect.getattr_static(function, "apply")

    def apply(cls: Any, /, *args: Any, **kwargs: Any) -> Any:
        return _applied(cls, plain.__get__(None, cls), args, kwargs)

    with _lock:
        if known:
            _known.add(function)
        if function not in _ours:
            _ours[function] = function.__dict__.get("apply")
            function.apply = classmethod(apply)  # type: ignore[attr-defined]


def _named(name: str) -> FunctionMeta | None:
    """The Function of this name; another process may have none."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if issubclass(type(found), FunctionMeta) else None


def _functions_of(model: nn.Module) -> list[FunctionMeta]:
    """Functions that the code of the model can name: of the files that define its modules, of those that these import
    from, and what methods close over.

    Those that have their `apply` kept under another name are left out: it is not ours, and compilers compare the two.
    """
    spaces: dict[int, dict[str, Any]] = {}
    values: list[Any] = []
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        if _is_own(cls.__module__) or cls.__module__ not in sys.modules:
            continue
        space = vars(sys.modules[cls.__module__])
        spaces[id(space)] = space
        for value in [*space.values()]:
            spaces.update((id(imported), imported) for imported in _imported(value))
        for method in vars(cls).values():
            values += _closed_over(method)
    for space in spaces.values():
        values += space.values()
    # Asked by type, since lazy objects do their work when they are asked for their class.
    bound = [x for x in values if type(x) in (MethodType, BuiltinMethodType) and x.__name__ == "apply"]
    aliased = {id(x.__self__) for x in bound}
    functions = dict.fromkeys(x for x in values if issubclass(type(x), FunctionMeta) and not _is_own(x.__module__))
    return [function for function in functions if id(function) not in aliased]


def _imported(value: Any) -> Iterator[dict[str, Any]]:
    if issubclass(type(value), ModuleType) and not _is_own(value.__name__):
        yield vars(value)
    elif type(value) is FunctionType and not _is_own(value.__module__ or ""):
        yield value.__globals__


def _closed_over(function: Any) -> list[Any]:
    closure = getattr(function, "__closure__", None) if type(function) is FunctionType else None
    found = []
    for cell in closure or ():
        with suppress(ValueError):  # an empty cell
            found.append(cell.cell_contents)
    return found


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in _OWN_CODE


# One call ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Run:
    """A Function that is running with autograd, and came with no input that requires a gradient.

    Attributes:
        function: which.
        thread: that runs it.
        given: it got an input that does.
        late: it did not, since it did not seem to run layers.
        reached: an adapter that learns ran in it.
    """

    function: FunctionMeta
    thread: int
    given: bool
    late: bool
    reached: bool = False


_runs: list[_Run] = []
"""Of all threads."""


def _applied(function: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`apply` of a Function, where none of the inputs requires a gradient with one that does."""
    handed = [*args, *kwargs.values()]
    if not torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.requires_grad for x in handed):
        return apply(*args, **kwargs)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return apply(*args, **kwargs)
    handed += _closed_over(function.forward)
    runs_layers = function in _known or any(map(_leads_on, handed))
    given = _with_source(function, args) if runs_layers else None
    run = _Run(function, threading.get_ident(), given=given is not None, late=not runs_layers)
    _runs.append(run)
    try:
        output = apply(*(args if given is None else given), **kwargs)
    finally:
        _runs.remove(run)
    # Adapters in compiled code, and where the Function has turned autograd on, say nothing.
    if given is None or run.reached or _holds_adapters(handed):
        return output
    if _is_checkpoint(function):
        check_backward_validity(args)  # its warning, which our input kept back
    return tuple(map(_taken_back, output)) if isinstance(output, tuple) else _taken_back(output)


def _is_checkpoint(function: Any) -> bool:
    return function.forward is CheckpointFunction.forward


def _with_source(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments with one that requires a gradient; None where there is no way.

    Checkpointing takes any number of tensors: it gets an empty one, and the part that it runs computes no gradient that
    it would not compute otherwise. Another Function gets the first floating one in a form that requires a gradient.
    """
    source = torch.empty(0, device="cpu", requires_grad=True)
    if _is_checkpoint(function):
        return _PassingBy(args[0]), *args[1:], source
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            return *args[:i], _Sourced.apply(source, x), *args[i + 1 :]
    return None


class _Sourced(torch.autograd.Function):
    """A tensor as one that requires a gradient, in the same memory, since it may be written into."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, None]:
        return None, None


class _PassingBy:
    """The function that checkpointing runs, without the last argument, which is ours."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        output = self.function(*args[:-1])
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [x for x in outputs if isinstance(x, Tensor)]
        if not torch.is_grad_enabled() or any(x.requires_grad for x in tensors):
            return output
        # Recomputed, and no adapter leads to an output: checkpointing takes this for an error.
        outputs = tuple(
            _Sourced.apply(args[-1], x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in outputs
        )
        return outputs if isinstance(output, tuple) else outputs[0]


def _taken_back(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) and output.requires_grad else output


# Where adapters are -----------------------------------------------------------------------------------------------


def _learns(adapter: Adapter) -> bool:
    """False for one that is switched off or frozen. Other tools may put tensors of their own for its parameters."""
    own = adapter.own_parameters().values()
    return adapter.enabled and any(p.requires_grad or not isinstance(p, nn.Parameter) for p in own)


def _leads_on(x: Any) -> bool:
    """Whether an argument of a Function can lead to layers: it can be called, or holds what can."""
    if isinstance(x, list | tuple | dict):
        return any(map(_leads_on, x.values() if isinstance(x, dict) else x))
    return callable(x)


def _holds_adapters(given: list[Any]) -> bool:
    """Whether arguments of a Function lead to adapters that learn."""
    waiting, seen = [*given], set()
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, nn.Module):
            if any(isinstance(module, Adapter) and _learns(module) for module in x.modules()):
                return True
        elif isinstance(x, list | tuple):
            waiting += x
        elif isinstance(x, dict):
            waiting += x.values()
        elif isinstance(x, partial):
            waiting += [x.func, x.args, x.keywords]
        elif isinstance(x, MethodType):
            waiting += [x.__self__, x.__func__]
        else:
            waiting += _closed_over(x)
    return False


def _cut_by() -> Any:
    """ctx of the outermost custom Function whose forward is running, if no input requires a gradient and `apply` was
    not ours.

    The outermost, since within it autograd is off and says nothing of what the backward will do.
    """
    frame: FrameType | None = sys._getframe(2)
    outermost: Any = None
    seen = False
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, FunctionCtx):
                outermost, seen = ctx, False
        seen = seen or code is _applied.__code__
        frame = frame.f_back
    return None if outermost is None or seen or any(outermost.needs_input_grad) else outermost
