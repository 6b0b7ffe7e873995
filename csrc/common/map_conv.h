// map_conv and its backward in 1, 2 and 3 dimensions, in activation or in weight space; one orchestration for both
// devices (see map_linear.h).
#pragma once

#include "common/aten.h"
#include "common/effective_weight.h"
#include "common/map_linear.h"

namespace mapsurgery {

// A convolution by a 1x1 kernel, the second half of the low-rank update.
struct PointwiseArgs {
  Sizes ones;
  Sizes zeros;
  int64_t groups;

  PointwiseArgs(size_t spatial, int64_t groups) : ones(spatial, 1), zeros(spatial, 0), groups(groups) {}
  ConvArgs args() const { return {ones, zeros, ones, groups}; }
};

inline void check_conv(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B, const ConvArgs& conv) {
  const int64_t spatial = static_cast<int64_t>(conv.stride.size());
  STD_TORCH_CHECK(spatial >= 1 && spatial <= 3, "mapsurgery: stride must have 1, 2 or 3 entries, got ", spatial);
  STD_TORCH_CHECK(conv.padding.size() == conv.stride.size() && conv.dilation.size() == conv.stride.size(),
                  "mapsurgery: stride, padding and dilation must have as many entries, got ", spatial, ", ",
                  conv.padding.size(), " and ", conv.dilation.size());
  check_dim("x", x, spatial + 2);
  check_dim("weight", weight, spatial + 2);
  const int64_t m = weight.size(0);
  STD_TORCH_CHECK(conv.groups > 0 && m % conv.groups == 0, "mapsurgery: the weight's ", m,
                  " rows do not divide into groups = ", conv.groups);
  check_size("x", x, 1, weight.size(1) * conv.groups, "groups times the weight's dimension 1");
  check_weight(weight, m, product(sizes_of(weight), 1, spatial + 2), A, B);
  check_input(x, A);
}

// A (r, K) as the kernel of a convolution, once per group: (groups r, in/groups, *kernel).
inline Tensor down_kernel(const Tensor& A, const Tensor& weight, int64_t groups) {
  Sizes sizes = sizes_of(weight);
  sizes[0] = A.size(0);
  Tensor kernel = reshaped(A, sizes);
  if (groups == 1) return kernel;
  Sizes repeated = sizes;
  repeated[0] *= groups;
  Tensor result = empty(repeated, A.scalar_type(), A);
  Sizes strides = contiguous_strides(repeated);
  Sizes split = sizes, split_strides = strides, shared_strides = contiguous_strides(sizes);
  split.insert(split.begin(), groups);
  split_strides.insert(split_strides.begin(), A.size(0) * strides[0]);
  shared_strides.insert(shared_strides.begin(), 0);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_copy_(view(result, split, split_strides).get(), view(kernel, split, shared_strides).get(), 0));
  return result;
}

// B (m, r) as the kernel of a 1x1 convolution: (m, r, 1, ...).
inline Tensor up_kernel(const Tensor& B, size_t spatial) {
  Sizes sizes(spatial + 2, 1);
  sizes[0] = B.size(0);
  sizes[1] = B.size(1);
  return reshaped(B, sizes);
}

// A dense (N, C, *spatial) activation as (N, C, L), for memory in the order of its dimensions or with channels last.
struct Activation {
  int64_t N, C, L;
  bool channels_last;

  explicit Activation(const Tensor& t)
      : N(t.size(0)), C(t.size(1)), L(product(sizes_of(t), 2, t.dim())), channels_last(!t.is_contiguous()) {}

  int64_t channel_stride() const { return channels_last ? 1 : L; }

  // Channels [first, first + count) as count x L matrices, one per sample.
  Tensor channels(const Tensor& t, int64_t first, int64_t count) const {
    return view(t, {N, count, L}, {C * L, channel_stride(), channels_last ? C : 1}, first * channel_stride());
  }
};

inline bool is_channels_last(const Tensor& t) {
  int64_t expected = t.size(1);
  if (t.stride(1) != 1) return false;
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    if (t.stride(i) != expected) return false;
    expected *= t.size(i);
  }
  return t.stride(0) == expected;
}

inline Tensor as_activation(const Tensor& t) { return is_channels_last(t) ? t : as_contiguous(t); }

// y += s_d B h, the 1x1 convolution of h with B, group by group and in place.
template <class Device>
void add_pointwise_(const Tensor& y, const Tensor& h, const Tensor& B, int64_t groups, Scale s_d) {
  if (y.numel() == 0 || h.numel() == 0) return;
  const Tensor H = as_activation(h);
  const Activation in(H), out(y);
  const auto [factor, alpha] = Device::fold(B, s_d);
  const int64_t rows = factor.size(0) / groups, rank = factor.size(1), step = factor.stride(0);
  for (int64_t g = 0; g < groups; ++g) {
    const Tensor rows_of_B = view(factor, {out.N, rows, rank}, {0, step, factor.stride(1)}, g * rows * step);
    Tensor rows_of_y = out.channels(y, g * rows, rows);
    Device::add_bmm_(rows_of_y, rows_of_B, in.channels(H, g * rank, rank), alpha);
  }
}

template <class Device>
Tensor convolution(const Tensor& x, const Tensor& kernel, const ConvArgs& conv) {
  return as_activation(Device::convolution(x, kernel, conv));
}

template <class Device>
Forward map_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                 const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, double tau,
                 bool relative, const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                 bool weight_space) {
  const ConvArgs conv{stride, padding, dilation, groups};
  check_factors(A, B);
  check_scalars(alpha, beta, weight_norm, A);
  check_conv(x, weight, A, B, conv);
  check_bias(bias, weight.size(0), A);
  typename Device::Guard guard(x);

  const ScalarType dtype = x.scalar_type();
  const auto bias_ = bias ? std::optional(as_contiguous(cast(*bias, dtype))) : std::nullopt;
  if (weight_space) {
    auto [W, scales, gram_a, gram_b] =
        effective_weight<Device>(as_columns(weight), A, B, alpha, beta, weight_norm, tau, relative, dtype);
    Tensor y = Device::convolution(x, reshaped(W, sizes_of(weight)), conv, bias_);
    return {y, nothing(dtype, x), scales, gram_a, gram_b};
  }
  auto [scales, gram_a, gram_b] = Device::map_scales(A, B, alpha, beta, weight_norm, tau, relative);
  Tensor h = convolution<Device>(x, down_kernel(cast(A, dtype), weight, groups), conv);
  Tensor y = convolution<Device>(x, cast(weight, dtype), conv);
  const Activation layout(y);
  Device::scale_and_bias_(y, {scales, S_W}, bias_, layout.channel_stride());
  add_pointwise_<Device>(y, h, cast(B, dtype), groups, {scales, S_D});
  return {y, h, scales, gram_a, gram_b};
}

template <class Device>
Grads conv_backward_in_weight_space(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& A,
                                    const Tensor& B, const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b,
                                    const ConvArgs& conv, bool need_x, bool need_weight, bool need_factors,
                                    bool need_alpha) {
  const ScalarType dtype = x.scalar_type();
  const Tensor matrix = as_columns(weight);
  Tensor dx = nothing(dtype, x), dweight = nothing(dtype, x);
  Tensor dalpha = nothing(scales.scalar_type(), x);
  FactorGrads factors = no_factor_grads(A, B, scales);
  Tensor W = cast(weight, dtype);
  if (need_x) {
    Tensor combined = empty(sizes_of(matrix), dtype, matrix);
    Device::combine(matrix, A, B, scales, Combine::kMerge, combined);
    W = reshaped(combined, sizes_of(weight));
  }
  const bool need_kernel = need_weight || need_factors || need_alpha;
  auto [grad_x, D] = Device::convolution_backward(grad, x, W, conv, need_x, need_kernel);
  if (need_x) dx = grad_x;
  if (need_kernel) {
    std::tie(dweight, factors.A, factors.B, dalpha, factors.beta) =
        effective_weight_backward<Device>(as_columns(D), matrix, A, B, scales, gram_a, gram_b, need_weight);
    dweight = need_weight ? reshaped(dweight, sizes_of(weight)) : nothing(dtype, x);
  }
  return {dx, dweight, {}, factors.A, factors.B, dalpha, factors.beta};
}

template <class Device>
Grads conv_backward_in_activation_space(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight,
                                        const Tensor& A, const Tensor& B, const Tensor& scales, const Tensor& gram_a,
                                        const Tensor& gram_b, const ConvArgs& conv, bool need_x, bool need_weight,
                                        bool need_factors, bool need_alpha) {
  const ScalarType dtype = x.scalar_type();
  const int64_t m = B.size(0), rank = B.size(1), groups = conv.groups;
  const size_t spatial = conv.stride.size();
  Tensor dx = nothing(dtype, x), dweight = nothing(dtype, x);
  Tensor dalpha = nothing(scales.scalar_type(), x);
  FactorGrads factors = no_factor_grads(A, B, scales);

  if (need_x || need_alpha || need_weight) {
    auto [GW, D] = Device::convolution_backward(grad, x, cast(weight, dtype), conv, need_x || need_alpha, need_weight);
    if (need_weight) {
      D = as_contiguous(D);
      Device::scale_(D, {scales, S_W});
      dweight = cast(D, weight.scalar_type());
    }
    if (need_x || need_alpha) GW = as_activation(GW);
    if (need_alpha) {
      dalpha = Device::dot_and_scale_(in_layout_of(x, GW), GW, need_x, scales, DS_W).scaled;
    } else if (need_x) {
      Device::scale_(GW, {scales, S_W});
    }
    if (need_x) dx = GW;
  }
  if (need_x || need_factors) {
    const PointwiseArgs pointwise(spatial, groups);
    auto [GB, dB] =
        Device::convolution_backward(grad, h, up_kernel(cast(B, dtype), spatial), pointwise.args(), true, need_factors);
    auto [GBA, dA] =
        Device::convolution_backward(GB, x, down_kernel(cast(A, dtype), weight, groups), conv, need_x, need_factors);
    if (need_x) Device::add_scaled_(dx, in_layout_of(GBA, dx), {scales, S_D});
    if (need_factors) {
      // A is shared by the groups: its gradient is the sum of theirs.
      Tensor summed =
          reshaped(sum_over(cast(reshaped(dA, {groups, A.numel()}), scales.scalar_type()), {0}), sizes_of(A));
      GB = as_activation(GB);
      factors = factor_grads<Device>(summed, reshaped(dB, {m, rank}),
                                     Device::dot(GB, in_layout_of(h, GB), scales, DS_D), A, B, scales, gram_a, gram_b);
    }
  }
  return {dx, dweight, {}, factors.A, factors.B, dalpha, factors.beta};
}

template <class Device>
Grads map_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight, const Tensor& A,
                        const Tensor& B, const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b,
                        const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                        bool weight_space, bool need_x, bool need_weight, bool need_bias, bool need_factors,
                        bool need_alpha) {
  const ConvArgs conv{stride, padding, dilation, groups};
  check_saved(A, B, scales, gram_a, gram_b);
  check_conv(x, weight, A, B, conv);
  check_grad(grad, x);
  check_dim("grad", grad, x.dim());
  check_size("grad", grad, 1, weight.size(0), "the weight's rows");
  check_size("grad", grad, 0, x.size(0), "the samples of x");
  if (!weight_space) {
    check_dim("h", h, x.dim());
    check_dtype("h", h, x.scalar_type(), "the dtype of x");
    check_size("h", h, 0, x.size(0), "the samples of x");
    check_size("h", h, 1, groups * A.size(0), "groups times the rank");
    check_device("h", h, "x", x);
  }
  typename Device::Guard guard(x);

  Grads grads = weight_space
                    ? conv_backward_in_weight_space<Device>(grad, x, weight, A, B, scales, gram_a, gram_b, conv, need_x,
                                                            need_weight, need_factors, need_alpha)
                    : conv_backward_in_activation_space<Device>(grad, x, h, weight, A, B, scales, gram_a, gram_b, conv,
                                                                need_x, need_weight, need_factors, need_alpha);
  Sizes all_but_channels{0};
  for (int64_t i = 2; i < grad.dim(); ++i) all_but_channels.push_back(i);
  std::get<2>(grads) = need_bias ? sum_over(grad, all_but_channels) : nothing(x.scalar_type(), x);
  return grads;
}

}  // namespace mapsurgery
