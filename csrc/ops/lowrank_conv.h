// lowrank_conv in 1, 2 and 3 dimensions, in activation or in weight space, and its backward; one orchestration for both
// devices (see lowrank_linear.h).
#pragma once

#include "base/activation.h"
#include "ops/effective_weight.h"
#include "ops/lowrank_linear.h"

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

// In torch's words, which it would not hand on before 2.13.
inline void check_kernel_fits(const Tensor& x, const Tensor& weight, const ConvArgs& conv) {
  std::string padded, kernel;
  bool fits = true;
  for (size_t i = 0; i < conv.stride.size(); ++i) {
    const int64_t dim = static_cast<int64_t>(i) + 2;
    const int64_t size = x.size(dim) + 2 * conv.padding[i], reach = conv.dilation[i] * (weight.size(dim) - 1) + 1;
    fits = fits && reach <= size;
    padded += (i ? " x " : "") + std::to_string(size);
    kernel += (i ? " x " : "") + std::to_string(reach);
  }
  if (fits) return;
  throw std::runtime_error("Calculated padded input size per channel: (" + padded + "). Kernel size: (" + kernel +
                           "). Kernel size can't be greater than actual input size");
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

// y = keep y + s_d factor h, the 1x1 convolution of h, group by group and in place; factor (channels of y, r).
template <class Device>
void accumulate_pointwise_(Tensor& y, const Tensor& factor, const Tensor& h, int64_t groups, Scalar keep, Scalar s_d) {
  if (y.numel() == 0) return;
  if (factor.size(1) == 0) return Device::scale_(y, keep);
  const ScalarType dtype = y.scalar_type();
  const bool takes_scalars = Device::takes_scalars(dtype);  // else s_d goes into the factor, as in accumulate_mm_
  const Tensor F = takes_scalars ? cast(factor, dtype) : Device::scaled(factor, *s_d, dtype);
  if (!takes_scalars) Device::scale_(y, keep);
  const Tensor H = ordered_like(h, y);
  const Activation out(y), in(H, out);
  const int64_t rows = F.size(0) / groups, rank = F.size(1);
  for (int64_t g = 0; g < groups; ++g) {
    Tensor rows_of_y = out.channels(y, g * rows, rows);
    const Tensor left = for_samples(F, out.N, g * rows, rows), right = in.channels(H, g * rank, rank);
    if (takes_scalars) {
      Device::accumulate_bmm_(rows_of_y, left, right, keep, s_d);
    } else {
      Device::add_bmm_(rows_of_y, left, right);
    }
  }
}

template <class Device>
Tensor convolution(const Tensor& x, const Tensor& kernel, const ConvArgs& conv) {
  return as_activation(Device::convolution(x, kernel, conv));
}

template <class Device>
Forward lowrank_conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                     const Tensor& B, const Tensor& s_w, const Tensor& s_d, const Sizes& stride, const Sizes& padding,
                     const Sizes& dilation, int64_t groups, bool weight_space) {
  const ConvArgs conv{stride, padding, dilation, groups};
  check_factors(A, B);
  check_scales(s_w, s_d, A);
  check_conv(input, weight, A, B, conv);
  check_bias(bias, weight.size(0), A);
  check_kernel_fits(input, weight, conv);
  typename Device::Guard guard(input);

  const auto call = Device::widening(input);
  const Tensor x = call.in(input);
  const ScalarType dtype = x.scalar_type();
  const auto bias_ = bias ? std::optional(as_contiguous(cast(*bias, dtype))) : std::nullopt;
  if (weight_space) {
    const Tensor W = combined<Device>(as_columns(weight), A, B, s_w, s_d, dtype);
    return {call.out(Device::convolution(x, reshaped(W, sizes_of(weight)), conv, bias_)),
            nothing(input.scalar_type(), x)};
  }
  const Tensor down = cast(A, dtype);
  const Tensor h = is_pointwise(weight, conv) ? pointwise<Device>(down, as_activation(positions(x, conv)))
                                              : convolution<Device>(x, down_kernel(down, weight, groups), conv);
  Tensor y = convolution<Device>(x, cast(weight, dtype), conv);
  if (bias_) Device::scale_and_bias_(y, &s_w, bias_, Activation(y).channel_stride());
  accumulate_pointwise_<Device>(y, B, h, groups, bias_ ? nullptr : &s_w, &s_d);
  return {call.out(y), call.out(h)};
}

// The arguments of a backward, x, h and grad in the dtype that its products run in.
struct ConvBackward {
  Tensor grad, x, h;
  const Tensor &weight, &A, &B;
  Scalar s_w, s_d;
  const Norm& norm;
  ConvArgs conv;
  bool need_x, need_weight, need_factors, need_s_w;
};

// dx and dweight, where needed, and the gradients of factors and scalars.
struct ConvGradients {
  Tensor x, weight;
  Gradients rest;
};

template <class Device>
ConvGradients conv_backward_in_weight_space(const ConvBackward& b) {
  const ScalarType dtype = b.x.scalar_type();
  const Tensor matrix = as_columns(b.weight);
  ConvGradients grads;
  Tensor W = cast(b.weight, dtype);
  if (b.need_x) {
    Tensor combination = empty(sizes_of(matrix), dtype, matrix);
    Device::combine(matrix, b.A, b.B, *b.s_w, *b.s_d, Combine::kMerge, combination);
    W = reshaped(combination, sizes_of(b.weight));
  }
  const bool need_kernel = b.need_weight || b.need_factors || b.need_s_w;
  auto [dx, dW] = Device::convolution_backward(b.grad, b.x, W, b.conv, b.need_x, need_kernel);
  if (b.need_x) grads.x = dx;
  if (!need_kernel) return grads;
  const Tensor D = accumulated(as_columns(dW), b.A);
  grads.rest = weight_gradients<Device>(D, matrix, b.A, b.B, b.s_d, b.norm, b.need_factors, b.need_s_w);
  if (b.need_weight) {
    grads.weight = reshaped(Device::scaled(D, *b.s_w, b.weight.scalar_type()), sizes_of(b.weight));
  }
  return grads;
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

template <class Device>
using OptionalSum = std::optional<typename Device::Sum>;

// <x, G W>, where needed, of a pointwise convolution; GW becomes s_w GW + s_d A^T GB where needed.
template <class Device>
OptionalSum<Device> finish_pointwise_input_gradient(Tensor& GW, const Tensor& GB, const ConvBackward& b) {
  const Tensor read = positions(GW, b.conv);
  Tensor sum = as_activation(read);  // G W is 0 elsewhere
  OptionalSum<Device> with_x;
  const bool fused =
      b.need_s_w && b.need_x && sum.numel() > 0 && b.A.size(0) > 0 && Device::takes_scalars(sum.scalar_type());
  const bool scales = b.need_s_w && b.need_x && !fused;  // in the pass of the inner product
  if (fused) {
    const Tensor X = in_layout_of(positions(b.x, b.conv), sum), H = ordered_like(GB, sum);
    const Activation out(sum), in(H, out);
    Tensor matrices = out.channels(sum);
    const Tensor factor = for_samples(transposed(cast(b.A, sum.scalar_type())), out.N, 0, out.C);
    with_x = Device::dot_and_accumulate_bmm_(out.channels(X), matrices, factor, in.channels(H), b.s_w, b.s_d);
  } else if (b.need_s_w) {
    const Tensor X = in_layout_of(positions(b.x, b.conv), sum);
    with_x = scales ? Device::dot_and_combine_(X, sum, b.s_w, nullptr, nullptr) : Device::dot(X, sum);
  }
  if (b.need_x && !fused) {
    accumulate_pointwise_<Device>(sum, transposed(b.A), GB, 1, scales ? nullptr : b.s_w, b.s_d);
  }
  if (b.need_x && sum.numel() != GW.numel()) TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(read.get(), sum.get(), 0));
  return with_x;
}

// GW becomes s_w GW + s_d GBA, the gradient of x, where that is needed; returns that of s_w, <x, G W>, where that is.
// GBA is what `down_backward` returned.
template <class Device>
OptionalSum<Device> finish_input_gradient(Tensor& GW, const Tensor& GB, const Tensor& GBA, const ConvBackward& b) {
  if (is_pointwise(b.weight, b.conv)) return finish_pointwise_input_gradient<Device>(GW, GB, b);
  const Tensor X = in_layout_of(b.x, GW);
  if (!b.need_x) return Device::dot(X, GW);
  const Tensor other = in_layout_of(GBA, GW);
  const auto with_x = Device::dot_and_combine_(X, GW, b.s_w, &other, b.s_d);
  return b.need_s_w ? OptionalSum<Device>(with_x) : std::nullopt;
}

template <class Device>
ConvGradients conv_backward_in_activation_space(const ConvBackward& b) {
  const ScalarType dtype = b.x.scalar_type();
  const bool need_GW = b.need_x || b.need_s_w;
  ConvGradients grads;
  Products<typename Device::Sum> products;
  Tensor GW, GB, GBA;
  if (need_GW || b.need_weight) {
    auto [dx, D] = Device::convolution_backward(b.grad, b.x, cast(b.weight, dtype), b.conv, need_GW, b.need_weight);
    if (need_GW) GW = as_activation(dx);
    if (b.need_weight) {
      grads.weight = as_activation(D);
      Device::scale_(grads.weight, b.s_w);
      grads.weight = cast(grads.weight, b.weight.scalar_type());
    }
  }
  if (b.need_x || b.need_factors) {
    std::tie(GB, products.dB) = up_backward<Device>(b.grad, b.h, cast(b.B, dtype), b.conv.groups, b.need_factors);
    GB = as_activation(GB);
    std::tie(GBA, products.dA) =
        down_backward<Device>(GB, b.x, cast(b.A, dtype), b.weight, b.conv, b.need_x, b.need_factors);
    if (b.need_factors) {
      products.dB = reshaped(products.dB, sizes_of(b.B));
      products.with_h = Device::dot(GB, in_layout_of(b.h, GB));
    }
  }
  if (need_GW) products.with_x = finish_input_gradient<Device>(GW, GB, GBA, b);
  if (b.need_x) grads.x = GW;
  grads.rest = Device::gradients(products, b.A, b.B, b.s_d, b.norm);
  return grads;
}

template <class Device>
Grads lowrank_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight, const Tensor& A,
                            const Tensor& B, const Tensor& s_w, const Tensor& s_d, const Norm& norm,
                            const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                            bool weight_space, bool need_x, bool need_weight, bool need_bias, bool need_factors,
                            bool need_s_w) {
  const ConvArgs conv{stride, padding, dilation, groups};
  check_factors(A, B);
  check_scales(s_w, s_d, A);
  check_norm(norm, A);
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

  const auto call = Device::widening(x);
  const ConvBackward b{call.in(grad), call.in(x), weight_space ? h : call.in(h),
                       weight,        A,          B,
                       &s_w,          &s_d,       norm,
                       conv,          need_x,     need_weight,
                       need_factors,  need_s_w};
  const ConvGradients grads =
      weight_space ? conv_backward_in_weight_space<Device>(b) : conv_backward_in_activation_space<Device>(b);
  Tensor dbias;
  if (need_bias) {
    Sizes all_but_channels{0};
    for (int64_t i = 2; i < grad.dim(); ++i) all_but_channels.push_back(i);
    dbias = call.out(sum_over(b.grad, all_but_channels));
  }
  const Tensor dx = need_x ? call.out(grads.x) : Tensor();
  return all_gradients(dx, grads.weight, dbias, grads.rest, x, A, s_w);
}

}  // namespace mapsurgery
