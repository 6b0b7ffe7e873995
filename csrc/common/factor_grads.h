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

// dA (r, K) and dB (m, r) are the gradients still without s_d; c.value is <dL/dW', BA>.
template <class Device>
FactorGrads factor_grads(const Tensor& dA, const Tensor& dB, const Dot& c, const Tensor& A, const Tensor& B,
                         const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b) {
  const ScalarType acc = scales.scalar_type();
  return {Device::tangent(dA, gram_b, cast(A, acc), c.value, scales, A.scalar_type()),
          Device::tangent(dB, cast(B, acc), gram_a, c.value, scales, B.scalar_type()), c.scaled};
}

}  // namespace mapsurgery
