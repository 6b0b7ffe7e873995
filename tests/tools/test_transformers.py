"""`AdapterTrainer` under the arguments of transformers' Trainer, and whole models beside the adapters.

`tests/borders/test_trainer_quantised.py` and `test_trainer_checkpoints.py` hold the rest of docs/tools.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import gpt2, llama, logits, t5, text_data
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import mapsurgery
from mapsurgery.integrations.transformers import ADAPTER_NAME, AdapterTrainer


def patched(make: Callable[[], nn.Module] = llama, seed: int = 1, **options: Any) -> nn.Module:
    model = make()
    torch.manual_seed(seed)
    return mapsurgery.patch(model, **{"targets": "*", "rank": 2, **options})


def trainer(model: nn.Module | None, folder: Path, **options: Any) -> AdapterTrainer:
    names = ("save_merged", "model_init", "callbacks", "compute_metrics")
    own = {name: options.pop(name) for name in names if name in options}
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return AdapterTrainer(model, arguments, train_dataset=text_data(), eval_dataset=text_data(4), **own)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mapsurgery.adapter_state_dict(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


TIED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "llama": (llama, AutoModelForCausalLM),
    "llama_tied": (lambda: llama(tied=True), AutoModelForCausalLM),
    "gpt2_tied": (gpt2, AutoModelForCausalLM),
    "t5_tied": (t5, AutoModelForSeq2SeqLM),
}


@pytest.mark.parametrize(
    ("make", "auto"),
    [
        pytest.param(*TIED[name], marks=pytest.mark.long if name in ("llama", "gpt2_tied") else (), id=name)
        for name in TIED
    ],
)
def test_a_whole_model_is_read_as_the_adapted_one(make: Callable[[], nn.Module], auto: Any, tmp_path: Path) -> None:
    """By from_pretrained, from each checkpoint and from save_model. Training notices nothing, and resumes exactly."""
    model, alone, resumed = patched(make), patched(make), patched(make, seed=2)
    parameters = dict(model.named_parameters())
    run = trainer(model, tmp_path / "whole", save_merged=True)
    run.train()
    trainer(alone, tmp_path / "alone").train()
    assert same(trained(model), trained(alone))
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    with mapsurgery.disabled(model):
        assert torch.equal(logits(model.eval()), logits(make()))

    run.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "whole" / "checkpoint-4", tmp_path / "saved"):
        whole, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        torch.testing.assert_close(logits(whole.eval()), logits(model))
        assert not torch.allclose(logits(whole), logits(make()), atol=1e-3)
        assert whole.config.to_diff_dict() == model.config.to_diff_dict() and (folder / ADAPTER_NAME).is_file()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(model), trained(resumed))


class Own(nn.Module):
    """No PreTrainedModel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.head(self.embed(input_ids))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten())}
        return {**loss, "logits": out}


def test_a_whole_model_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = patched(Own)
    trainer(model, tmp_path, save_merged=True).train()
    plain, ids = Own(), torch.arange(8)[None]
    plain.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    torch.testing.assert_close(plain(ids)["logits"], model(ids)["logits"])


def test_a_whole_model_that_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    apart = patched(lambda: llama(tied=True), targets=["lm_head"], tied="separate")
    with pytest.raises(ValueError, match=r"save_merged.*lm_head\.weight.*tied but not adapted alike.*tied=.share"):
        trainer(apart, tmp_path, save_merged=True)
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantised = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    with pytest.raises(ValueError, match=r"save_merged.*q_proj is quantised.*dequantise"):
        trainer(patched(lambda: quantised, targets="*q_proj"), tmp_path, save_merged=True)


class Tied(Own):
    """What safetensors refuses to write as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


def test_what_the_first_checkpoint_would_refuse_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_merged.*embed\.weight and head\.weight share memory"):
        trainer(patched(Tied, targets="embed"), tmp_path, save_merged=True)
    model = patched()
    model.generation_config.temperature = 0.7  # without do_sample
    with pytest.raises(ValueError, match=r"(?s)save_merged.*generation_config.*temperature"):
        trainer(model, tmp_path, save_merged=True)
    for made in (patched(Tied, targets="embed"), model):
        trainer(made, tmp_path, max_steps=1, save_steps=1).train()  # adapters alone are written


def whole_models(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*model*")]


def test_a_checkpoint_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    """Of a run that wrote whole models into the same folder, by the Trainer itself or with save_merged."""
    once: dict[str, Any] = {"max_steps": 1, "save_steps": 1}
    arguments = TrainingArguments(str(tmp_path), **once, use_cpu=True, report_to=[], disable_tqdm=True)
    for run in (
        trainer(patched(), tmp_path, save_merged=True, **once),
        Trainer(patched(), arguments, None, text_data()),
    ):
        run.train()
        assert whole_models(tmp_path / "checkpoint-1") == ["model.safetensors"]
        model, resumed = patched(), patched(seed=2)
        trainer(model, tmp_path, **once).train()
        assert whole_models(tmp_path / "checkpoint-1") == []
        trainer(resumed, tmp_path, **once).train(resume_from_checkpoint=True)
        assert same(trained(resumed), trained(model))


def test_a_model_that_lies_beside_saved_adapters_stays_and_is_named(tmp_path: Path) -> None:
    """It may be the base of the adapters."""
    llama().save_pretrained(tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    model = patched()
    run = trainer(model, tmp_path / "run", save_strategy="no")
    run.train()
    with pytest.warns(UserWarning, match=r"base has model\.safetensors, .*from_pretrained reads that model"):
        run.save_model(str(tmp_path / "base"))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(logits(mapsurgery.load(base, tmp_path / "base" / ADAPTER_NAME)), logits(model.eval()))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_with_adapters_twice_is_refused(sharded: bool, tmp_path: Path) -> None:
    """The Trainer itself wrote over one of ours, whose file it leaves."""
    once: dict[str, Any] = {"max_steps": 1, "save_steps": 1, "save_only_model": True}
    trainer(patched(), tmp_path, **once).train()
    later = moved(patched())
    later.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="20KB" if sharded else "1GB")
    model = patched()
    before = trained(model)
    with pytest.raises(ValueError, match=r"adapters twice, .*remove adapter\.safetensors to go on from the latter"):
        trainer(model, tmp_path, **once).train(resume_from_checkpoint=True)
    assert same(trained(model), before)
    if not sharded:  # the Trainer does not read shards
        (tmp_path / "checkpoint-1" / ADAPTER_NAME).unlink()
        trainer(model, tmp_path, **once)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
        assert same(trained(model), trained(later))


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    return model


def test_disabled_adapters_are_not_trained(tmp_path: Path) -> None:
    """A head would be trained alone, without a word."""
    model = patched(targets="*v_proj", train=["lm_head"])
    before = trained(model)
    run = trainer(model, tmp_path, save_strategy="no")
    with mapsurgery.disabled(model), pytest.raises(ValueError, match="adapters are disabled: train the model outside"):
        run.train()
    assert same(trained(model), before)
    run.train()
    assert not same(trained(model), before)


def test_a_whole_model_that_cannot_be_written_leaves_the_adapters(tmp_path: Path) -> None:
    model = patched()
    run = trainer(model, tmp_path, save_merged=True)
    before, expected = trained(model), logits(model)
    (tmp_path / "saved" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(Exception, match=r"(?i)directory"):
        run.save_model(str(tmp_path / "saved"))
    assert same(trained(model), before) and torch.equal(logits(model), expected)


class OutOfMemory(TrainerCallback):
    """Once, in the words by which accelerate knows it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sizes.append(state.train_batch_size)
        if len(self.sizes) == 1:
            raise RuntimeError("CUDA out of memory.")


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "neftune": {"neftune_noise_alpha": 5.0},
    "gradient_checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_goes_on_exactly_whatever_the_arguments(options: dict[str, Any], tmp_path: Path) -> None:
    """Embeddings and head are adapted, too; adapters stay float32."""
    model, resumed = patched(), patched(seed=2)
    start = trained(model)
    trainer(model, tmp_path / "a", **options).train()
    trainer(resumed, tmp_path / "b", **options).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(trained(model), trained(resumed))
    assert all(tensor.dtype == torch.float32 for tensor in trained(model).values())
    assert not same(trained(model), start)
    loaded = mapsurgery.load(llama(), tmp_path / "a" / "checkpoint-4" / ADAPTER_NAME)
    assert same(trained(model), trained(loaded))


@pytest.mark.slow
def test_it_trains_compiled(tmp_path: Path) -> None:
    """With a backend that needs no compiler."""
    models = [patched(targets="*v_proj"), patched(targets="*v_proj")]
    for model, compiled in zip(models, (False, True), strict=True):
        options = {"torch_compile": compiled, "torch_compile_backend": "eager" if compiled else None}
        trainer(model, tmp_path, max_steps=2, **options).train()
    a, b = map(trained, models)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name])
    assert same(b, trained(mapsurgery.load(llama(), tmp_path / "checkpoint-2" / ADAPTER_NAME)))


def test_a_batch_that_is_too_large_is_made_smaller(tmp_path: Path) -> None:
    callback = OutOfMemory()
    options = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    model = patched()
    start = trained(model)
    trainer(model, tmp_path, callbacks=[callback], **options).train()
    assert callback.sizes[0] == 8 and 0 < callback.sizes[-1] < 8
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trained(model).items())


def test_evaluate_and_predict_see_the_adapters(tmp_path: Path) -> None:
    model = patched()
    run = trainer(model, tmp_path, save_strategy="no")
    before = run.evaluate()["eval_loss"]
    run.train()
    rows = torch.stack([row["input_ids"] for row in text_data(4)])
    with torch.no_grad():
        expected = model.eval()(input_ids=rows, labels=rows)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5) != pytest.approx(before)
    found = torch.from_numpy(run.predict(text_data(4)).predictions)
    torch.testing.assert_close(found, expected.logits, rtol=1e-5, atol=1e-5)


def test_few_checkpoints_are_kept_and_hold_no_optimiser(tmp_path: Path) -> None:
    model = patched()
    trainer(model, tmp_path, save_steps=1, save_total_limit=1, save_only_model=True).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert names == {ADAPTER_NAME, "training_args.bin", "trainer_state.json"}
    assert same(trained(mapsurgery.load(llama(), tmp_path / "checkpoint-4" / ADAPTER_NAME)), trained(model))


def test_each_training_with_model_init_starts_anew(tmp_path: Path) -> None:
    """As each trial of a hyperparameter search does."""
    run = trainer(None, tmp_path, model_init=lambda: patched(), save_strategy="no")
    run.train()
    first = run.model
    run.train()
    assert run.model is not first and same(trained(first), trained(run.model))
    held = {parameter for group in run.optimizer.param_groups for parameter in group["params"]}
    assert set(run.model.parameters()) >= held and not held & set(first.parameters())


def test_the_trainer_itself_is_not_changed_by_ours(tmp_path: Path) -> None:
    """It takes a patched model as before, and a plain one."""
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    for model in (llama(), patched()):
        run = Trainer(model, arguments, train_dataset=text_data())
        run.train()
        run.save_model(str(tmp_path / "saved"))
        assert (tmp_path / "saved" / "model.safetensors").is_file()
        assert not (tmp_path / "saved" / ADAPTER_NAME).exists()


@pytest.mark.slow
@pytest.mark.long
def test_processes_train_the_same_adapters_and_go_on_exactly(tmp_path: Path) -> None:
    """Two under torchrun, with DDP and gloo; one of them writes, a whole model beside the adapters."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(tmp_path)]
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    subprocess.run(launch, check=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})
    first, *others = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pt"))]
    assert len(others) == 3 and all(same(first, other) for other in others)
    assert not same(first, trained(patched()))
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4").eval()
    loaded = mapsurgery.load(llama(), tmp_path / "whole" / "checkpoint-4" / ADAPTER_NAME)
    torch.testing.assert_close(logits(whole), logits(loaded.eval()))


def one_of_two_processes(folder: Path) -> None:
    options = {"save_merged": True, "ddp_backend": "gloo"}
    for name, seed, checkpoint in (("whole", 1, None), ("resumed", 2, str(folder / "whole" / "checkpoint-2"))):
        model = patched(seed=seed)
        run = trainer(model, folder / name, **options)
        run.train(resume_from_checkpoint=checkpoint)
        assert run.model_wrapped is not model and run.args.world_size == 2
        torch.save(trained(model), folder / f"{name}_{run.args.process_index}.pt")


if __name__ == "__main__":
    one_of_two_processes(Path(sys.argv[1]))
