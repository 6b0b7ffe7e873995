// Schemas of the operators. mapsurgery/ops/schemas.py spells the same for where this library is not built; what each
// operator computes is defined by mapsurgery/ops/reference.py.
//
// They stand here, free of Python, so that a C++ program that loads this library can run an exported model.

#include <torch/csrc/stable/library.h>

#define FACTORS "Tensor A, Tensor B, Tensor alpha, Tensor beta, Tensor weight_norm, float tau, bool relative"
#define GIVEN "Tensor scales, Tensor gram_a, Tensor gram_b"
#define SAVED "Tensor A, Tensor B, " GIVEN
#define CONV "int[] stride, int[] padding, int[] dilation, int groups, bool weight_space"
#define NEEDS "bool need_x, bool need_weight, bool need_bias, bool need_factors, bool need_alpha"
#define FORWARD "(Tensor y, Tensor h, Tensor scales, Tensor gram_a, Tensor gram_b)"
#define GRADS "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB, Tensor dalpha, Tensor dbeta)"

STABLE_TORCH_LIBRARY(mapsurgery, m) {
  m.def("squared_norm(Tensor weight) -> Tensor");
  m.def("lowrank_norm(Tensor A, Tensor B) -> (Tensor norm, Tensor gram_a, Tensor gram_b)");
  m.def("map_scales(" FACTORS ") -> (Tensor scales, Tensor gram_a, Tensor gram_b)");
  m.def(
      "map_scales_many(Tensor[] A, Tensor[] B, Tensor[] alpha, Tensor[] beta, Tensor[] weight_norm, float[] tau, "
      "bool[] relative) -> (Tensor[] scales, Tensor[] gram_a, Tensor[] gram_b)");
  m.def("map_linear(Tensor x, Tensor weight, Tensor? bias, " FACTORS ") -> " FORWARD);
  m.def("map_linear_given(Tensor x, Tensor weight, Tensor? bias, " FACTORS ", " GIVEN ") -> (Tensor y, Tensor h)");
  m.def("map_linear_backward(Tensor grad, Tensor x, Tensor h, Tensor weight, " SAVED ", " NEEDS ") -> " GRADS);
  m.def("map_conv(Tensor x, Tensor weight, Tensor? bias, " FACTORS ", " CONV ") -> " FORWARD);
  m.def("map_conv_given(Tensor x, Tensor weight, Tensor? bias, " FACTORS ", " CONV ", " GIVEN
        ") -> (Tensor y, Tensor h)");
  m.def("map_conv_backward(Tensor grad, Tensor x, Tensor h, Tensor weight, " SAVED ", " CONV ", " NEEDS ") -> " GRADS);
  m.def("effective_weight(Tensor weight, " FACTORS
        ", ScalarType? dtype) -> (Tensor w, Tensor scales, Tensor gram_a, Tensor gram_b)");
  m.def("effective_weight_backward(Tensor grad, Tensor weight, " SAVED
        ", bool need_weight) -> (Tensor dweight, Tensor dA, Tensor dB, Tensor dalpha, Tensor dbeta)");
  m.def("merge_(Tensor(a!) weight, " FACTORS ") -> ()");
  m.def("unmerge_(Tensor(a!) weight, " FACTORS ") -> ()");
}
