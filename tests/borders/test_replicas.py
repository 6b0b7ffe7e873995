"""Several threads over one model: torch's DataParallel, which gives each a replica, and loops of one's own.

`torch.nn.parallel.replicate` itself makes the replicas. It copies between GPUs; on a CPU the copies are products by 1,
not leaves and with a gradient like its own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from definition import CASES as FUSED_CASES
from definition import Case as FusedCase
from definition import patched_case, to_generic_point
from test_layer_types import CASES, Case
from torch import Tensor, nn

import mapsurgery
from mapsurgery import updates

replicate_module = sys.modules["torch.nn.parallel.replicate"]  # its name in the package is the function's


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [
            [t.detach().clone() if detach or not t.is_floating_point() else t * 1 for t in tensors] for _ in devices
        ]

    monkeypatch.setattr(replicate_module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(replicate_module, "_broadcast_coalesced_reshape", copies)


def _assert_replicas_compute_the_same(model: nn.Module, x: Tensor) -> None:
    own = [p for p in model.parameters() if p.requires_grad]
    expected = model(x)
    gradients = torch.autograd.grad(expected.double().square().sum(), own)
    replicas = replicate_module.replicate(model, [0, 1])
    with ThreadPoolExecutor(2) as pool:  # as `parallel_apply` does
        outputs = list(pool.map(lambda replica: replica(x), replicas))
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(sum(output.double().square().sum() for output in outputs), own)
    for want, got in zip(gradients, found, strict=True):
        torch.testing.assert_close(got, 2 * want, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_of_every_layer_type(case: Case) -> None:
    _assert_replicas_compute_the_same(to_generic_point(case.patched()), case.data())


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize(
    "case", [c for c in FUSED_CASES if c.name in ("linear", "transformers_conv1d", "conv2d")], ids=str
)
@pytest.mark.parametrize("method", ["map", "dora"])
@pytest.mark.parametrize("update", updates.REGISTRY)
def test_replicas_of_every_family(case: FusedCase, method: str, update: str) -> None:
    _, model, x = patched_case(case, dtype=torch.float64, method=method, update=update)
    _assert_replicas_compute_the_same(model, x)


@pytest.mark.usefixtures("_on_cpu")
def test_a_shared_adapter_is_where_the_replica_of_the_weight_is() -> None:
    case = next(case for case in CASES if case.name == "tied")
    model = to_generic_point(case.patched())
    replica = replicate_module.replicate(model, [0])[0]
    layer = next(m for m in replica.modules() if "adapter" in m.__dict__ and "adapter" not in m._modules)
    layer.__dict__["weight"] = layer.__dict__["weight"].to("meta")  # as on another GPU
    assert all(getattr(layer.adapter_of("weight"), name).is_meta for name in model.embed.adapter.own_tensors())
    assert not model.embed.adapter.is_meta


class Experts(nn.Module):
    """Raw parameters, and a place in the midst of its forward where threads wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.wait: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        first = x @ self.up[0].T
        self.wait()
        return first + x @ self.up[1].T


def test_threads_that_train_one_model_have_graphs_of_their_own() -> None:
    torch.manual_seed(0)
    model = to_generic_point(mapsurgery.patch(Experts().double(), [], parameters="up", rank=2))
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), model.adapter_up.A)[0]
    barrier = threading.Barrier(2, timeout=30)
    model.wait = barrier.wait

    def step(_: int) -> Tensor:
        output = model(x)
        barrier.wait()  # the forward of both is over before any runs backward
        return torch.autograd.grad(output.square().sum(), model.adapter_up.A)[0]

    with ThreadPoolExecutor(2) as pool:
        for gradient in pool.map(step, range(2)):
            torch.testing.assert_close(gradient, expected)


def _recurrent() -> nn.Module:
    class Last(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    return Last(6, 6, batch_first=True)


def _parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 6))


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "make, options",
    [
        (Experts, {"targets": [], "parameters": "up"}),
        (_recurrent, {"targets": "*"}),
        (_parametrised, {"targets": "*"}),
        (_tied, {"targets": "*"}),
    ],
)
def test_threads_accumulate_the_gradients_of_one_after_the_other(make: Callable[[], nn.Module], options: dict) -> None:
    """Each with its own forwards and backwards over one model, adding to `.grad`, as torch does without adapters."""
    torch.manual_seed(0)
    model = to_generic_point(mapsurgery.patch(make().double(), rank=2, **options))
    inputs = torch.randn(2, 4, 5, 6, dtype=torch.float64)

    def steps(x: Tensor) -> None:
        for _ in range(10):
            model(x).square().sum().backward()

    def gradients() -> list[Tensor]:
        trained = [p for p in model.parameters() if p.requires_grad]
        found = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        return found

    for x in inputs:
        steps(x)
    expected = gradients()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(steps, inputs))
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = mapsurgery.patch(Experts(), [], parameters="up", rank=2)
    x = torch.randn(4, 6)
    before = set(model.__dict__)

    def fail() -> None:
        raise RuntimeError("midway")

    model.wait = fail
    with pytest.raises(RuntimeError, match="midway"):
        model(x)
    assert model.up is not model.up  # read anew each time outside of a forward
    model.wait = lambda: None
    with torch.no_grad():
        model.adapter_up.alpha.mul_(2)
    assert torch.equal(model(x), x @ model.up[0].T + x @ model.up[1].T)
    assert set(model.__dict__) == before
