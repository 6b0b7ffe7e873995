"""The text examples: questions and files are read rightly, scores are what they say, and each script proves its end."""

import argparse
import importlib
import json
import math
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import mapsurgery

for package in ("transformers", "tokenizers", "tqdm"):
    pytest.importorskip(package, reason=f"the text examples need {package}")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """``example(name)`` imports examples/<name>.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


# --- options about adapters -------------------------------------------------------------------------------------------


@pytest.fixture
def options(example):
    """``options(*arguments)`` parses them as the examples do."""
    parser = argparse.ArgumentParser()
    example("adapting").add_options(parser, targets=["0"], rank=2, lr=1e-3)
    return lambda *arguments: parser.parse_args(arguments)


def small_model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))


def test_options_reach_patch_and_groups(example, options, capsys):
    model = small_model()
    args = options("--init", "zero", "--magnitude-lr-factor", "10", "--b-lr-factor", "4", "--weight-decay", "0.1")
    plan = example("adapting").adapt(model, args, head=["1"])
    assert "1 layers to adapt with map" in capsys.readouterr().out
    assert plan.config.rank == 2 and plan.config.init.kind == "zero" and plan.config.train == ("1",)
    groups = {group["name"]: group for group in example("adapting").groups(model, args)}
    assert groups["down"]["lr"] == 1e-3 and groups["up"]["lr"] == 4e-3 and groups["magnitude"]["lr"] == 1e-2
    assert groups["down"]["weight_decay"] == 0.1 and groups["magnitude"]["weight_decay"] == 0


def test_train_replaces_the_head_and_may_be_empty(example, options):
    settings = example("adapting").settings
    assert settings(options(), head=["1"])["train"] == ["1"]
    assert settings(options("--train", "1.bias"), head=["1"])["train"] == ["1.bias"]
    assert settings(options("--train"), head=["1"])["train"] == []


def test_scaling_of_map_is_refused(example, options):
    for arguments in (["--lora-alpha", "16"], ["--rslora"]):
        with pytest.raises(ValueError, match="--method map has no scaling"):
            example("adapting").method(options(*arguments))


def test_scaling_makes_an_instance_of_the_method(example, options):
    method = example("adapting").method
    assert method(options("--method", "dora")) == "dora"
    assert method(options("--method", "dora", "--lora-alpha", "4")) == mapsurgery.Dora(alpha=4.0)
    assert method(options("--method", "lora", "--rslora")) == mapsurgery.Lora(rslora=True)


def test_methods_and_updates_are_those_of_the_library(example):
    adapting = example("adapting")
    for method in adapting.METHODS:
        for update in adapting.UPDATES:
            mapsurgery.plan(small_model(), ["0"], rank=2, method=method, update=update)


def test_layer_learning_rate_reaches_the_groups(example, options):
    model = small_model()
    args = options("--targets", "0", "1", "--layer-lr", "1=0.5")
    example("adapting").adapt(model, args)
    rates = {p: group["lr"] for group in example("adapting").groups(model, args) for p in group["params"]}
    for path, rate in (("0", 1e-3), ("1", 5e-4)):
        assert {rates[p] for p in model.get_submodule(path).parameters() if p.requires_grad} == {rate}


def test_layer_learning_rates_are_parsed(options, capsys):
    assert options("--layer-lr", "*.0.*=0.5", "a=b=2").layer_lr == [("*.0.*", 0.5), ("a=b", 2.0)]
    with pytest.raises(SystemExit):
        options("--layer-lr", "*.0.*")
    assert "'*.0.*' is not a glob" in capsys.readouterr().err


def test_summary_is_the_mean_over_layers_of_a_name(example, monkeypatch):
    adapting = example("adapting")
    layers = {"a.q": 1.0, "b.q": 2.0, "b.v": 5.0}
    report = types.SimpleNamespace(layers={path: dict.fromkeys(adapting.MEASURES, v) for path, v in layers.items()})
    monkeypatch.setattr(mapsurgery, "report", lambda model: report)
    rows = [line.split() for line in adapting.summary(small_model()).splitlines()]
    assert ["q", "2"] + ["1.5"] * len(adapting.MEASURES) in rows
    assert ["v", "1"] + ["5"] * len(adapting.MEASURES) in rows


# --- training ---------------------------------------------------------------------------------------------------------


def test_minibatches_hold_every_sample_once_an_epoch(example):
    minibatches = example("training").minibatches
    batches = list(minibatches(10, 4, epochs=2, seed=3))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert batches == list(minibatches(10, 4, epochs=2, seed=3)) != list(minibatches(10, 4, epochs=2, seed=4))


def test_fit_descends_and_stops_at_a_loss_that_is_not_finite(example):
    fit, runtime = example("training").fit, example("runtime").Runtime(torch.device("cpu"), None)
    weight = torch.nn.Parameter(torch.tensor(3.0))
    groups = [{"params": [weight], "lr": 0.1}]
    losses = fit(groups, [[0]] * 60, lambda batch: (weight.square() / 2 for _ in range(2)), runtime).losses
    assert len(losses) == 60 and losses[0] == 9.0 and losses[-1] < 0.1
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan"):
        fit(groups, [[0]], lambda batch: [weight * math.nan], runtime)


# --- questions --------------------------------------------------------------------------------------------------------

ARC = (
    "Please choose the correct answer to the question: Why is it: dark?\n\n"
    "Answer1: night Answer2: a lamp: off Answer3: fog\n\nAnswer format: answer1/answer2/answer3"
)


@pytest.mark.parametrize(
    ("instruction", "answer", "question", "choices", "index"),
    [
        (ARC, "answer2", "Why is it: dark?", ["night", "a lamp: off", "fog"], 1),
        (
            "Please answer the following question with true or false, question: is ice cold?\n\n"
            "Answer format: true/false",
            "true",
            "is ice cold?",
            ["true", "false"],
            0,
        ),
        (
            "Please choose the correct solution to the question: To open a jar\n\nSolution1: turn the lid\n\n"
            "Solution2: turn the jar\n\nAnswer format: solution1/solution2",
            "solution2",
            "To open a jar",
            ["turn the lid", "turn the jar"],
            1,
        ),
        (
            "Please choose the correct ending to complete the given sentence: He runs: \n\nEnding1: fast "
            "Ending2: [up]\n\nAnswer format: ending1/ending2",
            "ending1",
            "He runs:",
            ["fast", "[up]"],
            0,
        ),
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence: Ann thanked Bea; _ "
            "smiled.\n\nOption1: Ann Option2: Bea\n\nAnswer format: option1/option2",
            "option2",
            "Ann thanked Bea; _ smiled.",
            ["Ann", "Bea"],
            1,
        ),
    ],
)
def test_every_wording_of_the_collection_is_taken_apart(example, instruction, answer, question, choices, index):
    parsed = example("choice_data").parse_question({"instruction": instruction, "answer": answer})
    assert (parsed.question, parsed.choices, parsed.answer) == (question, choices, index)
    assert parsed.labels[index] == answer and parsed.instruction == instruction


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON", "test.json is not JSON"),
        ('{"instruction": 1}', "holds a dict"),
        (json.dumps([{"answer": "answer1"}]), "entry 1: KeyError.*instruction"),
        (json.dumps([{"instruction": ARC, "answer": "answer1"}, {"instruction": ARC, "answer": "answer4"}]), "entry 2"),
        (json.dumps([{"instruction": "How many?", "answer": "2"}]), "no 'Answer format:'"),
        (json.dumps([{"instruction": ARC.replace("Answer2:", "B:"), "answer": "answer1"}]), "are not all in"),
    ],
)
def test_broken_questions_are_refused_by_file_and_entry(example, tmp_path, content, message):
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        example("choice_data").read_questions(tmp_path / "test.json")


# --- a tiny language model --------------------------------------------------------------------------------------------

WORDS = ["why", "is", "it", "dark", "night", "sun", "fog", "lamp", "off", "on", "the", "a", "?", ":"]


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,  # the usual 0.02 leaves so small a model without anything to adapt
}


def word_tokenizer(**special):
    """A tokenizer that knows `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **special)


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **SIZES))


@pytest.fixture
def language_model_folder(tmp_path):
    """A tiny Llama with random weights and its tokenizer, as transformers saves them."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def write_questions(folder: Path, train: int = 8, test: int = 6) -> Path:
    """Questions whose answer is always "night"."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        entries = []
        for i in range(count):
            places = ["night", "a lamp off", "the fog"]
            places = places[i % 3 :] + places[: i % 3]
            listed = " ".join(f"Answer{k}: {text}" for k, text in enumerate(places, start=1))
            instruction = ARC.replace("Answer1: night Answer2: a lamp: off Answer3: fog", listed)
            instruction = instruction.replace("dark", "dark " * (1 + i % 4))
            entries.append({"instruction": instruction, "answer": f"answer{places.index('night') + 1}"})
        (folder / f"{split}.json").write_text(json.dumps(entries))
    return folder


def random_examples(commonsense, count: int = 7):
    """Prompts and choices of all lengths, not sorted."""
    random = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(0, 32, (length,), generator=random).tolist()

    return [
        commonsense.Example(
            tokens(2 + (5 * i) % 9), [tokens(1 + (i + k) % 4) for k in range(2 + i % 3)], [5] * (2 + i % 3), 0
        )
        for i in range(count)
    ]


@torch.no_grad()
def naive_log_likelihood(model, prompt: list[int], answer: list[int]) -> float:
    """One sequence at a time, no padding, no cache."""
    log_probabilities = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_batched_likelihood_is_that_of_whole_sequences(example, shared_prompt, adapted):
    commonsense = example("finetune_commonsense")
    model = tiny_llama().eval()
    if adapted:
        mapsurgery.patch(model, commonsense.TARGETS, rank=2, init="random")
        for name, parameter in model.named_parameters():
            if name.endswith("beta"):
                parameter.data.fill_(0.5)
    examples = random_examples(commonsense)
    found = commonsense.likelihoods(model, examples, batch_size=3, shared_prompt=shared_prompt)
    assert [len(values) for values in found] == [len(example.choices) for example in examples]
    for each, values in zip(examples, found, strict=True):
        expected = [naive_log_likelihood(model, each.prompt, choice) for choice in each.choices]
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_training_loss_has_the_gradient_of_whole_sequences(example):
    commonsense = example("finetune_commonsense")
    model = tiny_llama().double()
    pairs = [([1, 2, 3, 4], [5, 6]), ([7, 8], [9, 10, 11]), ([3] * 6, [1])]
    commonsense.answer_log_likelihood(model, pairs, torch.device("cpu")).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for prompt, answer in pairs:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        logits.gather(1, torch.tensor(answer)[:, None]).sum().backward()
    for got, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)


def test_parts_of_a_step_sum_to_the_step(example):
    commonsense = example("finetune_commonsense")
    task = commonsense.Task(random_examples(commonsense, 8), {})
    weights = []
    for micro_batch in (None, 3):
        torch.manual_seed(0)
        model = tiny_llama().double()
        groups = [{"params": list(model.parameters()), "lr": 1e-2}]
        result = commonsense.train(model, task, groups, epochs=2, seed=1, batch_size=8, micro_batch=micro_batch)
        weights.append((result.losses, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_vocabulary_is_applied_at_answers_only(example, monkeypatch):
    commonsense = example("finetune_commonsense")
    model = tiny_llama().eval()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    examples = [commonsense.Example([1] * 20, [[2, 3], [4]], [1, 1], 0)]
    commonsense.likelihoods(model, examples)
    assert seen == [1, 2]
    seen.clear()
    commonsense.answer_log_likelihood(model, [([1] * 20, [2, 3])], torch.device("cpu"))
    assert seen == [3]


def test_scores_by_hand(example):
    commonsense = example("finetune_commonsense")
    examples = [
        commonsense.Example([1, 2], [[3, 4], [5]], [4, 2], 0),
        commonsense.Example([1, 2], [[3], [5]], [2, 2], 1),
    ]
    found = [torch.tensor([-2.0, -1.5]), torch.tensor([-3.0, -1.0])]
    # Summed: the second, the second. By byte: -.5 against -.75, -1.5 against -.5. Right answers: 2 + 1 nats, 3 tokens.
    assert commonsense.scores(examples, found) == (0.5, 1.0, pytest.approx(math.e))


def test_prompt_and_choices_are_tokens_of_the_whole_text(example):
    commonsense, data = example("finetune_commonsense"), example("choice_data")
    question = data.parse_question({"instruction": ARC, "answer": "answer3"})
    tokenizer = word_tokenizer()
    found = commonsense.tokenize(question, tokenizer)
    assert tokenizer.decode(found.prompt).endswith(":") and len(found.choices) == 3 and found.answer == 2
    assert [tokenizer.decode(choice) for choice in found.choices] == ["night", "a lamp : off", "fog"]
    assert found.lengths == [5, 11, 3]
    assert commonsense.tokenize(question, tokenizer, max_length=3).prompt == found.prompt[-3:]
    prompt, answers = commonsense.STYLES["instruction"](question)
    assert ARC in prompt and answers[2] == "the correct answer is answer3"


def test_sets_are_drawn_and_named(example, tmp_path):
    commonsense = example("finetune_commonsense")
    folders = [write_questions(tmp_path / name) for name in ("easy", "hard")]
    tokenizer = word_tokenizer()
    task = commonsense.load_task(folders, tokenizer, train_samples=10, test_samples=4)
    assert len(task.train) == 10 and {name: len(test) for name, test in task.test.items()} == {"easy": 4, "hard": 4}
    assert len(commonsense.load_task(folders, tokenizer).train) == 16
    assert len(commonsense.load_task(folders, tokenizer, train_file=folders[0] / "test.json").train) == 6
    with pytest.raises(ValueError, match="17 questions to train on were asked for, there are 16"):
        commonsense.load_task(folders, tokenizer, train_samples=17)
    with pytest.raises(ValueError, match="two folders of the same name"):
        commonsense.load_task([folders[0], folders[0]], tokenizer)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        commonsense.load_task([tmp_path / "nowhere"], tokenizer)
    with pytest.raises(ValueError, match="style 'chat' is unknown"):
        commonsense.load_task(folders, tokenizer, style="chat")


@pytest.fixture
def commonsense_main(example, language_model_folder, tmp_path):
    """Run the example on tiny questions and a tiny model: ``commonsense_main(*options) -> exit code``."""
    data = write_questions(tmp_path / "darkness")
    fixed = ["--model", str(language_model_folder), "--data", str(data), "--device", "cpu", "--rank", "2"]
    output = ["--output", str(tmp_path / "adapter.safetensors")]
    return lambda *options: example("finetune_commonsense").main([*fixed, *output, *options])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.long),
        ["--style", "instruction", "--length-normalised", "--checkpointing", "--micro-batch", "2"],
        pytest.param(["--no-shared-prompt"], marks=pytest.mark.long),
    ],
    ids=["cloze", "instruction", "no-cache"],
)
def test_commonsense_learns_and_proves(commonsense_main, capsys, options):
    assert commonsense_main("--epochs", "20", "--lr", "0.02", "--batch-size", "4", *options) == 0
    out = capsys.readouterr().out
    assert "14 of 14 adapters act on the output and learn" in out
    assert re.search(r"PROVED  save -> load into a fresh model: .*log-likelihoods.*bitwise equal", out)
    assert "PROVED  merge into plain layers" in out
    before, after = (float(value) for value in re.findall(r"darkness +[\d.]+ +([\d.]+)", out))
    assert after < before / 2
    assert "q_proj" in out and "effective_rank" in out


def test_commonsense_in_bfloat16(commonsense_main, capsys):
    assert commonsense_main("--dtype", "bfloat16", "--epochs", "2") == 0
    assert capsys.readouterr().out.count("PROVED") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--targets", "*q_porj"], "q_proj"),
        (["--train-samples", "1000"], "1000 questions to train on"),
        (["--device-map", "auto"], "both place the model"),
        (["--lora-alpha", "2"], "--method map has no scaling"),
    ],
)
def test_wrong_option_of_commonsense_is_named_and_exits_with_2(commonsense_main, capsys, options, message):
    assert commonsense_main(*options) == 2
    assert message in capsys.readouterr().err


# --- GLUE's metrics and files -----------------------------------------------------------------------------------------


def test_metrics_of_known_values(example):
    metrics = example("metrics")
    predicted, targets = torch.tensor([1, 1, 0, 0, 1, 0]), torch.tensor([1, 0, 0, 1, 1, 0])
    assert metrics.accuracy(predicted, targets) == pytest.approx(4 / 6)
    assert metrics.f1(predicted, targets) == pytest.approx(2 / 3)
    # TP 2, TN 2, FP 1, FN 1: (4 - 1) / sqrt(3 3 3 3)
    assert metrics.matthews(predicted, targets) == pytest.approx(1 / 3)
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert metrics.pearson(x, y) == pytest.approx(0.8)
    assert metrics.pearson(-x, x.square()) == pytest.approx(-0.98437404)
    assert metrics.spearman(x.exp(), y.pow(3)) == pytest.approx(0.8)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert metrics.spearman(torch.tensor([0.0, 5.0, 5.0, 9.0]), x) == pytest.approx(math.sqrt(0.9))


def test_metrics_of_constant_predictions(example):
    metrics = example("metrics")
    ones, targets = torch.ones(4, dtype=torch.int64), torch.tensor([1, 0, 1, 0])
    assert metrics.matthews(ones, targets) == metrics.pearson(ones, targets) == metrics.spearman(ones, targets) == 0
    assert metrics.f1(1 - ones, targets) == metrics.f1(1 - ones, 1 - ones) == 0


def test_metrics_agree_with_numpy(example):
    numpy = pytest.importorskip("numpy")
    x, y = torch.randn(2, 200)
    assert example("metrics").pearson(x, y) == pytest.approx(numpy.corrcoef(x, y)[0, 1])
    a, b = (x > 0).long(), (y > 0.3).long()
    assert example("metrics").matthews(a, b) == pytest.approx(numpy.corrcoef(a, b)[0, 1])


MNLI_HEAD = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    "sentence1\tsentence2\tlabel1\tgold_label"
)
GLUE_FILES = {
    "cola": ("gj04\t1\t\tIt is dark .\ngj04\t0\t*\tDark it it .\n", [("It is dark .",), ("Dark it it .",)], [1, 0]),
    "sst2": ('sentence\tlabel\na "fine\x85 film \t1\nno\t0\n', [('a "fine\x85 film',), ("no",)], [1, 0]),
    "mrpc": (
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe said "no\r\tHe spoke\r\n',
        [('He said "no', "He spoke")],
        [1],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tnews\tf\t2012\t1\tnone\tnone\tA man\tThe man\t3.600\n",
        [("A man", "The man")],
        [3.6],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy ?\tHow ?\t0\n4\t5\tbroken\n",
        [("Why ?", "How ?")],
        [0],
    ),
    "mnli": (
        f"{MNLI_HEAD}\n0\t1\t2\tfiction\t( a )\t( b )\t(a)\t(b)\tA\tB\tneutral\tcontradiction\n",
        [("A", "B")],
        [2],
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tWho ?\tMe .\tnot_entailment\n", [("Who ?", "Me .")], [1]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\tA .\tB .\tentailment\n", [("A .", "B .")], [0]),
}


@pytest.mark.parametrize("name", GLUE_FILES)
def test_columns_of_every_task_are_read(example, tmp_path, name):
    data = example("glue_data")
    content, texts, targets = GLUE_FILES[name]
    for split in ("train", *data.TASKS[name].dev):
        (tmp_path / f"{split}.tsv").write_bytes(content.encode())
    train, test = data.load_splits(name, tmp_path)
    assert train.texts == texts and list(test) == list(data.TASKS[name].dev)
    torch.testing.assert_close(train.targets, torch.tensor(targets))
    assert all(split.texts == texts for split in test.values())


def test_all_eight_tasks_are_there(example):
    assert set(example("glue_data").TASKS) == set(GLUE_FILES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rte", "index\tsentence1\tlabel\n", "no column sentence2"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\n", r"train.tsv:2: 2 columns, 3 are needed"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\tmaybe\n", "train.tsv:2: label 'maybe' is none of entailment"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\thigh\n", "train.tsv:2: 'high' is not a number"),
        ("sst2", "fine\t1\nno label\n", "train.tsv:2: 1 columns"),
    ],
)
def test_broken_glue_file_is_refused_by_line(example, tmp_path, name, content, message):
    (tmp_path / "train.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        example("glue_data").load_splits(name, tmp_path)


def test_unknown_task_and_missing_file_are_named(example, tmp_path):
    load = example("glue_data").load_splits
    with pytest.raises(ValueError, match="no task 'wnli'; choose one of cola"):
        load("wnli", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train\.tsv: give the folder"):
        load("rte", tmp_path)


def test_hub_data_has_its_own_names(example, monkeypatch):
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return {"premise": ["A", "B"], "hypothesis": ["C", "D"], "label": [2, 0]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    train, test = example("glue_data").load_splits("mnli", "hub")
    assert asked == [("nyu-mll/glue", "mnli", s) for s in ("train", "validation_matched", "validation_mismatched")]
    assert train.texts == [("A", "C"), ("B", "D")] and train.targets.tolist() == [2, 0]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        example("glue_data").load_splits("mnli", "hub")


# --- a tiny encoder ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bert", "deberta-v2"])
def encoder_folder(request, tmp_path):
    """A tiny encoder with random weights and its tokenizer, as transformers saves them."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(request.param, vocab_size=32, max_position_embeddings=32, **SIZES)
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    word_tokenizer(cls_token="[CLS]", sep_token="[SEP]").save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def write_glue(folder: Path, name: str) -> Path:
    """Pairs whose label hangs on the first word of the second sentence."""
    rows = {"rte": ("label", ["entailment", "not_entailment"]), "stsb": ("score", ["4.5", "0.5"])}
    column, labels = rows[name]
    for split, count in (("train", 40), ("dev", 20)):
        lines = [
            f"why is it dark\t{('night', 'sun')[i % 2]} {'is it ' * (i % 3)}\t{labels[i % 2]}" for i in range(count)
        ]
        (folder / f"{split}.tsv").write_text("\n".join([f"sentence1\tsentence2\t{column}", *lines]) + "\n")
    return folder


@pytest.fixture
def glue_main(example, encoder_folder, tmp_path):
    """Run the example on tiny pairs and a tiny encoder: ``glue_main(task, *options) -> exit code``."""

    def main(task: str, *options: str) -> int:
        data = ["--task", task, "--data", str(write_glue(tmp_path, task)), "--output", str(tmp_path / "adapter")]
        fixed = ["--model", str(encoder_folder), "--device", "cpu", "--rank", "2"]
        return example("finetune_glue").main([*fixed, *data, *options])

    return main


@pytest.mark.parametrize(
    ("task", "metric"), [("rte", "accuracy"), pytest.param("stsb", "pearson", marks=pytest.mark.long)]
)
def test_glue_learns_and_proves(glue_main, capsys, task, metric):
    assert glue_main(task, "--epochs", "15", "--lr", "0.02", "--batch-size", "8") == 0
    out = capsys.readouterr().out
    assert "12 of 12 adapters act on the output and learn" in out
    assert re.search(r"PROVED  save -> load into a fresh model: .*bitwise equal", out)
    assert "PROVED  merge into plain layers" in out
    assert float(re.search(rf"dev +{metric} +-?[\d.]+ +(-?[\d.]+)", out).group(1)) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--targets", "*quary*"], "query"),
        (["--train-samples", "50"], "50 samples were asked for, train has 40"),
    ],
)
def test_wrong_option_of_glue_is_named_and_exits_with_2(glue_main, capsys, options, message):
    assert glue_main("rte", *options) == 2
    assert message in capsys.readouterr().err


def test_rows_are_padded_and_predictions_keep_their_order(example, encoder_folder, tmp_path):
    glue = example("finetune_glue")
    model, tokenizer = glue.load_model(str(encoder_folder), 2)
    task = glue.load_task("rte", write_glue(tmp_path, "rte"), tokenizer, max_length=10)
    data = task.test["dev"]
    whole = glue.predict(model, data)
    with torch.no_grad():
        for i in (0, 7, 19):
            alone = model(**{name: rows[i][None] for name, rows in data.columns.items()}).logits[0]
            torch.testing.assert_close(whole[i], alone, rtol=1e-4, atol=1e-5)
    batch = data.batch([0, 2], torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == [len(data.columns["input_ids"][i]) for i in (0, 2)]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_score_of_mnli_is_the_mean_of_both_files(example, monkeypatch):
    glue, data = example("finetune_glue"), example("glue_data")
    values = {"dev_matched": {"accuracy": 0.5}, "dev_mismatched": {"accuracy": 0.75}}
    monkeypatch.setattr(glue, "evaluate", lambda model, task, runtime: values)
    assert glue.score(torch.nn.Identity(), types.SimpleNamespace(kind=data.TASKS["mnli"])) == 0.625


# --- packaged models, real data ---------------------------------------------------------------------------------------


def data_folder(name: str) -> Path:
    """Folder of a real data set below $MAPSURGERY_DATA, or skip."""
    root = os.environ.get("MAPSURGERY_DATA")
    if root is None:
        pytest.skip("MAPSURGERY_DATA does not name a folder of data sets")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


def need_packaged(function) -> None:
    """Skip with the loader's own words where its package is not installed."""
    try:
        function()
    except importlib.import_module("packaged").MissingPackageError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_map_lowers_the_perplexity_of_right_answers_of_a_real_model(example, tmp_path, capsys):
    data = data_folder("commonsense/ARC-Easy")
    need_packaged(example("packaged").smollm2)
    options = "--model packaged --train-samples 48 --test-samples 24 --epochs 1 --micro-batch 4 --rank 8 --lr 1e-3"
    arguments = [*options.split(), "--data", str(data), "--output", str(tmp_path / "adapter.safetensors")]
    assert example("finetune_commonsense").main(arguments) == 0
    before, after = (float(v) for v in re.findall(r"ARC-Easy +[\d.]+ +([\d.]+)", capsys.readouterr().out))
    assert after < before / 2


@pytest.mark.slow
def test_map_beats_the_linear_probe_on_real_sentences(example, tmp_path, capsys):
    data = data_folder("sst2")
    need_packaged(example("packaged").minilm)
    options = "--model packaged --task sst2 --train-samples 960 --max-length 32 --epochs 2 --lr 1e-3 --device cpu"
    arguments = [*options.split(), "--data", str(data), "--output", str(tmp_path / "adapter.safetensors")]
    assert example("finetune_glue").main(arguments) == 0
    found = re.search(r"dev +accuracy +([\d.]+) +([\d.]+)", capsys.readouterr().out)
    probe, adapted = (float(value) for value in found.groups())
    assert probe > 0.7 and adapted > probe
