"""Whole models of several families: patched, verified, trained a step, saved, loaded, merged and given back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import timm
import torch
from definition import Snapshot, to_generic_point, weight_of
from timm.layers import GroupNormAct, StdConv2d
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mapsurgery


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


def _bit() -> nn.Module:
    """A BiT ResNet: weight-standardised convolutions. A fourth stage would be norms of single numbers, and dead."""
    norm = partial(GroupNormAct, num_groups=8)
    return ResNetV2((1, 1, 1), (32, 32, 32), num_classes=5, stem_chs=16, conv_layer=StdConv2d, norm_layer=norm)


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def _bert() -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )


@dataclass(frozen=True)
class Model:
    name: str
    make: Callable[[], nn.Module]
    targets: list[str] = field(default_factory=lambda: ["*"])
    size: int | None = 32
    """Side of the image; None: token ids."""
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def built(self) -> nn.Module:
        """Seeded, float64; scales and heads that start at zero, and cut off what lies before them, as if trained."""
        torch.manual_seed(0)
        model = self.make().double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gain") or (name.endswith("weight") and not parameter.any()):
                    parameter.normal_(1, 0.1)
        return model

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.size is None:
            return torch.randint(0, 50, (2, 7), generator=generator)
        return torch.randn(2, 3, self.size, self.size, generator=generator, dtype=torch.float64)


_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
_SMALL = {"channels": (8, 8, 16, 16)}
MODELS = [
    Model("vit", _timm("vit_tiny_patch16_224", **_VIT), options={"train": ["head*"]}),
    Model("resnet", _timm("resnet18", layers=(1, 1, 1, 1), **_SMALL)),
    Model(
        "convnext",
        _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        options={"train": ["*norm*"]},
    ),
    Model("efficientnet", _timm("efficientnet_lite0"), ["*conv_pw*", "*conv_dw*"]),
    Model("mobilenetv3", _timm("mobilenetv3_small_050")),
    Model("swin", _timm("swin_tiny_patch4_window7_224", **_SWIN)),
    Model("mixer", lambda: MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16)),
    Model("nf_resnet", _timm("nf_resnet26", **_SMALL)),
    Model("bit_resnetv2", _bit),
    Model("regnet", _timm("regnety_002")),
    Model("llama", _llama, ["*_proj", "lm_head"], size=None),
    Model("gpt2", _gpt2, ["*attn*", "*mlp*"], size=None, options={"train": ["*ln_f*"]}),
    Model("bert", _bert, ["encoder"], size=None),
]
# The others, and many more, are judged by the zoo; these tests run on them in `make test-long`.
QUICK = ("vit", "resnet", "efficientnet", "bit_resnetv2", "llama", "gpt2")
every_model = pytest.mark.parametrize(
    "spec", [pytest.param(m, marks=() if m.name in QUICK else pytest.mark.long) for m in MODELS], ids=str
)
few_models = pytest.mark.parametrize("spec", [m for m in MODELS if m.name in ("resnet", "convnext", "swin")], ids=str)


def _output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y[0]


def _patched(spec: Model, **options: Any) -> nn.Module:
    return mapsurgery.patch(spec.built().eval(), spec.targets, rank=2, **{**spec.options, **options})


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, mapsurgery.AdaptedLayer)}


@every_model
def test_every_adapter_acts_and_learns(spec: Model) -> None:
    model = _patched(spec)
    assert _adapted(model)
    assert not mapsurgery.verify(model, spec.inputs()).failures


@every_model
def test_the_start_is_the_base_and_the_adapted_model_is_the_materialised_one(spec: Model) -> None:
    # Frozen as the patched one: torch's matmul folds dimensions by requires_grad, and then rounds differently.
    original, model, x = spec.built().eval().requires_grad_(False), _patched(spec, train=[]), spec.inputs()
    base = _output(original, x)
    torch.testing.assert_close(_output(model, x), base, rtol=1e-9, atol=1e-10)
    with mapsurgery.disabled(model):
        assert torch.equal(_output(model, x), base)
    to_generic_point(model)
    weights = {f"{name}.weight": weight_of(layer) for name, layer in _adapted(model).items()}
    expected = functional_call(original, weights, (x,), tie_weights=False)
    expected = expected if isinstance(expected, Tensor) else expected[0]
    torch.testing.assert_close(_output(model, x), expected, rtol=1e-7, atol=1e-8)


@every_model
def test_a_step_of_training_moves_adapters_alone_without_a_jump(spec: Model) -> None:
    model, x = _patched(spec), spec.inputs()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    base = _output(model, x).detach()
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, 1e-4, 0.05))
    _output(model, x).pow(2).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    for layer in _adapted(model).values():
        W = layer.get_parameter("weight")
        if W.any():
            assert ((weight_of(layer) - W).norm() / W.norm()).item() < 50e-4
    assert not torch.equal(_output(model, x), base)


@every_model
def test_save_load_merge_and_unpatch(spec: Model, tmp_path) -> None:
    model, x = to_generic_point(_patched(spec)), spec.inputs()
    expected = _output(model, x)
    mapsurgery.save(model, tmp_path / "a.safetensors")
    fresh = spec.built().eval()
    snapshot = Snapshot(fresh)
    mapsurgery.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(_output(fresh, x), expected)
    mapsurgery.unpatch(fresh)
    snapshot.assert_holds(fresh)
    names = list(fresh.state_dict())
    mapsurgery.merge(model)
    assert list(model.state_dict()) == names and not _adapted(model)
    torch.testing.assert_close(_output(model, x), expected, rtol=1e-7, atol=1e-8)


@every_model
def test_parameter_names_and_the_original_checkpoint(spec: Model) -> None:
    model = _patched(spec)
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter
    state = spec.built().state_dict()
    assert not any(model.load_state_dict(state, strict=True))
    twin = copy.deepcopy(model)
    assert torch.equal(_output(twin, spec.inputs()), _output(model, spec.inputs()))


def test_a_tied_language_model_keeps_its_embedding_when_its_head_is_merged() -> None:
    spec = next(m for m in MODELS if m.name == "llama")
    model = to_generic_point(_patched(spec))
    embedding = model.model.embed_tokens.weight.detach().clone()
    expected = _output(model, spec.inputs())
    mapsurgery.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(_output(model, spec.inputs()), expected, rtol=1e-7, atol=1e-8)


def test_generation_with_a_cache_is_that_of_the_merged_model() -> None:
    spec = next(m for m in MODELS if m.name == "llama")
    model = to_generic_point(_patched(spec))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(spec.inputs(), **options)
    assert torch.equal(mapsurgery.merge(model).generate(spec.inputs(), **options), tokens)


def test_transformers_gradient_checkpointing_changes_no_gradient() -> None:
    spec = next(m for m in MODELS if m.name == "llama")
    grads = []
    for enabled in (False, True):
        model = to_generic_point(_patched(spec)).train()
        if enabled:
            model.gradient_checkpointing_enable()
        model(spec.inputs(), use_cache=False).logits.pow(2).mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda m, name=name: f"{name}: {m}")


def test_transformers_saves_a_merged_model_under_its_own_names(tmp_path) -> None:
    spec = next(m for m in MODELS if m.name == "bert")
    model = mapsurgery.merge(to_generic_point(_patched(spec))).float()
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(_output(loaded, spec.inputs()), _output(model, spec.inputs()))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("_fresh_compiler")
@few_models
def test_the_compiled_model_is_the_eager_one(spec: Model) -> None:
    model = to_generic_point(_patched(spec))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(spec.inputs()), model(spec.inputs()), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("spec", [m for m in MODELS if m.name == "resnet"], ids=str)  # others: test_export_models
def test_the_exported_model_is_the_eager_one(spec: Model) -> None:
    model, x = to_generic_point(_patched(spec)), spec.inputs()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-7, atol=1e-8)
