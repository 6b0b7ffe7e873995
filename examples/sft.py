"""TRL's SFTTrainer on a patched language model: what does a function of Python's standard library do?

python examples/sft.py                     # SmolLM2-135M-Instruct from a package: minutes on two CPU cores
python examples/sft.py --model Qwen/Qwen2.5-0.5B --save-merged
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from docstrings import documented
from packaged import smollm2
from proving import prove
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import mapsurgery
from mapsurgery.integrations.transformers import ADAPTER_NAME
from mapsurgery.integrations.trl import SFTTrainer

MODULES = ("math", "statistics", "random", "os", "shutil", "tempfile", "zipfile", "pathlib", "itertools", "json")


def load(name: str | None) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer: of the hub, of a folder, or SmolLM2 from a package."""
    return (
        smollm2() if name is None else (AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))
    )


def main(argv: list[str] | None = None) -> int:
    """Train, print the loss on functions that were held out, and prove what the saved file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a folder; the packaged SmolLM2-135M-Instruct if left out")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-merged", action="store_true", help="write the adapted model as a whole, too")
    parser.add_argument("--output", type=Path, default=Path("outputs/sft"))
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    rows = [{"prompt": f"{name}:", "completion": f" {text}"} for name, text in documented(MODULES)]
    random.Random(0).shuffle(rows)
    base = copy.deepcopy(model)  # for the proof alone
    mapsurgery.patch(model, ["*q_proj", "*v_proj"], rank=8)
    trainer = SFTTrainer(  # mapsurgery's, in place of trl's
        model,
        args=SFTConfig(
            str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=2e-3,
            max_length=48,
            bf16=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows[24:]),
        eval_dataset=Dataset.from_list(rows[:24]),
        processing_class=tokenizer,
        save_merged=args.save_merged,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss on 24 functions: {before:.2f} before, {trainer.evaluate()['eval_loss']:.2f} after training")
    trainer.save_model()
    batch = tokenizer([row["prompt"] for row in rows[:4]], padding=True, return_tensors="pt")

    @torch.no_grad()
    def logits(model: nn.Module) -> torch.Tensor:
        ids = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return model.float().eval()(**ids).logits.cpu()

    return 0 if prove(model, lambda: base, args.output / ADAPTER_NAME, logits, 1e-4) else 1


if __name__ == "__main__":
    raise SystemExit(main())
