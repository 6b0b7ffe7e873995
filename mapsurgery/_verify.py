"""Proof that no adapter does nothing: `verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ._example import arguments
from ._trial import EVAL, INFERENCE, TRAINING, Gradients, Mode, Trial
from .methods import Adapter
from .surgery.merge import held_elsewhere, storages_of
from .surgery.patch import turned_off
from .surgery.paths import first_names
from .surgery.record import (
    Site,
    all_sites,
    find_patched,
    find_trained,
    intact_sites,
    names_of,
    outside,
    parameters_of,
    refuse_disabled,
    refuse_spread,
)
from .tables import Table, paragraphs, wrapped

_UPDATE = ("down", "up")
_MAGNITUDES = ("base", "magnitude")


@dataclass(frozen=True, repr=False)
class Verification:
    """Result of `verify`: path -> verdict ("ok", or what is wrong), and what else is to be known. ``print`` shows it.

    Attributes:
        notes: what could not be checked or was judged another way, and what trains beside the adapters.
        differentiated: False where the model cannot be differentiated, so that the verdicts say what acts alone.
    """

    verdicts: dict[str, str]
    notes: tuple[str, ...] = ()
    differentiated: bool = True

    @property
    def failures(self) -> dict[str, str]:
        """The layers whose adapter does not act or does not learn."""
        return {path: verdict for path, verdict in self.verdicts.items() if verdict != "ok"}

    def __str__(self) -> str:
        table = [str(self._table())] if self.failures else [wrapped([self._verdict()])]
        return "\n".join([*table, *([wrapped(self._said())] if self.notes else [])])

    def __repr__(self) -> str:
        """In a line; ``print`` says all."""
        notes = f", notes: {len(self.notes)}" if self.notes else ""
        return f"Verification({self._verdict()}{notes})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        table = self._table().html() if self.failures else paragraphs([self._verdict()])
        return table + paragraphs(self._said())

    def _verdict(self) -> str:
        good = len(self.verdicts) - len(self.failures)
        what = "act on the output and learn" if self.differentiated else "act; whether they learn was not checked"
        return f"{good} of {len(self.verdicts)} adapters {what}"

    def _said(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]

    def _table(self) -> Table:
        return Table(self._verdict(), ["layer", "verdict"], list(self.failures.items()))


class VerificationError(RuntimeError):
    """An adapter does nothing. `verification` holds all verdicts."""

    def __init__(self, message: str, verification: Verification | None = None) -> None:
        super().__init__(message)
        self.verification = verification


def verify(model: nn.Module, *inputs: Any, optimizer: Any = None, **kwargs: Any) -> Verification:
    """Run the model on an example, forward and backward, and prove that every adapter acts and learns.

    Checked, in the context in which it is called (autocast included), on random projections of all floating outputs:

    - from where it is now, each adapter gets a finite, non-zero gradient on A or B; at a generic point, every parameter
      of it does in eval mode, and some do in train mode. An adapter that gets none in eval mode, because the model does
      not differentiate there or its gradients underflow, is judged by train mode;
    - the output differs from the base's;
    - every adapter that acts in eval mode with autograd acts in inference (no_grad, eval, fast paths on) as well, and
      the outputs of the two agree up to the rounding of the arithmetic that ran, where those of the base do;
    - nobody reads W behind its layer's back: the output stays the same, bit for bit, while the adapters compute with a
      copy of W and its memory holds other numbers (for that, one more copy of the adapted weights is kept meanwhile);
    - with `optimizer`: it holds what is to be trained, and its eps is a number of the parameters' dtype.

    A model that runs and that torch cannot differentiate, with adapters or without (convolutions that diffusers stores
    in 8 bits), is judged by which adapters act, and the result says so.

    The model is left as it was: parameters, gradients, buffers, mode, random state. Frozen parameters that the model's
    own train mode writes to are not. What torch.compile made runs as plain Python.

    Args:
        inputs, kwargs: what the model's forward takes. A single mapping (a dictionary, transformers' BatchEncoding)
            stands for keyword arguments and a single tuple for positional ones, unless the forward's signature says
            that it takes a structure as its one argument. Tensors and caches in it are copied for each run.
        optimizer: that is to train the model, wrapped ones (accelerate's) and lists of several included.

    Returns:
        A printable `Verification`, all of whose verdicts are "ok". Its notes name the other parameters that train, what
        could not be checked with this input, and frozen parameters of the optimiser.

    Raises:
        VerificationError: listing the adapters that are frozen, unused, dead, not finite or not in the optimiser, or
            that it would make NaN, or saying that inference or a reader of the weights bypasses the adapters.
        ValueError: the model is not patched, its output holds no floating tensor, or adapters are cast to 8 bits.
        TypeError: `optimizer` has no param_groups.
    """
    root, record = find_trained(model)
    sites = intact_sites(root, record)
    refuse_spread(sites, "verify")
    adapters = {site.path: site.adapter for site in sites}
    if any(adapter.weight_norm.is_meta for adapter in adapters.values()):
        raise ValueError("the model is on meta: load its weights before verifying it")
    refuse_disabled(sites, "verify")
    coded = [path for path, a in adapters.items() if any(p.itemsize == 1 for p in a.own_parameters().values())]
    if coded:
        raise ValueError(f"adapters are stored in 8 bits, in which they cannot learn: {_named(coded)}; cast them back")
    optimised = None if optimizer is None else _optimised(optimizer)
    args, kwargs = arguments(model, inputs[0]) if len(inputs) == 1 and not kwargs else (inputs, kwargs)
    with Trial(model, adapters, args, kwargs).open() as trial:
        in_eval, in_training, bypassed = _look(trial)
        result = _judged(sites, in_eval, in_training, lambda site: _copy_of_weight(root, site))
        result = _with_notes(result, *_others(model, trial, result.differentiated))
        if optimised is not None:
            result = _in_optimiser(model, result, adapters, trial.others, optimised)
        if result.failures:
            listed = "; ".join(f"{path}: {verdict}" for path, verdict in list(result.failures.items())[:20])
            raise VerificationError(f"{len(result.failures)} of {len(adapters)} adapters fail: {listed}", result)
        if bypassed:
            raise _bypass(bypassed, result)
        result = _check_ways(trial, root, result, in_eval, in_training)
    return result


# Gradients -----------------------------------------------------------------------------------------------------------

_TRAIN_TRIES = 4  # stochastic depth may leave a layer out of one pass
_LARGER, _SMALLER = (2.0**8, 2.0**16, 2.0**32, 2.0**64, 2.0**96), (2.0**-8, 2.0**-16, 2.0**-32)
"""Sizes of the projection under which a gradient that underflowed or overflowed may show."""

_Settled = Callable[[Adapter, dict[str, Tensor]], bool]


@dataclass
class _Seen:
    """What was seen of the adapters in one mode.

    Attributes:
        start, generic: gradients where the adapters are now, and at a generic point.
        acted: paths of those that computed in any run.
        rescaled: paths of those whose gradient came only under another size of the projection.
        error: of the first run that failed; the others were not tried.
    """

    mode: Mode
    start: Gradients = field(default_factory=dict)
    generic: Gradients = field(default_factory=dict)
    acted: set[str] = field(default_factory=set)
    rescaled: set[str] = field(default_factory=set)
    error: Exception | None = None

    def look(self, trial: Trial, settled: _Settled) -> Gradients:
        """Gradients of the first run that reached each adapter; where they are 0 or not finite, of others too."""
        found: Gradients = {path: {} for path in trial.adapters}
        if self.error is not None:
            return found
        try:
            for seed in range(_TRAIN_TRIES if self.mode.training else 1):
                for path, grads in trial.gradients(self.mode, seed).items():
                    found[path] = found[path] or grads
                self.acted |= trial.acted
                if all(found.values()):
                    break
            self._rescale(trial, settled, found)
        except Exception as error:  # whatever the model's own code raises on this input, in this mode
            self.acted |= trial.acted
            # The frames of a trace hold activations; that of eval mode may be raised.
            self.error = error.with_traceback(None) if self.mode.training else error
        return found

    def _rescale(self, trial: Trial, settled: _Settled, found: Gradients) -> None:
        waiting = {path for path, grads in found.items() if grads and not settled(trial.adapters[path], grads)}
        for scale in (*_LARGER, *_SMALLER):
            finite = all(_finite(found[path]) for path in waiting)
            if not waiting or (scale < 1 and finite):
                break
            if scale > 1 and not any(not g.any() for path in waiting for g in found[path].values()):
                continue
            for path, grads in trial.gradients(self.mode, scale=scale).items():
                if path in waiting:
                    found[path] = {n: _better(found[path].get(n), grad) for n, grad in grads.items()} or found[path]
            now = {path for path in waiting if settled(trial.adapters[path], found[path])}
            self.rescaled |= now
            waiting -= now


def _better(grad: Tensor | None, other: Tensor) -> Tensor:
    """Of two gradients under different projections the one that says more: finite, and not 0; else the first."""
    return other if grad is None or _worth(other) > _worth(grad) else grad


def _worth(grad: Tensor) -> tuple[bool, bool]:
    return bool(grad.isfinite().all()), bool(grad.any())


def _finite(grads: Mapping[str, Tensor]) -> bool:
    return all(bool(grad.isfinite().all()) for grad in grads.values())


def _look(trial: Trial) -> tuple[_Seen, _Seen, set[str]]:
    """What is seen in eval and in train mode, and the adapters that inference bypasses where they are now.

    Raises:
        Exception: what the model raises, if neither mode runs.
    """
    in_eval, in_training = _Seen(EVAL), _Seen(TRAINING)
    _fill_zeros(trial)
    in_eval.start = in_eval.look(trial, _starts)
    bypassed = set() if in_eval.error else _bypassed(trial, set(in_eval.acted))
    hiding = {path: adapter for path, adapter in trial.adapters.items() if not adapter.weight_norm.any()}
    if hiding and _unsettled(trial, in_eval):
        _perturb(hiding)  # as a new head of zeros does
        again = in_eval.look(trial, _starts)
        in_eval.start |= {path: again[path] for path in _unsettled(trial, in_eval) if path not in hiding}
    if _unsettled(trial, in_eval):
        found = in_training.look(trial, _starts)
        in_training.start = {path: grads for path, grads in found.items() if path not in hiding}
    _perturb(trial.adapters)
    in_eval.generic = in_eval.look(trial, _moves)
    in_training.generic = in_training.look(trial, _moves)
    if in_eval.error and in_training.error and not _backward_fails(trial):
        raise in_eval.error
    return in_eval, in_training, bypassed


def _unsettled(trial: Trial, seen: _Seen) -> list[str]:
    return [path for path, adapter in trial.adapters.items() if not _starts(adapter, seen.start[path])]


def _backward_fails(trial: Trial) -> bool:
    """Whether the model runs in eval mode, and cannot be differentiated without adapters either."""
    try:
        trial.run(EVAL)
    except Exception:
        return False
    try:
        trial.run_base(EVAL, backward=True)
    except Exception:
        return True
    return False


@torch.no_grad()
def _fill_zeros(trial: Trial) -> None:
    """A new head often starts at 0, which hides all that is below it, for one step: look past that."""
    for parameter in trial.others.values():
        if not (parameter if parameter.itemsize > 1 else parameter.float()).any():  # few operations know 8 bits
            parameter.copy_(0.02 * torch.randn(parameter.shape, device=parameter.device))


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


# Verdicts ------------------------------------------------------------------------------------------------------------


_FROZEN = "frozen: none of its parameters requires a gradient"


def _trainable(adapter: Adapter) -> dict[str, nn.Parameter]:
    return {name: p for name, p in adapter.own_parameters().items() if p.requires_grad}


def _still(adapter: Adapter, acting: dict[str, Tensor]) -> list[str]:
    """Trainable parameters whose gradient at a generic point is 0 and should not be."""
    zero_base = not adapter.weight_norm.any()  # then its magnitude multiplies nothing
    names = [name for name in _trainable(adapter) if name in acting and not acting[name].any()]
    return [name for name in names if not (zero_base and adapter.roles[name] in _MAGNITUDES)]


def _starts(adapter: Adapter, learning: dict[str, Tensor]) -> bool:
    """Whether gradients where the adapter is now say that its update learns."""
    updates = [name for name in _trainable(adapter) if adapter.roles[name] != "base"]
    return _finite(learning) and (not updates or any(learning[n].any() for n in updates if n in learning))


def _moves(adapter: Adapter, acting: dict[str, Tensor]) -> bool:
    """Whether gradients at a generic point say that every parameter acts."""
    return bool(acting) and _finite(acting) and not _still(adapter, acting)


def _verdict(adapter: Adapter, learning: dict[str, Tensor], acting: dict[str, Tensor]) -> str:
    """Of one adapter, from its gradients where it is now, and at a generic point, in one mode."""
    trainable = _trainable(adapter)
    if not trainable:
        return _FROZEN
    absent = [name for name in trainable if name not in acting]
    if absent:
        return (
            f"unused: no gradient reaches {', '.join(absent)} (not called with this input, or its output is not used)"
        )
    if not _finite(learning) or not _finite(acting):
        return "not finite: its gradient holds NaN or infinity"
    if not any(grad.any() for grad in acting.values()):
        return "dead: the layer has no effect on the output, adapted or not (is a scale after it 0?)"
    still = _still(adapter, acting)
    if still:
        return f"dead: the gradient of {', '.join(still)} is 0"
    if not _starts(adapter, learning):
        return "dead: from where it is now, no gradient reaches its update"
    return "ok"


def _judged(
    sites: list[Site], in_eval: _Seen, in_training: _Seen, copy_of: Callable[[Site], str | None]
) -> Verification:
    """The verdict of eval mode, or that of train mode where eval mode says less.

    Args: copy_of: name of an attribute that holds a copy of the weight of a site, if there is one.
    """
    if in_eval.error is not None and in_training.error is not None:
        idle = "unused: not called with this input"
        acting = {s.path: "ok" if s.path in in_eval.acted else idle for s in sites if _trainable(s.adapter)}
        verdicts = {s.path: acting.get(s.path, _FROZEN) for s in sites}
        note = f"no gradient was checked, the backward fails on this input, for the base too: {_said(in_eval.error)}"
        return Verification(verdicts, (note,), differentiated=False)
    verdicts, by_training = {}, []
    for site in sites:
        path, adapter = site.path, site.adapter
        learning, trained = in_eval.start[path], in_training.generic[path]
        verdict = _verdict(adapter, learning, in_eval.generic[path])
        if verdict == "ok" and not trained and in_training.error is None:
            verdict = "learns nothing in train mode: no gradient reaches it there, though it does in eval mode"
        elif verdict != "ok" and trained:
            other = _verdict(adapter, in_training.start.get(path) or learning or trained, trained)
            copied = None if other != "ok" or path in in_eval.acted else copy_of(site)
            if copied is not None:
                verdict = f"bypassed in eval mode, where it does not act and `{copied}` holds a copy of its weight"
            elif other == "ok":
                verdict = "ok"
                by_training.append(path)
            elif in_eval.error is not None:
                verdict = other
        verdicts[path] = verdict
    return Verification(verdicts, tuple(_notes_on_modes(by_training, in_eval, in_training)))


@torch.no_grad()
def _copy_of_weight(root: nn.Module, site: Site) -> str | None:
    """Name of a tensor of the layer or of a module around it, beside the weight itself, that holds its numbers."""
    weight, modules = site.base, {name: module for module, names in names_of(root).items() for name in names}
    parts = site.layer_path.split(".") if site.layer_path else []
    for path in (".".join(parts[:depth]) for depth in range(len(parts), -1, -1)):
        module = modules[path]
        for name, value in (*module.__dict__.items(), *module._buffers.items(), *module._parameters.items()):
            if name.startswith("_") and isinstance(value, dict):  # of nn.Module itself
                continue
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf is not weight and _is_copy(leaf, weight):
                    return f"{path}.{name}".lstrip(".")
    return None


def _is_copy(tensor: Tensor, weight: Tensor) -> bool:
    """Whether one is about a multiple of the other or its transpose: a copy, a merged weight, integer codes of it."""
    if tensor.is_meta or tensor.layout != torch.strided or weight.is_meta:
        return False
    same = [weight] if tensor.shape == weight.shape else []
    same += [weight.t()] if weight.dim() == 2 and tensor.shape == weight.t().shape else []
    return any(F.cosine_similarity(tensor.flatten().double(), w.flatten().double(), dim=0) > 0.95 for w in same)


def _notes_on_modes(by_training: list[str], in_eval: _Seen, in_training: _Seen) -> Iterable[str]:
    for seen, what in ((in_training, "train mode was not checked"), (in_eval, "eval mode was not differentiated")):
        if seen.error is not None:
            yield f"{what}, it fails on this input: {_said(seen.error)}"
    quiet = [path for path in by_training if path in in_eval.acted or in_eval.error is not None]
    if quiet:
        yield f"judged by train mode, since eval mode gives no gradient that tells: {_named(quiet)}"
    absent = [path for path in by_training if path not in quiet]
    if absent:
        yield f"used in train mode alone, the output of eval mode is made without them: {_named(absent)}"
    rescaled = [path for path in in_eval.generic if path in in_eval.rescaled | in_training.rescaled]
    if rescaled:
        yield f"a gradient underflows or overflows, another size of the loss was tried for: {_named(rescaled)}"


def _named(names: Collection[str]) -> str:
    """Some of the names, and how many there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _with_notes(result: Verification, *notes: str) -> Verification:
    return dataclasses.replace(result, notes=(*result.notes, *notes))


# What trains beside the adapters -------------------------------------------------------------------------------------


def _others(model: nn.Module, trial: Trial, differentiated: bool) -> list[str]:
    """Notes on the trainable parameters that no adapter owns."""
    if not trial.others:
        return []
    count = sum(p.numel() for p in trial.others.values())
    tensors = "1 other parameter trains" if len(trial.others) == 1 else f"{len(trial.others)} other parameters train"
    notes = [f"{tensors} ({count:,} numbers): {_named(trial.others)}"]
    unreached = [name for name in trial.others if name not in trial.reached]
    if unreached and differentiated:
        notes.append(f"no gradient reaches {_named(unreached)}")
    beyond = outside(model, find_patched(model)[0])
    if beyond:
        notes.append(f"outside of the part that was patched, so that `patch` froze nothing there: {_named(beyond)}")
    return notes


def _optimised(optimizer: Any) -> dict[int, tuple[nn.Parameter, float | None]]:
    """The parameters of an optimiser, of the one that it wraps, or of several, each with its eps; None: it has none.

    Raises:
        TypeError: it is no optimiser.
    """
    several = optimizer.values() if isinstance(optimizer, Mapping) else optimizer
    if isinstance(several, Iterable):
        return {key: p for one in several for key, p in _optimised(one).items()}
    found, groups = {}, False
    while optimizer is not None:
        for group in getattr(optimizer, "param_groups", ()):
            groups = True
            found.update({id(p): (p, group.get("eps")) for p in group["params"]})
        optimizer = getattr(optimizer, "optimizer", None)
    if not groups:
        raise TypeError(f"optimizer must be a torch optimiser, which has param_groups, got {type(several).__name__}")
    return found


def _in_optimiser(
    model: nn.Module,
    result: Verification,
    adapters: dict[str, Adapter],
    others: dict[str, nn.Parameter],
    optimised: dict[int, tuple[nn.Parameter, float | None]],
) -> Verification:
    """Adapters that the optimiser leaves out, or would make NaN, fail; frozen parameters that it holds are noted.

    Raises:
        VerificationError: it leaves other trainable parameters out.
    """
    verdicts = dict(result.verdicts)
    for path, adapter in adapters.items():
        left_out = [name for name, p in _trainable(adapter).items() if id(p) not in optimised]
        if left_out and verdicts[path] == "ok":
            verdicts[path] = f"not in the optimiser: {', '.join(left_out)} (was it made before `patch`?)"
        vanishes = _vanishing_eps(optimised[id(p)] for p in _trainable(adapter).values() if id(p) in optimised)
        if vanishes is not None and verdicts[path] == "ok":
            verdicts[path] = vanishes
    frozen = {id(p) for p, _ in optimised.values() if not p.requires_grad}
    names = [name for name, p in first_names(parameters_of(model)).items() if id(p) in frozen]
    names += [f"{len(frozen) - len(names)} that are not in this model"] if len(frozen) > len(names) else []
    notes = [f"frozen, though the optimiser holds them: {_named(names)}"] if names else []
    result = _with_notes(dataclasses.replace(result, verdicts=verdicts), *notes)
    left_out = [name for name, p in others.items() if id(p) not in optimised]
    if left_out and not result.failures:
        raise VerificationError(f"trainable, but not in the optimiser: {_named(left_out)}", result)
    return result


def _vanishing_eps(trained: Iterable[tuple[nn.Parameter, float | None]]) -> str | None:
    """Why an optimiser makes parameters NaN: it adds an eps that is 0 in their dtype to a root that may be, too."""
    for parameter, eps in trained:
        if isinstance(eps, float) and eps != 0 and torch.tensor(eps, dtype=parameter.dtype) == 0:
            dtype = str(parameter.dtype).removeprefix("torch.")
            return (
                f"the optimiser's eps={eps:g} is 0 in {dtype}, so that a step divides by 0: leave out `dtype` of "
                "`patch` (float32 adapters work in a float16 model), or give it bfloat16"
            )
    return None


# Inference, and who reads W ------------------------------------------------------------------------------------------


def _check_ways(
    trial: Trial, root: nn.Module, result: Verification, in_eval: _Seen, in_training: _Seen
) -> Verification:
    """At a generic point, with copies of W: eval mode against inference, each against the base, and who reads W."""
    weights, notes = _own_weights(trial.model, root)
    trial.hold(weights)
    outputs: dict[Mode, list[Tensor]] = {}
    acted: dict[Mode, set[str]] = {}
    for mode, failed in ((TRAINING, in_training.error), (EVAL, in_eval.error), (INFERENCE, in_eval.error)):
        try:
            outputs[mode] = _detached(trial.run(mode))
            acted[mode] = trial.acted
        except Exception as error:
            # If not, it was said already; its forward, or that without autograd, may run.
            notes += [_as_the_base(trial, mode, error)] if failed is None else []
    if EVAL in outputs and INFERENCE in outputs:
        bypassed = _bypassed(trial, acted[EVAL])
        if bypassed:
            raise _bypass(bypassed, result)
        notes += _compare(trial, outputs, acted[EVAL], result)
    elif TRAINING in outputs:
        idle = acted[TRAINING] - acted.get(INFERENCE, set())
        notes += [f"not used in inference: {_named(sorted(idle))}"] if idle and INFERENCE in outputs else []
    _check_readers(trial, weights, outputs, result)
    return _with_notes(result, *notes)


def _as_the_base(trial: Trial, mode: Mode, error: Exception) -> str:
    """A note that the base fails in this mode as well. Raises the error if it does not."""
    try:
        trial.run_base(mode)
    except Exception as own:
        return f"inference was not checked, it fails on this input, for the base too: {_said(own)}"
    raise error


def _detached(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


def _bypassed(trial: Trial, acted: set[str]) -> set[str]:
    """Adapters of those that act in eval mode with autograd that do not in inference, where the rounding of a run does
    not decide that (the experts of a mixture)."""
    try:
        trial.run(INFERENCE)
    except Exception as error:
        _as_the_base(trial, INFERENCE, error)
        return set()
    gone = acted - trial.acted
    if gone:
        trial.run(EVAL)
        lost = gone - trial.acted  # now they do not act here either: something was kept
        for size, seed in _roundings(trial):
            with trial.inexact(size, seed):
                trial.run(EVAL)
            gone &= trial.acted | lost
    return gone


def _bypass(paths: Collection[str], result: Verification) -> VerificationError:
    verdict = "bypassed in inference: it acts in eval mode with autograd, and not without"
    result = dataclasses.replace(result, verdicts=result.verdicts | dict.fromkeys(paths, verdict))
    names = _named([path for path in result.verdicts if path in paths])
    message = f"inference differs from eval with autograd: a fast path, or a weight that is kept, bypasses {names}"
    return VerificationError(message, result)


def _roundings(trial: Trial) -> Iterable[tuple[float, int]]:
    """Relative errors of the size of the arithmetic's own, with a seed for each.

    Of both ways that are compared: on processors that multiply in bfloat16, some layers do so in inference alone.
    """
    eps = max(trial.coarsest_eps(mode) for mode in (EVAL, INFERENCE))
    return [(size * eps, seed) for size in (1, 2, 4) for seed in range(3)]


@torch.no_grad()
def _compare(trial: Trial, outputs: dict[Mode, list[Tensor]], acted: set[str], result: Verification) -> list[str]:
    """Notes on what could not be compared in numbers.

    Raises:
        VerificationError: inference gives other numbers than eval mode, or the same as the base.
    """
    expected, found = outputs[EVAL], outputs[INFERENCE]
    try:
        plain = {mode: _detached(trial.run_base(mode)) for mode in (EVAL, INFERENCE)}
    except Exception as failure:  # as torch's fast path of nn.TransformerEncoder does under autocast
        _check_each(trial, acted, found, result)
        return [f"inference was compared adapter by adapter, since the base fails there: {_said(failure)}"]
    if acted and _distances(expected, plain[EVAL]) == [0.0] * len(expected):
        raise VerificationError("the adapted output equals the base's: the adapters do not act on it", result)
    rows = [_agreeing(a, b) for a, b in zip(plain[EVAL], plain[INFERENCE], strict=False)]
    if len(expected) == len(found) == len(rows):
        _check_numbers(trial, expected, found, plain, rows, result)
        if all(agree is None or agree.any() for agree in rows):
            return []
    _check_each(trial, acted, found, result)
    return ["the base's own inference differs from its eval mode with autograd: compared adapter by adapter"]


def _check_each(trial: Trial, acted: set[str], found: list[Tensor], result: Verification) -> None:
    """Raises VerificationError if the output of inference is the same without one of the adapters."""
    idle = set()
    for path in acted:
        with turned_off([trial.adapters[path]]):
            if _distances(found, _detached(trial.run(INFERENCE))) == [0.0] * len(found):
                idle.add(path)
    if idle:
        raise _bypass(idle, result)


def _check_numbers(
    trial: Trial,
    expected: list[Tensor],
    found: list[Tensor],
    plain: dict[Mode, list[Tensor]],
    rows: list[Tensor | None],
    result: Verification,
) -> None:
    """Raises VerificationError if outputs differ, in these rows, by more than the arithmetic that ran explains."""
    errors = _distances(expected, found, rows)
    effects = _distances(expected, plain[EVAL], rows)
    plain_errors = _distances(plain[EVAL], plain[INFERENCE], rows)
    for i, (error, effect, own) in enumerate(zip(errors, effects, plain_errors, strict=True)):
        # Fast paths order their sums differently: rounding is forgiven, a share of the adapters' own effect is not.
        rounding = 4 * torch.finfo(expected[i].dtype).eps * _size(expected[i], rows[i])
        if error <= max(rounding, 2 * own, 0.02 * effect if effect < float("inf") else 0.0):
            continue
        if not error <= _sensitivity(trial, expected, rows, i, error):
            raise VerificationError(
                f"inference differs from eval with autograd, by {error / max(effect, 1e-300):.1%} of the adapters' "
                f"effect on output {i}: a fast path does not go through all of them",
                result,
            )


def _sensitivity(trial: Trial, expected: list[Tensor], rows: list[Tensor | None], i: int, error: float) -> float:
    """How far rounding moves an output: the largest distance that was met, no more than is needed for this error."""
    largest = 0.0
    for size, seed in _roundings(trial):
        with trial.inexact(size, seed):
            off = _detached(trial.run(EVAL))
        if len(off) != len(expected):
            return float("inf")
        largest = max(largest, _distances(expected, off, rows)[i])
        if error <= largest:
            break
    return largest


def _agreeing(a: Tensor, b: Tensor) -> Tensor | None:
    """(rows,) whether each row of the last dimension is about the same in two outputs of the base; None: no shape."""
    if a.shape != b.shape:
        return None
    difference, a = _difference(a, b), _as_rows(a.double())
    size = torch.where(a.isfinite(), a, 0).norm(dim=1)
    return _as_rows(difference).norm(dim=1) <= 0.1 * size


def _as_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]) if t.dim() > 1 and t.numel() else t.reshape(1, -1)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """In float64; entries that are the same infinity (masks) or NaN in both count as equal."""
    a, b = a.double(), b.double()
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0, a - b)


def _distances(a: list[Tensor], b: list[Tensor], rows: list[Tensor | None] | None = None) -> list[float]:
    """Norm of each difference, in these rows; infinite for other shapes, 0 where nothing is to be compared."""
    if len(a) != len(b):
        return [float("inf")] * len(a)
    return [
        float("inf") if x.shape != y.shape else _size(_difference(x, y), None if rows is None else rows[i])
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    ]


def _size(t: Tensor, rows: Tensor | None = None) -> float:
    parts = _as_rows(t.double()) if rows is None else _as_rows(t.double())[rows]
    return torch.where(parts.isinf(), 0, parts).norm().item()


def _own_weights(model: nn.Module, root: nn.Module) -> tuple[dict[Adapter, nn.Parameter], list[str]]:
    """The plain W of each adapter that no module holds past its adapter, and a note on the others."""
    by_adapter: dict[Adapter, list[Site]] = {}
    by_weight: dict[int, set[nn.Module]] = {}
    for site in all_sites(root):
        by_adapter.setdefault(site.adapter, []).append(site)
        by_weight.setdefault(id(site.layer._parameters.get(site.parameter)), set()).add(site.layer)
    spans = storages_of(model)
    found: dict[Adapter, nn.Parameter] = {}
    shared, away = [], []
    for adapter, sites in by_adapter.items():
        weight = sites[0].layer._parameters.get(sites[0].parameter)
        if weight is None or adapter.computed:
            continue
        if weight.is_meta:
            away.append(sites[0].path)
        elif any(site.layer._parameters.get(site.parameter) is not weight for site in sites) or held_elsewhere(
            weight, by_weight[id(weight)], spans
        ):
            shared.append(sites[0].path)
        else:
            found[adapter] = weight
    notes = [f"who reads these weights was not checked, other modules hold them as well: {_named(shared)}"]
    notes += [f"who reads these weights was not checked, they are put away between runs: {_named(away)}"]
    return found, [note for note, paths in zip(notes, (shared, away), strict=True) if paths]


def _check_readers(
    trial: Trial, weights: dict[Adapter, nn.Parameter], outputs: dict[Mode, list[Tensor]], result: Verification
) -> None:
    """Raises VerificationError if an output changes with the memory of W, with which no adapter computes now."""
    paths = {weights[adapter]: path for path, adapter in trial.adapters.items() if adapter in weights}
    for mode, intact in outputs.items():
        if not _changes(trial, mode, intact, list(paths)):
            continue
        suspects = list(paths)
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            suspects = half if _changes(trial, mode, intact, half) else suspects[len(half) :]
        raise VerificationError(
            f"the output of {'train' if mode.training else 'eval'} mode changes with the memory of W, with which no "
            f"adapter computes: something computes with the weight of {paths[suspects[0]]} behind its back (with a "
            "Parameter or tensor kept from before `patch`, or past the attribute)",
            result,
        )


_REPEATS = 3


def _changes(trial: Trial, mode: Mode, intact: list[Tensor], weights: list[nn.Parameter]) -> bool:
    """Whether an output is another while these weights are overwritten, by more than it is from run to run."""
    with trial.overwritten(weights):
        try:
            found = _detached(trial.run(mode))
        except Exception:  # it ran before
            return True
    errors = _distances(intact, found)
    if errors == [0.0] * len(errors):
        return False
    own = [0.0] * len(errors)
    for _ in range(_REPEATS):  # kernels whose sums have no order
        again = _distances(intact, _detached(trial.run(mode)))
        own = [max(pair) for pair in zip(own, again, strict=True)]
    return any(not error <= 4 * largest for error, largest in zip(errors, own, strict=True))
