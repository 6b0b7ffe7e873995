// squared_norm, ||W||_F^2 in double. A GPU has torch's own reduction, one read of the weight.
#pragma once

#include <algorithm>
#include <numeric>

#include "base/checks.h"

namespace mapsurgery {

// Whether the numbers of t fill one piece of memory, in any order of its dimensions.
inline bool is_dense(const Tensor& t) {
  const Sizes sizes = sizes_of(t), strides = strides_of(t);
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (size_t i : order) {
    if (sizes[i] == 1) continue;
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

template <class Device>
Tensor squared_norm(const Tensor& weight) {
  check_floating("weight", weight);
  Tensor result = empty({1}, ScalarType::Double, weight);
  *static_cast<double*>(result.data_ptr()) = Device::squared_norm(is_dense(weight) ? weight : as_contiguous(weight));
  return result;
}

}  // namespace mapsurgery
