"""`check`: whether mapsurgery adapts an entry right, clause by clause.

The library is never asked what is right: the expected layers come from `sites`, W' from the definition in float64, and
outputs and gradients from a plain copy of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from definition import Snapshot
from torch import Tensor, nn

import mapsurgery

from . import library
from .call import backward, buffers_kept, build, clear_gradients, difference, make_inputs, run, train_mode
from .entry import Entry
from .sites import Site, find_sites, gradient_of, overwrite, weight_of
from .verdict import Verdict

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
"""Relative, of outputs. Models of float64 compute norms and rotations in float32 inside; an adapter that is bypassed
changes outputs by far more, and gradients, which are compared layer by layer, by their own size."""

LIVE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""A gradient below this share of the model's largest is rounding, such as that of a bias before a softmax."""

Report = Callable[[str], None]


class ClauseError(AssertionError):
    """A clause does not hold."""


class Plain:
    """The plain model of an entry, and what it computes."""

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        self.entry, self.dtype = entry, dtype
        self.model = build(entry, dtype)
        self.inputs = make_inputs(entry, dtype)
        self.sites = find_sites(self.model, entry.options.parameters, entry.options.exclude)
        self.start = self.evaluated()
        if not all(t.isfinite().any() for t in self.start if t.numel()):
            raise ValueError("the plain model's output is not finite")

    @torch.no_grad()
    def evaluated(self) -> list[Tensor]:
        return [t.detach().clone() for t in run(self.entry, self.model, self.inputs)]

    def gradients(self, training: bool) -> dict[str, Tensor]:
        """Live weights and their gradients."""
        return _live(self.model, self.sites, self.dtype, lambda: _learn(self.entry, self.model, self.inputs, training))


def _learn(entry: Entry, model: nn.Module, inputs: Any, training: bool) -> None:
    clear_gradients(model)
    if training:
        with train_mode(model):
            backward(run(entry, model, inputs))
    else:
        with buffers_kept(model):
            backward(run(entry, model, inputs))


def _live(model: nn.Module, sites: dict[str, Site], dtype: torch.dtype, learn: Callable[[], None]) -> dict[str, Tensor]:
    learn()
    found = {key: gradient_of(model, site) for key, site in sites.items()}
    grads = {key: g.detach().double() for key, g in found.items() if g is not None and g.isfinite().all()}
    clear_gradients(model)
    largest = max((g.norm().item() for g in grads.values()), default=0.0)
    return {key: g for key, g in grads.items() if g.norm().item() > LIVE[dtype] * largest}


def check(entry: Entry, report: Report = lambda clause: None) -> Verdict:
    """Judge one entry. `report` is told of each clause before it is checked."""
    started = time.process_time()
    verdict = Verdict(entry.name, entry.family)
    report("plain")
    plain = plain_model(entry, verdict)
    if plain is not None:
        verdict.sites = len(plain.sites)
        _Check(plain, verdict, report).all()
    verdict.seconds = round(time.process_time() - started, 2)
    return verdict


def plain_model(entry: Entry, verdict: Verdict) -> Plain | None:
    """The plain model in the first dtype that it runs in; None, and the verdict says why, if it runs in none."""
    for dtype in entry.options.dtypes:
        try:
            verdict.dtype = str(dtype).removeprefix("torch.")
            return Plain(entry, dtype)
        except Exception as error:  # anything that a model's own code raises: the last one is reported
            failure = f"{verdict.dtype}: {type(error).__name__}: {str(error)[:300]}"
    verdict.kind, verdict.notes = "not runnable", [failure]
    return None


class _Check:
    """All clauses for one entry, in order; a failure of one does not hide the next."""

    def __init__(self, plain: Plain, verdict: Verdict, report: Report) -> None:
        self.plain, self.verdict, self.report = plain, verdict, report
        self.entry, self.dtype, self.sites = plain.entry, plain.dtype, plain.sites
        self.tolerance = TOLERANCE[plain.dtype] * plain.entry.options.tolerance
        self.weights = {key: self._base_weight(site) for key, site in self.sites.items()}
        self.live = self._live_in_training()
        verdict.live = len(self.live)
        self.model = build(self.entry, self.dtype)
        self._settle(self.model)
        self.snapshot = Snapshot(self.model)
        self.adapters: dict[str, Any] = {}

    def _base_weight(self, site: Site) -> Tensor:
        weight = weight_of(self.plain.model.get_submodule(site.path), site.name)
        assert weight is not None
        return weight.detach().clone()

    def _live_in_training(self) -> dict[str, Tensor]:
        """Live weights of the plain model in train mode; in eval mode where that does not run."""
        self.training = True
        try:
            return self.plain.gradients(training=True)
        except Exception as error:  # batch statistics of one value, labels that training needs, ...
            self.training = False
            self.verdict.notes.append(f"train mode does not run: {type(error).__name__}: {str(error)[:120]}")
        try:
            return self.plain.gradients(training=False)
        except Exception as error:  # some models cannot be differentiated in eval mode either
            self.verdict.notes.append(f"no gradient in eval mode: {type(error).__name__}: {str(error)[:120]}")
            return {}

    def _settle(self, model: nn.Module) -> None:
        """Let a model set the attributes that its forward sets, so that they are no difference later."""
        with torch.no_grad():
            run(self.entry, model, self.plain.inputs)
        if self.training:
            _learn(self.entry, model, self.plain.inputs, training=True)
        clear_gradients(model)

    def all(self) -> None:
        try:
            self.report("patch")
            self.skipped = library.patch(self.entry, self.model, self.sites)
        except library.Refused as refusal:
            self.verdict.kind, self.verdict.notes = "refused", [*self.verdict.notes, str(refusal)[:400]]
            return
        except Exception as error:
            self._fail("patch", error)
            return
        self.adapters = library.adapters_of(self.model, self.sites)
        self._clause("adapted", self.adapted)
        self._clause("start", self.start)
        self._clause("learns", self.learns)
        library.to_generic_point(self.adapters.values())
        self._clause("inference", self.inference)
        self._clause("output", self.output)
        self._clause("gradient", self.gradient)
        self._clause("unpatch", self.unpatch)
        self._clause("merge", self.merge)

    def _clause(self, name: str, holds: Callable[[], None]) -> None:
        self.report(name)
        try:
            holds()
        except Exception as error:  # whatever is raised by the adapted model is what is wrong with it
            self._fail(name, error)

    def _fail(self, clause: str, error: Exception) -> None:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        self.verdict.kind = "wrong"
        self.verdict.failures[clause] = f"{kind}{str(error)[:400]}"

    def _evaluated(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [t.detach().clone() for t in run(self.entry, model, self.plain.inputs)]

    def _close(self, found: list[Tensor], wanted: list[Tensor], what: str) -> None:
        error = difference(found, wanted)
        if not error <= self.tolerance:
            raise ClauseError(f"{what}: relative difference {error:.2g}")

    # the clauses ------------------------------------------------------------------------------------------------

    def adapted(self) -> None:
        """Every layer asked for is adapted, or left out with a reason."""
        missing = [key for key in self.sites if key not in self.adapters]
        reasons = {key: self._refusal(key) for key in missing}
        silent = [key for key, reason in reasons.items() if reason is None]
        if missing and not self.verdict.failures:
            self.verdict.kind = "refused"
        self.verdict.notes += sorted({f"refused {reason}" for reason in reasons.values() if reason})[:5]
        if silent:
            raise ClauseError(
                f"{len(silent)} of {len(self.sites)} not adapted, without a reason: {', '.join(silent[:4])}"
            )

    def _refusal(self, key: str) -> str | None:
        """What the plan says of a weight: by its own name, or by that of its module."""
        site = self.sites[key]
        return self.skipped.get(key) or self.skipped.get(site.path)

    def start(self) -> None:
        """The output at the start is the base's."""
        self._close(self._evaluated(self.model), self.plain.start, "output at the start")

    def learns(self) -> None:
        """Forward and backward run, and what is live in the plain model gets a gradient on its adapter."""
        _learn(self.entry, self.model, self.plain.inputs, self.training)
        dead = [
            key
            for key, G in self.live.items()
            if key in self.adapters and not _update_learns(self.adapters[key], G, self.sites[key])
        ]
        clear_gradients(self.model)
        if dead:
            raise ClauseError(f"{len(dead)} of {len(self.live)} live layers get no gradient: {', '.join(dead[:4])}")

    def inference(self) -> None:
        """no_grad and inference_mode, with every fast path on, give what eval with autograd gives."""
        with torch.enable_grad():
            wanted = [t.detach().clone() for t in run(self.entry, self.model, self.plain.inputs)]
        self._close(self._evaluated(self.model), wanted, "no_grad against autograd")

    def output(self) -> None:
        """The output is that of a plain model with W' in the place of each adapted weight."""
        for key, adapter in self.adapters.items():
            overwrite(self.plain.model, self.sites[key], library.defined(self.sites[key], self.weights[key], adapter))
        self.generic = self._evaluated(self.model)
        self._close(self.generic, self.plain.evaluated(), "output with W'")

    def gradient(self) -> None:
        """The adapters' gradients are those of the definition, from the plain model's gradient of W'."""
        try:
            grads = self.plain.gradients(training=False)
        except Exception as error:
            self.verdict.notes.append(f"no gradient in eval mode: {type(error).__name__}: {str(error)[:120]}")
            return
        _learn(self.entry, self.model, self.plain.inputs, training=False)
        shared = _held_by(self.adapters)
        wrong = []
        for key, adapter in self.adapters.items():
            alive = [other for other in shared[id(adapter)] if other in grads]
            if alive and key == shared[id(adapter)][0]:
                error = self._gradient_error(key, adapter, self._total(alive, grads))
                wrong += [f"{key} ({error:.2g})"] if not error <= 10 * self.tolerance else []
        clear_gradients(self.model)
        if wrong:
            raise ClauseError(f"{len(wrong)} of {len(grads)} gradients differ: {', '.join(wrong[:4])}")

    def _total(self, keys: list[str], grads: dict[str, Tensor]) -> Tensor:
        """The gradient of a weight with several holders: one if the Parameter is shared, their sum if not."""
        held = {id(self._plain_parameter(key)): grads[key] for key in keys}
        return sum(held.values())  # type: ignore[return-value]

    def _plain_parameter(self, key: str) -> Any:
        site = self.sites[key]
        return self.plain.model.get_submodule(site.path)._parameters[site.name]

    def _gradient_error(self, key: str, adapter: Any, G: Tensor) -> float:
        own = {n: getattr(adapter, n).detach().double().requires_grad_() for n in ("A", "B", "alpha", "beta")}
        W = library.defined(self.sites[key], self.weights[key], adapter, own)
        wanted = dict(zip(own, torch.autograd.grad(W, list(own.values()), G), strict=True))
        scale = (G.norm() * W.detach().norm()).item()
        errors = []
        for name, parameter in own.items():
            grad = getattr(adapter, name).grad
            found = torch.zeros_like(wanted[name]) if grad is None else grad.double()
            errors.append(((found - wanted[name]).norm() * parameter.detach().norm()).item() / scale)
        return max(errors)

    def unpatch(self) -> None:
        """Unpatching gives every bit back."""
        mapsurgery.unpatch(self.model)
        self.snapshot.assert_holds(self.model)
        if not all(torch.equal(a, b) for a, b in zip(self._evaluated(self.model), self.plain.start, strict=True)):
            self._close(self._evaluated(self.model), self.plain.start, "output after unpatch")

    def merge(self) -> None:
        """The merged model is plain, and its output the adapted one."""
        if self._still_patched():
            raise ClauseError("not checked: the model could not be unpatched")
        names = list(self.model.state_dict())
        library.patch(self.entry, self.model, self.sites)
        library.to_generic_point(library.adapters_of(self.model, self.sites).values())
        wanted = self._evaluated(self.model)
        mapsurgery.merge(self.model)
        if self._still_patched():
            raise ClauseError("adapters are left after the merge")
        if not any(site.computed for site in self.sites.values()) and list(self.model.state_dict()) != names:
            raise ClauseError("the merged model's state_dict has other names")
        self._close(self._evaluated(self.model), wanted, "merged output")

    def _still_patched(self) -> bool:
        return any(isinstance(module, mapsurgery.methods.Adapter) for module in self.model.modules())


def _update_learns(adapter: Any, G: Tensor, site: Site) -> bool:
    """Whether every matrix that is live gets a finite gradient on its update (B, or beta)."""
    grads = [g for g in (adapter.B.grad, adapter.beta.grad) if g is not None]
    if not grads or not all(g.isfinite().all() for g in grads):
        return False
    if not site.stacked or site.computed:
        return any(bool(g.any()) for g in grads)
    live = G.flatten(1).norm(dim=1) > 1e-6 * G.norm()
    learning = torch.stack([g.reshape(g.shape[0], -1).any(1) for g in grads]).any(0)
    return bool(learning[live].all())


def _held_by(adapters: dict[str, Any]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for key, adapter in adapters.items():
        found.setdefault(id(adapter), []).append(key)
    return found
