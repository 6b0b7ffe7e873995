"""Every public function that changes a model changes it as a whole or not at all, whatever signal or failure comes.

The k-th line of the library's Python at which a signal arrives, and the k-th operation of torch that fails, run through
the whole of each function; `make test` tries some of them, `make test-long` all.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import Snapshot, image, net, to_generic_point
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mapsurgery
import mapsurgery.integrations.peft
from mapsurgery.interrupts import undone_by, uninterrupted
from mapsurgery.surgery import all_or_nothing

LIBRARY = os.path.dirname(mapsurgery.__file__)
SOME = 24


class Failure(Exception):
    """What a signal's handler, or an operation of torch, raises."""


@dataclass(frozen=True)
class Change:
    """A function that changes a model. Attributes: start: makes the model; run: changes it, a block is left again."""

    start: Callable[[], nn.Module]
    run: Callable[[nn.Module, Path], Any]


def _fresh() -> nn.Module:
    return net().eval()


def patched(**options: Any) -> nn.Module:
    options = {"rank": 2, "train": ["head*"]} | options
    return to_generic_point(mapsurgery.patch(net(), ["stem", "body"], **options)).eval()


def lora() -> nn.Module:
    return to_generic_point(mapsurgery.patch(net(), "body", rank=2, method="lora")).eval()


def _merged(**options: Any) -> nn.Module:
    return mapsurgery.merge(patched(), **options)


def _adalora() -> nn.Module:
    model = patched(update="adalora")
    model(image()).square().mean().backward()
    return model


def _with_gradients() -> nn.Module:
    model = patched(train=[])
    model.stem.adapter.A.data.mul_(64)
    model(image()).square().mean().backward()
    return model


@functools.cache
def _state() -> dict[str, torch.Tensor]:
    return mapsurgery.adapter_state_dict(patched())


@functools.cache
def _peft_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model, peft = lora(), mapsurgery.integrations.peft
    return peft.to_peft_state_dict(model), peft.to_peft_config(model)


def _in_block(block: Callable[..., Any], **options: Any) -> Callable[[nn.Module, Path], None]:
    def run(model: nn.Module, folder: Path) -> None:
        with block(model, **options), torch.no_grad():
            model(image())

    return run


def _allocate(model: nn.Module, folder: Path) -> None:
    mapsurgery.RankAllocator(model, target_rank=1, total_steps=4, warmup=0, final=1, interval=1).step()


def _exported(model: nn.Module, folder: Path) -> None:
    mapsurgery.export(model, folder / "model.pt2", (image(),), merged=True)


CHANGES = {
    "patch": Change(_fresh, lambda model, _: mapsurgery.patch(model, ["stem", "body"], rank=2, train=["head*"])),
    "unpatch": Change(patched, lambda model, _: mapsurgery.unpatch(model)),
    "load": Change(_fresh, lambda model, folder: mapsurgery.load(model, folder / "map.safetensors")),
    "load_adapter_state_dict": Change(
        lambda: to_generic_point(patched(), seed=9),
        lambda model, _: mapsurgery.load_adapter_state_dict(model, _state()),
    ),
    "merge": Change(patched, lambda model, _: mapsurgery.merge(model)),
    "merge(keep_base=True)": Change(patched, lambda model, _: mapsurgery.merge(model, keep_base=True)),
    "merge(final=True)": Change(patched, lambda model, _: mapsurgery.merge(model, final=True)),
    "unmerge": Change(_merged, lambda model, _: mapsurgery.unmerge(model)),
    "unmerge of a kept base": Change(lambda: _merged(keep_base=True), lambda model, _: mapsurgery.unmerge(model)),
    "disabled": Change(patched, _in_block(mapsurgery.disabled)),
    "disabled(trained=True)": Change(patched, _in_block(mapsurgery.disabled, trained=True)),
    "reuse_norms": Change(patched, _in_block(mapsurgery.reuse_norms)),
    "verify": Change(patched, lambda model, _: mapsurgery.verify(model, image())),
    "contrib.rebalance": Change(_with_gradients, lambda model, _: mapsurgery.contrib.rebalance(model)),
    "RankAllocator": Change(_adalora, _allocate),
    "export": Change(patched, _exported),
    "integrations.peft.load_peft": Change(
        _fresh, lambda model, folder: mapsurgery.integrations.peft.load_peft(model, folder / "peft")
    ),
    "integrations.peft.from_peft_state_dict": Change(
        _fresh,
        lambda model, _: mapsurgery.integrations.peft.from_peft_state_dict(model, *_peft_state()),
    ),
}

CHANGES_NO_MODEL = {
    *("plan", "save", "report", "track", "param_groups", "adapter_state_dict", "orthogonality_loss"),
    *("native_info", "cmake_prefix_path", "register_method", "register_update"),
    *("integrations.peft.save_peft", "integrations.peft.to_peft_state_dict", "integrations.peft.to_peft_config"),
    *("contrib.BetaSchedule", "contrib.linear_warmup"),
}


def _public() -> Iterator[str]:
    for prefix, module in (
        ("", mapsurgery),
        ("contrib.", mapsurgery.contrib),
        ("integrations.peft.", mapsurgery.integrations.peft),
    ):
        for name in module.__all__:
            if inspect.isfunction(getattr(module, name)) or name in ("RankAllocator", "BetaSchedule"):
                yield prefix + name


def test_every_public_function_is_known_here() -> None:
    known = {name.partition("(")[0].partition(" of ")[0] for name in CHANGES} | CHANGES_NO_MODEL
    assert {*_public()} <= known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    mapsurgery.save(patched(), path / "map.safetensors")
    mapsurgery.integrations.peft.save_peft(lora(), path / "peft")
    return path


@contextmanager
def signal_at(line: int) -> Iterator[list[int]]:
    """SIGALRM, whose handler raises, when the k-th line of the library runs. Gives a list with the lines that ran."""
    seen = [0]

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == line:
                signal.raise_signal(signal.SIGALRM)
        return trace

    def handler(number: int, frame: Any) -> None:
        raise Failure(f"signal {number}")

    before, tracing = signal.signal(signal.SIGALRM, handler), sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(tracing)
        assert signal.signal(signal.SIGALRM, before) is handler, "the program's handler was not put back"


class Failing(TorchDispatchMode):
    """The k-th operation fails."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise Failure(f"operation {self.at}, {func}")
        return func(*args, **(kwargs or {}))


def _as_after(model: nn.Module, after: nn.Module) -> bool:
    types = [type(module).__name__ for module in model.modules()] == [
        type(module).__name__ for module in after.modules()
    ]
    a, b = model.state_dict(), after.state_dict()
    flags = [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in after.parameters()]
    return types and flags and list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def _numbers(count: int, some: int, name: str) -> list[int]:
    every = range(1, count + 1)
    return sorted(random.Random(name).sample(every, min(some, count))) if some else [*every]


def try_all(name: str, folder: Path, some: int, breaking: Callable[[int], Any]) -> int:
    """Break one function at every place (some: 0) or at so many. Returns how many were tried."""
    change = CHANGES[name]

    def run(model: nn.Module, k: int) -> int:
        torch.manual_seed(0)
        with breaking(k) as counter:
            change.run(model, folder)
        return counter.seen if isinstance(counter, Failing) else counter[0]

    change.run(change.start(), folder)  # what is made once is there
    after = change.start()
    count = run(after, 0)
    failed = 0
    for k in _numbers(count, some, name):
        model = change.start()
        snapshot, grads = Snapshot(model), [p.grad for p in model.parameters()]
        try:
            run(model, k)
        except Exception as error:  # torch.export and verify say in words of their own what failed
            failed += 1
            if not _as_after(model, after):
                try:
                    snapshot.assert_holds(model)
                    assert [p.grad for p in model.parameters()] == grads
                except AssertionError as difference:
                    raise AssertionError(f"{name}, {k} of {count}: {error!r} leaves neither") from difference
    assert failed or not count
    return len(_numbers(count, some, name))


@pytest.mark.parametrize("name", [*CHANGES])
def test_a_signal_leaves_the_model_as_it_was_or_as_it_becomes(name: str, folder: Path) -> None:
    try_all(name, folder, SOME, signal_at)


@pytest.mark.parametrize("name", [*CHANGES])
def test_a_failure_leaves_the_model_as_it_was_or_as_it_becomes(name: str, folder: Path) -> None:
    try_all(name, folder, SOME, Failing)


@pytest.mark.long
@pytest.mark.parametrize("breaking", [signal_at, Failing], ids=["signal", "failure"])
@pytest.mark.parametrize("name", [*CHANGES])
def test_at_every_line_and_operation(name: str, folder: Path, breaking: Any) -> None:
    try_all(name, folder, 0, breaking)


class Odd(nn.Module):
    """Attributes and containers that forbid what torch's allow, as a configuration of diffusers does."""

    class Frozen(OrderedDict):
        def __init__(self, required: int, **values: Any) -> None:
            super().__init__(**values)

        def __setitem__(self, key: Any, value: Any) -> None:
            if hasattr(self, "ready"):
                raise RuntimeError("frozen")
            super().__setitem__(key, value)

        def update(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("frozen")

        copy = None

    def __init__(self) -> None:
        super().__init__()
        self.config = self.Frozen(1, width=8)
        self.config.ready = True
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise RuntimeError("keeps its class")
        super().__setattr__(name, value)


@pytest.mark.parametrize("name", ["load", "unpatch"])
def test_a_model_with_ways_of_its_own_is_put_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapsurgery.save(mapsurgery.patch(Odd(), "layer", rank=2, train=["head"]), tmp_path / "file")
    model = Odd() if name == "load" else mapsurgery.patch(Odd(), "layer", rank=2, train=["head"])
    model.head.weight.data.add_(1)
    snapshot, config = Snapshot(model), dict(model.config)
    change = {
        "load": lambda: mapsurgery.load(model, tmp_path / "file", base="ignore"),
        "unpatch": lambda: mapsurgery.unpatch(model),
    }
    original = all_or_nothing.Journal.write
    calls = iter(range(100))

    def failing(self: Any, place: Any, value: Any) -> None:
        original(self, place, value)
        if next(calls) == 1:
            raise Failure("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(all_or_nothing.Journal, "write", failing)
        with pytest.raises(Failure):
            change[name]()
    snapshot.assert_holds(model)
    assert dict(model.config) == config
    change[name]()


# The sections themselves ----------------------------------------------------------------------------------------------


def test_every_signal_of_a_block_reaches_its_handler_after_it() -> None:
    caught: list[int] = []

    def raising(number: int, frame: Any) -> None:
        caught.append(number)
        raise Failure(str(number))

    numbers = (signal.SIGALRM, signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.signal(number, raising) for number in numbers}
    try:
        with pytest.raises(Failure), uninterrupted():
            for number in numbers:
                signal.raise_signal(number)
            assert not caught
        assert caught == [*numbers]
        assert all(signal.getsignal(number) is raising for number in numbers)
        with pytest.raises(Failure):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGUSR2)
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_what_is_to_be_undone_is_although_its_first_run_fails() -> None:
    runs: list[int] = []

    def undo() -> None:
        runs.append(len(runs))
        if len(runs) == 1:
            raise Failure("once")

    with pytest.raises(Failure), undone_by(undo):
        pass
    assert runs == [0, 1]


@pytest.mark.parametrize("when", ["begins", "ends"])
def test_a_handler_that_raises_at_the_edge_of_a_section_loses_no_signal(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that comes while handlers are exchanged runs its own within `signal.signal`."""
    came: list[int] = []
    sent: list[int] = []
    exchange, calls = signal.signal, iter(range(1_000_000))

    def exchanged(number: int, handler: Any) -> Any:
        before = exchange(number, handler)
        if number == signal.SIGUSR1:
            sent.append(number)
            signal.raise_signal(signal.SIGUSR1)  # held now, or delivered
        if number == signal.SIGUSR2 and next(calls) == (0 if when == "begins" else 1):
            raise Failure
        return before

    before = [exchange(signal.SIGUSR1, lambda number, frame: came.append(number)), signal.getsignal(signal.SIGUSR2)]
    exchange(signal.SIGUSR2, lambda number, frame: None)
    own = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(signal, "signal", exchanged)
    try:
        with pytest.raises(Failure), uninterrupted():
            pass
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        monkeypatch.undo()
        for number, handler in zip((signal.SIGUSR1, signal.SIGUSR2), before, strict=True):
            signal.signal(number, handler)
    assert len(sent) >= 2 and came == sent
