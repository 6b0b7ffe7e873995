#include "cuda/device.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace mapsurgery {
namespace {

constexpr int kLanes = 32, kRows = 8;  // shape of a block
constexpr int kColumnsPerThread = 2, kRowsPerThread = 4;
constexpr int kTileColumns = kLanes * kColumnsPerThread, kTileRows = kRows * kRowsPerThread;
constexpr int kRank = 16;                  // part of the rank in shared memory at a time
constexpr int64_t kMostRowBlocks = 65535;  // what a grid allows in y

// out = s_w weight + s_d left right, or (weight - s_d left right) / s_w; left (m, r) and right (r, K) are acc_t.
// Each element is read and written once, by one thread: out may be the weight itself.
template <class acc_t>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Matrix weight, Matrix left, Matrix right, Matrix out, int64_t m, int64_t K, int64_t rank,
                   Numbers base_factor, Numbers update_factor, Combine mode) {
  __shared__ acc_t left_tile[kTileRows][kRank + 1], right_tile[kRank][kTileColumns + 1];
  const acc_t* left_data = static_cast<const acc_t*>(left.numbers.data);
  const acc_t* right_data = static_cast<const acc_t*>(right.numbers.data);
  const double s_w = base_factor.scalar<double>(), s_d = update_factor.scalar<double>();
  const acc_t base = static_cast<acc_t>(mode == Combine::kMerge ? s_w : 1 / s_w);
  const acc_t update = static_cast<acc_t>(mode == Combine::kMerge ? s_d : -s_d / s_w);
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTileColumns;

  for (int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTileRows; first_row < m;
       first_row += static_cast<int64_t>(gridDim.y) * kTileRows) {
    acc_t sum[kRowsPerThread][kColumnsPerThread] = {};
    for (int64_t start = 0; start < rank; start += kRank) {
      for (int k = thread; k < kTileRows * kRank; k += kThreads) {
        const int64_t i = first_row + k / kRank, j = start + k % kRank;
        left_tile[k / kRank][k % kRank] = i < m && j < rank ? left_data[left.at(i, j)] : acc_t(0);
      }
      for (int k = thread; k < kRank * kTileColumns; k += kThreads) {
        const int64_t j = start + k / kTileColumns, i = first_column + k % kTileColumns;
        right_tile[k / kTileColumns][k % kTileColumns] = j < rank && i < K ? right_data[right.at(j, i)] : acc_t(0);
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kRank; ++j) {
#pragma unroll
        for (int a = 0; a < kRowsPerThread; ++a) {
#pragma unroll
          for (int b = 0; b < kColumnsPerThread; ++b) {
            sum[a][b] += left_tile[threadIdx.y + kRows * a][j] * right_tile[j][threadIdx.x + kLanes * b];
          }
        }
      }
      __syncthreads();  // the tiles are read before the next part overwrites them
    }
    for (int a = 0; a < kRowsPerThread; ++a) {
      for (int b = 0; b < kColumnsPerThread; ++b) {
        const int64_t row = first_row + threadIdx.y + kRows * a, column = first_column + threadIdx.x + kLanes * b;
        if (row >= m || column >= K) continue;
        const acc_t old = weight.numbers.load<acc_t>(weight.at(row, column));
        out.numbers.store<acc_t>(out.at(row, column), base * old + update * sum[a][b]);
      }
    }
  }
}

}  // namespace

void Cuda::combine(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& s_w, const Tensor& s_d,
                   Combine mode, const Tensor& out) {
  // Neighbouring threads write neighbouring numbers: the transpose of W' is the same with the factors' roles swapped.
  if (is_column_major(weight)) {
    return combine(transposed(weight), transposed(B), transposed(A), s_w, s_d, mode, transposed(out));
  }
  const int64_t m = weight.size(0), K = weight.size(1);
  if (m == 0 || K == 0) return;
  const ScalarType acc = accumulate_dtype(weight.scalar_type(), A.scalar_type());
  const Tensor left = cast(B, acc), right = cast(A, acc);
  const dim3 grid(static_cast<unsigned>((K + kTileColumns - 1) / kTileColumns),
                  blocks_for(m, kTileRows, kMostRowBlocks));
  dispatch_accumulate(acc, [&](auto type) {
    launch<combine_kernel<typename decltype(type)::type>>(grid, dim3(kLanes, kRows), current_stream(weight),
                                                          Matrix(weight), Matrix(left), Matrix(right), Matrix(out), m,
                                                          K, A.size(0), Numbers(s_w), Numbers(s_d), mode);
  });
}

Tensor Cuda::scaled(const Tensor& t, const Tensor& scale, ScalarType dtype) {
  const ScalarType acc = accumulate_dtype(t.scalar_type());
  const Tensor out = empty(sizes_of(t), dtype, t);
  combine(t, empty({0, t.size(1)}, acc, t), empty({t.size(0), 0}, acc, t), scale, scale, Combine::kMerge, out);
  return out;
}

}  // namespace mapsurgery
