"""What the tests measure the library against, written independently of it: W' in float64 straight from the paper's
equation (arXiv 2505.23094), the layers that every invariant is held for, and snapshots of models.

Annotations are no strings here: torch 2.11 could not pickle what torch.fx makes of these models themselves.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

import mapsurgery
from mapsurgery.methods import Adapter


def defined_weight(
    W: Tensor, A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, tau: float = 0.0, relative: bool = True
) -> Tensor:
    """MAP on BA: `defined_map` with everything materialised."""
    return defined_map(W, B.double() @ A.double(), alpha, beta, tau, relative)


def defined_map(
    W: Tensor, delta: Tensor, alpha: Tensor, beta: Tensor, tau: float = 0.0, relative: bool = True
) -> Tensor:
    """(||W|| + alpha) W/||W|| + beta ΔW/sqrt(||ΔW||^2 + tau^2), W as (m, K), in float64.

    tau, and with `relative` alpha and beta too, are in units of ||W||; a zero W has the unit 1.
    """
    W, delta, alpha, beta = (t.double() for t in (W, delta, alpha, beta))
    norm = W.norm()
    unit = norm if norm > 0 else torch.ones_like(norm)
    size = torch.sqrt((delta**2).sum() + (tau * unit) ** 2)
    update = beta * delta / size if size > 0 else torch.zeros_like(delta)
    return (W + alpha * W + unit * update) if relative else (W + alpha * W / unit + update)


def defined_delta(a: nn.Module, W: Tensor) -> Tensor:
    """ΔW (m, K) of an update family on W (m, K), by its paper's equation, in float64."""
    t = {name: getattr(a, name).detach().double() for name in ("A", "B", *a.own_tensors()) if hasattr(a, name)}
    norm = W.double().norm() if a.init.a_scale == "weight" and W.any() else torch.ones((), dtype=torch.float64)
    name = a.update.name
    if name == "lora":
        return t["B"] @ t["A"]
    if name in ("pissa", "olora"):
        return t["B"] @ t["A"] - t["B0"] @ t["A0"]
    if name == "adalora":
        return norm * t["P"] @ torch.diag(t["lam"]) @ t["Q"]
    if name == "vera":
        return torch.diag(t["b"]) @ t["B"] @ torch.diag(t["d"]) @ t["A"]
    if name == "loha":
        return (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"])
    if name == "lokr":
        return torch.kron(t["C"], t["D"] if "D" in t else t["D_b"] @ t["D_a"])
    if name == "flora":
        core = t["G"].reshape(*t["G"].shape[:2], -1)
        taps = [t["U"] @ core[..., k] @ t["V"] for k in range(core.shape[-1])]
        return torch.stack(taps, -1).reshape(W.shape)
    assert name == "dense"
    return (norm / W.numel() ** 0.5 if a.init.a_scale == "weight" else 1.0) * t["T"]


def defined_by(a: nn.Module, W: Tensor) -> Tensor:
    """W' (m, K) of an adapter on one matrix W (m, K), in float64."""
    delta, method = defined_delta(a, W), a.method
    if method.name == "map":
        tau = a.init.beta / a.init.gain if a.init.kind == "soft" else 0.0
        return defined_map(W, delta, a.alpha.detach(), a.beta.detach(), tau, a.init.relative)
    updated = W.double() + method.alpha / (a.rank**0.5 if method.rslora else a.rank) * delta
    if method.name == "lora":
        return updated
    length = updated.norm(dim=1, keepdim=True)
    m, lengths = a.m.detach().double()[:, None], W.double().norm(dim=1, keepdim=True)
    factor = torch.where(lengths > 0, (lengths + m) / length, 1 + m)
    return factor * updated


def weight_of(layer: nn.Module, parameter: str = "weight") -> Tensor:
    """W' of an adapted layer by `defined_weight`, in the layer's own layout, float64."""
    a = layer.adapter if parameter == "weight" else getattr(layer, f"adapter_{parameter}")
    W = layer.base_of(parameter).detach()
    weight, padding = weight_by(a, W, isinstance(layer, Conv1D)), getattr(layer, "padding_idx", None)
    if padding is not None:  # training W would leave this row as it is
        weight[padding] = W[padding].double()
    return weight


def weight_by(a: nn.Module, W: Tensor, transposed: bool = False) -> Tensor:
    """W' of an adapter on W."""
    if a.stacked:
        return torch.stack([defined_by(_of_stack(a, e), w) for e, w in enumerate(W)])
    found = defined_by(a, W.t() if transposed else W.reshape(W.shape[0], -1))
    return found.t() if transposed else found.reshape(W.shape)


def _of_stack(a: nn.Module, e: int) -> Any:
    """The parameters of one matrix of a stack, as an adapter of its own has them."""
    names = {name: getattr(a, name) for name in a.own_tensors()}
    one = {name: t[e : e + 1] if name in ("alpha", "beta") else t[e] for name, t in names.items()}
    shared = {name: p for name, p in a._parameters.items() if name not in names}
    facts = {name: getattr(a, name) for name in ("own_tensors", "init", "update", "method", "rank")}
    return SimpleNamespace(**shared, **one, **facts)


@torch.no_grad()
def to_generic_point(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every adapter to where each of its parameters matters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for a in model.modules():
        if isinstance(a, Adapter):
            for name, p in a.own_parameters().items():
                drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
                p.copy_(drawn / 3 if name == "m" else drawn)
            if a.method.name == "map":
                unit = 1.0 if a.init.relative else a.weight_norm.double().clamp_min(1e-3)
                a.alpha.fill_(-0.1).mul_(unit)
                a.beta.fill_(0.4).mul_(unit)
    return model


def _numbers(tensor: Tensor) -> Tensor:
    """Without NaN, which is not equal to itself; torchao's tensors implement next to nothing."""
    return (tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor).nan_to_num(77)


class Snapshot:
    """All that must survive an operation that is undone or that fails."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {path: (module, type(module)) for path, module in model.named_modules(remove_duplicate=False)}
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        self.state = {name: t.clone() if isinstance(t, Tensor) else t for name, t in model.state_dict().items()}
        self.training = {path: module.training for path, module in model.named_modules()}
        self.attributes = {path: set(module.__dict__) for path, module in model.named_modules()}

    def assert_holds(self, model: nn.Module) -> None:
        now = dict(model.named_modules(remove_duplicate=False))
        assert list(now) == list(self.modules)
        for path, (module, cls) in self.modules.items():
            assert now[path] is module and type(module) is cls, path
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert list(parameters) == list(self.parameters)
        assert all(parameters[name] is p for name, p in self.parameters.items())
        assert {name: p.requires_grad for name, p in parameters.items()} == self.requires_grad
        state = model.state_dict()
        assert list(state) == list(self.state)
        for name, tensor in self.state.items():
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                assert torch.equal(_numbers(state[name]), _numbers(tensor)), name
        assert {path: module.training for path, module in model.named_modules()} == self.training
        assert {path: set(module.__dict__) for path, module in model.named_modules()} == self.attributes


class OwnForwardLinear(nn.Linear):
    """A subclass whose forward is its own: only the effective weight can adapt it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / 2, self.bias).tanh()


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


class PlainSubclass(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int = 3
    fused: bool = True
    pointwise: bool = True
    """The layer's output is linear in W."""

    def __str__(self) -> str:
        return self.name


def _conv(cls: type, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: cls(*args, **kwargs)


CASES = [
    Case("linear", _conv(nn.Linear, 7, 5), (4, 7)),
    Case("linear_no_bias", _conv(nn.Linear, 7, 5, bias=False), (2, 3, 7)),
    Case("linear_one_row", _conv(nn.Linear, 7, 5), (7,)),
    Case("linear_plain_subclass", _conv(PlainSubclass, 7, 5), (4, 7)),
    Case("linear_own_forward", _conv(OwnForwardLinear, 7, 5), (4, 7), fused=False),
    Case("transformers_conv1d", _conv(Conv1D, 5, 7), (2, 3, 7)),
    # activation space: few channels of rank beside the layer's own
    Case("conv1d", _conv(nn.Conv1d, 12, 24, 3, stride=2, padding=1), (2, 12, 9), rank=1),
    Case("conv2d", _conv(nn.Conv2d, 12, 24, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (2, 12, 7, 6), rank=2),
    Case("conv3d", _conv(nn.Conv3d, 8, 16, (1, 3, 2), padding=(0, 1, 1)), (2, 8, 3, 4, 4), rank=1),
    Case("conv2d_grouped_wide", _conv(nn.Conv2d, 32, 32, 3, groups=2, padding=1, bias=False), (1, 32, 4, 4), rank=1),
    Case("conv2d_same", _conv(nn.Conv2d, 12, 24, 3, padding="same"), (2, 12, 5, 5), rank=1),
    Case("conv2d_same_uneven", _conv(nn.Conv2d, 12, 24, (4, 3), padding="same"), (2, 12, 6, 5), rank=1),
    Case("conv2d_valid", _conv(nn.Conv2d, 12, 24, 3, padding="valid"), (2, 12, 5, 5), rank=1),
    Case(
        "conv2d_circular", _conv(nn.Conv2d, 12, 24, 3, padding=(1, 2), padding_mode="circular"), (2, 12, 5, 5), rank=1
    ),
    Case("conv2d_reflect", _conv(nn.Conv2d, 12, 24, 3, padding=(1, 2), padding_mode="reflect"), (2, 12, 5, 5), rank=1),
    Case("conv1d_replicate", _conv(nn.Conv1d, 12, 24, 3, padding=2, padding_mode="replicate"), (2, 12, 5), rank=1),
    Case("conv1d_unbatched", _conv(nn.Conv1d, 12, 24, 3, padding=1), (12, 9), rank=1),
    Case("conv2d_unbatched", _conv(nn.Conv2d, 12, 24, 3, padding=1), (12, 5, 5), rank=1),
    Case(
        "conv2d_unbatched_reflect", _conv(nn.Conv2d, 12, 24, 3, padding=1, padding_mode="reflect"), (12, 5, 5), rank=1
    ),
    # weight space: depthwise, grouped, and ranks that are large for the layer
    Case("conv1d_depthwise", _conv(nn.Conv1d, 6, 6, 5, groups=6, padding="same"), (2, 6, 9)),
    Case("conv2d_depthwise", _conv(nn.Conv2d, 6, 12, 3, groups=6, padding=1), (2, 6, 5, 5)),
    Case("conv2d_grouped", _conv(nn.Conv2d, 6, 8, 3, groups=2, stride=2, padding_mode="circular"), (2, 6, 5, 5)),
    Case("conv2d_high_rank", _conv(nn.Conv2d, 4, 6, 2, bias=False), (2, 4, 4, 4), rank=5),
    Case("conv3d_depthwise", _conv(nn.Conv3d, 3, 3, 2, groups=3, padding_mode="replicate", padding=1), (2, 3, 3, 3, 3)),
    Case("conv3d_unbatched_high_rank", _conv(nn.Conv3d, 2, 4, 2), (2, 3, 3, 3)),
    # own forward, on W'
    Case("timm_std_conv", _conv(StdConv2d, 4, 6, 3, padding=1), (2, 4, 5, 5), fused=False, pointwise=False),
    Case(
        "timm_scaled_std_conv", _conv(ScaledStdConv2d, 4, 6, 3, padding=1), (2, 4, 5, 5), fused=False, pointwise=False
    ),
    Case("timm_conv_same", _conv(Conv2dSame, 4, 6, 3, stride=2), (2, 4, 5, 5), fused=False),
    Case("conv_transpose1d", _conv(nn.ConvTranspose1d, 4, 6, 3, stride=2, output_padding=1), (2, 4, 5), fused=False),
    Case("conv_transpose2d", _conv(nn.ConvTranspose2d, 4, 6, 3, groups=2, dilation=2), (2, 4, 5, 5), fused=False),
    Case("conv_transpose3d", _conv(nn.ConvTranspose3d, 3, 4, 2), (2, 3, 3, 3, 3), fused=False),
    Case("conv_own_conv_forward", _conv(OwnConvForward, 4, 6, 3), (2, 4, 5, 5), fused=False),
]

STARTS = [
    mapsurgery.Init("soft"),
    mapsurgery.Init("soft", relative=False),
    mapsurgery.Init("zero"),
    mapsurgery.Init("random"),
    mapsurgery.Init("random", relative=False),
]


def start_name(init: mapsurgery.Init) -> str:
    return f"{init.kind}_{'relative' if init.relative else 'absolute'}"


def patched_case(
    case: Case, *, dtype: torch.dtype = torch.float32, device: Any = "cpu", generic: bool = True, **options: Any
) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layer of a case as it was, adapted, and an input."""
    torch.manual_seed(3)
    original = case.make().to(dtype).to(device)
    with torch.no_grad():
        for p in original.parameters():  # transformers' Conv1D starts with a zero bias
            p.add_(torch.randn_like(p) * 0.1)
    x = torch.randn(case.shape, dtype=torch.float64).to(dtype).to(device)
    adapted = mapsurgery.patch(copy.deepcopy(original), "*", rank=options.pop("rank", case.rank), **options)
    return original, to_generic_point(adapted) if generic else adapted, x


class Net(nn.Module):
    """A convolution, BatchNorm, a container with two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).mean((2, 3))
        return self.head(x + self.body(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def image(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def train_steps(model: nn.Module, x: Tensor, steps: int = 3, lr: float = 1e-2) -> nn.Module:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model
