// What the backwards end in: one launch for the gradients of both factors, with what the norm adds, and of the scalars.

#include "cuda/device.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace mapsurgery {
namespace {

constexpr int64_t kPerThread = 4, kMostBlocks = 4096;  // of wide_kernel

// A sum in parts.
struct Addends {
  Numbers numbers;
  int64_t first = 0, count = 0, step = 0;

  Addends() = default;
  explicit Addends(const std::optional<Parts>& parts) {
    if (!parts) return;
    numbers = Numbers(parts->numbers);
    first = parts->first;
    count = parts->count;
    step = parts->step;
  }

  // All threads of a block must call, and all get it.
  __device__ double sum() const {
    double of_thread = 0;
    numbers.typed([&](const auto* parts) {
      for (int64_t k = threadIdx.x; k < count; k += kThreads) of_thread += static_cast<double>(parts[first + k * step]);
    });
    return block_sum(of_thread);
  }
};

// s_d dA - radial gram_b A and s_d dB - radial B gram_a, and the gradients of the two scalars, see base/gradients.h.
template <class acc_t>
struct Job {
  Matrix dA, dB, A, B;   // no numbers in dA and dB: 0
  Numbers out_A, out_B;  // contiguous
  int64_t K, m;          // 0: no gradients of the factors
  int rank;
  Numbers s_d;
  const acc_t *gram_a = nullptr, *gram_b = nullptr;  // null: not through the norm
  const acc_t* slopes = nullptr;                     // null: the gradients of s_w and s_d, not of alpha and beta
  Addends with_x, with_h;
  acc_t *ds_w = nullptr, *ds_d = nullptr;  // null: not needed

  // <dL/dW', BA>. By the way the first block writes the gradients of the scalars.
  __device__ double along() const {
    const bool writes = blockIdx.x == 0;
    if (gram_a == nullptr && !writes) return 0;  // the whole block
    const double c = with_h.sum();
    if (writes) {
      const double x = with_x.sum();
      if (threadIdx.x == 0) {
        if (ds_w != nullptr) *ds_w = scaled(x, SLOPE_ALPHA);
        if (ds_d != nullptr) *ds_d = scaled(c, SLOPE_BETA);
      }
    }
    return c;
  }
  // What the norm adds to the gradient of a factor: what a product of the factor in its unit is multiplied with.
  __device__ acc_t radial(double c, Slope unit) const {
    if (gram_a == nullptr) return 0;
    return radial_of<acc_t>(c, slopes[SLOPE_UPDATE], slopes[SLOPE_NORM], slopes[unit]);
  }
  __device__ acc_t inverse(Slope unit) const { return gram_a == nullptr ? acc_t(1) : 1 / slopes[unit]; }
  __device__ acc_t scaled(double value, Slope slope) const {
    return static_cast<acc_t>(slopes == nullptr ? value : value * static_cast<double>(slopes[slope]));
  }
};

// Each thread takes a column of A, or a row of B.
template <class acc_t, int R>
__global__ void __launch_bounds__(kThreads) gradients_kernel(const __grid_constant__ Job<acc_t> g) {
  __shared__ acc_t gram[R * R], radial;
  const int64_t blocks_of_A = (g.K + kThreads - 1) / kThreads;
  const bool of_A = blockIdx.x < blocks_of_A, through_norm = g.gram_a != nullptr;
  const int64_t i = (of_A ? blockIdx.x : blockIdx.x - blocks_of_A) * kThreads + threadIdx.x;
  const bool inside = i < (of_A ? g.K : g.m);
  const auto load = [&](const Matrix& A, const Matrix& B, acc_t(&into)[R]) {
    const Matrix& matrix = of_A ? A : B;
    const int64_t step = of_A ? matrix.row_stride : matrix.column_stride;
    const int64_t from = i * (of_A ? matrix.column_stride : matrix.row_stride);
    const bool exists = inside && matrix.numbers.data != nullptr;
    matrix.numbers.typed([&](const auto* numbers) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        into[j] = exists && j < g.rank ? static_cast<acc_t>(numbers[from + j * step]) : acc_t(0);
      }
    });
  };
  acc_t own[R], grad[R];
  load(g.dA, g.dB, grad);
  if (through_norm) {
    load(g.A, g.B, own);
    for (int k = threadIdx.x; k < R * R; k += kThreads) {
      const int row = k / R, column = k % R;
      const bool exists = row < g.rank && column < g.rank;
      gram[k] = exists ? (of_A ? g.gram_b : g.gram_a)[row * g.rank + column] : acc_t(0);
    }
  }
  const Slope unit = of_A ? SLOPE_UNIT_A : SLOPE_UNIT_B;
  const double c = g.along();
  if (threadIdx.x == 0) radial = g.radial(c, unit);  // in double, which is slow on many GPUs
  const acc_t inverse = g.inverse(unit), s_d = g.s_d.template scalar<acc_t>();
  __syncthreads();  // the Gram matrix and the number are there
  if (!inside) return;
#pragma unroll
  for (int j = 0; j < R; ++j) grad[j] *= s_d;
  if (through_norm) {
#pragma unroll
    for (int j = 0; j < R; ++j) {
      acc_t product = 0;
#pragma unroll
      for (int k = 0; k < R; ++k) product += gram[j * R + k] * own[k];  // the Gram matrices are symmetric
      grad[j] -= radial * (inverse * product);
    }
  }
  const int64_t from = of_A ? i : i * g.rank, step = of_A ? g.K : 1;
  (of_A ? g.out_A : g.out_B).typed([&](auto* numbers) {
    using U = std::remove_pointer_t<decltype(numbers)>;
#pragma unroll
    for (int j = 0; j < R; ++j) {
      if (j < g.rank) numbers[from + j * step] = static_cast<U>(grad[j]);
    }
  });
}

// The same for any rank, with the products gram_b A and B gram_a at hand, contiguous; null: not through the norm.
template <class acc_t>
__global__ void __launch_bounds__(kThreads)
    wide_gradients_kernel(const __grid_constant__ Job<acc_t> g, const acc_t* product_A, const acc_t* product_B) {
  __shared__ acc_t radial_A, radial_B;
  const double c = g.along();
  if (threadIdx.x == 0) radial_A = g.radial(c, SLOPE_UNIT_A), radial_B = g.radial(c, SLOPE_UNIT_B);
  const acc_t inverse_A = g.inverse(SLOPE_UNIT_A), inverse_B = g.inverse(SLOPE_UNIT_B);
  const acc_t s_d = g.s_d.template scalar<acc_t>();
  __syncthreads();  // both numbers are there
  const int64_t numbers_of_A = g.rank * g.K, n = numbers_of_A + g.m * g.rank;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < n; k += step) {
    const bool of_A = k < numbers_of_A;
    const int64_t i = of_A ? k : k - numbers_of_A, columns = of_A ? g.K : g.rank;
    const Matrix& grad = of_A ? g.dA : g.dB;
    const acc_t* product = of_A ? product_A : product_B;
    acc_t value = 0;
    if (grad.numbers.data != nullptr) value = s_d * grad.template load<acc_t>(i / columns, i % columns);
    if (product != nullptr) value -= (of_A ? radial_A : radial_B) * ((of_A ? inverse_A : inverse_B) * product[i]);
    (of_A ? g.out_A : g.out_B).store(i, value);
  }
}

Matrix matrix_or_none(const Tensor& t) { return t.defined() ? Matrix(t) : Matrix(); }

}  // namespace

Gradients Cuda::gradients(const Products<Sum>& products, const Tensor& A, const Tensor& B, Scalar s_d,
                          const Norm& norm) {
  Gradients grads;
  if (!products.with_x && !products.with_h) return grads;
  const ScalarType acc = accumulate_dtype(A.scalar_type());
  const int64_t rank = A.size(0);
  if (products.with_x) grads.s_w = empty({1}, acc, A);
  if (products.with_h) {
    grads.s_d = empty({1}, acc, A);
    grads.A = empty(sizes_of(A), A.scalar_type(), A);
    grads.B = empty(sizes_of(B), B.scalar_type(), B);
  }
  const bool through_norm = products.with_h && !norm.empty(), wide = products.with_h && !is_thin(rank);
  Tensor gram_a, gram_b, product_A, product_B;
  if (through_norm) {
    gram_a = as_contiguous(norm[1]);
    gram_b = as_contiguous(norm[2]);
    if (wide) {
      product_A = mm(gram_b, cast(A, acc));
      product_B = mm(cast(B, acc), gram_a);
    }
  }
  dispatch_accumulate(acc, [&](auto type) {
    using acc_t = typename decltype(type)::type;
    Job<acc_t> job{};
    job.rank = static_cast<int>(rank);
    job.s_d = Numbers(s_d);
    job.with_x = Addends(products.with_x);
    job.with_h = Addends(products.with_h);
    if (!norm.empty()) job.slopes = data_of<acc_t>(norm[0]);
    if (products.with_x) job.ds_w = data_of<acc_t>(grads.s_w);
    if (products.with_h) {
      job.ds_d = data_of<acc_t>(grads.s_d);
      job.dA = matrix_or_none(products.dA), job.A = Matrix(A), job.out_A = Numbers(grads.A), job.K = A.size(1);
      job.dB = matrix_or_none(products.dB), job.B = Matrix(B), job.out_B = Numbers(grads.B), job.m = B.size(0);
    }
    if (through_norm) job.gram_a = data_of<acc_t>(gram_a), job.gram_b = data_of<acc_t>(gram_b);
    const cudaStream_t stream = current_stream(A);
    if (wide) {
      const auto pointer = [](const Tensor& t) { return t.defined() ? data_of<const acc_t>(t) : nullptr; };
      const unsigned blocks = blocks_for(rank * (job.K + job.m), kThreads * kPerThread, kMostBlocks);
      launch<wide_gradients_kernel<acc_t>>(blocks, kThreads, stream, job, pointer(product_A), pointer(product_B));
      return;
    }
    const auto blocks = [](int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); };
    const unsigned grid = std::max(1u, blocks(job.K) + blocks(job.m));
    dispatch_rank(rank,
                  [&](auto R) { launch<gradients_kernel<acc_t, decltype(R)::value>>(grid, kThreads, stream, job); });
  });
  return grads;
}

}  // namespace mapsurgery
