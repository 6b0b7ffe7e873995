"""Weights that accelerate keeps in the CPU's memory or on disk: adapted before or after, outputs are the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from homes import OwnForward, adapter_tensors, trained, with_adapters_of
from small_models import gpt2, llama, logits
from torch import Tensor, nn

import mapsurgery

accelerate = pytest.importorskip("accelerate")


class Mixed(nn.Module):
    """One layer of each way of running: fused, on W', several weights, rows, and one that is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fused = nn.Linear(8, 8)
        self.own = OwnForward(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.own(self.fused(x))
        x = self.norm(self.conv(x.mT).mT)
        return self.head(self.rnn(x)[0])


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def mixed_run(model: nn.Module) -> Tensor:
    return model(torch.tensor([[1, 2, 5, 7], [2, 8, 0, 3]]))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], tuple[str, ...]]] = {
    "mixed": (mixed, mixed_run, ("head*",)),
    "llama": (llama, logits, ()),
    "gpt2_tied": (gpt2, logits, ()),
}


def _two_places(model: nn.Module) -> dict[str, str]:
    names = [name for name, _ in model.named_children()]
    if len(names) < 4:  # a transformer: nothing is tied across its blocks
        blocks = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
        return {"": "cpu", f"{blocks}.0": "disk"}
    return {name: ("disk" if i % 2 else "cpu") for i, name in enumerate(names)}


WHOLE = ["MultiheadAttention", "MapMultiheadAttention"]
"""Classes, by their names, that accelerate brings in whole: attention reads a child that it does not call."""


def _cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=WHOLE)


def _cpu_with_buffers(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True, preload_module_classes=WHOLE)


def _disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device="cpu", preload_module_classes=WHOLE)


def _one_place(model: nn.Module, folder: Path) -> None:
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def _cpu_and_disk(model: nn.Module, folder: Path) -> None:
    places = _two_places(model)
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), preload_module_classes=WHOLE)


OFFLOADS: dict[str, Callable[[nn.Module, Path], None]] = {
    "cpu_offload": _cpu,
    "cpu_offload_buffers": _cpu_with_buffers,
    "disk_offload": _disk,
    "dispatch_one": _one_place,
    "dispatch_two": _cpu_and_disk,
}
every_offload = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
every_offload_of_every_model = pytest.mark.parametrize(
    ("make", "run", "exclude", "offload"),
    [
        pytest.param(*model, offload, id=f"{how}-{name}")
        for how, offload in OFFLOADS.items()
        for name, model in MODELS.items()
        if name == "mixed" or how in ("cpu_offload", "dispatch_two")
    ],
)


def patched(model: nn.Module, exclude: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(1)
    return mapsurgery.patch(model, "*", rank=2, exclude=exclude)


def run_twice(run: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
    """The second forward finds what the first left."""
    first = run(model)
    assert torch.equal(run(model), first)
    return first


@every_offload_of_every_model
def test_offloaded_after_patch(make, run, exclude, offload, tmp_path: Path) -> None:
    """The adapter's own tensors go along, and outputs are those of the model in memory."""
    model = trained(patched(make(), exclude))
    expected = run(model)
    offload(model, tmp_path)
    assert torch.equal(run_twice(run, model), expected)


@every_offload_of_every_model
def test_patched_after_offload(make, run, exclude, offload, tmp_path: Path) -> None:
    """W is read where it lies; adapters are in memory from the start, and learn what they would have learned."""
    exclude = (*exclude, "attention*") if make is mixed else exclude  # which accelerate brings in whole
    reference = trained(patched(make(), exclude))
    model = make()
    offload(model, tmp_path)
    before = run(model).detach().clone()
    patched(model, exclude)
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)
    assert not any(p.is_meta for p in adapter_tensors(model).values())
    mapsurgery.load_adapter_state_dict(model, mapsurgery.adapter_state_dict(reference))
    assert torch.equal(run_twice(run, model), run(reference))
    with mapsurgery.disabled(model):
        torch.testing.assert_close(run(model), before)  # attention takes another kernel where nothing requires grad


@every_offload
def test_attention_that_is_brought_in_whole_is_patched_before_it_is_offloaded(offload, tmp_path: Path) -> None:
    """Its hook would look for the adapters among what it put away: the plan says so, and patch refuses."""
    model = mixed()
    offload(model, tmp_path)
    if "attention" in {
        name
        for name, m in model.named_modules()
        if getattr(m, "_hf_hook", None) is not None and m._hf_hook.place_submodules
    }:
        with pytest.raises(ValueError, match="patch before offloading"):
            mapsurgery.patch(model, "attention*")
        assert any("patch before offloading" in skip.reason for skip in mapsurgery.plan(model, "*").skipped)


@every_offload
def test_adapters_of_an_offloaded_model_learn(offload, tmp_path: Path) -> None:
    """Gradients of adapters over offloaded weights are those over weights in memory."""
    reference, model = trained(patched(mixed(), ("head*", "attention*"))), mixed()
    offload(model, tmp_path)
    patched(model, ("head*", "attention*"))
    mapsurgery.load_adapter_state_dict(model, mapsurgery.adapter_state_dict(reference))
    for each in (reference, model):
        mixed_run(each).square().sum().backward()
    found = adapter_tensors(model)
    for name, parameter in adapter_tensors(reference).items():
        assert parameter.grad is not None and torch.equal(found[name].grad, parameter.grad), name


@every_offload
def test_hooks_removed_leave_the_adapted_model(offload, tmp_path: Path) -> None:
    """remove_hook_from_submodules brings everything back into memory."""
    model = trained(patched(mixed(), ("head*",)))
    expected = mixed_run(model)
    offload(model, tmp_path)
    mixed_run(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(mixed_run(model), expected)


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch_first", "offload_first"])
def test_an_offloaded_model_is_saved(patch_first: bool, tmp_path: Path) -> None:
    """mapsurgery.save of an offloaded model loads into one in memory, or says what to do."""
    model = mixed()
    if patch_first:
        trained(patched(model, ("head*",)))
        expected = mixed_run(model)
        _cpu(model, tmp_path)
    else:
        _cpu(model, tmp_path)
        trained(patched(model, ("head*", "attention*")))
        expected = mixed_run(model)
    try:
        mapsurgery.save(model, tmp_path / "a.safetensors")
    except (ValueError, RuntimeError) as refusal:
        assert len(str(refusal)) > 20 and not (tmp_path / "a.safetensors").exists()
        return
    assert torch.equal(mixed_run(mapsurgery.load(mixed(), tmp_path / "a.safetensors")), expected)


def test_a_model_loaded_with_a_device_map_is_patched(tmp_path: Path) -> None:
    """from_pretrained with a device_map that puts a block on disk."""
    llama().save_pretrained(tmp_path / "m")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    folder = str(tmp_path / "offload")
    model = type(llama()).from_pretrained(tmp_path / "m", device_map=places, offload_folder=folder).eval()
    reference = trained(patched(llama(), ()))
    patched(model, ())
    mapsurgery.load_adapter_state_dict(model, mapsurgery.adapter_state_dict(reference))
    assert torch.equal(run_twice(logits, model), logits(reference))


def test_a_value_set_by_accelerate_is_the_new_base() -> None:
    """set_module_tensor_to_device with a value: the registered weight, and the norm of it."""
    model, other = trained(patched(mixed(), ())), mixed()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    for name, value in other.state_dict().items():
        accelerate.utils.set_module_tensor_to_device(model, name, "cpu", value=value)
    with mapsurgery.disabled(model):
        torch.testing.assert_close(mixed_run(model), mixed_run(other))
    assert torch.equal(mixed_run(model), mixed_run(with_adapters_of(model, patched(other, ()))))
