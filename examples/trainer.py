"""transformers' Trainer on a patched model: does a sentence of Python's documentation speak of numbers or of files?

python examples/trainer.py                 # all-MiniLM-L6-v2 from a package: a minute on a CPU
python examples/trainer.py --model FacebookAI/roberta-base
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from docstrings import documented
from packaged import minilm
from proving import prove
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import mapsurgery
from mapsurgery.integrations.transformers import ADAPTER_NAME, AdapterTrainer

TOPICS = (("math", "cmath", "statistics", "random", "fractions"), ("os", "shutil", "tempfile", "zipfile", "pathlib"))


def main(argv: list[str] | None = None) -> int:
    """Train, print the accuracy on sentences that were held out, and prove what the saved file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a folder; the packaged all-MiniLM-L6-v2 if left out")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("outputs/trainer"))
    args = parser.parse_args(argv)

    name = args.model or str(minilm()[0].name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = [(text, label) for label, modules in enumerate(TOPICS) for _, text in documented(modules)]
    random.Random(0).shuffle(rows)
    data = [{**tokenizer(text, truncation=True, max_length=32), "labels": label} for text, label in rows]

    def build() -> nn.Module:
        torch.manual_seed(0)  # of the new head
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(TOPICS))

    model = mapsurgery.patch(build(), ["*query", "*value"], rank=8, train="classifier*")
    trainer = AdapterTrainer(  # in place of Trainer: the one line that a script needs
        model,
        TrainingArguments(str(args.output), max_steps=args.steps, learning_rate=2e-3, weight_decay=0.1, report_to=[]),
        train_dataset=data[50:],
        eval_dataset=data[:50],
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean().item()},
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(f"accuracy on 50 sentences: {before:.2f} before, {trainer.evaluate()['eval_accuracy']:.2f} after training")
    trainer.save_model()
    batch = tokenizer([text for text, _ in rows[:16]], padding=True, return_tensors="pt")

    @torch.no_grad()
    def logits(model: nn.Module) -> torch.Tensor:
        return model.cpu().eval()(**batch).logits

    return 0 if prove(model, build, args.output / ADAPTER_NAME, logits, 1e-4) else 1


if __name__ == "__main__":
    raise SystemExit(main())
