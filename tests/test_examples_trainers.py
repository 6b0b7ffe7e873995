"""The examples of trainers: they train, write what they say, and prove it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mapsurgery


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``example(name)`` imports examples/<name>.py, or skips with the words of what is missing."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))

    def get(name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(str(error))

    return get


def run(example: Any, name: str, *arguments: str) -> int:
    """Runs an example, or skips with the words of what is missing."""
    module = example(name)
    try:
        return module.main([*arguments])
    except example("packaged").MissingPackageError as error:
        pytest.skip(str(error))


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(value) for value in found.groups()]


def test_the_documentation_of_python_is_read(example: Any) -> None:
    found = dict(example("docstrings").documented(["math", "statistics"]))
    assert found["math.comb"].startswith("Number of ways to choose k items")
    assert found["statistics.NormalDist.quantiles"].startswith("Divide into *n* continuous intervals")
    assert len(set(found.values())) == len(found) > 50


def test_the_trainer_runs_on_a_packaged_model(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(example, "trainer", "--steps", "2", "--output", str(tmp_path)) == 0
    text = capsys.readouterr().out
    before, after = numbers(r"accuracy on 50 sentences: ([\d.]+) before, ([\d.]+) after", text)
    assert 0 < before < 1 and 0 < after < 1
    assert text.count("PROVED") == 2 and (tmp_path / "adapter.safetensors").stat().st_size < 1_000_000


def test_sft_runs(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On a model of random weights in place of the packaged one, with a tokenizer of characters."""
    pytest.importorskip("trl", exc_type=ImportError)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    module = example("sft")
    characters = ["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

    def tiny() -> tuple[LlamaForCausalLM, Any]:
        torch.manual_seed(0)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **words)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(characters), **sizes)).eval(), tokenizer

    monkeypatch.setattr(module, "smollm2", tiny)
    assert module.main(["--steps", "6", "--save-merged", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    before, after = numbers(r"loss on 24 functions: ([\d.]+) before, ([\d.]+) after", text)
    assert after < before and text.count("PROVED") == 2
    ids = torch.arange(3, 12)[None]
    whole = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    loaded = mapsurgery.load(tiny()[0], tmp_path / "adapter.safetensors").eval()
    torch.testing.assert_close(whole(ids).logits, loaded(ids).logits)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("name", "words"), [("trainer", "accuracy"), ("sft", "loss")])
def test_packaged_models_learn(
    example: Any, name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(example, name, "--steps", "60" if name == "trainer" else "8", "--output", str(tmp_path)) == 0
    before, after = numbers(words + r" on \d+ \w+: ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    assert after > 0.85 > before if words == "accuracy" else after < 0.9 * before
