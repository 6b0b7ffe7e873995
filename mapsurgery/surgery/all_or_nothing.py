"""How a model is changed: as a whole, or not at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..interrupts import uninterrupted


@contextmanager
def all_or_nothing(*models: nn.Module) -> Iterator[Journal]:
    """A block that changes models: no signal cuts it in two, and whatever it raises, they are as they were, to the bit.

    What can be made aside is made before it: the block is to be short.

    Args: models: whose modules may get other classes, attributes, children, parameters, hooks or requires_grad.

    Returns: the journal, through which the block writes into tensors.
    """
    with uninterrupted():
        journal = Journal([_Before.of(module) for model in models for module in model.modules()])
        try:
            yield journal
        except BaseException:
            journal.undo()
            raise


@dataclass(frozen=True)
class Change:
    """A change of a model that is ready to be made, by a function that writes through a journal."""

    model: nn.Module
    make: Callable[[Journal], None]

    def then(self, further: Callable[[Journal], None]) -> Change:
        """This change, and another after it."""

        def both(journal: Journal) -> None:
            self.make(journal)
            further(journal)

        return Change(self.model, both)


def make(*changes: Change) -> None:
    """All of them, or none."""
    with all_or_nothing(*(change.model for change in changes)) as journal:
        for change in changes:
            change.make(journal)


class Journal:
    """What a block has changed, so that it can be undone."""

    def __init__(self, modules: list[_Before]) -> None:
        self._modules = modules
        self._written: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def write(self, place: Tensor, value: Tensor) -> None:
        """Put numbers into a tensor."""
        self._written.append((place, place.clone()))
        place.copy_(value)

    @torch.no_grad()
    def undo(self) -> None:
        """Modules first: that cannot fail."""
        for module in self._modules:
            module.put_back()
        for place, value in reversed(self._written):
            place.copy_(value)


_CONTAINERS = (*(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)), "_flat_weights")
"""Attributes of a module that a change fills and empties: parameters, children, hooks; of an LSTM, its weights."""

_KINDS = (OrderedDict, dict, set, list)


@dataclass
class _Before:
    """A module as it was. A class may have its own ways of setting attributes and items: they are passed by."""

    module: nn.Module
    layer_class: type[nn.Module]
    attributes: dict[str, Any]
    contents: list[tuple[Any, list[Any]]]
    requires_grad: list[tuple[nn.Parameter, bool]]

    @classmethod
    def of(cls, module: nn.Module) -> _Before:
        attributes = dict(module.__dict__)
        own = (attributes.get(name) for name in _CONTAINERS)
        containers = [value for value in own if isinstance(value, _KINDS)]
        parameters = [p for p in module._parameters.values() if p is not None]
        contents = [(container, _content(container)) for container in containers]
        return cls(module, type(module), attributes, contents, [(p, p.requires_grad) for p in parameters])

    def put_back(self) -> None:
        object.__setattr__(self.module, "__class__", self.layer_class)
        now = self.module.__dict__
        now.clear()
        now.update(self.attributes)
        for container, content in self.contents:
            _fill(container, content)
        for parameter, requires_grad in self.requires_grad:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad


def _content(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _fill(container: Any, content: list[Any]) -> None:
    kind: Any = next(kind for kind in _KINDS if isinstance(container, kind))
    kind.clear(container)
    if kind in (dict, OrderedDict):
        for key, value in content:
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, content)
