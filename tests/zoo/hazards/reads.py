"""The weight is read by another module, behind the layer's back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..entry import Entry
from .common import Holder, hazard, rows


class FunctionalQkv(Holder):
    """EVA and SwinV2: a bias put together from parts, and F.linear on the layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(self.before(x), weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return self.after((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class MatrixProduct(Holder):
    """x @ weight.t(), einsum, addmm and weight @ x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x) @ self.a.weight.t()
        x = torch.einsum("bi,oi->bo", x.tanh(), self.b.weight)
        x = torch.addmm(self.c.bias, x.tanh(), self.c.weight.T)
        return self.after((self.d.weight @ x.tanh().t()).t())


class SlicedWeight(Holder):
    """Rows of one weight are used apart, as by attention that splits its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        q = F.linear(x, self.qkv.weight[:8], self.qkv.bias[:8])
        k, v = F.linear(x, self.qkv.weight[8:], self.qkv.bias[8:]).split(8, -1)
        return self.after(torch.sigmoid(q * k) * v)


class ConcatenatedWeights(Holder):
    """Two layers run as one product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
        self.down = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(self.before(x), torch.cat([self.gate.weight, self.up.weight])).chunk(2, -1)
        return self.after(self.down(F.silu(gate) * up))


class MambaStyle(nn.Module):
    """Depthwise `conv1d.weight.squeeze(1)` and `dt_proj.weight @ x`, as the fused paths of state-space models."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(6, 8, bias=False)
        self.conv1d = nn.Conv1d(8, 8, 3, groups=8, padding=2)
        self.x_proj = nn.Linear(8, 4, bias=False)
        self.dt_proj = nn.Linear(4, 8)
        self.out_proj = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.in_proj.weight).transpose(1, 2)
        length = x.shape[-1]
        weight = self.conv1d.weight.squeeze(1)
        padded = F.pad(x, (weight.shape[1] - 1, 0))
        x = (padded.unfold(2, weight.shape[1], 1)[:, :, :length] * weight[:, None]).sum(-1)
        x = F.silu(x + self.conv1d.bias[:, None])
        step = F.linear(x.transpose(1, 2), self.x_proj.weight)
        step = F.softplus(self.dt_proj.weight @ step.transpose(1, 2) + self.dt_proj.bias[:, None])
        return F.linear((x * step).transpose(1, 2), self.out_proj.weight)


class LinearAsConvolution(Holder):
    """A Linear's weight as 1x1 and patch kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * 4 * 4, 8)
        self.point = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.patch.weight.view(8, 3, 4, 4), self.patch.bias, stride=4)
        x = F.conv2d(x.tanh(), self.point.weight[:, :, None, None], self.point.bias)
        return self.after(self.before(x.mean((2, 3))))


class ConvolutionAsLinear(Holder):
    """A patch embedding's kernel as a matrix on patches that were cut already."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)
        return self.after(self.before(F.linear(patches, self.patch.weight.flatten(1), self.patch.bias)))


class FunctionalAttention(nn.Module):
    """F.multi_head_attention_forward on the weights of Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=8,
            num_heads=2,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            need_weights=False,
        )[0]


class Metadata(nn.Module):
    """Parents that read bias, stride, kernel_size, dilation, and the weight's dtype, shape and device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, dilation=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        behind = (self.conv.kernel_size[0] - 1) * self.conv.dilation[0] * self.conv.stride[0]
        x = self.conv(F.pad(x.to(self.conv.weight.dtype), (behind, 0)))
        assert x.shape[1] == self.conv.weight.shape[0] == self.fc.in_features
        x = x.mean(-1).to(self.fc.weight.device).type_as(self.fc.weight)
        return self.fc(x) + self.fc.bias.sum() + self.conv.bias.norm()


class HiddenByName(Holder):
    """The weight through getattr, get_parameter's path, and a property of the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @property
    def kernel(self) -> Tensor:
        return getattr(self.fc, "wei" + "ght")

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x) @ self.kernel.T)


class EmbeddingAsHead(nn.Module):
    """Logits by the embedding's own matrix, with no layer for them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8, padding_idx=0)
        self.fc = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.embed(ids)).tanh() @ self.embed.weight.t()


class WeightInLoss(Holder):
    """A regulariser on the weight is an output beside the layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.after(self.fc(self.before(x))), self.fc.weight.square().sum() + self.fc.weight.abs().max()


class NormalisedWeight(Holder):
    """Cosine classifiers and weight standardisation, done by the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.linear(F.normalize(self.before(x), dim=-1), F.normalize(self.fc.weight, dim=-1)))


def entries() -> list[Entry]:
    def tokens() -> tuple:
        return ((torch.randint(1, 24, (2, 5)),), {})

    return [
        *hazard("read_functional_qkv", FunctionalQkv, rows(2, 5, 8)),
        *hazard("read_matrix_product", MatrixProduct, rows(4, 8)),
        *hazard("read_sliced", SlicedWeight, rows(4, 8)),
        *hazard("read_concatenated", ConcatenatedWeights, rows(4, 8)),
        *hazard("read_mamba_style", MambaStyle, rows(2, 5, 6)),
        *hazard("read_linear_as_convolution", LinearAsConvolution, rows(2, 3, 8, 8)),
        *hazard("read_convolution_as_linear", ConvolutionAsLinear, rows(2, 3, 8, 8)),
        *hazard("read_functional_attention", FunctionalAttention, rows(5, 2, 8)),
        *hazard("read_metadata", Metadata, rows(2, 4, 9)),
        *hazard("read_by_name", HiddenByName, rows(4, 8)),
        *hazard("read_embedding_as_head", EmbeddingAsHead, tokens),
        *hazard("read_weight_in_loss", WeightInLoss, rows(4, 8)),
        *hazard("read_normalised_weight", NormalisedWeight, rows(4, 8)),
    ]
