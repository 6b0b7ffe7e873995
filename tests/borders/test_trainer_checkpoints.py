"""transformers' Trainer saves a patched model, tied or not, and goes on from its checkpoint exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from homes import adapter_tensors
from small_models import gpt2, llama, logits, t5, text_data
from torch import nn
from transformers import Trainer, TrainingArguments

import mapsurgery

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "gpt2_tied": gpt2,
    "t5_tied": t5,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def patched(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    model = make()
    torch.manual_seed(seed)
    return mapsurgery.patch(model, "*", rank=2)


def trainer(model: nn.Module, folder: Path, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=text_data(), eval_dataset=text_data(4))


@every_model
def test_training_goes_on_from_a_checkpoint_exactly(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Four steps at once, and two of them after a restart, give the same bits."""
    whole = patched(make)
    trainer(whole, tmp_path, 4).train()
    resumed = patched(make, seed=2)  # other adapters: those of the checkpoint must replace them
    trainer(resumed, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = dict(resumed.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in whole.named_parameters())
    assert torch.equal(logits(resumed.eval()), logits(whole.eval()))
    fresh = patched(make).eval()
    assert not torch.equal(logits(whole), logits(fresh))
    with mapsurgery.disabled(whole):
        assert torch.equal(logits(whole), logits(make()))


@every_model
def test_a_trainers_checkpoint_holds_the_base(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """from_pretrained of a checkpoint's folder is the base, and the adapters are there beside it."""
    model = patched(make)
    trainer(model, tmp_path, 2).train()
    loaded, info = type(model).from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert torch.equal(logits(loaded.eval()), logits(make()))
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == set(adapter_tensors(model))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """load_best_model_at_end puts the adapters of the best checkpoint back."""
    model = patched(gpt2)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, 4, metric_for_best_model="eval_loss", **options)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    again = patched(gpt2, seed=2)
    trainer(again, tmp_path / "again", 4)._load_from_checkpoint(str(best))
    assert torch.equal(logits(model.eval()), logits(again.eval()))


def test_training_with_gradient_checkpointing_saves_and_resumes(tmp_path: Path) -> None:
    """The Trainer's own switch for activation checkpointing."""
    whole, resumed = patched(llama), patched(llama, seed=2)
    trainer(whole, tmp_path, 4, gradient_checkpointing=True).train()
    trainer(resumed, tmp_path, 4, gradient_checkpointing=True).train(str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.eval()), logits(whole.eval()))
