"""Models that PEFT has adapted before `patch`: PEFT's own parts are left alone, and what lies under them is adapted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from definition import to_generic_point, weight_of
from torch import Tensor, nn

import mapsurgery
from mapsurgery.surgery.adapted import AdaptedLayer

IDS = torch.tensor([[1, 5, 3, 2, 8]])
QV = {"target_modules": ["q_proj", "v_proj"]}
CAUSAL = {"task_type": "CAUSAL_LM"}
SETTINGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=2, **QV),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **QV),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **QV),
    "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[1, 5], **QV),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, **QV),
    "vera": lambda: peft.VeraConfig(r=2, **QV),
    "loha": lambda: peft.LoHaConfig(r=2, **QV),
    "lokr": lambda: peft.LoKrConfig(r=2, **QV),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **QV),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "layer_norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prompt_encoder": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, **CAUSAL),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, **CAUSAL),
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **CAUSAL),
}
every_kind = pytest.mark.parametrize("kind", SETTINGS)

pytestmark = pytest.mark.filterwarnings("ignore")


def _llama() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def _adapted_by_peft(kind: str) -> nn.Module:
    """A PEFT model, moved away from its start, in float64."""
    model = peft.get_peft_model(_llama(), SETTINGS[kind]()).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@every_kind
def test_only_the_models_own_weights_are_adapted_and_pefts_adapter_acts_on_them(kind: str) -> None:
    model, theirs = _adapted_by_peft(kind), _adapted_by_peft(kind)
    own = set(_llama().state_dict())
    before = _trained(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mapsurgery.patch(model, "*", rank=2)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    # Each is a layer of the Llama, whatever PEFT put around it, and none is one that PEFT made.
    names = [_plain(path) for path in layers]
    assert set(names) <= own and len(names) == len(set(names))
    expected = {name for name in own if "norm" not in name} - ({"lm_head.weight"} if kind == "head" else set())
    assert set(names) == expected
    count = sum(p.numel() for p in before.values())
    said = [str(w.message) for w in caught if "another library" in str(w.message)]
    assert len(said) == 1 and f"train {count:,} parameters, which patch freezes" in said[0]
    # PEFT on W', which is put into an equal model as its weight.
    to_generic_point(model)
    with torch.no_grad():
        for path, layer in layers.items():
            theirs.get_submodule(path).weight.copy_(weight_of(layer))
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-9, atol=1e-9)


def _plain(path: str) -> str:
    """The name in the Llama of the weight of a module of a PEFT model."""
    parts = [part for part in path.split(".") if part not in ("base_model", "base_layer", "token_adapter")]
    parts = parts[parts.index("layers") :] if "layers" in parts else parts[-1:]
    if "self_attn" in parts and "model" in parts:
        parts.remove("model")  # what AdaptedAttention wraps
    return ".".join([*([] if parts == ["lm_head"] else ["model"]), *parts, "weight"])


@every_kind
def test_the_plan_names_what_keeps_pefts_adapter_training(kind: str, tmp_path: Path) -> None:
    model = _adapted_by_peft(kind)
    before, warning = _trained(model), mapsurgery.plan(model, "*").warning
    assert warning is not None and warning in str(mapsurgery.plan(model, "*"))
    globs = re.findall(r'"([^"]+)"', warning)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="another library")
        mapsurgery.patch(model, "*", rank=2, train=globs)
    assert set(before.values()) <= set(_trained(model).values())
    model(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in before.values())
    with torch.no_grad():
        for parameter in before.values():
            parameter.add_(0.1)
    mapsurgery.save(to_generic_point(model), tmp_path / "a.safetensors")
    fresh = mapsurgery.load(_adapted_by_peft(kind), tmp_path / "a.safetensors")
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_a_frozen_peft_adapter_is_passed_over_without_a_word() -> None:
    model = _adapted_by_peft("lora").requires_grad_(False)
    plan = mapsurgery.plan(model, "*q_proj*", rank=2)
    assert plan.warning is None
    assert [layer.path for layer in plan.layers] == ["base_model.model.model.layers.0.self_attn.q_proj.base_layer"]
    reasons = {skip.path.rpartition("q_proj")[2]: skip.reason for skip in plan.skipped}
    assert reasons == {
        "": "a layer of PEFT's: what it wraps can be adapted",
        ".lora_A.default": "a part of PEFT's adapter (lora_A)",
        ".lora_B.default": "a part of PEFT's adapter (lora_B)",
    }
    with pytest.raises(ValueError, match=r"matches nothing that can be adapted: .*a part of PEFT's adapter \(lora_A\)"):
        mapsurgery.plan(model, "*lora_*")
    with pytest.raises(ValueError, match=r"a part of PEFT's adapter \(trainable_tokens_delta\)"):
        mapsurgery.plan(_adapted_by_peft("tokens"), [], parameters="*trainable_tokens_delta*")


def test_verify_merge_and_unpatch_work_on_a_peft_model() -> None:
    model = _adapted_by_peft("lora")
    expected = model(IDS).logits
    mapsurgery.patch(model, "*proj*", rank=2)
    mapsurgery.verify(model, IDS)
    adapted = to_generic_point(model)(IDS).logits
    mapsurgery.merge(model)
    torch.testing.assert_close(model(IDS).logits, adapted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, adapted)
    model = _adapted_by_peft("lora")
    mapsurgery.unpatch(to_generic_point(mapsurgery.patch(model, "*proj*", rank=2)))
    assert torch.equal(model(IDS).logits, expected)
    assert _trained(model).keys() == _trained(_adapted_by_peft("lora")).keys()


def test_two_adapters_of_peft_in_a_model_without_its_wrapper() -> None:
    model = _llama()
    for name in ("first", "second"):
        peft.inject_adapter_in_model(SETTINGS["lora"](), model, adapter_name=name)
    plan = mapsurgery.plan(model, "*", rank=2)
    assert all("lora_" not in layer.path and "second" not in layer.path for layer in plan.layers)
    assert len(plan.layers) == 9


def test_peft_makes_its_factors_of_an_adapted_convolution_of_plain_ones() -> None:
    """It calls `type(layer)`, which is a class of ours, for them."""
    model = to_generic_point(mapsurgery.patch(nn.Sequential(nn.Conv2d(3, 4, 3)), "*", rank=2))
    x = torch.randn(1, 3, 6, 6)
    expected = model(x)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    assert type(model[0].lora_A["default"]) is nn.Conv2d and isinstance(model[0].base_layer, AdaptedLayer)
    assert torch.equal(model(x), expected)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nk,emk->nm", x, self.up)


def test_a_parameter_that_peft_parametrises_in_each_forward_is_left() -> None:
    model = peft.get_peft_model(
        nn.Sequential(Experts(), nn.Linear(8, 4)), peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.up"])
    )
    with pytest.raises(ValueError, match="PEFT parametrises it in each forward"):
        mapsurgery.patch(model, [], parameters="*up", rank=2)


class OwnLora(nn.Module):
    """LoRA as it is written by hand, and in torchtune."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.lora_a = nn.Linear(6, 2, bias=False)
        self.lora_b = nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora_b(self.lora_a(x))


def test_lora_written_by_hand_is_left_too() -> None:
    model = nn.Sequential(OwnLora(), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match=r'train 22 parameters, which patch freezes; train=\["\*lora_a\*"'):
        mapsurgery.patch(model, "*", rank=2)
    assert isinstance(model[0].linear, AdaptedLayer) and not isinstance(model[0].lora_a, AdaptedLayer)
    mapsurgery.verify(model, torch.randn(4, 6))
