"""accelerate: prepare, states of whole models and of adapters alone, offloading, mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import assert_same_state, gpt2, llama, logits, text_data
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mapsurgery

accelerate = pytest.importorskip("accelerate")
integration = pytest.importorskip("mapsurgery.integrations.accelerate")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """The precision of an Accelerator is that of the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Normed(nn.Module):
    """A model with statistics and a head that is trained in full."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64))
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        out = self.head(self.norm(self.body(input_ids).mean(1)))
        return out if labels is None else nn.functional.cross_entropy(out, labels[:, 0] % 4)


def normed(seed: int = 0, rank: int = 2) -> nn.Module:
    return mapsurgery.patch(Normed(seed), "body*", rank=rank, train=["head*"])


def tied() -> nn.Module:
    return mapsurgery.patch(gpt2(), "*", rank=2)


def language() -> nn.Module:
    return mapsurgery.patch(llama(), "*proj", rank=2)


MODELS: dict[str, Callable[[], nn.Module]] = {"normed": normed, "gpt2_tied": tied, "llama": language}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


class Run:
    """A script: prepared models, optimisers, a schedule, data."""

    def __init__(self, *models: nn.Module, alone: bool, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        patched = [model for model in models if type(model) is not nn.Linear]  # another one is not trained
        optimizers = [torch.optim.AdamW(mapsurgery.param_groups(m, lr=1e-2, weight_decay=0.1)) for m in patched]
        schedule = torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.8)
        batches: Any = DataLoader(text_data(8), batch_size=2)
        found = self.accelerator.prepare(*models, *optimizers, schedule, batches)
        self.models, self.optimizers = found[: len(models)], found[len(models) : -2]
        self.schedule, self.batches = found[-2:]
        if alone:
            integration.adapter_states(self.accelerator)

    def train(self, steps: int = 2, skip: int = 0) -> Run:
        for i, batch in enumerate(self.batches):
            if skip <= i < skip + steps:
                for model, optimizer in zip(self.models, self.optimizers, strict=False):
                    with self.accelerator.accumulate(model):
                        found = model(**batch)
                        self.accelerator.backward(getattr(found, "loss", found))
                        optimizer.step()
                        optimizer.zero_grad()
                self.schedule.step()
        return self


@every_model
@pytest.mark.parametrize("alone", [True, False], ids=["adapters_alone", "whole"])
def test_training_goes_on_bit_for_bit(make: Callable[[], nn.Module], alone: bool, tmp_path: Path) -> None:
    """Models, moments and the schedule, from a state of the middle, in a new process's model."""
    first = Run(make(), alone=alone).train()
    first.accelerator.save_state(str(tmp_path))
    whole = first.train(skip=2).models[0]
    resumed = Run(make(), alone=alone)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(skip=2)
    assert_same_state(whole, resumed.models[0])
    assert resumed.schedule.get_last_lr() == first.schedule.get_last_lr()
    assert (tmp_path / "adapter.safetensors").exists() == alone
    assert (tmp_path / "model.safetensors").exists() != alone


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_several_models_have_a_file_each(precision: str, safe: bool, tmp_path: Path) -> None:
    """One of them is not patched, and is written whole, in its own place."""

    def make() -> Run:
        torch.manual_seed(3)
        return Run(normed(), language(), nn.Linear(3, 3), alone=True, mixed_precision=precision)

    run = make().train()
    run.accelerator.save_state(str(tmp_path), safe_serialization=safe)
    resumed = make()
    with torch.no_grad():
        resumed.models[2].weight.zero_()
    resumed.accelerator.load_state(str(tmp_path))
    for a, b in zip(run.models, resumed.models, strict=True):
        assert_same_state(a, b)
    assert (tmp_path / "adapter_1.safetensors").exists()
    for name, make_base in {"adapter": Normed, "adapter_1": llama}.items():
        mapsurgery.load(make_base(), tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((normed(), normed(seed=5)), "trained on another base|another base: body.0"),
        ((normed(), normed(rank=3)), "shape"),
    ],
    ids=["base", "rank"],
)
def test_a_state_of_another_model_is_refused_before_any_model_changes(others: Any, said: str, tmp_path: Path) -> None:
    Run(normed(), normed(), alone=True).train().accelerator.save_state(str(tmp_path))
    other = Run(*others, alone=True)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in other.models]
    with pytest.raises(ValueError, match=said):
        other.accelerator.load_state(str(tmp_path))
    for model, tensors in zip(other.models, before, strict=True):
        assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())


def test_a_state_of_the_whole_model_is_taken_too(tmp_path: Path) -> None:
    run = Run(language(), alone=False).train()
    run.accelerator.save_state(str(tmp_path))
    model = Run(language(), alone=True)
    model.accelerator.load_state(str(tmp_path))
    assert_same_state(model.models[0], run.models[0])


def test_adapter_states_twice_is_once(tmp_path: Path) -> None:
    """As a notebook's cell that is run again; models that are not patched keep their weights."""
    run = Run(normed(), nn.Linear(3, 3), alone=True)
    integration.adapter_states(run.accelerator)
    run.accelerator.save_state(str(tmp_path))
    resumed = Run(normed(seed=0), nn.Linear(3, 3), alone=True)
    integration.adapter_states(resumed.accelerator, frozen="keep")
    resumed.accelerator.load_state(str(tmp_path))
    for a, b in zip(run.models, resumed.models, strict=True):
        assert_same_state(a, b)
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "model_1.safetensors").exists()


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_a_folder_with_both_kinds_of_state_is_refused(safe: bool, tmp_path: Path) -> None:
    """Whichever was written first, and before anything is written or loaded."""
    alone, whole = Run(language(), alone=True), Run(language(), alone=False)
    whole.accelerator.save_state(str(tmp_path / "a"), safe_serialization=safe)
    with pytest.raises(ValueError, match=r"model\.\w+ of a state .*whole.* adapter\.safetensors .*a folder for each"):
        alone.accelerator.save_state(str(tmp_path / "a"))
    assert not (tmp_path / "a" / "adapter.safetensors").exists()

    alone.accelerator.save_state(str(tmp_path / "b"))
    whole.train().accelerator.save_state(str(tmp_path / "b"), safe_serialization=safe)
    before = {name: tensor.clone() for name, tensor in alone.models[0].state_dict().items()}
    with pytest.raises(ValueError, match="cannot be told"):
        alone.accelerator.load_state(str(tmp_path / "b"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in alone.models[0].state_dict().items())
    whole.accelerator.load_state(str(tmp_path / "b"))  # accelerate alone knows no adapters


def test_models_of_which_none_is_patched_are_refused(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    integration.adapter_states(accelerator)
    accelerator.prepare(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="none of the 1 models"):
        accelerator.save_state(str(tmp_path))


def test_an_unwrapped_model_is_saved_by_accelerate(tmp_path: Path) -> None:
    """save_model writes the plain model's keys and the adapters'; the plain model takes the former."""
    run = Run(tied(), alone=False, mixed_precision="bf16").train()
    model = run.accelerator.unwrap_model(run.models[0], keep_fp32_wrapper=False)
    assert mapsurgery.report(model)
    run.accelerator.save_model(run.models[0], str(tmp_path), max_shard_size="40KB")
    fresh = tied()
    accelerate.load_checkpoint_in_model(fresh, str(tmp_path))
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))
    base = gpt2()
    accelerate.load_checkpoint_in_model(base, str(tmp_path))
    assert torch.equal(logits(base), logits(gpt2()))


def test_bfloat16_computes_as_autocast_does() -> None:
    """The forward of a prepared model runs in bfloat16, the adapters stay float32 and learn."""
    run = Run(language(), alone=False, mixed_precision="bf16")
    model, plain = run.models[0], language()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(plain)
    assert torch.equal(logits(model), expected.float())
    run.train()
    assert all(p.dtype == torch.float32 for p in mapsurgery.adapter_state_dict(model).values())
    assert not torch.equal(logits(model), expected.float())


def test_gradients_are_accumulated() -> None:
    """One step of the optimiser for two batches."""
    run = Run(language(), alone=False, gradient_accumulation_steps=2).train(2)
    plain = language()
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(plain, lr=1e-2, weight_decay=0.1))
    for batch in [*DataLoader(text_data(8), batch_size=2)][:2]:
        (plain(**batch).loss / 2).backward()
    optimizer.step()
    assert_same_state(run.models[0], plain)


ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
ON_DISK |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("places", [{"": "cpu"}, ON_DISK])
def test_a_model_made_empty_and_dispatched_is_patched_and_trains(places: dict[str, str], tmp_path: Path) -> None:
    """init_empty_weights, load_checkpoint_and_dispatch (parts on disk), patch; the adapters learn what they would."""
    llama().save_pretrained(tmp_path / "base")
    with accelerate.init_empty_weights():
        empty = type(llama())(llama().config)
    model = accelerate.load_checkpoint_and_dispatch(
        empty.eval(),
        str(tmp_path / "base"),
        device_map=places,
        offload_folder=str(tmp_path / "disk"),
    )
    torch.manual_seed(1)
    mapsurgery.patch(model, "*proj", rank=2)
    torch.manual_seed(1)
    reference = language()
    mapsurgery.load_adapter_state_dict(model, mapsurgery.adapter_state_dict(reference))
    for each in (model, reference):
        optimizer = torch.optim.AdamW(mapsurgery.param_groups(each, lr=1e-2))
        for batch in DataLoader(text_data(4), batch_size=2):
            each(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = mapsurgery.adapter_state_dict(model)
    for name, tensor in mapsurgery.adapter_state_dict(reference).items():
        assert torch.equal(found[name], tensor), name
    mapsurgery.save(model, tmp_path / "a.safetensors")
    assert torch.equal(logits(mapsurgery.load(llama(), tmp_path / "a.safetensors")), logits(reference))


def test_a_model_offloaded_by_hook_computes_the_same() -> None:
    """cpu_offload_with_hook, as pipelines use it: the whole model comes and goes."""
    model, hook = accelerate.cpu_offload_with_hook(language(), execution_device="cpu")
    reference = language()
    mapsurgery.load_adapter_state_dict(model, mapsurgery.adapter_state_dict(reference))
    assert torch.equal(logits(model), logits(reference))
    hook.offload()
    assert torch.equal(logits(model), logits(reference))


def test_adapters_that_were_offloaded_with_their_layers_are_no_parameters_to_train() -> None:
    """An optimiser would hold tensors on meta, and train nothing."""
    model = accelerate.cpu_offload(language(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"put away by accelerate: offload before patch to train"):
        mapsurgery.param_groups(model, lr=1e-2)
