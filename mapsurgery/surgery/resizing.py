"""transformers' `resize_token_embeddings`, where the embeddings or the head are adapted.

It writes a new matrix into the layers, one after the other. The adapters have the rows of the old one: so it is refused
before it has changed anything.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapted import AdaptedLayer

_METHOD = "resize_token_embeddings"
_GETTERS = ("get_input_embeddings", "get_output_embeddings")


class _Refusal:
    """Stands for the method of one model while an embedding of it is adapted."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        adapted = [name for name, layer in _embeddings(self.model).items() if isinstance(layer, AdaptedLayer)]
        if adapted and (args or kwargs):
            raise ValueError(
                f"{_METHOD}: {' and '.join(adapted)} of {type(self.model).__name__} is adapted, and its adapter has "
                "the rows of the old matrix; resize before patch, or call mapsurgery.merge or mapsurgery.unpatch first"
            )
        return getattr(type(self.model), _METHOD)(self.model, *args, **kwargs)


def install(model: nn.Module) -> None:
    """Refuse it in every part of a model that was just patched of which an embedding is adapted."""
    for module in model.modules():
        if hasattr(type(module), _METHOD) and any(isinstance(e, AdaptedLayer) for e in _embeddings(module).values()):
            module.__dict__[_METHOD] = _Refusal(module)


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_METHOD), _Refusal):
            del module.__dict__[_METHOD]


def _embeddings(model: nn.Module) -> dict[str, Any]:
    """Input and output embeddings of a transformers model, by their names in it."""
    found: dict[str, Any] = {}
    for getter in _GETTERS:
        try:
            found[getter.removeprefix("get_")] = getattr(model, getter)()
        except (AttributeError, NotImplementedError):  # models of images have none
            continue
    return found
