"""One side of ab.py: measures cases with the mapsurgery that its PYTHONPATH holds, asked line by line.

    prepare CASE      builds the case in place of the one before; answers with the time of a call
    measure CASE N    answers with the quickest of N calls

Answers are lines of JSON; the first, unasked, says which library was loaded. Only public functions of it are used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Stamps, make_optimizer, native_details, native_state, randomise_zeros
from torch import Tensor, nn
from train_step import METHODS
from workloads import WORKLOADS, Model, make_base, seeded

import mapsurgery

PEFT = "peft"
DTYPES = ("fp32", "autocast-bf16")
MODES = ("train", "no_grad")
LINEAR = "linear"


@dataclass(frozen=True)
class Case:
    """What is measured; written MODEL/rRANK/DTYPE/MODE/METHOD, as in linear:8x768/r64/fp32/train/map.

    Attributes:
        model: a model of train_step.py as NAME:BATCH or NAME:BATCHxSIZE, or linear:TOKENSxWIDTH, one square layer.
        method: of mapsurgery.patch; or peft, for peft's LoRA.
    """

    model: str
    rank: int
    dtype: str
    mode: str
    method: str

    def __str__(self) -> str:
        return f"{self.model}/r{self.rank}/{self.dtype}/{self.mode}/{self.method}"

    @staticmethod
    def parse(text: str) -> Case:
        """Raises argparse.ArgumentTypeError where it is not written so."""
        form = rf"(\w+(?::\d+(?:x\d+)?)?)/r([1-9]\d*)/({'|'.join(DTYPES)})/({'|'.join(MODES)})/([\w-]+)"
        found = re.fullmatch(form, text)
        if not found or (text.startswith(LINEAR) and not re.match(rf"{LINEAR}:\d+x\d+/", text)):
            raise argparse.ArgumentTypeError(f"{text!r} is no case, such as {LINEAR}:8x768/r64/fp32/train/map")
        model, rank, dtype, mode, method = found.groups()
        return Case(model, int(rank), dtype, mode, method)


class Subject:
    """A case, built: `call` is what is timed, `between` what happens untimed before the next call.

    In training each call sees new parameters, which an AdamW step of 1e-4 has left. A single layer takes that step
    between the calls; of a whole model it is a part of the call.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.device, self.train = device, case.mode == "train"
        self.single = case.model.partition(":")[0] == LINEAR
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=case.dtype == "autocast-bf16")
        with seeded():
            model, targets = self._layer(case) if self.single else self._model(case)
            if case.method == PEFT:
                self.model = METHODS["lora"](model, targets, case.rank)
            else:
                self.model = mapsurgery.patch(model, targets, rank=case.rank, method=case.method)
            randomise_zeros(self.model)
        self.model.train(self.train)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.model)

    def _layer(self, case: Case) -> tuple[nn.Module, list[str]]:
        tokens, width = map(int, case.model.partition(":")[2].split("x"))
        model = nn.Sequential(nn.Linear(width, width)).to(self.device).requires_grad_(False)
        x = torch.randn(tokens, width, device=self.device, requires_grad=self.train)
        dtype = torch.bfloat16 if case.dtype == "autocast-bf16" else torch.float32
        self.grad = torch.randn(tokens, width, device=self.device).to(dtype)
        self.forward = lambda: self.model(x)
        self.inputs = [x]
        return model, ["0"]

    def _model(self, case: Case) -> tuple[nn.Module, list[str]]:
        chosen = Model.parse(case.model)
        workload = WORKLOADS[chosen.name]
        size = chosen.size or workload.size
        batch = chosen.batch or (workload.cuda_batch if self.device.type == "cuda" else workload.cpu_batch)
        model = make_base(workload, size, "fp32", self.device)
        loss = workload.data(batch, size, torch.float32, self.device)
        self.grad = None
        self.forward = lambda: loss(self.model)
        self.inputs: list[Tensor] = []
        return model, workload.targets(model)

    def call(self) -> None:
        """Forward; in training backward too, and the optimiser's step of a whole model."""
        with nullcontext() if self.train else torch.no_grad():
            context: AbstractContextManager[Any] = self.autocast()
            with context:
                y = self.forward()
            if self.train:
                y.backward(self.grad)
                if not self.single:
                    self._step()

    def between(self) -> None:
        """The optimiser's step of a single layer."""
        if self.train and self.single:
            self._step()
            for x in self.inputs:
                x.grad = None

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self) -> None:
        """A training step must reach every parameter, or too little work would be timed.

        Raises:
            RuntimeError: a trained parameter has no gradient, or one that is zero or not finite.
        """
        with self.autocast():
            y = self.forward()
        y.backward(self.grad)
        for name, parameter in self.trained.items():
            norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
            if not norm or not math.isfinite(norm):
                raise RuntimeError(f"the gradient of {name} has norm {norm}: the step would be timed for too little")
        self._step()
        for x in self.inputs:
            x.grad = None

    def measure(self, calls: int) -> dict[str, float]:
        """Milliseconds of the quickest call, each timed alone: by the clock, and of all threads' processors.

        The quickest: what other programs do can only add to a call.
        """
        if calls > 1:  # what the other side left in the caches is not this side's matter
            self.call()
            self.between()
        stamps, processor = Stamps(self.device), []
        for _ in range(calls):
            start = time.process_time()
            stamps.mark()
            self.call()
            stamps.mark()
            processor.append(1e3 * (time.process_time() - start))
            self.between()
        return {"ms": min(stamps.milliseconds()[::2]), "processor_ms": min(processor)}


class Worker:
    """Keeps one case ready and answers requests."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.case = ""
        self.subject: Subject | None = None

    def answer(self, line: str) -> dict[str, Any]:
        """Carry out one request."""
        verb, case, *number = line.split()
        if verb == "prepare":
            self.subject = None  # first, so that two models never share the memory
            self.subject = Subject(Case.parse(case), self.device)
            self.case = case
            if self.subject.train:
                self.subject.check()
            return self.subject.measure(1)
        if verb == "measure" and case == self.case and self.subject is not None:
            return self.subject.measure(int(*number))
        raise ValueError(f"{line!r}: prepare CASE comes first, then measure CASE N; {self.case or 'no case'} is ready")


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Answers have the old standard output for themselves: what libraries print goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    device = torch.device(arguments.device)
    worker = Worker(device)
    hello = {"file": mapsurgery.__file__, "kernels": native_state(device), "threads": torch.get_num_threads()}
    print(json.dumps(hello | {"native": native_details()}), file=answers)
    for line in sys.stdin:
        try:
            reply = worker.answer(line.strip())
        except Exception as error:  # of one case: the others still count
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
