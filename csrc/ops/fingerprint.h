// fingerprint, ||W||_F^2 and 8 weighted sums of W in double, in one read of it. A GPU has torch's own products.
#pragma once

#include <vector>

#include "base/checks.h"

namespace mapsurgery {

constexpr int64_t kSketch = 8;

// Pseudo-random by place, uniform with variance 1: a hash of it (the finish of splitmix64).
inline double weight_at(int64_t place) {
  uint64_t x = (static_cast<uint64_t>(place) + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  return (static_cast<double>(x >> 11) * 0x1p-52 - 1) * 1.7320508075688772;
}

template <class Device>
Tensor fingerprint(const Tensor& weight) {
  check_floating("weight", weight);
  const Tensor whole = as_contiguous(weight);
  const int64_t rows = weight.dim() > 1 ? weight.size(0) : 1;
  const int64_t columns = rows == 0 ? 0 : weight.numel() / rows;
  std::vector<double> weights(columns);
  for (int64_t k = 0; k < columns; ++k) weights[k] = weight_at(k);
  Tensor result = empty({1 + kSketch}, ScalarType::Double, weight);
  Device::fingerprint(whole, rows, columns, weights.data(), static_cast<double*>(result.data_ptr()));
  return result;
}

}  // namespace mapsurgery
