"""Models whose gradients are reduced over processes before `patch` or `load`: refused, before anything is changed.

What wraps a model without reducing anything, DataParallel and torch.compile, is no obstacle.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import wrapped_worker
from definition import Snapshot, to_generic_point
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

import mapsurgery
from mapsurgery.integrations.peft import from_peft_state_dict, to_peft_config, to_peft_state_dict
from mapsurgery.surgery.paths import unwrapped


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


alone = pytest.mark.usefixtures("_one_process")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _model() -> Model:
    torch.manual_seed(2)
    return Model()


class DeepSpeedEngine(nn.Module):
    """As deepspeed's holds the model: what counts is the name of the class."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Whole(nn.Module):
    """A trainer's module, of which only a part is wrapped."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def _replicated(model: nn.Module, module: str) -> nn.Module:
    importlib.import_module(module).replicate(model, **_on_cpu(module))
    return model


def _on_cpu(module: str) -> dict[str, Any]:
    return {"mesh": init_device_mesh("cpu", (1,))} if module.endswith("with_fsdp") else {}


def _sharded(model: Model, part: nn.Module | None = None) -> Model:
    fully_shard(part or model, mesh=init_device_mesh("cpu", (1,)))
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "compiled_ddp": lambda model: torch.compile(DistributedDataParallel(model)),
    "ddp_in_a_part": lambda model: Whole(DistributedDataParallel(model)),
    "fsdp1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "fsdp1_original_parameters": lambda model: FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu")
    ),
    "deepspeed": DeepSpeedEngine,
    "fsdp2": _sharded,
    "replicate": lambda model: _replicated(model, "torch.distributed._composable.replicate"),
    "replicate_with_fsdp": lambda model: _replicated(model, "torch.distributed._composable.replicate_with_fsdp"),
}
NAMES = {"deepspeed": "DeepSpeedEngine", "fsdp2": "fully_shard"}


def _said(kind: str) -> str:
    name = next((n for n in ("ddp", "fsdp1", "replicate") if n in kind), kind)
    known = {"ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel", "replicate": "replicate"}
    return f"{(known | NAMES)[name]} reduces the gradients .* Call mapsurgery.patch or load first"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = to_generic_point(mapsurgery.patch(_model(), "*", rank=2))
    mapsurgery.save(model, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@alone
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("how", ["plan", "patch", "load"])
def test_a_wrapper_around_the_model_is_refused_by_name(kind: str, how: str, file: Path) -> None:
    model = WRAPPERS[kind](_model())
    before, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=_said(kind)):
        if how == "load":
            mapsurgery.load(model, file)
        else:
            getattr(mapsurgery, how)(model, "*", rank=2)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is p for name, p in before.items())
    assert [type(m) for m in model.modules()] == classes and all(p.requires_grad for p in after.values())


@alone
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["ddp", "fsdp1", "fsdp2", *(pytest.param(k, marks=pytest.mark.long) for k in ("replicate", "replicate_with_fsdp"))],
)
def test_a_model_that_something_else_wraps_is_refused_too(kind: str, file: Path) -> None:
    """The model is given itself, or a part of it, or what it is a part of; the wrapper is held elsewhere."""
    model = _model()
    wrapped = WRAPPERS[kind](model)
    for given in (model, model.body, Whole(model)):
        with pytest.raises(ValueError, match=_said(kind)):
            mapsurgery.patch(given, "*", rank=2)
    with pytest.raises(ValueError, match=_said(kind)):
        mapsurgery.load(model, file)
    assert wrapped is not None


@alone
def test_a_wrapper_of_a_part_is_refused_for_the_whole_and_not_for_others(file: Path) -> None:
    model = _model()
    wrapped = DistributedDataParallel(model.body)
    before = Snapshot(model)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        mapsurgery.patch(model, "head", rank=2)
    before.assert_holds(model)
    mapsurgery.patch(model.head, "*", rank=2)
    mapsurgery.load(_model(), file)
    assert wrapped.module is model.body


@alone
def test_a_wrapper_that_nobody_holds_is_none(file: Path) -> None:
    model = _model()
    wrapped = DistributedDataParallel(model)
    wrapped(torch.randn(2, 6)).sum().backward()
    wrapped.itself = [wrapped]  # a circle, which only the collector breaks
    del wrapped
    mapsurgery.load(model, file)


@alone
def test_a_wrapper_that_failed_is_none() -> None:
    model = _model().requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires a gradient") as error:
        DistributedDataParallel(model)
    mapsurgery.patch(model, "*", rank=2)
    assert error.traceback  # it holds what was half made


@alone
def test_an_adapter_of_peft_is_refused_too() -> None:
    pytest.importorskip("peft")
    source = to_generic_point(mapsurgery.patch(_model(), "*", rank=2, method="lora"))
    model = _model()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="DistributedDataParallel reduces"):
        from_peft_state_dict(model, to_peft_state_dict(source), to_peft_config(source))
    assert wrapped.module is model


@alone
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ddp", "fsdp1_original_parameters", "fsdp2", "replicate"])
def test_patch_first_and_wrap_then_is_right(kind: str) -> None:
    model, plain = (to_generic_point(mapsurgery.patch(_model(), "*", rank=2)) for _ in range(2))
    x = torch.randn(4, 6)
    plain(x).square().sum().backward()
    wrapped = WRAPPERS[kind](model)
    torch.testing.assert_close(wrapped(x), plain(x))
    wrapped(x).square().sum().backward()
    expected = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None)
    found = sum(p.grad.square().sum() for p in wrapped.parameters() if p.grad is not None)
    torch.testing.assert_close(getattr(found, "full_tensor", lambda: found)(), expected)


@pytest.mark.parametrize("wrap", [DataParallel, torch.compile], ids=["data_parallel", "compiled"])
def test_what_reduces_nothing_is_no_obstacle(wrap: Callable[[nn.Module], nn.Module], file: Path) -> None:
    expected = mapsurgery.load(_model(), file)
    model = wrap(_model())
    assert mapsurgery.load(model, file) is model
    x = torch.randn(2, 6)
    assert torch.equal(unwrapped(model)(x), expected(x))
    other = wrap(_model())
    mapsurgery.patch(other, "*", rank=2)
    mapsurgery.load_adapter_state_dict(other, mapsurgery.adapter_state_dict(model))
    mapsurgery.verify(other, x)


def test_two_processes_stay_together(tmp_path: Path) -> None:
    multiprocessing.spawn(wrapped_worker.work, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first and first.keys() == second.keys()
    for name, tensors in first.items():
        for mine, other in zip(tensors, second[name], strict=True):
            assert torch.equal(mine, other)
