"""What torch does to models beside compiling them: function transforms, checkpointing, tracing, counting, graphs."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.fx
import torchvision
from definition import CASES, Case, defined_weight, image, net, patched_case, to_generic_point
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import mapsurgery
from mapsurgery.surgery.adapted import AdaptedLayer

every_layer = pytest.mark.parametrize("case", CASES, ids=str)
_FIRST = {type(case.make()): case for case in CASES}.values()
one_of_a_class = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in _FIRST else pytest.mark.long) for case in CASES], ids=str
)
some_layers = pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("linear", "conv2d", "conv2d_depthwise", "timm_std_conv")], ids=str
)
_ops = torch.ops.mapsurgery


def _patched(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return to_generic_point(mapsurgery.patch(net() if model is None else model, "*", rank=2, **options)).eval()


def _split(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained parameters, and all else that the model's forward reads."""
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return own, {name: t.detach() for name, t in rest.items() if name not in own}


# torch.func --------------------------------------------------------------------------------------------------------


@every_layer
def test_many_adapters_run_in_one_batch_as_in_a_loop(case: Case) -> None:
    _, adapted, x = patched_case(case, dtype=torch.float64)
    models = [to_generic_point(copy.deepcopy(adapted), seed) for seed in (1, 2, 3)]
    _, frozen = _split(adapted)
    stacked = {name: torch.stack([_split(m)[0][name] for m in models]) for name in _split(adapted)[0]}

    def run(own: dict[str, Tensor]) -> Tensor:
        return functional_call(adapted, {**frozen, **own}, (x,))

    together = vmap(run)(stacked)
    gradients = vmap(grad(lambda own: run(own).pow(2).sum()))(stacked)
    for i, model in enumerate(models):
        y = model(x)
        torch.testing.assert_close(together[i], y, rtol=1e-9, atol=1e-9)
        y.pow(2).sum().backward()
        for name, found in gradients.items():
            torch.testing.assert_close(found[i], model.get_parameter(name).grad, rtol=1e-8, atol=1e-9)


_PAGE = Path(__file__).parent.parent / "docs" / "torch.md"


def test_the_example_of_many_adapters_runs() -> None:
    models = [to_generic_point(_patched(), seed) for seed in (1, 2)]
    x = torch.stack([image(), image() * 2])
    expected = torch.stack([one(inputs) for one, inputs in zip(models, x, strict=True)])
    states = [mapsurgery.adapter_state_dict(one) for one in models]
    known = {"torch": torch, "mapsurgery": mapsurgery, "model": _patched(), "states": states, "x": x}
    exec(_PAGE.read_text().split("```python\n")[1].split("```")[0], known)
    torch.testing.assert_close(known["y"], expected)


@every_layer
def test_a_batch_of_inputs_by_vmap_is_the_loop(case: Case) -> None:
    _, adapted, x = patched_case(case, dtype=torch.float64)
    inputs = torch.stack([x, -x, x * 2])
    expected = torch.stack([adapted(one) for one in inputs])
    torch.testing.assert_close(vmap(adapted)(inputs), expected, rtol=1e-9, atol=1e-9)


def _definition(case: Case) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """A layer's output as a function of its adapter's A, by the library and by the materialised definition."""
    original, adapted, x = patched_case(case, dtype=torch.float64)
    a = adapted.adapter

    def by_library(A: Tensor) -> Tensor:
        return functional_call(adapted, {"adapter.A": A}, (x,)).sin()

    def by_definition(A: Tensor) -> Tensor:
        W = original.weight.detach()
        weight = defined_weight(W.flatten(1), A, a.B, a.alpha, a.beta, a.init.tau, a.init.relative).reshape(W.shape)
        return functional_call(original, {"weight": weight}, (x,)).sin()

    return by_library, by_definition, a.A.detach()


@some_layers
def test_forward_mode_and_reverse_mode_jacobians_are_those_of_the_definition(case: Case) -> None:
    found, wanted, A = _definition(case)
    tangent = torch.randn_like(A)
    for a, b in zip(jvp(found, (A,), (tangent,)), jvp(wanted, (A,), (tangent,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    expected = jacrev(wanted)(A)
    torch.testing.assert_close(jacrev(found)(A), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(jacfwd(found)(A), expected, rtol=1e-8, atol=1e-9)


@some_layers
def test_the_hessian_is_that_of_the_definition(case: Case) -> None:
    found, wanted, A = _definition(case)
    H = hessian(lambda A: found(A).sum())(A)
    torch.testing.assert_close(H, hessian(lambda A: wanted(A).sum())(A), rtol=1e-7, atol=1e-8)
    assert H.abs().max() > 1e-3


# Activation checkpointing ------------------------------------------------------------------------------------------


class _Runs(TorchDispatchMode):
    """Counts how often each operator of the library runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mapsurgery":
            self.count[func._schema.name] += 1
        return func(*args, **kwargs or {})


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (_ops.lowrank_linear.default, _ops.lowrank_conv.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


_SELECTIVE = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, _keep_products)}


def _step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The gradients of one training step."""
    model.zero_grad()
    run(x).pow(2).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("options", "forwards"),
    [({"use_reentrant": True}, 2), ({"use_reentrant": False}, 2), (_SELECTIVE, 1)],
    ids=["reentrant", "not_reentrant", "selective"],
)
def test_checkpointing_recomputes_what_it_is_told_to(options: dict[str, Any], forwards: int) -> None:
    model = _patched()
    x = image().requires_grad_()
    expected = _step(model, model, x)
    with _Runs() as runs:
        found = _step(model, lambda x: checkpoint(model, x, **options), x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert runs.count["mapsurgery::lowrank_linear"] == 3 * forwards
    assert runs.count["mapsurgery::lowrank_conv"] == forwards
    assert runs.count["mapsurgery::lowrank_linear_backward"] == 3


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("options", [{"use_reentrant": False}, _SELECTIVE], ids=["whole", "selective"])
def test_compiled_checkpointing_recomputes_what_it_is_told_to(options: dict[str, Any]) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    backward: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        backward.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph.forward, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
    )
    model = _patched()
    expected = _step(model, model, image())
    run = torch.compile(lambda x: checkpoint(model, x, **options), backend=backend, fullgraph=True)
    for a, b in zip(_step(model, run, image()), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert backward["mapsurgery.lowrank_linear_backward.default"] == 3
    again = backward["mapsurgery.lowrank_linear.default"]
    assert again == 0 if options is _SELECTIVE else again > 0


# CUDA graphs and determinism ---------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_captured_training_step_replays_as_the_eager_one() -> None:
    models = [_patched().cuda() for _ in range(2)]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in models]
    x = image().cuda()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(models[0], optimizers[0])
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(models[0], optimizers[0])
    for i in range(4):
        x.copy_(image().cuda() * (i + 1))
        graph.replay()
    x.copy_(image().cuda())
    for _ in range(3):
        step(models[1], optimizers[1])
    for i in range(4):
        x.copy_(image().cuda() * (i + 1))
        step(models[1], optimizers[1])
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_never_waits_for_the_gpu(dtype: torch.dtype) -> None:
    for case in (c for c in CASES if c.fused):
        _, adapted, x = patched_case(case, device=torch.device("cuda"))
        adapted, x = adapted.to(dtype), x.to(dtype).requires_grad_()
        optimizer = torch.optim.AdamW(mapsurgery.param_groups(adapted, lr=1e-3), foreach=True)
        adapted(x).sum().backward()  # what is built once may wait
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            adapted(x).sum().backward()
            optimizer.step()
            with torch.no_grad():
                adapted(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_deterministic_mode_runs_and_gives_the_same_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        for case in CASES:
            if device.type == "cuda" and any(
                mode in case.name for mode in ("replicate", "reflect", "conv3d_depthwise")
            ):
                continue  # torch has no deterministic backward of these paddings on a GPU
            _, adapted, x = patched_case(case, device=device)
            first, second = (_step(adapted, adapted, x) for _ in range(2))
            assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case.name
    finally:
        torch.use_deterministic_algorithms(False)


# Counting and profiling --------------------------------------------------------------------------------------------


def _flops(function: Callable[..., Any], *args: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def test_a_patched_model_counts_the_base_and_a_little_more() -> None:
    base, model, x = net().eval(), _patched(), image()
    plain, adapted = _flops(base, x), _flops(model, x)
    assert plain < adapted < 2 * plain


def test_the_profiler_names_the_operators_with_their_shapes() -> None:
    model = _patched()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(image()).sum().backward()
    events = {event.name: event.input_shapes for event in profiler.events()}
    assert events["mapsurgery::lowrank_conv"][:2] == [[4, 3, 6, 6], [8, 3, 3, 3]]
    assert events["mapsurgery::lowrank_conv_backward"][0] == [4, 8, 6, 6]
    assert [4, 8] in events["mapsurgery::lowrank_linear"] and "mapsurgery::lowrank_linear_backward" in events


# Tracing -----------------------------------------------------------------------------------------------------------


def _traced_alike(original: nn.Module, adapted: nn.Module, x: Tensor) -> None:
    """torch.fx: where the original can be traced, the adapted one can, is differentiable, and copies as one."""
    try:
        torch.fx.symbolic_trace(original)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is torch's or the model's)
        pytest.skip(f"the unpatched model cannot be traced either: {type(error).__name__}: {error}")
    traced = torch.fx.symbolic_trace(adapted)
    torch.manual_seed(0)
    expected, gradients = adapted(x), _seeded_step(adapted, x)
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        torch.manual_seed(0)
        assert torch.equal(graph(x), expected)
        found = _seeded_step(graph, x)
        assert found.keys() == gradients.keys() and all(torch.equal(found[name], gradients[name]) for name in found)


def _seeded_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of one step, by name: a graph has its parameters in the order in which it uses them."""
    torch.manual_seed(0)
    gradients = _step(model, model, x)
    return dict(zip((name for name, p in model.named_parameters() if p.grad is not None), gradients, strict=True))


@pytest.mark.parametrize(("inside", "dropout"), [(False, 0.0), (True, 0.5)], ids=["itself", "inside_with_dropout"])
@one_of_a_class
def test_fx_traces_what_it_traces_without_adapters(case: Case, inside: bool, dropout: float) -> None:
    original, adapted, x = patched_case(case, dropout=dropout)
    adapted.train(dropout > 0)
    _traced_alike(*((nn.Sequential(original), nn.Sequential(adapted)) if inside else (original, adapted)), x)


def _subclasses(cls: type) -> Iterator[type]:
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


def test_forwards_of_adapted_layers_are_annotated_by_types() -> None:
    """A trace takes them into its graph, where torch 2.11 cannot pickle a string."""
    own = [
        cls for cls in _subclasses(AdaptedLayer) if cls.__module__.startswith("mapsurgery.") and "forward" in vars(cls)
    ]
    assert {"FusedLinear", "FusedConv", "FusedEmbedding", "AdaptedRaw", "QuantisedLinear"} <= {c.__name__ for c in own}
    assert not [
        (cls.__name__, name, kind)
        for cls in own
        for name, kind in vars(cls)["forward"].__annotations__.items()
        if isinstance(kind, str)
    ]


class _OwnEmbedding(nn.Embedding):
    """No layer of torch: fx looks into it."""


class _Raw(nn.Module):
    """Uses a stack of matrices of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.up) + torch.bmm(x, self.up * 2)


_TRACED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "net": (lambda: net().eval(), image, {}),
    "embedding": (lambda: nn.Embedding(5, 4, padding_idx=0), lambda: torch.tensor([[0, 3]]), {}),
    "own_embedding": (lambda: nn.Sequential(_OwnEmbedding(5, 4, padding_idx=0)), lambda: torch.tensor([[0, 3]]), {}),
    "stack": (lambda: nn.Sequential(_Raw()), lambda: torch.randn(3, 2, 4), {"targets": (), "parameters": "*.up"}),
    "lstm": (lambda: nn.Sequential(nn.LSTM(4, 5), _FirstOf()), lambda: torch.randn(3, 2, 4), {}),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), lambda: _tokens(), {}),
}


class _FirstOf(nn.Module):
    def forward(self, results: Any) -> Tensor:
        return results[0]


def _tokens() -> Tensor:
    return torch.randn(2, 5, 8)


def _of_table(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x, options = _TRACED[name]
    original = make()
    adapted = mapsurgery.patch(copy.deepcopy(original), **{"targets": "*", "rank": 2, **options})
    return original, to_generic_point(adapted), x()


@pytest.mark.parametrize("name", _TRACED)
def test_fx_traces_models_of_other_layers(name: str) -> None:
    _traced_alike(*_of_table(name))


def test_an_fx_graph_keeps_the_adapted_layers_and_follows_them() -> None:
    model = _patched()
    graph = torch.fx.symbolic_trace(model)
    assert graph.stem is model.stem and isinstance(graph.stem, nn.Conv2d)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == [
        n.target for n in torch.fx.symbolic_trace(net().eval()).graph.nodes if n.op == "call_module"
    ]
    with mapsurgery.disabled(model):
        torch.testing.assert_close(graph(image()), net().eval()(image()))
    expected = model(image())
    mapsurgery.merge(model)
    torch.testing.assert_close(graph(image()), expected, rtol=1e-4, atol=1e-5)


_EXTRACTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torchvision_resnet18": (torchvision.models.resnet18, "layer3"),
    "torchvision_swin": (lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4]), "features"),
    "torchvision_vit": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 32),
        "encoder.layers.encoder_layer_1",
    ),
    "timm_efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=5), "blocks"),
}


@pytest.mark.parametrize("name", _EXTRACTED)
def test_feature_extractors_see_adapted_features(name: str) -> None:
    torch.manual_seed(0)
    make, node = _EXTRACTED[name]
    original, x = make().eval(), torch.randn(2, 3, 32, 32)
    try:
        before = create_feature_extractor(copy.deepcopy(original), [node])(x)[node]
    except Exception as error:  # noqa: BLE001  (whatever it is, it is torch's or the model's)
        pytest.skip(f"no features of the unpatched model either: {type(error).__name__}: {error}")
    model = _patched(original)
    features = create_feature_extractor(model, [node])(x)[node]
    found: list[Tensor] = []
    handle = model.get_submodule(node).register_forward_hook(lambda module, args, output: found.append(output))
    model(x)
    handle.remove()
    torch.testing.assert_close(features, found[0])
    assert not torch.allclose(features, before)
    features.sum().backward()
    assert all(p.grad is not None for p in model.get_submodule(node).parameters() if p.requires_grad)


def test_timms_fx_extractor_sees_adapted_features() -> None:
    from timm.models._features_fx import create_feature_extractor as by_timm

    settings = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = _patched(timm.create_model("vit_tiny_patch16_224", **settings))
    x = torch.randn(2, 3, 32, 32)
    found: list[Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: found.append(output))
    model(x)
    handle.remove()
    features = by_timm(model, ["blocks.1"])(x)["blocks.1"]
    torch.testing.assert_close(features, found[0])
    assert features.requires_grad


def _saved_and_loaded(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", _TRACED)
def test_jit_traces_patched_and_merged_models(name: str) -> None:
    original, adapted, x = _of_table(name)
    try:
        torch.jit.trace(original, x)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is torch's or the model's)
        pytest.skip(f"the unpatched model cannot be traced either: {type(error).__name__}: {error}")
    expected = adapted(x)
    loaded = _saved_and_loaded(torch.jit.trace(adapted, x))
    torch.testing.assert_close(loaded(x), expected)
    wanted = _step(adapted, adapted, x)
    for a, b in zip(_step(loaded, loaded, x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    merged = mapsurgery.merge(adapted)
    traced = torch.jit.trace(merged, x)
    graph = str(traced.inlined_graph)  # it names source files, too, and a folder may have the library's name
    assert "mapsurgery::" not in graph and "__torch__.mapsurgery" not in graph
    torch.testing.assert_close(_saved_and_loaded(traced)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_scripts_a_merged_model_only() -> None:
    model = _patched()
    expected = model(image())
    with pytest.raises((AttributeError, RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(model)
    scripted = torch.jit.script(mapsurgery.merge(model))
    torch.testing.assert_close(_saved_and_loaded(scripted)(image()), expected, rtol=1e-4, atol=1e-5)


# Tensors without values --------------------------------------------------------------------------------------------


@one_of_a_class
def test_a_layer_is_made_patched_and_trained_under_fake_tensor_mode(case: Case) -> None:
    with FakeTensorMode():
        layer = mapsurgery.patch(case.make(), "*", rank=case.rank)
        x = torch.randn(case.shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.shape == case.make()(torch.randn(case.shape)).shape
    assert x.grad.shape == case.shape
    assert all(p.grad.shape == p.shape for p in layer.adapter.own_parameters().values())


def test_a_model_of_fake_tensors_is_patched_in_their_mode_only() -> None:
    with FakeTensorMode():
        model = net()
    with pytest.raises(ValueError, match="patch inside the FakeTensorMode"):
        mapsurgery.patch(model, "*", rank=2)


def test_a_patched_model_runs_on_fake_copies_of_its_tensors() -> None:
    model = _patched()
    mode = FakeTensorMode()
    tensors = {n: mode.from_tensor(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    with mode:
        y = functional_call(model, tensors, (mode.from_tensor(image()),))
    assert y.shape == (4, 4) and y.requires_grad


@every_layer
def test_a_layer_on_meta_computes_shapes(case: Case) -> None:
    _, adapted, x = patched_case(case)
    expected = adapted(x)
    y = adapted.to("meta")(x.to("meta").requires_grad_())
    assert y.is_meta and y.shape == expected.shape and y.stride() == expected.stride()
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in adapted.adapter.own_parameters().values())


def test_a_model_that_was_built_and_patched_on_meta_computes_shapes() -> None:
    with torch.device("meta"):
        model = mapsurgery.patch(net(), "*", rank=2)
        y = model(torch.randn(2, 3, 6, 6))
    assert y.is_meta and y.shape == (2, 4)
