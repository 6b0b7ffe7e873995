// map_linear and its backward: one orchestration of matrix products for both devices.
//
// `Device` (cpu/device.h, cuda/device.h) supplies the products and the few fused element-wise passes. The scalars of
// the layer stay where `scales` is: a Scale names one of them, and only Device decides whether the host may read it.
#pragma once

#include "common/aten.h"
#include "common/checks.h"
#include "common/factor_grads.h"
#include "common/tensor.h"

namespace mapsurgery {

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Given = std::tuple<Tensor, Tensor>;
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline void check_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                         const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm) {
  check_factors(A, B);
  check_scalars(alpha, beta, weight_norm, A);
  check_matrix(weight, A, B);
  check_input(x, A);
  check_size("x", x, -1, weight.size(1), "the weight's columns");
  check_bias(bias, weight.size(0), A);
}

// y and h, with the scalars of the layer.
template <class Device>
Given linear_with(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                  const Tensor& B, const Tensor& scales) {
  const ScalarType dtype = x.scalar_type();
  const Tensor X = as_rows(x);
  Tensor h = Device::down(X, cast(A, dtype));
  Tensor y = Device::affine(X, transposed(cast(weight, dtype)), h, transposed(B), bias, scales);
  if (x.dim() != 2) {
    y = reshaped(y, with_last(sizes_of(x), weight.size(0)));
    h = reshaped(h, with_last(sizes_of(x), A.size(0)));
  }
  return {y, h};
}

template <class Device>
Forward map_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                   const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, double tau,
                   bool relative) {
  check_linear(x, weight, bias, A, B, alpha, beta, weight_norm);
  typename Device::Guard guard(x);
  const auto [scales, gram_a, gram_b] = Device::map_scales(A, B, alpha, beta, weight_norm, tau, relative);
  const auto [y, h] = linear_with<Device>(x, weight, bias, A, B, scales);
  return {y, h, scales, gram_a, gram_b};
}

// The same where the scalars and Gram matrices are there already; the numbers they came of are for autograd.
template <class Device>
Given map_linear_given(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                       const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, double,
                       bool, const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b) {
  check_linear(x, weight, bias, A, B, alpha, beta, weight_norm);
  check_saved(A, B, scales, gram_a, gram_b);
  typename Device::Guard guard(x);
  return linear_with<Device>(x, weight, bias, A, B, scales);
}

// What was not asked for is an empty tensor.
inline Grads or_nothing(const Grads& grads, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scales) {
  const auto defined = [](const Tensor& t, const Tensor& like) {
    return t.defined() ? t : nothing(like.scalar_type(), like);
  };
  const auto& [dx, dweight, dbias, dA, dB, dalpha, dbeta] = grads;
  return {defined(dx, x), defined(dweight, x),     defined(dbias, x),     defined(dA, A),
          defined(dB, B), defined(dalpha, scales), defined(dbeta, scales)};
}

// A matrix that GEMM can take as it stands; else (the expanded gradient of a sum) one copy instead of one per product.
inline Tensor gemm_ready(const Tensor& t) {
  const bool rows = t.stride(1) == 1 && t.stride(0) >= t.size(1);
  const bool columns = t.stride(0) == 1 && t.stride(1) >= t.size(0);
  return rows || columns ? t : torch::stable::contiguous(t);
}

template <class Device>
Grads map_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight, const Tensor& A,
                          const Tensor& B, const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b,
                          bool need_x, bool need_weight, bool need_bias, bool need_factors, bool need_alpha) {
  check_saved(A, B, scales, gram_a, gram_b);
  check_matrix(weight, A, B);
  check_input(x, A);
  check_size("x", x, -1, weight.size(1), "the weight's columns");
  check_grad(grad, x);
  check_size("grad", grad, -1, weight.size(0), "the weight's rows");
  check_dtype("h", h, x.scalar_type(), "the dtype of x");
  check_size("h", h, -1, A.size(0), "the rank");
  check_device("h", h, "x", x);
  typename Device::Guard guard(x);

  const ScalarType dtype = x.scalar_type();
  const Tensor G = gemm_ready(as_rows(grad)), X = as_rows(x), H = as_rows(h);
  check_size("grad", G, 0, X.size(0), "the rows of x");
  check_size("h", H, 0, X.size(0), "the rows of x");
  Tensor dx, dweight, dbias, dB, GB, GW;
  if (need_x || need_factors) std::tie(GB, dB) = Device::up_backward(G, cast(B, dtype), H, need_factors);
  if (need_x || need_alpha) GW = Device::mm(G, cast(weight, dtype));
  const auto [dalpha, factors] =
      Device::down_backward_(X, GW, GB, H, dB, {A, B, scales, gram_a, gram_b}, need_x, need_factors, need_alpha);
  if (need_x) dx = reshaped(GW, sizes_of(x));
  if (need_weight) {
    dweight = cast(Device::scaled_mm(transposed(G), X, {scales, S_W}), weight.scalar_type());
  }
  if (need_bias) dbias = sum_over(G, {0});
  return or_nothing({dx, dweight, dbias, factors.A, factors.B, dalpha, factors.beta}, x, A, B, scales);
}

}  // namespace mapsurgery
