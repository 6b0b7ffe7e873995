"""Layers that are held in several places, tied, used more than once, never, or in training alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..entry import Entry, ids
from .common import Holder, hazard, rows


class PlainContainers(Holder):
    """The forward runs through a Python list, tuple and dict; registration is by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.plain_list = [self.held[0]]
        self.plain_tuple = (self.held[1],)
        self.plain_dict = {"fc": self.held[2]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain_tuple[0](self.plain_list[0](self.before(x)).tanh()).tanh()
        return self.after(self.plain_dict["fc"](x))


class SeveralNames(Holder):
    """One module under three names, one of them in a container of its own (timm's coat)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.same = self.fc
        self.block = nn.Sequential(self.fc, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.same(self.fc(self.before(x)).tanh())))


class Closures(Holder):
    """Functions that captured the layer, its bound forward, or its __call__ when the model was made."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = (nn.Linear(8, 8) for _ in range(3))
        self.layers = nn.ModuleList([a, b, c])
        self.first: Callable[[Tensor], Tensor] = lambda x: F.linear(x, a.weight, a.bias)
        self.second = b.__call__
        self.third: Callable[[Tensor], Tensor] = lambda x: c(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.third(self.second(self.first(self.before(x)).tanh()).tanh()))


class BoundForward(Holder):
    """A bound `forward` kept when the model was made."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.kept = self.fc.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.kept(self.before(x)))


class OwnInstanceForward(Holder):
    """A forward that was put on the object: torch calls it in the class's place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        fc = self.fc
        self.fc.forward = lambda x: F.linear(x, fc.weight * 2, fc.bias)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(self.before(x)))


class TiedHead(nn.Module):
    """The head is the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fc(self.embed(ids)).tanh())


class TiedLayers(Holder):
    """Two layers share a weight but not a bias; a third module reads it transposed (an autoencoder)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.encode(self.before(x)).tanh()).tanh()
        return self.after(F.linear(x, self.encode.weight.t()))


class _Decoder(nn.Module):
    """Holds another layer's weight as a parameter of its own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.matrix = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class TiedToRaw(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(8, 6)
        self.decode = _Decoder(self.encode.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.decode(self.encode(self.before(x)).tanh()))


class TiedThrice(nn.Module):
    """Encoder, decoder and head share one embedding (T5, BART)."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(24, 8)
        self.encoder, self.decoder = nn.Embedding(24, 8), nn.Embedding(24, 8)
        self.head = nn.Linear(8, 24)
        for layer in (self.encoder, self.decoder, self.head):
            layer.weight = self.shared.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(ids).tanh() + self.decoder(ids.flip(1)))


class ManyTimes(Holder):
    """A layer applied in a loop, on its own output (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for _ in range(4):
            x = x + self.block(x).tanh()
        return self.after(x)


class NeverUsed(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x))


class TrainingOnly(Holder):
    """An auxiliary head that runs in training, and a layer that runs in eval alone."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary, self.final = nn.Linear(8, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.before(x)
        return (self.after(x), self.auxiliary(x)) if self.training else (self.final(self.after(x)),)


class OneOfMany(Holder):
    """Experts as modules, of which the input chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        weight, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            row, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, row, weight[row, slot, None] * expert(x[row]))
        return self.after(out)


class ModuleContainers(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a.weight".replace(".", "_"): nn.Linear(8, 8), "adapter": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for part in self.parts.values():
            x = part(x).tanh()
        return self.after(x)


class Lazy(Holder):
    """Lazy layers, after the forward that gave them a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.lazy, self.conv = nn.LazyLinear(8), nn.LazyConv1d(8, 1)
        self.conv(self.lazy(torch.zeros(1, 8))[..., None])

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(self.lazy(self.before(x))[..., None])[..., 0])


def entries() -> list[Entry]:
    def tokens() -> tuple:
        return ((ids(2, 5),), {})

    floating = {
        "held_in_plain_containers": PlainContainers,
        "held_under_several_names": SeveralNames,
        "held_in_closures": Closures,
        "held_bound_forward": BoundForward,
        "held_instance_forward": OwnInstanceForward,
        "tied_layers": TiedLayers,
        "tied_to_raw_parameter": TiedToRaw,
        "used_many_times": ManyTimes,
        "used_never": NeverUsed,
        "used_in_training_only": TrainingOnly,
        "used_by_choice": OneOfMany,
        "held_in_module_dict": ModuleContainers,
        "lazy": Lazy,
    }
    found = [entry for name, make in floating.items() for entry in hazard(name, make, rows(6, 8))]
    for name, make in {"tied_head": TiedHead, "tied_thrice": TiedThrice}.items():
        found += hazard(name, make, tokens)
    return found
