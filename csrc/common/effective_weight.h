// The effective weight W' = s_w W + s_d BA, its backward, and merging it into the weight in place.
#pragma once

#include "common/checks.h"
#include "common/factor_grads.h"
#include "common/tensor.h"

namespace mapsurgery {

// What `combine` writes: s_w W + s_d BA, or the inverse (W - s_d BA) / s_w.
enum class Combine { kMerge, kUnmerge };

// s_w W + s_d BA, in the weight's own order of dimensions, as element-wise operations of torch would leave it.
template <class Device>
Tensor combined(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scales, ScalarType dtype) {
  const int64_t m = weight.size(0), K = weight.size(1);
  Tensor out = is_column_major(weight) ? empty_strided({m, K}, {1, m}, dtype, weight) : empty({m, K}, dtype, weight);
  Device::combine(weight, A, B, scales, Combine::kMerge, out);
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> effective_weight(const Tensor& weight, const Tensor& A, const Tensor& B,
                                                            const Tensor& alpha, const Tensor& beta,
                                                            const Tensor& weight_norm, double tau, bool relative,
                                                            std::optional<ScalarType> dtype) {
  check_factors(A, B);
  check_scalars(alpha, beta, weight_norm, A);
  check_matrix(weight, A, B);
  typename Device::Guard guard(weight);
  auto [scales, gram_a, gram_b] = Device::map_scales(A, B, alpha, beta, weight_norm, tau, relative);
  const ScalarType out_dtype = dtype.value_or(weight.scalar_type());
  STD_TORCH_CHECK(is_floating(out_dtype), "mapsurgery: dtype must be floating, got ", toString(out_dtype));
  return {combined<Device>(weight, A, B, scales, out_dtype), scales, gram_a, gram_b};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> effective_weight_backward(const Tensor& grad, const Tensor& weight,
                                                                             const Tensor& A, const Tensor& B,
                                                                             const Tensor& scales, const Tensor& gram_a,
                                                                             const Tensor& gram_b, bool need_weight) {
  check_saved(A, B, scales, gram_a, gram_b);
  check_matrix(weight, A, B);
  check_floating("grad", grad);
  check_dim("grad", grad, 2);
  check_size("grad", grad, 0, weight.size(0), "the weight's rows");
  check_size("grad", grad, 1, weight.size(1), "the weight's columns");
  check_device("grad", grad, "A", A);
  typename Device::Guard guard(weight);

  const ScalarType acc = accumulate_dtype(grad.scalar_type(), A.scalar_type());
  const Tensor D = as_contiguous(cast(grad, acc)), left = cast(B, acc), right = cast(A, acc);
  const Tensor BD = Device::mm(transposed(left), D);
  FactorGrads factors =
      Device::factor_grads(BD, Device::mm(D, transposed(right)), Device::dot(BD, in_layout_of(right, BD), scales, DS_D),
                           {A, B, scales, gram_a, gram_b});
  Tensor dalpha = Device::dot(D, in_layout_of(weight, D), scales, DS_W).scaled;
  Tensor dweight = nothing(weight.scalar_type(), weight);
  if (need_weight) {
    Tensor scaled = torch::stable::clone(D);
    Device::scale_(scaled, {scales, S_W});
    dweight = cast(scaled, weight.scalar_type());
  }
  return {dweight, factors.A, factors.B, dalpha, factors.beta};
}

template <class Device, Combine mode>
void combine_in_place(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& alpha, const Tensor& beta,
                      const Tensor& weight_norm, double tau, bool relative) {
  check_factors(A, B);
  check_scalars(alpha, beta, weight_norm, A);
  check_matrix(weight, A, B);
  check_writable("weight", weight);
  typename Device::Guard guard(weight);
  const Tensor scales = std::get<0>(Device::map_scales(A, B, alpha, beta, weight_norm, tau, relative));
  Device::combine(weight, A, B, scales, mode, weight);
}

}  // namespace mapsurgery
