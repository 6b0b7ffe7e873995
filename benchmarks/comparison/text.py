"""Language understanding: MiniLM on SST-2's sentences."""

from __future__ import annotations

import copy

import finetune_glue as example
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classification import zero_head
from .task import Options, Task, required

TRAIN, VALIDATION, TEST = 384, 300, 600
MAX_LENGTH = 32


def load(options: Options) -> Task:
    """Validation is a part of SST-2's own training file, test of its development file."""
    folder = required(options.sst2, "--sst2")
    model, tokenizer = example.load_model("packaged", 2)
    (head,) = example.head_names(model)
    pretrained = zero_head(model, head).to(options.device)
    data = example.load_task(
        "sst2", folder, tokenizer, max_length=MAX_LENGTH, train_samples=TRAIN + VALIDATION, test_samples=TEST
    )
    train = data.train.subset(range(TRAIN))
    (test,) = data.test.values()
    held_out = {"validation": data.train.subset(range(TRAIN, TRAIN + VALIDATION)), "test": test}

    def loss(model: nn.Module, indices: Tensor, _random: torch.Generator) -> Tensor:
        logits = model(**train.batch(indices.tolist(), options.device)).logits
        return F.cross_entropy(logits, train.targets[indices].to(options.device))

    def score(model: nn.Module, split: str) -> float:
        samples = held_out[split]
        return example.measure(data.kind, example.predict(model, samples), samples.targets)["accuracy"]

    return Task(
        name="text",
        about=f"all-MiniLM-L6-v2, SST-2 cut at {MAX_LENGTH} tokens, all linear layers of the blocks",
        model=lambda: copy.deepcopy(pretrained),
        targets=tuple(example.TARGETS),
        head=(head,),
        head_lr=1e-3,
        loss=loss,
        score=score,
        useless=0.5,
        samples=TRAIN,
        epochs=2,
        batch=32,
    )
