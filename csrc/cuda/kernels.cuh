// What the CUDA kernels share: the stream, numbers of a dtype known at run time, sums over a block.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "base/scales.h"
#include "base/tensor.h"

namespace mapsurgery {

constexpr int kThreads = 256;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Blocks for n items, `per_block` each; kernels loop, so that a bounded number serves any n.
inline unsigned blocks_for(int64_t n, int64_t per_block, int64_t most) {
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(most, (n + per_block - 1) / per_block)));
}

enum class Kind { kFloat, kDouble, kBFloat16, kHalf };

inline Kind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Kind::kDouble;
    case ScalarType::BFloat16:
      return Kind::kBFloat16;
    case ScalarType::Half:
      return Kind::kHalf;
    default:
      return Kind::kFloat;
  }
}

// Memory of a floating dtype known at run time. All threads take the same branch.
struct Numbers {
  void* data = nullptr;
  Kind kind = Kind::kFloat;

  Numbers() = default;
  explicit Numbers(const Tensor& t) : data(t.data_ptr()), kind(kind_of(t.scalar_type())) {}
  explicit Numbers(Scalar scalar) : Numbers(scalar == nullptr ? Numbers() : Numbers(*scalar)) {}

  // The number of a Scalar.
  template <class acc_t>
  __device__ acc_t scalar() const {
    return data == nullptr ? acc_t(1) : load<acc_t>(0);
  }

  // Calls f with a typed pointer: one branch for many numbers, whose loads then wait for each other no more.
  template <class F>
  __device__ void typed(F f) const {
    switch (kind) {
      case Kind::kDouble:
        f(static_cast<double*>(data));
        break;
      case Kind::kBFloat16:
        f(static_cast<BFloat16*>(data));
        break;
      case Kind::kHalf:
        f(static_cast<Half*>(data));
        break;
      default:
        f(static_cast<float*>(data));
    }
  }

  template <class acc_t>
  __device__ acc_t load(int64_t i) const {
    acc_t value = 0;
    typed([&](const auto* numbers) { value = static_cast<acc_t>(numbers[i]); });
    return value;
  }

  template <class acc_t>
  __device__ void store(int64_t i, acc_t value) const {
    typed([&](auto* numbers) { numbers[i] = static_cast<std::remove_pointer_t<decltype(numbers)>>(value); });
  }
};

// A strided matrix.
struct Matrix {
  Numbers numbers;
  int64_t row_stride = 0, column_stride = 0;

  Matrix() = default;
  explicit Matrix(const Tensor& t) : numbers(t), row_stride(t.stride(0)), column_stride(t.stride(1)) {}

  __device__ int64_t at(int64_t row, int64_t column) const { return row * row_stride + column * column_stride; }

  template <class acc_t>
  __device__ acc_t load(int64_t row, int64_t column) const {
    return numbers.load<acc_t>(at(row, column));
  }
};

constexpr int kFewRanks = 8, kMostRanks = 16;  // that fit into registers

inline bool is_thin(int64_t rank) { return rank >= 1 && rank <= kMostRanks; }

// Calls f with the number of ranks that a kernel is built for, as a constant.
template <class F>
auto dispatch_rank(int64_t rank, F&& f) {
  return rank <= kFewRanks ? f(std::integral_constant<int, kFewRanks>()) : f(std::integral_constant<int, kMostRanks>());
}

// The sum of value over a block of kThreads, in an order that never changes. All threads must call, and all get it.
inline __device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  __syncthreads();  // the last call's sums may still be read
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  return sums[0];
}

}  // namespace mapsurgery
