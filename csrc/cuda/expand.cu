// What the low-rank half of a layer does beside its matrix products, for ranks that fit into registers: one pass over
// an activation instead of two or three. The factors are read in their own dtype: nothing is cast beforehand, and s_d
// h, which can overflow float16, is never stored.

#include <type_traits>

#include "cuda/device.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace mapsurgery {
namespace {

constexpr int kLanes = 32, kRows = kThreads / kLanes;  // a block: 32 threads along the columns of each of 8 rows
constexpr int kInFlight = 2;                           // rows of a thread: both are read before the first is written
constexpr int64_t kPass = kRows * kInFlight;           // rows that a block works on at once
constexpr int64_t kMostTileRows = 8 * kPass;           // rows of the left factor in shared memory at a time
constexpr int64_t kBlocks = 264;  // as many as run at once on a large GPU: each loads its factor once

// Columns of a thread: what one access of 16 bytes holds, as long as its part of the factor takes 64 registers at most.
template <class T, int R>
constexpr int kColumns = 16 / int(sizeof(T)) < 64 / R ? 16 / int(sizeof(T)) : 64 / R;

template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  T at[n];
};

// n numbers that lie together, at an address that fits.
template <int n, class T>
__device__ void load_pack(const T* from, T* into) {
  const Pack<T, n> pack = *reinterpret_cast<const Pack<T, n>*>(from);
#pragma unroll
  for (int i = 0; i < n; ++i) into[i] = pack.at[i];
}

// out (rows, columns) = keep out + s_d left right + bias, and two sums by the way: <x, out> of what out was, <left, h>.
template <class T>
struct Expansion {
  T* out;
  const T* left;  // (rows, rank), contiguous
  Matrix right;   // (rank, columns)
  Numbers keep, s_d;
  int64_t rows, columns, tile_rows = 0;
  int rank;
  bool reads = true, writes = true;  // whether out holds numbers, and whether it gets new ones
  Numbers bias;
  int64_t bias_stride = 0;
  const T *x = nullptr, *h = nullptr;  // like out and left; null: no sum with it
  double* sums = nullptr;              // those of each block: <x, out>, then <left, h>

  Expansion(const Tensor& out, const Tensor& left, const Tensor& right, Scalar keep, Scalar s_d)
      : out(data_of<T>(out)),
        left(data_of<const T>(left)),
        right(right),
        keep(keep),
        s_d(s_d),
        rows(out.size(0)),
        columns(out.size(1)),
        rank(static_cast<int>(right.size(0))) {}
};

// aligned: the columns of a thread are one access of out and of x.
template <class T, int R, bool aligned>
__global__ void __launch_bounds__(kThreads, 2) expand_kernel(const __grid_constant__ Expansion<T> e) {
  using acc_t = accumulate_t<T>;
  constexpr int kWide = kColumns<T, R>, kTile = kLanes * kWide;
  const int lane = threadIdx.x % kLanes, line = threadIdx.x / kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  // Neighbouring threads read neighbouring numbers, one by one where they cannot read several at once.
  const auto column = [&](int v) { return aligned ? lane * kWide + v : v * kLanes + lane; };
  const int columns = static_cast<int>(min(static_cast<int64_t>(kTile), e.columns - first));  // of the block

  const acc_t keep = e.keep.template scalar<acc_t>(), s_d = e.s_d.template scalar<acc_t>();
  const bool sums = e.h != nullptr, sums_x = e.x != nullptr, keeps = e.reads && keep != 0;  // BLAS drops what meets 0

  // s_d times the block's part of the right factor, and the bias as one row more; then each thread's own part of them.
  __shared__ acc_t tile[R + 1][kTile + 4];                             // + 4: no bank conflicts
  const bool by_columns = e.right.row_stride < e.right.column_stride;  // neighbours in memory to neighbouring threads
  e.right.numbers.typed([&](const auto* numbers) {
#pragma unroll
    for (int k = threadIdx.x; k < R * kTile; k += kThreads) {
      const int j = by_columns ? k % R : k / kTile, i = by_columns ? k / R : k % kTile;
      const bool exists = j < e.rank && i < columns;
      tile[j][i] = exists ? s_d * static_cast<acc_t>(numbers[e.right.at(j, first + i)]) : acc_t(0);
    }
  });
  e.bias.typed([&](const auto* numbers) {
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
      const bool exists = numbers != nullptr && i < columns;
      tile[R][i] = exists ? static_cast<acc_t>(numbers[(first + i) * e.bias_stride]) : acc_t(0);
    }
  });
  __syncthreads();
  acc_t right[R][kWide], bias[kWide];
#pragma unroll
  for (int v = 0; v < kWide; ++v) {
    bias[v] = tile[R][column(v)];
#pragma unroll
    for (int j = 0; j < R; ++j) right[j][v] = tile[j][column(v)];
  }

  __shared__ acc_t left[kMostTileRows][R];
  acc_t with_x = 0, with_h = 0;
  const int64_t step = static_cast<int64_t>(gridDim.y) * e.tile_rows;
  for (int64_t start = blockIdx.y * e.tile_rows; start < e.rows; start += step) {
    const int rows = static_cast<int>(min(e.tile_rows, e.rows - start));
    __syncthreads();  // the last rows may still be read
    for (int k = threadIdx.x; k < rows * R; k += kThreads) {
      const int row = k / R, j = k % R;
      const int64_t at = (start + row) * e.rank + j;
      const acc_t value = j < e.rank ? static_cast<acc_t>(e.left[at]) : acc_t(0);
      left[row][j] = value;
      if (sums && blockIdx.x == 0 && j < e.rank) with_h += value * static_cast<acc_t>(e.h[at]);
    }
    __syncthreads();
    for (int row = line * kInFlight; row < rows; row += kPass) {
      T* const out = e.out + (start + row) * e.columns + first;
      const T* const x = e.x + (start + row) * e.columns + first;
      T old[kInFlight][kWide] = {}, other[kInFlight][kWide] = {};
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (row + k >= rows) continue;
        if constexpr (aligned) {
          if (column(0) >= columns) continue;
          if (e.reads) load_pack<kWide>(out + k * e.columns + column(0), old[k]);
          if (sums_x) load_pack<kWide>(x + k * e.columns + column(0), other[k]);
        } else {
#pragma unroll
          for (int v = 0; v < kWide; ++v) {
            if (column(v) >= columns) continue;
            if (e.reads) old[k][v] = out[k * e.columns + column(v)];
            if (sums_x) other[k][v] = x[k * e.columns + column(v)];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (row + k >= rows) continue;
        acc_t result[kWide];
#pragma unroll
        for (int v = 0; v < kWide; ++v) {
          const acc_t before = static_cast<acc_t>(old[k][v]);
          with_x += static_cast<acc_t>(other[k][v]) * before;
          result[v] = (keeps ? keep * before : acc_t(0)) + bias[v];
        }
#pragma unroll
        for (int j = 0; j < R; ++j) {
          const acc_t factor = left[row + k][j];
#pragma unroll
          for (int v = 0; v < kWide; ++v) result[v] += factor * right[j][v];
        }
        if (!e.writes) continue;
        if constexpr (aligned) {
          Pack<T, kWide> pack;
#pragma unroll
          for (int v = 0; v < kWide; ++v) pack.at[v] = static_cast<T>(result[v]);
          if (column(0) < columns) *reinterpret_cast<Pack<T, kWide>*>(out + k * e.columns + column(0)) = pack;
        } else {
#pragma unroll
          for (int v = 0; v < kWide; ++v) {
            if (column(v) < columns) out[k * e.columns + column(v)] = static_cast<T>(result[v]);
          }
        }
      }
    }
  }
  if (!sums) return;  // the whole grid
  const double total_x = block_sum(static_cast<double>(with_x)), total_h = block_sum(static_cast<double>(with_h));
  if (threadIdx.x == 0) {
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    e.sums[2 * block] = total_x;
    e.sums[2 * block + 1] = total_h;
  }
}

template <class T>
bool fits(const T* data, int64_t length, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && length * sizeof(T) % bytes == 0;
}

// Runs an expansion; where it sums, returns the blocks' sums (blocks, 2).
template <class T>
Tensor expand(Expansion<T> e, const Tensor& like) {
  return dispatch_rank(e.rank, [&](auto R) {
    constexpr int kRanks = decltype(R)::value;
    constexpr int64_t wide = kLanes * kColumns<T, kRanks>;
    const int64_t x = (e.columns + wide - 1) / wide, most = std::max<int64_t>(1, kBlocks / x);
    // Tiles as large as fit, but so that all blocks have rows.
    const int64_t share = (e.rows + most - 1) / most;
    e.tile_rows = std::min(kMostTileRows, (share + kPass - 1) / kPass * kPass);
    const dim3 grid(static_cast<unsigned>(x), blocks_for(e.rows, e.tile_rows, most));
    Tensor sums;
    if (e.h != nullptr) {
      sums = empty({static_cast<int64_t>(grid.x) * grid.y, 2}, ScalarType::Double, like);
      e.sums = data_of<double>(sums);
    }
    constexpr size_t bytes = kColumns<T, kRanks> * sizeof(T);
    if (fits(e.out, e.columns, bytes) && (e.x == nullptr || fits(e.x, e.columns, bytes))) {
      launch<expand_kernel<T, kRanks, true>>(grid, kThreads, current_stream(like), e);
    } else {
      launch<expand_kernel<T, kRanks, false>>(grid, kThreads, current_stream(like), e);
    }
    return sums;
  });
}

}  // namespace

bool Cuda::expands(const Tensor& out, int64_t rank) { return is_thin(rank) && out.numel() > 0 && out.is_contiguous(); }

void Cuda::expand_(const Tensor& out, Scalar keep, bool reads, const Tensor& left, const Tensor& right,
                   const std::optional<Tensor>& bias, Scalar s_d) {
  const Tensor rows = as_contiguous(left);
  dispatch_floating(out.scalar_type(), [&](auto type) {
    Expansion<typename decltype(type)::type> e(out, rows, right, keep, s_d);
    e.reads = reads;
    if (bias) {
      e.bias = Numbers(*bias);
      e.bias_stride = bias->stride(0);
    }
    expand(e, out);
  });
}

Products<Parts> Cuda::down_backward_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& H, const Tensor& A,
                                     Scalar s_w, Scalar s_d, bool need_x, bool need_factors, bool need_s_w) {
  if (!need_factors || !GW.defined() || !expands(GW, A.size(0))) {
    return down_backward_by_gemm_<Cuda>(X, GW, GB, H, A, s_w, s_d, need_x, need_factors, need_s_w);
  }
  Products<Parts> products;
  products.dA = mm(transposed(GB), X);
  const Tensor left = as_contiguous(GB), h = as_contiguous(H), x = need_s_w ? in_layout_of(X, GW) : X;
  const Tensor sums = dispatch_floating(GW.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    Expansion<T> e(GW, left, A, s_w, s_d);
    e.writes = need_x;
    e.h = data_of<const T>(h);
    if (need_s_w) e.x = data_of<const T>(x);
    return expand(e, GW);
  });
  const int64_t blocks = sums.size(0);
  if (need_s_w) products.with_x = Parts{sums, 0, blocks, 2};
  products.with_h = Parts{sums, 1, blocks, 2};
  return products;
}

}  // namespace mapsurgery
