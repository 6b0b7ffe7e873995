"""What other libraries save of a patched model is the base, exactly, with the adapters beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from homes import ADAPTER_KEY, adapter_tensors, registered, trained
from small_models import gpt2, llama, logits, t5, tokens, unet
from torch import Tensor, nn

import mapsurgery

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "t5": t5,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
every_target = pytest.mark.parametrize("targets", ["*", ["*attn*", "*Attention*"]], ids=["all", "attention"])


def patched(make: Callable[[], nn.Module], targets: str | list[str] = "*") -> nn.Module:
    torch.manual_seed(1)
    found = [t for t in ([targets] if isinstance(targets, str) else targets) if _matches(make(), t)]
    return trained(mapsurgery.patch(make(), found, rank=2)).eval()


def _matches(model: nn.Module, glob: str) -> bool:
    return any(glob == "*" or glob.strip("*") in name for name, _ in model.named_modules())


@every_model
@every_target
def test_save_pretrained_and_from_pretrained_give_the_base(
    make: Callable[[], nn.Module], targets: str | list[str], tmp_path: Path
) -> None:
    """Bitwise, nothing missing; the adapters are reported as unexpected and as nothing else."""
    model = patched(make, targets)
    output = logits(model)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(loaded.eval()), logits(make()))
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == set(adapter_tensors(model))
    base, found = make().state_dict(), loaded.state_dict()
    assert set(found) == set(base) and all(torch.equal(found[key], value) for key, value in base.items())
    assert torch.equal(logits(model), output)  # saving changes nothing


def test_save_pretrained_in_shards_gives_the_base(tmp_path: Path) -> None:
    """An index over several files."""
    model = patched(llama)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(llama()))


def test_the_adapter_loads_onto_what_was_saved(tmp_path: Path) -> None:
    """The base from save_pretrained and the adapter from mapsurgery.save make the adapted model again."""
    model = patched(llama)
    model.save_pretrained(tmp_path / "base")
    mapsurgery.save(model, tmp_path / "adapter.safetensors")
    loaded = type(model).from_pretrained(tmp_path / "base").eval()
    mapsurgery.load(loaded, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(loaded), logits(model))


def test_a_merged_model_is_saved_as_it_computes(tmp_path: Path) -> None:
    """merge, save_pretrained, from_pretrained: W' and no adapter."""
    model = patched(llama)
    mapsurgery.merge(model)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(loaded.eval()), logits(model)) and not info["unexpected_keys"]


@pytest.mark.parametrize("make", [MODELS["llama_tied"], gpt2, t5], ids=["llama_tied", "gpt2", "t5"])
def test_tie_weights_keeps_the_tie(make: Callable[[], nn.Module]) -> None:
    """transformers ties again whenever it loads or resizes: one Parameter for both, and the output of before."""
    model = patched(make)
    output = logits(model)
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    assert registered(inside) is registered(outside)
    weight = registered(inside)
    model.tie_weights()
    assert registered(inside) is registered(outside) is weight
    assert torch.equal(logits(model), output)
    assert set(make().state_dict()) <= set(model.state_dict())


def test_weights_are_tied_that_were_apart() -> None:
    """An embedding's weight is put into a head by tie_weights: the head then computes with it, or the call raises."""
    model = mapsurgery.patch(llama(tied=False), "*lm_head", rank=2)
    model.config.tie_word_embeddings = True
    trained(model)
    before = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    output = logits(model)
    try:
        model.tie_weights()
    except (RuntimeError, ValueError, AttributeError):
        assert all(p is before[name] for name, p in model.named_parameters(remove_duplicate=False))
        assert torch.equal(logits(model), output)
        return
    if registered(model.lm_head) is before["lm_head.weight"]:  # tie_weights knows that this model is untied
        assert torch.equal(logits(model), output)
        return
    assert registered(model.lm_head) is registered(model.model.embed_tokens)
    with mapsurgery.disabled(model):
        hidden = model.model(tokens()).last_hidden_state
        expected = hidden @ registered(model.model.embed_tokens).T
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def image_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([3]), text).sample


@pytest.mark.parametrize("targets", ["*", "*attn*"], ids=["all", "attention"])
def test_diffusers_save_pretrained_gives_the_base(targets: str, tmp_path: Path) -> None:
    """A UNet with every convolution and projection adapted."""
    model = trained(mapsurgery.patch(unet(), targets, rank=2))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    base, found = unet().state_dict(), loaded.state_dict()
    assert set(found) == set(base) and all(torch.equal(found[key], value) for key, value in base.items())
    # convolutions may differ in the last bit where a file's tensors lie otherwise in memory
    torch.testing.assert_close(image_of(loaded), image_of(unet()), rtol=1e-5, atol=1e-6)


def test_a_diffusers_pipeline_saves_the_base(tmp_path: Path) -> None:
    """pipe.save_pretrained of a pipeline whose UNet is patched."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    expected = model(x, 3).sample
    pipe = diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler())
    trained(mapsurgery.patch(model, "*", rank=2))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.unet.eval()(x, 3).sample, expected, rtol=1e-5, atol=1e-6)


def test_pytorch_model_hub_mixin_gives_the_base(tmp_path: Path) -> None:
    """Its from_pretrained is strict unless told not to be, and reports the adapters then."""
    hub = pytest.importorskip("huggingface_hub")

    class Small(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, width), nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    torch.manual_seed(0)
    model, x = Small(width=7).eval(), torch.randn(3, 4)
    expected = model(x)
    trained(mapsurgery.patch(model, "*", rank=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?i)unexpected.*adapter"):
        Small.from_pretrained(str(tmp_path), strict=True)
    loaded = Small.from_pretrained(str(tmp_path), strict=False).eval()
    assert torch.equal(loaded(x), expected)


def test_loading_a_checkpoint_with_adapters_is_no_silent_mixture(tmp_path: Path) -> None:
    """The keys beside the base are an adapter's by their names: nothing else of the checkpoint is unexpected."""
    model = patched(gpt2)
    model.save_pretrained(tmp_path)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] and all(ADAPTER_KEY.fullmatch(key) for key in info["unexpected_keys"])
