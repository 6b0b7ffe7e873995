"""The column for peft: plain LoRA on every Linear, Conv2d and transformers Conv1D, judged by the same clauses."""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .call import clear_gradients, difference
from .check import ClauseError, Report, _Check, _learn, plain_model
from .entry import Entry
from .sites import Site, overwrite
from .verdict import Verdict


def check(entry: Entry, report: Report = lambda clause: None) -> Verdict:
    """Judge peft on one entry; all clauses but "gradient", which is about MAP's magnitudes."""
    started = time.process_time()
    verdict = Verdict(entry.name, entry.family, column="peft")
    report("plain")
    plain = plain_model(entry, verdict)
    if plain is not None:
        taken = {key: site for key, site in plain.sites.items() if _asked_of_peft(plain.model, site)}
        plain.sites = taken
        verdict.sites = len(taken)
        if taken:
            _PeftCheck(plain, verdict, report).all()
        else:
            verdict.kind, verdict.notes = "refused", ["none of its layers is a Linear, Conv2d or Conv1D"]
    verdict.seconds = round(time.process_time() - started, 2)
    return verdict


def _asked_of_peft(model: nn.Module, site: Site) -> bool:
    module = model.get_submodule(site.path)
    return site.name == "weight" and isinstance(module, nn.Linear | nn.Conv2d | Conv1D)


class _PeftCheck(_Check):
    """The clauses with peft in mapsurgery's place."""

    def all(self) -> None:
        try:
            self.report("patch")
            self.tuner = self._inject(self.model)
        except ValueError as error:
            self.verdict.kind, self.verdict.notes = "refused", [*self.verdict.notes, str(error)[:400]]
            return
        except Exception as error:
            self._fail("patch", error)
            return
        self.layers = self._layers(self.model)
        self._clause("adapted", self.adapted)
        self._clause("start", self.start)
        self._clause("learns", self.learns)
        _to_generic_point(self.layers)
        self._clause("inference", self.inference)
        self._clause("output", self.output)
        self._clause("unpatch", self.unpatch)
        self._clause("merge", self.merge)

    def _inject(self, model: nn.Module) -> LoraModel:
        names = [site.path for site in self.sites.values()]
        config = LoraConfig(r=self.entry.options.rank, lora_alpha=4, target_modules=names)
        torch.manual_seed(4)
        tuner = LoraModel(model, config, "default")
        _in_dtype(model, self.dtype)
        return tuner

    def _layers(self, model: nn.Module) -> dict[str, LoraLayer]:
        found = {key: model.get_submodule(site.path) for key, site in self.sites.items()}
        return {key: layer for key, layer in found.items() if isinstance(layer, LoraLayer)}

    def adapted(self) -> None:
        missing = [key for key in self.sites if key not in self.layers]
        if missing:
            raise ClauseError(f"{len(missing)} of {len(self.sites)} not adapted: {', '.join(missing[:4])}")

    def learns(self) -> None:
        _learn(self.entry, self.model, self.plain.inputs, self.training)
        dead = [key for key in self.live if key in self.layers and not _has_gradient(self.layers[key])]
        clear_gradients(self.model)
        if dead:
            raise ClauseError(f"{len(dead)} of {len(self.live)} live layers get no gradient: {', '.join(dead[:4])}")

    def output(self) -> None:
        for key, layer in self.layers.items():
            _untie(self.plain.model, self.sites[key])
            overwrite(self.plain.model, self.sites[key], _defined(self.sites[key], self.weights[key], layer))
        self._close(self._evaluated(self.model), self.plain.evaluated(), "output with W + scaling BA")

    def unpatch(self) -> None:
        self.tuner.unload()
        self._clean(self.model)
        state = self.model.state_dict()
        if list(state) != list(self.snapshot.state):
            raise ClauseError("state_dict has other names after unload")
        for name, before in self.snapshot.state.items():
            if isinstance(before, Tensor) and not torch.equal(state[name].nan_to_num(77), before.nan_to_num(77)):
                raise ClauseError(f"{name} has other bits after unload")
        if difference(self._evaluated(self.model), self.plain.start) > self.tolerance:
            raise ClauseError("other output after unload")

    def merge(self) -> None:
        self._clean(self.model)
        tuner = self._inject(self.model)
        _to_generic_point(self._layers(self.model))
        wanted = self._evaluated(self.model)
        tuner.merge_and_unload()
        self._clean(self.model)
        self._close(self._evaluated(self.model), wanted, "merged output")

    def _clean(self, model: nn.Module) -> None:
        left = [path for path, module in model.named_modules() if isinstance(module, LoraLayer)]
        if left:
            raise ClauseError(f"adapters are left after unload: {', '.join(left[:4])}")


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """peft makes its matrices in float32, whatever the model computes in."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.adapter_layer_names:
                getattr(module, name).to(dtype)


def _has_gradient(layer: LoraLayer) -> bool:
    grad = layer.lora_B["default"].weight.grad
    return grad is not None and bool(grad.isfinite().all() and grad.any())


@torch.no_grad()
def _to_generic_point(layers: dict[str, LoraLayer]) -> None:
    generator = torch.Generator().manual_seed(5)
    for layer in dict.fromkeys(layers.values()):
        for part in (layer.lora_A, layer.lora_B):
            weight = part["default"].weight
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(0.3 * noise / weight[0].numel() ** 0.5)


def _untie(model: nn.Module, site: Site) -> None:
    """A tied layer has an adapter of its own in peft: the plain copy gets a weight of its own, too."""
    parameters = model.get_submodule(site.path)._parameters
    parameter = parameters.get(site.name)
    if parameter is not None:
        parameters[site.name] = nn.Parameter(parameter.detach().clone())


def _defined(site: Site, weight: Tensor, layer: Any) -> Tensor:
    """W + scaling B A in float64, in the layer's layout; group by group where both convolutions have groups."""
    A = layer.lora_A["default"].weight.detach().double().flatten(1)
    B = layer.lora_B["default"].weight.detach().double().flatten(1)
    groups = A.shape[0] // B.shape[1]
    product = torch.cat([b @ a for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)])
    return weight.double() + site.like(layer.scaling["default"] * product, weight.shape)
