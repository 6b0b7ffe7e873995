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

// The gradients of alpha, <X, G W>, and of A, GB^T X, the latter still without s_d. Where needed, GW becomes that of X,
// s_w GW + s_d GB A.
template <class Device>
std::tuple<Tensor, Tensor> down_backward_by_gemm_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& A,
                                                  const Tensor& scales, bool need_x, bool need_A, bool need_alpha) {
  Tensor dalpha, dA;
  if (need_alpha) dalpha = Device::dot(in_layout_of(X, GW), GW, scales, DS_W).scaled;
  if (need_x) Device::accumulate_mm_(GW, GB, A, scales);
  if (need_A) dA = Device::mm(transposed(GB), X);
  return {dalpha, dA};
}

}  // namespace mapsurgery
