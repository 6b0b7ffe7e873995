// What the operators (ops/) need of a GPU. The scalars stay on the device: kernels read them by pointer, the host never
// waits for them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include "base/aten.h"
#include "base/low_rank.h"
#include "ops/effective_weight.h"
#include "ops/map_scales.h"

namespace mapsurgery {

// A sum whose parts lie on the GPU, `step` apart; who reads it adds them up, in the same order every time.
struct Parts {
  Tensor numbers;
  int64_t first, count, step;
};

struct Cuda : Aten<aoti_torch_cuda_mm_out, aoti_torch_cuda_addmm_out, aoti_torch_cuda_bmm_out,
                   aoti_torch_cuda_baddbmm_out, aoti_torch_cuda_convolution, aoti_torch_cuda_convolution_backward> {
  using Sum = Parts;

  struct Guard {
    torch::stable::accelerator::DeviceGuard guard;
    explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
  };

  // Every dtype is computed in as it is.
  struct AsItIs {
    const Tensor& in(const Tensor& t) const { return t; }
    const Tensor& out(const Tensor& t) const { return t; }
  };
  static AsItIs widening(const Tensor&) { return {}; }
  static AsItIs widening_of_rows(const Tensor&) { return {}; }

  // Whether products read factors from the device (gemm.cpp).
  static bool takes_scalars(ScalarType) {
#ifdef MAPSURGERY_CUBLAS
    return true;
#else
    return false;
#endif
  }

  // map_scales.cu
  static void fill(Scales& scales, const Tensor& A, const Tensor& B, const Tensor& alpha, const Tensor& beta,
                   const Tensor& weight_norm, double tau, bool relative);
  // gradients.cu
  static Gradients gradients(const Products<Sum>& products, const Tensor& A, const Tensor& B, Scalar s_d,
                             const Norm& norm);

  // elementwise.cu; all tensors dense, those of one call in the same layout.
  static Sum sum_of(const Tensor& value) { return {value, 0, 1, 1}; }
  static Sum dot(const Tensor& a, const Tensor& b);
  // <a, b>, and b = keep b + s_d other on the way; other may be null.
  static Sum dot_and_combine_(const Tensor& a, Tensor& b, Scalar keep, const Tensor* other, Scalar s_d);
  static void scale_(Tensor& t, Scalar scale);
  // t = scale t + bias[channel], for channels `channel_stride` apart.
  static void scale_and_bias_(Tensor& t, Scalar scale, const std::optional<Tensor>& bias, int64_t channel_stride);
  // Where a 1 of this dtype, float or double, lies on the device.
  static const void* one(ScalarType dtype);

  // combine.cu
  static void combine(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& s_w, const Tensor& s_d,
                      Combine mode, const Tensor& out);
  // scale t, a contiguous matrix; t of any strides.
  static Tensor scaled(const Tensor& t, const Tensor& scale, ScalarType dtype);

  // gemm.cpp: out = keep out + factor a b, and the same matrix by matrix; a has columns
  static void accumulate_mm_(Tensor& out, const Tensor& a, const Tensor& b, Scalar keep, Scalar factor);
  static void accumulate_bmm_(Tensor& out, const Tensor& a, const Tensor& b, Scalar keep, Scalar factor);

  // <x, out>, and out = s_w out + s_d a b
  static Sum dot_and_accumulate_bmm_(const Tensor& x, Tensor& out, const Tensor& a, const Tensor& b, Scalar s_w,
                                     Scalar s_d) {
    const Sum result = dot(x, out);
    accumulate_bmm_(out, a, b, s_w, s_d);
    return result;
  }

  // expand.cu, for ranks up to 16
  static bool expands(const Tensor& out, int64_t rank);
  // out = keep out + s_d left right + bias, where out is not read unless `reads`; right and bias of any dtype
  static void expand_(const Tensor& out, Scalar keep, bool reads, const Tensor& left, const Tensor& right,
                      const std::optional<Tensor>& bias, Scalar s_d);

  // s_w x W + s_d h B + bias; B and bias of any dtype
  static Tensor affine(const Tensor& x, const Tensor& W, const Tensor& h, const Tensor& B,
                       const std::optional<Tensor>& bias, Scalar s_w, Scalar s_d) {
    const ScalarType dtype = x.scalar_type();
    if (bias && takes_scalars(dtype)) {
      // The bias and the update come first: of the sum, what the large product adds is rounded once.
      Tensor y = empty({x.size(0), W.size(1)}, dtype, x);
      if (expands(y, h.size(1))) {
        expand_(y, nullptr, false, h, B, bias, s_d);
      } else {
        add_mm(y, cast(*bias, dtype), h, scaled(B, *s_d, dtype));
      }
      accumulate_mm_(y, x, W, nullptr, s_w);
      return y;
    }
    Tensor y = mm(x, W);
    if (expands(y, h.size(1))) {
      expand_(y, s_w, true, h, B, bias, s_d);
    } else {
      if (bias) scale_and_bias_(y, s_w, as_contiguous(cast(*bias, dtype)), 1);
      mapsurgery::accumulate_mm_<Cuda>(y, h, B, bias ? nullptr : s_w, s_d);
    }
    return y;
  }

  // x A^T
  static Tensor down(const Tensor& x, const Tensor& A) { return mm(x, transposed(A)); }

  // low_rank.h
  static std::tuple<Tensor, Tensor> up_backward(const Tensor& G, const Tensor& B, const Tensor& H, bool need_B) {
    return up_backward_by_gemm<Cuda>(G, B, H, need_B);
  }
  // expand.cu
  static Products<Sum> down_backward_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& H, const Tensor& A,
                                      Scalar s_w, Scalar s_d, bool need_x, bool need_factors, bool need_s_w);
};

}  // namespace mapsurgery
