"""torch.distributed.pipelining: stages that it traces, and stages that are cut by hand out of a copy."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from definition import to_generic_point
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, SplitPoint, pipeline

import mapsurgery

IDS = torch.tensor([[1, 0, 3, 4, 9], [7, 5, 0, 8, 2]]).repeat(2, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).tanh()


class Model(nn.Module):
    """Parts that are None are in other stages."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if self.embed is not None else x
        for block in self.blocks:
            x = block(x)
        return self.head(x) if self.head is not None else x


def _plain() -> Model:
    torch.manual_seed(3)
    return Model()


def _patched(**options: object) -> Model:
    return to_generic_point(mapsurgery.patch(_plain(), "*", rank=2, train="blocks.*.fc.bias", **options))


def _first(model: Model) -> Model:
    model = copy.deepcopy(model)
    del model.blocks[2:]
    model.head = None
    return model


def _second(model: Model) -> Model:
    """Its blocks 2 and 3 are now blocks 0 and 1 to the ModuleList."""
    model = copy.deepcopy(model)
    del model.blocks[:2]
    model.embed = None
    return model


STAGES = (_first, _second)


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "dora", "update": "dense"}, pytest.param({"update": "vera"}, marks=pytest.mark.long)],
    ids=["map", "dora-dense", "vera"],
)
def test_stages_that_torch_traces_compute_and_train_the_models_own_adapters(options: dict) -> None:
    model = _patched(**options)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = model(IDS)
    gradients = torch.autograd.grad(expected.square().sum(), [*own.values()])
    pipe = pipeline(model, mb_args=(IDS,), split_spec={"blocks.2": SplitPoint.BEGINNING})
    torch.testing.assert_close(pipe(IDS)[0], expected)
    stages = [pipe.get_stage_module(i) for i in range(2)]
    output = stages[1](stages[0](IDS))
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for (name, parameter), gradient in zip(own.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)
    names = [set(dict(stage.named_parameters())) for stage in stages]
    assert {"embed.weight", "embed.adapter.B" if "update" not in options else "embed.weight"} <= names[0]
    assert names[0] | names[1] >= set(dict(model.named_parameters()))  # what families share has each layer's name


@pytest.mark.usefixtures("_one_process")
def test_a_schedule_trains_stages_that_were_cut_by_hand() -> None:
    model = _patched()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = (model(IDS) ** 2).mean()
    gradients = dict(zip(own, torch.autograd.grad(loss, [*own.values()]), strict=True))
    parts = [cut(model) for cut in STAGES]
    stages = [PipelineStage(part, i, 2, torch.device("cpu")) for i, part in enumerate(parts)]
    schedule = ScheduleInterleaved1F1B(stages, n_microbatches=2, loss_fn=lambda output, _: (output**2).mean())
    losses: list[Tensor] = []
    schedule.step(IDS, target=torch.zeros(4), losses=losses)
    torch.testing.assert_close(sum(losses) / 2, loss)
    for part, prefix in zip(parts, ("", "second"), strict=True):
        assert prefix == "" or part.embed is None
        names = {id(p): name for name, p in mapsurgery.adapter_state_dict(part).items()}
        assert names
    found: dict[str, Tensor] = {}
    for part, shift in zip(parts, (0, 2), strict=True):
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                head, _, rest = name.partition("blocks.")
                place = f"blocks.{int(rest[0]) + shift}{rest[1:]}" if rest else head
                found[place] = parameter.grad
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("cut", STAGES)
def test_every_call_works_on_a_stage_under_the_names_of_the_model(cut, tmp_path: Path) -> None:
    model = _patched()
    stage = cut(model)
    x = IDS if stage.embed is not None else torch.randn(4, 5, 8)
    whole, own = mapsurgery.adapter_state_dict(model), mapsurgery.adapter_state_dict(stage)
    assert set(own) < set(whole) and all(torch.equal(own[name], whole[name]) for name in own)
    trained = [p for group in mapsurgery.param_groups(stage, 1e-3) for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in stage.parameters() if p.requires_grad}
    assert all(path in mapsurgery.report(model).layers for path in mapsurgery.report(stage).layers)
    mapsurgery.verify(stage, x)
    mapsurgery.save(stage, tmp_path / "stage.safetensors")
    with pytest.raises(ValueError, match="none of the file's, which a stage of a pipeline wrote"):
        mapsurgery.load(_plain(), tmp_path / "stage.safetensors")
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert set(mapsurgery.adapter_state_dict(other)) == set(own)
    expected = stage(x)
    mapsurgery.unmerge(mapsurgery.merge(stage))
    torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-5)
    assert set(mapsurgery.adapter_state_dict(stage)) == set(own)
    mapsurgery.unpatch(stage)
    torch.testing.assert_close(stage(x), cut(_plain())(x), rtol=1e-4, atol=1e-5)


def test_a_file_of_a_first_stage_loads_into_such_a_stage(tmp_path: Path) -> None:
    stage = _first(_patched())
    mapsurgery.save(stage, tmp_path / "stage.safetensors")
    assert torch.equal(mapsurgery.load(_first(_plain()), tmp_path / "stage.safetensors")(IDS), stage(IDS))


def test_the_states_of_all_stages_are_that_of_the_model(tmp_path: Path) -> None:
    trained = _patched()
    states = [mapsurgery.adapter_state_dict(cut(trained)) for cut in STAGES]
    whole = mapsurgery.patch(_plain(), "*", rank=2, train="blocks.*.fc.bias")
    mapsurgery.load_adapter_state_dict(whole, {**states[0], **states[1]})
    assert torch.equal(whole(IDS), trained(IDS))
    mapsurgery.save(whole, tmp_path / "whole.safetensors")
    assert torch.equal(mapsurgery.load(_plain(), tmp_path / "whole.safetensors")(IDS), trained(IDS))


def test_the_layers_of_other_stages_are_not_kept_in_memory() -> None:
    model = _patched()
    block, weight = weakref.ref(model.blocks[3]), weakref.ref(model.head.get_parameter("weight"))
    del model.blocks[2:]
    model.head = None
    gc.collect()
    assert block() is None and weight() is None


def test_layers_that_were_replaced_are_still_an_error() -> None:
    model = _patched()
    model.head = nn.Linear(8, 11)
    with pytest.raises(ValueError, match="replaced after patch, their adapters are gone: head"):
        mapsurgery.adapter_state_dict(model)
    model = _patched()
    model.blocks[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"replaced after patch, their adapters are gone: blocks\.1\.fc"):
        mapsurgery.merge(model)
