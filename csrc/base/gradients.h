// What the backwards of all operators end in: the gradients of the factors and of the two scalars.
#pragma once

#include <optional>
#include <vector>

#include "base/scales.h"
#include "base/tensor.h"

namespace mapsurgery {

// What the products of a backward leave. Sum is the device's form of a sum that may still lie in parts.
template <class Sum>
struct Products {
  Tensor dA, dB;              // (r, K) and (m, r), still without s_d; undefined: 0
  std::optional<Sum> with_x;  // <x, G W>, the gradient of s_w
  std::optional<Sum> with_h;  // <G B, h> = <dL/dW', BA>, that of s_d; where it is there, the factors have gradients
};

// slopes, gram_a and gram_b of map_scales, where the backward goes on through the norm; or empty. Then the gradients
// are s_d dA - (c s_d / p^2) (B^T B) A and s_d dB - (c s_d / p^2) B (A A^T) with c = <dL/dW', BA>, and those of alpha
// and beta stand in the place of those of s_w and s_d.
using Norm = std::vector<Tensor>;

// Undefined: not asked for.
struct Gradients {
  Tensor A, B, s_w, s_d;
};

inline Tensor defined_or_nothing(const Tensor& t, ScalarType dtype, const Tensor& like) {
  return t.defined() ? t : nothing(dtype, like);
}

}  // namespace mapsurgery
