"""torch.compile of a patched model: whole graphs, as few of them as without adapters, the eager numbers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from definition import Net, image, net, to_generic_point
from exporting import or_torch_cannot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

import mapsurgery

pytestmark = pytest.mark.usefixtures("_fresh_compiler")


def _patched(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return to_generic_point(mapsurgery.patch(net() if model is None else model, "*", rank=2, **options)).eval()


def _counted(model: nn.Module, backend: str = "aot_eager", **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """The compiled model, in one graph or an error, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def _vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5, "patch_size": 16}
    return timm.create_model("vit_tiny_patch16_224", **{**settings, **options}).eval()


def _llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **options})).eval()


def _ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(3))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor | None]:
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y.square().mean(), list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _assert_same(model: nn.Module, compiled: Callable[..., Any], inputs: tuple[Any, ...], unused: str = " ") -> None:
    """Outputs and every gradient are those of eager mode.

    Args: unused: start of the names of the parameters that the first output does not depend on.
    """
    y, expected = _first(compiled(*inputs)), _first(model(*inputs))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    grads, wanted = _gradients(model, y), _gradients(model, expected)
    assert any("adapter" in name and grad is not None and grad.any() for name, grad in wanted.items())
    assert {n for n, grad in wanted.items() if grad is None} == {n for n in wanted if n.startswith(unused)}
    for name, grad in wanted.items():
        if grad is None:  # the compiled graph has the other outputs too, and passes a gradient of zeros through them
            assert not grads[name].any(), name
        else:
            assert float((grads[name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-7, name


# How often it compiles ---------------------------------------------------------------------------------------------


def test_new_values_and_another_adapter_compile_nothing_again() -> None:
    model = _patched()
    compiled, graphs = _counted(model)
    compiled(image())
    state = {name: tensor.clone() for name, tensor in mapsurgery.adapter_state_dict(model).items()}
    for factor in (0.5, 2.0):
        with torch.no_grad():
            for a in (model.stem.adapter, model.head.adapter):
                a.alpha.add_(factor)
                a.B.add_(factor)
        torch.testing.assert_close(compiled(image()), model(image()))
        other = {name: t if name.endswith(".form") else t * factor for name, t in state.items()}
        mapsurgery.load_adapter_state_dict(model, other)
        torch.testing.assert_close(compiled(image()), model(image()))
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(compiled(image()), model(image()))
    assert graphs.frame_count == 1


def test_training_evaluating_and_disabled_are_one_graph_each() -> None:
    model, base = _patched(dropout=0.5), net().eval()
    compiled, graphs = _counted(model)
    for _ in range(3):
        compiled(image())
        with mapsurgery.disabled(model):
            torch.testing.assert_close(compiled(image()), base(image()))
        compiled.train()
        compiled(image()).sum().backward()
        compiled.eval()
        base.norm.load_state_dict(model.norm.state_dict())
    assert graphs.frame_count == 3


def _graphs_of(model: nn.Module, inputs: list[Tensor], dynamic: bool | None) -> int:
    torch._dynamo.reset()
    compiled, graphs = _counted(model, backend="eager", dynamic=dynamic)
    for x in inputs:
        torch.testing.assert_close(_first(compiled(x)), _first(model(x)), rtol=1e-4, atol=1e-5)
    return graphs.frame_count


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param("net", True, marks=pytest.mark.long),
        ("net", None),
        pytest.param("llama", None, marks=(pytest.mark.slow, pytest.mark.long)),
    ],
    ids=["net-dynamic", "net-automatic", "llama-automatic"],
)
def test_other_sizes_compile_no_more_graphs_than_without_adapters(name: str, dynamic: bool | None) -> None:
    """Torch itself compiles some convolutions again for large batches; the adapters add nothing to that."""
    if name == "net":
        original: nn.Module = net().eval()
        inputs = [torch.randn(n, 3, size, size) for n, size in ((2, 6), (3, 6), (7, 6), (16, 8), (5, 13))]
    else:
        original = _llama(use_cache=False)
        inputs = [_ids(*shape) for shape in ((2, 9), (3, 12), (7, 30))]
    expected = _graphs_of(original, inputs, dynamic)
    assert _graphs_of(_patched(original), inputs, dynamic) <= expected


def test_gradients_of_a_dynamic_graph_are_the_eager_ones() -> None:
    """Of other batches than 3, the number of channels: torch's convolution takes that for a constant."""
    model = _patched()
    compiled, graphs = _counted(model, dynamic=True)
    compiled(image(4))
    first = graphs.frame_count  # 2: a frame is analysed again once torch finds that a number it held dynamic is fixed
    for n in (4, 5, 9):
        _assert_same(model, compiled, (image(n),))
    assert graphs.frame_count == first


def _blocks_of(model: nn.Module) -> tuple[nn.ModuleList, CompileCounterWithBackend]:
    """The repeated blocks, each compiled on its own, and the counter of all their graphs."""
    blocks = model.blocks if hasattr(model, "blocks") else model.model.layers
    graphs = CompileCounterWithBackend("eager")
    for block in blocks:
        block.compile(backend=graphs, fullgraph=True)
    return blocks, graphs


def _counts(model: nn.Module, graphs: CompileCounterWithBackend, x: Tensor) -> list[int]:
    """Graphs after evaluating, and after a training step."""
    counts = []
    for training in (False, True):
        y = _first(model.train(training)(x))
        counts.append(graphs.frame_count)
    y.sum().backward()
    return counts


@pytest.mark.parametrize("name", ["vit", pytest.param("llama", marks=pytest.mark.long)])
def test_blocks_compiled_one_by_one_share_their_graph_as_without_adapters(name: str) -> None:
    if name == "vit":
        original, x = _vit(depth=2), torch.randn(2, 3, 32, 32)
    else:  # with a cache, transformers' blocks are a graph each, patched or not: each reads its own entry of it
        original, x = _llama(num_hidden_layers=2, use_cache=False), _ids()
    model = _patched(copy.deepcopy(original), dropout=0.1)
    expected = _first(model(x))
    _, graphs = _blocks_of(original)
    without = _counts(original, graphs, x)
    blocks, graphs = _blocks_of(model)
    assert len(blocks) > 1 and _counts(model, graphs, x) == without == [1, 2]
    assert all(p.grad is not None for p in blocks.parameters() if p.requires_grad)
    model.eval()
    for _ in range(2):
        torch.testing.assert_close(_first(model(x)), expected, rtol=1e-4, atol=1e-5)
        with mapsurgery.disabled(model):
            torch.testing.assert_close(_first(model(x)), _first(original.eval()(x)), rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == 3


# What the compiled step keeps and computes --------------------------------------------------------------------------


def _saved_bytes(model: nn.Module, run: Callable[..., Any], x: Tensor) -> int:
    """What autograd keeps between forward and backward, parameters, buffers and the input left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: list[Tensor] = []  # alive, so that no address is given twice
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = _first(run(x))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    y.sum().backward()
    return sum(size for place, size in storages.items() if place not in own)


_SAVING: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "vit": (_vit, lambda: torch.randn(2, 3, 32, 32)),
    "net": (lambda: net().eval(), image),
}


@pytest.mark.parametrize("name", ["vit", pytest.param("net", marks=pytest.mark.long)])
def test_the_compiled_step_keeps_no_more_than_the_eager_one(name: str) -> None:
    make, inputs = _SAVING[name]
    model, x = _patched(make()), inputs()
    eager = _saved_bytes(model, model, x)
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)  # inductor's partitioner
    assert 0 < _saved_bytes(model, compiled, x) <= eager


def test_the_backward_graph_computes_no_forward_product_again() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    targets: dict[str, list[str]] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            targets[name] = [str(node.target) for node in graph.graph.nodes if "mapsurgery" in str(node.target)]
            return graph.forward

        return compiler

    backend = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=min_cut_rematerialization_partition
    )
    model = _patched(_vit())
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 3, 32, 32)).sum().backward()
    layers = sum(hasattr(module, "adapter") for module in model.modules())
    assert len(targets["forward"]) == len(targets["backward"]) == 2 * layers  # the scalars, and the product
    assert all("backward" in target for target in targets["backward"])


def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def _trained_by_compiled_autograd(model: nn.Module) -> CompileCounterWithBackend:
    """Three steps, forward and backward compiled; the counter of their graphs."""
    torch._dynamo.reset()
    counters.clear()
    graphs = CompileCounterWithBackend("aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with torch._dynamo.config.patch(compiled_autograd=True):  # read by torch.compile
        step = torch.compile(lambda x: model(x).square().mean().backward(), backend=graphs)
        for _ in range(3):
            step(image())
            optimizer.step()
            optimizer.zero_grad()
    assert counters["compiled_autograd"]["captures"] > 0
    return graphs


def test_a_whole_training_step_compiled_with_compiled_autograd_is_the_eager_one() -> None:
    model = _patched(_tiny())
    reference = copy.deepcopy(model)
    without, graphs = _trained_by_compiled_autograd(_tiny()), _trained_by_compiled_autograd(model)
    assert graphs.frame_count == without.frame_count
    called = {str(node.target) for node in graphs.graphs[-1].graph.nodes}
    assert {f"mapsurgery.{n}_backward.default" for n in ("map_scales", "lowrank_linear", "lowrank_conv")} <= called
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        reference(image()).square().mean().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# Real models -------------------------------------------------------------------------------------------------------


def _qwen_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.BertModel(config)


def _unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 32, 32),)


_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 5}
_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "timm_vit": (_vit, _images),
    "timm_convnext": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), _images),
    "timm_swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", **_SWIN), _images),
    "timm_efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=5), _images),
    "llama": (_llama, lambda: (_ids(),)),
    "bert": (_bert, lambda: (_ids(),)),
    "qwen_moe": (_qwen_moe, lambda: (_ids(),)),
    "diffusers_unet": (_unet, lambda: (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16))),
}


_LARGER = ("timm_swin", "timm_convnext", "timm_efficientnet", "bert", "qwen_moe", "diffusers_unet")
_UNUSED = {"bert": "pooler."}
"""BERT's first output, the hidden states, does not depend on its pooler, which computes the second."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in _LARGER else n for n in _MODELS])
def test_real_models_compile_to_one_graph_with_the_eager_numbers(name: str) -> None:
    make, inputs = _MODELS[name]
    torch.manual_seed(0)
    original, x = make().eval(), inputs()
    model = _patched(copy.deepcopy(original))
    compiled, graphs = _counted(model)
    or_torch_cannot(lambda: compiled(*x), lambda: torch.compile(original, backend="aot_eager", fullgraph=True)(*x))
    _assert_same(model, compiled, x, _UNUSED.get(name, " "))
    assert graphs.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", pytest.param("max-autotune", marks=pytest.mark.long)])
def test_inductors_modes_on_the_cpu(mode: str) -> None:
    model = _patched(_tiny())  # each kernel takes seconds to compile
    _assert_same(model, torch.compile(model, fullgraph=True, mode=mode), (image(),))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductors_modes_on_a_gpu(mode: str) -> None:
    """reduce-overhead and max-autotune record CUDA graphs: the third call replays."""
    model, x = _patched().cuda(), image().cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        _assert_same(model, compiled, (x,))
        with torch.no_grad():
            model.stem.adapter.alpha.add_(0.1)  # a replay reads the new values


def _generated(model: nn.Module, backend: Any = None) -> Tensor:
    if backend is not None:
        model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return model.generate(
        _ids(1, 5),
        max_new_tokens=8,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        pad_token_id=0,
    )


@pytest.mark.slow
@pytest.mark.long
def test_generation_with_a_static_cache_compiles_as_often_as_without_adapters() -> None:
    unpatched, model = _llama(tie_word_embeddings=True), _patched(_llama(tie_word_embeddings=True), tied="share")
    expected = _generated(model)
    counts = [CompileCounterWithBackend("aot_eager") for _ in range(2)]
    found = or_torch_cannot(lambda: _generated(model, counts[1]), lambda: _generated(unpatched, counts[0]))
    assert torch.equal(found, expected)
    _generated(unpatched, counts[0])
    assert counts[1].frame_count == counts[0].frame_count > 0


# Without the native library ----------------------------------------------------------------------------------------

_WITHOUT_NATIVE = """
import mapsurgery, torch
from definition import image, net, to_generic_point
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

assert not mapsurgery._native.load()
model = to_generic_point(mapsurgery.patch(net(), "*", rank=2))
graphs = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(model, backend=graphs, fullgraph=True)
for _ in range(2):
    model.zero_grad()
    y = compiled(image())
    y.square().sum().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    model(image()).square().sum().backward()
    for a, b in zip(found, [p.grad for p in model.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        model.stem.adapter.alpha.add_(1)
assert graphs.frame_count == 1
print("compiled without native code")
"""


@pytest.mark.long
def test_it_compiles_without_the_native_library() -> None:
    tests = os.path.dirname(__file__)
    paths = os.pathsep.join(p for p in (os.path.dirname(tests), tests, os.environ.get("PYTHONPATH", "")) if p)
    environment = os.environ | {"MAPSURGERY_NATIVE": "0", "PYTHONPATH": paths}
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_NATIVE], env=environment, capture_output=True, text=True, timeout=240
    )
    assert "compiled without native code" in result.stdout, result.stderr


def test_a_compiled_model_and_its_copy_share_no_state() -> None:
    model = _patched()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.stem.adapter.alpha.add_(1)
    torch.testing.assert_close(compiled(image()), model(image()))
    again = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(again(image()), other(image()))
    assert isinstance(other, Net) and not torch.allclose(again(image()), compiled(image()))


# An operator of any library: its name stays, what it returns changes from one version to the next.
_VERSION = """
import sys, torch
size = int(sys.argv[1])
library = torch.library.Library("versions", "DEF")
library.define("f(Tensor x) -> Tensor")
library.impl("f", lambda x: x.new_ones(size), "CPU")
torch.library.register_fake("versions::f", lambda x: x.new_empty(size), lib=library)
print("of size", torch.compile(lambda x: torch.ops.versions.f(x) * 2)(torch.randn(3)).numel())
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_tag_keeps_code_for_an_older_form_of_an_operator_out(tmp_path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for size, tag in (("6", ""), ("7", "7")):
        environment["TORCH_COMPILE_CACHE_KEY_TAG"] = tag
        result = subprocess.run(
            [sys.executable, "-c", _VERSION, size], env=environment, capture_output=True, text=True, timeout=240
        )
        assert f"of size {size}" in result.stdout, result.stderr
