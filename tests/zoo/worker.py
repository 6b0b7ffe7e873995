"""A worker of the zoo: reads "<column> <name>" lines, answers with the clauses it is at and with the verdict.

It lives until its input ends; `run` starts another one should it crash, hang or run out of memory.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import warnings
from typing import TextIO

import torch

from . import inventory
from .verdict import Verdict

MEMORY = 10 * 2**30
"""Bytes of data that an entry may take."""


def judge(column: str, name: str, answer: TextIO) -> Verdict:
    """The verdict on one entry; each clause is announced, so that a crash can be told from where it was."""
    entry = inventory.find(name)
    if column == "peft":
        from .check_peft import check
    else:
        from .check import check
    return check(entry, report=lambda clause: print(f"at {clause}", file=answer, flush=True))


def main() -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    # What models print is not for whoever reads the answers.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        column, name = line.split()
        print(f"verdict {judge(column, name, answer).to_json()}", file=answer, flush=True)
        gc.collect()  # models hold themselves in cycles, and the next one may be large


if __name__ == "__main__":
    main()
