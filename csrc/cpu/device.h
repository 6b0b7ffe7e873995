// What the operators' orchestration (common/) needs of the CPU. The host may read the scalars here, so they are folded
// into the matrix products.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/aten.h"
#include "common/effective_weight.h"
#include "common/factor_grads.h"
#include "common/tensor.h"

namespace mapsurgery {

struct Cpu : Aten<aoti_torch_cpu_mm_out, aoti_torch_cpu_addmm_out, aoti_torch_cpu_baddbmm_out,
                  aoti_torch_cpu_convolution, aoti_torch_cpu_convolution_backward> {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  // lowrank_norm.cpp
  static std::tuple<Tensor, Tensor, Tensor> map_scales(const Tensor& A, const Tensor& B, const Tensor& alpha,
                                                       const Tensor& beta, const Tensor& weight_norm, double tau,
                                                       bool relative);

  // elementwise.cpp; all tensors dense, those of one call in the same layout.
  static double read(Scale scale);
  static Dot dot(const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex index);
  // The same, and b *= s_w on the way if asked.
  static Dot dot_and_scale_(const Tensor& a, Tensor& b, bool scale_b, const Tensor& scales, ScaleIndex index);
  static void scale_(Tensor& t, Scale scale);
  // t = scale t + bias[channel], for channels `channel_stride` apart.
  static void scale_and_bias_(Tensor& t, Scale scale, const std::optional<Tensor>& bias, int64_t channel_stride);
  static void add_scaled_(Tensor& t, const Tensor& other, Scale scale);

  // scale a b + bias
  static Tensor scaled_mm(const Tensor& a, const Tensor& b, Scale scale, const std::optional<Tensor>& bias) {
    Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type(), a);
    addmm(out, bias ? *bias : out, a, b, bias ? 1 : 0, read(scale));
    return out;
  }

  static Folded fold(const Tensor& t, Scale scale) { return {t, read(scale)}; }

  // s_d grad - c RADIAL left right, rounded to dtype.
  static Tensor tangent(const Tensor& grad, const Tensor& left, const Tensor& right, const Tensor& c,
                        const Tensor& scales, ScalarType dtype) {
    const Tensor self = cast(grad, scales.scalar_type());
    Tensor out = empty(sizes_of(grad), scales.scalar_type(), grad);
    addmm(out, self, left, right, read({scales, S_D}), -read({c, S_W}) * read({scales, RADIAL}));
    return cast(out, dtype);
  }

  // effective_weight.cpp
  static void combine(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scales, Combine mode,
                      const Tensor& out);
};

}  // namespace mapsurgery
