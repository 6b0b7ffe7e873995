"""timm's training script, by its parts, over patched models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import assert_same_state
from torch import Tensor, nn

import mapsurgery

timm = pytest.importorskip("timm")
from timm.models import load_checkpoint, resume_checkpoint  # noqa: E402
from timm.optim import create_optimizer_v2, param_groups_layer_decay  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, freeze, reparameterize_model, unfreeze  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MODELS = {"test_vit": "*attn*", "test_convnext": "*mlp*", "test_efficientnet": "*conv*"}
every_model = pytest.mark.parametrize("name", MODELS)
every_kind_of_state = pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])  # with statistics and without


def base(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 48} if name == "test_vit" else {}
    return timm.create_model(name, num_classes=3, **size, **options)


def make(name: str, **options: Any) -> nn.Module:
    head = base(name).pretrained_cfg["classifier"]
    model = base(name, **options)
    torch.manual_seed(1)
    return mapsurgery.patch(model, MODELS[name], rank=2, train=[f"{head}*"])


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(2, 3, 48, 48), torch.tensor([0, 2])


class Run:
    """What train.py holds."""

    def __init__(self, model: nn.Module, **groups: Any) -> None:
        self.model = model
        self.optimizer = create_optimizer_v2(
            model, "adamw", param_group_fn=lambda m: mapsurgery.param_groups(m, lr=1e-2, weight_decay=0.05, **groups)
        )
        self.ema = ModelEmaV3(model, decay=0.5)
        self.scaler = NativeScaler(device="cpu")

    def epochs(self, start: int, stop: int) -> Run:
        x, y = data()
        for step in range(start, stop):
            self.model.train()
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            trained = timm.models.model_parameters(self.model)
            self.scaler(loss, self.optimizer, clip_grad=1.0, clip_mode="norm", parameters=trained)
            self.ema.update(self.model, step=step)
        return self


@every_kind_of_state
def test_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """CheckpointSaver, resume_checkpoint and the EMA's state; load_checkpoint gives the best model, or its averages."""
    run = Run(make(name)).epochs(0, 2)
    saver = CheckpointSaver(
        run.model, run.optimizer, None, run.ema, run.scaler, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(1, metric=0.5)
    again = Run(make(name))
    epoch = resume_checkpoint(
        again.model, str(tmp_path / "last.pth.tar"), optimizer=again.optimizer, loss_scaler=again.scaler
    )
    assert epoch == 2
    load_checkpoint(again.ema.module, str(tmp_path / "last.pth.tar"), use_ema=True)
    averaged, best = make(name), make(name)
    load_checkpoint(averaged, str(tmp_path / "model_best.pth.tar"), use_ema=True)
    load_checkpoint(best, str(tmp_path / "model_best.pth.tar"), use_ema=False)
    assert_same_state(averaged, run.ema.module)
    assert_same_state(best, run.model)
    run.epochs(2, 3)
    again.epochs(2, 3)
    assert_same_state(run.model, again.model)
    assert_same_state(run.ema.module, again.ema.module)
    mapsurgery.save(run.ema.module, tmp_path / "ema.safetensors")
    x, _ = data()
    loaded = mapsurgery.load(base(name), tmp_path / "ema.safetensors").eval()
    assert torch.equal(loaded(x), run.ema.module.eval()(x))


@every_model
def test_the_optimizer_of_the_model_leaves_the_base_out_and_decays_no_number(name: str) -> None:
    """create_optimizer_v2(model): frozen weights are in no group; alpha and beta have one dimension, and no decay."""
    model = make(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert decays.keys() == {id(p) for p in trained.values()}
    for key, p in trained.items():
        assert (decays[id(p)] > 0) == (p.dim() > 1), key
    ours = {id(p): g["weight_decay"] for g in mapsurgery.param_groups(model, 1e-2, 0.1) for p in g["params"]}
    assert ours == decays


def test_layers_deeper_in_the_model_have_lower_rates() -> None:
    """param_groups_layer_decay reads the names: an adapter has its layer's rate."""
    model = make("test_vit")
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    base_of = base("test_vit")
    plain = {id(p): g["lr_scale"] for g in param_groups_layer_decay(base_of, layer_decay=0.5) for p in g["params"]}
    for path, layer in model.named_modules():
        if isinstance(layer, mapsurgery.AdaptedLayer):
            expected = plain[id(base_of.get_submodule(path).weight)]
            assert {scales[id(p)] for p in layer.adapter.parameters()} == {expected}, path


@every_kind_of_state
def test_gradients_with_checkpointing_are_the_same(name: str) -> None:
    plain, model = make(name), make(name)
    model.set_grad_checkpointing()
    x, y = data()
    for each in (plain, model):
        nn.functional.cross_entropy(each.train()(x), y).backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, plain.get_parameter(key).grad, msg=key)


def test_a_new_classifier_trains_and_is_saved(tmp_path: Path) -> None:
    """reset_classifier after patch makes a head that requires a gradient: it is in the groups and in the file."""
    model = make("test_vit")
    model.reset_classifier(5)
    run = Run(model)
    head = model.get_classifier()
    assert any(p is head.weight for group in run.optimizer.param_groups for p in group["params"])
    x, y = data()
    before = head.weight.clone()
    run.epochs(0, 1)
    assert not torch.equal(head.weight, before)
    mapsurgery.save(model, tmp_path / "a.safetensors")
    fresh = base("test_vit")
    fresh.reset_classifier(5)
    assert torch.equal(mapsurgery.load(fresh, tmp_path / "a.safetensors").eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="head.weight"):
        mapsurgery.load(base("test_vit"), tmp_path / "a.safetensors")


def test_a_new_classifier_in_place_of_an_adapted_one_is_refused(tmp_path: Path) -> None:
    model = mapsurgery.patch(base("test_vit"), ["*attn*", "head"], rank=2)
    model.reset_classifier(5)
    with pytest.raises(ValueError, match="adapted layers were replaced after patch.*head"):
        mapsurgery.save(model, tmp_path / "a.safetensors")


def test_freeze_and_unfreeze_of_parts() -> None:
    """timm.utils.freeze turns a block's BatchNorm into a frozen one, adapters too: no rate is made for them unsaid."""
    model = make("test_efficientnet")
    freeze(model, ["conv_stem", "bn1", "blocks.0"])
    assert type(model.bn1).__name__.startswith("FrozenBatchNorm")
    with pytest.raises(ValueError, match="frozen after patch: conv_stem"):
        mapsurgery.param_groups(model, 1e-2)
    kept = mapsurgery.param_groups(model, 1e-2, frozen="keep")
    held = {id(p) for group in kept for p in group["params"]}
    assert not any(id(p) in held for p in model.blocks[0].parameters())
    unfreeze(model, ["blocks.0"])
    with pytest.raises(ValueError, match="base weight of an adapted layer requires a gradient: blocks.0"):
        mapsurgery.param_groups(model, 1e-2)


def test_synchronised_norms_are_converted_after_patch(tmp_path: Path) -> None:
    """convert_sync_batchnorm makes new modules: their statistics still are in the file."""
    model = make("test_efficientnet")
    Run(model).epochs(0, 1)
    x, _ = data()
    expected = model.eval()(x)
    converted = timm.layers.convert_sync_batchnorm(model)
    torch.testing.assert_close(converted.eval()(x), expected)
    mapsurgery.save(converted, tmp_path / "a.safetensors")
    loaded = mapsurgery.load(base("test_efficientnet"), tmp_path / "a.safetensors").eval()
    assert torch.equal(loaded(x), expected)


def test_a_saved_model_is_the_base_to_timm(tmp_path: Path) -> None:
    """save_for_hf writes the plain keys; create_model takes them once it is told to leave the adapters aside."""
    model = make("test_vit")
    Run(model).epochs(0, 1)
    timm.models.save_for_hf(model, str(tmp_path), model_config={"num_classes": 3}, safe_serialization=True)
    x, _ = data()
    tensors = load_file(tmp_path / "model.safetensors")
    fresh = base("test_vit")
    missing, unexpected = fresh.load_state_dict(tensors, strict=False)
    assert not missing and all(".adapter." in key for key in unexpected)
    with mapsurgery.disabled(model):
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    merged = mapsurgery.merge(model)
    timm.models.save_for_hf(merged, str(tmp_path / "merged"), model_config={"num_classes": 3}, safe_serialization=True)
    plain = base("test_vit")
    load_checkpoint(plain, str(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


def test_a_reparameterised_model_computes_the_same_or_is_refused() -> None:
    """reparameterize_model folds branches and norms into one convolution: of weights as they are read."""
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0", num_classes=3).eval()
    mapsurgery.patch(model, "stages.0.0.conv_kxk*", rank=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    folded = reparameterize_model(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="not patched|adapted layers|replaced"):
        mapsurgery.param_groups(folded, 1e-2)
