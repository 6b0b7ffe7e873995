"""Models whose own code cuts the graph of a frozen base: reentrant checkpointing, reversible blocks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from definition import Snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import mapsurgery

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Checkpointed(nn.Module):
    """A frozen stem, blocks that are recomputed by reentrant checkpointing, a head."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.stem = nn.Embedding(9, 6) if tokens else nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.training else block(x)
        return self.head(x)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block, ctx.x = block, x.detach()
        with torch.no_grad():
            return x + block(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            (x + ctx.block(x)).backward(grad)
        return x.grad, None


class Reversible(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.stem(x)
        for block in self.blocks:
            x = _Reversible.apply(x, block)
        return self.head(x)


def _input(tokens: bool) -> Tensor:
    return torch.tensor([[1, 2, 3]]) if tokens else torch.randn(2, 6)


def _grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters() if ".adapter." in n and p.requires_grad}


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "floats"])
@pytest.mark.parametrize("cls", [Checkpointed, Reversible])
def test_adapters_inside_a_cut_learn_from_the_first_step(cls: type[Checkpointed], tokens: bool) -> None:
    torch.manual_seed(0)
    model = mapsurgery.patch(cls(tokens), "blocks", rank=2, train="head").train()
    x = _input(tokens)
    expected = copy.deepcopy(model)
    hidden = expected.stem(x)
    for block in expected.blocks:  # the same without a cut
        hidden = block(hidden) if cls is Checkpointed else hidden + block(hidden)
    expected.head(hidden).square().sum().backward()
    model(x).square().sum().backward()
    want, got = _grads(expected), _grads(model)
    assert all(got[name] is not None for name in want)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    assert not x.requires_grad and all(p.grad is None for p in model.stem.parameters())
    model.zero_grad()
    forwards = model.forwards
    model(x).square().sum().backward()
    assert model.forwards == forwards + 1  # found once, known from then on
    assert all(grad is not None for grad in _grads(model).values())
    mapsurgery.verify(model, x)


def test_where_nothing_cuts_inputs_get_no_gradient_and_the_forward_runs_once() -> None:
    model = mapsurgery.patch(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), "1", rank=2)
    seen = []
    model[0].register_forward_hook(
        lambda module, args, output: seen.append((args[0].requires_grad, output.requires_grad))
    )
    model(torch.randn(2, 6)).sum().backward()
    with torch.no_grad():
        model(torch.randn(2, 6))
    model.eval()(torch.randn(2, 6))
    assert seen == [(False, False)] * 3


@pytest.mark.parametrize("undo", [mapsurgery.unpatch, mapsurgery.merge], ids=["unpatch", "merge"])
def test_no_hook_is_left_behind(undo) -> None:
    model = Checkpointed(True)
    snapshot = Snapshot(model)
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    undo(mapsurgery.patch(model, "blocks", rank=2))
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == before
    assert not any(m._forward_hooks_with_kwargs or m._forward_pre_hooks_with_kwargs for m in model.modules())
    if undo is mapsurgery.unpatch:
        snapshot.assert_holds(model)


def test_copies_watch_for_themselves() -> None:
    model = mapsurgery.patch(Checkpointed(True), "blocks", rank=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()(_input(True)).sum().backward()
        assert all(grad is not None for grad in _grads(other).values())
        assert other.blocks[0][0].adapter.watch is not model.blocks[0][0].adapter.watch
    assert not model.blocks[0][0].adapter.watch.needed


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_of_transformers_needs_no_trick(reentrant: bool) -> None:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    model = mapsurgery.patch(LlamaForCausalLM(config), "*_proj", rank=2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(grad is not None for grad in _grads(model).values())


class Teacher(nn.Module):
    """A branch without autograd beside one with it: nothing is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.forwards = nn.BatchNorm1d(6), nn.Linear(6, 6), 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        with torch.no_grad():
            target = self.layer(x).to(self.layer.weight.dtype)
        return self.layer(self.norm(x)) - target


def test_a_branch_without_autograd_is_no_cut() -> None:
    model = mapsurgery.patch(Teacher(), "layer", rank=2).train()
    model(torch.randn(4, 6)).sum().backward()
    assert model.forwards == 1 and model.norm.num_batches_tracked == 1
    assert not model.layer.adapter.watch.needed


def test_hooks_of_the_user_run_once_although_the_forward_runs_twice() -> None:
    model = mapsurgery.patch(Checkpointed(False), "blocks", rank=2)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.register_forward_hook(lambda module, args, output: output + 1)
    x = _input(False)
    first, second = model(x), model(x)
    assert model.forwards == 3
    torch.testing.assert_close(first, second)


def test_a_model_that_calls_itself_is_watched_in_each_call() -> None:
    class Twice(Checkpointed):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            if again:
                with torch.no_grad():
                    self(x, again=False)
            return super().forward(x)

    model = mapsurgery.patch(Twice(True), "blocks", rank=2).train()
    model(_input(True)).sum().backward()
    assert all(grad is not None for grad in _grads(model).values())
    assert not model.blocks[0][0].adapter.watch.calls


def test_a_forward_that_fails_leaves_no_state() -> None:
    model = mapsurgery.patch(Checkpointed(True), "blocks", rank=2)
    with pytest.raises(IndexError):
        model(torch.tensor([[99]]))
    watch = model.blocks[0][0].adapter.watch
    assert not watch.calls


def test_a_cut_that_cannot_be_mended_is_said() -> None:
    class Entered(Checkpointed):
        def features(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Table(Checkpointed):
        def __init__(self) -> None:
            super().__init__(True)
            self.table = nn.Parameter(torch.randn(9, 6))
            self.stem = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.table[x])

    with pytest.warns(UserWarning, match="will not learn.*own forward"):
        mapsurgery.patch(Entered(True), "blocks", rank=2).features(_input(True))
    model = mapsurgery.patch(Table(), "blocks", rank=2)
    with pytest.warns(UserWarning, match="will not learn"):
        model(_input(True))
    with pytest.raises(mapsurgery.VerificationError, match="train mode"):
        mapsurgery.verify(model, _input(True))


def test_a_copied_layer_does_not_drag_the_model_along() -> None:
    model = nn.ModuleDict({"small": nn.Linear(6, 6), "large": nn.Linear(300, 300)})
    model.gradient_checkpointing = False
    mapsurgery.patch(model, "small", rank=2)
    assert len(pickle.dumps(model["small"])) < 20_000
