"""`AdapterTrainer`: transformers' Trainer over patched models, quantised ones too; and what the Trainer itself does."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_models import gpt2, llama, logits, text_data
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import mapsurgery
from mapsurgery.integrations.transformers import ADAPTER_NAME, AdapterTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's files."""
    path = tmp_path_factory.mktemp("base")
    llama().save_pretrained(path)
    return path


def _torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


KINDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bnb_4bit": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    ),
    "bnb_8bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao_int8": ("torchao", _torchao),
}


def make(kind: str, folder: Path) -> nn.Module:
    """The base model: quantised, plain, or plain and tied."""
    if kind == "llama":
        return llama()
    if kind == "gpt2_tied":
        return gpt2()
    package, config = KINDS[kind]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config(), device_map="cpu").eval()


def patched(kind: str, folder: Path, seed: int = 1) -> nn.Module:
    model = make(kind, folder)
    torch.manual_seed(seed)
    return mapsurgery.patch(model, "*" if kind == "gpt2_tied" else ["*proj", "lm_head"], rank=2)


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **options: Any) -> Any:
    return kind(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )


def trainer(model: nn.Module, folder: Path, **options: Any) -> AdapterTrainer:
    own = {name: options.pop(name) for name in ("optimizers", "param_groups", "frozen") if name in options}
    data = {"train_dataset": text_data(), "eval_dataset": text_data(4)}
    return AdapterTrainer(model, arguments(folder, **options), **data, **own)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mapsurgery.adapter_state_dict(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [*KINDS, "llama", "gpt2_tied"])
def test_it_trains_saves_and_goes_on_exactly(kind: str, folder: Path, tmp_path: Path) -> None:
    """Checkpoints hold the adapters alone; two steps after one are the two steps without a break, to the bit."""
    model = patched(kind, folder)
    start = trained(model)
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    assert not same(start, trained(model)) and "_hf_peft_config_loaded" not in vars(model)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {ADAPTER_NAME}
    assert not [*checkpoint.glob("*.bin.index.json"), *checkpoint.glob("pytorch_model*")]
    with safe_open(checkpoint / ADAPTER_NAME, framework="pt") as file:
        assert set(file.keys()) == set(start)

    resumed = patched(kind, folder, seed=2)
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(resumed), trained(model))

    whole.save_model(str(tmp_path / "saved"))
    loaded = mapsurgery.load(make(kind, folder), tmp_path / "saved" / ADAPTER_NAME)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    adapted = logits(model)
    with mapsurgery.disabled(model):
        assert not torch.equal(logits(model), adapted)


@pytest.mark.parametrize("kind", ["bnb_4bit", "llama"])
def test_the_best_model_is_loaded_at_the_end(kind: str, folder: Path, tmp_path: Path) -> None:
    """The best is the first of two, as the larger loss is asked for; the parameters are the same objects."""
    model = patched(kind, folder)
    parameters = dict(model.named_parameters())
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, metric_for_best_model="eval_loss", greater_is_better=True, **options)
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"
    first = mapsurgery.load(make(kind, folder), tmp_path / "checkpoint-2" / ADAPTER_NAME)
    last = mapsurgery.load(make(kind, folder), tmp_path / "checkpoint-4" / ADAPTER_NAME)
    assert same(trained(model), trained(first)) and not same(trained(first), trained(last))
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_a_head_and_statistics_travel_with_the_adapters(tmp_path: Path) -> None:
    """A model of one's own, no PreTrainedModel: `train=` and BatchNorm's buffers are in the checkpoint."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(64, 16), nn.BatchNorm1d(16)
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 64)

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
            out = self.head(self.body(hidden))
            loss = {} if labels is None else {"loss": nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten())}
            return {**loss, "logits": out}

    def build(seed: int) -> nn.Module:
        torch.manual_seed(0)
        model = Model()
        torch.manual_seed(seed)
        return mapsurgery.patch(model, "body", rank=2, train="head")

    whole, resumed = build(1), build(2)
    trainer(whole, tmp_path / "a").train()
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(trained(whole), trained(resumed))
    assert {"head.weight", "norm.running_mean", "body.adapter.A"} <= trained(resumed).keys()


def test_the_optimiser_has_our_groups(folder: Path, tmp_path: Path) -> None:
    run = trainer(patched("llama", folder), tmp_path, weight_decay=0.1, param_groups={"b_lr_factor": 4})
    groups = {group["name"]: group for group in run.create_optimizer().param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"down": 0.1, "up": 0.1, "magnitude": 0}
    assert {name: group["lr"] for name, group in groups.items()} == {"down": 1e-2, "up": 4e-2, "magnitude": 1e-2}
    assert run.optimizer.defaults["betas"] == (0.9, 0.999)  # what else the arguments say


def test_an_optimiser_that_makes_its_own_groups_takes_no_options(folder: Path, tmp_path: Path) -> None:
    """As GaLore's, LOMO's and Muon's do, which the Trainer gives its own parameters."""
    model = patched("llama", folder)
    made = torch.optim.SGD, {"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}
    own = {"train_dataset": text_data(), "optimizer_cls_and_kwargs": made}
    run = AdapterTrainer(model, arguments(tmp_path), **own, param_groups={"b_lr_factor": 4})
    with pytest.raises(ValueError, match="groups of its own"):
        run.create_optimizer()
    run = AdapterTrainer(model, arguments(tmp_path), **own)
    assert len(run.create_optimizer().param_groups) == 1 and run.optimizer_cls_and_kwargs is made


def test_an_optimiser_from_before_patch_is_refused(folder: Path, tmp_path: Path) -> None:
    """Nothing would train: the error says what it lacks, and nothing has changed."""
    model = make("llama", folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mapsurgery.patch(model, "*proj", rank=2)
    before = trained(model)
    with pytest.raises(ValueError, match=r"optimizer leaves out 56 of 56 .*self_attn\.q_proj\.adapter\..*after patch"):
        trainer(model, tmp_path, optimizers=(optimizer, None)).train()
    assert same(before, trained(model))
    optimizer = torch.optim.SGD(mapsurgery.param_groups(model, lr=0.1))
    trainer(model, tmp_path, optimizers=(optimizer, None)).train()
    assert not same(before, trained(model))


def test_adapters_that_were_made_anew_are_missing_from_the_old_optimiser(folder: Path, tmp_path: Path) -> None:
    model = patched("llama", folder)
    run = trainer(model, tmp_path)
    run.create_optimizer()
    mapsurgery.patch(mapsurgery.unpatch(model), "*proj", rank=2)
    with pytest.raises(ValueError, match="the optimizer leaves out"):
        run.train()


def test_a_model_that_is_not_patched_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM.* is not patched"):
        trainer(make("bnb_4bit", folder), tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM.* is not patched"):
        AdapterTrainer(args=arguments(tmp_path), model_init=lambda: llama())


def test_model_init_makes_a_patched_model(folder: Path, tmp_path: Path) -> None:
    run = AdapterTrainer(
        args=arguments(tmp_path), model_init=lambda: patched("bnb_4bit", folder), train_dataset=text_data()
    )
    assert "_hf_peft_config_loaded" not in vars(run.model)
    run.train()
    assert "_hf_peft_config_loaded" not in vars(run.model)
    loaded = mapsurgery.load(make("bnb_4bit", folder), tmp_path / "checkpoint-4" / ADAPTER_NAME)
    assert same(trained(loaded), trained(run.model))


def test_what_was_frozen_is_named_before_training(folder: Path, tmp_path: Path) -> None:
    model = patched("llama", folder)
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen after patch: model\.layers\.0\.self_attn\.q_proj"):
        trainer(model, tmp_path).train()
    run = trainer(model, tmp_path, frozen="keep")
    run.create_optimizer()
    run.save_model(str(tmp_path))
    loaded = mapsurgery.load(llama(), tmp_path / ADAPTER_NAME)
    assert same(trained(loaded), trained(model))


@pytest.mark.parametrize("why", ["base", "rank", "layers", "method", "damaged"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(why: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    trainer(patched("llama", folder), tmp_path).save_model(str(checkpoint))
    models = {
        "base": lambda: mapsurgery.patch(llama(seed=5), ["*proj", "lm_head"], rank=2),
        "rank": lambda: mapsurgery.patch(llama(), ["*proj", "lm_head"], rank=3),
        "layers": lambda: mapsurgery.patch(llama(), "*q_proj", rank=2),
        "method": lambda: mapsurgery.patch(llama(), ["*proj", "lm_head"], rank=2, method="lora"),
        "damaged": lambda: patched("llama", folder),
    }
    if why == "damaged":
        data = (checkpoint / ADAPTER_NAME).read_bytes()
        (checkpoint / ADAPTER_NAME).write_bytes(data[: len(data) // 2])
    model = models[why]()
    before = trained(model)
    words = {"base": "another base", "rank": "has shape", "layers": "adapts layers that", "method": "method"}
    with pytest.raises(ValueError, match=words.get(why, "truncated or damaged")):
        trainer(model, tmp_path / "b").train(resume_from_checkpoint=str(checkpoint))
    assert same(before, trained(model))


def test_a_checkpoint_of_the_trainer_itself_goes_on_too(folder: Path, tmp_path: Path) -> None:
    """Its model.safetensors holds base and adapters; from there on the files hold the adapters alone."""
    model, resumed = patched("llama", folder), patched("llama", folder, seed=2)
    groups = mapsurgery.param_groups(model, lr=1e-2)
    optimizer = torch.optim.AdamW(groups)
    Trainer(model, arguments(tmp_path / "a"), train_dataset=text_data(), optimizers=(optimizer, None)).train()
    run = trainer(resumed, tmp_path / "b", optim="adamw_torch")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(trained(model), trained(resumed))
    assert (tmp_path / "b" / "checkpoint-4" / ADAPTER_NAME).is_file()


@pytest.mark.parametrize("by", ["the Trainer", "other options"])
def test_a_checkpoint_with_another_optimizer_is_refused_and_changes_nothing(
    by: str, folder: Path, tmp_path: Path
) -> None:
    """The Trainer makes groups of its own; without its optimizer the weights are taken."""
    written, model = patched("llama", folder), patched("llama", folder, seed=2)
    if by == "the Trainer":
        Trainer(written, arguments(tmp_path / "a"), train_dataset=text_data()).train()
    else:
        trainer(written, tmp_path / "a", param_groups={"layer_lr_factors": {"*q_proj": 2.0}}).train()
    before, checkpoint = trained(model), tmp_path / "a" / "checkpoint-4"
    run = trainer(model, tmp_path / "b")
    with pytest.raises(ValueError, match=r"checkpoint-4 has groups of .*remove optimizer\.pt there"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(model), before) and run.optimizer is None
    (checkpoint / "optimizer.pt").unlink()
    run._load_from_checkpoint(str(checkpoint))
    assert same(trained(model), trained(written))


def test_it_mixes_with_other_trainers(folder: Path, tmp_path: Path) -> None:
    class Mine(AdapterTrainer, Seq2SeqTrainer):
        pass

    model = patched("bnb_4bit", folder)
    own = arguments(tmp_path, Seq2SeqTrainingArguments)
    Mine(model=model, args=own, train_dataset=text_data()).train()
    loaded = mapsurgery.load(make("bnb_4bit", folder), tmp_path / "checkpoint-4" / ADAPTER_NAME)
    assert same(trained(loaded), trained(model))


def test_a_push_between_checkpoints_takes_the_adapter_along(folder: Path, tmp_path: Path) -> None:
    run = trainer(patched("llama", folder), tmp_path, hub_strategy="end")  # nothing is sent
    run.save_model(str(tmp_path / "checkpoint-2"))
    run._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert (tmp_path / ADAPTER_NAME).read_bytes() == (tmp_path / "checkpoint-2" / ADAPTER_NAME).read_bytes()


def test_a_sharded_training_is_refused(folder: Path, tmp_path: Path) -> None:
    class Sharded(AdapterTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True  # which accelerate turns on on GPUs alone

    with pytest.raises(NotImplementedError, match="FSDP or DeepSpeed is on"):
        Sharded(patched("llama", folder), arguments(tmp_path), train_dataset=text_data())


OURS = "mapsurgery.integrations.transformers"


def test_the_trainer_itself_refuses_and_patch_says_what_to_import(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own error names PEFT alone; the model is none the worse."""
    monkeypatch.delitem(sys.modules, OURS)
    model = make("bnb_4bit", folder)
    assert f"from {OURS} import AdapterTrainer" in str(mapsurgery.plan(model, "*proj"))
    with pytest.warns(UserWarning, match=f"from {OURS} import AdapterTrainer") as seen:
        mapsurgery.patch(model, "*proj", rank=2)
    assert seen[0].filename == __file__
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path), train_dataset=text_data())
    mapsurgery.save(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="AdapterTrainer") as seen:
        mapsurgery.load(make("bnb_4bit", folder), tmp_path / "adapter")
    assert seen[0].filename == __file__


def test_nothing_is_said_where_nothing_needs_saying(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched("bnb_4bit", folder)  # our trainer is imported
        monkeypatch.delitem(sys.modules, OURS)
        assert OURS not in str(mapsurgery.plan(llama(), "*proj"))
        patched("llama", folder)
        monkeypatch.delitem(sys.modules, "transformers.trainer")
        patched("bnb_4bit", folder)  # no trainer is


def test_the_check_of_a_failed_trainer_leaves_no_flag(folder: Path, tmp_path: Path) -> None:
    model = patched("bnb_4bit", folder)
    with pytest.raises(ValueError, match="eval_dataset"):
        AdapterTrainer(model, arguments(tmp_path, eval_strategy="steps"), train_dataset=text_data())
    assert "_hf_peft_config_loaded" not in vars(model)
