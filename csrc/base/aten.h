// torch's matrix products and convolutions, below the dispatcher: no autograd, no autocast.
//
// None takes a factor: libraries below may compile a product anew for each value of one (oneDNN does, in half
// precision), and s_w and s_d are new after every step of training.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "base/tensor.h"

namespace mapsurgery {

struct ConvArgs {
  const Sizes& stride;
  const Sizes& padding;
  const Sizes& dilation;
  int64_t groups;
};

inline Tensor sum_over(const Tensor& t, const Sizes& dims) {
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(dims));
}

// One matrix of a batch (N, rows, columns).
inline Tensor matrix_of(const Tensor& batch, int64_t n) {
  return view(batch, {batch.size(1), batch.size(2)}, {batch.stride(1), batch.stride(2)}, n * batch.stride(0));
}

// The parameters are the device's entry points of torch's C shim.
template <auto mm_out, auto addmm_out, auto bmm_out, auto baddbmm_out, auto conv_forward, auto conv_backward>
struct Aten {
  static Tensor mm(const Tensor& a, const Tensor& b) {
    Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type(), a);
    TORCH_ERROR_CODE_CHECK(mm_out(out.get(), a.get(), b.get()));
    return out;
  }

  // out = self + a b; self may be out itself, or a bias (columns,).
  static void add_mm(Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(addmm_out(out.get(), self.get(), a.get(), b.get(), 1, 1));
  }

  // out = a b, matrix by matrix.
  static void bmm(Tensor& out, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(bmm_out(out.get(), a.get(), b.get()));
  }

  // out += a b, matrix by matrix.
  static void add_bmm_(Tensor& out, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(baddbmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
  }

  // sum_n a[n] b[n]^T for a (N, p, L) and b (N, q, L): (p, q).
  static Tensor sum_of_products(const Tensor& a, const Tensor& b) {
    const int64_t N = a.size(0), p = a.size(1), q = b.size(1);
    if (N == 1) return mm(matrix_of(a, 0), transposed(matrix_of(b, 0)));
    const ScalarType dtype = a.scalar_type();
    Tensor products = empty({N, p, q}, dtype, a);
    bmm(products, a, view(b, {N, b.size(2), q}, {b.stride(0), b.stride(2), b.stride(1)}));
    return sum_over(cast(products, accumulate_dtype(dtype)), {0});
  }

  static Tensor convolution(const Tensor& x, const Tensor& kernel, const ConvArgs& conv,
                            const std::optional<Tensor>& bias = std::nullopt) {
    const Sizes zeros(conv.stride.size(), 0);
    const int64_t n = static_cast<int64_t>(zeros.size());
    AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, out = nullptr;
    TORCH_ERROR_CODE_CHECK(conv_forward(x.get(), kernel.get(), bias ? &bias_handle : nullptr, conv.stride.data(), n,
                                        conv.padding.data(), n, conv.dilation.data(), n, 0, zeros.data(), n,
                                        conv.groups, &out));
    return Tensor(out);
  }

  // Gradients by x and by the kernel; the one that is not needed is undefined.
  static std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& kernel,
                                                         const ConvArgs& conv, bool need_x, bool need_kernel) {
    const Sizes zeros(conv.stride.size(), 0);
    const int64_t n = static_cast<int64_t>(zeros.size());
    const int32_t mask[3] = {need_x, need_kernel, 0};
    AtenTensorHandle dx = nullptr, dkernel = nullptr, dbias = nullptr;
    TORCH_ERROR_CODE_CHECK(conv_backward(grad.get(), x.get(), kernel.get(), nullptr, 0, conv.stride.data(), n,
                                         conv.padding.data(), n, conv.dilation.data(), n, 0, zeros.data(), n,
                                         conv.groups, mask, 3, &dx, &dkernel, &dbias));
    const Tensor unused(dbias);
    return {Tensor(dx), Tensor(dkernel)};
  }
};

}  // namespace mapsurgery
