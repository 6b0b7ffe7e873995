"""PEFT's own implementation beside ours: the same outputs, gradients and training, and adapters that go both ways.

Float64 where PEFT runs in it: two orders of summation then differ by less than 1e-12, and any difference of meaning by
much more. Where PEFT insists on float32 (PiSSA, OLoRA), 1e-5.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import defined_by, defined_delta
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mapsurgery
from mapsurgery.integrations.peft import (
    from_peft_state_dict,
    load_peft,
    save_peft,
    to_peft_config,
    to_peft_state_dict,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of Conv1D's layout and of embeddings that it saves


class Mixed(nn.Module):
    """Every kind of layer that both libraries adapt, with strides, paddings and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.line = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(1, 5, (3, 2), padding="same", bias=False)
        self.space = nn.Conv3d(1, 4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.line(self.table(ids).mT)  # (N, 8, L)
        x = self.plane(x.unsqueeze(1)).tanh()  # (N, 5, 8, L)
        x = self.space(x.unsqueeze(1)).flatten(2).mean(-1)
        return self.head(self.norm(x))


def _mixed() -> nn.Module:
    return Mixed()


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    """Its linear layers are transformers' Conv1D; its head is tied to its embedding."""
    config = transformers.GPT2Config(
        vocab_size=17, n_embd=16, n_layer=1, n_head=2, n_positions=12, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    # name: model, layers to adapt with LoRA, of which these cannot have PEFT's DoRA
    "mixed": (_mixed, ["table", "line", "plane", "space", "head"], ["table"]),
    "llama": (_llama, ["q_proj", "v_proj", "down_proj", "lm_head"], []),
    "gpt2": (_gpt2, ["c_attn", "c_fc", "wte"], ["wte"]),
}
METHODS: dict[str, dict[str, bool]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def _base(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name][0]().to(dtype).eval()


def _inputs(seed: int = 0) -> Tensor:
    return torch.randint(1, 11, (3, 9), generator=torch.Generator().manual_seed(seed))


def _output(model: nn.Module, ids: Tensor) -> Tensor:
    result = model(ids)
    return result if isinstance(result, Tensor) else result.logits


def _targets(name: str, method: str) -> list[str]:
    _, every, without_dora = MODELS[name]
    return [t for t in every if method != "dora" or t not in without_dora]


@torch.no_grad()
def _to_generic_point(model: nn.Module) -> nn.Module:
    """Move every trained parameter away from the start, where half of the gradients are 0."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter))
    for module in model.modules():  # PEFT's training leaves the row of padding_idx at 0, as it starts
        base = getattr(module, "base_layer", None)
        for own in getattr(module, "lora_embedding_A", {}).values():
            if base.padding_idx is not None:
                own[:, base.padding_idx] = 0
    return model


def _theirs(name: str, method: str = "lora", **options: Any) -> nn.Module:
    settings = {"r": 3, "lora_alpha": 5, "target_modules": _targets(name, method), **METHODS[method], **options}
    dtype = torch.float32 if "init_lora_weights" in options else torch.float64
    return _to_generic_point(peft.get_peft_model(_base(name, dtype), peft.LoraConfig(**settings))).eval()


def _ours(name: str, method: str = "lora", **options: Any) -> nn.Module:
    cls = mapsurgery.Dora if method == "dora" else mapsurgery.Lora
    settings = {"targets": [f"*{t}" for t in _targets(name, method)], "rank": 3, "tied": "separate", **options}
    return _to_generic_point(
        mapsurgery.patch(_base(name), method=cls(alpha=5, rslora=method == "rslora"), **settings)
    ).eval()


def _converted(model: nn.Module, name: str, folder: Path, way: str) -> nn.Module:
    """The other library's model with the adapter of this one."""
    theirs, base = isinstance(model, peft.PeftModel), _base(name)
    if way == "file":
        model.save_pretrained(folder) if theirs else save_peft(model, folder)
        return load_peft(base, folder) if theirs else peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    if theirs:
        return from_peft_state_dict(base, peft.get_peft_model_state_dict(model), model.peft_config["default"].to_dict())
    other = peft.get_peft_model(base, peft.LoraConfig(**to_peft_config(model)))
    result = peft.set_peft_model_state_dict(other, to_peft_state_dict(model))
    assert not result.unexpected_keys
    return other


def _pair(model: nn.Module, other: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(theirs, ours) of two models."""
    return (model, other.eval()) if isinstance(model, peft.PeftModel) else (other.eval(), model)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """A model's adapter under PEFT's names."""
    if not isinstance(model, peft.PeftModel):
        return to_peft_state_dict(model)
    return {n: t for n, t in peft.get_peft_model_state_dict(model).items() if ".base_layer." not in n}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The same, of a copy whose parameters are the gradients: names and layouts are those of the adapter."""
    twin, zero = copy.deepcopy(model), copy.deepcopy(model)
    for of_twin, of_zero, own in zip(twin.parameters(), zero.parameters(), model.parameters(), strict=True):
        if own.grad is not None:
            of_twin.data, of_zero.data = own.grad.clone(), torch.zeros_like(own)
    start = _state(zero)  # DoRA's lengths of the base's rows, from which this library counts
    return {name: t - start[name] for name, t in _state(twin).items()}


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
    optimiser.zero_grad()
    _output(model, _inputs(seed)).square().mean().backward()
    optimiser.step()


def _assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# Equality -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "way"), [(_theirs, "file"), (_ours, "memory")], ids=["theirs-file", "ours-memory"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_adapter_computes_and_trains_the_same(
    name: str, method: str, make: Callable[..., nn.Module], way: str, tmp_path: Path
) -> None:
    first = make(name, method)
    theirs, ours = _pair(first, _converted(first, name, tmp_path, way))
    # Converting moves numbers, and computes none; DoRA's magnitudes are counted from the lengths of the base's rows.
    _assert_same(_state(theirs), _state(ours), tolerance=1e-15 if method == "dora" else 0)
    base = _output(_base(name), _inputs())
    assert (_output(ours, _inputs()) - base).abs().max() > 1e-3
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)
    trained = [{id(p): p for p in model.parameters() if p.requires_grad} for model in (theirs, ours)]
    assert sum(p.numel() for p in trained[0].values()) == sum(p.numel() for p in trained[1].values())
    # PEFT's decay of DoRA's magnitudes is towards 0, this library's towards the base.
    decay = 0.0 if method == "dora" else 0.01
    optimisers = [torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=decay) for own in trained]
    for seed in range(3):
        for model, optimiser in zip((theirs, ours), optimisers, strict=True):
            _step(model, optimiser, seed)
        _assert_same(_gradients(theirs), _gradients(ours), tolerance=1e-9)  # after Adam's division by their own size
    _assert_same(_state(theirs), _state(ours), tolerance=1e-9)
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "start"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")])
def test_starts_of_parts_of_the_weight_are_theirs(name: str, start: str, tmp_path: Path) -> None:
    """PEFT puts the start into the factors and takes it out of W; here W stays and the update accounts for it."""
    targets = ["c_fc"] if name == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=start)
    theirs = peft.get_peft_model(_base(name, torch.float32), config).eval()
    ours = mapsurgery.patch(
        _base(name, torch.float32), [f"*{t}" for t in targets], rank=3, method=mapsurgery.Lora(alpha=5), update=start
    )
    assert torch.equal(_output(ours, _inputs()), _output(_base(name, torch.float32), _inputs()))
    pairs = []
    for key, parameter in theirs.base_model.model.named_parameters():
        if parameter.requires_grad:
            path, _, part = key.rpartition(".lora_")
            pairs.append((parameter, getattr(ours.get_submodule(path).adapter, part[0])))
    # eps: Adam would divide rounding by rounding where a gradient is near 0, and float32 has no digits to spare.
    optimisers = [torch.optim.AdamW(own, lr=1e-2, eps=1e-4) for own in zip(*pairs, strict=True)]
    for seed in range(3):
        for pair in pairs:
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
        for model, optimiser in zip((theirs, ours), optimisers, strict=True):
            _step(model, optimiser, seed)
        for their_own, own in pairs:
            torch.testing.assert_close(their_own.grad, own.grad, rtol=1e-4, atol=1e-7)
    moved = (_output(ours, _inputs()) - _output(_base(name, torch.float32), _inputs())).abs().max()
    assert moved > 5e-4
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-5, atol=2e-6)

    theirs.save_pretrained(tmp_path / "theirs")  # relative to W less the start, which PEFT makes anew when it loads
    loaded = load_peft(_base(name, torch.float32), tmp_path / "theirs").eval()
    assert next(iter(mapsurgery.surgery.record.adapters_of(loaded).values())).update.name == start
    torch.testing.assert_close(_output(theirs, _inputs()), _output(loaded, _inputs()), rtol=1e-5, atol=2e-6)

    save_peft(ours, tmp_path / "ours")  # relative to W itself, of twice the rank
    back = peft.PeftModel.from_pretrained(_base(name, torch.float32), tmp_path / "ours").eval()
    assert back.peft_config["default"].r == 6 and back.peft_config["default"].lora_alpha == 10
    torch.testing.assert_close(_output(back, _inputs()), _output(ours, _inputs()), rtol=1e-5, atol=2e-6)


def test_what_peft_converted_from_pissa_itself_loads(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        _base("llama", torch.float32), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    _to_generic_point(theirs).eval()
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = load_peft(_base("llama", torch.float32), tmp_path / "end").eval()
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("update", ["pissa", "olora", "adalora", "vera", "flora"])
def test_updates_with_factors_become_lora(update: str, method: str, tmp_path: Path) -> None:
    ours = _ours("mixed", method, update=update)
    theirs = _converted(ours, "mixed", tmp_path, "file")
    torch.testing.assert_close(_output(theirs.eval(), _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)


def test_exact_dora_has_the_same_values_in_peft(tmp_path: Path) -> None:
    exact = mapsurgery.Dora(alpha=5, exact=True)
    ours = _to_generic_point(mapsurgery.patch(_base("llama"), "*q_proj", rank=3, method=exact)).eval()
    theirs = _converted(ours, "llama", tmp_path, "file").eval()
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_of_ranks_and_alphas(rslora: bool, tmp_path: Path) -> None:
    theirs = _theirs(
        "llama",
        use_rslora=rslora,
        rank_pattern={"layers.1.self_attn.q_proj": 2, r"^model\.layers\.0\..*_proj": 4},
        alpha_pattern={"down_proj": 7, "q_proj": 9.5},
    )
    ours = _converted(theirs, "llama", tmp_path / "theirs", "file").eval()
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)
    assert ours.model.layers[0].self_attn.q_proj.adapter.rank == 4
    back = _converted(ours, "llama", tmp_path / "ours", "file").eval()
    torch.testing.assert_close(_output(back, _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)
    adapters = mapsurgery.surgery.record.adapters_of(ours)
    assert len({adapter.rank for adapter in adapters.values()}) == 3


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_alpha_of_its_own_keeps_a_start_of_parts_of_the_weight(start: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, alpha_pattern={"k_proj": 32}, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=start
    )
    theirs = _to_generic_point(peft.get_peft_model(_base("llama", torch.float32), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_peft(_base("llama", torch.float32), tmp_path).eval()
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-5, atol=1e-5)


# The other families, forward ----------------------------------------------------------------------------------------


def _single(config: Any, layer: nn.Module | None = None) -> tuple[Any, nn.Module]:
    """PEFT's layer at a generic point, and a plain twin of its base."""
    torch.manual_seed(2)
    base = nn.Sequential(layer or nn.Linear(64, 64)).double()
    theirs = _to_generic_point(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    return theirs, base


@torch.no_grad()
def _assert_same_forward(
    theirs: Any, base: nn.Module, update: str, scaling: float, tensors: dict[str, Tensor], x: Tensor, rank: int
) -> None:
    ours = mapsurgery.patch(base, "0", rank=rank, method=mapsurgery.Lora(alpha=scaling * rank), update=update).eval()
    for name, value in tensors.items():
        getattr(ours[0].adapter, name).copy_(value)
    unchanged = {name for name, _ in ours[0].adapter.named_parameters()} - {*tensors}
    assert not unchanged
    with mapsurgery.disabled(ours):
        assert (theirs(x) - ours(x)).abs().max() > 1e-3
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-12, atol=1e-12)


def test_adalora_is_theirs() -> None:
    theirs, base = _single(peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=6, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    layer.ranknum["default"].data.fill_(4)  # a number among the parameters
    A, B, E = (getattr(layer, f"lora_{part}")["default"] for part in "ABE")
    tensors = {"P": B, "lam": E.flatten(), "Q": A}
    scaling = 6 / (4 + 1e-5)  # PEFT divides by the rank plus 1e-5
    _assert_same_forward(theirs, base, "adalora", scaling, tensors, torch.randn(3, 64).double(), 4)


def test_vera_is_theirs() -> None:
    theirs, base = _single(peft.VeraConfig(r=4, target_modules=["0"], d_initial=0.3))
    layer = theirs.base_model.model[0]
    shared = {"A": theirs.base_model.vera_A["default"], "B": theirs.base_model.vera_B["default"]}
    tensors = shared | {"b": layer.vera_lambda_b["default"], "d": layer.vera_lambda_d["default"]}
    _assert_same_forward(theirs, base, "vera", 1.0, tensors, torch.randn(3, 64).double(), 4)


@pytest.mark.parametrize("conv", [False, True])
def test_loha_is_theirs(conv: bool) -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1) if conv else None  # alpha/r is 2: PEFT rounds it to float32
    theirs, base = _single(peft.LoHaConfig(r=3, alpha=6, target_modules=["0"]), layer)
    own = theirs.base_model.model[0]
    names = {"B1": "w1_a", "A1": "w1_b", "B2": "w2_a", "A2": "w2_b"}
    tensors = {name: getattr(own, f"hada_{theirs_name}")["default"] for name, theirs_name in names.items()}
    x = torch.randn(2, 6, 5, 5).double() if conv else torch.randn(3, 64).double()
    _assert_same_forward(theirs, base, "loha", 2.0, tensors, x, 3)


@pytest.mark.parametrize("rank", [2, 6], ids=["factors", "full"])
def test_lokr_is_theirs(rank: int) -> None:
    theirs, base = _single(peft.LoKrConfig(r=rank, alpha=5, target_modules=["0"]))
    own = theirs.base_model.model[0]
    tensors = {"C": own.lokr_w1["default"]}
    if rank == 2:
        tensors |= {"D_b": own.lokr_w2_a["default"], "D_a": own.lokr_w2_b["default"]}
    else:
        tensors["D"] = own.lokr_w2["default"]
    _assert_same_forward(theirs, base, "lokr", 5 / rank, tensors, torch.randn(3, 64).double(), rank)


# What else an adapter holds -----------------------------------------------------------------------------------------


def test_modules_to_save_are_trained_in_full_and_go_both_ways(tmp_path: Path) -> None:
    theirs = _theirs("mixed", target_modules=["line"], modules_to_save=["head", "norm"]).train()
    theirs(_inputs())  # BatchNorm's statistics move
    theirs.eval()
    ours = _converted(theirs, "mixed", tmp_path / "theirs", "file").eval()
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {*(f"{m}.{p}" for m in ("head", "norm") for p in ("weight", "bias"))} | {
        "line.adapter.A",
        "line.adapter.B",
    }
    assert {*ours.head.bias.tolist()}.isdisjoint(_base("mixed").head.bias.tolist())
    back = _converted(ours, "mixed", tmp_path / "ours", "file").eval()
    torch.testing.assert_close(_output(back, _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)
    assert {*back.peft_config["default"].modules_to_save} == {"head", "norm"}
    mapsurgery.unpatch(ours)
    _assert_same(dict(ours.state_dict()), dict(_base("mixed").state_dict()), tolerance=0)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_quantised_base_takes_the_same_adapter(method: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def base() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32), nn.Linear(32, 4)).to("cpu").eval()
        model.is_loaded_in_4bit = True  # for PEFT
        # A CPU with bfloat16 products would pack W again and compute in bfloat16; PEFT's DoRA then reads W wrongly.
        model[0].support_avx512bf16_for_cpu = False
        return model

    x = torch.randn(3, 64)
    ours = _to_generic_point(mapsurgery.patch(base(), "0", rank=4, method=method)).eval()
    save_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert type(theirs.base_model.model[0]) is peft.tuners.lora.Linear4bit
    assert (ours(x) - base()(x)).abs().max() > 1e-2
    # W is compared, and not the product: bitsandbytes' rounds on AVX-512, which PEFT's DoRA magnifies.
    codes = base()[0].weight
    updated = defined_by(ours[0].adapter, bnb.functional.dequantize_4bit(codes.data, codes.quant_state))
    expected = nn.functional.linear(x.double(), updated, ours[0].bias.double())
    torch.testing.assert_close(ours[0](x).double(), expected, rtol=1e-4, atol=1e-4)
    _assert_same(_state(theirs), _state(ours), tolerance=1e-6 if method == "dora" else 0)
    assert theirs.peft_config["default"].use_dora == (method == "dora")
    delta = theirs.base_model.model[0].get_delta_weight("default").double()
    scaled = ours[0].adapter.method.alpha / ours[0].adapter.rank * defined_delta(ours[0].adapter, updated)
    torch.testing.assert_close(delta, scaled, rtol=1e-5, atol=1e-6)
    assert torch.equal(load_peft(base(), tmp_path)(x), ours(x))


def test_tied_layers_are_written_one_by_one(tmp_path: Path) -> None:
    ours = _to_generic_point(mapsurgery.patch(_base("gpt2"), "*wte", rank=2, method="lora")).eval()
    assert ours.lm_head.adapter is ours.transformer.wte.adapter
    theirs = _converted(ours, "gpt2", tmp_path, "file").eval()
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)
    assert {*theirs.peft_config["default"].target_modules} == {"transformer.wte", "lm_head"}


def test_a_layer_whose_name_ends_anothers_is_told_apart(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(1)
        return nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(3, 4)}), "fc": nn.Linear(3, 4)})

    ours = mapsurgery.patch(base(), ["fc"], exclude="a", rank=2, method="lora")
    save_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    adapted = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert adapted == ["fc"]


def test_an_injected_model_takes_names_without_prefix() -> None:
    ours = _ours("mixed")
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**to_peft_config(ours)), _base("mixed"))
    result = peft.set_peft_model_state_dict(theirs, to_peft_state_dict(ours, prefix=""))
    assert not result.unexpected_keys
    torch.testing.assert_close(_output(theirs, _inputs()), _output(ours, _inputs()), rtol=1e-12, atol=1e-12)
    again = from_peft_state_dict(_base("mixed"), to_peft_state_dict(ours, prefix=""), to_peft_config(ours))
    _assert_same(to_peft_state_dict(again), to_peft_state_dict(ours), tolerance=0)


def test_names_that_hold_the_adapters_own_name_are_understood() -> None:
    theirs = _theirs("llama", "dora")
    state = {n: p for n, p in theirs.state_dict().items() if "lora_" in n}
    assert all(".default" in name for name in state)
    ours = from_peft_state_dict(_base("llama"), state, theirs.peft_config["default"].to_dict())
    _assert_same(_state(theirs), _state(ours), tolerance=0)


def test_half_precision_is_read_and_rounded_as_it_is(tmp_path: Path) -> None:
    ours = _ours("llama")
    save_peft(ours, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    rounded = {name: t.bfloat16() for name, t in load_file(file).items()}
    save_file(rounded, file)
    loaded = load_peft(_base("llama", torch.float32), tmp_path)
    adapter = loaded.lm_head.adapter
    assert adapter.A.dtype == torch.float32
    assert torch.equal(adapter.A, rounded["base_model.model.lm_head.lora_A.weight"].float())


def test_dropout_and_the_names_of_base_and_task_are_written(tmp_path: Path) -> None:
    ours = _ours("llama", dropout=0.25)
    save_peft(ours, tmp_path, base_model="some/model", task_type="CAUSAL_LM")
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.task_type, config.lora_dropout) == ("some/model", "CAUSAL_LM", 0.25)
    assert load_peft(_base("llama"), tmp_path).lm_head.adapter.dropout == 0.25


# Refusals -----------------------------------------------------------------------------------------------------------


def _refused_to_write(model: nn.Module, folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        save_peft(model, folder / "adapter")
    assert os.listdir(folder) == []


def _layer(layer: nn.Module, targets: str = "0", **options: Any) -> nn.Module:
    return mapsurgery.patch(nn.Sequential(layer, nn.Identity()), targets, rank=2, **{"method": "lora", **options})


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 5))


def _shared_twice() -> nn.Module:
    layer = nn.Linear(3, 4)
    return mapsurgery.patch(nn.ModuleDict({"a": layer, "b": layer}), "a", rank=2, method="lora")


def _zero_row() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight.data[1] = 0
    return _layer(layer, method="dora")


WRITING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "map": (lambda: _layer(nn.Linear(3, 4), method="map"), "method 'map' has no counterpart in PEFT.*mapsurgery.save"),
    "loha": (lambda: _layer(nn.Linear(3, 4), update="loha"), "layer '0' has update 'loha', which is no product"),
    "dense": (lambda: _layer(nn.Linear(3, 4), update="dense"), "layer '0' has update 'dense'"),
    "groups": (lambda: _layer(nn.Conv2d(4, 4, 3, groups=2)), "layer '0' is a convolution in 2 groups"),
    "dilation": (lambda: _layer(nn.Conv1d(4, 4, 3, dilation=2)), r"convolution with dilation \(2,\)"),
    "padding": (lambda: _layer(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")), "padding mode 'circular'"),
    "embedding dora": (lambda: _layer(nn.Embedding(5, 4), method="dora"), "is an Embedding, of which DoRA has"),
    "zero row": (_zero_row, "layer '0' has a weight with a row of zeros"),
    "transposed": (lambda: _layer(nn.ConvTranspose1d(4, 4, 3)), "layer '0' is a ConvTranspose1d"),
    "recurrent": (lambda: _layer(nn.GRU(3, 4)), "is the parameter weight_ih_l0 of a GRU"),
    "stack": (lambda: _layer(_Stack(), (), parameters="0.experts"), "is the parameter experts of a _Stack"),
    "two names": (_shared_twice, "layer 'a' is also 'b'"),
    "whole model": (lambda: mapsurgery.patch(nn.Linear(3, 4), "*", rank=2, method="lora"), "is the whole model"),
    "bias": (lambda: _layer(nn.Linear(3, 4), train="0.bias"), "'0.bias' is trained beside an adapter in '0'"),
}


@pytest.mark.parametrize("case", WRITING)
def test_what_peft_cannot_hold_is_refused_by_name_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    make, match = WRITING[case]
    _refused_to_write(make(), tmp_path, match)


def test_a_trained_tied_module_is_refused(tmp_path: Path) -> None:
    model = mapsurgery.patch(_base("gpt2"), "*c_fc", rank=2, method="lora", train="lm_head")
    _refused_to_write(model, tmp_path, "is trained and tied with another module")


def test_nan_is_not_written(tmp_path: Path) -> None:
    model = _layer(nn.Linear(3, 4))
    model[0].adapter.B.data[0, 0] = float("nan")
    _refused_to_write(model, tmp_path, "NaN.*0.lora_B.weight")


def test_a_failure_leaves_the_old_adapter_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_peft(_ours("mixed"), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = []

    def fail(handle: int) -> None:  # at the second of the two files
        calls.append(handle)
        if len(calls) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_peft(_ours("mixed", rank=2), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def _edited(
    folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None
) -> Path:
    """A good adapter of "mixed" with entries set, or taken out (None)."""
    save_peft(_ours("mixed"), folder)
    settings = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    state = load_file(folder / "adapter_model.safetensors") | (tensors or {})
    save_file({k: t for k, t in state.items() if t is not None}, folder / "adapter_model.safetensors")
    return folder


HEAD = "base_model.model.head"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only'"),
    "lora_bias": ({"lora_bias": True}, "no counterpart here: lora_bias=True"),
    "replication": ({"layer_replication": [[0, 4], [2, 5]]}, r"layer_replication=\[\[0, 4\]"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config="),
    "qalora": ({"use_qalora": True}, "use_qalora=True"),
    "tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
    "parameters": ({"target_parameters": ["experts"]}, r"target_parameters=\['experts'\]"),
    "of the future": ({"use_something_new": 3}, "use_something_new=3"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
    "random pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model"),
    "alpha": ({"lora_alpha": 0}, "alpha of method 'lora' must be a positive number, got 0"),
    "no rank": ({"r": None}, "has r=None"),
    "text rank": ({"rank_pattern": {"head": "3"}}, "has head='3'"),
    "pattern": ({"alpha_pattern": {"(": 3}}, r"alpha_pattern .* has '\(', no regular expression"),
    "other rank": ({"r": 2}, "layer 'table' needs tensors .* for rank 2"),
    "dora": ({"use_dora": True}, "layer 'table' is an Embedding"),
    "missing module": ({"modules_to_save": ["norm"]}, "'norm.weight' of modules_to_save is missing"),
}
TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no B": ({f"{HEAD}.lora_B.weight": None}, "layer 'head' needs tensors"),
    "bias": ({f"{HEAD}.lora_B.bias": torch.zeros(3)}, "tensor 'head.lora_B.bias' has no place here"),
    "unknown": ({f"{HEAD}.lora_diag": torch.zeros(3)}, "tensor 'head.lora_diag' has no place here"),
    "another base": ({f"{HEAD}.weight": torch.zeros(3, 4)}, "'head.weight' has no place here, or is another"),
    "no such layer": ({"base_model.model.tail.lora_A.weight": torch.zeros(3, 4)}, "layer 'tail' is missing"),
    "shape": ({f"{HEAD}.lora_A.weight": torch.zeros(3, 5)}, r"layer 'head' needs .*\(3, 4\).*has .*\(3, 5\)"),
    "NaN": ({f"{HEAD}.lora_A.weight": torch.full((3, 4), torch.nan)}, "finite numbers: base_model.model.head.lora_A"),
    "several": ({f"{HEAD}.lora_A.second.weight": torch.zeros(3, 4)}, "several adapters"),
    "magnitude": ({f"{HEAD}.lora_magnitude_vector": torch.ones(3)}, "layer 'head' needs tensors"),
}


def _refused_to_read(folder: Path, match: str) -> None:
    model = _base("mixed")
    with pytest.raises(ValueError, match=match):
        load_peft(model, folder)
    _assert_same(dict(model.state_dict()), dict(_base("mixed").state_dict()), tolerance=0)
    assert [type(m) for m in model.modules()] == [type(m) for m in _base("mixed").modules()]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_not_understood_is_refused_by_name(case: str, tmp_path: Path) -> None:
    config, match = CONFIGS[case]
    _refused_to_read(_edited(tmp_path, config), match)


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_without_a_place_is_refused_by_name(case: str, tmp_path: Path) -> None:
    tensors, match = TENSORS[case]
    _refused_to_read(_edited(tmp_path, tensors=tensors), match)


def test_a_rank_above_the_weights_is_refused(tmp_path: Path) -> None:
    tensors = {f"{HEAD}.lora_A.weight": torch.ones(7, 4), f"{HEAD}.lora_B.weight": torch.ones(3, 7)}
    folder = _edited(tmp_path, {"rank_pattern": {"head": 7}}, tensors)
    _refused_to_read(folder, r"layer 'head' has rank 7, which is more than its weight allows here \(3\)")


def test_olora_of_a_transposed_weight_is_refused_for_peft_does_not_start_from_the_base(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["attn.c_proj"], init_lora_weights="olora")  # square: the shapes fit
    theirs = peft.get_peft_model(_base("gpt2", torch.float32), config).eval()
    base = _base("gpt2", torch.float32)
    assert (_output(theirs, _inputs()) - _output(base, _inputs())).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a Conv1D, where PEFT's OLoRA takes the transpose"):
        load_peft(base, tmp_path)


def test_a_tied_module_to_save_is_refused(tmp_path: Path) -> None:
    theirs = _theirs("gpt2", target_modules=["c_fc"], modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'lm_head.weight' is tied with another module"):
        load_peft(_base("gpt2"), tmp_path)


def test_an_embedding_that_peft_saved_with_its_adapter_must_be_the_models(tmp_path: Path) -> None:
    theirs = _theirs("llama", target_modules=["embed_tokens"])  # PEFT saves its base weight too
    theirs.save_pretrained(tmp_path)
    name = "model.embed_tokens.base_layer.weight"
    assert f"base_model.model.{name}" in load_file(tmp_path / "adapter_model.safetensors")
    load_peft(_base("llama"), tmp_path)
    other = _base("llama")
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(ValueError, match=f"'{name}' has no place here, or is another"):
        load_peft(other, tmp_path)


@pytest.mark.parametrize("target", ["attention", "attention.out_proj"])
def test_attentions_are_refused_for_peft_counts_their_output_update_twice(target: str, tmp_path: Path) -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "other": nn.Linear(8, 8)}).double().eval()
    x = torch.randn(4, 2, 8).double()
    theirs = _to_generic_point(
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["attention"]))
    )
    wrapped, twin = theirs.base_model.model["attention"], copy.deepcopy(base["attention"])
    with torch.no_grad():
        twin.in_proj_weight += wrapped.get_delta_weight("default")
        twin.out_proj.weight += 2 * wrapped.base_layer.out_proj.get_delta_weight("default")
    torch.testing.assert_close(wrapped(x, x, x)[0], twin(x, x, x)[0], rtol=1e-12, atol=1e-12)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer 'attention' is of an nn.MultiheadAttention, to whose out_proj"):
        load_peft(base, tmp_path)
    with pytest.raises(ValueError, match="is of an nn.MultiheadAttention, to whose out_proj PEFT 0.21 adds"):
        to_peft_state_dict(mapsurgery.patch(base, target, rank=2, method="lora"))


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load_peft(_base("mixed"), tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="a pickle"):
        load_peft(_base("mixed"), tmp_path)
    folder = _edited(tmp_path)
    (folder / "adapter_config.json").write_text("[1")
    _refused_to_read(folder, "adapter_config.json is not valid JSON")
    (folder / "adapter_config.json").write_text("[1]")
    _refused_to_read(folder, "must hold a JSON object, got list")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_peft(_base("mixed"), folder / "adapter_model.safetensors")
    folder = _edited(tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    _refused_to_read(folder, "not a complete safetensors file")


def test_a_patched_model_is_refused(tmp_path: Path) -> None:
    folder = _edited(tmp_path)
    with pytest.raises(ValueError, match="patched already"):
        load_peft(_ours("mixed"), folder)
