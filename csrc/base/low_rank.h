// The low-rank half of an adapted layer, by matrix products: what both devices do where no kernel of their own serves.
#pragma once

#include <tuple>

#include "base/gradients.h"
#include "base/tensor.h"

namespace mapsurgery {

// out = keep out + s_d a b, of the thin factor b (r, n) of any dtype.
template <class Device>
void accumulate_mm_(Tensor& out, const Tensor& a, const Tensor& b, Scalar keep, Scalar s_d) {
  const ScalarType dtype = out.scalar_type();
  if (a.size(1) == 0) return Device::scale_(out, keep);
  if (Device::takes_scalars(dtype)) return Device::accumulate_mm_(out, a, cast(b, dtype), keep, s_d);
  Device::scale_(out, keep);
  // s_d goes into the factor, which then has the size of W: s_d a could overflow float16 while B, and 1/s_d, is small.
  Device::add_mm(out, out, a, Device::scaled(b, *s_d, dtype));
}

// G B and, where needed, G^T H: the gradients of h and B, still without s_d.
template <class Device>
std::tuple<Tensor, Tensor> up_backward_by_gemm(const Tensor& G, const Tensor& B, const Tensor& H, bool need_B) {
  return {Device::mm(G, B), need_B ? Device::mm(transposed(G), H) : Tensor()};
}

// What is left of the backward once GB = G B and GW = G W are there: <X, GW>, <GB, H> and GB^T X. Where needed, GW
// becomes the gradient of X, s_w GW + s_d GB A.
template <class Device>
Products<typename Device::Sum> down_backward_by_gemm_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& H,
                                                      const Tensor& A, Scalar s_w, Scalar s_d, bool need_x,
                                                      bool need_factors, bool need_s_w) {
  Products<typename Device::Sum> products;
  if (need_factors) {
    products.with_h = Device::dot(GB, in_layout_of(H, GB));
    products.dA = Device::mm(transposed(GB), X);
  }
  const bool scales = need_x && !Device::takes_scalars(GW.scalar_type());  // then in the pass of the inner product
  if (need_s_w) {
    const Tensor x = in_layout_of(X, GW);
    products.with_x = scales ? Device::dot_and_combine_(x, GW, s_w, nullptr, nullptr) : Device::dot(x, GW);
  }
  if (need_x) accumulate_mm_<Device>(GW, GB, A, scales && need_s_w ? nullptr : s_w, s_d);
  return products;
}

}  // namespace mapsurgery
