"""Two checkouts of mapsurgery, A and B, measured in turns in one run: is B slower anywhere?

    python benchmarks/ab.py ../before .                                           # every case
    python benchmarks/ab.py ../before . --cases 'linear:*x768/*' --threads 1      # some
    python benchmarks/ab.py ../before ../before --cases 'linear:*'                # what noise makes of 1.00

Each checkout needs its own built library. A worker process for each stays alive, and they are asked in turns, A B then
B A, with peft's LoRA as a third. Worker and models come from beside this file, and use only public functions of the
library. benchmarks/README.md explains cases and columns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from ab_worker import DTYPES, LINEAR, PEFT, Case
from common import Row, iqr, make_parser, median, positive, print_paths, start, table, write_results

METHODS = ("map", "lora")
STEPS = ("vit_small:1", "llama_tiny:2", "resnet50:2")
MODEL_SHARE = 5
"""Time of a whole model's case, in units of that of one layer."""
MOST_CALLS = 100
"""Of one layer in a measurement."""
FEWEST_ROUNDS = 4


def all_cases() -> list[Case]:
    """One layer with few tokens, then whole training steps."""
    layers = [
        Case(f"{LINEAR}:{tokens}x{width}", rank, dtype, mode, method)
        for dtype in DTYPES
        for width, modes in ((768, ("train", "no_grad")), (4096, ("no_grad",)))
        for mode in modes
        for tokens in (1, 8, 32)
        for rank in (8, 64)
        for method in METHODS
    ]
    return layers + [
        Case(model, 8, dtype, "train", method) for dtype in DTYPES for model in STEPS for method in METHODS
    ]


def chosen_cases(patterns: Sequence[str], extra: Sequence[Case]) -> list[Case]:
    """Cases that match one of the globs, in their usual order; then the extra ones.

    Raises:
        SystemExit: a glob matches none.
    """
    known = [] if extra and not patterns else all_cases()
    for pattern in patterns:
        if not any(fnmatchcase(str(case), pattern) for case in known):
            names = "\n".join(map(str, known))
            raise SystemExit(f"--cases {pattern!r} matches none of these, and is matched against the whole:\n{names}")
    return [case for case in known if any(fnmatchcase(str(case), p) for p in patterns or ["*"])] + list(extra)


def peft_is_cheap(case: Case) -> bool:
    """Under bf16 autocast peft's thin products run number by number on a processor without AVX-512."""
    return case.dtype == "fp32" or "AVX512" in torch.backends.cpu.get_cpu_capability()


# --- workers --------------------------------------------------------------------------------------------------------


class Worker:
    """A process that measures one checkout.

    Attributes:
        hello: what it said about its library.
    """

    def __init__(self, name: str, checkout: Path, device: torch.device, threads: int | None) -> None:
        self.name = name
        path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, str(Path(__file__).with_name("ab_worker.py")), "--device", device.type]
        command += ["--threads", str(threads)] if threads else []
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe)
        self.hello = self._read()
        if not Path(self.hello["file"]).resolve().is_relative_to(checkout):
            self.close()
            raise SystemExit(f"{name}: {checkout} was asked for, but Python imports {self.hello['file']}")

    def ask(self, *words: object) -> dict[str, Any]:
        """Send one line and wait for its answer.

        Raises:
            RuntimeError: the case failed there.
        """
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with exit code {self.process.wait()}; see above")
        return json.loads(line)

    def close(self) -> None:
        """End of its input is its end."""
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def running(checkouts: dict[str, Path], device: torch.device, threads: int | None) -> Iterator[dict[str, Worker]]:
    """A worker for each checkout, ended afterwards."""
    with ExitStack() as stack:
        workers = {}
        for name, checkout in checkouts.items():
            workers[name] = Worker(name, checkout, device, threads)
            stack.callback(workers[name].close)
        yield workers


# --- the run --------------------------------------------------------------------------------------------------------

Times = dict[str, dict[str, list[float]]]
"""Name of a worker -> "ms" or "processor_ms" -> one per round."""


def is_layer(case: Case) -> bool:
    """Whether it is of one layer, not of a whole model."""
    return case.model.startswith(LINEAR)


def share(cases: Sequence[Case]) -> float:
    """The part of the time of all these cases that the first one may take."""
    parts = [1 if is_layer(case) else MODEL_SHARE for case in cases]
    return parts[0] / sum(parts)


def run_rounds(case: Case, workers: dict[str, Worker], times: Times, end: float, arguments: argparse.Namespace) -> int:
    """Rounds of one case, A B and B A in turns, added to `times`. Returns the calls of a measurement.

    Args: end: of `time.perf_counter`, when there are FEWEST_ROUNDS.

    Raises:
        RuntimeError: it failed in a worker.
    """
    words = {}
    for name in workers:
        method = PEFT if name == PEFT else case.method
        words[name] = str(Case(case.model, case.rank, case.dtype, case.mode, method))
    first = {name: worker.ask("prepare", words[name]) for name, worker in workers.items()}
    single = is_layer(case)
    once = min(worker.ask("measure", words[name], 3 if single else 1)["ms"] for name, worker in workers.items())
    calls = min(MOST_CALLS, max(2, math.ceil(arguments.min_ms / once))) if single else 1
    for index in range(arguments.rounds):
        if index >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name in list(workers) if index % 2 == 0 else reversed(workers):
            for key, value in workers[name].ask("measure", words[name], calls).items():
                times.setdefault(name, {key: [] for key in first[name]})[key].append(value)
    return calls


def ratios(times: Times, value: str, base: str, key: str = "ms") -> list[float]:
    """value / base of the same round; none where one of them was not measured."""
    if value not in times or base not in times:
        return []
    return [one / other for one, other in zip(times[value][key], times[base][key], strict=True)]


def row_of(case: Case, times: Times, calls: int) -> Row:
    """Medians of one case."""
    both, processor = ratios(times, "B", "A"), ratios(times, "B", "A", "processor_ms")
    return {
        **vars(case),
        **{f"{name.lower()}_ms": median(of["ms"]) for name, of in times.items()},
        "b_to_a": median(both),
        "iqr": iqr(both),
        "error_of_median": 0.93 * iqr(both) / math.sqrt(len(both)),
        "quickest_b_to_a": min(times["B"]["ms"]) / min(times["A"]["ms"]),
        "processor_b_to_a": median(processor),
        "a_to_peft": median(ratios(times, "A", PEFT)),
        "b_to_peft": median(ratios(times, "B", PEFT)),
        "rounds": len(both),
        "calls": calls,
        "error": None,
    }


COLUMNS = {
    "model": "model",
    "rank": "rank",
    "dtype": "dtype",
    "mode": "mode",
    "method": "method",
    "a_ms": "A ms",
    "b_ms": "B ms",
    "b_to_a": "B / A",
    "iqr": "IQR",
    "error_of_median": "±",
    "quickest_b_to_a": "quickest",
    "processor_b_to_a": "CPU B / A",
    "peft_ms": "peft ms",
    "a_to_peft": "A / peft",
    "b_to_peft": "B / peft",
    "rounds": "rounds",
    "calls": "calls",
    "error": "error",
}
NOTES = (
    "Medians over rounds in which A and B take turns; ratios are medians of the ratios within a round, IQR the "
    "distance of their quartiles, ± the standard error of the median that it gives; quickest: the ratio of the "
    "quickest of all rounds; CPU: processor time of all threads. A measurement is the quickest of its calls, each "
    "timed alone. linear:TxK is one square layer, forward and backward, with an AdamW step of 1e-4 between timed "
    "calls; other models take whole steps, AdamW included. no_grad: forward alone, of parameters that stand still. "
    "peft: its LoRA, whatever the method of A and B."
)


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, with a plus where files differ from it; 'unknown' outside of git."""
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def checkout(text: str) -> Path:
    """A folder that holds mapsurgery/.

    Raises:
        argparse.ArgumentTypeError: it does not.
    """
    path = Path(text).resolve()
    if not (path / "mapsurgery" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout: there is no mapsurgery/__init__.py in it")
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, rank=False)
    parser.add_argument("A", type=checkout, help="a checkout with its library built")
    parser.add_argument("B", type=checkout, help="another, or the same")
    parser.add_argument("--cases", nargs="+", default=[], metavar="GLOB", help="default: all; see --list")
    parser.add_argument("--extra", nargs="+", type=Case.parse, default=[], metavar="CASE", help="others than the usual")
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    parser.add_argument("--processes", type=positive, default=2, help="pairs, one after the other (default 2)")
    parser.add_argument("--rounds", type=positive, default=100, help="of a case, by each pair at most (default 100)")
    shared = f"for all cases, each of which takes {FEWEST_ROUNDS} rounds all the same (default 30)"
    parser.add_argument("--minutes", type=float, default=30.0, help=shared)
    parser.add_argument("--min-ms", type=float, default=2.0, help="of a measurement of a layer (default 2 ms)")
    parser.add_argument("--no-peft", action="store_true", help="leave out peft's LoRA")
    return parser.parse_args(argv)


def run_case(case: Case, workers: dict[str, Worker], times: Times, end: float, arguments: argparse.Namespace) -> Row:
    """The case's row from all rounds up to now; with the error if it failed."""
    used = {name: worker for name, worker in workers.items() if name != PEFT or peft_is_cheap(case)}
    try:
        return row_of(case, times, run_rounds(case, used, times, end, arguments))
    except RuntimeError as error:
        print(f"{case}: {error}", file=sys.stderr)
        return {**vars(case), "error": str(error)}


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a case failed."""
    arguments = parse(argv)
    cases = chosen_cases(arguments.cases, arguments.extra)
    if arguments.list:
        print("\n".join(map(str, cases)))
        return 0
    commits = {name: commit_of(getattr(arguments, name)) for name in ("A", "B")}
    options = [
        f"--{name} {shlex.join(map(str, value))}" for name in ("cases", "extra") if (value := vars(arguments)[name])
    ]
    options += [
        f"--{name.replace('_', '-')} {getattr(arguments, name)}"
        for name in ("processes", "rounds", "minutes", "min_ms")
    ]
    # Without the folders: which machine's they are is nobody's business.
    device, run = start(arguments, **commits, command=" ".join(["python benchmarks/ab.py A B", *options]))
    checkouts = {"A": arguments.A, "B": arguments.B} | ({} if arguments.no_peft else {PEFT: arguments.A})
    times: dict[Case, Times] = {case: {} for case in cases}
    rows: dict[Case, Row] = {}
    began = time.perf_counter()
    for number in range(arguments.processes):
        with running(checkouts, device, arguments.threads) as workers:
            run["kernels"] = ", ".join(f"{name} {workers[name].hello['kernels']}" for name in commits)
            run["native"] = {name: workers[name].hello["native"] for name in commits}
            run["threads"] = workers["A"].hello["threads"]
            last = began + 60 * arguments.minutes * (number + 1) / arguments.processes
            for index, case in enumerate(cases):
                now = time.perf_counter()
                end = now + (last - now) * share(cases[index:])
                rows[case] = row = run_case(case, workers, times[case], end, arguments)
                passed = f"{number + 1}/{arguments.processes} {time.perf_counter() - began:5.0f} s"
                print(f"{passed}  {row.get('b_to_a', math.nan):.3f}  {case}", flush=True)
        title = (
            f"A {commits['A']}, B {commits['B']}, {run['device_name']}, torch {run['torch']}, {run['threads']} threads"
        )
        print(table(title, list(rows.values()), COLUMNS), flush=True)
        paths = write_results(arguments.out, "ab", arguments.tag, list(rows.values()), COLUMNS, run, NOTES)
    print_paths(paths)
    return int(any(row["error"] for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
