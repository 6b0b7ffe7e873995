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

// A dense (N, C, *spatial) activation as N matrices (C, L). With channels last the samples follow each other in one.
struct Activation {
  int64_t N, C, L;
  bool channels_last;

  explicit Activation(const Tensor& t) : Activation(t, !t.is_contiguous()) {}
  // As `other` is seen: with a single channel, t lies in both orders.
  Activation(const Tensor& t, const Activation& other) : Activation(t, other.channels_last) {}

  Activation(const Tensor& t, bool channels_last)
      : N(t.size(0)), C(t.size(1)), L(product(sizes_of(t), 2, t.dim())), channels_last(channels_last) {
    if (channels_last) {
      L *= N;
      N = 1;
    }
  }

  int64_t channel_stride() const { return channels_last ? 1 : L; }

  // Channels [first, first + count) as matrices (count, L).
  Tensor channels(const Tensor& t, int64_t first, int64_t count) const {
    return view(t, {N, count, L}, {C * L, channel_stride(), channels_last ? C : 1}, first * channel_stride());
  }
  Tensor channels(const Tensor& t) const { return channels(t, 0, C); }
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

inline Sizes channels_last_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  int64_t step = sizes[1];
  for (size_t i = sizes.size() - 1; i >= 2; step *= sizes[i--]) strides[i] = step;
  strides[0] = step;
  return strides;
}

// A copy of t, dense in one of the two orders.
inline Tensor copied(const Tensor& t, bool channels_last) {
  if (!channels_last) return torch::stable::contiguous(t);
  const Sizes sizes = sizes_of(t);
  Tensor result = empty_strided(sizes, channels_last_strides(sizes), t.scalar_type(), t);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(result.get(), t.get(), 0));
  return result;
}

// t as a dense activation: itself, or a copy in the order that is nearest to its own.
inline Tensor as_activation(const Tensor& t) {
  if (t.is_contiguous() || is_channels_last(t)) return t;
  return copied(t, t.stride(1) == 1 && t.size(1) > 1);
}

// An activation like t with another number of channels, not filled.
inline Tensor empty_activation(const Tensor& t, int64_t channels) {
  Sizes sizes = sizes_of(t);
  sizes[1] = channels;
  const Sizes strides = t.is_contiguous() ? contiguous_strides(sizes) : channels_last_strides(sizes);
  return empty_strided(sizes, strides, t.scalar_type(), t);
}

// The activation t in the order of memory of another, which may have other channels.
inline Tensor ordered_like(const Tensor& t, const Tensor& other) {
  const bool last = !other.is_contiguous();
  return (last ? is_channels_last(t) : t.is_contiguous()) ? t : copied(t, last);
}

// Rows [first, first + rows) of a factor for each of N samples, in memory only once.
inline Tensor for_samples(const Tensor& factor, int64_t N, int64_t first, int64_t rows) {
  const int64_t step = factor.stride(0);
  return view(factor, {N, rows, factor.size(1)}, {0, step, factor.stride(1)}, first * step);
}

// factor t for each sample: the 1x1 convolution of the activation t.
template <class Device>
Tensor pointwise(const Tensor& factor, const Tensor& t) {
  Tensor out = empty_activation(t, factor.size(0));
  const Activation from(t), into(out, from);
  Tensor matrices = into.channels(out);
  if (out.numel() > 0) {
    Device::bmm(matrices, for_samples(factor, from.N, 0, factor.size(0)), from.channels(t));
  }
  return out;
}

// Whether a convolution is a matrix product for each sample. Then the low-rank half of the update is one of GEMM's,
// which is quicker for a few channels than a convolution, and adds up in place.
inline bool is_pointwise(const Tensor& weight, const ConvArgs& conv) {
  for (size_t i = 0; i < conv.stride.size(); ++i) {
    if (weight.size(static_cast<int64_t>(i) + 2) != 1 || conv.padding[i] != 0) return false;
  }
  return conv.groups == 1;
}

// The positions of x that a pointwise convolution reads; x itself without a stride.
inline Tensor positions(const Tensor& x, const ConvArgs& conv) {
  Sizes sizes = sizes_of(x), strides = strides_of(x);
  for (size_t i = 0; i < conv.stride.size(); ++i) {
    if (sizes[i + 2] > 0) sizes[i + 2] = (sizes[i + 2] - 1) / conv.stride[i] + 1;
    strides[i + 2] *= conv.stride[i];
  }
  return sizes == sizes_of(x) ? x : view(x, sizes, strides);
}

// y = keep y + s_d factor h, the 1x1 convolution of h, group by group and in place.
template <class Device>
void accumulate_pointwise_(const Tensor& y, const Tensor& factor, const Tensor& h, int64_t groups, const Tensor& scales,
                           ScaleIndex keep) {
  if (y.numel() == 0) return;
  const Tensor H = ordered_like(h, y);
  const Activation out(y), in(H, out);
  const int64_t rows = factor.size(0) / groups, rank = factor.size(1);
  for (int64_t g = 0; g < groups; ++g) {
    Tensor rows_of_y = out.channels(y, g * rows, rows);
    Device::accumulate_bmm_(rows_of_y, for_samples(factor, out.N, g * rows, rows), in.channels(H, g * rank, rank),
                            scales, keep);
  }
}

template <class Device>
Tensor convolution(const Tensor& x, const Tensor& kernel, const ConvArgs& conv) {
  return as_activation(Device::convolution(x, kernel, conv));
}

inline void check_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                          const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm,
                          const ConvArgs& conv) {
  check_factors(A, B);
  check_scalars(alpha, beta, weight_norm, A);
  check_conv(x, weight, A, B, conv);
  check_bias(bias, weight.size(0), A);
}

// y and h, with the scalars of the layer.
template <class Device>
Given conv_with(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                const Tensor& B, const Tensor& scales, const ConvArgs& conv, bool weight_space) {
  const int64_t groups = conv.groups;
  const ScalarType dtype = x.scalar_type();
  const auto bias_ = bias ? std::optional(as_contiguous(cast(*bias, dtype))) : std::nullopt;
  if (weight_space) {
    const Tensor W = combined<Device>(as_columns(weight), A, B, scales, dtype);
    return {Device::convolution(x, reshaped(W, sizes_of(weight)), conv, bias_), nothing(dtype, x)};
  }
  const Tensor down = cast(A, dtype);
  Tensor h = is_pointwise(weight, conv) ? pointwise<Device>(down, as_activation(positions(x, conv)))
                                        : convolution<Device>(x, down_kernel(down, weight, groups), conv);
  Tensor y = convolution<Device>(x, cast(weight, dtype), conv);
  if (bias_) Device::scale_and_bias_(y, {scales, S_W}, bias_, Activation(y).channel_stride());
  accumulate_pointwise_<Device>(y, cast(B, dtype), h, groups, scales, bias_ ? ONE : S_W);
  return {y, h};
}

template <class Device>
Forward map_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                 const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, double tau,
                 bool relative, const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                 bool weight_space) {
  const ConvArgs conv{stride, padding, dilation, groups};
  check_forward(x, weight, bias, A, B, alpha, beta, weight_norm, conv);
  typename Device::Guard guard(x);
  const auto [scales, gram_a, gram_b] = Device::map_scales(A, B, alpha, beta, weight_norm, tau, relative);
  const auto [y, h] = conv_with<Device>(x, weight, bias, A, B, scales, conv, weight_space);
  return {y, h, scales, gram_a, gram_b};
}

// As map_linear_given.
template <class Device>
Given map_conv_given(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                     const Tensor& B, const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, double, bool,
                     const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                     bool weight_space, const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b) {
  const ConvArgs conv{stride, padding, dilation, groups};
  check_forward(x, weight, bias, A, B, alpha, beta, weight_norm, conv);
  check_saved(A, B, scales, gram_a, gram_b);
  typename Device::Guard guard(x);
  return conv_with<Device>(x, weight, bias, A, B, scales, conv, weight_space);
}

template <class Device>
Grads conv_backward_in_weight_space(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& A,
                                    const Tensor& B, const Tensor& scales, const Tensor& gram_a, const Tensor& gram_b,
                                    const ConvArgs& conv, bool need_x, bool need_weight, bool need_factors,
                                    bool need_alpha) {
  const ScalarType dtype = x.scalar_type();
  const Tensor matrix = as_columns(weight);
  Tensor dx, dweight, dalpha;
  FactorGrads factors;
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
    dweight = need_weight ? reshaped(dweight, sizes_of(weight)) : Tensor();
  }
  return {dx, dweight, {}, factors.A, factors.B, dalpha, factors.beta};
}

// Gradients of h and B of the second half of the update, y = s_d B h, still without s_d. dB is undefined unless needed.
template <class Device>
std::tuple<Tensor, Tensor> up_backward(const Tensor& grad, const Tensor& h, const Tensor& B, int64_t groups,
                                       bool need_B) {
  if (groups > 1) {
    const size_t spatial = static_cast<size_t>(grad.dim()) - 2;
    return Device::convolution_backward(grad, h, up_kernel(B, spatial), PointwiseArgs(spatial, groups).args(), true,
                                        need_B);
  }
  const Tensor G = as_activation(grad);
  Tensor dB;
  if (need_B) {
    const Tensor H = ordered_like(as_activation(h), G);
    const Activation wide(G);
    dB = Device::sum_of_products(wide.channels(G), Activation(H, wide).channels(H));
  }
  return {pointwise<Device>(transposed(B), G), dB};
}

// Gradients of the first half, h = conv(x, A), still without s_d: dA (r, K), and that of x, which is undefined where
// `accumulate_pointwise_` adds it up in place. GB is the gradient of h.
template <class Device>
std::tuple<Tensor, Tensor> down_backward(const Tensor& GB, const Tensor& x, const Tensor& A, const Tensor& weight,
                                         const ConvArgs& conv, bool need_x, bool need_A) {
  if (is_pointwise(weight, conv)) {
    if (!need_A) return {};
    const Tensor X = as_activation(positions(x, conv)), ordered = ordered_like(GB, X);
    const Activation wide(X);
    return {Tensor(), Device::sum_of_products(Activation(ordered, wide).channels(ordered), wide.channels(X))};
  }
  auto [GBA, dA] = Device::convolution_backward(GB, x, down_kernel(A, weight, conv.groups), conv, need_x, need_A);
  if (need_A) {
    // A is shared by the groups: its gradient is the sum of theirs.
    const Tensor each = reshaped(dA, {conv.groups, A.numel()});
    dA = reshaped(conv.groups == 1 ? each : sum_over(cast(each, accumulate_dtype(A.scalar_type())), {0}), sizes_of(A));
  }
  return {GBA, dA};
}

// <x, G W> in units of alpha, where needed, of a pointwise convolution; GW becomes s_w GW + s_d A^T GB where needed.
template <class Device>
Tensor finish_pointwise_input_gradient(Tensor& GW, const Tensor& GB, const Tensor& x, const Tensor& A,
                                       const Tensor& scales, const ConvArgs& conv, bool need_x, bool need_alpha) {
  const Tensor read = positions(GW, conv), sum = as_activation(read);  // G W is 0 elsewhere
  Tensor dalpha;
  if (need_alpha && need_x && sum.numel() > 0) {
    const Tensor X = in_layout_of(positions(x, conv), sum), H = ordered_like(GB, sum);
    const Activation out(sum), in(H, out);
    Tensor matrices = out.channels(sum);
    dalpha = Device::dot_and_accumulate_bmm_(out.channels(X), matrices, for_samples(transposed(A), out.N, 0, out.C),
                                             in.channels(H), scales, DS_W)
                 .scaled;
  } else if (need_alpha) {
    dalpha = Device::dot(in_layout_of(positions(x, conv), sum), sum, scales, DS_W).scaled;
  } else {
    accumulate_pointwise_<Device>(sum, transposed(A), GB, 1, scales, S_W);
  }
  if (need_x && sum.numel() != GW.numel()) TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(read.get(), sum.get(), 0));
  return dalpha;
}

// GW becomes s_w GW + s_d GBA, the gradient of x, where that is needed; returns that of alpha, <x, G W>.
// GBA is what `down_backward` returned.
template <class Device>
Tensor finish_input_gradient(Tensor& GW, const Tensor& GB, const Tensor& GBA, const Tensor& x, const Tensor& weight,
                             const Tensor& A, const Tensor& scales, const ConvArgs& conv, bool need_x,
                             bool need_alpha) {
  if (is_pointwise(weight, conv)) {
    return finish_pointwise_input_gradient<Device>(GW, GB, x, A, scales, conv, need_x, need_alpha);
  }
  if (!need_x) return Device::dot(in_layout_of(x, GW), GW, scales, DS_W).scaled;
  const Dot dot = Device::dot_and_combine_(in_layout_of(x, GW), GW, in_layout_of(GBA, GW), scales, DS_W);
  return need_alpha ? dot.scaled : Tensor();
}

template <class Device>
Grads conv_backward_in_activation_space(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight,
                                        const Tensor& A, const Tensor& B, const Tensor& scales, const Tensor& gram_a,
                                        const Tensor& gram_b, const ConvArgs& conv, bool need_x, bool need_weight,
                                        bool need_factors, bool need_alpha) {
  const ScalarType dtype = x.scalar_type();
  Tensor dx, dweight, dalpha;
  FactorGrads factors;
  Tensor GW, GB, GBA;

  if (need_x || need_alpha || need_weight) {
    auto [grad_x, D] =
        Device::convolution_backward(grad, x, cast(weight, dtype), conv, need_x || need_alpha, need_weight);
    if (need_x || need_alpha) GW = as_activation(grad_x);
    if (need_weight) {
      D = as_activation(D);
      Device::scale_(D, {scales, S_W});
      dweight = cast(D, weight.scalar_type());
    }
  }
  if (need_x || need_factors) {
    const Tensor down = cast(A, dtype);
    Tensor dA, dB;
    std::tie(GB, dB) = up_backward<Device>(grad, h, cast(B, dtype), conv.groups, need_factors);
    GB = as_activation(GB);
    std::tie(GBA, dA) = down_backward<Device>(GB, x, down, weight, conv, need_x, need_factors);
    if (need_factors) {
      factors = Device::factor_grads(dA, reshaped(dB, sizes_of(B)), Device::dot(GB, in_layout_of(h, GB), scales, DS_D),
                                     {A, B, scales, gram_a, gram_b});
    }
  }
  if (need_x || need_alpha) {
    dalpha = finish_input_gradient<Device>(GW, GB, GBA, x, weight, cast(A, dtype), scales, conv, need_x, need_alpha);
  }
  if (need_x) dx = GW;
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
  if (need_bias) std::get<2>(grads) = sum_over(grad, all_but_channels);
  return or_nothing(grads, x, A, B, scales);
}

}  // namespace mapsurgery
