// Gradients of A, B and beta from those of the product BA (`factor_grads` in mapsurgery/ops/reference.py).
#pragma once

#include "common/scales.h"
#include "common/tensor.h"

namespace mapsurgery {

// One number of the tensor `scales`.
struct Scale {
  const Tensor& scales;
  ScaleIndex index;
};

// <a, b> and its product with one of the scales, (1,) tensors.
struct Dot {
  Tensor value;
  Tensor scaled;
};

struct FactorGrads {
  Tensor A;
  Tensor B;
  Tensor beta;
};

// What the forward left for the backward.
struct Saved {
  const Tensor &A, &B, &scales, &gram_a, &gram_b;

  int64_t rank() const { return A.size(0); }
};

// dA (r, K) and dB (m, r) are the gradients still without s_d; c.value is <dL/dW', BA>. By matrix products.
template <class Device>
FactorGrads factor_grads_by_gemm(const Tensor& dA, const Tensor& dB, const Dot& c, const Saved& saved) {
  const auto& [A, B, scales, gram_a, gram_b] = saved;
  const ScalarType acc = scales.scalar_type();
  return {Device::tangent(dA, gram_b, cast(A, acc), c.value, scales, A.scalar_type()),
          Device::tangent(dB, cast(B, acc), gram_a, c.value, scales, B.scalar_type()), c.scaled};
}

}  // namespace mapsurgery
