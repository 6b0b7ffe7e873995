"""Schemas of the operators, for where no native library defines them. The native definition stands in csrc/ops.cpp;
a test holds the two equal.
"""

_FACTORS = "Tensor A, Tensor B, Tensor alpha, Tensor beta, Tensor weight_norm, float tau, bool relative"
_GIVEN = "Tensor scales, Tensor gram_a, Tensor gram_b"
_SAVED = f"Tensor A, Tensor B, {_GIVEN}"
_CONV = "int[] stride, int[] padding, int[] dilation, int groups, bool weight_space"
_NEEDS = "bool need_x, bool need_weight, bool need_bias, bool need_factors, bool need_alpha"
_FORWARD = "(Tensor y, Tensor h, Tensor scales, Tensor gram_a, Tensor gram_b)"
_GRADS = "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB, Tensor dalpha, Tensor dbeta)"

SCHEMAS: dict[str, str] = {
    "squared_norm": "(Tensor weight) -> Tensor",
    "lowrank_norm": "(Tensor A, Tensor B) -> (Tensor norm, Tensor gram_a, Tensor gram_b)",
    "map_scales": f"({_FACTORS}) -> (Tensor scales, Tensor gram_a, Tensor gram_b)",
    "map_scales_many": (
        "(Tensor[] A, Tensor[] B, Tensor[] alpha, Tensor[] beta, Tensor[] weight_norm, float[] tau, bool[] relative)"
        " -> (Tensor[] scales, Tensor[] gram_a, Tensor[] gram_b)"
    ),
    "map_linear": f"(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}) -> {_FORWARD}",
    "map_linear_given": f"(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, {_GIVEN}) -> (Tensor y, Tensor h)",
    "map_linear_backward": f"(Tensor grad, Tensor x, Tensor h, Tensor weight, {_SAVED}, {_NEEDS}) -> {_GRADS}",
    "map_conv": f"(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, {_CONV}) -> {_FORWARD}",
    "map_conv_given": f"(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, {_CONV}, {_GIVEN}) -> (Tensor y, Tensor h)",
    "map_conv_backward": f"(Tensor grad, Tensor x, Tensor h, Tensor weight, {_SAVED}, {_CONV}, {_NEEDS}) -> {_GRADS}",
    "effective_weight": (
        f"(Tensor weight, {_FACTORS}, ScalarType? dtype) -> (Tensor w, Tensor scales, Tensor gram_a, Tensor gram_b)"
    ),
    "effective_weight_backward": (
        f"(Tensor grad, Tensor weight, {_SAVED}, bool need_weight)"
        " -> (Tensor dweight, Tensor dA, Tensor dB, Tensor dalpha, Tensor dbeta)"
    ),
    "merge_": f"(Tensor(a!) weight, {_FACTORS}) -> ()",
    "unmerge_": f"(Tensor(a!) weight, {_FACTORS}) -> ()",
}
