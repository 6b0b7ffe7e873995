"""What two processes check of a patched model under FSDP2; problems go to a file for the test that started them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from homes import ADAPTER_KEY, OwnForward, registered, trained, with_adapters_of
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import mapsurgery


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), OwnForward(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mix = nn.Conv1d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.mix(x.mT).mT)


def base(seed: int = 0, scale: float = 1.0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def patched(seed: int = 0, scale: float = 1.0, adapters: int = 300) -> nn.Module:
    model = base(seed, scale)
    torch.manual_seed(1)
    return trained(mapsurgery.patch(model, "*", rank=2, exclude="head"), adapters)


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def data(rows: int = 8) -> Tensor:
    return torch.randint(0, 11, (rows, 4), generator=torch.Generator().manual_seed(9))


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Keys that only one has, and keys whose numbers differ in a bit. Every process has to call this."""
    wholes = {key: whole(value) for key, value in found.items()}
    odd = set(wholes) ^ set(expected)
    odd |= {key for key in set(wholes) & set(expected) if not torch.equal(wholes[key], expected[key])}
    return sorted(odd)


def state_of(model: nn.Module, **options: bool) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(**options))


def near(found: Tensor, expected: Tensor, name: str) -> list[str]:
    error = (found - expected).abs().max().item()
    return [] if error < 2e-6 else [f"{name}: outputs differ by {error}"]


def training_is_that_of_one_process() -> list[str]:
    rank, one, many = dist.get_rank(), patched(), sharded(patched())
    optimizers = [torch.optim.SGD(mapsurgery.param_groups(m, 0.1)) for m in (one, many)]
    x, part = data(), data()[rank * 4 : rank * 4 + 4]
    for _ in range(3):
        for model, rows, optimizer in ((one, x, optimizers[0]), (many, part, optimizers[1])):
            model(rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    odd = near(many(x), one(x), "three steps")
    expected = dict(one.named_parameters())
    for name, parameter in many.named_parameters():
        odd += near(whole(parameter), expected[name].detach(), name)
    moved = [n for n, p in patched().named_parameters() if n in expected and not torch.equal(p, expected[n])]
    return odd + ([] if all(map(ADAPTER_KEY.fullmatch, moved)) and len(moved) > 8 else [f"moved: {moved}"])


def a_shard_reads_as_itself() -> list[str]:
    model = sharded(patched())
    layers = (model.embed, model.blocks[0].up, model.blocks[1].down, model.mix)
    odd = ["a layer's weight is not its shard" for layer in layers if layer.weight is not registered(layer)]
    model(data()).sum().backward()  # the root keeps its weights gathered until then
    return odd + ["after a step it is not" for layer in layers if layer.weight is not registered(layer)]


def the_full_state_is_that_of_one_process() -> list[str]:
    one, many = patched(), sharded(patched())
    expected = one.state_dict()
    odd = different(state_of(many, full_state_dict=True), expected)
    odd += sorted(set(base().state_dict()) - set(expected))
    on_rank_0 = state_of(many, full_state_dict=True, cpu_offload=True)
    return odd + (different(on_rank_0, expected) if dist.get_rank() == 0 else [str(k) for k in on_rank_0])


def the_sharded_state_is_that_of_one_process() -> list[str]:
    found = state_of(sharded(patched()))
    odd = [key for key, value in found.items() if not isinstance(value, DTensor)]
    return odd + different(found, patched().state_dict())


OTHER = {"seed": 5, "scale": 1.7}


def original_checkpoint(strict: bool, broadcast: bool) -> list[str]:
    """Another base arrives in the shards, the adapters stay, and outputs are those of one process."""
    many = sharded(patched())
    many(data()).sum().backward()
    checkpoint_of_base = base(**OTHER).state_dict()
    given = checkpoint_of_base if dist.get_rank() == 0 or not broadcast else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast, strict=strict)
    result = set_model_state_dict(many, dict(given), options=options)
    odd = [] if dist.get_rank() and broadcast else [f"unexpected: {key}" for key in result.unexpected_keys]
    expected = with_adapters_of(patched(), patched(**OTHER))
    odd += different(dict(many.named_parameters()), dict(expected.named_parameters()))
    return odd + near(many(data()), expected(data()), "original checkpoint")


def own_checkpoint(full: bool, broadcast: bool) -> list[str]:
    """What get_model_state_dict gave goes into a model with another base and other adapters."""
    source, target = sharded(patched()), sharded(patched(**OTHER, adapters=301))
    target(data()).sum().backward()
    state = state_of(source, full_state_dict=full)
    options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=broadcast, strict=True)
    set_model_state_dict(target, state if dist.get_rank() == 0 or not broadcast else {}, options=options)
    odd = different(dict(target.named_parameters()), dict(patched().named_parameters()))
    return odd + near(target(data()), patched()(data()), "own checkpoint")


def a_distributed_checkpoint(folder: Path) -> list[str]:
    """torch.distributed.checkpoint writes shards, and reads them into another model."""
    source, target = sharded(patched()), sharded(patched(**OTHER, adapters=301))
    checkpoint.save({"model": state_of(source)}, checkpoint_id=str(folder / "dcp"))
    state = {"model": state_of(target)}
    checkpoint.load(state, checkpoint_id=str(folder / "dcp"))
    set_model_state_dict(target, state["model"])
    odd = different(dict(target.named_parameters()), dict(patched().named_parameters()))
    return odd + near(target(data()), patched()(data()), "distributed checkpoint")


def from_meta(whole_checkpoint: bool) -> list[str]:
    """Patched and sharded without memory; base (and adapters) broadcast from rank 0."""
    with torch.device("meta"):
        model = mapsurgery.patch(Net().eval(), "*", rank=2, exclude="head")
    sharded(model)
    model.to_empty(device="cpu")
    source = patched() if whole_checkpoint else base()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=whole_checkpoint)
    set_model_state_dict(model, source.state_dict() if dist.get_rank() == 0 else {}, options=options)
    error = (model(data()) - source(data())).abs().max().item()
    odd = [] if error < 1e-5 else [f"outputs differ by {error}"]
    return odd + [f"no memory: {name}" for name, p in model.named_parameters() if p.is_meta]


def flat_pieces(folder: Path) -> list[str]:
    """FSDP1 by block: of a piece of a parameter nothing is written; gathered, names are plain."""
    model, path = patched(), folder / f"flat_{dist.get_rank()}.safetensors"
    policy = ModuleWrapPolicy({Block})
    model = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    odd = near(model(data()), patched()(data()), "FSDP1")
    for call in (lambda: mapsurgery.save(model, path), lambda: mapsurgery.adapter_state_dict(model)):
        try:
            call()
            odd.append("a piece was taken for the whole")
        except ValueError as error:
            odd += [] if "a piece of" in str(error) else [str(error)]
    odd += [f"{path} was written"] if path.exists() else []
    with FullyShardedDataParallel.summon_full_params(model):
        mapsurgery.save(model, path)
    loaded = mapsurgery.load(base(), path)
    return odd + near(loaded(data()), patched()(data()), "file of FSDP1")


def checks(folder: Path) -> dict[str, Callable[[], list[str]]]:
    return {
        "training": training_is_that_of_one_process,
        "shard_reads_as_itself": a_shard_reads_as_itself,
        "full_state": the_full_state_is_that_of_one_process,
        "sharded_state": the_sharded_state_is_that_of_one_process,
        "original_broadcast": lambda: original_checkpoint(False, True),
        "original_broadcast_strict": lambda: original_checkpoint(True, True),
        "original_on_each_rank": lambda: original_checkpoint(False, False),
        "own_full": lambda: own_checkpoint(True, False),
        "own_full_broadcast": lambda: own_checkpoint(True, True),
        "own_sharded": lambda: own_checkpoint(False, False),
        "distributed_checkpoint": lambda: a_distributed_checkpoint(folder),
        "flat_pieces": lambda: flat_pieces(folder),
        "whole_checkpoint_from_meta": lambda: from_meta(True),
    }


def work(rank: int, folder: str) -> None:
    """One process of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, list[str]] = {}
    for name, check in checks(Path(folder)).items():
        try:
            found[name] = check()
        except Exception as error:
            found[name] = [f"{type(error).__name__}: {error}"]
        dist.barrier()
    Path(folder, f"problems_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
