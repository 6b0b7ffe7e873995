// What the operators' orchestration (common/) needs of a GPU. The scalars stay on the device: kernels read them by
// pointer, the host never waits for them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/aten.h"
#include "common/effective_weight.h"
#include "common/factor_grads.h"
#include "common/low_rank.h"
#include "common/tensor.h"

namespace mapsurgery {

struct Cuda : Aten<aoti_torch_cuda_mm_out, aoti_torch_cuda_addmm_out, aoti_torch_cuda_bmm_out,
                   aoti_torch_cuda_baddbmm_out, aoti_torch_cuda_convolution, aoti_torch_cuda_convolution_backward> {
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
  // The same, and b = s_w b + s_d other on the way.
  static Dot dot_and_combine_(const Tensor& a, Tensor& b, const Tensor& other, const Tensor& scales, ScaleIndex index);
  static void scale_(Tensor& t, Scale scale);
  // A contiguous copy of t, which may have any strides.
  static Tensor scaled(const Tensor& t, Scale scale);
  // t = scale t + bias[channel], for channels `channel_stride` apart.
  static void scale_and_bias_(Tensor& t, Scale scale, const std::optional<Tensor>& bias, int64_t channel_stride);
  // s_d grad - c RADIAL left right, rounded to dtype.
  static Tensor tangent(const Tensor& grad, const Tensor& left, const Tensor& right, const Tensor& c,
                        const Tensor& scales, ScalarType dtype);

  // gemm.cpp; the factors of the product are read by the GPU itself.
  // out = scales[keep] out + scales[factor] a b
  static void gemm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep,
                    ScaleIndex factor);
  // out = keep out + s_d a b, matrix by matrix
  static void accumulate_bmm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep);

  // <x, out>, and out = s_w out + s_d a b
  static Dot dot_and_accumulate_bmm_(const Tensor& x, Tensor& out, const Tensor& a, const Tensor& b,
                                     const Tensor& scales, ScaleIndex index) {
    const Dot result = dot(x, out, scales, index);
    accumulate_bmm_(out, a, b, scales, S_W);
    return result;
  }

  // scale a b
  static Tensor scaled_mm(const Tensor& a, const Tensor& b, Scale scale) {
    Tensor out = mm(a, b);
    scale_(out, scale);
    return out;
  }

  // thin.cu, for ranks up to 16
  static bool expands(const Tensor& out, int64_t rank);
  // out = keep out + s_d left right + bias, where out is not read unless `reads`; right and bias of any dtype
  static void expand_(const Tensor& out, ScaleIndex keep, bool reads, const Tensor& left, const Tensor& right,
                      const std::optional<Tensor>& bias, const Tensor& scales);

  // s_w x W + s_d h B + bias; B and bias of any dtype
  static Tensor affine(const Tensor& x, const Tensor& W, const Tensor& h, const Tensor& B,
                       const std::optional<Tensor>& bias, const Tensor& scales) {
    const ScalarType dtype = x.scalar_type();
    if (!bias) {
      Tensor y = mm(x, W);
      if (expands(y, h.size(1))) {
        expand_(y, S_W, true, h, B, bias, scales);
      } else {
        accumulate_mm_(y, h, cast(B, dtype), scales);
      }
      return y;
    }
    // The bias and the update come first: of the sum, what the large product adds is rounded once.
    Tensor y = empty({x.size(0), W.size(1)}, dtype, x);
    if (expands(y, h.size(1))) {
      expand_(y, ONE, false, h, B, bias, scales);
    } else {
      // s_d goes into B, which then has the size of W: s_d h can overflow float16 while B, and with it 1/s_d, is small.
      const Tensor rows = cast(transposed(B), dtype);
      addmm(y, cast(*bias, dtype), h, transposed(scaled(rows, {scales, S_D})), 1, 1);
    }
    gemm_(y, x, W, scales, ONE, S_W);
    return y;
  }

  // out = s_w out + s_d a b
  static void accumulate_mm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales) {
    gemm_(out, a, b, scales, S_W, S_D);
  }

  // x A^T
  static Tensor down(const Tensor& x, const Tensor& A) { return mm(x, transposed(A)); }

  // low_rank.h
  static std::tuple<Tensor, Tensor> up_backward(const Tensor& G, const Tensor& B, const Tensor& H, bool need_B) {
    return up_backward_by_gemm<Cuda>(G, B, H, need_B);
  }
  // thin.cu
  static LowRankGrads down_backward_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& H, const Tensor& dB,
                                     const Saved& saved, bool need_x, bool need_factors, bool need_alpha);
  static FactorGrads factor_grads(const Tensor& dA, const Tensor& dB, const Dot& c, const Saved& saved);

  // effective_weight.cu
  static void combine(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scales, Combine mode,
                      const Tensor& out);
};

}  // namespace mapsurgery
