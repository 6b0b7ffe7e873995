// What the operators (ops/) need of the CPU, where the host may read the scalars.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>

#include "base/aten.h"
#include "base/low_rank.h"
#include "cpu/thin/products.h"
#include "cpu/wide.h"
#include "ops/effective_weight.h"
#include "ops/map_scales.h"

namespace mapsurgery {

struct Cpu : Aten<aoti_torch_cpu_mm_out, aoti_torch_cpu_addmm_out, aoti_torch_cpu_bmm_out, aoti_torch_cpu_baddbmm_out,
                  aoti_torch_cpu_convolution, aoti_torch_cpu_convolution_backward> {
  using Sum = double;

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static Widening widening(const Tensor& x) { return {x.scalar_type(), is_emulated(x.scalar_type())}; }
  // For a forward that is over quickly: it needs rows enough to pay for the casts.
  static Widening widening_of_rows(const Tensor& x) {
    const bool many_rows = x.dim() > 0 && x.numel() > kFewRows * x.size(-1);
    return {x.scalar_type(), many_rows && is_emulated(x.scalar_type())};
  }

  // Products in half precision are oneDNN's, which compiles one anew for each value of a factor; BLAS does not.
  static bool takes_scalars(ScalarType dtype) { return dtype == accumulate_dtype(dtype); }

  static double read(Scalar scalar) { return scalar == nullptr ? 1 : read(*scalar, 0); }
  // Of a tensor of any floating dtype.
  static double read(const Tensor& t, int64_t index) {
    return dispatch_floating(t.scalar_type(), [&](auto type) {
      return static_cast<double>(static_cast<const typename decltype(type)::type*>(t.data_ptr())[index]);
    });
  }

  // map_scales.cpp
  static void fill(Scales& scales, const Tensor& A, const Tensor& B, const Tensor& alpha, const Tensor& beta,
                   const Tensor& weight_norm, double tau, bool relative);
  // gradients.cpp
  static Gradients gradients(const Products<Sum>& products, const Tensor& A, const Tensor& B, Scalar s_d,
                             const Norm& norm);

  // elementwise.cpp; all tensors dense, those of one call in the same layout.
  static Sum sum_of(const Tensor& value) { return read(value, 0); }
  static Sum squared_norm(const Tensor& t);
  // Of a contiguous matrix; weights of its columns; out: the squared norm and kSketch sums.
  static void fingerprint(const Tensor& t, int64_t rows, int64_t columns, const double* weights, double* out);
  static Sum dot(const Tensor& a, const Tensor& b);
  // <a, b>, and b = keep b + s_d other on the way; other may be null.
  static Sum dot_and_combine_(const Tensor& a, Tensor& b, Scalar keep, const Tensor* other, Scalar s_d);
  static void scale_(Tensor& t, Scalar scale) {
    if (scale != nullptr) scale_and_bias_(t, scale, std::nullopt, 1);
  }
  // t = scale t + bias[channel], for channels `channel_stride` apart.
  static void scale_and_bias_(Tensor& t, Scalar scale, const std::optional<Tensor>& bias, int64_t channel_stride);

  // combine.cpp
  static void combine(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& s_w, const Tensor& s_d,
                      Combine mode, const Tensor& out);
  // scale t, a contiguous matrix; t of any strides.
  static Tensor scaled(const Tensor& t, const Tensor& scale, ScalarType dtype);

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
  static Products<Sum> down_backward_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& H, const Tensor& A,
                                      Scalar s_w, Scalar s_d, bool need_x, bool need_factors, bool need_s_w) {
    if (!need_x || !need_factors || !thin::handles(X, A.size(0))) {
      return down_backward_by_gemm_<Cpu>(X, GW, GB, H, A, s_w, s_d, need_x, need_factors, need_s_w);
    }
    Products<Sum> products;
    products.with_h = dot(GB, in_layout_of(H, GB));
    const auto [sum, dA] = thin::contract_and_expand_(X, GW, read(s_w), GB, read(s_d), cast(A, X.scalar_type()));
    products.dA = dA;
    if (need_s_w) products.with_x = sum;
    return products;
  }

  // s_w x W + s_d h B + bias; B and bias of any dtype
  static Tensor affine(const Tensor& x, const Tensor& W, const Tensor& h, const Tensor& B,
                       const std::optional<Tensor>& bias, Scalar s_w, Scalar s_d) {
    const ScalarType dtype = x.scalar_type();
    const auto shift = bias ? std::optional(cast(*bias, dtype)) : std::nullopt;
    if (takes_scalars(dtype)) {
      Tensor y = empty({x.size(0), W.size(1)}, dtype, x);
      blas(y, shift ? *shift : y, x, W, shift ? 1 : 0, read(s_w));
      accumulate_mm_(y, h, cast(B, dtype), nullptr, s_d);
      return y;
    }
    Tensor y;
    if (read(s_w) != 1) {
      y = mm(x, W);
      scale_and_bias_(y, s_w, shift, 1);
    } else if (shift) {  // rounded as the base layer does
      y = empty({x.size(0), W.size(1)}, dtype, x);
      add_mm(y, *shift, x, W);
    } else {
      y = mm(x, W);
    }
    mapsurgery::accumulate_mm_<Cpu>(y, h, B, nullptr, s_d);
    return y;
  }

  // out = keep out + s_d a b, in float or double
  static void accumulate_mm_(Tensor& out, const Tensor& a, const Tensor& b, Scalar keep, Scalar s_d) {
    if (thin::handles(out, a.size(1))) return thin::expand_(out, read(keep), a, read(s_d), b);
    blas(out, out, a, b, read(keep), read(s_d));
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

  // out = keep out + s_d a b, in float or double
  static void accumulate_bmm_(Tensor& out, const Tensor& a, const Tensor& b, Scalar keep, Scalar s_d) {
    if (thin::handles_each(out, a.size(2))) {
      thin::expand_each_(std::nullopt, out, read(keep), matrix_of(a, 0), read(s_d), b);
    } else if (is_one_of_rows(out) && thin::handles(rows_of_one(out), a.size(2))) {
      thin::expand_(rows_of_one(out), read(keep), rows_of_one(b), read(s_d), transposed(matrix_of(a, 0)));
    } else {
      blas_each_(out, a, b, read(keep), read(s_d));
    }
  }

  // <x, out>, and out = s_w out + s_d a b
  static Sum dot_and_accumulate_bmm_(const Tensor& x, Tensor& out, const Tensor& a, const Tensor& b, Scalar s_w,
                                     Scalar s_d) {
    if (thin::handles_each(out, a.size(2)) && x.stride(2) == 1) {
      return thin::expand_each_(x, out, read(s_w), matrix_of(a, 0), read(s_d), b);
    }
    const Sum result = dot(x, out);
    accumulate_bmm_(out, a, b, s_w, s_d);
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

 private:
  // A batch (1, C, L) that is (L, C) in memory: channels last.
  static bool is_one_of_rows(const Tensor& t) { return t.size(0) == 1 && t.stride(1) == 1; }
  static Tensor rows_of_one(const Tensor& t) { return transposed(matrix_of(t, 0)); }

  // The only products that take factors: BLAS's, of float and double.
  // out = beta self + alpha a b; self may be out itself, or a bias (columns,).
  static void blas(Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha) {
    check_blas(out);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
    fill_if_nan(out, beta, alpha);
  }
  // out = beta out + alpha a b, matrix by matrix.
  static void blas_each_(Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
    check_blas(out);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
    fill_if_nan(out, beta, alpha);
  }
  static void check_blas(const Tensor& out) {
    STD_TORCH_CHECK(takes_scalars(out.scalar_type()), "mapsurgery: a product of ", toString(out.scalar_type()),
                    " takes no factor");
  }
  // Small products of torch 2.14 forget a factor of NaN, which would hide that a training diverged.
  static void fill_if_nan(Tensor& out, double beta, double alpha) {
    if (std::isnan(beta) || std::isnan(alpha)) torch::stable::fill_(out, std::nan(""));
  }
};

}  // namespace mapsurgery
