"""Lightning's Trainer with AdapterCheckpoint: checkpoints hold what was trained, and everything goes on from them."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import llama, tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mapsurgery

pl = pytest.importorskip("pytorch_lightning")
lightning = pytest.importorskip("mapsurgery.integrations.lightning")


def backbone(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 8), nn.LayerNorm(8))


class Classifier(pl.LightningModule):
    """A patched backbone, which trains a norm and moves statistics beside the adapters, and a head outside of it."""

    def __init__(self, seed: int = 0, rank: int = 2, only: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = mapsurgery.patch(backbone(seed), "*", rank=rank, train=["4"])
        torch.manual_seed(1)
        self.head = nn.Linear(8, 3)
        if only:
            lightning.adapters_only(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="only a part of the model")
            optimizer = torch.optim.AdamW(mapsurgery.param_groups(self, lr=1e-2, weight_decay=0.1))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Two(Classifier):
    """Two parts that are patched in different ways, one of them compiled."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        first, second = backbone(0), backbone(3)
        self.first = torch.compile(mapsurgery.patch(first, "*", rank=2), backend="eager")
        self.second = mapsurgery.patch(second, "*", rank=3, method="dora")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def configure_optimizers(self) -> Any:
        parts = (self.first, self.second)
        return torch.optim.AdamW([group for part in parts for group in mapsurgery.param_groups(part, lr=1e-2)])


class Whole(Classifier):
    """Patched as a whole, by itself, so that a frozen module beside the backbone is not written either."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        torch.manual_seed(0)
        self.backbone, self.head, self.teacher = backbone(), nn.Linear(8, 3), nn.Linear(256, 256)
        mapsurgery.patch(self, "backbone*", rank=2, train=["head*"])


def data() -> DataLoader[Any]:
    torch.manual_seed(2)
    return DataLoader(TensorDataset(torch.randn(12, 8), torch.arange(12) % 3), batch_size=4)


def trainer(folder: Path, epochs: int, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    found = [lightning.AdapterCheckpoint(), *callbacks]
    return pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=folder, callbacks=found, **quiet, **options
    )


def every_epoch(folder: Path, **options: Any) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, "{epoch}", monitor="loss", save_top_k=-1, **options)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    found = tensors(b)
    assert found.keys() == tensors(a).keys()
    for name, tensor in tensors(a).items():
        assert torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Any, Path]:
    """A model after three epochs, and the checkpoints of each."""
    folder, model = tmp_path_factory.mktemp("fitted"), Classifier()
    checkpoints = every_epoch(folder)
    trainer(folder, 3, checkpoints).fit(model, data())
    return model, checkpoints, folder


def state_of(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def test_a_checkpoint_holds_what_was_trained_and_nothing_else(fitted: Any) -> None:
    model, _, folder = fitted
    state = state_of(folder / "epoch=2.ckpt")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"backbone.4.weight", "backbone.0.adapter.A", "head.weight"} <= trained
    statistics = {f"backbone.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(state) == trained | statistics
    assert all(torch.equal(tensor, tensors(model)[name]) for name, tensor in state.items())
    saved = torch.load(folder / "epoch=2.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["state"] and saved["lr_schedulers"]


@pytest.mark.parametrize("module", [Classifier, Two, Whole])
def test_training_goes_on_bit_for_bit(module: type[Classifier], tmp_path: Path) -> None:
    """A new process's module, from the checkpoint of the middle, with optimiser and schedule."""
    whole = module()
    trainer(tmp_path, 3, every_epoch(tmp_path)).fit(whole, data())
    resumed = module()
    trainer(tmp_path, 3, enable_checkpointing=False).fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_equal(whole, resumed)
    state = state_of(tmp_path / "epoch=1.ckpt")
    assert not any("_orig_mod" in name or "teacher" in name for name in state)
    start = module()
    assert not torch.equal(tensors(start)[next(iter(state))], tensors(whole)[next(iter(state))])


def test_the_best_checkpoint_is_loaded_into_a_fresh_module(fitted: Any, tmp_path: Path) -> None:
    """By load_from_checkpoint, which knows no callback, and from there as a file of mapsurgery."""
    model, checkpoints, folder = fitted
    best = Classifier.load_from_checkpoint(checkpoints.best_model_path, only=True)
    expected = state_of(Path(checkpoints.best_model_path))
    assert all(torch.equal(tensors(best)[name], tensor) for name, tensor in expected.items())
    last = Classifier.load_from_checkpoint(folder / "epoch=2.ckpt", only=True)
    assert_equal(last, model)
    mapsurgery.save(last, tmp_path / "a.safetensors")
    plain = nn.ModuleDict({"backbone": backbone(), "head": nn.Linear(8, 3)}).eval()
    mapsurgery.load(plain, tmp_path / "a.safetensors")
    x = torch.randn(5, 8)
    assert torch.equal(plain["head"](plain["backbone"](x)), model.eval()(x))


def test_validate_takes_the_best_and_leaves_nothing_of_the_last(tmp_path: Path) -> None:
    """Statistics that had not moved when a checkpoint was written go back to what they were at patch."""

    class Frozen(Classifier):
        def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return self(batch[0])

        def on_train_start(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "start.ckpt")

    model, start = Frozen(), Frozen()
    fit = trainer(tmp_path, 2)
    fit.fit(model, data())
    assert not any("running" in name for name in state_of(tmp_path / "start.ckpt"))
    fit.validate(model, data(), ckpt_path=tmp_path / "start.ckpt", verbose=False)
    assert_equal(model, start)


def test_weights_only_checkpoints_hold_the_same(tmp_path: Path) -> None:
    """save_weights_only, of which callbacks hear nothing."""
    model = Classifier()
    trainer(tmp_path, 1, every_epoch(tmp_path, save_weights_only=True)).fit(model, data())
    assert "backbone.0.weight" not in state_of(tmp_path / "epoch=0.ckpt")
    assert_equal(Classifier.load_from_checkpoint(tmp_path / "epoch=0.ckpt", only=True), model)


REFUSED = {
    "base": (lambda: Classifier(seed=7), "another base: 0"),
    "rank": (lambda: Classifier(rank=3), "shape"),
    "fewer": (lambda: fewer(), "unknown: 3.adapter.A"),
    "more": (lambda: more(), "missing: 1.bias"),
}


def fewer() -> Classifier:
    model = Classifier()
    model.backbone = mapsurgery.patch(backbone(), "0", rank=2, train=["4"])
    return model


def more() -> Classifier:
    model = Classifier()
    model.backbone = mapsurgery.patch(backbone(), "*", rank=2, train=["4", "1"])
    return model


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(make: Any, said: str, fitted: Any) -> None:
    model, before = make(), make()
    with pytest.raises(ValueError, match=said):
        trainer(fitted[2], 3).fit(model, data(), ckpt_path=fitted[2] / "epoch=1.ckpt")
    assert_equal(model, before)


def test_a_checkpoint_of_the_whole_model_is_taken_too(fitted: Any, tmp_path: Path) -> None:
    """As Lightning writes it without the callback; its base is loaded as well."""
    whole, model = Classifier(seed=5), Classifier()
    plain = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    plain.fit(whole, data())
    plain.save_checkpoint(tmp_path / "whole.ckpt")
    assert "backbone.0.weight" in state_of(tmp_path / "whole.ckpt")
    trainer(tmp_path, 1).fit(model, data(), ckpt_path=tmp_path / "whole.ckpt")
    assert_equal(model, whole)
    assert torch.equal(model.eval()(torch.ones(2, 8)), whole.eval()(torch.ones(2, 8)))


class Language(pl.LightningModule):
    """A quantised model."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = mapsurgery.patch(quantised(kind), "*proj", rank=2)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(mapsurgery.param_groups(self.model, lr=1e-2))


def quantised(kind: str) -> nn.Module:
    model = llama()
    if kind == "torchao":
        api = pytest.importorskip("torchao.quantization")
        api.quantize_(model.model, api.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            setattr(layer.self_attn, name, new.to("cpu"))
    return model


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_a_quantised_model_goes_on_from_its_adapters(kind: str, tmp_path: Path) -> None:
    batches = DataLoader(tokens(), batch_size=1)
    whole, resumed = Language(kind), Language(kind)
    trainer(tmp_path, 2, pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)).fit(whole, batches)
    assert all(".adapter." in name for name in state_of(tmp_path / "epoch=0.ckpt"))
    trainer(tmp_path, 2, enable_checkpointing=False).fit(resumed, batches, ckpt_path=tmp_path / "epoch=0.ckpt")
    found = mapsurgery.adapter_state_dict(resumed.model)
    for name, tensor in mapsurgery.adapter_state_dict(whole.model).items():
        assert torch.equal(found[name], tensor), name


def test_averaged_weights_are_written_as_adapters_alone(tmp_path: Path) -> None:
    """Lightning's own EMA puts the averages in the place of the weights, and in no OrderedDict."""
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    model = Classifier()
    trainer(tmp_path, 2, average, every_epoch(tmp_path)).fit(model, data())
    state = state_of(tmp_path / "epoch=0.ckpt")
    assert "backbone.0.weight" not in state and "backbone.0.adapter.A" in state
    resumed = Classifier()
    again = pl.callbacks.EMAWeightAveraging(decay=0.5)
    trainer(tmp_path, 2, again, enable_checkpointing=False).fit(resumed, data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), p, rtol=0, atol=0, msg=name)


def test_averaging_before_the_callback_is_refused(tmp_path: Path) -> None:
    """Its copy of the module would not take adapters alone."""
    callbacks = [pl.callbacks.EMAWeightAveraging(decay=0.5), lightning.AdapterCheckpoint()]
    run = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, logger=False)
    with pytest.raises(ValueError, match="AdapterCheckpoint must come before EMAWeightAveraging"):
        run.fit(Classifier(), data())


def test_a_model_that_nothing_is_patched_of_is_refused(tmp_path: Path) -> None:
    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__()
            mapsurgery.unpatch(self.backbone)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="nothing in the Plain is patched"):
        trainer(tmp_path, 1).fit(Plain(), data())


class Stopped(Classifier):
    """Fails in training, after a checkpoint was loaded."""

    def on_train_start(self) -> None:
        raise RuntimeError("stopped")


def test_the_module_and_other_trainers_stay_whole(fitted: Any, tmp_path: Path) -> None:
    """After fit, after an error, and while it trains; the trainer itself goes on writing adapters alone."""
    model, keys, seen = Classifier(), Classifier().state_dict().keys(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(module.state_dict().keys())

    fit = trainer(tmp_path, 1, Look(), enable_checkpointing=False)
    fit.fit(model, data())
    assert model.state_dict().keys() == keys and seen[0] == keys
    fit.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert state_of(tmp_path / "a.ckpt").keys() == state_of(fitted[2] / "epoch=0.ckpt").keys()
    plain = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    plain.fit(model, data())
    plain.save_checkpoint(tmp_path / "whole.ckpt")
    assert state_of(tmp_path / "whole.ckpt").keys() == keys
    stopped = Stopped()
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, 3).fit(stopped, data(), ckpt_path=fitted[2] / "epoch=1.ckpt")
    assert torch.equal(stopped.head.weight, state_of(fitted[2] / "epoch=1.ckpt")["head.weight"])
    for module in (model, stopped):
        assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks
        assert not module._load_state_dict_post_hooks


@pytest.mark.parametrize("only", [False, True], ids=["callback", "adapters_only"])
@pytest.mark.parametrize("undo", [mapsurgery.merge, mapsurgery.unpatch])
def test_where_nothing_is_patched_any_more_everything_is_whole(undo: Any, only: bool, tmp_path: Path) -> None:
    model = Classifier(only=only)
    fit = trainer(tmp_path, 1, enable_checkpointing=False)
    fit.fit(model, data())
    undo(model.backbone)
    fit.save_checkpoint(tmp_path / "plain.ckpt")
    state = state_of(tmp_path / "plain.ckpt")
    assert state.keys() == model.state_dict().keys() == {*backbone_keys(), "head.weight", "head.bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors(model).items())
    model.load_state_dict(state)


def backbone_keys() -> set[str]:
    return {f"backbone.{name}" for name in backbone().state_dict()}


def test_disabled_adapters_are_not_trained(tmp_path: Path) -> None:
    model, before = Classifier(), Classifier()
    with mapsurgery.disabled(model.backbone), pytest.raises(ValueError, match="adapters are disabled: train the model"):
        trainer(tmp_path, 1).fit(model, data())
    assert_equal(model, before)


def test_a_strategy_that_holds_pieces_is_refused(tmp_path: Path) -> None:
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    splitting = trainer(tmp_path, 1, strategy=strategy)
    with pytest.raises(NotImplementedError, match="ModelParallelStrategy"):  # before it makes its process group
        splitting.callbacks[0].setup(splitting, Classifier(), "fit")


def test_a_module_with_hooks_is_copied(fitted: Any) -> None:
    """As processes that are started take it."""
    model = Classifier(only=True)
    copy = pickle.loads(pickle.dumps(model))
    copy.load_state_dict(model.state_dict())
    assert copy.state_dict().keys() == model.state_dict().keys()
    lightning.adapters_only(copy)
    assert len(copy._state_dict_hooks) == 1
