#include <type_traits>

#include "cuda/device.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace mapsurgery {
namespace {

constexpr int64_t kMostBlocks = 4096;
constexpr int64_t kMostPartials = 1024;
constexpr int64_t kPerThread = 4;  // of tangent_kernel

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

// out = scale in; in and out may be the same.
template <class T>
__global__ void scale_kernel(const T* in, T* out, int64_t n, Numbers scales, int index) {
  using acc_t = accumulate_t<T>;
  const acc_t scale = scales.load<acc_t>(index);
  for_each<kBatch<T>>(
      n, [&](int64_t i) { return in[i]; },
      [&](int64_t i, T value) { out[i] = static_cast<T>(scale * static_cast<acc_t>(value)); });
}

template <class T>
void launch_scale(const Tensor& in, const Tensor& out, Scale scale) {
  const int64_t n = in.numel();
  launch<scale_kernel<T>>(blocks_for(n, kThreads * kBatch<T>, kMostBlocks), kThreads, current_stream(in),
                          data_of<T>(in), data_of<T>(out), n, Numbers(scale.scales), scale.index);
}

constexpr int kLanes = 32;   // columns side by side in a block ...
constexpr int kRows = 8;     // ... rows of a block ...
constexpr int kColumns = 4;  // ... and columns of one thread

// t (rows, columns) = scale t + bias, which goes along the columns or is one number per row, taken in turn.
template <class T, bool along_columns>
__global__ void scale_and_bias_kernel(T* t, int64_t rows, int64_t columns, const T* bias, int64_t channels,
                                      Numbers scales, int index) {
  using acc_t = accumulate_t<T>;
  const acc_t scale = scales.load<acc_t>(index);
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
void launch_scale_and_bias(const Tensor& t, Scale scale, const Tensor& bias, int64_t channel_stride) {
  const int64_t channels = bias.size(0);
  const int64_t columns = channel_stride == 1 ? channels : channel_stride, rows = t.numel() / columns;
  const dim3 grid(static_cast<unsigned>((columns + kLanes * kColumns - 1) / (kLanes * kColumns)),
                  blocks_for(rows, kRows, kMostBlocks));
  const auto run = [&](auto along_columns) {
    launch<scale_and_bias_kernel<T, decltype(along_columns)::value>>(grid, dim3(kLanes, kRows), current_stream(t),
                                                                     data_of<T>(t), rows, columns, data_of<T>(bias),
                                                                     channels, Numbers(scale.scales), scale.index);
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

// The same, and b = s_w b + s_d other.
template <class T>
__global__ void dot_and_combine_kernel(const T* a, T* b, const T* other, int64_t n, Numbers scales, double* partial) {
  using acc_t = accumulate_t<T>;
  const acc_t s_w = scales.load<acc_t>(S_W), s_d = scales.load<acc_t>(S_D);
  acc_t sum = 0;
  for_each<kDotBatch<T, T>>(
      n, [&](int64_t i) { return Triple<T>{a[i], b[i], other[i]}; },
      [&](int64_t i, Triple<T> triple) {
        const acc_t value = static_cast<acc_t>(triple.b);
        sum += static_cast<acc_t>(triple.a) * value;
        b[i] = static_cast<T>(s_w * value + s_d * static_cast<acc_t>(triple.other));
      });
  const double total = block_sum(static_cast<double>(sum));
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// One block: value = the sum of the partial sums, scaled = value scales[index].
__global__ void finish_dot_kernel(const double* partial, int count, Numbers scales, int index, Numbers value,
                                  Numbers scaled) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) {
    value.store(0, total);
    scaled.store(0, total * scales.load<double>(index));
  }
}

// The sum that `sum_parts(blocks, partial)` leaves in parts, one per block.
template <class F>
Dot sum_of_blocks(int64_t n, int64_t per_block, const Tensor& scales, ScaleIndex index, const F& sum_parts) {
  const unsigned blocks = blocks_for(n, per_block, kMostPartials);
  const Tensor partial = empty({blocks}, ScalarType::Double, scales);
  Dot result{empty({1}, scales.scalar_type(), scales), empty({1}, scales.scalar_type(), scales)};
  sum_parts(blocks, data_of<double>(partial));
  launch<finish_dot_kernel>(1, kThreads, current_stream(scales), data_of<double>(partial), static_cast<int>(blocks),
                            Numbers(scales), index, Numbers(result.value), Numbers(result.scaled));
  return result;
}

template <class T, class U>
Dot launch_dot(const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex index) {
  const int64_t n = a.numel();
  return sum_of_blocks(n, kThreads * kDotBatch<T, U>, scales, index, [&](unsigned blocks, double* partial) {
    launch<dot_kernel<T, U>>(blocks, kThreads, current_stream(a), data_of<T>(a), data_of<U>(b), n, partial);
  });
}

template <class T>
Dot launch_dot_and_combine(const Tensor& a, const Tensor& b, const Tensor& other, const Tensor& scales,
                           ScaleIndex index) {
  const int64_t n = b.numel();
  return sum_of_blocks(n, kThreads * kDotBatch<T, T>, scales, index, [&](unsigned blocks, double* partial) {
    launch<dot_and_combine_kernel<T>>(blocks, kThreads, current_stream(b), data_of<T>(a), data_of<T>(b),
                                      data_of<T>(other), n, Numbers(scales), partial);
  });
}

// out = s_d grad - c RADIAL product, element by element.
template <class acc_t>
__global__ void tangent_kernel(Numbers grad, const acc_t* product, Numbers out, int64_t n, const acc_t* c,
                               const acc_t* scales) {
  const acc_t s_d = scales[S_D], radial = c[0] * scales[RADIAL];
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    out.store(i, s_d * grad.load<acc_t>(i) - radial * product[i]);
  }
}

template <class acc_t>
void launch_tangent(const Tensor& grad, const Tensor& product, const Tensor& out, const Tensor& c,
                    const Tensor& scales) {
  const int64_t n = out.numel();
  launch<tangent_kernel<acc_t>>(blocks_for(n, kThreads * kPerThread, kMostBlocks), kThreads, current_stream(out),
                                Numbers(grad), data_of<acc_t>(product), Numbers(out), n, data_of<acc_t>(c),
                                data_of<acc_t>(scales));
}

}  // namespace

Dot Cuda::dot(const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex index) {
  return dispatch_floating(a.scalar_type(), [&](auto a_type) {
    return dispatch_floating(b.scalar_type(), [&](auto b_type) {
      return launch_dot<typename decltype(a_type)::type, typename decltype(b_type)::type>(a, b, scales, index);
    });
  });
}

Dot Cuda::dot_and_combine_(const Tensor& a, Tensor& b, const Tensor& other, const Tensor& scales, ScaleIndex index) {
  return dispatch_floating(b.scalar_type(), [&](auto type) {
    return launch_dot_and_combine<typename decltype(type)::type>(a, b, other, scales, index);
  });
}

void Cuda::scale_(Tensor& t, Scale scale) {
  dispatch_floating(t.scalar_type(), [&](auto type) { launch_scale<typename decltype(type)::type>(t, t, scale); });
}

Tensor Cuda::scaled(const Tensor& t, Scale scale) {
  Tensor out = empty(sizes_of(t), t.scalar_type(), t);
  dispatch_floating(t.scalar_type(),
                    [&](auto type) { launch_scale<typename decltype(type)::type>(as_contiguous(t), out, scale); });
  return out;
}

void Cuda::scale_and_bias_(Tensor& t, Scale scale, const std::optional<Tensor>& bias, int64_t channel_stride) {
  if (!bias) return scale_(t, scale);
  if (t.numel() == 0) return;
  dispatch_floating(t.scalar_type(), [&](auto type) {
    launch_scale_and_bias<typename decltype(type)::type>(t, scale, *bias, channel_stride);
  });
}

Tensor Cuda::tangent(const Tensor& grad, const Tensor& left, const Tensor& right, const Tensor& c, const Tensor& scales,
                     ScalarType dtype) {
  const Tensor product = mm(left, right);
  Tensor out = empty(sizes_of(grad), dtype, grad);
  dispatch_accumulate(scales.scalar_type(), [&](auto type) {
    launch_tangent<typename decltype(type)::type>(as_contiguous(grad), product, out, c, scales);
  });
  return out;
}

}  // namespace mapsurgery
