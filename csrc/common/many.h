// The scalars of many layers at once: what the two devices' map_scales_many share.
#pragma once

#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/tensor.h"

namespace mapsurgery {

// scales, gram_a and gram_b, layer by layer.
using Many = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

inline void check_count(const char* name, size_t count, size_t layers) {
  STD_TORCH_CHECK(count == layers, "mapsurgery: ", name, " has ", count, " entries, but A has ", layers);
}

// Layers of one call share a device and a dtype.
inline void check_many(const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<Tensor>& alpha,
                       const std::vector<Tensor>& beta, const std::vector<Tensor>& weight_norm,
                       const std::vector<double>& tau, const std::vector<bool>& relative) {
  check_count("B", B.size(), A.size());
  check_count("alpha", alpha.size(), A.size());
  check_count("beta", beta.size(), A.size());
  check_count("weight_norm", weight_norm.size(), A.size());
  check_count("tau", tau.size(), A.size());
  check_count("relative", relative.size(), A.size());
  for (size_t i = 0; i < A.size(); ++i) {
    check_factors(A[i], B[i]);
    check_scalars(alpha[i], beta[i], weight_norm[i], A[i]);
    check_dtype("A", A[i], A[0].scalar_type(), "the dtype of the first A");
    check_device("A", A[i], "the first A", A[0]);
  }
}

inline void append(Many& results, const std::tuple<Tensor, Tensor, Tensor>& layer) {
  std::get<0>(results).push_back(std::get<0>(layer));
  std::get<1>(results).push_back(std::get<1>(layer));
  std::get<2>(results).push_back(std::get<2>(layer));
}

}  // namespace mapsurgery
