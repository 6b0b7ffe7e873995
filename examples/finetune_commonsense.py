#!/usr/bin/env python3
"""Fine-tune a causal language model on commonsense reasoning, and prove what comes out.

    python examples/finetune_commonsense.py --model meta-llama/Llama-3.1-8B --dtype bfloat16 --device-map auto \\
        --train-file commonsense_170k.json --data dataset/boolq dataset/piqa dataset/ARC-Easy --style instruction
    python examples/finetune_commonsense.py --model packaged --data path/to/ARC-Easy path/to/openbookqa
    python examples/finetune_commonsense.py --model packaged --data path/to/ARC-Easy --train-samples 200 \\
        --test-samples 150 --epochs 1 --micro-batch 4

The choice that the model holds for the most likely is its answer. Defaults follow the usual protocol on these tasks
(LLM-Adapters, arXiv 2304.01933; DoRA, arXiv 2402.09353): rank 32 on all projections of the attention and the
feed-forward, three epochs, 16 questions a step. The script shows the plan and the scores of the base, adapts and
verifies the model, trains it, saves the adapter, and proves that a fresh model which loads the file gives every choice
the same likelihood, and so does the model after its adapters were merged. It exits with 1 if a proof or the
verification fails.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import adapting
import packaged
import torch
import torch.nn.functional as F
import training
from choice_data import ChoiceQuestion, read_questions
from command import exit_code
from proving import prove
from runtime import Runtime
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from training import WARMUP, Training, fit, minibatches

import mapsurgery
from mapsurgery.tables import render

TARGETS = ("*q_proj", "*k_proj", "*v_proj", "*o_proj", "*up_proj", "*gate_proj", "*down_proj")
"""All projections of a Llama, Mistral, Qwen or Gemma; other architectures call them otherwise."""
DTYPES: Mapping[str, Any] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest change of a log-likelihood by merging, over the largest one, by the type that W' is rounded to."""
PROOF_QUESTIONS = 16
VERIFY_QUESTIONS = 2


# --- questions as tokens ----------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A question as tokens: what each choice is appended to, and the choices."""

    prompt: list[int]
    """At least two tokens."""
    choices: list[list[int]]
    """At least one token each."""
    lengths: list[int]
    """Bytes of each choice's text, for the length-normalised score."""
    answer: int


@dataclass(frozen=True)
class Task:
    """Questions to train on, and those to test on by the name of their set."""

    train: list[Example]
    test: dict[str, list[Example]]


def cloze(question: ChoiceQuestion) -> tuple[str, list[str]]:
    """The question alone; each choice is a continuation (as in EleutherAI's lm-evaluation-harness)."""
    return f"Question: {question.question}\nAnswer:", [f" {choice}" for choice in question.choices]


def instruction(question: ChoiceQuestion) -> tuple[str, list[str]]:
    """All choices shown, and their labels to choose from: the prompt and the answers of LLM-Adapters."""
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        f"### Instruction:\n{question.instruction}\n\n### Response:\n"
    )
    return prompt, [f"the correct answer is {label}" for label in question.labels]


STYLES: dict[str, Callable[[ChoiceQuestion], tuple[str, list[str]]]] = {"cloze": cloze, "instruction": instruction}


def load_task(
    folders: Iterable[str | Path],
    tokenizer: Any,
    *,
    train_file: str | Path | None = None,
    style: str = "cloze",
    train_samples: int | None = None,
    test_samples: int | None = None,
    max_length: int = 512,
    seed: int = 0,
) -> Task:
    """Read and tokenise questions.

    Args:
        folders: each holds one set of questions as train.json and test.json, and names it.
        train_file: one file to train on in place of the train.json of all folders.
        style: how a question is put, one of `STYLES`.
        train_samples: questions to train on, drawn from all sets together; all if None.
        test_samples: questions of each set to test on; all if None.
        max_length: tokens of a prompt; of a longer one the end is kept.
        seed: of the drawing.

    Raises:
        FileNotFoundError, ValueError: naming the file, or the number that is too large.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown; choose one of {', '.join(STYLES)}")
    paths = [Path(folder) for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"two folders of the same name: {', '.join(map(str, paths))}")
    files = [Path(train_file)] if train_file else [path / "train.json" for path in paths]
    train = [question for file in files for question in read_questions(file)]
    test = {path.name: read_questions(path / "test.json") for path in paths}

    def tokens(questions: list[ChoiceQuestion], count: int | None, where: str) -> list[Example]:
        drawn = draw(questions, count, seed, where)
        return [tokenize(question, tokenizer, style, max_length) for question in drawn]

    return Task(
        tokens(train, train_samples, "to train on"),
        {name: tokens(questions, test_samples, f"of {name} to test on") for name, questions in test.items()},
    )


def draw(questions: list[ChoiceQuestion], count: int | None, seed: int, where: str) -> list[ChoiceQuestion]:
    """``count`` questions in random order, or all of them."""
    if count is not None and count > len(questions):
        raise ValueError(f"{count} questions {where} were asked for, there are {len(questions)}")
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
    return [questions[index] for index in order[:count].tolist()]


def tokenize(question: ChoiceQuestion, tokenizer: Any, style: str = "cloze", max_length: int = 512) -> Example:
    """Tokens of the prompt and of each choice as it stands after the prompt."""
    text, choices = STYLES[style](question)
    prompt = tokenizer(text)["input_ids"]

    def continuation(choice: str) -> list[int]:
        whole = tokenizer(text + choice)["input_ids"]
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return whole[len(prompt) :]
        return tokenizer(choice, add_special_tokens=False)["input_ids"]  # a token that would span the border

    lengths = [len(choice.strip().encode()) for choice in choices]
    return Example(prompt[-max_length:], [continuation(choice) for choice in choices], lengths, question.answer)


# --- model ------------------------------------------------------------------------------------------------------------


def load_model(
    name: str, *, dtype: str = "auto", device_map: str | None = None, attention: str | None = None
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        name: of a model on the hub, a folder, or ``"packaged"`` for SmolLM2-135M-Instruct (see packaged.py).
        dtype: of the weights, one of `DTYPES`; the packaged model's "auto" is float32.
        device_map: where transformers puts the layers ("auto" spreads them); None leaves all on the CPU.
        attention: transformers' ``attn_implementation``.
    """
    if name == "packaged":
        model, tokenizer = packaged.smollm2()
        return (model if dtype == "auto" else model.to(DTYPES[dtype])), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], device_map=device_map, **options)
    return model, AutoTokenizer.from_pretrained(name)


# --- likelihoods ------------------------------------------------------------------------------------------------------


def answer_inputs(pairs: Sequence[tuple[list[int], list[int]]], device: torch.device) -> dict[str, Any]:
    """What the model's forward takes for prompts and their continuations, padded on the left.

    The continuations then stand at the right end, and `logits_to_keep` spares the vocabulary's matrix all the rest.
    """
    rows = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    ids, mask = _padded(rows, "left", device)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "logits_to_keep": 1 + max(len(answer) for _, answer in pairs),
        "use_cache": False,
    }


def answer_log_likelihood(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], device: torch.device
) -> Tensor:
    """Summed log-likelihood of each continuation after its prompt, float32 (pairs,), with a gradient."""
    inputs = answer_inputs(pairs, device)
    logits = model(**inputs).logits[:, :-1]
    answers, mask = _padded([torch.tensor(answer) for _, answer in pairs], "left", device)
    return _summed(logits, answers, mask)


def _summed(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum over each row's tokens of their log-likelihood: logits (n, t, vocabulary), targets and mask (n, t)."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.to(logits.device).flatten(), reduction="none")
    return -(losses.view(mask.shape) * mask.to(logits.device)).sum(1)


def _padded(rows: list[Tensor], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of equal length, and a mask, int64, that is 0 on the padding (whose token does not matter)."""
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def _choices_after_shared_prompt(model: nn.Module, batch: Sequence[Example], device: torch.device) -> Tensor:
    """Log-likelihood of all choices of all examples, in a row; each prompt is computed once.

    The prompt goes into the cache but for its last token, which begins each continuation: every logit of the second
    pass is then one that counts.
    """
    ids, mask = _padded([torch.tensor(example.prompt[:-1]) for example in batch], "left", device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    first = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = first.past_key_values
    owners = torch.tensor([i for i, example in enumerate(batch) for _ in example.choices], device=device)
    cache.reorder_cache(owners)
    choices = [torch.tensor(choice) for example in batch for choice in example.choices]
    targets, target_mask = _padded(choices, "right", device)
    last = torch.tensor([example.prompt[-1] for example in batch], device=device)[owners]
    logits = model(
        input_ids=torch.cat([last[:, None], targets[:, :-1]], dim=1),
        attention_mask=torch.cat([mask[owners], target_mask], dim=1),
        position_ids=mask.sum(1)[owners, None] + torch.arange(targets.shape[1], device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return _summed(logits, targets, target_mask)


def _choices_alone(model: nn.Module, batch: Sequence[Example], device: torch.device) -> Tensor:
    """The same, each choice with its prompt anew: for models without a cache of keys and values."""
    pairs = [(example.prompt, choice) for example in batch for choice in example.choices]
    return answer_log_likelihood(model, pairs, device)


@torch.no_grad()
def likelihoods(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    shared_prompt: bool = True,
    runtime: Runtime | None = None,
) -> list[Tensor]:
    """Summed log-likelihood of each example's choices, float32 (choices,) on the CPU. Leaves the model in eval mode.

    Args:
        batch_size: questions at a time.
        shared_prompt: compute a prompt once for all of its choices; False for models without a cache that can be
            reordered (state-space models).
    """
    model.eval()
    runtime = runtime or Runtime.of(model)
    compute = _choices_after_shared_prompt if shared_prompt else _choices_alone
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))  # equal lengths need no padding
    found: dict[int, Tensor] = {}
    for start in tqdm(range(0, len(order), batch_size), "scoring", leave=False, disable=None):
        indices = order[start : start + batch_size]
        batch = [examples[i] for i in indices]
        with runtime.autocast():
            values = compute(model, batch, runtime.device).cpu()
        found |= zip(indices, values.split([len(example.choices) for example in batch]), strict=True)
    return [found[i] for i in range(len(examples))]


# --- scores -----------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Of one set of questions."""

    accuracy: float
    """Share of questions whose right choice has the largest likelihood."""
    normalised: float
    """The same by likelihood per byte of the choice, which takes away the advantage of short choices."""
    perplexity: float
    """Of the right answers' tokens."""


def scores(examples: Sequence[Example], found: Sequence[Tensor]) -> Scores:
    """Scores of ``examples`` whose choices have the log-likelihoods ``found``."""
    right = [int(values.argmax()) == e.answer for e, values in zip(examples, found, strict=True)]
    normalised = [
        int((values / torch.tensor(e.lengths)).argmax()) == e.answer for e, values in zip(examples, found, strict=True)
    ]
    total = sum(float(values[e.answer]) for e, values in zip(examples, found, strict=True))
    tokens = sum(len(e.choices[e.answer]) for e in examples)
    return Scores(statistics.mean(right), statistics.mean(normalised), math.exp(-total / tokens))


def evaluate(model: nn.Module, task: Task, **options: Any) -> dict[str, Scores]:
    """Scores of each set to test on; ``options`` are those of `likelihoods`."""
    return {name: scores(examples, likelihoods(model, examples, **options)) for name, examples in task.test.items()}


def score(model: nn.Module, task: Task, *, normalised: bool = False, **options: Any) -> float:
    """Accuracy, the mean over the sets; ``options`` are those of `likelihoods`."""
    found = evaluate(model, task, **options).values()
    return statistics.mean(each.normalised if normalised else each.accuracy for each in found)


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    task: Task,
    groups: Sequence[dict[str, Any]],
    *,
    epochs: int,
    seed: int,
    batch_size: int = 16,
    micro_batch: int | None = None,
    warmup: float = WARMUP,
    runtime: Runtime | None = None,
) -> Training:
    """Train on the right answers' tokens, in place, with AdamW; leaves the model in training mode.

    Args:
        groups: parameter groups with their learning rates, of ``mapsurgery.param_groups`` or any others.
        seed: of the order of the questions and of dropout.
        micro_batch: questions of a step that are computed at a time, those of like length together; all if None. The
            step is the same, its memory and its padding are less.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    torch.manual_seed(seed)
    runtime = runtime or Runtime.of(model)
    pairs = [(example.prompt, example.choices[example.answer]) for example in task.train]

    def losses(batch: list[int]) -> Iterator[Tensor]:
        chosen = sorted((pairs[i] for i in batch), key=lambda pair: len(pair[0]) + len(pair[1]))
        tokens = sum(len(answer) for _, answer in chosen)
        size = micro_batch or len(chosen)
        for start in range(0, len(chosen), size):
            with runtime.autocast():
                found = answer_log_likelihood(model, chosen[start : start + size], runtime.device)
            yield -found.sum() / tokens

    model.train()
    return fit(groups, list(minibatches(len(pairs), batch_size, epochs, seed)), losses, runtime, warmup=warmup)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a causal language model on commonsense reasoning, and prove what comes out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_options(parser.add_argument_group("model"))
    _add_data_options(parser.add_argument_group("questions"))
    adapting.add_options(parser.add_argument_group("adapters"), TARGETS, rank=32, lr=2e-4)
    group = parser.add_argument_group("training")
    training.add_options(group, epochs=3, batch_size=16, output="commonsense-adapter.safetensors")
    group.add_argument("--micro-batch", type=adapting.positive, help="questions of a step at a time; all if left out")
    return parser.parse_args(argv)


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", required=True, help="name on the hub, a folder, or packaged (SmolLM2-135M-Instruct)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto is the file's own")
    group.add_argument("--device-map", help="transformers' placement of the layers, such as auto; rules out --device")
    group.add_argument("--attention", help="transformers' attn_implementation: sdpa, flash_attention_2, eager ...")
    group.add_argument("--checkpointing", action="store_true", help="compute activations anew in the backward pass")
    group.add_argument(
        "--no-shared-prompt", action="store_true", help="score each choice apart (models without a cache of keys)"
    )


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data", nargs="+", required=True, metavar="FOLDER", help="folders with train.json and test.json, one of a set"
    )
    group.add_argument("--train-file", metavar="JSON", help="train on this file, such as commonsense_170k.json")
    group.add_argument("--style", choices=STYLES, default="cloze", help="how a question is put")
    group.add_argument("--train-samples", type=adapting.positive, help="questions to train on; all if left out")
    group.add_argument("--test-samples", type=adapting.positive, help="of each set to test on; all if left out")
    group.add_argument("--max-length", type=adapting.positive, default=512, help="tokens of a prompt")
    group.add_argument("--length-normalised", action="store_true", help="judge by the likelihood per byte of a choice")


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """All that the command line's options resolve to."""

    runtime: Runtime
    build: Callable[[], Any]
    """Makes the model as it is before patching."""
    model: Any
    task: Task


def prepare(args: argparse.Namespace) -> Run:
    """Read the questions, load and patch the model: every mistake in an option shows here."""
    if args.device_map and args.device != "auto":
        raise ValueError(f"--device {args.device} and --device-map {args.device_map} both place the model: give one")
    if args.threads:
        torch.set_num_threads(args.threads)
    runtime = Runtime.choose(args.device, args.amp)

    def load() -> tuple[Any, Any]:
        model, tokenizer = load_model(
            args.model, dtype=args.dtype, device_map=args.device_map, attention=args.attention
        )
        return (model if args.device_map else model.to(runtime.device)), tokenizer

    model, tokenizer = load()
    if args.device_map:
        runtime = Runtime(Runtime.of(model).device, runtime.amp)
    task = load_task(
        args.data,
        tokenizer,
        train_file=args.train_file,
        style=args.style,
        train_samples=args.train_samples,
        test_samples=args.test_samples,
        max_length=args.max_length,
        seed=args.seed,
    )
    counts = ", ".join(f"{name} {len(examples):,}" for name, examples in task.test.items())
    print(f"{args.model}: {len(task.train):,} questions to train on; to test on: {counts}\n{runtime}\n")
    adapting.adapt(model, args)
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    return Run(runtime, lambda: load()[0], model, task)


def run(prepared: Run, args: argparse.Namespace) -> bool:
    """Score, verify, train, save and prove; whether both proofs hold."""
    model, task, runtime = prepared.model, prepared.task, prepared.runtime
    options: dict[str, Any] = {"runtime": runtime, "shared_prompt": not args.no_shared_prompt}
    with mapsurgery.disabled(model):
        before = evaluate(model, task, **options)
    print(f"{table('before', before, args.length_normalised)}\n")
    pairs = [(example.prompt, example.choices[example.answer]) for example in task.train[:VERIFY_QUESTIONS]]
    print(f"{mapsurgery.verify(model, **answer_inputs(pairs, runtime.device))}\n")

    print(f"training: {args.epochs} epochs of {len(task.train):,} questions, {args.batch_size} a step, lr {args.lr:g}")
    groups = adapting.groups(model, args)
    result = train(
        model,
        task,
        groups,
        epochs=args.epochs,
        seed=args.seed,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        warmup=args.warmup,
        runtime=runtime,
    )
    print(f"  {len(result.losses)} steps, median {statistics.median(result.seconds):.3f} s\n")
    mapsurgery.save(model, args.output)
    print(f"{table('after', evaluate(model, task, **options), args.length_normalised)}\n\n{adapting.summary(model)}\n")

    print("proofs, on questions of the test sets:")
    sample = [example for examples in task.test.values() for example in examples[:PROOF_QUESTIONS]]
    exact = {**options, "runtime": Runtime(runtime.device, None)}
    holds = prove(
        model,
        prepared.build,
        args.output,
        lambda model: torch.cat(likelihoods(model, sample, **exact)),
        MERGE_TOLERANCE[model.dtype],
        "log-likelihoods",
    )
    print(f"\nsaved to {args.output}, {args.output.stat().st_size / 1e6:.2f} MB")
    return holds


def table(title: str, found: dict[str, Scores], normalised: bool) -> str:
    """Scores as a table, a row for each set."""
    rows = [
        [name, f"{s.normalised if normalised else s.accuracy:.4f}", f"{s.perplexity:.2f}"] for name, s in found.items()
    ]
    mean = statistics.mean(s.normalised if normalised else s.accuracy for s in found.values())
    columns = ["set", "accuracy by likelihood per byte" if normalised else "accuracy", "perplexity of right answers"]
    return render(title, columns, [*rows, ["mean", f"{mean:.4f}", ""]])


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit code: 1 for a failed proof or verification, 2 for a wrong option."""
    args = parse_args(argv)
    return exit_code(lambda: prepare(args), lambda prepared: run(prepared, args))


if __name__ == "__main__":
    sys.exit(main())
