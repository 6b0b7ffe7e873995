"""`reuse_norms`: the same bits from one computation of each norm, and refusal of whatever would make it wrong."""

from __future__ import annotations

import copy
import io
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from definition import image, net, train_steps
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mapsurgery
from mapsurgery import reuse_norms
from mapsurgery.methods import Adapter

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A patched net with convolutions, linear layers and an embedding's relatives, away from its start."""
    return train_steps(mapsurgery.patch(net(), "*", rank=2, **options), image(), lr=0.05).to(dtype)


def layers(dtype: torch.dtype, device: object = "cpu") -> nn.Module:
    """A convolution in activation space, one in weight space, and two linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 24),
        nn.Linear(24, 5),
    )
    mapsurgery.patch(model.to(device, dtype), "*", rank=2, init="random")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter) / 5)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: Callable[[Tensor], Tensor], x: Tensor, micro_batches: int = 2) -> list[Tensor]:
    """Outputs of micro-batches, whose gradients add up."""
    outputs = []
    for part in x.chunk(micro_batches):
        y = model(part)
        y.float().pow(2).mean().backward()
        outputs.append(y.detach())
    return outputs


def both(model: nn.Module, run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Results and gradients of a run outside of the block, and inside."""
    results = []
    for block in (nullcontext(), reuse_norms(model)):
        model.zero_grad()
        with block:
            outputs = run()
        found = gradients(model)
        assert found
        results.append([*outputs, *found.values()])
    return results


def assert_same_bits(model: nn.Module, run: Callable[[], list[Tensor]]) -> None:
    outside, inside = both(model, run)
    assert len(outside) == len(inside) and all(map(torch.equal, outside, inside))


class Runs(TorchDispatchMode):
    """Counts how often each operator of the library runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mapsurgery":
            self.count[func.__name__.split(".")[0]] += 1
        return func(*args, **kwargs or {})


def adapters(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def no_norms_left(model: nn.Module) -> bool:
    return all(adapter.scales is None for adapter in adapters(model))


# The same numbers ----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_outputs_and_gradients_keep_every_bit(dtype: torch.dtype, micro_batches: int) -> None:
    model, x = layers(dtype), image(6).to(dtype)
    assert_same_bits(model, lambda: step(model, x, micro_batches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_every_bit(dtype: torch.dtype) -> None:
    model, x = layers(torch.float32), image(4)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return step(model, x)

    assert_same_bits(model, run)
    with torch.autocast("cpu", dtype=dtype):  # entered under autocast: the norms are not rounded
        assert_same_bits(model, lambda: step(model, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_keep_every_bit(reentrant: bool) -> None:
    model, x = layers(torch.float32), image(4).requires_grad_()
    assert_same_bits(model, lambda: step(lambda part: checkpoint(model, part, use_reentrant=reentrant), x))


def test_a_backward_that_recomputes_after_the_block_is_right() -> None:
    model, x = layers(torch.float32), image(4)
    outside, _ = both(model, lambda: step(model, x, 1))
    model.zero_grad()
    with reuse_norms(model):
        y = checkpoint(model, x, use_reentrant=False)
    y.pow(2).mean().backward()
    assert all(map(torch.equal, outside[1:], gradients(model).values()))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])])
def test_compiled_steps_keep_every_bit_and_compile_once_for_the_block(backend: str) -> None:
    model, x = layers(torch.float32), image(4)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_same_bits(model, lambda: step(compiled, x))
    assert counter.frame_count == 2  # compiled code computes its own norms
    train_steps(model, x, steps=1)
    assert_same_bits(model, lambda: step(compiled, x))
    assert counter.frame_count == 2


@pytest.mark.parametrize("update", ["pissa", "vera", "adalora", "flora", "loha", "lokr", "dense"])
def test_every_update_family_keeps_every_bit(update: str) -> None:
    model, x = trained(update=update), image()
    assert_same_bits(model, lambda: step(model, x))


@pytest.mark.parametrize("options", [{"method": "lora"}, {"method": "dora"}, {"dropout": 0.5}], ids=str)
def test_what_has_no_norm_to_reuse_runs_as_ever(options: dict[str, Any]) -> None:
    model, x = trained(**options), image()

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        return step(model, x)

    assert_same_bits(model, run)


def test_double_backward_is_that_outside_of_the_block() -> None:
    model, x = layers(torch.float64), image(2).double().requires_grad_()

    def run() -> list[Tensor]:
        (gradient,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        gradient.pow(2).sum().backward()
        return [gradient.detach()]

    for outside, inside in zip(*both(model, run), strict=True):
        torch.testing.assert_close(inside, outside, rtol=1e-12, atol=1e-12)


def test_functional_calls_with_other_parameters_compute_their_own_norms() -> None:
    model, x = layers(torch.float64), image(2).double()
    other = {name: p.detach() * 1.5 for name, p in model.named_parameters() if p.requires_grad}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    runs = (lambda: call(other), lambda: torch.compile(call, backend="aot_eager", fullgraph=True)(other))
    expected = call(other)
    with reuse_norms(model):
        assert not torch.equal(model(x), expected)
        assert all(torch.equal(run(), expected) for run in runs)


def test_torch_func_derives_through_the_norm() -> None:
    model, x = layers(torch.float64), image(2).double()
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).pow(2).sum()

    expected, expected_x = torch.func.grad(loss)(own), torch.func.jacrev(model)(x)
    with reuse_norms(model):
        found = torch.func.grad(loss)(own)
        torch.testing.assert_close(torch.func.jacrev(model)(x), expected_x)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


# One computation -----------------------------------------------------------------------------------------------------


def test_each_norm_is_computed_once() -> None:
    model, x = layers(torch.float32), image(8)
    with Runs() as runs, reuse_norms(model):
        step(lambda part: checkpoint(model, part, use_reentrant=False), x, 4)
    forwards = 2 * 4  # of each micro-batch: once more in its backward
    assert runs.count == {
        "map_scales": 4,
        "lowrank_linear": 2 * forwards,
        "lowrank_conv": 2 * forwards,
        "lowrank_linear_backward": 2 * 4,
        "lowrank_conv_backward": 2 * 4,
    }


def test_nested_blocks_compute_nothing_and_the_outermost_forgets() -> None:
    model, x = layers(torch.float32), image(2)
    with Runs() as runs, reuse_norms(model):
        with reuse_norms(model[:2]), reuse_norms(model):
            model(x)
        assert not no_norms_left(model)
        model(x)
    assert runs.count["map_scales"] == 4 and no_norms_left(model)


def test_no_more_is_saved_for_the_backward() -> None:
    model, x = layers(torch.float32), image(4)

    def saved(block: AbstractContextManager[Any]) -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with block, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = [model(part) for part in x.chunk(2)]
        assert all(y.requires_grad for y in outputs)
        return sum(seen.values())

    assert saved(reuse_norms(model)) < saved(nullcontext())


def test_a_tied_embedding_computes_its_own_and_the_linear_layer_reuses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    model = mapsurgery.patch(Tied(), "*", rank=2)
    ids = torch.arange(7)
    train_steps(model, ids)
    assert_same_bits(model, lambda: step(model, ids))
    with Runs() as runs, reuse_norms(model):
        model(ids)
    assert runs.count["map_scales"] == 2 and runs.count["lowrank_linear"] == 1  # the embedding computes its own


# What it refuses -----------------------------------------------------------------------------------------------------


def _in_place(adapter: Adapter) -> None:
    with torch.no_grad():
        adapter.B.mul_(1.5)


@pytest.mark.parametrize("name", ["A", "B", "alpha", "beta", "weight_norm"])
def test_a_changed_tensor_is_refused_by_the_end(name: str) -> None:
    model, x = layers(torch.float32), image(2)

    def change() -> None:
        with torch.no_grad():
            getattr(model[4].adapter, name).mul_(1.5)

    with pytest.raises(RuntimeError, match=rf"^4: {name} of its adapter was changed"), reuse_norms(model):
        change()
        model(x)
    with pytest.raises(RuntimeError, match=rf"^4: {name} of its adapter was changed"), reuse_norms(model):
        change()
    assert no_norms_left(model)
    model(x)


@pytest.mark.parametrize("name", ["A", "alpha"])
def test_other_memory_is_seen_at_the_end(name: str) -> None:
    model = layers(torch.float32)
    with pytest.raises(RuntimeError, match=rf"^4: {name} .* was changed"), reuse_norms(model):
        getattr(model[4].adapter, name).data = getattr(model[4].adapter, name).data.clone()


def test_a_replaced_parameter_is_refused_at_the_end() -> None:
    model = layers(torch.float32)
    with pytest.raises(RuntimeError, match="^4: A of its adapter was changed"), reuse_norms(model):
        model[4].adapter.A = nn.Parameter(model[4].adapter.A.detach().clone())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_the_optimiser_is_refused_before_it_changes_anything(fused: bool) -> None:
    model, x = layers(torch.float32), image(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=fused)
    before = [p.detach().clone() for p in trained]
    with pytest.raises(RuntimeError, match=r"^0: .* to be changed by AdamW.step"), reuse_norms(model):
        step(model, x)
        optimizer.step()
    assert all(map(torch.equal, before, trained))
    optimizer.step()
    assert not any(map(torch.equal, before, trained))


def test_other_optimisers_may_step() -> None:
    model, x = layers(torch.float32), image(2)
    head = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with reuse_norms(model):
        head(model(x)).sum().backward()
        optimizer.step()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_that_changes_a_parameter_is_refused_at_the_end() -> None:
    model, x = layers(torch.float32), image(2)

    def change_and_call() -> Tensor:
        with torch.no_grad():
            model[4].adapter.A.mul_(2)
        return model(x)

    compiled = torch.compile(change_and_call, backend="aot_eager")
    with pytest.raises(RuntimeError, match="^4: A of its adapter was changed"), reuse_norms(model):
        compiled()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_block_inside_of_one_graph_is_refused() -> None:
    model, x = layers(torch.float32), image(2)

    def call() -> Tensor:
        with reuse_norms(model):
            return model(x)

    with pytest.raises(Exception, match="reuse_norms|Observed exception"):
        torch.compile(call, backend="aot_eager", fullgraph=True)()
    assert no_norms_left(model)


def test_loading_inside_of_the_block_is_refused() -> None:
    model, x = layers(torch.float32), image(2)
    state = mapsurgery.adapter_state_dict(model)
    with pytest.raises(RuntimeError, match="was changed inside mapsurgery.reuse_norms"), reuse_norms(model):
        mapsurgery.load_adapter_state_dict(model, state)
        model(x)


def test_bad_arguments_are_refused() -> None:
    for model, error, message in ((net(), ValueError, "patch"), (3, TypeError, "int")):
        with pytest.raises(error, match=message), reuse_norms(model):  # type: ignore[type-var]
            pass


# What the block leaves -----------------------------------------------------------------------------------------------


def test_an_exception_passes_and_the_norms_are_forgotten() -> None:
    model = layers(torch.float32)
    with pytest.raises(ZeroDivisionError), reuse_norms(model):
        _in_place(model[4].adapter)  # the exception itself is what the user should see
        1 / 0  # noqa: B018
    assert no_norms_left(model)


def test_copies_pickles_and_state_dicts_carry_nothing() -> None:
    model, x = layers(torch.float32), image(2)
    names = list(model.state_dict())
    file = io.BytesIO()
    with reuse_norms(model):
        assert list(model.state_dict()) == names
        copied = copy.deepcopy(model)
        torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert no_norms_left(other)
        _in_place(other[4].adapter)
        assert not torch.equal(other(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_and_traced_graphs_hold_no_norm(strict: bool) -> None:
    model, x = layers(torch.float32), image(2)
    with reuse_norms(model):
        program = torch.export.export(model, (x,), strict=strict).module()
        traced = torch.fx.symbolic_trace(model[4])
        assert torch.equal(program(x), model(x))
    for name, parameter in program.named_parameters():
        if name.endswith("adapter.B"):
            parameter.data.mul_(2)
    for adapter in adapters(model):
        adapter.B.data.mul_(2)
    torch.testing.assert_close(program(x), model(x))
    z = torch.randn(3, 128)
    assert torch.equal(traced(z), model[4](z))


def test_disabled_unpatched_and_merged_inside_of_the_block() -> None:
    model, x = trained(), image()
    base = net().train()(x)
    with reuse_norms(model):
        y = model(x)
        with mapsurgery.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), y)
        mapsurgery.merge(model, keep_base=True)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        mapsurgery.unmerge(model)
        assert torch.equal(model(x), y)
        mapsurgery.unpatch(model)
        assert torch.equal(model(x), base)


def test_inference_mode_inside_and_around() -> None:
    model, x = layers(torch.float32), image(2)
    expected = model(x).detach()
    with reuse_norms(model), torch.inference_mode():
        assert torch.equal(model(x), expected)
    with torch.inference_mode(), reuse_norms(model):
        assert torch.equal(model(x), expected)
        with torch.inference_mode(False):
            model(x.clone()).sum().backward()  # no inference tensor may be saved for it
    with torch.inference_mode():
        made = mapsurgery.patch(nn.Linear(4, 3), "*", rank=2)
        with reuse_norms(made):
            made(torch.ones(2, 4))


def test_a_block_of_another_thread_does_not_end_this_ones() -> None:
    model, x = layers(torch.float32), image(2)
    expected = model(x)

    def other() -> None:
        with reuse_norms(model):
            model(x)

    with Runs() as runs, reuse_norms(model):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(model(x), expected)
    assert runs.count["map_scales"] == 4 and no_norms_left(model)


def test_diverged_parameters_are_no_change() -> None:
    model, x = layers(torch.float32), image(2)
    with torch.no_grad():
        model[4].adapter.A.fill_(float("nan"))
    with reuse_norms(model):
        assert model(x).isnan().all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_the_bits_are_kept_and_a_captured_step_computes_its_norms_anew() -> None:
    model, x = layers(torch.float32, "cuda"), image(4).cuda()
    assert_same_bits(model, lambda: step(model, x))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad(), reuse_norms(model):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad(), reuse_norms(model):
        y = model(x)
    _in_place(model[4].adapter)
    graph.replay()
    torch.testing.assert_close(y, model(x).detach())
