"""A layer whose class has a `__deepcopy__` of its own: the copy has its adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from homes import Packed, Tied, trained
from torch import Tensor, nn

import mapsurgery


class Built(nn.Linear):
    """Makes its copy as torch_geometric's Linear does: a new one, with copies of the Parameters."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Built:
        copied = type(self)(self.in_features, self.out_features)
        copied.weight, copied.bias = copy.deepcopy(self.weight, memo), copy.deepcopy(self.bias, memo)
        return copied


class Emptied(nn.Linear):
    """Makes its copy of its dictionary."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Emptied:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied


class Fresh(nn.Linear):
    """Its copy is a new layer, whose parameters require a gradient."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fresh:
        copied = Fresh(self.in_features, self.out_features)
        copied.load_state_dict(self.state_dict())
        return copied


class PackedCopy(Packed):
    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCopy:
        copied = PackedCopy()
        copied.load_state_dict(self.state_dict())
        return copied


LAYERS = {
    "built": lambda: Built(64, 32),
    "emptied": lambda: Emptied(64, 32),
    "fresh": lambda: Fresh(64, 32),
    "packed": PackedCopy,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_has_the_adapter(make: Any, whole: bool) -> None:
    """Its own: what changes it leaves the original alone."""
    torch.manual_seed(0)
    model = trained(mapsurgery.patch(make() if whole else nn.Sequential(make(), nn.Linear(32, 4)), "*", rank=2))
    x = torch.randn(3, 64)
    expected, keys = model(x), list(model.state_dict())
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), expected) and torch.equal(model(x), expected)
    assert list(copied.state_dict()) == keys == list(model.state_dict())
    assert {n: p.requires_grad for n, p in copied.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    twice = copy.deepcopy(copy.deepcopy(model))
    mapsurgery.merge(twice, quantised="dequantise")
    torch.testing.assert_close(twice(x), expected, rtol=1e-4, atol=1e-4)


class CopiedEmbedding(nn.Embedding):
    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedEmbedding:
        copied = CopiedEmbedding(self.num_embeddings, self.embedding_dim)
        copied.weight = copy.deepcopy(self.weight, memo)
        return copied


def test_a_tie_is_copied_with_its_one_adapter() -> None:
    torch.manual_seed(0)
    model = Tied()
    model.embed = CopiedEmbedding(9, 6)
    model.out.weight = model.embed.weight
    trained(mapsurgery.patch(model, "*", rank=2))
    ids: Tensor = torch.tensor([[1, 2, 5]])
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids), model(ids))
    assert copied.out.weight is not None and copied.get_parameter("out.weight") is copied.get_parameter("embed.weight")
    assert copied.embed.adapter_of("weight") is copied.out.adapter_of("weight")
    assert copied.embed.adapter_of("weight") is not model.embed.adapter_of("weight")
