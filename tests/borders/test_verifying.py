"""`verify` in the contexts and on the models that people train: an alarm where something is wrong, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import accelerate
import pytest
import torch
import transformers
from small_models import convnext, gpt2, llama, mixtral, t5, tokens, unet, vit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import mapsurgery


def undecided() -> nn.Module:
    """A mixture whose router is nearly undecided: rounding chooses the experts of a token."""
    model = mixtral()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(1e-6)
    return model


def _images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),)


def _noised() -> tuple[Tensor, ...]:
    return torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)


def _text() -> tuple[Tensor, ...]:
    return (tokens(),)


def _pair() -> tuple[Tensor, ...]:
    return tokens(), torch.ones_like(tokens()), tokens()  # a mask, and what the decoder reads


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "llama": (llama, _text),
    "gpt2": (lambda: gpt2(), _text),
    "t5": (t5, _pair),
    "mixtral": (undecided, _text),
    "vit": (vit, _images),
    "convnext": (convnext, _images),
    "unet": (unet, _noised),
}


class AutocastInside(nn.Module):
    """A model that enters autocast by itself, as accelerate's and Lightning's do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(*args)


WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], AbstractContextManager]]] = {
    "float32": (lambda model: model, nullcontext),
    "autocast around": (lambda model: model, lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast inside": (AutocastInside, nullcontext),
    "bfloat16": (lambda model: model.bfloat16(), nullcontext),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (n, w)
        for n in MODELS
        for w in WAYS
        if n == "llama" or w == "bfloat16" or (n == "unet" and w == "autocast around")
    ],
)
def test_no_alarm_in_any_precision(name: str, way: str) -> None:
    build, inputs = MODELS[name]
    change, entered = WAYS[way]
    raw = ["*experts*"] if name == "mixtral" else []
    model = mapsurgery.patch(change(build()), "*", rank=2, parameters=raw)
    half = way == "bfloat16"
    given = [x.bfloat16() if half and x.is_floating_point() else x for x in inputs()]
    with entered():
        result = mapsurgery.verify(model, *given)
    assert not result.failures and result.notes == ()


@pytest.mark.parametrize("way", ["float32", "autocast around"])
def test_a_parent_that_kept_a_parameter_is_found_in_a_real_model(way: str) -> None:
    """As a kernels library does that fuses layers when it wraps a block."""
    model = llama()
    block = model.model.layers[1].mlp
    kept = block.down_proj.weight
    block.register_forward_hook(
        lambda module, args, output: output + 1e-3 * F.linear(args[0], (kept.T @ kept)[:32, :32])
    )
    mapsurgery.patch(model, "*proj*", rank=2)
    with WAYS[way][1](), pytest.raises(mapsurgery.VerificationError, match="layers.1.mlp.down_proj behind its back"):
        mapsurgery.verify(model, tokens())


# torch's own fast paths ---------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = _encoder(), nn.Linear(16, 3)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=src_key_padding_mask).mean(1))


class DropsInInference(Pooled):
    """Goes around the second layer where nothing learns."""

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x, src_key_padding_mask)
        return self.head(self.encoder.layers[0](x, src_key_padding_mask=src_key_padding_mask).mean(1))


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)


def _masked() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4:] = mask[2, 2:] = True
    return torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(2)), mask


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("build", [_encoder, Pooled], ids=["padded", "pooled"])
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_padding_mask_is_no_alarm(build: Callable[[], nn.Module], autocast: bool) -> None:
    """The fast path of nn.TransformerEncoder writes zeros at padded places, and fails under autocast, in the base."""
    x, mask = _masked()
    model = mapsurgery.patch(build(), "*", rank=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert not mapsurgery.verify(model, x, src_key_padding_mask=mask).failures


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_layer_that_inference_leaves_out_is_found_beside_a_padding_mask() -> None:
    x, mask = _masked()
    with pytest.raises(mapsurgery.VerificationError, match="inference differs.*bypasses encoder.layers.1"):
        mapsurgery.verify(mapsurgery.patch(DropsInInference(), "*", rank=2), x, src_key_padding_mask=mask)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_on_packed_sequences_and_states(cls: type[nn.Module]) -> None:
    model = mapsurgery.patch(cls(8, 8, 2), "*", rank=2)
    assert not mapsurgery.verify(model, pack_sequence([torch.randn(4, 8), torch.randn(2, 8)])).failures
    states = torch.zeros(2, 3, 8)
    example = torch.randn(5, 3, 8), (states, states) if cls is nn.LSTM else states
    assert not mapsurgery.verify(model, example).failures


# Top-k over near ties -----------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Inference sums in another order, which decides for other experts where they are nearly tied."""

    def __init__(self, decided: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.router, self.head = nn.Linear(16, 16), nn.Linear(16, 6, bias=False), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        with torch.no_grad():
            self.router.weight.mul_(decided)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if not torch.is_grad_enabled():
            x = x * (1 + 1e-7 * torch.randn(x.shape))
        shares, chosen = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, place = (chosen == i).nonzero(as_tuple=True)
            y = y.index_add(0, rows, expert(x[rows]) * shares[rows, place].unsqueeze(-1))
        return self.head(y)


@pytest.mark.parametrize("decided", [1.0, 1e-4, 1e-6])
@pytest.mark.parametrize("seed", range(3))
def test_flips_over_near_ties_are_no_alarm(decided: float, seed: int) -> None:
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(seed))
    model = mapsurgery.patch(Mixture(decided), ["stem", "experts.*", "head"], rank=2)
    assert not mapsurgery.verify(model, x).failures


# Examples, caches, optimisers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [transformers.BatchEncoding, dict, transformers.BatchFeature])
def test_what_a_tokeniser_returns_is_an_example(kind: type) -> None:
    example = kind({"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())})
    assert not mapsurgery.verify(mapsurgery.patch(llama(), "*proj*", rank=2), example).failures


def test_a_cache_that_is_given_is_not_filled() -> None:
    cache = transformers.DynamicCache()
    model = mapsurgery.patch(llama(), "*proj*", rank=2)
    assert not mapsurgery.verify(model, tokens(), past_key_values=cache, use_cache=True).failures
    assert cache.get_seq_length() == 0


def test_an_optimiser_that_accelerate_wrapped_before_patch_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    plain = llama()
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters()))
    mapsurgery.patch(plain, "*q_proj*", rank=2)
    with pytest.raises(mapsurgery.VerificationError, match="layers.0.self_attn.q_proj: not in the optimiser: A, B"):
        mapsurgery.verify(model, tokens(), optimizer=optimizer)
    optimizer = accelerator.prepare(torch.optim.AdamW(mapsurgery.param_groups(plain, lr=1e-3)))
    assert mapsurgery.verify(model, tokens(), optimizer=optimizer).notes == ()


def test_the_head_outside_of_a_patched_backbone_is_named() -> None:
    model = llama()
    mapsurgery.patch(model.model, "*q_proj*", rank=2)
    notes = mapsurgery.verify(model, tokens()).notes
    assert notes[0] == "1 other parameter trains (2,048 numbers): lm_head.weight" and "outside" in notes[1]


# Stored in 8 bits ---------------------------------------------------------------------------------------------------


def _stored() -> nn.Module:
    model = unet()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("attn", "ff", "norm"))
    assert torch.float8_e4m3fn in {p.dtype for p in model.parameters()}
    return model


def test_a_model_that_diffusers_stores_in_8_bits() -> None:
    """torch cannot differentiate its convolutions, with adapters or without; so the verdict is on who acts."""
    model = mapsurgery.patch(_stored(), "*attn*", rank=2)
    result = mapsurgery.verify(model, *_noised())
    assert not result.failures and not result.differentiated and "for the base too" in result.notes[0]
    assert torch.float8_e4m3fn in {p.dtype for p in model.parameters()}


def test_a_reader_of_weights_is_found_in_a_model_that_is_stored_in_8_bits() -> None:
    model = _stored()
    layer = model.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    kept = layer.weight
    layer.register_forward_hook(lambda module, args, output: output + F.linear(args[0], kept))
    mapsurgery.patch(model, "*ff.net.2", rank=2)
    with pytest.raises(mapsurgery.VerificationError, match="ff.net.2 behind its back"):
        mapsurgery.verify(model, *_noised())


# Compiled -----------------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_verified_without_compiling() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        compiled.append(1)
        return graph.forward

    plain = mapsurgery.patch(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), "*", rank=2)
    model = torch.compile(plain, backend=backend)
    model(torch.randn(3, 4))
    before = len(compiled)
    assert not mapsurgery.verify(model, torch.randn(3, 4)).failures
    model(torch.randn(3, 4))
    assert len(compiled) == before == 1
