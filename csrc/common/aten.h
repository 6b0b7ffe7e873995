// torch's matrix products and convolutions, below the dispatcher: no autograd, no autocast, GEMM's own alpha and beta.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "common/tensor.h"

namespace mapsurgery {

struct ConvArgs {
  const Sizes& stride;
  const Sizes& padding;
  const Sizes& dilation;
  int64_t groups;
};

// The parameters are the device's entry points of torch's C shim.
template <auto mm_out, auto addmm_out, auto baddbmm_out, auto conv_forward, auto conv_backward>
struct Aten {
  static Tensor mm(const Tensor& a, const Tensor& b) {
    Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type(), a);
    TORCH_ERROR_CODE_CHECK(mm_out(out.get(), a.get(), b.get()));
    return out;
  }

  // out = beta self + alpha a b; self may be out itself, or a bias (columns,).
  static void addmm(Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha) {
    TORCH_ERROR_CODE_CHECK(addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
  }

  // out += alpha a b, matrix by matrix.
  static void add_bmm_(Tensor& out, const Tensor& a, const Tensor& b, double alpha) {
    TORCH_ERROR_CODE_CHECK(baddbmm_out(out.get(), out.get(), a.get(), b.get(), 1, alpha));
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
  static std::array<Tensor, 2> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& kernel,
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

inline Tensor sum_over(const Tensor& t, const Sizes& dims) {
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(dims));
}

}  // namespace mapsurgery
