// What the operators' orchestration (common/) needs of the CPU. The host may read the scalars here, so they are folded
// into the matrix products.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/aten.h"
#include "common/effective_weight.h"
#include "common/factor_grads.h"
#include "common/tensor.h"

namespace mapsurgery {

struct Cpu : Aten<aoti_torch_cpu_mm_out, aoti_torch_cpu_addmm_out, aoti_torch_cpu_bmm_out, aoti_torch_cpu_baddbmm_out,
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
  static double squared_norm(const Tensor& t);
  static Dot dot(const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex index);
  // The same, and b = s_w b + s_d other on the way.
  static Dot dot_and_combine_(const Tensor& a, Tensor& b, const Tensor& other, const Tensor& scales, ScaleIndex index);
  static void scale_(Tensor& t, Scale scale);
  // t = scale t + bias[channel], for channels `channel_stride` apart.
  static void scale_and_bias_(Tensor& t, Scale scale, const std::optional<Tensor>& bias, int64_t channel_stride);

  // scale a b
  static Tensor scaled_mm(const Tensor& a, const Tensor& b, Scale scale) {
    Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type(), a);
    addmm(out, out, a, b, 0, read(scale));
    return out;
  }

  // s_w x W + s_d h B + bias
  static Tensor affine(const Tensor& x, const Tensor& W, const Tensor& h, const Tensor& B,
                       const std::optional<Tensor>& bias, const Tensor& scales) {
    Tensor y = empty({x.size(0), W.size(1)}, x.scalar_type(), x);
    addmm(y, bias ? *bias : y, x, W, bias ? 1 : 0, read({scales, S_W}));
    addmm(y, y, h, B, 1, read({scales, S_D}));
    return y;
  }

  // out = s_w out + s_d a b
  static void accumulate_mm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales) {
    addmm(out, out, a, b, read({scales, S_W}), read({scales, S_D}));
  }

  // out = keep out + s_d a b, matrix by matrix
  static void accumulate_bmm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep) {
    baddbmm_(out, a, b, read({scales, keep}), read({scales, S_D}));
  }

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
