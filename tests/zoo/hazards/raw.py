"""Matrices that no layer owns: stacks of experts, packed projections, banks of kernels, lists of parameters."""

from __future__ import annotations

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from ..entry import Entry
from .common import Holder, hazard, rows


class ExpertStack(nn.Module):
    """(E, out, in), or (E, in, out) as gpt-oss and Llama 4 have it; each expert by itself or all in one product."""

    def __init__(self, transposed: bool, batched: bool) -> None:
        super().__init__()
        self.transposed, self.batched = transposed, batched
        up, down = ((3, 8, 10), (3, 5, 8)) if transposed else ((3, 10, 8), (3, 8, 5))
        self.gate_up_proj = nn.Parameter(torch.randn(up) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(down) * 0.3)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if self.transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        if self.batched:
            gate, value = torch.bmm(x.expand(3, *x.shape), up.transpose(1, 2)).chunk(2, -1)
            every = torch.bmm(F.silu(gate) * value, down.transpose(1, 2))
            return every[chosen, torch.arange(len(x))]
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows_ = (chosen == expert).nonzero().squeeze(1)
            gate, value = F.linear(x[rows_], up[expert]).chunk(2, -1)
            out = out.index_add(0, rows_, F.linear(F.silu(gate) * value, down[expert]))
        return out


class Mixture(Holder):
    def __init__(self, transposed: bool = False, batched: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = ExpertStack(transposed, batched)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        return self.after(weight[:, None] * self.experts(x, chosen))


class GroupedProducts(Holder):
    """Sorted tokens and torch's grouped matrix product, in bfloat16 as its kernel wants."""

    def __init__(self) -> None:
        super().__init__(16)
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.randn(2, 16, 16) * 0.2)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        ends = torch.tensor([3, x.shape[0]], dtype=torch.int32)
        product = torch._grouped_mm(x.bfloat16(), self.experts["up"].bfloat16(), offs=ends)
        return self.after(product.to(x.dtype))


class PackedProjection(Holder):
    """A packed in_proj that is a parameter of the module, used whole and in slices."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.linear(self.before(x), self.in_proj_weight[:16]).chunk(2, -1)
        v = F.linear(x, self.in_proj_weight[16:])
        return self.after((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class ListOfMatrices(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(8, 8) * 0.3) for _ in range(3)])
        self.named = nn.ParameterDict({"one": nn.Parameter(torch.randn(8, 8) * 0.3)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for matrix in self.matrices:
            x = (x @ matrix).tanh()
        return self.after(x @ self.named["one"])


class HeadMatrices(Holder):
    """A projection per head, used by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(2, 4, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.einsum("bi,hoi->bho", self.before(x), self.heads).flatten(1))


class KernelBank(nn.Module):
    """timm's CondConv: each sample has a convolution of its own, mixed from a bank of flattened kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(4, 3)
        self.conv = CondConv2d(4, 6, 3, padding=1, num_experts=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, torch.sigmoid(self.route(x.mean((2, 3)))))


class OwnRoot(nn.Module):
    """The matrix is a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(8, 5) * 0.3)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh() @ self.projection


def entries() -> list[Entry]:
    return [
        *hazard("raw_experts", Mixture, rows(12, 8)),
        *hazard("raw_experts_batched", lambda: Mixture(batched=True), rows(12, 8)),
        *hazard("raw_experts_transposed", lambda: Mixture(transposed=True), rows(12, 8)),
        *hazard("raw_experts_transposed_batched", lambda: Mixture(True, True), rows(12, 8)),
        # bfloat16 inside: W' is rounded to eight bits before the product
        *hazard("raw_grouped_products", GroupedProducts, rows(6, 16), parameters=("experts.up",), tolerance=3e3),
        *hazard("raw_packed_projection", PackedProjection, rows(2, 5, 8), parameters=("in_proj_weight",)),
        *hazard("raw_lists", ListOfMatrices, rows(4, 8), parameters=("matrices.*", "named.one")),
        *hazard("raw_head_matrices", HeadMatrices, rows(4, 8), parameters=("heads",)),
        *hazard("raw_kernel_bank", KernelBank, rows(2, 4, 6, 6), parameters=("conv.weight",)),
        *hazard("raw_of_the_model_itself", OwnRoot, rows(4, 8), parameters=("projection",)),
    ]
