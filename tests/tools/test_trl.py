"""TRL's trainers on patched models: what they save, where they resume, and a reference that is no second model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import llama, logits
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, LlamaForSequenceClassification

import mapsurgery
from mapsurgery.integrations.transformers import ADAPTER_NAME, AdapterTrainer

trl = pytest.importorskip("trl", reason="TRL's trainers need trl", exc_type=ImportError)
ours: Any = importlib.import_module("mapsurgery.integrations.trl")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words w0 to w60."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


SAVING = {"save_strategy": "steps", "save_steps": 1}


def data(name: str) -> Any:
    from datasets import Dataset

    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 3} w{i + 4}", "rejected": f" w{i + 9}"} for i in range(8)]
    if name in ("DPO", "Reward"):
        return Dataset.from_list(rows)
    if name == "KTO":
        return Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(rows)]
        )
    if name == "SFT":
        return Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in rows])
    return Dataset.from_list([{"prompt": row["prompt"]} for row in rows])


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def base(name: str = "SFT") -> nn.Module:
    if name != "Reward":
        return llama()
    config = llama().config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def patched(name: str = "SFT", seed: int = 1, **options: Any) -> nn.Module:
    model = options.pop("model", None) or base(name)
    torch.manual_seed(seed)
    train = "score" if name == "Reward" else ()
    return mapsurgery.patch(model, **{"targets": ["*q_proj", "*down_proj"], "rank": 2, "train": train, **options})


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """Adapters that have learned something."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def trainer(name: str, model: nn.Module, folder: Path, tokenizer: Any, kind: Any = None, **options: Any) -> Any:
    """Of `mapsurgery.integrations.trl`, or another kind."""
    own = {key: options.pop(key) for key in ("ref_model", "save_merged") if key in options}
    if name in ("GRPO", "RLOO"):
        own["reward_funcs"] = reward
        options |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    settings = {
        "max_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "disable_dropout": True,
    }
    if name == "SFT":
        del settings["disable_dropout"]
    arguments = getattr(trl, f"{name}Config")(str(folder), **{**settings, **options})
    kind = kind or getattr(ours, f"{name}Trainer")
    return kind(model, args=arguments, train_dataset=data(name), processing_class=tokenizer, **own)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mapsurgery.adapter_state_dict(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["SFT", pytest.param("Reward", marks=pytest.mark.long), "DPO", "GRPO"])
def test_it_trains_saves_the_adapters_alone_and_goes_on_exactly(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model = patched(name)
    attributes, start = set(vars(model)), trained(model)
    plain = {key: tensor.clone() for key, tensor in base(name).state_dict().items()}
    trainer(name, model, tmp_path, tokenizer, **SAVING).train()
    assert all(not torch.equal(tensor, start[key]) for key, tensor in trained(model).items() if "score" not in key)
    now = model.state_dict()
    assert all(torch.equal(now[key], tensor) for key, tensor in plain.items() if not key.startswith("score"))
    assert not [attribute for attribute in set(vars(model)) - attributes if "peft" in attribute]
    checkpoint = tmp_path / "checkpoint-1"
    assert {path.name for path in checkpoint.glob("*.safetensors")} <= {ADAPTER_NAME, ours.REFERENCE_NAME}
    loaded = mapsurgery.load(base(name), tmp_path / "checkpoint-2" / ADAPTER_NAME)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))

    resumed = patched(name, seed=2)
    trainer(name, resumed, tmp_path / "resumed", tokenizer).train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(resumed), trained(model))


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_the_reference_is_the_base_and_no_second_model(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """After training the policy has moved, and the reference has not; no other model is in the trainer."""
    model = patched(name)
    run = trainer(name, model, tmp_path, tokenizer)
    assert run.ref_model is None
    run.train()
    held = [value for value in vars(run).values() if isinstance(value, nn.Module)]
    assert {id(p) for module in held for p in module.parameters()} == {id(p) for p in model.parameters()}
    policy, own = logits(model.eval()), trained(model)
    with run._as_reference():
        torch.testing.assert_close(logits(model), logits(base(name)))
        assert not torch.allclose(logits(model), policy)
    assert same(trained(model), own) and torch.equal(logits(model), policy)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", pytest.param("RLOO", marks=pytest.mark.long)])
def test_losses_are_those_with_a_copy_of_the_base(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """As TRL itself makes one: given to it, or read from the base's folder."""
    run = trainer(name, patched(name), tmp_path / "a", tokenizer, max_steps=3)
    run.train()

    class Theirs(AdapterTrainer, getattr(trl, f"{name}Trainer")):
        pass

    llama().save_pretrained(tmp_path / "base")
    model = patched(name, model=LlamaForCausalLM.from_pretrained(tmp_path / "base").eval())
    theirs = trainer(name, model, tmp_path / "b", tokenizer, Theirs, max_steps=3)
    assert theirs.ref_model is not None
    theirs.train()
    assert losses(run) == pytest.approx(losses(theirs), abs=1e-5)
    key = {"DPO": "rewards/margins", "KTO": "rewards/chosen"}.get(name, "kl")
    found = [[entry[key] for entry in r.state.log_history if key in entry] for r in (run, theirs)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][0] == 0 and found[0][-1] != 0  # nothing at first, then something
    if name == "DPO":
        assert losses(run)[0] == pytest.approx(torch.tensor(2.0).log().item())


def test_the_reference_of_trained_adapters_is_what_they_were_given_as(tokenizer: Any, tmp_path: Path) -> None:
    """As of PEFT's, after SFT for one. A new trainer that resumes has the same reference."""
    model = moved(patched())
    start = logits(model)
    run = trainer("DPO", model, tmp_path, tokenizer, **SAVING)
    run.train()
    assert losses(run)[0] == pytest.approx(torch.tensor(2.0).log().item())
    resumed = patched(seed=2)
    again = trainer("DPO", resumed, tmp_path / "b", tokenizer)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(trained(model), trained(resumed)) and not torch.allclose(start, logits(base()))
    for each in (run, again):
        with each._as_reference():
            assert torch.equal(logits(each.model.eval()), start)


def test_a_trained_head_is_the_bases_in_the_reference(tokenizer: Any, tmp_path: Path) -> None:
    model = patched(train="lm_head")
    run = trainer("DPO", model, tmp_path, tokenizer)
    run.train()
    with run._as_reference():
        torch.testing.assert_close(logits(model.eval()), logits(base()))


def test_the_reference_follows_the_model_to_its_device(tokenizer: Any, tmp_path: Path) -> None:
    """The Trainer moves the model after TRL has copied the adapters; a CPU alone has "meta" to move to."""
    model = patched()
    run = trainer("DPO", model, tmp_path, tokenizer)
    run.model.to("meta")
    with run._as_reference():
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_the_reference_is_the_base_on_a_gpu(name: str, tokenizer: Any, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    model = patched(name)
    run = trainer(name, model, tmp_path, tokenizer, use_cpu=False)
    run.train()
    assert all(parameter.is_cuda for parameter in model.parameters())
    with run._as_reference():
        torch.testing.assert_close(logits(model.cpu().eval()), logits(base(name)))


def test_reference_log_probs_may_be_computed_beforehand(tokenizer: Any, tmp_path: Path) -> None:
    runs = [trainer("DPO", patched(), tmp_path, tokenizer, precompute_ref_log_probs=both) for both in (False, True)]
    assert "ref_chosen_logps" in runs[1].train_dataset.column_names and runs[1].ref_model is None
    for run in runs:
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-6)


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_adapters_of_a_quantised_base_keep_float32(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """TRL rounds what is trained to bfloat16 where the base is quantised."""
    pytest.importorskip("bitsandbytes")
    base().save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = patched(
        model=LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
    )
    start = trained(moved(model))
    run = trainer(name, model, tmp_path, tokenizer, max_steps=1, gradient_checkpointing=True)
    assert same(trained(model), start)
    run.train()
    now = trained(model)
    assert all(t.dtype == torch.float32 and not torch.equal(t, start[key]) for key, t in now.items())
    if name == "DPO":
        assert losses(run)[0] == pytest.approx(torch.tensor(2.0).log().item())


@pytest.mark.parametrize(("name", "reentrant"), [("SFT", True), ("DPO", True), ("GRPO", False)])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool, tokenizer: Any, tmp_path: Path) -> None:
    own = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    models = [patched(name), patched(name)]
    for model, options in zip(models, ({}, own), strict=True):
        trainer(name, model, tmp_path, tokenizer, **options).train()
    a, b = map(trained, models)
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_is_trained(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    """TRL multiplies by the head's weight itself, and refuses PEFT's adapters there; ours are in the weight."""
    model = patched(model=llama(tied=tied), targets=["lm_head"])
    start = trained(model)
    run = trainer("SFT", model, tmp_path, tokenizer, max_steps=1, per_device_train_batch_size=8)
    batch = next(iter(run.get_train_dataloader()))
    expected = moved(model)(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    run.train()
    assert losses(run) == pytest.approx([expected], rel=1e-4)
    assert all(not torch.equal(tensor, start[key]) for key, tensor in trained(model).items())


def test_a_whole_model_beside_the_adapters(tokenizer: Any, tmp_path: Path) -> None:
    model, alone = patched(), patched()
    trainer("DPO", model, tmp_path / "a", tokenizer, save_merged=True, **SAVING).train()
    trainer("DPO", alone, tmp_path / "b", tokenizer).train()
    assert same(trained(model), trained(alone))
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-2").eval()
    torch.testing.assert_close(logits(whole), logits(model.eval()))
    assert not torch.allclose(logits(whole), logits(base()))


def test_save_pretrained_writes_the_adapters(tokenizer: Any, tmp_path: Path) -> None:
    """As of PEFT's model; of a merged one the whole."""
    model = moved(patched())
    run = trainer("DPO", model, tmp_path, tokenizer)
    run.model.save_pretrained(str(tmp_path / "new" / "saved"))
    assert [path.name for path in (tmp_path / "new" / "saved").iterdir()] == [ADAPTER_NAME]
    loaded = mapsurgery.load(base(), tmp_path / "new" / "saved" / ADAPTER_NAME)
    assert torch.equal(logits(loaded), logits(model.eval()))
    expected = logits(model)
    mapsurgery.merge(run.model).save_pretrained(tmp_path / "merged")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(whole), expected)


def test_vllm_is_sent_the_adapted_weights(tokenizer: Any, tmp_path: Path) -> None:
    """What TRL sends to vLLM, which is not installed here, before it generates: the plain model's names, with W'."""
    from trl.generation.vllm_generation import DistributedBackend, VLLMGeneration

    model = moved(patched())
    run = trainer("GRPO", model, tmp_path, tokenizer)
    sender = VLLMGeneration.__new__(VLLMGeneration)
    sender.model, sender._dist = run.model, DistributedBackend(run.accelerator)
    objects, values = dict(model.named_parameters()), {k: t.clone() for k, t in model.state_dict().items()}
    sent = {name: tensor.clone() for name, tensor in sender._iter_named_params()}
    plain = base()
    assert sent.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(sent)
    torch.testing.assert_close(logits(plain), logits(model))
    assert all(objects[name] is p for name, p in model.named_parameters())
    assert all(torch.equal(values[key], t) for key, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_a_model_that_is_not_patched_is_refused(name: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM.* is not patched"):
        trainer(name, base(), tmp_path, tokenizer)


def test_a_reference_that_follows_the_policy_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """By TRL, as with PEFT's adapters: there is no model to be moved."""
    model = patched()
    with pytest.raises(NotImplementedError, match="sync_ref_model"):
        trainer("DPO", model, tmp_path, tokenizer, sync_ref_model=True)
