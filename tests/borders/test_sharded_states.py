"""torch's own get_model_state_dict and set_model_state_dict, in one process and under FSDP2 in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sharded_worker
import torch
from homes import ADAPTER_KEY, PLAIN, Case, of_cases, with_adapters_of
from torch import multiprocessing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import mapsurgery

LAYERS = [case for case in PLAIN if case.name in ("linear", "conv2d_own_forward", "attention", "lstm", "tied")]


@of_cases(*LAYERS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
def test_one_process_reads_back_what_it_wrote(case: Case, full: bool) -> None:
    """The keys of the plain model, the adapters' beside them; strictly into another base with other adapters."""
    model, other = case.patch(case.built()), case.patch(case.built(seed=1))
    options = StateDictOptions(full_state_dict=full)
    state = {key: value.clone() for key, value in get_model_state_dict(model, options=options).items()}
    plain = set(get_model_state_dict(case.built(), options=options))
    assert plain <= set(state) and all(ADAPTER_KEY.fullmatch(key) for key in set(state) - plain)
    result = set_model_state_dict(other, state, options=options)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other(case.data()), model(case.data()))


@of_cases(*LAYERS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_one_process_takes_the_original_checkpoint(case: Case, full: bool, strict: bool) -> None:
    """It arrives in adapted layers, with the norm of the new weights, and adapters stay."""
    model, other = case.patch(case.built()), case.built(seed=1)
    state = get_model_state_dict(other, options=StateDictOptions(full_state_dict=full))
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=full, strict=strict))
    with mapsurgery.disabled(model):
        assert torch.equal(model(case.data()), other.requires_grad_(False)(case.data()))
    assert torch.equal(model(case.data()), with_adapters_of(model, case.patch(other))(case.data()))


def test_two_processes_of_fsdp2(tmp_path: Path) -> None:
    """All that `sharded_worker.checks` names, in one start of two processes."""
    multiprocessing.spawn(sharded_worker.work, args=(str(tmp_path),), nprocs=2)
    problems = {}
    for rank in (0, 1):
        found = json.loads((tmp_path / f"problems_{rank}.json").read_text())
        assert set(found) == set(sharded_worker.checks(tmp_path))
        problems |= {f"{name} (rank {rank})": said for name, said in found.items() if said}
    assert not problems, json.dumps(problems, indent=1)
