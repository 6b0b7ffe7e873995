// lowrank_linear, y = s_w x W^T + s_d (x A^T) B^T + bias, and its backward: one orchestration for both devices.
//
// `Device` (cpu/device.h, cuda/device.h) supplies the products and the few fused element-wise passes. s_w and s_d stay
// where they are: only Device decides whether the host may read them.
#pragma once

#include "base/aten.h"
#include "base/checks.h"
#include "base/low_rank.h"

namespace mapsurgery {

using Forward = std::tuple<Tensor, Tensor>;
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
Forward lowrank_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                       const Tensor& B, const Tensor& s_w, const Tensor& s_d) {
  check_factors(A, B);
  check_scales(s_w, s_d, A);
  check_matrix(weight, A, B);
  check_input(x, A);
  check_size("x", x, -1, weight.size(1), "the weight's columns");
  check_bias(bias, weight.size(0), A);
  typename Device::Guard guard(x);

  const auto call = Device::widening_of_rows(x);
  const Tensor X = as_rows(call.in(x));
  const ScalarType dtype = X.scalar_type();
  Tensor h = Device::down(X, cast(A, dtype));
  Tensor y = Device::affine(X, transposed(cast(weight, dtype)), h, transposed(B), bias, &s_w, &s_d);
  if (x.dim() != 2) {
    y = reshaped(y, with_last(sizes_of(x), weight.size(0)));
    h = reshaped(h, with_last(sizes_of(x), A.size(0)));
  }
  return {call.out(y), call.out(h)};
}

// The results of a backward; what was not asked for is an empty tensor.
inline Grads all_gradients(const Tensor& dx, const Tensor& dweight, const Tensor& dbias, const Gradients& grads,
                           const Tensor& x, const Tensor& A, const Tensor& s_w) {
  const ScalarType dtype = x.scalar_type();
  return {defined_or_nothing(dx, dtype, x),
          defined_or_nothing(dweight, dtype, x),
          defined_or_nothing(dbias, dtype, x),
          defined_or_nothing(grads.A, A.scalar_type(), A),
          defined_or_nothing(grads.B, A.scalar_type(), A),
          defined_or_nothing(grads.s_w, s_w.scalar_type(), s_w),
          defined_or_nothing(grads.s_d, s_w.scalar_type(), s_w)};
}

// A matrix that GEMM can take as it stands; else (the expanded gradient of a sum) one copy instead of one per product.
inline Tensor gemm_ready(const Tensor& t) {
  const bool rows = t.stride(1) == 1 && t.stride(0) >= t.size(1);
  const bool columns = t.stride(0) == 1 && t.stride(1) >= t.size(0);
  return rows || columns ? t : torch::stable::contiguous(t);
}

template <class Device>
Grads lowrank_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight,
                              const Tensor& A, const Tensor& B, const Tensor& s_w, const Tensor& s_d, const Norm& norm,
                              bool need_x, bool need_weight, bool need_bias, bool need_factors, bool need_s_w) {
  check_factors(A, B);
  check_scales(s_w, s_d, A);
  check_norm(norm, A);
  check_matrix(weight, A, B);
  check_input(x, A);
  check_size("x", x, -1, weight.size(1), "the weight's columns");
  check_grad(grad, x);
  check_size("grad", grad, -1, weight.size(0), "the weight's rows");
  check_dtype("h", h, x.scalar_type(), "the dtype of x");
  check_size("h", h, -1, A.size(0), "the rank");
  check_device("h", h, "x", x);
  typename Device::Guard guard(x);

  const auto call = Device::widening(x);
  const Tensor G = gemm_ready(as_rows(call.in(grad))), X = as_rows(call.in(x)), H = as_rows(call.in(h));
  check_size("grad", G, 0, X.size(0), "the rows of x");
  check_size("h", H, 0, X.size(0), "the rows of x");
  const ScalarType dtype = X.scalar_type();
  Tensor dx, dweight, dbias, dB, GB, GW;
  if (need_x || need_factors) std::tie(GB, dB) = Device::up_backward(G, cast(B, dtype), H, need_factors);
  if (need_x || need_s_w) GW = Device::mm(G, cast(weight, dtype));
  auto products = Device::down_backward_(X, GW, GB, H, A, &s_w, &s_d, need_x, need_factors, need_s_w);
  products.dB = dB;
  const Gradients grads = Device::gradients(products, A, B, &s_d, norm);
  if (need_x) dx = call.out(reshaped(GW, sizes_of(x)));
  if (need_weight) {
    Tensor product = Device::mm(transposed(G), X);
    Device::scale_(product, &s_w);
    dweight = cast(product, weight.scalar_type());
  }
  if (need_bias) dbias = call.out(sum_over(G, {0}));
  return all_gradients(dx, dweight, dbias, grads, x, A, s_w);
}

}  // namespace mapsurgery
