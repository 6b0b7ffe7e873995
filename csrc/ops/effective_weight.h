// effective_weight, W' = s_w W + s_d BA, its backward, and merging it into the weight in place.
#pragma once

#include "base/checks.h"
#include "base/gradients.h"

namespace mapsurgery {

// What `combine` writes: s_w W + s_d BA, or the inverse (W - s_d BA) / s_w.
enum class Combine { kMerge, kUnmerge };

// s_w W + s_d BA, in the weight's own order of dimensions, as element-wise operations of torch would leave it.
template <class Device>
Tensor combined(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& s_w, const Tensor& s_d,
                ScalarType dtype) {
  const int64_t m = weight.size(0), K = weight.size(1);
  Tensor out = is_column_major(weight) ? empty_strided({m, K}, {1, m}, dtype, weight) : empty({m, K}, dtype, weight);
  Device::combine(weight, A, B, s_w, s_d, Combine::kMerge, out);
  return out;
}

inline void check_combination(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& s_w,
                              const Tensor& s_d) {
  check_factors(A, B);
  check_scales(s_w, s_d, A);
  check_matrix(weight, A, B);
}

template <class Device>
Tensor effective_weight(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& s_w, const Tensor& s_d,
                        std::optional<ScalarType> dtype) {
  check_combination(weight, A, B, s_w, s_d);
  const ScalarType out_dtype = dtype.value_or(weight.scalar_type());
  STD_TORCH_CHECK(is_floating(out_dtype), "mapsurgery: dtype must be floating, got ", toString(out_dtype));
  typename Device::Guard guard(weight);
  return combined<Device>(weight, A, B, s_w, s_d, out_dtype);
}

// Gradients of the factors and scalars, by D = dL/dW'.
template <class Device>
Gradients weight_gradients(const Tensor& D, const Tensor& weight, const Tensor& A, const Tensor& B, Scalar s_d,
                           const Norm& norm, bool need_factors = true, bool need_s_w = true) {
  Products<typename Device::Sum> products;
  if (need_factors) {
    const Tensor left = cast(B, D.scalar_type()), right = cast(A, D.scalar_type());
    products.dA = Device::mm(transposed(left), D);
    products.dB = Device::mm(D, transposed(right));
    products.with_h = Device::dot(products.dA, in_layout_of(right, products.dA));
  }
  if (need_s_w) products.with_x = Device::dot(D, in_layout_of(weight, D));
  return Device::gradients(products, A, B, s_d, norm);
}

// grad in the dtype that its products run in.
inline Tensor accumulated(const Tensor& grad, const Tensor& A) {
  return as_contiguous(cast(grad, accumulate_dtype(grad.scalar_type(), A.scalar_type())));
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> effective_weight_backward(const Tensor& grad, const Tensor& weight,
                                                                             const Tensor& A, const Tensor& B,
                                                                             const Tensor& s_w, const Tensor& s_d,
                                                                             bool need_weight) {
  check_combination(weight, A, B, s_w, s_d);
  check_floating("grad", grad);
  check_dim("grad", grad, 2);
  check_size("grad", grad, 0, weight.size(0), "the weight's rows");
  check_size("grad", grad, 1, weight.size(1), "the weight's columns");
  check_device("grad", grad, "A", A);
  typename Device::Guard guard(weight);
  const Tensor D = accumulated(grad, A);
  const Gradients grads = weight_gradients<Device>(D, weight, A, B, &s_d, {});
  const Tensor dweight = need_weight ? Device::scaled(D, s_w, weight.scalar_type()) : Tensor();
  return {defined_or_nothing(dweight, weight.scalar_type(), weight), grads.A, grads.B, grads.s_w, grads.s_d};
}

template <class Device, Combine mode>
void combine_in_place(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& s_w, const Tensor& s_d) {
  check_combination(weight, A, B, s_w, s_d);
  check_writable("weight", weight);
  typename Device::Guard guard(weight);
  Device::combine(weight, A, B, s_w, s_d, mode, weight);
}

}  // namespace mapsurgery
