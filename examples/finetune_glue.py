#!/usr/bin/env python3
"""Fine-tune a text encoder on a task of GLUE, and prove what comes out.

    python examples/finetune_glue.py --model microsoft/deberta-v3-base --task mrpc --data hub
    python examples/finetune_glue.py --model FacebookAI/roberta-base --task cola --data path/to/CoLA --rank 16
    python examples/finetune_glue.py --model packaged --task sst2 --data path/to/SST-2 --train-samples 960 \\
        --max-length 32 --epochs 2 --lr 1e-3

The script shows the plan, scores a linear probe on the frozen features as the baseline (for a regression, the untrained
head), adapts and verifies the model, trains it with its new head, saves both, and proves that a fresh model which loads
the file computes the same logits, and so does the model after its adapters were merged. It exits with 1 if a proof or
the verification fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapting
import packaged
import torch
import torch.nn.functional as F
import training
from command import exit_code
from glue_data import TASKS, GlueTask, Split, load_splits
from linear_probe import fit_linear_probe
from metrics import METRICS
from proving import prove
from runtime import Runtime
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from training import WARMUP, Training, fit, minibatches

import mapsurgery
from mapsurgery.tables import render

TARGETS = ("*layer.*",)
"""All linear layers of the blocks of a BERT, RoBERTa, DeBERTa, ELECTRA, DistilBERT or MPNet."""
MERGE_TOLERANCE = 1e-4
"""Largest difference of a logit that merging may cause, in units of the largest logit (float32 rounds W' once)."""
PROOF_SAMPLES = 32
VERIFY_SAMPLES = 4
PROBE_SAMPLES = 5000
"""Samples that the linear probe is fitted to, at most."""
SCORING_BATCH = 64


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Samples as tokens."""

    columns: dict[str, list[Tensor]]
    """What the model takes (input_ids, attention_mask ...), a tensor of each sample's own length."""
    targets: Tensor
    """Classes, int64 (n,), or values of a regression, float32 (n,)."""
    padding: int
    """Token that fills short rows."""

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Sequence[int]) -> Encoded:
        """Some of the samples."""
        columns = {name: [rows[i] for i in indices] for name, rows in self.columns.items()}
        return Encoded(columns, self.targets[list(indices)], self.padding)

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Inputs of some samples, each (b, t), as long as the longest of them."""
        return {
            name: pad_sequence(
                [rows[i] for i in indices],
                batch_first=True,
                padding_value=self.padding if name == "input_ids" else 0,
            ).to(device)
            for name, rows in self.columns.items()
        }


@dataclass(frozen=True)
class Task:
    """A task of GLUE: samples to train on, and those to test on by the name of their file."""

    kind: GlueTask
    train: Encoded
    test: dict[str, Encoded]


def load_task(
    name: str,
    source: str | Path,
    tokenizer: Any,
    *,
    max_length: int = 128,
    train_samples: int | None = None,
    test_samples: int | None = None,
    seed: int = 0,
) -> Task:
    """Read and tokenise a task.

    Args:
        name: one of ``glue_data.TASKS``: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte.
        source: folder of the task's TSV files, or ``"hub"``.
        max_length: tokens of a sample, of both sentences together; what is beyond is cut off.
        train_samples, test_samples: drawn at random; all if None.
        seed: of the drawing.

    Raises:
        FileNotFoundError, ValueError, ImportError: see ``glue_data.load_splits``.
    """
    train, test = load_splits(name, source)

    def encoded(split: Split, count: int | None, what: str) -> Encoded:
        return encode(_draw(split, count, seed, what), tokenizer, max_length)

    return Task(
        TASKS[name],
        encoded(train, train_samples, "train"),
        {key: encoded(split, test_samples, key) for key, split in test.items()},
    )


def _draw(split: Split, count: int | None, seed: int, what: str) -> Split:
    if count is None:
        return split
    if count > len(split.texts):
        raise ValueError(f"{count} samples were asked for, {what} has {len(split.texts)}")
    chosen = torch.randperm(len(split.texts), generator=torch.Generator().manual_seed(seed))[:count]
    return Split([split.texts[i] for i in chosen.tolist()], split.targets[chosen])


def encode(split: Split, tokenizer: Any, max_length: int) -> Encoded:
    """Tokens of single sentences or of pairs."""
    table = tokenizer(*map(list, zip(*split.texts, strict=True)), truncation=True, max_length=max_length)
    columns = {name: [torch.tensor(row) for row in rows] for name, rows in table.items()}
    return Encoded(columns, split.targets, tokenizer.pad_token_id)


# --- model ------------------------------------------------------------------------------------------------------------


class SentenceClassifier(nn.Module):
    """A sentence encoder and a linear head on the mean of its token vectors."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, outputs)

    def forward(self, **inputs: Tensor) -> Any:
        """``logits`` (b, outputs) of token inputs (b, t)."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        states = self.encoder(**inputs).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(mean_of_tokens(states, inputs["attention_mask"])))


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Mean (b, d) of the vectors (b, t, d) that are not padding."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def load_model(name: str, outputs: int, *, seed: int = 0) -> tuple[Any, Any]:
    """An encoder with a new head, and its tokenizer; the same call gives the same weights again.

    Args:
        name: of a model on the hub, a folder, or ``"packaged"`` for all-MiniLM-L6-v2 (see packaged.py).
        outputs: of the head: classes, or 1 for a regression.
        seed: of the head.
    """
    torch.manual_seed(seed)
    if name == "packaged":
        encoder, tokenizer = packaged.minilm()
        return SentenceClassifier(encoder, outputs), tokenizer
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=outputs, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(name)


def head_names(model: Any) -> list[str]:
    """Paths of the modules on top of the encoder (pooler, classifier), which are new and trained in full."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


# --- scores -----------------------------------------------------------------------------------------------------------


def predict(model: nn.Module, data: Encoded, runtime: Runtime | None = None) -> Tensor:
    """Logits, float32 (n, outputs) on the CPU. Leaves the model in eval mode."""
    return _compute(model, lambda inputs: model(**inputs).logits, data, runtime)


def frozen_features(model: Any, data: Encoded, runtime: Runtime | None = None) -> Tensor:
    """Means over the tokens of the encoder's last states, float32 (n, d) on the CPU."""
    encoder = getattr(model, model.base_model_prefix)

    def features(inputs: dict[str, Tensor]) -> Tensor:
        return mean_of_tokens(encoder(**inputs).last_hidden_state, inputs["attention_mask"])

    return _compute(model, features, data, runtime)


@torch.no_grad()
def _compute(
    model: nn.Module, function: Callable[[dict[str, Tensor]], Tensor], data: Encoded, runtime: Runtime | None
) -> Tensor:
    """What ``function`` gives for all samples, in their order."""
    model.eval()
    runtime = runtime or Runtime.of(model)
    lengths = [len(row) for row in data.columns["input_ids"]]
    order = torch.tensor(sorted(range(len(data)), key=lengths.__getitem__))  # equal lengths need no padding
    found = []
    for part in tqdm(order.split(SCORING_BATCH), "scoring", leave=False, disable=None):
        with runtime.autocast():
            found.append(function(data.batch(part.tolist(), runtime.device)).float().cpu())
    return torch.cat(found)[order.argsort()]


def measure(kind: GlueTask, logits: Tensor, targets: Tensor) -> dict[str, float]:
    """The task's metrics by their names: logits (n, outputs), targets (n,)."""
    predicted = logits.argmax(1) if kind.labels else logits.squeeze(1)
    return {metric: METRICS[metric](predicted, targets) for metric in kind.metrics}


def evaluate(model: nn.Module, task: Task, runtime: Runtime | None = None) -> dict[str, dict[str, float]]:
    """All metrics of each file to test on, by their names."""
    return {name: measure(task.kind, predict(model, data, runtime), data.targets) for name, data in task.test.items()}


def score(model: nn.Module, task: Task, runtime: Runtime | None = None) -> float:
    """The task's first metric, the mean over its files to test on (matched and mismatched of MNLI)."""
    return statistics.mean(values[task.kind.metrics[0]] for values in evaluate(model, task, runtime).values())


def baseline(model: nn.Module, task: Task, runtime: Runtime | None = None) -> dict[str, dict[str, float]]:
    """As `evaluate`: of a linear probe on the frozen features; of the untrained head where the task is a regression."""
    if not task.kind.labels:
        return evaluate(model, task, runtime)
    chosen = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:PROBE_SAMPLES]
    features = frozen_features(model, task.train.subset(chosen.tolist()), runtime)
    probe = fit_linear_probe(features, task.train.targets[chosen], task.kind.outputs)
    return {
        name: measure(task.kind, probe.scores(frozen_features(model, data, runtime)), data.targets)
        for name, data in task.test.items()
    }


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    task: Task,
    groups: Sequence[dict[str, Any]],
    *,
    epochs: int,
    seed: int,
    batch_size: int = 32,
    warmup: float = WARMUP,
    runtime: Runtime | None = None,
) -> Training:
    """Train in place with AdamW: cross-entropy, or the squared error of a regression. Leaves training mode on.

    Args:
        groups: parameter groups with their learning rates, of ``mapsurgery.param_groups`` or any others.
        seed: of the order of the samples and of dropout.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    torch.manual_seed(seed)
    runtime = runtime or Runtime.of(model)
    data = task.train

    def losses(batch: list[int]) -> Iterator[Tensor]:
        with runtime.autocast():
            logits = model(**data.batch(batch, runtime.device)).logits.float()
        targets = data.targets[batch].to(logits.device)
        yield F.cross_entropy(logits, targets) if task.kind.labels else F.mse_loss(logits.squeeze(1), targets)

    model.train()
    return fit(groups, list(minibatches(len(data), batch_size, epochs, seed)), losses, runtime, warmup=warmup)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a text encoder on a task of GLUE, and prove what comes out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", required=True, help="name on the hub, a folder, or packaged (all-MiniLM-L6-v2)")
    group.add_argument("--task", choices=TASKS, required=True)
    group.add_argument("--data", required=True, metavar="FOLDER", help="the task's TSV files, or hub")
    group.add_argument("--max-length", type=adapting.positive, default=128, help="tokens of a sample")
    group.add_argument("--train-samples", type=adapting.positive, help="drawn at random; all if left out")
    group.add_argument("--test-samples", type=adapting.positive, help="of each file to test on; all if left out")
    adapting.add_options(parser.add_argument_group("adapters"), TARGETS, rank=8, lr=1e-3)
    group = parser.add_argument_group("training")
    training.add_options(group, epochs=3, batch_size=32, output="glue-adapter.safetensors")
    return parser.parse_args(argv)


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """All that the command line's options resolve to."""

    runtime: Runtime
    build: Callable[[], Any]
    """Makes the model as it is before patching: the same weights each time."""
    model: Any
    task: Task


def prepare(args: argparse.Namespace) -> Run:
    """Load and patch the model, read the data: every mistake in an option shows here, before any time is spent."""
    if args.threads:
        torch.set_num_threads(args.threads)
    runtime = Runtime.choose(args.device, args.amp)

    def load() -> tuple[Any, Any]:
        model, tokenizer = load_model(args.model, TASKS[args.task].outputs, seed=args.seed)
        return model.to(runtime.device), tokenizer

    model, tokenizer = load()
    task = load_task(
        args.task,
        args.data,
        tokenizer,
        max_length=args.max_length,
        train_samples=args.train_samples,
        test_samples=args.test_samples,
        seed=args.seed,
    )
    counts = ", ".join(f"{name} {len(data):,}" for name, data in task.test.items())
    print(f"{args.model} on {args.task}: {len(task.train):,} samples to train on; to test on: {counts}\n{runtime}\n")
    adapting.adapt(model, args, head_names(model))
    return Run(runtime, lambda: load()[0], model, task)


def run(prepared: Run, args: argparse.Namespace) -> bool:
    """Score, verify, train, save and prove; whether both proofs hold."""
    model, task, runtime = prepared.model, prepared.task, prepared.runtime
    with mapsurgery.disabled(model):
        before = baseline(model, task, runtime)
    print(
        f"{mapsurgery.verify(model, **task.train.batch(range(min(VERIFY_SAMPLES, len(task.train))), runtime.device))}\n"
    )

    print(f"training: {args.epochs} epochs of {len(task.train):,} samples, {args.batch_size} a step, lr {args.lr:g}")
    result = train(
        model,
        task,
        adapting.groups(model, args),
        epochs=args.epochs,
        seed=args.seed,
        batch_size=args.batch_size,
        warmup=args.warmup,
        runtime=runtime,
    )
    print(f"  {len(result.losses)} steps, median {statistics.median(result.seconds):.3f} s\n")
    mapsurgery.save(model, args.output)
    print(f"{table(task, before, evaluate(model, task, runtime))}\n\n{adapting.summary(model)}\n")

    print("proofs, on samples of the test files:")
    sample = next(iter(task.test.values()))
    sample = sample.subset(range(min(PROOF_SAMPLES, len(sample))))
    exact = Runtime(runtime.device, None)
    holds = prove(model, prepared.build, args.output, lambda model: predict(model, sample, exact), MERGE_TOLERANCE)
    print(f"\nsaved to {args.output}, {args.output.stat().st_size / 1e6:.2f} MB")
    return holds


def table(task: Task, before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> str:
    """Scores as a table, a row for each file and metric."""
    rows = [
        [name, metric, f"{before[name][metric]:.4f}", f"{value:.4f}"]
        for name, values in after.items()
        for metric, value in values.items()
    ]
    first = "linear probe" if task.kind.labels else "untrained head"
    return render("scores", ["file", "metric", first, "trained"], rows)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit code: 1 for a failed proof or verification, 2 for a wrong option."""
    args = parse_args(argv)
    return exit_code(lambda: prepare(args), lambda prepared: run(prepared, args))


if __name__ == "__main__":
    sys.exit(main())
