// What the CUDA kernels share: the stream, numbers of a dtype known at run time, sums over a block.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common/scales.h"
#include "common/tensor.h"

namespace mapsurgery {

constexpr int kThreads = 256;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
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
    switch (kind) {
      case Kind::kDouble:
        return static_cast<acc_t>(static_cast<const double*>(data)[i]);
      case Kind::kBFloat16:
        return static_cast<acc_t>(static_cast<float>(static_cast<const BFloat16*>(data)[i]));
      case Kind::kHalf:
        return static_cast<acc_t>(static_cast<float>(static_cast<const Half*>(data)[i]));
      default:
        return static_cast<acc_t>(static_cast<const float*>(data)[i]);
    }
  }

  template <class acc_t>
  __device__ void store(int64_t i, acc_t value) const {
    switch (kind) {
      case Kind::kDouble:
        static_cast<double*>(data)[i] = static_cast<double>(value);
        break;
      case Kind::kBFloat16:
        static_cast<BFloat16*>(data)[i] = static_cast<BFloat16>(static_cast<float>(value));
        break;
      case Kind::kHalf:
        static_cast<Half*>(data)[i] = static_cast<Half>(static_cast<float>(value));
        break;
      default:
        static_cast<float*>(data)[i] = static_cast<float>(value);
    }
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
