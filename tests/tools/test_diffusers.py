"""Pipelines of diffusers with patched parts: they run and are saved, LoRA files go both ways, PEFT's LoRA on top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mapsurgery
from mapsurgery import Dora, Lora

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
small = pytest.importorskip("small_pipelines")
integration = pytest.importorskip("mapsurgery.integrations.diffusers")
from small_pipelines import image  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 2e-6}
"""Of images in [0, 1] whose sums are taken in another order."""


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Pipelines with the same weights."""
    return lambda seed=0: small.stable_diffusion(tmp_path_factory.getbasetemp() / "tokenizer", seed)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return image(small.stable_diffusion(tmp_path_factory.getbasetemp() / "tokenizer"))


def moved(model: nn.Module) -> nn.Module:
    """Away from the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def patched(pipe: Any, **parts: dict[str, Any]) -> Any:
    for name, options in parts.items():
        moved(mapsurgery.patch(getattr(pipe, name), **options))
    return pipe


def with_map(pipe: Any) -> Any:
    return patched(
        pipe, unet={"targets": ["*attn*", "*conv1"], "rank": 2}, text_encoder={"targets": "*proj", "rank": 2}
    )


def differs(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


def test_a_patched_pipeline_is_the_base_at_the_start_and_then_not(make: Any, base: Tensor) -> None:
    pipe = make()
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        mapsurgery.patch(part, "*att*", rank=2)
    torch.testing.assert_close(image(pipe), base, **TOLERANCE)
    assert differs(image(with_map(make())), base)


def test_a_pipeline_is_cast(make: Any) -> None:
    """pipe.to(dtype): as adapters put into a pipeline that was cast, which stay in float32."""
    dtype = torch.bfloat16
    pipe = with_map(make()).to(dtype)
    other = make().to(dtype)
    for name in ("unet", "text_encoder"):
        adapters = [p for n, p in getattr(pipe, name).named_parameters() if ".adapter." in n]
        assert adapters and all(p.dtype == torch.float32 for p in adapters)
    for name in ("unet", "text_encoder"):
        mine = getattr(pipe, name)
        targets = ["*attn*", "*conv1"] if name == "unet" else "*proj"
        theirs = mapsurgery.patch(getattr(other, name), targets, rank=2)
        mapsurgery.load_adapter_state_dict(theirs, mapsurgery.adapter_state_dict(mine))
    assert torch.equal(image(pipe), image(other))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pipeline_is_offloaded(when: str, make: Any) -> None:
    """The hooks of enable_model_cpu_offload, here from the CPU's memory to itself."""
    offload = "enable_model_cpu_offload"
    expected = image(with_map(make()))
    pipe = make()
    if when == "before":
        getattr(pipe, offload)(device="cpu")
    with_map(pipe)
    if when == "after":
        getattr(pipe, offload)(device="cpu")
    assert torch.equal(image(pipe), expected)
    assert torch.equal(image(pipe), expected)


def test_a_saved_pipeline_is_the_base(make: Any, base: Tensor, tmp_path: Path) -> None:
    """save_pretrained writes the plain model's keys; from_pretrained leaves the adapters aside."""
    with_map(make()).save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(image(again), base, **TOLERANCE)
    plain = make()
    for name in ("unet", "text_encoder", "vae"):
        found, expected = getattr(again, name).state_dict(), getattr(plain, name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_the_unet_trains_as_in_a_script(make: Any) -> None:
    """add_noise, gradient checkpointing, EMAModel of the trained parameters: the loss falls, averages are put in."""
    unet = mapsurgery.patch(make().unet, "*attn*", rank=2).train()
    unet.enable_gradient_checkpointing()
    scheduler, trained = diffusers.DDPMScheduler(), [p for p in unet.parameters() if p.requires_grad]
    average = diffusers.training_utils.EMAModel(trained, decay=0.5)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(unet, lr=1e-2))
    torch.manual_seed(2)
    clean, noise, words = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.randn(2, 8, 16)
    steps = torch.tensor([100, 700])
    losses = []
    for _ in range(5):
        found = unet(scheduler.add_noise(clean, noise, steps), steps, words).sample
        losses.append(nn.functional.mse_loss(found, noise))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(trained)
    assert losses[-1] < losses[0]
    last = trained[0].clone()
    average.store(trained)
    average.copy_to(trained)
    assert torch.equal(trained[0], average.shadow_params[0]) and not torch.equal(trained[0], last)
    average.restore(trained)
    assert torch.equal(trained[0], last)


# LoRA files


LORAS: dict[str, dict[str, Any]] = {
    "lora": {
        "unet": {"targets": "*attn*", "rank": 2, "method": Lora(alpha=8)},
        "text_encoder": {"targets": ["*proj", "*fc1"], "rank": 3, "method": Lora(alpha=5)},
    },
    "ranks": {
        "unet": {
            "targets": ["*attn*", "*conv*", "*time_emb*"],
            "rank": 2,
            "rank_pattern": {"*to_q": 3, "*conv1": 1},
            "method": Lora(alpha=8, rslora=True),
        },
    },
    "dora": {
        "unet": {"targets": ["*attn*", "*conv1"], "rank": 2, "method": Dora(alpha=8)},
        "text_encoder": {"targets": "*proj", "rank": 2, "method": Dora(alpha=2)},
    },
    "pissa_and_embedding": {
        "unet": {"targets": "*attn*", "rank": 2, "method": Lora(alpha=8), "update": "pissa"},
        "text_encoder": {"targets": ["*token_embedding", "*q_proj"], "rank": 2, "method": Lora(alpha=8)},
    },
}
every_lora = pytest.mark.parametrize("options", LORAS.values(), ids=LORAS)


@every_lora
def test_diffusers_loads_what_is_written(options: dict[str, Any], make: Any, base: Tensor, tmp_path: Path) -> None:
    """A plain pipeline's load_lora_weights gives the same images; so does ours, bit for bit; unpatch gives the base."""
    pipe = patched(make(), **options)
    expected = image(pipe)
    assert differs(expected, base)
    integration.save_lora_weights(pipe, tmp_path / "run")
    theirs = make()
    theirs.load_lora_weights(tmp_path / "run")
    torch.testing.assert_close(image(theirs), expected, **TOLERANCE)
    ours = integration.load_lora_weights(make(), tmp_path / "run")
    torch.testing.assert_close(image(ours), expected, **TOLERANCE)
    for name in options:
        mapsurgery.unpatch(getattr(ours, name))
    assert torch.equal(image(ours), base)
    assert all(p.requires_grad for p in ours.unet.parameters())


def by_diffusers(pipe: Any, folder: Path, metadata: bool, **options: Any) -> Tensor:
    """A LoRA as the training scripts of diffusers make and save it. Returns: an image with it."""
    torch.manual_seed(4)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2 if not metadata else 6, target_modules=["to_q", "to_v", "conv1"], **options)
    )
    pipe.text_encoder.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=3 if not metadata else 4, target_modules=["q_proj", "out_proj"], **options)
    )
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    extra = diffusers.training_utils._collate_lora_metadata(parts) if metadata else {}
    layers = {f"{name}_lora_layers": peft.get_peft_model_state_dict(moved(part)) for name, part in parts.items()}
    type(pipe).save_lora_weights(folder, **layers, **extra)
    return image(pipe)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a LoRA, with metadata."""
    folder = tmp_path_factory.mktemp("lora")
    by_diffusers(small.stable_diffusion(tmp_path_factory.getbasetemp() / "tokenizer"), folder, True)
    return folder


@pytest.mark.parametrize(("metadata", "dora"), [(True, False), (False, False), (True, True)])
def test_what_diffusers_wrote_is_loaded(metadata: bool, dora: bool, make: Any, base: Tensor, tmp_path: Path) -> None:
    expected = by_diffusers(make(), tmp_path, metadata, use_dora=dora)
    assert differs(expected, base)
    pipe = integration.load_lora_weights(make(), tmp_path)
    torch.testing.assert_close(image(pipe), expected, **TOLERANCE)


def test_a_file_of_kohya_is_loaded(make: Any, base: Tensor, tmp_path: Path) -> None:
    """With its own names, and an alpha for each layer that is not its rank."""
    pipe, tensors = make(), {}
    torch.manual_seed(4)
    parts = {"lora_unet": (pipe.unet, "to_q"), "lora_te": (pipe.text_encoder, "_proj")}
    alphas = iter([1.0, 3.0, 5.0] * 9)
    for prefix, (part, ending) in parts.items():
        for path, layer in part.named_modules():
            if path.endswith(ending):
                path = f"text_model.{path}" if prefix == "lora_te" else path
                name = f"{prefix}_{path.replace('.', '_')}"
                tensors[f"{name}.lora_down.weight"] = torch.randn(2, layer.in_features)
                tensors[f"{name}.lora_up.weight"] = torch.randn(layer.out_features, 2)
                tensors[f"{name}.alpha"] = torch.tensor(next(alphas))
    save_file(tensors, tmp_path / "kohya.safetensors")
    theirs = make()
    theirs.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    assert differs(image(theirs), base)
    ours = integration.load_lora_weights(make(), tmp_path, weight_name="kohya.safetensors")
    torch.testing.assert_close(image(ours), image(theirs), **TOLERANCE)


def _head(pipe: Any) -> Any:
    return patched(pipe, unet={"targets": "*attn*", "rank": 2, "method": "lora", "train": ["conv_out*"]})


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "map": (with_map, "method 'map' has no counterpart.*merge.*save_adapters"),
    "plain": (lambda pipe: pipe, "no part of the StableDiffusionPipeline is patched"),
    "vae": (
        lambda pipe: patched(pipe, vae={"targets": "*att*", "method": "lora"}),
        "vae is patched.*unet, text_encod",
    ),
    "trained": (_head, "unet has trained conv_out beside its adapters"),
    "mlp_of_text": (
        lambda pipe: patched(pipe, text_encoder={"targets": "*fc1", "method": "lora"}),
        "no LoRA of text_en",
    ),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_lora_of_diffusers_is_refused(change: Any, said: str, make: Any, tmp_path: Path) -> None:
    pipe = change(make())
    with pytest.raises(ValueError, match=said):
        integration.save_lora_weights(pipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lora_is_not_loaded_over_another(make: Any, written: Path) -> None:
    pipe = with_map(make())
    before = image(pipe)
    with pytest.raises(ValueError, match="of the pipeline is patched already"):
        integration.load_lora_weights(pipe, written)
    assert torch.equal(image(pipe), before)
    pipe = make()
    pipe.load_lora_weights(written)
    with pytest.raises(ValueError, match="of the pipeline is adapted by PEFT"):
        integration.load_lora_weights(pipe, written)


def test_a_lora_that_does_not_fit_leaves_the_pipeline_as_it_was(make: Any, written: Path) -> None:
    """PEFT takes it, and we refuse it in the UNet, which comes after the text encoder."""
    pipe = make()
    pipe.unet.mid_block.resnets[0].conv1.padding_mode = "circular"
    flags = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    with pytest.raises(ValueError, match="mid_block.resnets.0.conv1.*padding mode"):
        integration.load_lora_weights(pipe, written)
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == flags
    for part in (pipe.unet, pipe.text_encoder):
        assert not any("adapter" in name or "lora" in name for name in part.state_dict())


def test_names_that_would_say_something_else_are_refused(make: Any, tmp_path: Path) -> None:
    """A file that is no pickle under a pickle's name; the name of an adapter, of which there is one."""
    pipe = patched(make(), unet={"targets": "*attn*", "rank": 2, "method": "lora"})
    with pytest.raises(ValueError, match=r"end in \.safetensors.*'x\.bin'"):
        integration.save_lora_weights(pipe, tmp_path / "run", weight_name="x.bin")
    assert not (tmp_path / "run").exists()
    plain = make()
    with pytest.raises(TypeError, match="adapter_name='foo'.*have no names"):
        integration.load_lora_weights(plain, tmp_path, adapter_name="foo")
    assert not hasattr(plain.unet, "peft_config")


# Adapters of the library itself


def test_adapters_of_all_parts_are_in_one_folder(make: Any, base: Tensor, tmp_path: Path) -> None:
    pipe = with_map(make())
    integration.save_adapters(pipe, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["text_encoder.safetensors", "unet.safetensors"]
    again = integration.load_adapters(make(), tmp_path / "run")
    assert torch.equal(image(again), image(pipe))
    other = make(seed=9)
    other.unet.load_state_dict(make().unet.state_dict())
    before = image(other)
    with pytest.raises(ValueError, match="trained on another base"):
        integration.load_adapters(other, tmp_path / "run")
    assert torch.equal(image(other), before)
    with pytest.raises(FileNotFoundError, match="unet"):
        integration.load_adapters(make(), tmp_path)
    only = patched(make(), unet={"targets": "*attn*", "rank": 2})
    with pytest.raises(ValueError, match="text_encoder is not patched"):
        integration.save_adapters(only, tmp_path / "run")


def test_adapters_beside_a_lora_of_pefts_are_not_written(make: Any, written: Path, tmp_path: Path) -> None:
    """A plain pipeline could not load them: PEFT's layers have other names, and its parameters are trained, too."""
    pipe = with_map(make())
    before = image(pipe)
    pipe.load_lora_weights(written)
    with pytest.raises(ValueError, match=r"holds a LoRA of PEFT's.*unload_lora_weights.*frozen='keep'"):
        integration.save_adapters(pipe, tmp_path / "run")
    pipe.unload_lora_weights()
    integration.save_adapters(pipe, tmp_path / "run", frozen="keep")
    assert torch.equal(image(integration.load_adapters(make(), tmp_path / "run")), before)
    over = make()
    over.load_lora_weights(written)
    mapsurgery.patch(over.unet, "*attn*", rank=2)
    over.unload_lora_weights()
    with pytest.raises(ValueError, match=r"unet was patched while it held.*to_q\.base_layer.*patch first"):
        integration.save_adapters(over, tmp_path / "over")
    assert not (tmp_path / "over").exists()


# PEFT's LoRA over adapted layers


@pytest.fixture
def stacked(make: Any, written: Path) -> Any:
    """A pipeline with MAP and a LoRA of PEFT's on it, and images with both, and with MAP alone."""
    pipe = with_map(make())
    alone = image(pipe)
    pipe.load_lora_weights(written)
    both = image(pipe)
    assert differs(both, alone)
    return pipe, both, alone


def test_a_lora_of_pefts_acts_on_adapted_layers(stacked: Any, make: Any) -> None:
    """Base, MAP and LoRA: as the LoRA on the merged pipeline. It is weighted, and unloaded without a trace."""
    pipe, both, alone = stacked
    pipe.set_adapters(["default_0"], [0.0])
    assert torch.equal(image(pipe), alone)
    pipe.set_adapters(["default_0"], [1.0])
    torch.testing.assert_close(image(pipe), both, rtol=0, atol=0)
    pipe.disable_lora()
    assert torch.equal(image(pipe), alone)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), alone)
    assert {*pipe.unet.state_dict()} == {*with_map(make()).unet.state_dict()}


def test_fusing_into_adapted_layers_is_refused_and_changes_no_image(stacked: Any) -> None:
    pipe, both, alone = stacked
    for safe in (False, True):
        with pytest.raises((RuntimeError, AttributeError), match="mapsurgery.merge"):
            pipe.fuse_lora(safe_fusing=safe)
    torch.testing.assert_close(image(pipe), both, **TOLERANCE)
    pipe.unfuse_lora()
    torch.testing.assert_close(image(pipe), both, **TOLERANCE)
    pipe.unload_lora_weights()
    torch.testing.assert_close(image(pipe), alone, **TOLERANCE)


def test_what_a_refused_fusing_with_a_scale_has_scaled_is_brought_back(stacked: Any) -> None:
    """diffusers scales PEFT's LoRA in a layer before PEFT merges it."""
    pipe, both, alone = stacked
    for _ in range(2):
        with pytest.raises((RuntimeError, AttributeError), match="mapsurgery.merge"):
            pipe.fuse_lora(lora_scale=0.5)
    pipe.unfuse_lora()
    assert differs(image(pipe), both)
    pipe.set_adapters(["default_0"], [1.0])
    torch.testing.assert_close(image(pipe), both, **TOLERANCE)
    pipe.unload_lora_weights()
    torch.testing.assert_close(image(pipe), alone, **TOLERANCE)


def test_merged_first_a_lora_is_fused(stacked: Any) -> None:
    """mapsurgery.merge, then fuse_lora and unfuse_lora as ever."""
    pipe, both, alone = stacked
    for part in (pipe.unet, pipe.text_encoder):
        mapsurgery.merge(part)
    torch.testing.assert_close(image(pipe), both, **TOLERANCE)
    pipe.fuse_lora()
    torch.testing.assert_close(image(pipe), both, **TOLERANCE)
    pipe.unfuse_lora()
    torch.testing.assert_close(image(pipe), both, **TOLERANCE)
    pipe.unload_lora_weights()
    torch.testing.assert_close(image(pipe), alone, **TOLERANCE)


def test_fused_first_the_lora_is_a_part_of_the_base(make: Any, written: Path) -> None:
    """fuse_lora and unload_lora_weights, then patch: W and its norm are the fused ones."""
    pipe, plain = make(), make()
    pipe.load_lora_weights(written)
    expected = image(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    mapsurgery.patch(pipe.unet, "*to_q", rank=2)
    torch.testing.assert_close(image(pipe), expected, **TOLERANCE)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    fused, before = pipe.unet.get_submodule(layer), plain.unet.get_submodule(layer).weight
    assert not torch.equal(fused.get_parameter("weight"), before)
    torch.testing.assert_close(fused.adapter.weight_norm.float(), fused.get_parameter("weight").norm()[None])


def test_adapters_of_method_lora_and_of_pefts_add_up(make: Any, written: Path) -> None:
    pipe = integration.load_lora_weights(make(), written)
    once = image(pipe)
    pipe.load_lora_weights(written)
    twice = make()
    twice.load_lora_weights(written, adapter_name="a")
    twice.load_lora_weights(written, adapter_name="b")
    twice.set_adapters(["a", "b"], [1.0, 1.0])
    torch.testing.assert_close(image(pipe), image(twice), **TOLERANCE)
    assert differs(once, image(pipe))
