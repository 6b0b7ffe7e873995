// Half precision on processors that do not compute in it.
#pragma once

#include "base/tensor.h"

namespace mapsurgery {

// Whether torch multiplies matrices of this dtype in scalar loops here: then a cast to float32 and back is several to a
// hundred times quicker, and more exact.
inline bool is_emulated(ScalarType dtype) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  // What oneDNN asks for, through which torch computes in these dtypes.
  static const bool bfloat16 =
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq");
  static const bool half = !__builtin_cpu_supports("avx512fp16");
  return (dtype == ScalarType::BFloat16 && bfloat16) || (dtype == ScalarType::Half && half);
#else
  (void)dtype;
  return false;
#endif
}

// Below this many rows torch's products of a narrow matrix and a vector are quicker than a cast of the matrix.
constexpr int64_t kFewRows = 4;

// float32 in the place of the dtype of a call, where that pays.
struct Widening {
  ScalarType dtype;
  bool wide;

  Tensor in(const Tensor& t) const { return wide ? cast(t, ScalarType::Float) : t; }
  Tensor out(const Tensor& t) const { return wide ? cast(t, dtype) : t; }
};

}  // namespace mapsurgery
