"""A patched model and an example, run in several ways and left as they were: `Trial`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .interrupts import undone_by
from .methods import Adapter
from .ops.lazy import LazyWeight
from .surgery.adapted import AdaptedLayer
from .surgery.patch import disabled
from .surgery.paths import first_names, unwrapped
from .surgery.record import parameters_of

Gradients = dict[str, dict[str, Tensor]]
"""By layer and name of the adapter's parameter."""


class Mode(NamedTuple):
    """How the model runs. Attributes: training: in train mode; grad: with autograd."""

    training: bool
    grad: bool


EVAL, INFERENCE, TRAINING = Mode(False, True), Mode(False, False), Mode(True, True)


@dataclasses.dataclass
class _Sight:
    """What a trial knows of an adapter.

    Attributes:
        acted: it computed a product in the last run, or W' that something read.
        weight: what it computes with in the place of W, while the memory of W holds other numbers.
    """

    acted: bool = False
    weight: Tensor | None = None


class _Watched(Adapter):
    """An adapter during a trial. A class, so that copies of it (DataParallel's replicas) are watched as well."""

    _sight: _Sight

    def forward(self, product: str, weight: Tensor | None, *args: Any) -> Tensor:
        sight = self._sight
        if weight is not None and sight.weight is not None and not weight.is_meta:
            weight = sight.weight.to(weight)  # hooks may cast or move W for the time of a forward
        result = super().forward(product, weight, *args)
        if isinstance(result, LazyWeight):
            result._compute = functools.partial(_computed, sight, result._compute)
        else:
            sight.acted = True
        return result

    def norm_of(self, weight: Tensor) -> Tensor:
        return super().norm_of(weight) if self._sight.weight is None else self.weight_norm.to(weight.device)


def _computed(sight: _Sight, compute: Callable[[], Tensor]) -> Tensor:
    sight.acted = True
    return compute()


@functools.cache
def _watched(own: type[Adapter]) -> type[Adapter]:
    return type(own.__name__, (_Watched, own), {"__module__": own.__module__})


class Trial:
    """Runs of one model on one example, each from the same state: buffers, random numbers, fresh copies of the inputs.

    What torch.compile made runs as plain Python, so that nothing is compiled for the trial's sake.

    Args:
        model: patched, or holding a patched part.
        adapters: by the path of what they adapt.
        args, kwargs: of the model's forward.

    Attributes:
        acted: paths of the adapters that computed in the last run.
        others: trainable parameters that no adapter owns, by name in the model.
        reached: names of those that got a gradient in any run.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, Adapter], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.model, self.adapters = model, dict(adapters)
        self._inputs = args, dict(kwargs)
        self._kept_inputs = {id(leaf): leaf for leaf in tree_leaves(self._inputs) if not _can_copy(leaf)}
        self._sights = {path: _Sight() for path in self.adapters}
        buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        self._buffers = [(*place, place[2].detach().clone()) for place in buffers]
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._overwritten = False
        own = {id(p) for adapter in self.adapters.values() for p in adapter._parameters.values()}
        named = first_names(parameters_of(unwrapped(model)))
        self.others = {name: p for name, p in named.items() if p.requires_grad and id(p) not in own}
        self.reached: set[str] = set()

    @contextmanager
    def open(self) -> Iterator[Trial]:
        """The block in which the model may be run and its parameters changed; afterwards all is as it was before."""
        modes, training = {module: module.training for module in self.model.modules()}, self.model.training
        grads = {parameter: parameter.grad for parameter in self.model.parameters()}
        own = (p for adapter in self.adapters.values() for p in adapter.own_parameters().values())
        changing = {*own, *(p for p in self.model.parameters() if p.requires_grad)}
        values = [(p, p.detach().clone()) for p in changing]
        generators = [(leaf, leaf.get_state()) for leaf in self._kept_inputs.values() if _is_generator(leaf)]
        python, numpy = random.getstate(), sys.modules.get("numpy")
        numpy_state = numpy.random.get_state() if numpy is not None else None
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}

        def put_back() -> None:
            self._unwatch()
            self._restore_weights()
            self.model.train(training)
            for module, mode in modes.items():
                module.training = mode
            self._restore_buffers()
            with torch.no_grad():
                for parameter, value in values:
                    parameter.copy_(value)
            for parameter, grad in grads.items():
                parameter.grad = grad
            for generator, state in generators:
                generator.set_state(state)
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            torch.clear_autocast_cache()  # it may hold casts of what was changed

        with undone_by(put_back), ExitStack() as stack:
            for parameter in grads:
                parameter.grad = None
            stack.enter_context(torch.random.fork_rng(devices=list(devices)))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._watch()
            yield self

    # Runs ----------------------------------------------------------------------------------------------------------

    def run(self, mode: Mode, seed: int = 0) -> list[Tensor]:
        """Floating tensors of the output; the same arguments give the same numbers, as far as the kernels do.

        Raises:
            ValueError: there are none.
        """
        # Through the other mode: who keeps a merged copy from `eval()` to `train()` makes it anew.
        self.model.train(not mode.training)
        for sight in self._sights.values():
            sight.acted = False
        self.model.train(mode.training)
        self._restore_buffers()
        torch.clear_autocast_cache()
        _seed(seed)
        args, kwargs = self._fresh_inputs()
        with torch.set_grad_enabled(mode.grad):
            return _tensors(self.model(*args, **kwargs))

    @torch.no_grad()
    def run_base(self, mode: Mode, backward: bool = False) -> list[Tensor]:
        """As `run`, of the frozen weights. With autograd they require a gradient, as the adapters do: what looks for
        one (fast paths) does the same as in the adapted model."""
        layers = [module for module in self.model.modules() if isinstance(module, AdaptedLayer)]
        own = [p for layer in layers for p in layer._parameters.values() if p is not None and p.is_floating_point()]
        frozen = [p for p in own if mode.grad and not p.requires_grad]

        def freeze() -> None:
            for parameter in frozen:
                parameter.requires_grad_(False)
                parameter.grad = None

        with undone_by(freeze), disabled(self.model):
            for parameter in frozen:
                parameter.requires_grad_(True)
            outputs = self.run(mode)
            if backward:
                _backward(outputs)
        return outputs

    @property
    def acted(self) -> set[str]:
        return {path for path, sight in self._sights.items() if sight.acted}

    def gradients(self, mode: Mode, seed: int = 0, scale: float = 1.0) -> Gradients:
        """Gradients of a random projection of the outputs: a sum is constant after a normalisation.

        Args: scale: of the projection.
        """
        try:
            _backward(self.run(mode, seed), scale)
            self.reached |= {name for name, p in self.others.items() if p.grad is not None and _any(p.grad)}
            return {
                path: {name: p.grad for name, p in adapter.own_parameters().items() if p.grad is not None}
                for path, adapter in self.adapters.items()
            }
        finally:
            for parameter in self.model.parameters():
                parameter.grad = None

    def coarsest_eps(self, mode: Mode) -> float:
        """Rounding of the coarsest floating type that an operation of this run gives (types to store in left out)."""
        with _Types() as types:
            self.run(mode)
        return max((torch.finfo(dtype).eps for dtype in types.found if torch.finfo(dtype).bits >= 16), default=0.0)

    @contextmanager
    def inexact(self, error: float, seed: int) -> Iterator[None]:
        """A block in which the floating output of every module of the model is off by a relative error, at random."""
        modules = {module for module in self.model.modules() if not isinstance(module, Adapter)}
        generators: dict[torch.device, torch.Generator] = {}  # the model's own random numbers stay the same

        def off(output: Tensor) -> Tensor:
            if not output.is_floating_point() or output.is_nested or isinstance(output, LazyWeight):
                return output
            place = output.device
            generator = generators.setdefault(place, torch.Generator(place).manual_seed(seed))
            wide = torch.float64 if output.dtype == torch.float64 else torch.float32
            noise = torch.randn(output.shape, generator=generator, device=place, dtype=wide)
            return (output.to(wide) * (1 + error * noise)).to(output.dtype)

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return tree_map_only(Tensor, off, output) if module in modules else None

        handles: list[Any] = []
        with undone_by(lambda: [handle.remove() for handle in handles]):
            handles.append(torch.nn.modules.module.register_module_forward_hook(hook))
            yield

    # The memory of W -----------------------------------------------------------------------------------------------

    def hold(self, weights: Mapping[Adapter, nn.Parameter]) -> None:
        """From now on these adapters compute with a copy of their W."""
        for adapter, weight in weights.items():
            if weight not in self._weights:
                self._weights[weight] = weight.detach().clone(memory_format=torch.preserve_format)
            adapter.__dict__["_sight"].weight = self._weights[weight]

    @contextmanager
    def overwritten(self, weights: Collection[nn.Parameter]) -> Iterator[None]:
        """A block in which the memory of some of the held W holds other finite numbers of their size."""
        with undone_by(self._restore_weights):
            self._overwritten = True
            for weight in weights:
                held = self._weights[weight].float()
                # Through `data`: autograd and the norms count no write, for there is none in the end.
                weight.data.copy_(torch.randn_like(held).mul_(held.square().mean().sqrt() or 1.0))
            yield

    def _restore_weights(self) -> None:
        if self._overwritten:
            for weight, held in self._weights.items():
                weight.data.copy_(held)
            self._overwritten = False

    # ---------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        for path, adapter in self.adapters.items():
            adapter.__dict__["_sight"] = self._sights[path]
            adapter.__class__ = _watched(type(adapter))  # type: ignore[arg-type]  # a class is hashable

    def _unwatch(self) -> None:
        for adapter in self.adapters.values():
            if isinstance(adapter, _Watched):
                adapter.__class__ = type(adapter).__bases__[1]
                del adapter.__dict__["_sight"]

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        for module, name, buffer, value in self._buffers:
            buffer.copy_(value)
            module._buffers[name] = buffer

    def _fresh_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies, apart from the caller's graph: a model may write into what it is given, or fill a cache in it."""
        memo: dict[int, Any] = dict(self._kept_inputs)
        for leaf in tree_leaves(self._inputs):
            if isinstance(leaf, Tensor):
                fresh = leaf.detach().clone().requires_grad_(leaf.requires_grad)
                with torch.enable_grad():
                    memo[id(leaf)] = fresh if leaf.is_leaf else fresh.clone()
            elif _is_generator(leaf):
                leaf.manual_seed(0)
        return copy.deepcopy(self._inputs, memo)


def _can_copy(leaf: Any) -> bool:
    """Whether a part of the inputs is copied for each run; others are handed over as they are."""
    if isinstance(leaf, Tensor):
        return True
    if isinstance(leaf, nn.Module) or _is_generator(leaf):
        return False
    try:
        copy.deepcopy(leaf)
    except Exception:  # whatever its class raises
        return False
    return True


def _is_generator(leaf: Any) -> bool:
    return isinstance(leaf, torch.Generator)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _tensors(output: Any) -> list[Tensor]:
    found = _floating(output)
    if not found:
        raise ValueError(f"the model's output ({type(output).__name__}) holds no floating tensor to verify with")
    return found


def _floating(output: Any) -> list[Tensor]:
    """Floating tensors of an output of any structure; complex ones as pairs."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            found += [leaf] if leaf.is_floating_point() else []
        elif isinstance(leaf, Mapping):
            found += _floating(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _floating([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def _backward(outputs: list[Tensor], scale: float = 1.0) -> None:
    outputs = [output for output in outputs if output.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [_projection(output, scale) for output in outputs])


def _projection(output: Tensor, scale: float) -> Tensor:
    """Random numbers of this size, as far as the output's type holds it."""
    return torch.randn_like(output).mul_(min(scale, torch.finfo(output.dtype).max / 16))


def _any(grad: Tensor) -> bool:
    return bool((grad.coalesce().values() if grad.is_sparse else grad).any())


class _Types(TorchDispatchMode):
    """Notes the floating types of what operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {t.dtype for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()}
        return result
