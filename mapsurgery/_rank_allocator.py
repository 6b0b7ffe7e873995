"""AdaLoRA's training (Zhang et al., arXiv 2303.10512): ranks moved between layers, and orthogonal factors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .interrupts import uninterrupted
from .methods import Adapter
from .named import positive
from .surgery.all_or_nothing import Journal, all_or_nothing
from .surgery.record import find_patched, intact_sites
from .updates import AdaLora


class RankAllocator:
    """Sets the least important λ of update "adalora" to 0, over all layers, until a budget is left (algorithm 1).

    The importance of λ_i is s(λ_i) + mean s(P_*i) + mean s(Q_i*) (eq. 9), with s = Ī · Ū of each entry (eqs. 8-11): the
    running mean Ī of the sensitivity |w ∂w| and Ū of its deviation from Ī. The budget is the whole for `warmup` steps,
    falls with a cubic curve, and stays at the target for the last `final` steps (eq. 12), in which the choice is fixed.
    The numbers are those of peft's RankAllocator, which takes gradients as they are and parameters as the
    optimiser left them: `step` belongs between `optimizer.step` and `zero_grad`::

        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()

    λ is set to 0, not removed: shapes stay, and until the choice is fixed a λ may come back. Every process of
    data-parallel training decides the same, from the same gradients.

    Args:
        model: patched with update="adalora".
        target_rank: mean rank of a weight in the end, at least 0, at most that of the patch. Matrices of a stack count
            one by one.
        total_steps: of the training.
        warmup, final: steps (t_i and t_f of the paper), at least 0 and 1.
        interval: steps from one masking to the next (Δ_T).
        beta1, beta2: of the running means of sensitivity and deviation, between 0 and 1.

    Raises:
        ValueError: the model is not patched, another update family is used, or a number is out of range.

    Attributes:
        current: steps taken.
    """

    def __init__(
        self,
        model: nn.Module,
        target_rank: float,
        total_steps: int,
        *,
        warmup: int,
        final: int,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        self._adapters = _adalora(model)
        self._whole = sum(lam.numel() for lam in self._lams().values())
        matrices = sum(adapter.matrices for adapter in self._adapters.values())
        if not 0 <= target_rank <= self._whole / matrices:
            mean = self._whole / matrices
            raise ValueError(f"target_rank must be from 0 to {mean:g}, the mean rank of the patch, got {target_rank}")
        if warmup < 0 or final < 1 or warmup >= total_steps - final:
            raise ValueError(
                f"warmup must be at least 0, final at least 1, and steps be left in between: got warmup {warmup}, "
                f"final {final}, total_steps {total_steps}"
            )
        positive("a RankAllocator", interval=interval)
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        self._target = int(target_rank * matrices)
        self.total_steps, self.warmup, self.final, self.interval = total_steps, warmup, final, interval
        self.beta1, self.beta2 = beta1, beta2
        self.current = 0
        self._sensitivity: dict[str, Tensor] = {}
        self._deviation: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def budget(self, step: int) -> int:
        """λ that are left at a step, counted from 0 (eq. 12)."""
        if step <= self.warmup:
            return self._whole
        end = self.total_steps - self.final
        if step >= end:
            return self._target
        share = 1 - (step - self.warmup) / (end - self.warmup)
        return int((self._whole - self._target) * share**3 + self._target)

    @torch.no_grad()
    def step(self) -> None:
        """Take the gradients in, and mask λ where it is time to.

        Raises:
            ValueError: no adapter has a gradient.
        """
        step, end = self.current, self.total_steps - self.final
        after = copy.copy(self)
        if step < end:
            after._sensitivity, after._deviation = self._observed()
        chooses = step == end or (end > step > self.warmup and step % self.interval == 0)
        if chooses:
            after._kept = after._chosen(self.budget(step))
        after.current = step + 1
        with all_or_nothing() as journal:
            if chooses or step > end:
                after._mask(journal)
            self.__dict__.update(after.__dict__)

    def _observed(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Running means of sensitivity and deviation; a parameter that had no part in this step has sensitivity 0."""
        entries = self._entries()
        if all(p.grad is None for p in entries.values()):
            raise ValueError("no adapter has a gradient: call step() after backward() and before zero_grad()")
        sensitivity, deviation = {}, {}
        for name, p in entries.items():
            now, zero = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs(), torch.zeros_like(p)
            mean = self._sensitivity.get(name, zero) * self.beta1 + now * (1 - self.beta1)
            sensitivity[name] = mean
            deviation[name] = self._deviation.get(name, zero) * self.beta2 + (now - mean).abs() * (1 - self.beta2)
        return sensitivity, deviation

    def _entries(self) -> dict[str, Tensor]:
        """P, λ and Q of all layers, by "<layer>.<name>"."""
        adapters = self._adapters.items()
        return {f"{path}.{name}": a.get_parameter(name) for path, a in adapters for name in AdaLora.roles}

    def _lams(self) -> dict[str, Tensor]:
        return {path: adapter.get_parameter("lam") for path, adapter in self._adapters.items()}

    def _importance(self, path: str) -> Tensor:
        """Of each λ of an adapter, in its shape."""
        P, lam, Q = (self._sensitivity[f"{path}.{n}"] * self._deviation[f"{path}.{n}"] for n in ("P", "lam", "Q"))
        return lam + (Q.mean(-1) + P.mean(-2))

    def _chosen(self, budget: int) -> dict[str, Tensor]:
        """The λ above the importance of the last one that must go: equal ones go together."""
        importance = {path: self._importance(path) for path in self._adapters}
        gone = self._whole - budget
        device = next(iter(importance.values())).device
        if gone == 0:
            return {path: torch.ones_like(values, dtype=torch.bool) for path, values in importance.items()}
        every = torch.cat([values.flatten().to(device) for values in importance.values()])
        threshold = every.kthvalue(gone).values
        return {path: values > threshold.to(values.device) for path, values in importance.items()}

    def _mask(self, journal: Journal) -> None:
        lams = self._lams()
        for path, kept in self._kept.items():
            journal.write(lams[path], lams[path].masked_fill(~kept, 0))

    def ranks(self) -> dict[str, int]:
        """λ that the last masking left, by layer (of a stack the sum); all before the first. Reads the device."""
        sizes = {path: lam.numel() for path, lam in self._lams().items()}
        return sizes | {path: int(mask.sum()) for path, mask in self._kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """The step, the running means and the choice; tensors are not copied."""
        return {
            "step": self.current,
            "sensitivity": dict(self._sensitivity),
            "deviation": dict(self._deviation),
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an allocator of the same model and arguments, at any device.

        Raises:
            ValueError: a tensor belongs to no layer of this model, or has another shape.
        """
        entries = self._entries()
        sensitivity, deviation = (_fitting(state[name], entries) for name in ("sensitivity", "deviation"))
        kept = _fitting(state["kept"], self._lams())
        step = int(state["step"])
        with uninterrupted():
            self.current, self._sensitivity, self._deviation, self._kept = step, sensitivity, deviation, kept


def _fitting(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of loaded tensors beside the parameters that they belong to."""
    for name, tensor in tensors.items():
        if name not in places or places[name].shape != tensor.shape:
            expected = tuple(places[name].shape) if name in places else "no such layer"
            raise ValueError(
                f"the state does not fit the model: {name} has shape {tuple(tensor.shape)}, here {expected}"
            )
    return {name: tensor.to(places[name].device, copy=True) for name, tensor in tensors.items()}


def orthogonality_loss(model: nn.Module) -> Tensor:
    """Mean of ‖PᵀP - I‖_F and ‖QQᵀ - I‖_F over all layers with update "adalora", to be added to the loss, times γ.

    As the paper's code and peft compute it; eq. 4 of the paper has the squares. The paper takes γ from 0.1 to 0.5.

    Returns:
        A number, (), on the device of the first adapter, differentiable.

    Raises:
        ValueError: the model is not patched, or another update family is used.
    """
    adapters = _adalora(model).values()
    factors = [(adapter.get_parameter("P"), adapter.get_parameter("Q")) for adapter in adapters]
    losses = [_from_identity(gram) for P, Q in factors for gram in (P.mT @ P, Q @ Q.mT)]
    return torch.cat([loss.to(losses[0].device) for loss in losses]).mean()


def _from_identity(gram: Tensor) -> Tensor:
    """‖G - I‖_F, (1,), or (E,) of a stack."""
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return torch.linalg.matrix_norm(gram - identity).reshape(-1)


def _adalora(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by path.

    Raises:
        ValueError: one is of another update family.
    """
    root, record = find_patched(model)
    adapters = {site.path: site.adapter for site in intact_sites(root, record)}
    for path, adapter in adapters.items():
        if not isinstance(adapter.update, AdaLora):
            raise ValueError(
                f'{path}: its update is {adapter.update.name!r}, not "adalora": patch with update="adalora"'
            )
        if adapter.pending:
            raise ValueError(f"{path}: its weight is not loaded yet (meta device); load the weights first")
    return adapters
