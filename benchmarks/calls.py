"""Python functions that one adapted layer, and operations on a model of a hundred, call before and around the C++ code.

    python benchmarks/calls.py                     # of this checkout
    python benchmarks/calls.py ../before .         # of two, side by side
    python benchmarks/calls.py --list              # each call of the forward, with its file

Counted are functions of mapsurgery and of all Python (torch's included). "before C++" counts up to the last operator of
the library that the forward reaches. Counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import mapsurgery

HERE = Path(__file__).resolve().parent.parent
LIBRARY = Path(mapsurgery.__file__).resolve().parent
OPERATORS = ("torch._ops.mapsurgery", "mapsurgery.")
"""Starts of the modules that C++ functions of the library say they are of."""
LAYERS = 100


@functools.cache
def _named(file: str) -> str:
    """A file of the library by its place there, another as Python names it."""
    path = Path(file)
    return path.relative_to(LIBRARY.parent).as_posix() if path.is_relative_to(LIBRARY) else file


class Calls:
    """Calls of Python functions, in order: (file, function), where the file of the library starts with mapsurgery/.

    A context manager. Comprehensions are no calls, as from Python 3.12 on; a generator is one when it is made.

    Attributes:
        before_operator: how many there were when the last operator of the library was called; None without one.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self.before_operator: int | None = None
        self._generators: set[FrameType] = set()

    def __enter__(self) -> Calls:
        sys.setprofile(self._saw)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _saw(self, frame: FrameType, event: str, called: object) -> None:
        code = frame.f_code
        if event == "c_call" and str(getattr(called, "__module__", None)).startswith(OPERATORS):
            self.before_operator = len(self.found)
        elif event == "call" and code is not Calls.__exit__.__code__ and self._is_new(frame):
            function = code.co_qualname if sys.version_info >= (3, 11) else code.co_name
            self.found.append((_named(code.co_filename), function))

    def _is_new(self, frame: FrameType) -> bool:
        if frame.f_code.co_name in ("<listcomp>", "<dictcomp>", "<setcomp>") or frame in self._generators:
            return False
        if frame.f_code.co_flags & 0x20:  # CO_GENERATOR: each value that it gives is another "call"
            self._generators.add(frame)
        return True

    def counts(self, end: int | None = None) -> dict[str, int]:
        """Calls within the library, its files that they are of, and calls of all Python; up to one of them."""
        found = self.found[:end]
        own = [file for file, _ in found if file.startswith("mapsurgery/")]
        return {"library": len(own), "files": len(set(own)), "all": len(found)}


def layer(width: int = 8, rank: int = 2) -> tuple[nn.Module, torch.Tensor]:
    """One adapted Linear that has run in both modes, so that nothing is done for the first time, and an input."""
    model = nn.Sequential(nn.Linear(width, width))
    mapsurgery.patch(model, "*", rank=rank)
    x = torch.randn(2, width)
    for _ in range(2):
        y = model(x)
        y.backward(torch.ones_like(y))
        with torch.no_grad():
            model(x)
    return model[0], x


def forward_calls(grad: bool) -> Calls:
    """Calls of the forward of one adapted Linear, in training, or in eval mode under no_grad."""
    adapted, x = layer()
    adapted.train(grad)
    with torch.set_grad_enabled(grad), Calls() as calls:
        adapted(x)
    return calls


def backward_calls() -> Calls:
    """Calls of its backward. On the CPU it runs in the thread that asks for it."""
    adapted, x = layer()
    y = adapted(x)
    grad = torch.ones_like(y)
    with Calls() as calls:
        y.backward(grad)
    return calls


def operation_calls() -> dict[str, Calls]:
    """Calls of patch, and of merge, of a model of many equal layers."""
    first = nn.Sequential(nn.Linear(8, 8))
    mapsurgery.merge(mapsurgery.patch(first, "*", rank=2))  # what is done once in a process is done
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(LAYERS)])
    with Calls() as patching:
        mapsurgery.patch(model, "*", rank=2)
    with Calls() as merging:
        mapsurgery.merge(model)
    return {"patch": patching, "merge": merging}


def all_counts() -> dict[str, dict[str, int]]:
    """Counts by what they are of."""
    counts = {}
    for name, grad in (("training", True), ("no_grad", False)):
        calls = forward_calls(grad)
        counts[f"forward before C++, {name}"] = calls.counts(calls.before_operator)
        counts[f"forward, {name}"] = calls.counts()
    counts["backward"] = backward_calls().counts()
    return counts | {f"{name} of {LAYERS} layers": calls.counts() for name, calls in operation_calls().items()}


def print_list() -> None:
    """The calls of both forwards."""
    for name, grad in (("training", True), ("no_grad", False)):
        calls = forward_calls(grad)
        print(f"forward, {name}")
        for index, (file, function) in enumerate(calls.found):
            if index == calls.before_operator:
                print("  -- C++ --")
            print(f"  {file.rpartition('site-packages/')[2]}: {function}")


def counts_of(checkout: Path) -> dict[str, dict[str, int]]:
    """The same of another checkout, in a process of its own.

    Raises:
        SystemExit: it failed, or another library than the checkout's was imported.
    """
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, "--json"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: exit code {done.returncode}, see above")
    answer = json.loads(done.stdout.splitlines()[-1])
    if not Path(answer["library"]).is_relative_to(checkout):
        raise SystemExit(f"{checkout} was asked for, but Python imports {answer['library']}")
    return answer["counts"]


def print_table(checkouts: list[str], counts: list[dict[str, dict[str, int]]]) -> None:
    """Markdown: a row for each thing that is counted, three columns for each checkout."""
    lines = [
        ["calls of", *(f"{kind}, {name}" for name in checkouts for kind in ("library", "its files", "all Python"))]
    ]
    lines.append(["---", *["---:"] * (3 * len(checkouts))])
    lines += [[what, *(str(n) for one in counts for n in one[what].values())] for what in counts[0]]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def main(argv: list[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkouts", nargs="*", metavar="CHECKOUT", help="folders that hold mapsurgery/ (default: this)"
    )
    parser.add_argument("--list", action="store_true", help="print the calls of the library that is imported")
    parser.add_argument("--json", action="store_true", help="print the counts of the library that is imported, as JSON")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print_list()
    elif arguments.json:
        print(json.dumps({"library": str(LIBRARY), "counts": all_counts()}))
    else:
        folders = [Path(text).resolve() for text in arguments.checkouts] or [HERE]
        print_table([folder.name for folder in folders], [counts_of(folder) for folder in folders])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
