// Small helpers over torch's stable ABI: views, allocation, casts and dispatch by dtype.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/errors.h"

namespace mapsurgery {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
// A number that training moves, (1,): a GPU's kernels read it by pointer, the host never waits for it. Null stands
// for 1.
using Scalar = const Tensor*;

// dtype of norms, Gram matrices and scalars.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// accumulate_dtype of what the two dtypes promote to.
inline ScalarType accumulate_dtype(ScalarType a, ScalarType b) {
  return a == ScalarType::Double ? a : accumulate_dtype(b);
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the C++ type of a floating dtype (the callers have checked that it is one).
template <class F>
auto dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "mapsurgery: expected a floating dtype, got ", toString(dtype));
      return f(Type<float>{});
  }
}

// The same for the dtypes that sums are accumulated in.
template <class F>
auto dispatch_accumulate(ScalarType dtype, F&& f) {
  return dtype == ScalarType::Double ? f(Type<double>{}) : f(Type<float>{});
}

inline Sizes sizes_of(const Tensor& t) {
  auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline Sizes strides_of(const Tensor& t) {
  auto strides = t.strides();
  return Sizes(strides.begin(), strides.end());
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return strides;
}

// Programs that look for a batch size that fits ask whether an error is one of memory by these words.
inline std::string words_of_failed_allocation(bool cuda) {
  if (const char* words = words_of_torch()) return words;
  return cuda ? "CUDA out of memory." : "DefaultCPUAllocator: can't allocate memory";
}

inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType dtype, const Tensor& like) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError failed =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &handle);
  if (failed) throw std::runtime_error(words_of_failed_allocation(like.is_cuda()));
  return Tensor(handle);
}

inline Tensor empty(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype, like);
}

// What stands for a result that was not asked for.
inline Tensor nothing(ScalarType dtype, const Tensor& like) { return empty({0}, dtype, like); }

// A view of the memory of t, `offset` elements from where t starts. Not a differentiable view.
inline Tensor view(const Tensor& t, const Sizes& sizes, const Sizes& strides, int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& t) { return view(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }

// Whether a matrix is walked along its columns: a transposed view.
inline bool is_column_major(const Tensor& t) { return t.stride(0) < t.stride(1); }

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// t in another shape: a view where its memory is contiguous, else a contiguous copy.
inline Tensor reshaped(const Tensor& t, const Sizes& sizes) {
  return view(as_contiguous(t), sizes, contiguous_strides(sizes));
}

inline Sizes with_last(Sizes sizes, int64_t last) {
  sizes.back() = last;
  return sizes;
}

inline int64_t product(const Sizes& sizes, size_t begin, size_t end) {
  int64_t result = 1;
  for (size_t i = begin; i < end; ++i) result *= sizes[i];
  return result;
}

// (..., n) as the matrix (T, n).
inline Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2) return t;
  Sizes sizes = sizes_of(t);
  return reshaped(t, {product(sizes, 0, sizes.size() - 1), sizes.back()});
}

// (n, ...) as the matrix (n, K).
inline Tensor as_columns(const Tensor& t) {
  if (t.dim() == 2) return t;
  Sizes sizes = sizes_of(t);
  return reshaped(t, {sizes[0], product(sizes, 1, sizes.size())});
}

// t with the strides of `other`, a dense tensor of the same shape.
inline Tensor in_layout_of(const Tensor& t, const Tensor& other) {
  if (strides_of(t) == strides_of(other)) return t;
  Tensor result = empty_strided(sizes_of(other), strides_of(other), t.scalar_type(), other);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(result.get(), t.get(), 0));
  return result;
}

}  // namespace mapsurgery
