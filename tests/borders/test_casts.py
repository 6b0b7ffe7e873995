"""A cast of the model, whoever makes it, leaves the adapters their digits; what is saved loads on the same base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import cast_training_params
from homes import COMPUTED, PLAIN, Case, adapter_tensors
from modules import parametrized
from peft import prepare_model_for_kbit_training
from small_models import llama, logits, text_data
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import mapsurgery
from mapsurgery.methods import Adapter

HALVES = (torch.bfloat16, torch.float16)
NARROW = (*HALVES, torch.float8_e4m3fn, torch.float8_e5m2)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(7)).to(dtype)


def patched(model: nn.Module | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return mapsurgery.patch(net() if model is None else model, "*", **{"rank": 2, **options})


def adapters(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for a in adapters(model) for p in a.parameters()}


def of_base(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for name, p in model.named_parameters() if "adapter" not in name}


# What a cast leaves --------------------------------------------------------------------------------------------------

_CASTS: dict[str, tuple[torch.dtype, Callable[[nn.Module], object]]] = {
    "half": (torch.float16, lambda m: m.half()),
    "bfloat16": (torch.bfloat16, lambda m: m.bfloat16()),
    **{f"to {dtype}": (dtype, lambda m, dtype=dtype: m.to(dtype)) for dtype in NARROW},
    "to device and dtype": (torch.bfloat16, lambda m: m.to("cpu", torch.bfloat16)),
    "module by module": (torch.float16, lambda m: [module.half() for module in m.modules()]),
    "apply": (torch.bfloat16, lambda m: m.apply(lambda module: module.to(torch.bfloat16))),
}


@pytest.fixture(params=["set_data", "swap", "overwrite"])
def conversion(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ways in which torch puts a converted parameter into its module."""
    switches = {
        "swap": torch.__future__.set_swap_module_params_on_conversion,
        "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
    }
    switch = switches.get(request.param, lambda on: None)
    switch(True)
    yield request.param
    switch(False)


@pytest.mark.parametrize("cast", _CASTS)
@pytest.mark.parametrize("update", ["lora", "vera", "dense"])
def test_a_narrower_cast_leaves_every_bit_of_an_adapter(cast: str, update: str, conversion: str) -> None:
    dtype, apply = _CASTS[cast]
    model = patched(update=update)
    model(data()).square().sum().backward()
    before = {name: p.detach().clone() for name, p in adapter_tensors(model).items()}
    norms = [a.weight_norm.clone() for a in adapters(model)]
    apply(model)
    assert of_base(model) == {dtype} and dtypes(model) == {torch.float32}
    assert all(torch.equal(p, before[name]) for name, p in adapter_tensors(model).items())
    assert all(torch.equal(a.weight_norm, norm) for a, norm in zip(adapters(model), norms, strict=True))
    assert all(p.grad is None or p.grad.dtype == p.dtype for a in adapters(model) for p in a.parameters())
    trained = {name for a in adapters(model) for name, p in a.named_parameters() if p.requires_grad}
    assert trained == {*adapters(model)[0].roles}
    if dtype in HALVES:
        assert model(data(dtype)).dtype == dtype


def test_shared_frozen_tensors_stay_shared() -> None:
    model = patched(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), update="vera").bfloat16()
    first, second = adapters(model)
    assert first.A is second.A and first.A.dtype == torch.float32


def test_wider_casts_are_followed_and_taken_back() -> None:
    model = patched()
    assert dtypes(model.double()) == {torch.float64}
    assert dtypes(model.float()) == {torch.float32}
    half = patched(dtype=torch.bfloat16)
    assert dtypes(half.to(torch.float16)) == {torch.bfloat16}  # float16 does not hold bfloat16's range
    assert dtypes(half.float()) == {torch.float32}
    assert dtypes(half.bfloat16()) == {torch.float32}  # what was trained since stays
    exact = patched(dtype=torch.float64)
    assert dtypes(exact.float()) == {torch.float64}
    assert exact(data()).dtype == torch.float32


def test_a_cast_to_another_device_moves() -> None:
    model = patched().to("meta", torch.bfloat16)
    assert dtypes(model) == {torch.float32} and all(a.is_meta for a in adapters(model))
    model.to_empty(device="cpu")
    assert dtypes(model) == {torch.float32} and not any(a.is_meta for a in adapters(model))


@every_half
def test_a_pending_adapter_keeps_its_dtype(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = net()
    mapsurgery.patch(model, "*", rank=2).to(dtype)
    model.load_state_dict(net().to(dtype).state_dict(), assign=True)
    assert dtypes(model) == {torch.float32}
    assert torch.equal(model(data(dtype)), net().to(dtype)(data(dtype)))


# By the tools --------------------------------------------------------------------------------------------------------


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


def noise() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_a_pipeline_of_diffusers_is_cast_and_trains(tmp_path: Path) -> None:
    pipeline = DDPMPipeline(patched(unet()), DDPMScheduler())
    pipeline.to(torch.bfloat16)
    model = pipeline.unet
    assert dtypes(model) == {torch.float32} and of_base(model) == {torch.bfloat16}
    whole = patched(unet())
    expected = trained_alphas(whole, lambda: whole(noise(), 3).sample)
    found = trained_alphas(model, lambda: model(noise().bfloat16(), 3).sample)
    # A norm takes back the scale of the layer before it: that alpha has no gradient but rounding.
    moving = [(a, b) for a, b in zip(expected, found, strict=True) if a > 2e-3]
    assert len(moving) >= 45 and all(b > 1e-3 for _, b in moving)
    mapsurgery.save(model, tmp_path / "unet.safetensors")
    fresh = mapsurgery.load(unet().to(torch.bfloat16), tmp_path / "unet.safetensors")
    with torch.no_grad():
        found, expected = (m(noise().bfloat16(), 3).sample for m in (fresh, model))
    torch.testing.assert_close(found, expected)


def test_diffusers_cast_of_what_is_trained_is_followed() -> None:
    model = patched(unet(), dtype=torch.bfloat16).to(torch.bfloat16)
    cast_training_params(model, torch.float32)
    assert {p.dtype for p in adapter_tensors(model).values()} == {torch.float32}
    assert of_base(model) == {torch.bfloat16}


def test_peft_preparation_for_quantised_training_is_followed() -> None:
    model = patched(llama().to(torch.bfloat16), dtype=torch.bfloat16)
    model.is_loaded_in_8bit = True  # else it casts nothing
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert logits(model).dtype == torch.float32 and dtypes(model) == {torch.float32}


def test_accelerates_outputs_in_float32_leave_the_adapters() -> None:
    model = patched().bfloat16()
    forward = convert_outputs_to_fp32(model.forward)
    assert forward(data(torch.bfloat16)).dtype == torch.float32 and dtypes(model) == {torch.float32}


def test_the_trainer_goes_on_from_a_cast_model(tmp_path: Path) -> None:
    model = patched(llama()).to(torch.bfloat16)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=text_data()).train()
    assert dtypes(model) == {torch.float32}
    assert all(a.alpha.item() != 0 for a in adapters(model))
    mapsurgery.save(model, tmp_path / "adapter.safetensors")
    loaded = mapsurgery.load(llama().to(torch.bfloat16), tmp_path / "adapter.safetensors")
    torch.testing.assert_close(logits(loaded), logits(model.eval()))


# Alpha moves ---------------------------------------------------------------------------------------------------------


def trained_alpha(model: nn.Module, forward: Callable[[], Tensor], steps: int = 10) -> float:
    """The smallest distance that an alpha goes, from where it is, in some steps of AdamW at 1e-3."""
    return min(trained_alphas(model, forward, steps))


def trained_alphas(model: nn.Module, forward: Callable[[], Tensor], steps: int = 10) -> list[float]:
    """The distance that each goes."""
    before = [a.alpha.detach().float().clone() for a in adapters(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        (100 * forward().float().square().mean()).backward()
        optimizer.step()
    return [(a.alpha.float() - b).abs().item() for a, b in zip(adapters(model), before, strict=True)]


def one_by_one(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(dtype)
    return model


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_base_is_the_start_of_half_adapters(method: str) -> None:
    """DoRA's magnitudes were the rows' lengths, which bfloat16 rounds by up to 0.4 %."""
    model = patched(method=method, dtype=torch.bfloat16)
    torch.testing.assert_close(model(data()), net()(data()), rtol=1e-5, atol=1e-5)


_HALF_MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "cast after": lambda dtype: patched().to(dtype),
    "one by one": lambda dtype: one_by_one(patched(), dtype),
    "asked for": lambda dtype: patched(net().to(dtype), dtype=dtype),
    "absolute": lambda dtype: one_by_one(patched(init=mapsurgery.Init(relative=False)), dtype),
}


@every_half
@pytest.mark.parametrize("made", _HALF_MODELS)
def test_alpha_moves_in_a_half_model(made: str, dtype: torch.dtype) -> None:
    """In bfloat16, a number near 1 was never moved by steps of 1e-3."""
    model = _HALF_MODELS[made](dtype)
    assert of_base(model) == {dtype}
    assert dtypes(model) == {torch.float32 if made == "cast after" else dtype}
    assert trained_alpha(model, lambda: model(data(dtype)), steps=100) > 0.01


# Files ---------------------------------------------------------------------------------------------------------------


class Same(nn.Linear):
    """All elements of one size, as in a binary network: rounding moves all of them the same way."""

    def __init__(self) -> None:
        super().__init__(16, 8)
        with torch.no_grad():
            self.weight.sign_().mul_(0.3)


class Outlier(nn.Linear):
    """One element decides the norm, as in position embeddings."""

    def __init__(self) -> None:
        super().__init__(256, 256)
        with torch.no_grad():
            self.weight.mul_(1e-3)[3, 4] = 3.01


_LEFT_OUT = {"orthogonal"}  # of which torch has none in half types
FILE_CASES = [
    *[case for case in (*PLAIN, *COMPUTED) if case.name not in _LEFT_OUT],
    Case("same_size", Same, lambda: torch.randn(3, 16)),
    Case("outlier", Outlier, lambda: torch.randn(3, 256)),
]
_AFTER: dict[str, Callable[[nn.Module, torch.dtype], object]] = {"to": lambda m, dtype: m.to(dtype), "data": one_by_one}
_BASES: dict[str, Callable[[Case, torch.dtype], nn.Module]] = {
    "as it was": lambda case, dtype: case.built(),
    "cast": lambda case, dtype: case.built().to(dtype),
}


def _computed(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    model = model.to(dtype)
    with torch.no_grad():
        return model(x.to(dtype) if x.is_floating_point() else x).float()


@pytest.mark.parametrize(
    ("dtype", "after", "called"),
    [
        (torch.bfloat16, "to", True),
        (torch.float16, "to", False),
        (torch.bfloat16, "data", False),
        (torch.float16, "data", True),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", FILE_CASES, ids=str)
def test_a_cast_model_saves_what_its_own_base_takes(
    case: Case, called: bool, after: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, path = case.patch(case.built()), tmp_path / "adapter.safetensors"
    called = called or case.name == "pruned"  # before a call, its weight is what `prune` left
    if called:
        model(case.data())
    _AFTER[after](model, dtype)
    expected = _computed(model, case.data(), dtype) if called else None
    mapsurgery.save(model, path)
    expected = _computed(model, case.data(), dtype) if expected is None else expected
    for name, base in _BASES.items():
        loaded = mapsurgery.load(base(case, dtype), path)
        found, eps = _computed(loaded, case.data(), dtype), torch.finfo(dtype).eps
        assert (found - expected).norm() <= 2 * eps * expected.norm(), name


@every_half
def test_a_base_that_was_made_in_a_half_type_takes_the_file_of_one_that_was_cast(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = patched(llama()).to(dtype)
    assert trained_alpha(model, lambda: model(text_data(1)[0]["input_ids"][None]).logits) > 0
    mapsurgery.save(model, tmp_path / "adapter.safetensors")
    base = type(model).from_pretrained(tmp_path / "base", dtype=dtype)
    loaded = mapsurgery.load(base, tmp_path / "adapter.safetensors")
    # torch's cast rounds the frequencies of rotary embeddings too, transformers' does not.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.05, atol=0.02)


@every_half
@pytest.mark.parametrize("case", FILE_CASES[-2:], ids=str)
def test_another_base_is_refused_though_it_was_cast(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    mapsurgery.save(case.patch(case.built()).to(dtype), tmp_path / "adapter.safetensors")
    other = case.built()
    with torch.no_grad():
        other.weight.mul_(1.01)
    for base in (other, other.to(dtype)):
        with pytest.raises(ValueError, match="another base"):
            mapsurgery.load(base, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_file_of_a_wide_base_loads_onto_a_half_one_with_outliers(dtype: torch.dtype, tmp_path: Path) -> None:
    case = FILE_CASES[-1]
    mapsurgery.save(case.patch(case.built()), tmp_path / "adapter.safetensors")
    mapsurgery.load(case.built().to(dtype), tmp_path / "adapter.safetensors")


def test_a_parametrised_weight_that_was_cast_is_measured_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mapsurgery.patch(parametrized(), "*", rank=2).bfloat16()
    mapsurgery.save(model, tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    mapsurgery.load(parametrized().bfloat16(), tmp_path / "adapter.safetensors")
