#include "common/map_conv.h"

#include <torch/csrc/stable/library.h>

#include "cpu/device.h"
#include "cpu/wide.h"

namespace mapsurgery {
namespace {

Forward forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, double tau,
                bool relative, const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                bool weight_space) {
  const Widening call{x.scalar_type(), is_emulated(x.scalar_type())};
  const auto [y, h, scales, gram_a, gram_b] =
      map_conv<Cpu>(call.in(x), weight, bias, A, B, alpha, beta, weight_norm, tau, relative, stride, padding, dilation,
                    groups, weight_space);
  return {call.out(y), call.out(h), scales, gram_a, gram_b};
}

Given forward_given(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                    const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, double tau,
                    bool relative, const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                    bool weight_space, const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b) {
  const Widening call{x.scalar_type(), is_emulated(x.scalar_type())};
  const auto [y, h] = map_conv_given<Cpu>(call.in(x), weight, bias, A, B, alpha, beta, weight_norm, tau, relative,
                                          stride, padding, dilation, groups, weight_space, scales, gram_a, gram_b);
  return {call.out(y), call.out(h)};
}

Grads backward(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight, const Tensor& A,
               const Tensor& B, const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b, const Sizes& stride,
               const Sizes& padding, const Sizes& dilation, int64_t groups, bool weight_space, bool need_x,
               bool need_weight, bool need_bias, bool need_factors, bool need_alpha) {
  const Widening call = widening_of(grad, x, h);
  auto [dx, dweight, dbias, dA, dB, dalpha, dbeta] = map_conv_backward<Cpu>(
      call.in(grad), call.in(x), call.in(h), weight, A, B, scales, gram_a, gram_b, stride, padding, dilation, groups,
      weight_space, need_x, need_weight, need_bias, need_factors, need_alpha);
  return {call.out(dx), need_weight ? dweight : call.out(dweight), call.out(dbias), dA, dB, dalpha, dbeta};
}

}  // namespace
}  // namespace mapsurgery

STABLE_TORCH_LIBRARY_IMPL(mapsurgery, CPU, m) {
  m.impl("map_conv", TORCH_BOX(&mapsurgery::forward));
  m.impl("map_conv_given", TORCH_BOX(&mapsurgery::forward_given));
  m.impl("map_conv_backward", TORCH_BOX(&mapsurgery::backward));
}
