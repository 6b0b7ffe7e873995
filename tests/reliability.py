"""What docs/reliability.md counts: `make reliability`. Damage, hostile calls, interruptions, failures and kills.

Every case is either as it should be or printed; ends with 1 if one was not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from definition import image, net
from rich.console import Console
from rich.table import Table
from test_all_or_nothing import CHANGES, Failing, lora, patched, signal_at, try_all
from test_files import trained

import mapsurgery
from mapsurgery.ops.registration import SCHEMAS

Outcome = Counter[str]
WRONG = "WRONG"


# Damaged files --------------------------------------------------------------------------------------------------------


def _flip(content: bytearray, chosen: random.Random) -> None:
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)


def _cut(content: bytearray, chosen: random.Random) -> None:
    del content[chosen.randrange(len(content)) :]


def _overwrite(content: bytearray, chosen: random.Random) -> None:
    at, count = chosen.randrange(len(content)), chosen.randrange(1, 64)
    content[at : at + count] = chosen.randbytes(count)


def _insert(content: bytearray, chosen: random.Random) -> None:
    at = chosen.randrange(len(content))
    content[at:at] = chosen.randbytes(chosen.randrange(1, 16))


def _drop(content: bytearray, chosen: random.Random) -> None:
    at = chosen.randrange(len(content))
    del content[at : at + chosen.randrange(1, 16)]


def _swap(content: bytearray, chosen: random.Random) -> None:
    size = chosen.randrange(1, 64)
    a, b = (chosen.randrange(len(content) - size) for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


def damaged_files(count: int, folder: Path) -> Outcome:
    """Loaded: refused with the base as it was, or what was damaged was nothing."""
    path, chosen, outcome = folder / "adapter.safetensors", random.Random(0), Outcome()
    mapsurgery.save(trained(), path)
    whole = path.read_bytes()
    base = net().eval()
    x, state = image(), {name: t.clone() for name, t in base.state_dict().items()}
    expected = mapsurgery.load(net().eval(), path)(x)
    for _ in range(count):
        content = bytearray(whole)
        chosen.choice([_flip, _flip, _flip, _cut, _overwrite, _insert, _drop, _swap])(content, chosen)
        path.write_bytes(content)
        try:
            mapsurgery.load(base, path)
        except (ValueError, OSError):
            now = base.state_dict()
            same = list(now) == list(state) and all(torch.equal(now[name], t) for name, t in state.items())
            outcome["refused" if same else WRONG] += 1
        else:
            outcome["nothing was lost" if torch.equal(base(x), expected) else WRONG] += 1
            mapsurgery.unpatch(base)
    return outcome


# Hostile calls --------------------------------------------------------------------------------------------------------


def _arguments(chosen: random.Random) -> dict[str, Any]:
    """Those of a call that is right, by the names that the schemas have."""
    m, K, r, T = (chosen.randrange(1, 9) for _ in range(4))
    one = torch.ones(1)
    return {
        "weight": torch.randn(m, K),
        "A": torch.randn(r, K),
        "B": torch.randn(m, r),
        "x": torch.randn(T, K),
        "h": torch.randn(T, r),
        "grad": torch.randn(T, m),
        "bias": torch.randn(m),
        "gram_a": torch.randn(r, r),
        "gram_b": torch.randn(r, r),
        "slopes": torch.randn(6),
        "norm": [],
        "tau": 0.0,
        "dtype": None,
        "groups": 1,
        "stride": [1],
        "padding": [0],
        "dilation": [1],
        **dict.fromkeys(("alpha", "beta", "weight_norm", "s_w", "s_d", "ds_w", "ds_d"), one),
        **dict.fromkeys(
            ("relative", "weight_space", "need_x", "need_weight", "need_bias", "need_factors", "need_s_w"), True
        ),
    }


def _spoiled(value: Any, chosen: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return chosen.choice([-1, 0, 2**40, float("nan"), float("inf")])
    if isinstance(value, list):
        return chosen.choice([[], [-1], [0, 0, 0], [2**40], [torch.randn(3)]])
    if value is None:
        return chosen.choice([torch.float16, torch.int32, torch.randn(2)])
    return chosen.choice(
        [
            lambda t: t.to(torch.int64),
            lambda t: t.to(torch.complex64),
            lambda t: t.to(chosen.choice([torch.float16, torch.bfloat16, torch.float64])),
            lambda t: t.to("meta"),
            lambda t: t[:0],
            lambda t: t.reshape(-1),
            lambda t: t.unsqueeze(0),
            lambda t: t.mT if t.dim() > 1 else t.expand(5, *t.shape),
            lambda t: torch.as_strided(t, (t.numel() or 1, 3), (0, 0)) if t.numel() else t,
            lambda t: t.to_sparse(),
            lambda t: torch.full_like(t, float("nan")),
            lambda t: torch.full_like(t, 1e38),
            lambda t: t.repeat(*[3] * t.dim()),
            lambda t: torch.empty(0, 0),
            lambda t: None,
            lambda t: "text",
        ]
    )(value)


def hostile_calls(count: int, folder: Path) -> Outcome:
    """Of every operator: an exception, or a result. A crash of the process is seen from outside."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        chosen, outcome = random.Random(1), Outcome()
        torch.manual_seed(0)
        for i in range(count):
            name = chosen.choice(sorted(SCHEMAS))
            operator = getattr(torch.ops.mapsurgery, name).default
            known = _arguments(chosen)
            own = [known[argument.name] for argument in operator._schema.arguments]
            for place in chosen.sample(range(len(own)), chosen.randrange(1, min(3, len(own)) + 1)):
                own[place] = _spoiled(own[place], chosen)
            try:
                operator(*own)
                outcome["a result"] += 1
            except Exception:
                outcome["an exception"] += 1
            os.write(write, f"{name} {i}\n".encode()) if i % 100 == 0 else None
        os.write(write, json.dumps(outcome).encode())
        os._exit(0)
    os.close(write)
    with open(read) as said:
        text = said.read().splitlines()
    _, status = os.waitpid(pid, 0)
    if status:
        print(f"a call after {text[-1] if text else 'the start'} ended the process: {status}", file=sys.stderr)
        return Outcome({WRONG: 1})
    return Outcome(json.loads(text[-1]))


# Interruptions, failures, kills ---------------------------------------------------------------------------------------


def interruptions(count: int, folder: Path, breaking: Callable[[int], Any]) -> Outcome:
    """At so many lines (signals) or operations (failures) of every public function, spread at random over it."""
    outcome = Outcome()
    mapsurgery.save(patched(), folder / "map.safetensors")
    mapsurgery.integrations.peft.save_peft(lora(), folder / "peft")
    for name in CHANGES:
        try:
            outcome["as it was, or as it becomes"] += try_all(name, folder, count, breaking)
        except AssertionError as error:
            print(error, file=sys.stderr)
            outcome[WRONG] += 1
    return outcome


def kills(count: int, folder: Path) -> Outcome:
    """Of a process that saves: what is there loads as one of two adapters, and the next save cleans up."""
    path, chosen, outcome = folder / "adapter.safetensors", random.Random(2), Outcome()
    models = [trained(1), trained(2)]
    mapsurgery.save(models[0], path)
    expected = [model(image()) for model in models]
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            while True:
                for model in models:
                    mapsurgery.save(model, path)
        time.sleep(chosen.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = mapsurgery.load(net().eval(), path)(image())
        outcome["a whole file" if any(torch.equal(found, other) for other in expected) else WRONG] += 1
    left = len(os.listdir(folder)) - 1
    mapsurgery.save(models[0], path)
    outcome[f"files left behind, then removed: {left}"] += 0
    if os.listdir(folder) != [path.name]:
        outcome[WRONG] += 1
    return outcome


ATTEMPTS: dict[str, tuple[Callable[[int, Path], Outcome], int]] = {
    "damaged files": (damaged_files, 20_300),
    "hostile operator calls": (hostile_calls, 6_000),
    "signals within public functions": (lambda count, folder: interruptions(count, folder, signal_at), 150),
    "failing operations of torch": (lambda count, folder: interruptions(count, folder, Failing), 150),
    "kills while saving": (kills, 350),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*ATTEMPTS], choices=[*ATTEMPTS])
    parser.add_argument("--share", type=float, default=1.0, help="of the cases to try")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()  # of torch.export, whose operations fail
    warnings.simplefilter("ignore")
    table = Table("attempt", "cases", "outcome", "seconds")
    wrong = 0
    for name in options.only:
        attempt, count = ATTEMPTS[name]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome = attempt(max(1, int(count * options.share)), Path(folder))
        wrong += outcome[WRONG]
        said = ", ".join(f"{what} {n}" if n else what for what, n in outcome.items() if n or what != WRONG)
        table.add_row(name, str(sum(outcome.values())), said, f"{time.perf_counter() - start:.0f}")
    Console(width=110).print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
