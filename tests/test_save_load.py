"""Adapter files: complete, bitwise, written whole or not at all, and checked before they touch a model."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import Snapshot, image, net, to_generic_point, train_steps
from safetensors.torch import load_file, save_file
from torch import nn

import mapsurgery
from mapsurgery import _atomic_write
from mapsurgery._tensor_file import content_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


def _trained(**options: Any) -> nn.Module:
    options = {"targets": ["stem", "body"], "rank": 2, "train": ["head", "norm"], **options}
    return train_steps(mapsurgery.patch(net(), **options), image()).eval()


def _metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size))["__metadata__"]


# What is saved -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["soft", "zero", "random", mapsurgery.Init("soft", 0.3, 1.5, relative=False)], ids=str)
def test_a_loaded_model_computes_the_same_bitwise_and_trains_the_same(path: Path, init: Any) -> None:
    model = _trained(init=init, rank_pattern={"stem": 3}, exclude="*.2", dropout=0.1)
    mapsurgery.save(model, path)
    loaded = mapsurgery.load(net().eval(), path)
    assert torch.equal(loaded(image()), model(image()))
    assert loaded.body[0].adapter.dropout == 0.1 and loaded.stem.adapter.A.shape[0] == 3
    assert type(loaded.body[2]) is nn.Linear and not loaded.training
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    for m in (model, loaded):
        torch.manual_seed(0)
        train_steps(m, image(), steps=2).eval()
    assert torch.equal(loaded(image()), model(image()))


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("kind", ["relative", "absolute", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_in_which_magnitudes_count_from_0_are_read(
    path: Path, kind: str, version: str, dtype: torch.dtype
) -> None:
    """Up to version 2 alpha started at 1, or with absolute magnitudes at ||W||_F, and DoRA's m at the rows' lengths."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(6, 5), "zero": nn.Linear(6, 5)})
        nn.init.zeros_(model["zero"].weight)
        return model

    options = {"method": "dora"} if kind == "dora" else {"init": mapsurgery.Init(relative=kind == "relative")}
    model = mapsurgery.patch(base(), "*", rank=2, dtype=dtype, **options)
    mapsurgery.save(to_generic_point(model), path)
    weights = {name: layer.get_parameter("weight").detach() for name, layer in model.items()}

    def edit(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        metadata["format_version"] = version
        for name, layer in metadata["layers"].items():
            norms = torch.tensor(layer["weight_norm"]).reshape(-1)
            start = 1 if kind == "relative" else torch.where(norms > 0, norms, 1)
            start = weights[name].flatten(1).norm(dim=-1) if kind == "dora" else start
            key = f"{layer['layer']}.adapter.{'m' if kind == 'dora' else 'alpha'}"
            tensors[key] = (tensors[key].float() + start).to(dtype)

    expected = {name: layer.weight.detach().clone() for name, layer in model.items()}
    _edited(path, edit)
    loaded = mapsurgery.load(base(), path)
    for name, layer in loaded.items():
        rounding = 2e-6 if dtype == torch.float32 else 0.008
        assert (layer.weight - expected[name]).norm() <= rounding * expected[name].norm() + 1e-12, name
        assert {p.dtype for p in layer.adapter.parameters()} == {dtype}
    mapsurgery.save(loaded, path)
    assert torch.equal(mapsurgery.load(base(), path)["layer"].weight, loaded["layer"].weight)


def test_layers_of_several_kinds_are_no_one_file(path: Path) -> None:
    model, other = (
        mapsurgery.patch(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "*", rank=1, method=method)
        for method in ("map", "dora")
    )
    model[1] = other[1]
    with pytest.raises(ValueError, match="^1 has Dora.*one kind"):
        mapsurgery.save(model, path)
    assert not path.exists()


def test_the_file_holds_the_adapters_the_trained_and_the_changed_and_nothing_else(path: Path) -> None:
    model = _trained()
    mapsurgery.save(model, path)
    names = ("A", "B", "alpha", "beta")
    expected = {f"{layer}.adapter.{n}" for layer in ("stem", "body.0", "body.2") for n in names}
    expected |= {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    expected |= {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(load_file(path)) == expected
    metadata = _metadata(path)
    assert metadata["format_version"] == "4"
    layer = json.loads(metadata["layers"])["body.0"]
    assert layer["type"] == "Linear" and layer["shape"] == [12, 8] and layer["rank"] == 2
    assert layer["weight_norm"] == pytest.approx(net().body[0].weight.norm().item(), rel=1e-6)


def test_buffers_that_did_not_change_are_not_saved(path: Path) -> None:
    model = to_generic_point(mapsurgery.patch(net(), "body", rank=2))
    mapsurgery.save(model, path)
    assert all(".adapter." in name for name in load_file(path))


def test_batchnorm_statistics_of_training_survive(path: Path) -> None:
    model = train_steps(mapsurgery.patch(net(), "body", rank=2), image()).eval()
    mapsurgery.save(model, path)
    loaded = mapsurgery.load(net().eval(), path)
    assert torch.equal(loaded.norm.running_mean, model.norm.running_mean)
    assert loaded.norm.num_batches_tracked == 3
    assert torch.equal(loaded(image()), model(image()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", [None, torch.bfloat16], ids=str)
def test_other_dtypes_come_back_bitwise(path: Path, dtype: torch.dtype, adapter: torch.dtype | None) -> None:
    model = to_generic_point(mapsurgery.patch(net().to(dtype), "*", rank=2, dtype=adapter)).eval()
    mapsurgery.save(model, path)
    loaded = mapsurgery.load(net().to(dtype).eval(), path)
    assert loaded.head.adapter.A.dtype == model.head.adapter.A.dtype
    assert torch.equal(loaded(image().to(dtype)), model(image().to(dtype)))


def test_an_adapter_loads_onto_the_same_base_in_another_precision(path: Path) -> None:
    mapsurgery.save(to_generic_point(mapsurgery.patch(net(), "*", rank=2)), path)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        mapsurgery.load(net().to(dtype), path)


def test_shared_modules_and_a_model_that_is_one_layer_are_saved(path: Path) -> None:
    def shared() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        return model.append(model[0])

    def single() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(4, 4)

    for make in (shared, single):
        model = to_generic_point(mapsurgery.patch(make(), "*", rank=2))
        mapsurgery.save(model, path)
        x = torch.randn(3, 4)
        assert torch.equal(mapsurgery.load(make(), path)(x), model(x))


def test_a_loaded_model_unpatches_to_the_base_bitwise(path: Path) -> None:
    mapsurgery.save(_trained(), path)
    model = net()
    snapshot = Snapshot(model)
    mapsurgery.unpatch(mapsurgery.load(model, path))
    snapshot.assert_holds(model)


def test_saving_does_not_change_the_model_and_again_gives_the_same_bytes(path: Path) -> None:
    model = _trained()
    snapshot = Snapshot(model)
    mapsurgery.save(model, path)
    first = path.read_bytes()
    mapsurgery.save(mapsurgery.load(net(), path), str(path))
    snapshot.assert_holds(model)
    assert {k: v.tolist() for k, v in load_file(path).items()} == {
        k: v.tolist() for k, v in mapsurgery.adapter_state_dict(model).items()
    }
    assert len(path.read_bytes()) == len(first)


def test_a_buffer_that_held_nan_all_along_is_no_obstacle(path: Path) -> None:
    def make() -> nn.Module:
        model = net()
        model.register_buffer("unset", torch.full((2,), float("nan")))
        return model

    mapsurgery.save(mapsurgery.patch(make(), "body", rank=2), path)
    mapsurgery.load(make(), path)


def test_a_mask_of_minus_infinity_that_changed_is_saved_and_loaded(path: Path) -> None:
    def make() -> nn.Module:
        model = net()
        model.register_buffer("mask", torch.zeros(2))
        return model

    model = mapsurgery.patch(make(), "body", rank=2)
    model.mask.fill_(-float("inf"))
    mapsurgery.save(model, path)
    assert mapsurgery.load(make(), path).mask.isneginf().all()


# Crash safety --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type
) -> None:
    model = _trained()
    mapsurgery.save(model, path)
    before = path.read_bytes()
    train_steps(model, image())

    def fail(*args: Any, **kwargs: Any) -> None:
        if step == "write":
            os.write(args[0], b"half a file")
        raise error(errno.ENOSPC, "disk full")

    monkeypatch.setattr(_atomic_write if step == "write" else os, "_write" if step == "write" else step, fail)
    with pytest.raises(error, match="disk full"):
        mapsurgery.save(model, path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_place_that_cannot_be_written_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        mapsurgery.save(_trained(), tmp_path / "no" / "such" / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        mapsurgery.save(_trained(), tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_new_file_has_the_permissions_of_any_new_file(path: Path) -> None:
    mapsurgery.save(_trained(), path)
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


# Files that are refused ----------------------------------------------------------------------------------------------


def _edited(path: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Rewrite a file after `edit(tensors, metadata)`, the JSON of the metadata parsed."""
    tensors, raw = load_file(path), _metadata(path)
    parsed = ("config", "layers", "trained", "buffers")
    metadata = {key: json.loads(value) if key in parsed else value for key, value in raw.items()}
    edit(tensors, metadata)
    checksum = metadata.pop("checksum")
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    if metadata.get("format_version") in ("1", "2", "3"):  # which have none
        save_file(tensors, path, metadata=metadata)
    else:
        path.write_bytes(b"".join(content_of(tensors, metadata)))
        assert _metadata(path)["checksum"] != checksum


def _pop(key: str) -> Callable:
    return lambda tensors, metadata: metadata.pop(key)


def _set(*keys: Any, value: Any) -> Callable:
    def edit(tensors: dict, metadata: dict) -> None:
        place = metadata
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return edit


def _tensor(name: str, value: torch.Tensor | None) -> Callable:
    def edit(tensors: dict, metadata: dict) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return edit


def _rank(new: int) -> Callable:
    def edit(tensors: dict, metadata: dict) -> None:
        metadata["layers"]["body.0"]["rank"] = new
        tensors["body.0.adapter.A"] = torch.zeros(max(new, 0), 8)
        tensors["body.0.adapter.B"] = torch.zeros(12, max(new, 0))

    return edit


def _announce(kind: str, name: str, tensor: torch.Tensor) -> Callable:
    def edit(tensors: dict, metadata: dict) -> None:
        metadata[kind] = [*metadata[kind], name]
        tensors[name] = tensor

    return edit


HOSTILE = [
    pytest.param(_pop("format"), "mapsurgery.save", id="no_format"),
    pytest.param(_set("format", value="other"), "mapsurgery.save", id="other_format"),
    pytest.param(_set("format_version", value="5"), "version '5'", id="newer_version"),
    pytest.param(_set("format_version", value="1.0"), "version '1.0'", id="odd_version"),
    pytest.param(_pop("format_version"), "version None", id="no_version"),
    pytest.param(_pop("config"), "config", id="no_config"),
    pytest.param(_pop("layers"), "layers", id="no_layers"),
    pytest.param(_pop("trained"), "trained", id="no_trained"),
    pytest.param(_set("config", value="{"), "config.*JSON", id="broken_json"),
    pytest.param(_set("layers", value="[" * 100000), "layers.*JSON", id="deep_json"),
    pytest.param(_set("layers", value=[]), "layers.*dict", id="layers_is_a_list"),
    pytest.param(_set("layers", value={}), "no layers", id="empty_layers"),
    pytest.param(_set("layers", "body.0", value=3), r"body\.0", id="layer_is_a_number"),
    pytest.param(_set("layers", "body.0", "rank", value="2"), r"body\.0.*rank", id="rank_is_text"),
    pytest.param(_set("layers", "body.0", "rank", value=True), r"body\.0.*rank", id="rank_is_bool"),
    pytest.param(
        _set("layers", "body.0", "weight_norm", value=float("nan")), r"body\.0.*weight_norm", id="norm_is_nan"
    ),
    pytest.param(_set("layers", "body.0", "weight_norm", value=-1.0), r"body\.0.*weight_norm", id="norm_is_negative"),
    pytest.param(_set("layers", "body.0", "shape", value=[12, 9]), r"body\.0.*\(12, 8\).*\(12, 9\)", id="other_shape"),
    pytest.param(_set("layers", "body.0", "shape", value=[[], {}]), r"body\.0.*shape", id="odd_shape"),
    pytest.param(_set("layers", "body.0", "dtype", value=None), r"body\.0.*dtype", id="no_dtype"),
    pytest.param(_rank(9), r"body\.0.*rank 9.*8", id="rank_too_large"),
    pytest.param(_rank(0), r"body\.0.*rank", id="rank_zero"),
    pytest.param(_rank(-1), r"body\.0.*rank", id="rank_negative"),
    pytest.param(_set("layers", "body.0", "rank", value=3), r"body\.0.*rank 3", id="rank_of_other_factors"),
    pytest.param(_tensor("body.0.adapter.B", torch.zeros(13, 2)), r"body\.0.*B of shape \(12, 2\)", id="other_B"),
    pytest.param(_tensor("body.0.adapter.alpha", torch.zeros(())), r"body\.0.*alpha", id="alpha_0_dim"),
    pytest.param(_tensor("body.0.adapter.A", torch.zeros(2, 8).int()), r"body\.0.*A .*int32", id="integer_factor"),
    pytest.param(_tensor("body.0.adapter.A", None), r"body\.0\.adapter\.A", id="missing_tensor"),
    pytest.param(_tensor("body.1.adapter.A", torch.zeros(1)), r"body\.1\.adapter\.A", id="unannounced_tensor"),
    pytest.param(_tensor("body.0.adapter.A", torch.full((2, 8), float("nan"))), r"body\.0\.adapter\.A.*NaN", id="nan"),
    pytest.param(_tensor("head.bias", torch.full((4,), float("inf"))), r"head\.bias.*infinite", id="infinite_head"),
    pytest.param(_tensor("head.bias", torch.zeros(5)), r"head\.bias.*\(4,\).*\(5,\)", id="other_head"),
    pytest.param(_tensor("norm.running_mean", torch.zeros(5)), r"norm\.running_mean.*\(8,\)", id="other_buffer"),
    pytest.param(_announce("trained", "tail.weight", torch.zeros(2)), r"tail\.weight.*missing", id="unknown_trained"),
    pytest.param(_announce("buffers", "tail.count", torch.zeros(2)), r"tail\.count.*missing", id="unknown_buffer"),
    pytest.param(_announce("buffers", "stem.bias", torch.zeros(8)), r"stem\.bias", id="a_parameter_as_buffer"),
    pytest.param(
        _announce("trained", "body.0.weight", torch.zeros(12, 8)),
        r"body\.0",
        id="trains_an_adapted_weight",
    ),
    pytest.param(
        _announce("trained", "norm.num_batches_tracked", torch.tensor(3)),
        "num_batches_tracked",
        id="trains_a_buffer",
    ),
    pytest.param(_set("trained", value="head"), "trained", id="trained_is_text"),
    pytest.param(_set("trained", value=[3]), "trained", id="trained_holds_a_number"),
    pytest.param(_set("config", "init", "kind", value="evil"), "config.*evil", id="unknown_init"),
    pytest.param(_set("config", "init", "evil", value=1), "config.*evil", id="unknown_init_field"),
    pytest.param(_set("config", "method", value="evil"), "evil", id="unknown_method"),
    pytest.param(_set("config", "dtype", value="load"), "config.*dtype", id="dtype_is_a_function"),
    pytest.param(_set("config", "dtype", value=[]), "config", id="dtype_is_a_list"),
    pytest.param(_set("config", "evil", value=1), "config.*evil", id="unknown_argument"),
    pytest.param(_set("config", "dropout", value=7), "config.*dropout", id="bad_dropout"),
    pytest.param(_set("config", "targets", value=[]), "config.*targets", id="no_targets"),
    pytest.param(
        _set("layers", "body.0", "dtype", value="load"),
        r"body\.0",
        id="layer_dtype_is_a_function",
    ),
]


@pytest.mark.parametrize(("edit", "message"), HOSTILE)
def test_a_file_that_lies_is_refused_and_the_model_stays(path: Path, edit: Callable, message: str) -> None:
    mapsurgery.save(_trained(), path)
    _edited(path, edit)
    model = net()
    model.stem.bias.requires_grad_(False)
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        mapsurgery.load(model, path)
    snapshot.assert_holds(model)


def test_a_layer_announced_under_two_of_its_names_is_refused(path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        model.first = nn.Linear(4, 4)
        model.alias = model.first
        return model

    mapsurgery.save(mapsurgery.patch(make(), "*", rank=2), path)

    def twice(tensors: dict, metadata: dict) -> None:
        metadata["layers"]["alias"] = metadata["layers"]["first"]
        tensors.update({name.replace("first", "alias"): t.clone() for name, t in tensors.items()})

    _edited(path, twice)
    model = make()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="alias"):
        mapsurgery.load(model, path)
    snapshot.assert_holds(model)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_refused_and_the_model_stays(path: Path, keep: int) -> None:
    mapsurgery.save(_trained(), path)
    path.write_bytes(path.read_bytes()[:keep])
    model = net()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="adapter.safetensors"):
        mapsurgery.load(model, path)
    snapshot.assert_holds(model)


@pytest.mark.parametrize("content", ["text", "pickle", "plain_safetensors"])
def test_another_kind_of_file_is_refused_and_nothing_is_unpickled(path: Path, content: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(path) + ".evil",)

    if content == "text":
        path.write_text("{}" * 100)
    elif content == "pickle":
        torch.save(Evil(), path)
    else:
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="adapter.safetensors"):
        mapsurgery.load(net(), path)
    assert not os.path.exists(str(path) + ".evil")


def test_a_file_that_is_not_there_is_a_filenotfounderror(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter.safetensors"):
        mapsurgery.load(net(), path)


def test_a_folder_is_no_adapter_file(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=tmp_path.name):
        mapsurgery.load(net(), tmp_path)


# Models that do not fit ----------------------------------------------------------------------------------------------


def _without_body(model: nn.Module) -> nn.Module:
    model.body = nn.Identity()
    return model


def _wider(model: nn.Module) -> nn.Module:
    model.body[0] = nn.Linear(8, 13)
    return model


def _scaled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.body[2].weight.mul_(1.0001)
    return model


def _other_class(model: nn.Module) -> nn.Module:
    model.body[0] = nn.LayerNorm((12, 8))
    model.body[0].weight = nn.Parameter(torch.ones(12))
    return model


MISFITS = [
    (_without_body, r"'body\.0' is missing.*'body\.2' is missing"),
    (_wider, r"'body\.0'.*\(13, 8\).*\(12, 8\)"),
    (_scaled, r"another base.*body\.2 has"),
    (lambda model: net(seed=1), "another base"),
    (_other_class, r"'body\.0'.*no matrix"),
    (lambda model: model.to("meta"), "meta"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS, ids=["missing", "shape", "scaled", "seed", "class", "meta"])
def test_a_model_that_does_not_fit_is_told_where_and_stays(path: Path, change: Callable, message: str) -> None:
    mapsurgery.save(_trained(), path)
    model = change(net())
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        mapsurgery.load(model, path)
    snapshot.assert_holds(model)


def test_a_patched_model_is_told_what_to_do(path: Path) -> None:
    model = _trained()
    mapsurgery.save(model, path)
    with pytest.raises(ValueError, match="unpatch.*load_adapter_state_dict"):
        mapsurgery.load(model, path)
    with pytest.raises(TypeError, match="Module"):
        mapsurgery.load("model", path)


def test_what_is_unfrozen_after_patch_is_saved_too(path: Path) -> None:
    model = mapsurgery.patch(net(), "body", rank=2)
    model.head.requires_grad_(True)
    train_steps(model, image())
    mapsurgery.save(model, path)
    assert {"head.weight", "head.bias"} <= set(load_file(path))
    assert torch.equal(mapsurgery.load(net(), path).eval()(image()), model.eval()(image()))


def test_a_base_weight_that_trains_is_refused(path: Path) -> None:
    model = mapsurgery.patch(net(), "body", rank=2).requires_grad_(True)
    for operation in (lambda: mapsurgery.save(model, path), lambda: mapsurgery.param_groups(model, 1e-3)):
        with pytest.raises(ValueError, match=r"body\.0.*train"):
            operation()
    assert not path.exists()


def test_an_adapted_layer_that_was_replaced_is_missed(path: Path) -> None:
    model = mapsurgery.patch(net(), "body", rank=2)
    model.body[2] = nn.Linear(model.body[2].in_features, model.body[2].out_features)
    for operation in (lambda: mapsurgery.save(model, path), lambda: mapsurgery.verify(model, image())):
        with pytest.raises(ValueError, match=r"body\.2"):
            operation()


def test_a_diverged_adapter_is_not_saved(path: Path) -> None:
    model = mapsurgery.patch(net(), "body", rank=2)
    with torch.no_grad():
        model.body[0].adapter.A[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"body\.0\.adapter\.A.*NaN|NaN.*body\.0\.adapter\.A"):
        mapsurgery.save(model, path)
    assert not path.exists()


def test_a_link_stays_a_link_and_permissions_stay(path: Path) -> None:
    target = path.with_name("target.safetensors")
    model = mapsurgery.patch(net(), "body", rank=2)
    mapsurgery.save(model, target)
    target.chmod(0o600)
    path.symlink_to(target)
    mapsurgery.save(model, path)
    assert path.is_symlink() and target.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_does_not_exist_is_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mapsurgery.save(mapsurgery.patch(net(), "body", rank=2), path.parent / "nowhere" / "a.safetensors")


class _Aliased(nn.Module):
    """One layer under two names, and a tie, in either order."""

    def __init__(self, names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
        tied.weight = shared.weight
        for name in names:
            self.add_module(name, tied if name == "t" else shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.t(self.a(x))


def test_names_of_one_layer_may_come_in_another_order(path: Path) -> None:
    model = to_generic_point(mapsurgery.patch(_Aliased("abt"), "*", rank=2))
    mapsurgery.save(model, path)
    x = torch.randn(2, 4)
    for names in ("bat", "tab"):
        assert torch.equal(mapsurgery.load(_Aliased(names), path)(x), model(x))
