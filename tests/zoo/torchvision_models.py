"""torchvision: the smallest model of each classification module, and of each for detection, masks, flow and video.

Detection models need their images' targets in training, and a choice of boxes that no rounding can change in eval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.video.mvit import MSBlockConfig, MViT

from .entry import Entry, Inputs, Options, args, floats

_CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    # model: side of the image, options
    "alexnet": (64, {}),
    "convnext_tiny": (32, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "efficientnet_v2_s": (32, {}),
    "googlenet": (64, {"init_weights": False}),
    "inception_v3": (96, {"init_weights": False}),
    "mnasnet0_5": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "regnet_y_400mf": (32, {}),
    "resnet18": (32, {}),
    "resnext50_32x4d": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (32, {}),
    "swin_v2_t": (32, {}),
    "vit_b_16": (32, {"image_size": 32}),
    "wide_resnet50_2": (32, {}),
}
_SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_resnet50")
_DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"weights_backbone": None},
    "fcos_resnet50_fpn": {"weights_backbone": None},
    "keypointrcnn_resnet50_fpn": {"weights_backbone": None, "num_keypoints": 3},
    "maskrcnn_resnet50_fpn": {"weights_backbone": None},
    "retinanet_resnet50_fpn": {"weights_backbone": None},
    "ssd300_vgg16": {"weights_backbone": None},
    "ssdlite320_mobilenet_v3_large": {"weights_backbone": None},
}
_VIDEOS = ("mc3_18", "r2plus1d_18", "r3d_18", "mvit", "swin3d_t")


def _maker(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def _images(side: int) -> Callable[[], Inputs]:
    return lambda: args(floats(2, 3, side, side))


def _video(name: str) -> Entry:
    if name == "mvit":
        return Entry("torchvision/mvit", "torchvision", _small_mvit, lambda: args(floats(1, 3, 4, 32, 32)))
    return Entry(f"torchvision/{name}", "torchvision", _maker(name), lambda: args(floats(1, 3, 4, 32, 32)))


def _small_mvit() -> nn.Module:
    """An MViT of two blocks, with what its second version has."""
    block = {"num_heads": 2, "kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_kv": [1, 2, 2]}
    blocks = [
        MSBlockConfig(input_channels=16, output_channels=24, stride_q=[1, 1, 1], **block),
        MSBlockConfig(input_channels=24, output_channels=24, stride_q=[1, 2, 2], **block),
    ]
    return MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=5,
    )


def _small_maxvit() -> nn.Module:
    return MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )


def _small_vgg() -> nn.Module:
    """A VGG without the 120 million parameters of its first full layer."""
    model = torchvision.models.vgg11_bn(weights=None, num_classes=5)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = nn.Linear(512, 64)
    model.classifier[3] = nn.Linear(64, 64)
    model.classifier[6] = nn.Linear(64, 5)
    return model


def _targets(side: int) -> list[dict[str, Tensor]]:
    box = torch.tensor([[8.0, 8.0, side * 0.7, side * 0.8]])
    mask = torch.zeros(1, side, side, dtype=torch.uint8)
    mask[:, 8 : side // 2, 8 : side // 2] = 1
    points = torch.tensor([[[12.0, 12.0, 1.0], [20.0, 16.0, 1.0], [16.0, 24.0, 1.0]]])
    return [{"boxes": box, "labels": torch.tensor([1]), "masks": mask, "keypoints": points}]


def _detect(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Any:
    """Losses in train mode; in eval mode what the boxes are made from: which of them are kept hangs on rounding."""
    if model.training:
        return model(images, targets)
    found: list[Any] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        for name, module in model.named_modules()
        if name in ("backbone", "head", "rpn.head")
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _detector(name: str, options: dict[str, Any]) -> Entry:
    small = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    make = _maker(name, num_classes=3, **options, **small)

    def inputs() -> Inputs:
        return args(list(floats(1, 3, 64, 64)), _targets(64))

    # SSD's images have 300 pixels whatever is asked for; it proposes no regions that rounding could change.
    dtypes = (torch.float32,) if name.startswith("ssd300") else (torch.float64, torch.float32)
    return Entry(f"torchvision/{name}", "torchvision", make, inputs, Options(call=_detect, dtypes=dtypes))


def entries() -> list[Entry]:
    found = [
        Entry(f"torchvision/{name}", "torchvision", _maker(name, num_classes=5, **options), _images(side))
        for name, (side, options) in _CLASSIFIERS.items()
    ]
    for name, make in {"maxvit_t": _small_maxvit, "vgg11_bn": _small_vgg}.items():
        found.append(Entry(f"torchvision/{name}", "torchvision", make, _images(32)))
    for name in _SEGMENTERS:
        make = _maker(name, weights_backbone=None, num_classes=3)
        found.append(Entry(f"torchvision/{name}", "torchvision", make, _images(64)))
    found += [_detector(name, options) for name, options in _DETECTORS.items()]
    found += [_video(name) for name in _VIDEOS]
    flow = lambda: args(floats(1, 3, 128, 128), floats(1, 3, 128, 128), num_flow_updates=2)  # noqa: E731
    return [*found, Entry("torchvision/raft_small", "torchvision", _maker("raft_small"), flow)]
