#include <type_traits>

#include "cuda/device.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace mapsurgery {
namespace {

constexpr int64_t kMostBlocks = 4096;
constexpr int64_t kMostPartials = 1024;

// Numbers that a thread reads before it writes the first of them. The compiler may not move a load above a store that
// could hit the same memory, and one narrow load at a time leaves most of the memory's bandwidth idle.
template <class T>
constexpr int kBatch = 16 / sizeof(T);

// store(i, load(i)) for all i < n that fall to this thread, in batches.
template <int batch, class Load, class Store>
__device__ void for_each(int64_t n, Load load, Store store) {
  constexpr int64_t tile = static_cast<int64_t>(kThreads) * batch;
  for (int64_t first = blockIdx.x * tile + threadIdx.x; first < n; first += gridDim.x * tile) {
    decltype(load(first)) values[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (first + k * kThreads < n) values[k] = load(first + k * kThreads);
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (first + k * kThreads < n) store(first + k * kThreads, values[k]);
    }
  }
}

template <class T, class U>
struct Pair {
  T a;
  U b;
};

// The widest of two dtypes' accumulation types.
template <class T, class U>
using common_acc_t = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<U, double>, double, float>;

// t = factor t
template <class T>
__global__ void scale_kernel(T* t, int64_t n, Numbers factor) {
  using acc_t = accumulate_t<T>;
  const acc_t scale = factor.scalar<acc_t>();
  for_each<kBatch<T>>(
      n, [&](int64_t i) { return t[i]; },
      [&](int64_t i, T value) { t[i] = static_cast<T>(scale * static_cast<acc_t>(value)); });
}

constexpr int kLanes = 32;   // columns side by side in a block ...
constexpr int kRows = 8;     // ... rows of a block ...
constexpr int kColumns = 4;  // ... and columns of one thread

// t (rows, columns) = scale t + bias, which goes along the columns or is one number per row, taken in turn.
template <class T, bool along_columns>
__global__ void scale_and_bias_kernel(T* t, int64_t rows, int64_t columns, const T* bias, int64_t channels,
                                      Numbers factor) {
  using acc_t = accumulate_t<T>;
  const acc_t scale = factor.scalar<acc_t>();
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kLanes * kColumns + threadIdx.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kRows + threadIdx.y; row < rows;
       row += static_cast<int64_t>(gridDim.y) * kRows) {
    const acc_t row_bias = along_columns ? acc_t(0) : static_cast<acc_t>(bias[row % channels]);
    T* numbers = t + row * columns;
    Pair<T, acc_t> values[kColumns];  // read before the first is written, as in for_each
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int64_t column = first_column + k * kLanes;
      if (column >= columns) continue;
      values[k] = {numbers[column], along_columns ? static_cast<acc_t>(bias[column]) : row_bias};
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int64_t column = first_column + k * kLanes;
      if (column < columns) {
        numbers[column] = static_cast<T>(scale * static_cast<acc_t>(values[k].a) + values[k].b);
      }
    }
  }
}

template <class T>
void launch_scale_and_bias(const Tensor& t, Scalar scale, const Tensor& bias, int64_t channel_stride) {
  const int64_t channels = bias.size(0);
  const int64_t columns = channel_stride == 1 ? channels : channel_stride, rows = t.numel() / columns;
  const dim3 grid(static_cast<unsigned>((columns + kLanes * kColumns - 1) / (kLanes * kColumns)),
                  blocks_for(rows, kRows, kMostBlocks));
  const auto run = [&](auto along_columns) {
    launch<scale_and_bias_kernel<T, decltype(along_columns)::value>>(grid, dim3(kLanes, kRows), current_stream(t),
                                                                     data_of<T>(t), rows, columns, data_of<T>(bias),
                                                                     channels, Numbers(scale));
  };
  if (channel_stride == 1) {
    run(std::true_type());
  } else {
    run(std::false_type());
  }
}

template <class T, class U>
constexpr int kDotBatch = 32 / (sizeof(T) + sizeof(U));

template <class T>
struct Triple {
  T a, b, other;
};

// partial[block] = the block's share of <a, b>.
template <class T, class U>
__global__ void dot_kernel(const T* a, const U* b, int64_t n, double* partial) {
  using acc_t = common_acc_t<T, U>;
  acc_t sum = 0;
  for_each<kDotBatch<T, U>>(
      n, [&](int64_t i) { return Pair<T, U>{a[i], b[i]}; },
      [&](int64_t, Pair<T, U> pair) { sum += static_cast<acc_t>(pair.a) * static_cast<acc_t>(pair.b); });
  const double total = block_sum(static_cast<double>(sum));
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// The same, and b = keep b + s_d other, where other may be null.
template <class T>
__global__ void dot_and_combine_kernel(const T* a, T* b, const T* other, int64_t n, Numbers keep, Numbers s_d,
                                       double* partial) {
  using acc_t = accumulate_t<T>;
  const acc_t kept = keep.scalar<acc_t>(), factor = s_d.scalar<acc_t>();
  acc_t sum = 0;
  for_each<kDotBatch<T, T>>(
      n, [&](int64_t i) { return Triple<T>{a[i], b[i], other == nullptr ? T(0) : other[i]}; },
      [&](int64_t i, Triple<T> triple) {
        const acc_t value = static_cast<acc_t>(triple.b);
        sum += static_cast<acc_t>(triple.a) * value;
        b[i] = static_cast<T>(kept * value + (other == nullptr ? acc_t(0) : factor * static_cast<acc_t>(triple.other)));
      });
  const double total = block_sum(static_cast<double>(sum));
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// The sum that `sum_parts(blocks, partial)` leaves in parts, one per block.
template <class F>
Parts sum_of_blocks(int64_t n, int64_t per_block, const Tensor& like, const F& sum_parts) {
  const unsigned blocks = blocks_for(n, per_block, kMostPartials);
  const Tensor partial = empty({blocks}, ScalarType::Double, like);
  sum_parts(blocks, data_of<double>(partial));
  return {partial, 0, blocks, 1};
}

template <class T, class U>
Parts launch_dot(const Tensor& a, const Tensor& b) {
  const int64_t n = a.numel();
  return sum_of_blocks(n, kThreads * kDotBatch<T, U>, a, [&](unsigned blocks, double* partial) {
    launch<dot_kernel<T, U>>(blocks, kThreads, current_stream(a), data_of<T>(a), data_of<U>(b), n, partial);
  });
}

}  // namespace

Parts Cuda::dot(const Tensor& a, const Tensor& b) {
  return dispatch_floating(a.scalar_type(), [&](auto a_type) {
    return dispatch_floating(b.scalar_type(), [&](auto b_type) {
      return launch_dot<typename decltype(a_type)::type, typename decltype(b_type)::type>(a, b);
    });
  });
}

Parts Cuda::dot_and_combine_(const Tensor& a, Tensor& b, Scalar keep, const Tensor* other, Scalar s_d) {
  return dispatch_floating(b.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t n = b.numel();
    const T* more = other == nullptr ? nullptr : data_of<T>(*other);
    return sum_of_blocks(n, kThreads * kDotBatch<T, T>, b, [&](unsigned blocks, double* partial) {
      launch<dot_and_combine_kernel<T>>(blocks, kThreads, current_stream(b), data_of<T>(a), data_of<T>(b), more, n,
                                        Numbers(keep), Numbers(s_d), partial);
    });
  });
}

void Cuda::scale_(Tensor& t, Scalar scale) {
  if (scale == nullptr) return;
  dispatch_floating(t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t n = t.numel();
    launch<scale_kernel<T>>(blocks_for(n, kThreads * kBatch<T>, kMostBlocks), kThreads, current_stream(t),
                            data_of<T>(t), n, Numbers(scale));
  });
}

void Cuda::scale_and_bias_(Tensor& t, Scalar scale, const std::optional<Tensor>& bias, int64_t channel_stride) {
  if (!bias) return scale_(t, scale);
  if (t.numel() == 0) return;
  dispatch_floating(t.scalar_type(), [&](auto type) {
    launch_scale_and_bias<typename decltype(type)::type>(t, scale, *bias, channel_stride);
  });
}

// cuBLAS reads its factors from the device, and 1 is one of them.
namespace {
__device__ float one_float = 1;
__device__ double one_double = 1;
}  // namespace

const void* Cuda::one(ScalarType dtype) {
  void* address = nullptr;
  STD_CUDA_CHECK(dtype == ScalarType::Double ? cudaGetSymbolAddress(&address, one_double)
                                             : cudaGetSymbolAddress(&address, one_float));
  return address;
}

}  // namespace mapsurgery
