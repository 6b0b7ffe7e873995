// The low-rank half of an adapted Linear, by matrix products.
#pragma once

#include <tuple>

#include "common/factor_grads.h"
#include "common/tensor.h"

namespace mapsurgery {

// G B and, where needed, G^T H: the gradients of h and B, still without s_d.
template <class Device>
std::tuple<Tensor, Tensor> up_backward_by_gemm(const Tensor& G, const Tensor& B, const Tensor& H, bool need_B) {
  return {Device::mm(G, B), need_B ? Device::mm(transposed(G), H) : Tensor()};
}

struct LowRankGrads {
  Tensor alpha;
  FactorGrads factors;
};

// What is left of the backward once GB = G B, dB = G^T H and GW = G W are there: the gradients of alpha, <X, G W>, of
// A, GB^T X, and of beta, <GB, H>, with what the norm adds to those of the factors. Where needed, GW becomes the
// gradient of X, s_w GW + s_d GB A.
template <class Device>
LowRankGrads down_backward_by_gemm_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& H, const Tensor& dB,
                                    const Saved& saved, bool need_x, bool need_factors, bool need_alpha) {
  const Tensor& scales = saved.scales;
  LowRankGrads grads;
  if (need_alpha) grads.alpha = Device::dot(in_layout_of(X, GW), GW, scales, DS_W).scaled;
  if (need_x) Device::accumulate_mm_(GW, GB, cast(saved.A, X.scalar_type()), scales);
  if (need_factors) {
    const Tensor dA = Device::mm(transposed(GB), X);
    grads.factors = Device::factor_grads(dA, dB, Device::dot(GB, in_layout_of(H, GB), scales, DS_D), saved);
  }
  return grads;
}

}  // namespace mapsurgery
