"""What each of two processes runs for `test_wrapped_first`; it imports little, as every process does so anew."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mapsurgery


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(8, 8))
    wrapped = DistributedDataParallel(model)
    for given in (wrapped, model):
        try:
            mapsurgery.patch(given, "*", rank=2)
        except ValueError as error:
            assert "Call mapsurgery.patch or load first" in str(error)
        else:
            raise AssertionError(f"rank {rank} patched what DDP holds")
    del wrapped
    mapsurgery.patch(model, "*", rank=2)
    wrapped = DistributedDataParallel(model)
    wrapped(torch.randn(4, 8)).square().sum().backward()
    torch.save({n: (p, p.grad) for n, p in model.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
