// map_scales, s_w and s_d of a layer by the norm ||BA||_F, and its backward.
#pragma once

#include "base/checks.h"
#include "base/gradients.h"

namespace mapsurgery {

// s_w, s_d, slopes, gram_a and gram_b, to be filled in.
struct Scales {
  Tensor s_w, s_d, slopes, gram_a, gram_b;

  explicit Scales(const Tensor& A) {
    const ScalarType acc = accumulate_dtype(A.scalar_type());
    s_w = empty({1}, acc, A);
    s_d = empty({1}, acc, A);
    slopes = empty({NUM_SLOPES}, acc, A);
  }

  template <class acc_t>
  ScalesOut<acc_t> out() const {
    const auto data = [](const Tensor& t) { return static_cast<acc_t*>(t.data_ptr()); };
    return {data(s_w), data(s_d), data(slopes)};
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> map_scales(const Tensor& A, const Tensor& B, const Tensor& alpha,
                                                              const Tensor& beta, const Tensor& weight_norm, double tau,
                                                              bool relative) {
  check_factors(A, B);
  check_scalar("alpha", alpha, A);
  check_scalar("beta", beta, A);
  check_scalar("weight_norm", weight_norm, A);
  typename Device::Guard guard(A);
  Scales scales(A);
  Device::fill(scales, A, B, alpha, beta, weight_norm, tau, relative);
  return {scales.s_w, scales.s_d, scales.slopes, scales.gram_a, scales.gram_b};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> map_scales_backward(const Tensor& ds_w, const Tensor& ds_d, const Tensor& A,
                                                               const Tensor& B, const Tensor& slopes,
                                                               const Tensor& gram_a, const Tensor& gram_b) {
  check_factors(A, B);
  check_scalar("ds_w", ds_w, A);
  check_scalar("ds_d", ds_d, A);
  const Norm norm{slopes, gram_a, gram_b};
  check_norm(norm, A);
  typename Device::Guard guard(A);
  Products<typename Device::Sum> products;
  products.with_x = Device::sum_of(ds_w);
  products.with_h = Device::sum_of(ds_d);
  const Gradients grads = Device::gradients(products, A, B, nullptr, norm);
  return {grads.A, grads.B, grads.s_w, grads.s_d};
}

}  // namespace mapsurgery
