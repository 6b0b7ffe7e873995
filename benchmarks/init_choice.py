"""Which start should be the default? MAP's starts, units and learning rates, compared by training on real tasks.

    python benchmarks/init_choice.py run vit --seeds 3          # trains; appends to results/init_choice.csv; resumable
    python benchmarks/init_choice.py run text --sst2 FOLDER
    python benchmarks/init_choice.py table                       # prints the tables, writes results/init_choice.md

Tasks: `vit`, ViT-S/14 on MNIST images; `text`, MiniLM on SST-2; `conv`, EfficientNet-Lite0 on MNIST images. Models and
data are those of examples/packaged.py. Budgets are small so that the comparison fits two CPU cores: read the
differences between the rows, not the accuracies. LoRA (peft) runs beside as the yardstick.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mapsurgery
from mapsurgery.tables import render

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "examples"))
import packaged  # noqa: E402

RESULTS = ROOT / "results" / "init_choice.csv"
FIELDS = ["task", "variant", "lr", "magnitude_factor", "seed", "accuracy", "seconds"]


@dataclass(frozen=True)
class Task:
    """A model, what to adapt in it, and its data.

    Attributes:
        model: makes a fresh model; features: maps (model, inputs) to logits.
        train, test: (inputs, labels); inputs are tensors with the samples first.
    """

    model: Callable[[], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor]
    targets: list[str]
    head: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    batch: int = 32


def _split(
    inputs: Tensor, labels: Tensor, train: int, test: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, second = order[:train], order[train : train + test]
    return (inputs[first], labels[first]), (inputs[second], labels[second])


def _digits(size: int) -> tuple[Tensor, Tensor]:
    images = packaged.mnist()
    pixels = F.interpolate(images.pixels[:, None].float() / 255, size=size, mode="bilinear", antialias=True)
    return ((pixels - 0.45) / 0.25).expand(-1, 3, -1, -1), images.labels


def _zero_head(model: nn.Module, head: str) -> nn.Module:
    for parameter in model.get_submodule(head).parameters():
        nn.init.zeros_(parameter)
    return model


def vit_task() -> Task:
    train, test = _split(*_digits(42), 320, 600)
    pretrained = _zero_head(packaged.vit_small_patch14(10, 42), "head")
    return Task(
        model=lambda: copy.deepcopy(pretrained),
        logits=lambda model, x: model(x),
        targets=["*attn*", "*mlp*"],
        head="head",
        train=train,
        test=test,
        epochs=4,
    )


def conv_task() -> Task:
    train, test = _split(*_digits(64), 320, 600)
    pretrained = _zero_head(packaged.efficientnet_lite0(10), "classifier")
    return Task(
        model=lambda: copy.deepcopy(pretrained),
        logits=lambda model, x: model(x),
        targets=["*conv_pw*", "*conv_pwl*", "*conv_dw*"],
        head="classifier",
        train=train,
        test=test,
        epochs=5,
    )


class SentenceClassifier(nn.Module):
    """A sentence encoder and a linear head on the mean of its token vectors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def text_task(folder: Path) -> Task:
    encoder, tokenizer = packaged.minilm()
    pretrained = _zero_head(SentenceClassifier(encoder), "head")

    def tokens(sentences: list[str]) -> Tensor:
        return tokenizer(sentences, padding="max_length", truncation=True, max_length=32, return_tensors="pt")[
            "input_ids"
        ]

    sentences, labels = packaged.sst2(folder, "train")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:960]
    test_sentences, test_labels = packaged.sst2(folder, "dev")
    return Task(
        model=lambda: copy.deepcopy(pretrained),
        logits=lambda model, x: model(x),
        targets=["*query", "*value", "*dense"],
        head="head",
        train=(tokens([sentences[i] for i in chosen.tolist()]), labels[chosen]),
        test=(tokens(test_sentences), test_labels),
        epochs=2,
    )


def variants() -> dict[str, mapsurgery.Init]:
    """The starts that are compared."""
    start = mapsurgery.Init
    return {
        "soft b=.1 g=2 A~W": start("soft", beta=0.1, gain=2.0),
        "soft b=.1 g=4 A~W": start("soft", beta=0.1, gain=4.0),
        "soft b=.1 g=2": start("soft", beta=0.1, gain=2.0, a_scale="kaiming"),
        "soft b=.05 g=2": start("soft", beta=0.05, gain=2.0, a_scale="kaiming"),
        "soft b=.1 g=4": start("soft", beta=0.1, gain=4.0, a_scale="kaiming"),
        "soft b=.1 g=8": start("soft", beta=0.1, gain=8.0, a_scale="kaiming"),
        "zero b=.05": start("zero", beta=0.05, a_scale="kaiming"),
        "random": start("random", a_scale="kaiming"),
        "soft b=.1 g=2 absolute": start("soft", beta=0.1, gain=2.0, a_scale="kaiming", relative=False),
        "random absolute": start("random", a_scale="kaiming", relative=False),
    }


LORA = {"lora g=2 (peft)": 2, "lora g=8 (peft)": 8}
"""peft's LoRA by its scaling alpha/r."""


def grid() -> Iterator[tuple[str, float, float]]:
    """(variant, lr of A and B, factor of the magnitudes' lr); the absolute units need a larger factor to move at
    all."""
    for lr in (5e-4, 2e-3):
        yield from ((name, lr, 1.0) for name in LORA)
        for name, init in variants().items():
            factors = (1.0, 10.0) if init.relative else (1.0, 100.0)
            yield from ((name, lr, factor) for factor in factors)


def _peft_lora(model: nn.Module, targets: list[str], head: str, gain: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    names = [layer.path for layer in mapsurgery.plan(model, targets).layers]
    model.requires_grad_(False)
    model = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8 * gain, target_modules=names), model)
    model.get_submodule(head).requires_grad_(True)
    return model


def train_once(task: Task, variant: str, lr: float, factor: float, seed: int, amp: bool) -> float:
    """Test accuracy after training with one setting. Batches, dropout and A depend on the seed alone."""
    torch.manual_seed(seed)
    model = task.model()
    if variant in LORA:
        model = _peft_lora(model, task.targets, task.head, LORA[variant])
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]
    else:
        mapsurgery.patch(model, task.targets, rank=8, init=variants()[variant], train=[task.head])
        groups = mapsurgery.param_groups(model, lr=lr, magnitude_lr_factor=factor)
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    steps = task.epochs * (len(task.train[1]) // task.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=amp)
    for batch in _batches(task, seed):
        with autocast:
            loss = F.cross_entropy(task.logits(model, task.train[0][batch]).float(), task.train[1][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _accuracy(task, model, autocast)


def _batches(task: Task, seed: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(seed)
    count = len(task.train[1])
    for _ in range(task.epochs):
        shuffled = torch.randperm(count, generator=order)
        yield from shuffled[: count - count % task.batch].split(task.batch)


@torch.no_grad()
def _accuracy(task: Task, model: nn.Module, autocast: torch.autocast) -> float:
    model.eval()
    with autocast:
        logits = torch.cat([task.logits(model, part) for part in task.test[0].split(250)])
    return (logits.argmax(1) == task.test[1]).float().mean().item()


def read_results() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def run(args: argparse.Namespace) -> None:
    """Train what is not in the results file yet, and append each outcome at once."""
    task = {"vit": vit_task, "conv": conv_task, "text": lambda: text_task(args.sst2)}[args.task]()
    done = {tuple(row[name] for name in FIELDS[:5]) for row in read_results()}
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in range(args.seeds):
        for variant, lr, factor in grid():
            key = (args.task, variant, str(lr), str(factor), str(seed))
            if key in done or not any(part in variant for part in args.variants):
                continue
            start = time.perf_counter()
            accuracy = train_once(task, variant, lr, factor, seed, amp=not args.fp32)
            row = [*key, f"{accuracy:.4f}", f"{time.perf_counter() - start:.1f}"]
            fresh = not RESULTS.exists()
            with RESULTS.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([FIELDS, row] if fresh else [row])
            print(*row, flush=True)


def table(args: argparse.Namespace) -> None:
    """Mean and range over the seeds for each setting, and per start its worst setting (its sensitivity)."""
    texts = []
    for task in dict.fromkeys(row["task"] for row in read_results()):
        cells: dict[str, dict[tuple[str, str], list[float]]] = {}
        for row in read_results():
            if row["task"] == task:
                setting = (row["lr"], row["magnitude_factor"])
                cells.setdefault(row["variant"], {}).setdefault(setting, []).append(float(row["accuracy"]))
        rows = [_row(variant, settings) for variant, settings in cells.items()]
        title = (
            f"{task}: accuracy, mean (min to max over seeds) number of seeds; "
            "columns are lr of A and B x factor of the magnitudes' lr"
        )
        columns = ["start", "5e-4 x1", "5e-4 x10*", "2e-3 x1", "2e-3 x10*", "best", "worst"]
        texts.append(render(title, columns, rows, "* x100 for absolute magnitudes"))
    text = "\n\n".join(texts)
    print(text)
    settings = f"torch {torch.__version__}, CPU, bf16 autocast, rank 8, AdamW, one-cycle schedule"
    (RESULTS.parent / "init_choice.md").write_text(
        f"# Starts of MAP\n\nPrinted by `python benchmarks/init_choice.py table` ({settings}).\n\n```\n{text}\n```\n"
    )


def _row(variant: str, settings: dict[tuple[str, str], list[float]]) -> list[str]:
    def show(lr: str, large: bool) -> str:
        found = [v for (rate, factor), v in settings.items() if rate == lr and (float(factor) > 1) == large]
        if not found:
            return ""
        values = found[0]
        return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f}) {len(values)}"

    means = [statistics.mean(values) for values in settings.values()]
    cells = [show(lr, large) for lr in ("0.0005", "0.002") for large in (False, True)]
    return [variant, *cells, f"{max(means):.3f}", f"{min(means):.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("run", help="train the grid of one task")
    trainer.add_argument("task", choices=["vit", "conv", "text"])
    trainer.add_argument("--seeds", type=int, default=3)
    trainer.add_argument("--variants", nargs="+", default=[""], help="only the starts whose names contain one of these")
    trainer.add_argument("--sst2", type=Path, help="folder of SST-2's tab-separated files (task text)")
    trainer.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    trainer.set_defaults(action=run)
    commands.add_parser("table", help="print and write the tables").set_defaults(action=table)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()
