// What the operators' orchestration (common/) needs of a GPU. The scalars stay on the device: kernels read them by
// pointer, the host never waits for them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/aten.h"
#include "common/effective_weight.h"
#include "common/factor_grads.h"
#include "common/tensor.h"

namespace mapsurgery {

struct Cuda : Aten<aoti_torch_cuda_mm_out, aoti_torch_cuda_addmm_out, aoti_torch_cuda_baddbmm_out,
                   aoti_torch_cuda_convolution, aoti_torch_cuda_convolution_backward> {
  struct Guard {
    torch::stable::accelerator::DeviceGuard guard;
    explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
  };

  // lowrank_norm.cu
  static std::tuple<Tensor, Tensor, Tensor> map_scales(const Tensor& A, const Tensor& B, const Tensor& alpha,
                                                       const Tensor& beta, const Tensor& weight_norm, double tau,
                                                       bool relative);

  // elementwise.cu; all tensors dense, those of one call in the same layout.
  static Dot dot(const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex index);
  // The same, and b *= s_w on the way if asked.
  static Dot dot_and_scale_(const Tensor& a, Tensor& b, bool scale_b, const Tensor& scales, ScaleIndex index);
  static void scale_(Tensor& t, Scale scale);
  // A contiguous copy of t, which may have any strides.
  static Tensor scaled(const Tensor& t, Scale scale);
  // t = scale t + bias[channel], for channels `channel_stride` apart.
  static void scale_and_bias_(Tensor& t, Scale scale, const std::optional<Tensor>& bias, int64_t channel_stride);
  static void add_scaled_(Tensor& t, const Tensor& other, Scale scale);
  // s_d grad - c RADIAL left right, rounded to dtype.
  static Tensor tangent(const Tensor& grad, const Tensor& left, const Tensor& right, const Tensor& c,
                        const Tensor& scales, ScalarType dtype);

  // scale a b + bias
  static Tensor scaled_mm(const Tensor& a, const Tensor& b, Scale scale, const std::optional<Tensor>& bias) {
    Tensor out = mm(a, b);
    scale_and_bias_(out, scale, bias ? std::optional(as_contiguous(*bias)) : std::nullopt, 1);
    return out;
  }

  // GEMM's own alpha would have to come from the host.
  static Folded fold(const Tensor& t, Scale scale) { return {scaled(t, scale), 1}; }

  // effective_weight.cu
  static void combine(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scales, Combine mode,
                      const Tensor& out);
};

}  // namespace mapsurgery
