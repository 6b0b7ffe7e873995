// Activations (N, C, *spatial), dense in one of two orders of memory: channels first or channels last.
#pragma once

#include "base/tensor.h"

namespace mapsurgery {

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

}  // namespace mapsurgery
