"""Proof that no adapter does nothing: `verify`."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .methods import Adapter
from .ops.registration import autocasting
from .surgery.merge import held_elsewhere, layers_by_adapter, storages_of
from .surgery.patch import disabled
from .surgery.record import Site, find_patched, intact_sites, refuse_spread
from .tables import render

_UPDATE = ("down", "up")
_MAGNITUDES = ("base", "magnitude")


@dataclass(frozen=True)
class Verification:
    """Result of `verify`: path -> verdict ("ok", or what is wrong), and what was not checked. ``print`` shows it."""

    verdicts: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> dict[str, str]:
        """The layers whose adapter does not act or does not learn."""
        return {path: verdict for path, verdict in self.verdicts.items() if verdict != "ok"}

    def __str__(self) -> str:
        good = len(self.verdicts) - len(self.failures)
        title = f"{good} of {len(self.verdicts)} adapters act on the output and learn"
        table = render(title, ["layer", "verdict"], list(self.failures.items())) if self.failures else title
        return "\n".join([table, *(f"note: {note}" for note in self.notes)])


class VerificationError(RuntimeError):
    """An adapter does nothing. `verification` holds all verdicts."""

    def __init__(self, message: str, verification: Verification | None = None) -> None:
        super().__init__(message)
        self.verification = verification


def verify(model: nn.Module, *inputs: Any, **kwargs: Any) -> Verification:
    """Run the model on an example, forward and backward, and prove that every adapter acts and learns.

    Checked, on random projections of all floating outputs: from where it is now, each adapter gets a finite, non-zero
    gradient on A or B; at a generic point, every parameter of it does in eval mode, and some do in train mode; the
    output differs from the base's; inference (no_grad, eval, fast paths on) gives what eval with autograd gives; and
    the model computes the same where W' stands in the place of W, so that nobody reads W behind its layer's back (for
    that, one more copy of the adapted weights is kept meanwhile).
    The model is left as it was: parameters, gradients, buffers, mode, random state. A train mode that cannot run here
    (batch statistics of one sample, missing labels) is said in the notes.

    Args:
        inputs, kwargs: what the model's forward takes.

    Returns:
        A printable `Verification`, all of whose verdicts are "ok".

    Raises:
        VerificationError: listing the adapters that are frozen, unused, dead or not finite, or saying that inference
            or a reader of the weights bypasses the adapters.
        ValueError: the model is not patched, or its output holds no floating tensor.
    """
    root, record = find_patched(model)
    sites = intact_sites(root, record)
    refuse_spread(sites, "verify")
    adapters = {site.path: site.adapter for site in sites}
    if any(adapter.weight_norm.is_meta for adapter in adapters.values()):
        raise ValueError("the model is on meta: load its weights before verifying it")
    if not all(adapter.enabled for adapter in adapters.values()):
        raise ValueError("adapters are disabled: verify the model outside of mapsurgery.disabled")
    with _left_as_it_was(model, adapters, (inputs, kwargs)), torch.inference_mode(False):
        call: Callable[[], list[Tensor]] = lambda: _tensors(model(*inputs, **kwargs))  # noqa: E731
        model.eval()
        _fill_zeros(model, adapters)
        learning = _gradients(adapters, call)
        _perturb(adapters)
        acting = _gradients(adapters, call)
        in_training, note = _in_training(model, adapters, call)
        verdicts = {
            path: _verdict(adapter, learning[path], acting[path], in_training[path] if in_training else None)
            for path, adapter in adapters.items()
        }
        result = Verification(verdicts, (note,) if note else ())
        if result.failures:
            listed = "; ".join(f"{path}: {verdict}" for path, verdict in list(result.failures.items())[:20])
            raise VerificationError(f"{len(result.failures)} of {len(verdicts)} adapters fail: {listed}", result)
        _check_inference(model, call, result)
        unchecked = _check_readers(model, intact_sites(root, record), call, result)
    return dataclasses.replace(result, notes=(*result.notes, unchecked)) if unchecked else result


_Gradients = dict[str, dict[str, Tensor]]
_TRAIN_TRIES = 4  # stochastic depth may leave a layer out of one pass


def _in_training(
    model: nn.Module, adapters: dict[str, Adapter], call: Callable[[], list[Tensor]]
) -> tuple[_Gradients | None, str]:
    """Gradients in train mode, of the first pass that reached each adapter; None and the reason if it cannot run."""
    found: _Gradients = {path: {} for path in adapters}
    model.train()
    try:
        for _ in range(_TRAIN_TRIES):
            for path, grads in _gradients(adapters, call).items():
                found[path] = found[path] or grads
            if all(found.values()):
                break
    except Exception as error:  # whatever the model's own training code raises on this input
        return None, f"train mode was not checked, it fails on this input: {type(error).__name__}: {error}"
    finally:
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
    return found, ""


@torch.no_grad()
def _fill_zeros(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """A new head often starts at 0, which hides all that is below it, for one step: look past that."""
    own = {id(p) for adapter in adapters.values() for p in adapter.own_parameters().values()}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in own and not parameter.any():
            parameter.normal_(std=0.02)


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors of an output of any structure."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif isinstance(leaf, Tensor) and leaf.is_floating_point():
            found.append(leaf)
    if not found:
        raise ValueError(f"the model's output ({type(output).__name__}) holds no floating tensor to verify with")
    return found


@contextmanager
def _left_as_it_was(model: nn.Module, adapters: dict[str, Adapter], inputs: Any) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_leaf]
    grads = {tensor: tensor.grad for tensor in (*model.parameters(), *leaves)}
    python_state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    kept = [(b, b.detach().clone()) for _, _, b in buffers]
    kept += [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    kept += [(p, p.detach().clone()) for a in adapters.values() for p in a.own_parameters().values()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for parameter in grads:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for parameter, grad in grads.items():
            parameter.grad = grad
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _gradients(adapters: dict[str, Adapter], call: Callable[[], list[Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Gradients by layer and name, of a random projection of the outputs: a sum is constant after a normalisation."""
    outputs = [output for output in call() if output.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    found = {}
    for path, adapter in adapters.items():
        own = adapter.own_parameters()
        found[path] = {name: p.grad for name, p in own.items() if p.grad is not None}
        for parameter in own.values():
            parameter.grad = None
    return found


@torch.no_grad()
def _perturb(adapters: dict[str, Adapter]) -> None:
    """Move every adapter to a generic point, where each of its parameters matters and W' is of the size of W."""
    for adapter in adapters.values():
        first = 1 / max(1.0, adapter.scaling)  # a larger W' would saturate what lies behind, which hides gradients
        for name, parameter in adapter.own_parameters().items():
            if adapter.roles[name] in _UPDATE:
                size = parameter.square().mean().sqrt()
                size = torch.where(size > 0, size, first * parameter.shape[-1] ** -0.5)
                parameter.add_(torch.randn_like(parameter) * size)
            elif not parameter.any():
                parameter.fill_(0.1)


def _trainable(adapter: Adapter) -> dict[str, nn.Parameter]:
    return {name: p for name, p in adapter.own_parameters().items() if p.requires_grad}


def _verdict(
    adapter: Adapter, learning: dict[str, Tensor], acting: dict[str, Tensor], in_training: dict[str, Tensor] | None
) -> str:
    trainable = _trainable(adapter)
    if not trainable:
        return "frozen: none of its parameters requires a gradient"
    if not acting and in_training:  # a layer that runs in training alone
        learning = acting = in_training
    absent = [name for name in trainable if name not in acting]
    if absent:
        return (
            f"unused: no gradient reaches {', '.join(absent)} (not called with this input, or its output is not used)"
        )
    if in_training is not None and not in_training:
        return "learns nothing in train mode: no gradient reaches it there, though it does in eval mode"
    if not all(grad.isfinite().all() for grads in (learning, acting) for grad in grads.values()):
        return "not finite: its gradient holds NaN or infinity"
    # With a zero base weight its magnitude multiplies nothing.
    zero_base = not adapter.weight_norm.any()
    if not any(grad.any() for grad in acting.values()):
        return "dead: the layer has no effect on the output, adapted or not (is a scale after it 0?)"
    still = [n for n in trainable if not acting[n].any() and not (zero_base and adapter.roles[n] in _MAGNITUDES)]
    if still:
        return f"dead: the gradient of {', '.join(still)} is 0"
    updates = [name for name in trainable if adapter.roles[name] != "base"]
    if updates and not any(learning[name].any() for name in updates if name in learning):
        return "dead: from where it is now, no gradient reaches its update"
    return "ok"


@torch.no_grad()
def _check_inference(model: nn.Module, call: Callable[[], list[Tensor]], result: Verification) -> None:
    with torch.enable_grad():
        expected = [output.detach() for output in _seeded(call)]
    found = _seeded(call)
    with disabled(model):
        base = _seeded(call)
    for i, (want, got, without) in enumerate(zip(expected, found, base, strict=True)):
        error, effect = _distance(want, got), _distance(want, without)
        # Fast paths order their sums differently: rounding is forgiven, a share of the adapters' own effect is not.
        rounding = 4 * torch.finfo(want.dtype).eps * _distance(want)
        if not error <= max(rounding, 0.02 * effect):
            raise VerificationError(
                f"inference differs from eval with autograd, by {error / max(effect, 1e-300):.1%} of the adapters' "
                f"effect on output {i}: a fast path does not go through all of them",
                result,
            )
    if all(torch.equal(a, b) for a, b in zip(expected, base, strict=True)):
        raise VerificationError("the adapted output equals the base's: the adapters do not act on it", result)


def _distance(a: Tensor, b: Tensor | None = None) -> float:
    """Norm of the difference, in float64; entries that are the same infinity in both (masks) count as equal."""
    if b is None:
        return torch.where(a.isinf(), 0, a.double()).norm().item()
    return torch.where(a == b, 0, a.double() - b.double()).norm().item()


@torch.no_grad()
def _check_readers(
    model: nn.Module, sites: list[Site], call: Callable[[], list[Tensor]], result: Verification
) -> str | None:
    """Compare with the output where W' stands in the memory of W: differs if someone computes with W beside a layer.

    Returns a note where this cannot be told.
    """
    spans, layers = storages_of(model), layers_by_adapter(model)
    held = [s for s in sites if not s.adapter.computed and not held_elsewhere(s.base, layers[s.adapter], spans)]
    bases = [site.base for site in held]
    if any(base.dtype in (torch.bfloat16, torch.float16) or autocasting(base.device.type) for base in bases):
        return "readers of the weights were not checked: in half precision the rounding of W' hides them"
    wanted = _seeded(call)
    with disabled(model):
        without = _seeded(call)
    copies = [base.detach().clone() for base in bases]
    try:
        for site, base in zip(held, bases, strict=True):
            site.adapter.merge_into(base.detach(), site.adapter.norm_of(base))
            site.adapter.enabled = False
        found = _seeded(call)
    finally:
        for site, base, copy in zip(held, bases, copies, strict=True):
            base.detach().copy_(copy)
            site.adapter.enabled = True
    for i, (want, got, base_output) in enumerate(zip(wanted, found, without, strict=True)):
        error, effect = _distance(want, got), _distance(want, base_output)
        if not error <= max(1e-5 * _distance(want), 0.02 * effect):
            raise VerificationError(
                f"output {i} is another where W' stands in the place of W, by {error / max(effect, 1e-300):.1%} of the "
                "adapters' effect: something computes with a weight of an adapted layer behind its back (a Parameter "
                "or tensor kept from before `patch`)",
                result,
            )
    return None


def _seeded(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """A call that draws the same random numbers each time (some models draw in eval mode as well)."""
    torch.manual_seed(0)
    return call()
