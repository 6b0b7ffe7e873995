"""Real architectures, patched and exported: torch.export both ways with dynamic shapes, core ATen, ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from definition import to_generic_point
from exporting import not_core, operators, or_torch_cannot, own_operators
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import mapsurgery

AUTO = torch.export.Dim.DYNAMIC
LONG = (pytest.mark.slow, pytest.mark.long)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


_TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _llama() -> nn.Module:
    config = LlamaConfig(**_TEXT, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=32)
    return LlamaForCausalLM(config)


def _bert() -> nn.Module:
    return BertModel(BertConfig(**_TEXT, intermediate_size=24, max_position_embeddings=32))


def _qwen_moe() -> nn.Module:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_TEXT,
            intermediate_size=24,
            num_key_value_heads=1,
            max_position_embeddings=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        )
    )


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _images(n: int, size: int = 32) -> dict[str, Any]:
    return {"x": torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))}


def _tokens(n: int, length: int = 6) -> dict[str, Any]:
    ids = torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(n))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _latents(n: int, size: int = 8) -> dict[str, Any]:
    g = torch.Generator().manual_seed(n)
    return {
        "sample": torch.randn(n, 4, size, size, generator=g),
        "timestep": torch.full((n,), 7),
        "encoder_hidden_states": torch.randn(n, 3, 12, generator=g),
    }


@dataclass(frozen=True)
class Model:
    """An architecture, its inputs for a number of samples and a size, and which dimensions are dynamic.

    Attributes:
        example, other: arguments of `inputs` for the export, and for what must run in the exported program too.
        pace: marks of its tests.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    dynamic: dict[str, Any]
    example: tuple[int, ...]
    other: tuple[int, ...]
    targets: tuple[str, ...] = ("*",)
    options: dict[str, Any] = field(default_factory=dict)
    package: str = "torch"
    pace: tuple[pytest.MarkDecorator, ...] = ()

    def __str__(self) -> str:
        return self.name

    def both(self) -> tuple[nn.Module, nn.Module]:
        """Unpatched and patched."""
        pytest.importorskip(self.package)
        torch.manual_seed(0)
        model = self.make().eval()
        patched = mapsurgery.patch(copy.deepcopy(model), self.targets, rank=2, **self.options)
        return model, to_generic_point(patched)


_BATCH = {"x": {0: AUTO}}
_PIXELS = {"x": {0: AUTO, 2: AUTO, 3: AUTO}}
_SEQUENCE = {"input_ids": {0: AUTO, 1: AUTO}, "attention_mask": {0: AUTO, 1: AUTO}, "use_cache": None}
_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
MODELS = [
    Model(
        "vit",
        _timm("vit_tiny_patch16_224", **_VIT),
        _images,
        _BATCH,
        (2,),
        (5,),
        ("patch_embed*", "*attn*"),
        pace=(),
    ),
    Model(
        "convnext",
        _timm("convnext_atto", **_CONVNEXT),
        _images,
        _PIXELS,
        (2, 64),
        (3, 96),
        ("stem*", "stages.1*"),
        pace=LONG,
    ),
    Model("swin", _timm("swin_tiny_patch4_window7_224", **_SWIN), _images, _BATCH, (2,), (5,), pace=LONG),
    Model(
        "efficientnet",
        _timm("test_efficientnet"),
        _images,
        _PIXELS,
        (2, 64),
        (3, 96),
        ("*conv_pw", "*conv_dw"),
        pace=LONG,
    ),
    Model("llama", _llama, _tokens, _SEQUENCE, (2,), (3, 9), ("*embed*", "*proj"), pace=LONG),
    Model("bert", _bert, _tokens, _SEQUENCE, (2,), (3, 9), ("*attention*",), pace=LONG),
    Model(
        "qwen_moe",
        _qwen_moe,
        _tokens,
        _SEQUENCE,
        (2,),
        (3, 9),
        ("*gate", "*q_proj", "*down_proj"),
        {"parameters": ["*experts*"]},
        pace=LONG,
    ),
    Model(
        "unet",
        _unet,
        _latents,
        {"sample": {0: AUTO, 2: AUTO, 3: AUTO}, "timestep": {0: AUTO}, "encoder_hidden_states": {0: AUTO, 1: AUTO}},
        (2,),
        (3, 16),
        ("conv_in", "down_blocks.0.attentions.*", "up_blocks.0.*shortcut"),
        package="diffusers",
        pace=LONG,
    ),
]


def _export(spec: Model, model: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    return torch.export.export(model, (), spec.inputs(*spec.example), dynamic_shapes=spec.dynamic, strict=strict)


def _outputs(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor)]


def _assert_same(exported: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> None:
    for found, expected in zip(_outputs(exported, inputs), _outputs(model, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


_STRICTLY = ("convnext", "llama")
"""Slow ones are exported one way only: these strictly."""
_BOTH_WAYS = [
    pytest.param(m, strict, id=f"{m.name}-{'strict' if strict else 'non_strict'}", marks=m.pace)
    for m in MODELS
    for strict in ((False, True) if m.pace == () else (m.name in _STRICTLY,))
]


@pytest.mark.parametrize(("spec", "strict"), _BOTH_WAYS)
def test_exported_with_dynamic_shapes_and_decomposed_to_core_aten(spec: Model, strict: bool) -> None:
    model, patched = spec.both()
    program = or_torch_cannot(lambda: _export(spec, patched, strict), lambda: _export(spec, model, strict))
    assert own_operators(program)
    decomposed = program.run_decompositions()
    beyond = not_core(decomposed)
    if beyond:  # then by the model itself
        assert beyond <= set(operators(_export(spec, model, strict).run_decompositions()))
    assert not own_operators(decomposed)
    runs, portable = program.module(), decomposed.module()
    example, other = spec.inputs(*spec.example), spec.inputs(*spec.other)
    _assert_same(portable, patched, example)
    for each in (runs, portable):
        or_torch_cannot(
            lambda each=each: _assert_same(each, patched, other),
            lambda: _assert_same(_export(spec, model, strict).module(), model, other),
        )


_AS_ONNX = [("vit", False), pytest.param("vit", True, marks=pytest.mark.long)]
_AS_ONNX += [pytest.param(name, False, marks=pytest.mark.long) for name in ("convnext", "llama")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "merged"), _AS_ONNX)
def test_written_as_onnx(name: str, merged: bool, tmp_path) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    spec = next(m for m in MODELS if m.name == name)
    model, patched = spec.both()
    inputs = spec.inputs(*spec.example)
    result = or_torch_cannot(
        lambda: mapsurgery.export(
            patched, tmp_path / "m.onnx", inputs, dynamic_shapes=spec.dynamic, format="onnx", merged=merged
        ),
        lambda: torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=spec.dynamic, dynamo=True, verbose=False),
    )
    assert result.relative_deviation < 1e-4 and not result.operators


def _static_cache_program(model: nn.Module) -> torch.export.ExportedProgram:
    """transformers' own recipe for exported decoders: a cache of fixed size as buffers of the program."""
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    cache = {"batch_size": 1, "max_cache_len": 16, "device": "cpu"}
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config=cache, pad_token_id=0
    )
    step = {"input_ids": torch.tensor([[3]]), "cache_position": torch.tensor([0])}
    return torch.export.export(TorchExportableModuleWithStaticCache(model), (), step)


def _generated(program: torch.export.ExportedProgram) -> Tensor:
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    return TorchExportableModuleWithStaticCache.generate(program, _PROMPT, max_new_tokens=5)


_PROMPT = torch.tensor([[3, 11, 7]])


@torch.no_grad()
def test_generation_with_a_static_cache_is_that_of_eager() -> None:
    spec = next(m for m in MODELS if m.name == "llama")
    model, patched = spec.both()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = patched.generate(_PROMPT, **options)
    program = or_torch_cannot(lambda: _static_cache_program(patched), lambda: _static_cache_program(model))
    assert own_operators(program)
    assert torch.equal(_generated(program), expected)


@pytest.mark.long
@torch.no_grad()
def test_a_static_cache_program_is_decomposed() -> None:
    spec = next(m for m in MODELS if m.name == "llama")
    model, patched = spec.both()
    decomposed = or_torch_cannot(
        lambda: _static_cache_program(patched).run_decompositions(),
        lambda: _static_cache_program(model).run_decompositions(),
    )
    assert not own_operators(decomposed)
    assert torch.equal(_generated(decomposed), _generated(_static_cache_program(patched)))
