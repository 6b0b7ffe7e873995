"""safetensors and accelerate read back what they wrote of a patched model, tied weights included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from homes import adapter_tensors, ids, trained
from modules import Tied
from small_models import gpt2, llama, logits, t5
from torch import Tensor, nn

import mapsurgery

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), lambda m: m(torch.ones(2, 6))),
    "tied": (Tied, lambda m: m(ids())),
    "gpt2_tied": (gpt2, logits),
    "llama": (llama, logits),
    "llama_tied": (lambda: llama(tied=True), logits),
    "t5_tied": (t5, logits),
}
every_model = pytest.mark.parametrize(("make", "run"), MODELS.values(), ids=MODELS)


def patched(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return trained(mapsurgery.patch(make(), "*", rank=2), seed)


@every_model
def test_safetensors_reads_back_what_it_wrote(make, run, tmp_path: Path) -> None:
    """save_model and load_model: strict, and bitwise."""
    from safetensors.torch import load_model, save_model

    model, other = patched(make), patched(make, seed=1)
    save_model(model, str(tmp_path / "m.safetensors"))
    missing, unexpected = load_model(other, str(tmp_path / "m.safetensors"))
    assert not missing and not unexpected
    assert torch.equal(run(other), run(model))


@every_model
def test_safetensors_of_the_base_loads_into_the_patched_model(make, run, tmp_path: Path) -> None:
    """The base's own file arrives in adapted layers, and only the adapters are missing from it."""
    from safetensors.torch import load_model, save_model

    base, model = make(), patched(make)
    save_model(base, str(tmp_path / "m.safetensors"))
    missing, unexpected = load_model(model, str(tmp_path / "m.safetensors"), strict=False)
    assert not unexpected and set(missing) <= set(adapter_tensors(model))
    with mapsurgery.disabled(model):
        assert torch.equal(run(model), run(base))


@every_model
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_accelerate_reads_back_what_it_wrote(make, run, safe: bool, tmp_path: Path) -> None:
    """save_state and load_state of a prepared model with an optimizer: both are as they were."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = patched(make)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, 1e-2))
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        for p in adapter_tensors(model).values():
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    saved = run(model)
    step()
    after = run(model)
    assert not torch.equal(after, saved)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(run(model), saved)
    step()
    assert torch.equal(run(model), after)


def test_accelerate_saves_a_model_that_loads_as_the_base(tmp_path: Path) -> None:
    """accelerator.save_model and load_checkpoint_in_model."""
    from accelerate import Accelerator, load_checkpoint_in_model

    model = patched(llama)
    Accelerator(cpu=True).save_model(model, str(tmp_path))
    base, again = llama(seed=1), patched(lambda: llama(seed=1), seed=1)
    load_checkpoint_in_model(base, str(tmp_path))
    assert torch.equal(logits(base), logits(llama()))
    load_checkpoint_in_model(again, str(tmp_path))
    assert torch.equal(logits(again), logits(model))


def test_torch_save_reads_back_what_it_wrote(tmp_path: Path) -> None:
    """torch.save of the state_dict, read with weights_only: nothing of the library is in it."""
    model, other = patched(gpt2), patched(gpt2, seed=1)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(type(value) is Tensor for value in state.values())
    assert not any(other.load_state_dict(state, strict=True))
    assert torch.equal(logits(other), logits(model))
