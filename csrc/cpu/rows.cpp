#include "cpu/rows.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace mapsurgery {
namespace {

using torch::headeronly::Half;

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class acc_t, class T>
acc_t widen(T value) {
  return static_cast<acc_t>(value);
}

// Half's own conversions branch, which keeps the compiler from vectorising them; these mask.
template <class acc_t>
acc_t widen(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.x & 0x7fff) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * float_of(0x77800000));  // 2^112, the difference of the biases
  const uint32_t bits = finite | (magnitude >= 0x0f800000 ? 0x7f800000 : 0);
  return static_cast<acc_t>(float_of(bits | static_cast<uint32_t>(value.x & 0x8000) << 16));
}

// Rounds to nearest, ties to even.
inline Half half_of(float value) {
  const uint32_t bits = bits_of(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;                            // NaN, infinity
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(0x3f000000)) - 0x3f000000;  // 0.5 rounds for us
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t is_special = magnitude >= 0x47800000 ? ~0u : 0, is_subnormal = magnitude < 0x38800000 ? ~0u : 0;
  const uint32_t half = (special & is_special) | (subnormal & is_subnormal) | (normal & ~is_special & ~is_subnormal);
  return Half(static_cast<uint16_t>(half | sign >> 16), Half::from_bits());
}

template <class T, class acc_t>
T narrow(acc_t value) {
  if constexpr (std::is_same_v<T, Half> && std::is_same_v<acc_t, float>) return half_of(value);
  return static_cast<T>(value);
}

}  // namespace

template <class acc_t, class T>
MAPSURGERY_SIMD void load_row(acc_t* __restrict dst, const T* __restrict src, int64_t stride, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = widen<acc_t>(src[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = widen<acc_t>(src[i * stride]);
  }
}

template <class acc_t, class T>
MAPSURGERY_SIMD void store_row(T* __restrict dst, int64_t stride, const acc_t* __restrict src, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = narrow<T>(src[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i * stride] = narrow<T>(src[i]);
  }
}

template <class acc_t>
MAPSURGERY_SIMD acc_t dot_row(const acc_t* a, const acc_t* b, int64_t n) {
  // Independent partial sums: the compiler may not reorder one sum, but it vectorises these.
  constexpr int64_t kLanes = 32;
  acc_t lanes[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += a[i] * b[i];
  acc_t sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

MAPSURGERY_SIMD void dot_row_by_8(double* sums, const double* a, const double* b, int64_t n) {
  constexpr int64_t kLanes = 32;
  double lanes[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += a[i] * b[i];
  for (int64_t k = 0; k < kLanes; ++k) sums[k % 8] += lanes[k];
}

template <class acc_t>
MAPSURGERY_SIMD void affine_row(acc_t* row, acc_t factor, acc_t shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = factor * row[i] + shift;
}

template <class acc_t>
MAPSURGERY_SIMD void affine_row(acc_t* __restrict row, acc_t factor, const acc_t* __restrict shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = factor * row[i] + shift[i];
}

template <class acc_t>
MAPSURGERY_SIMD void combine_row(acc_t* __restrict row, acc_t row_factor, const acc_t* __restrict other,
                                 acc_t other_factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = row_factor * row[i] + other_factor * other[i];
}

template <class acc_t>
MAPSURGERY_SIMD void add_rows(acc_t* __restrict row, const acc_t* factors, int64_t stride, const acc_t* __restrict rows,
                              int64_t row_stride, int64_t count, int64_t n) {
  constexpr int64_t kUnroll = 8;  // rows summed per pass, so that `row` is read and written once for all of them
  int64_t k = 0;
  for (; k + kUnroll <= count; k += kUnroll) {
    acc_t f[kUnroll];
    for (int64_t j = 0; j < kUnroll; ++j) f[j] = factors[(k + j) * stride];
    const acc_t* __restrict r = rows + k * row_stride;
    for (int64_t i = 0; i < n; ++i) {
      acc_t sum = row[i];
      for (int64_t j = 0; j < kUnroll; ++j) sum += f[j] * r[j * row_stride + i];
      row[i] = sum;
    }
  }
  for (; k < count; ++k) {
    const acc_t f = factors[k * stride];
    const acc_t* __restrict r = rows + k * row_stride;
    for (int64_t i = 0; i < n; ++i) row[i] += f * r[i];
  }
}

#define INSTANTIATE_CONVERSIONS(acc_t, T)                               \
  template void load_row<acc_t, T>(acc_t*, const T*, int64_t, int64_t); \
  template void store_row<acc_t, T>(T*, int64_t, const acc_t*, int64_t)

#define INSTANTIATE(acc_t)                                                       \
  INSTANTIATE_CONVERSIONS(acc_t, double);                                        \
  INSTANTIATE_CONVERSIONS(acc_t, float);                                         \
  INSTANTIATE_CONVERSIONS(acc_t, torch::headeronly::BFloat16);                   \
  INSTANTIATE_CONVERSIONS(acc_t, torch::headeronly::Half);                       \
  template acc_t dot_row<acc_t>(const acc_t*, const acc_t*, int64_t);            \
  template void affine_row<acc_t>(acc_t*, acc_t, acc_t, int64_t);                \
  template void affine_row<acc_t>(acc_t*, acc_t, const acc_t*, int64_t);         \
  template void combine_row<acc_t>(acc_t*, acc_t, const acc_t*, acc_t, int64_t); \
  template void add_rows<acc_t>(acc_t*, const acc_t*, int64_t, const acc_t*, int64_t, int64_t, int64_t)

INSTANTIATE(float);
INSTANTIATE(double);

}  // namespace mapsurgery
