"""sentence-transformers' trainers and models with adapters."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mapsurgery
from mapsurgery.integrations.transformers import ADAPTER_NAME

st = pytest.importorskip("sentence_transformers", exc_type=ImportError)
losses: Any = importlib.import_module("sentence_transformers.sentence_transformer.losses")
ours: Any = importlib.import_module("mapsurgery.integrations.sentence_transformers")

SENTENCES = ["w1 w2 w3", "w9", "w4 w40 w41 w5 w6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer of words w0 to w60."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<cls>", *(f"w{i}" for i in range(61))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).save_pretrained(path)
    return path


def base(folder: Path) -> Any:
    return st.SentenceTransformer(str(folder), device="cpu")


def patched(folder: Path, seed: int = 1, **options: Any) -> Any:
    model = base(folder)
    torch.manual_seed(seed)
    return mapsurgery.patch(model, **{"targets": ["*query", "*value"], "rank": 2, **options})


def data() -> Any:
    from datasets import Dataset

    rows = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 1} w{i + 2}"} for i in range(8)]
    return Dataset.from_list(rows)


def trainer(model: Any, folder: Path, *, loss: Any = None, train_dataset: Any = None, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("save_merged", "param_groups") if name in options}
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    arguments = st.SentenceTransformerTrainingArguments(str(folder), **{**settings, **options})
    loss = loss or losses.MultipleNegativesRankingLoss(model)
    dataset = data() if train_dataset is None else train_dataset
    return ours.SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=loss, **own)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mapsurgery.adapter_state_dict(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def encoded(model: Any) -> Tensor:
    return model.encode(SENTENCES, convert_to_tensor=True)


def test_it_trains_saves_the_adapters_alone_and_goes_on_exactly(folder: Path, tmp_path: Path) -> None:
    model, resumed = patched(folder), patched(folder, seed=2)
    start = trained(model)
    trainer(model, tmp_path / "a").train()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trained(model).items())
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert [path.name for path in checkpoint.rglob("*.safetensors")] == [ADAPTER_NAME]
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(checkpoint))
    assert same(trained(model), trained(resumed))
    loaded = mapsurgery.load(base(folder), tmp_path / "a" / "checkpoint-4" / ADAPTER_NAME)
    assert torch.equal(encoded(loaded), encoded(model))
    assert not torch.allclose(encoded(model), encoded(base(folder)), atol=1e-3)


def test_encode_is_the_adapted_forward(folder: Path, tmp_path: Path) -> None:
    model = patched(folder)
    trainer(model, tmp_path, save_strategy="no").train()
    with torch.no_grad():
        expected = model.eval()(model.preprocess(SENTENCES))["sentence_embedding"]
    torch.testing.assert_close(encoded(model), expected)
    with mapsurgery.disabled(model):
        assert torch.equal(encoded(model), encoded(base(folder)))


def test_a_saved_model_is_the_base_and_a_merged_one_the_adapted(folder: Path, tmp_path: Path) -> None:
    """By its own `save`, whoever calls it."""
    model = patched(folder)
    trainer(model, tmp_path, save_strategy="no").train()
    adapted = encoded(model)
    model.save(str(tmp_path / "base"))
    torch.testing.assert_close(encoded(base(tmp_path / "base")), encoded(base(folder)))
    mapsurgery.merge(model, final=True).save(str(tmp_path / "merged"))
    torch.testing.assert_close(encoded(base(tmp_path / "merged")), adapted)


def test_a_whole_model_beside_the_adapters(folder: Path, tmp_path: Path) -> None:
    model, alone = patched(folder), patched(folder)
    trainer(model, tmp_path / "a", save_merged=True).train()
    trainer(alone, tmp_path / "b").train()
    assert same(trained(model), trained(alone))
    torch.testing.assert_close(encoded(base(tmp_path / "a" / "checkpoint-4")), encoded(model))


def test_the_best_model_is_loaded_at_the_end(folder: Path, tmp_path: Path) -> None:
    """The first of two: the evaluator likes the base best."""
    from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

    class Same(SentenceEvaluator):
        primary_metric = "cosine"

        def __call__(self, model: Any, *_: Any, **__: Any) -> dict[str, float]:
            return {"cosine": nn.functional.cosine_similarity(encoded(model), encoded(base(folder))).mean().item()}

    model = patched(folder)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        metric_for_best_model="cosine",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    run = ours.SentenceTransformerTrainer(model, arguments, train_dataset=data(), loss=loss, evaluator=Same())
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"
    assert same(trained(model), trained(mapsurgery.load(base(folder), tmp_path / "checkpoint-2" / ADAPTER_NAME)))


def test_magnitudes_are_not_decayed_and_a_loss_trains_its_own(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    model = patched(folder)
    loss = losses.SoftmaxLoss(model, sentence_embedding_dimension=32, num_labels=2)
    rows = Dataset.from_list([{"a": f"w{i}", "b": f"w{i + 3}", "label": i % 2} for i in range(8)])
    before = loss.classifier.weight.detach().clone()
    options = {"weight_decay": 0.1, "param_groups": {"b_lr_factor": 4}, "save_strategy": "no"}
    run = trainer(model, tmp_path, loss=loss, train_dataset=rows, **options)
    run.train()
    groups = [(g["name"], g["weight_decay"], g["initial_lr"], len(g["params"])) for g in run.optimizer.param_groups]
    assert sorted(groups) == [
        ("down", 0.1, 1e-2, 4),
        ("loss", 0, 1e-2, 1),
        ("loss", 0.1, 1e-2, 1),
        ("magnitude", 0, 1e-2, 8),
        ("up", 0.1, 4e-2, 4),
    ]
    assert not torch.equal(loss.classifier.weight, before)
    run = trainer(model, tmp_path, learning_rate_mapping={"query": 1e-3})
    with pytest.raises(ValueError, match=r"learning_rate_mapping=\{'query': 0.001\}.*layer_lr_factors"):
        run.train()


def test_a_model_that_is_not_patched_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SentenceTransformer.* is not patched"):
        trainer(base(folder), tmp_path)


def test_cross_and_sparse_encoders(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import cross_encoder, sparse_encoder
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    cross = mapsurgery.patch(cross_encoder.CrossEncoder(str(folder), num_labels=1, device="cpu"), "*value", rank=2)
    pairs = Dataset.from_list([{"a": f"w{i}", "b": f"w{i + 3}", "label": float(i % 2)} for i in range(8)])
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(tmp_path / "mlm")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "mlm")
    sparse = mapsurgery.patch(sparse_encoder.SparseEncoder(str(tmp_path / "mlm"), device="cpu"), "*value", rank=2)
    sparse_losses = sparse_encoder.losses
    contrast = sparse_losses.SparseMultipleNegativesRankingLoss(sparse)
    options = {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    kinds = {
        "cross": (cross, cross_encoder.CrossEncoderTrainingArguments, ours.CrossEncoderTrainer, pairs, None),
        "sparse": (
            sparse,
            sparse_encoder.SparseEncoderTrainingArguments,
            ours.SparseEncoderTrainer,
            data(),
            sparse_losses.SpladeLoss(sparse, contrast, document_regularizer_weight=1e-3),
        ),
    }
    for name, (model, arguments, kind, dataset, loss) in kinds.items():
        start = trained(model)
        kind(model, arguments(str(tmp_path / name), **options), train_dataset=dataset, loss=loss).train()
        assert not same(trained(model), start)
        files = [path.name for path in (tmp_path / name / "checkpoint-2").rglob("*.safetensors")]
        assert files == [ADAPTER_NAME]
