// What the operators' orchestration (common/) needs of the CPU. The host may read the scalars here, so they are folded
// into the matrix products.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>

#include "common/aten.h"
#include "common/effective_weight.h"
#include "common/factor_grads.h"
#include "common/low_rank.h"
#include "common/tensor.h"
#include "cpu/thin.h"

namespace mapsurgery {

struct Cpu : Aten<aoti_torch_cpu_mm_out, aoti_torch_cpu_addmm_out, aoti_torch_cpu_bmm_out, aoti_torch_cpu_baddbmm_out,
                  aoti_torch_cpu_convolution, aoti_torch_cpu_convolution_backward> {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  // As in aten.h. Small products of torch 2.14 forget a factor of NaN, which would hide that a training diverged.
  static void addmm(Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha) {
    Aten::addmm(out, self, a, b, beta, alpha);
    fill_if_nan(out, beta, alpha);
  }
  static void baddbmm_(Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
    if (alpha == 0) {  // in half precision it then forgets beta, too, but not for products of nothing
      Aten::baddbmm_(out, columns_of(a, 0), rows_of(b, 0), beta, 1);
    } else {
      Aten::baddbmm_(out, a, b, beta, alpha);
    }
    fill_if_nan(out, beta, alpha);
  }

  // lowrank_norm.cpp
  static std::tuple<Tensor, Tensor, Tensor> map_scales(const Tensor& A, const Tensor& B, const Tensor& alpha,
                                                       const Tensor& beta, const Tensor& weight_norm, double tau,
                                                       bool relative);

  // elementwise.cpp; all tensors dense, those of one call in the same layout.
  static double read(Scale scale);
  static double squared_norm(const Tensor& t);
  static Dot as_dot(double value, const Tensor& scales, ScaleIndex index);
  static Dot dot(const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex index);
  // The same, and b = s_w b + s_d other on the way.
  static Dot dot_and_combine_(const Tensor& a, Tensor& b, const Tensor& other, const Tensor& scales, ScaleIndex index);
  static void scale_(Tensor& t, Scale scale);
  // t = scale t + bias[channel], for channels `channel_stride` apart.
  static void scale_and_bias_(Tensor& t, Scale scale, const std::optional<Tensor>& bias, int64_t channel_stride);

  // x A^T
  static Tensor down(const Tensor& x, const Tensor& A) {
    if (!thin::handles(x, A.size(0))) return mm(x, transposed(A));
    Tensor h = empty({x.size(0), A.size(0)}, x.scalar_type(), x);
    thin::project(x, A, h);
    return h;
  }

  // As in low_rank.h, with one pass over G, and one over X and GW.
  static std::tuple<Tensor, Tensor> up_backward(const Tensor& G, const Tensor& B, const Tensor& H, bool need_B) {
    if (!need_B || !thin::handles(G, B.size(1))) return up_backward_by_gemm<Cpu>(G, B, H, need_B);
    Tensor GB = empty({G.size(0), B.size(1)}, G.scalar_type(), G);
    const Tensor dB = thin::project_and_contract(G, transposed(B), GB, H);
    return {GB, transposed(dB)};
  }
  static LowRankGrads down_backward_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& H, const Tensor& dB,
                                     const Saved& saved, bool need_x, bool need_factors, bool need_alpha) {
    if (!need_x || !need_factors || !thin::handles(X, saved.rank())) {
      return down_backward_by_gemm_<Cpu>(X, GW, GB, H, dB, saved, need_x, need_factors, need_alpha);
    }
    const Tensor& scales = saved.scales;
    const auto [sum, dA] =
        thin::contract_and_expand_(X, GW, read({scales, S_W}), GB, read({scales, S_D}), cast(saved.A, X.scalar_type()));
    return {need_alpha ? as_dot(sum, scales, DS_W).scaled : Tensor(),
            factor_grads(dA, dB, dot(GB, in_layout_of(H, GB), scales, DS_D), saved)};
  }
  static FactorGrads factor_grads(const Tensor& dA, const Tensor& dB, const Dot& c, const Saved& saved) {
    return factor_grads_by_gemm<Cpu>(dA, dB, c, saved);
  }

  // scale a b
  static Tensor scaled_mm(const Tensor& a, const Tensor& b, Scale scale) {
    Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type(), a);
    addmm(out, out, a, b, 0, read(scale));
    return out;
  }

  // s_w x W + s_d h B + bias; B and bias of any dtype
  static Tensor affine(const Tensor& x, const Tensor& W, const Tensor& h, const Tensor& factor,
                       const std::optional<Tensor>& bias, const Tensor& scales) {
    const ScalarType dtype = x.scalar_type();
    const Tensor B = cast(factor, dtype);
    Tensor y = empty({x.size(0), W.size(1)}, dtype, x);
    addmm(y, bias ? cast(*bias, dtype) : y, x, W, bias ? 1 : 0, read({scales, S_W}));
    if (thin::handles(y, h.size(1))) {
      thin::expand_(y, 1, h, read({scales, S_D}), B);
    } else {
      addmm(y, y, h, B, 1, read({scales, S_D}));
    }
    return y;
  }

  // out = s_w out + s_d a b
  static void accumulate_mm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales) {
    addmm(out, out, a, b, read({scales, S_W}), read({scales, S_D}));
  }

  // Products of thin matrices with activations, channels first (N, C, L) or, of one matrix, channels last: as in
  // aten.h, but in one pass over the activation. `a` is the same matrix N times.
  static void bmm(Tensor& out, const Tensor& a, const Tensor& b) {
    if (thin::handles_each(b, a.size(1)) && out.stride(2) == 1) {
      thin::multiply_each(b, matrix_of(a, 0), out);
    } else if (is_one_of_rows(b) && thin::handles(rows_of_one(b), a.size(1)) && rows_of_one(out).is_contiguous()) {
      thin::project(rows_of_one(b), matrix_of(a, 0), rows_of_one(out));
    } else {
      Aten::bmm(out, a, b);
    }
  }

  // out = keep out + s_d a b
  static void accumulate_bmm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep) {
    const double keep_factor = read({scales, keep}), s_d = read({scales, S_D});
    if (thin::handles_each(out, a.size(2))) {
      thin::expand_each_(std::nullopt, out, keep_factor, matrix_of(a, 0), s_d, b);
    } else if (is_one_of_rows(out) && thin::handles(rows_of_one(out), a.size(2))) {
      thin::expand_(rows_of_one(out), keep_factor, rows_of_one(b), s_d, transposed(matrix_of(a, 0)));
    } else {
      baddbmm_(out, a, b, keep_factor, s_d);
    }
  }

  // <x, out>, and out = s_w out + s_d a b
  static Dot dot_and_accumulate_bmm_(const Tensor& x, Tensor& out, const Tensor& a, const Tensor& b,
                                     const Tensor& scales, ScaleIndex index) {
    if (thin::handles_each(out, a.size(2)) && x.stride(2) == 1) {
      const double dot = thin::expand_each_(x, out, read({scales, S_W}), matrix_of(a, 0), read({scales, S_D}), b);
      return as_dot(dot, scales, index);
    }
    const Dot result = dot(x, out, scales, index);
    accumulate_bmm_(out, a, b, scales, S_W);
    return result;
  }

  static Tensor sum_of_products(const Tensor& a, const Tensor& b) {
    if (a.size(1) < b.size(1)) return transposed(sum_of_products(b, a));
    if (thin::handles_each(a, b.size(1))) return thin::project_all(a, b);
    if (is_one_of_rows(a) && thin::handles(rows_of_one(a), b.size(1))) {
      return transposed(thin::contract(rows_of_one(a), rows_of_one(b)));
    }
    return Aten::sum_of_products(a, b);
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

 private:
  // A batch (1, C, L) that is (L, C) in memory: channels last.
  static bool is_one_of_rows(const Tensor& t) { return t.size(0) == 1 && t.stride(1) == 1; }
  static Tensor rows_of_one(const Tensor& t) { return transposed(matrix_of(t, 0)); }
  static void fill_if_nan(Tensor& out, double beta, double alpha) {
    if (std::isnan(beta) || std::isnan(alpha)) torch::stable::fill_(out, std::nan(""));
  }
  // The first rows or columns of each matrix of a batch.
  static Tensor rows_of(const Tensor& t, int64_t count) {
    return view(t, {t.size(0), count, t.size(2)}, strides_of(t));
  }
  static Tensor columns_of(const Tensor& t, int64_t count) {
    return view(t, {t.size(0), t.size(1), count}, strides_of(t));
  }
};

}  // namespace mapsurgery
