// The kernels of map_scales; no atomics, and the same bits every time:
//   small_kernel   one block does all for small factors of rank 8 at most;
//   gram_kernel    each block multiplies one tile of one Gram matrix over one slice of the long dimension;
//   reduce_kernel  sums the slices in order, and contracts the two Gram matrices;
//   finish_kernel  adds up what several blocks of reduce_kernel contracted (one block does it itself).
#pragma once

#include "cuda/kernels.cuh"

namespace mapsurgery {
namespace {

constexpr int kTile = 32;   // rows and columns of a tile of a Gram matrix
constexpr int kChunk = 64;  // numbers of the long dimension in shared memory at a time

// A factor as (rank, length), A as it is and B transposed, and the partial Gram matrices (slices, rank, rank).
template <class T, class acc_t>
struct Factor {
  const T* data;
  int64_t length, rank_stride, length_stride;
  int64_t slice, slices;
  acc_t* partial;
};

template <class T, class acc_t>
struct Layer {
  Factor<T, acc_t> A, B;
  int64_t rank;
  acc_t *gram_a, *gram_b;
  Numbers alpha, beta, weight_norm;
  double tau;
  bool relative;
  ScalesOut<acc_t> out;
  GramSums* block_sums = nullptr;  // one for each block of reduce_kernel
  int lanes = 0, blocks = 0;       // of reduce_kernel

  // All threads of one block must call, with the same sums.
  __device__ void finish(GramSums sums) const;
};

// <row i, row j> of a factor in double, in the whole block.
template <class T, class acc_t>
__device__ double product_of_rows(const Factor<T, acc_t>& f, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t l = threadIdx.x; l < f.length; l += kThreads) {
    const T* at = f.data + l * f.length_stride;
    sum += static_cast<double>(static_cast<acc_t>(at[i * f.rank_stride])) *
           static_cast<double>(static_cast<acc_t>(at[j * f.rank_stride]));
  }
  return block_sum(sum);
}

// The Gram matrices anew, of factors whose squares float cannot hold: by double, which holds them all. It is slow, and
// out of the way of all others. B = 0 keeps what it has.
template <class T, class acc_t>
__attribute__((noinline)) __device__ GramSums sums_in_double(const Layer<T, acc_t>& layer, GramSums narrow,
                                                             Units& units) {
  GramSums sums{};
  for (int64_t i = 0; i < layer.rank; ++i) {
    sums.trace_a += product_of_rows(layer.A, i, i);
    sums.trace_b += product_of_rows(layer.B, i, i);
  }
  const double a = units.a = unit_of<acc_t>(sums.trace_a);
  const double b = units.b = unit_of<acc_t>(sums.trace_b);
  if (a == 1 && b == 1) return narrow;
  sums.trace_a = sums.trace_a / a / a;
  sums.trace_b = sums.trace_b / b / b;
  for (int64_t i = 0; i < layer.rank; ++i) {
    for (int64_t j = i; j < layer.rank; ++j) {
      const double of_a = product_of_rows(layer.A, i, j) / a / a, of_b = product_of_rows(layer.B, i, j) / b / b;
      sums.square += (i == j ? 1 : 2) * of_a * of_b;
      if (threadIdx.x != 0) continue;
      layer.gram_a[i * layer.rank + j] = layer.gram_a[j * layer.rank + i] = static_cast<acc_t>(of_a);
      layer.gram_b[i * layer.rank + j] = layer.gram_b[j * layer.rank + i] = static_cast<acc_t>(of_b);
    }
  }
  return sums;
}

template <class T, class acc_t>
__device__ void Layer<T, acc_t>::finish(GramSums sums) const {
  Units units{1, 1};
  if constexpr (sizeof(acc_t) < sizeof(double)) {
    if (!has_digits(sums.trace_a) || !has_digits(sums.trace_b)) sums = sums_in_double(*this, sums, units);
  }
  if (threadIdx.x != 0) return;
  compute_scales(sums, units, alpha.load<double>(0), beta.load<double>(0), weight_norm.load<double>(0), tau, relative,
                 out);
}

template <class T, class acc_t>
__device__ void load_chunk(acc_t (&chunk)[kTile][kChunk + 1], const Factor<T, acc_t>& f, int64_t first_row,
                           int64_t rank, int64_t start, int64_t end) {
  const bool along_length = f.length_stride <= f.rank_stride;  // neighbouring threads read neighbouring numbers
  for (int k = threadIdx.x; k < kTile * kChunk; k += kThreads) {
    const int i = along_length ? k / kChunk : k % kTile;
    const int l = along_length ? k % kChunk : k / kTile;
    const bool inside = first_row + i < rank && start + l < end;
    const int64_t at = (first_row + i) * f.rank_stride + (start + l) * f.length_stride;
    chunk[i][l] = inside ? static_cast<acc_t>(f.data[at]) : acc_t(0);
  }
}

constexpr int kSmallRank = 8;
constexpr int kPairs = kSmallRank * (kSmallRank + 1) / 2;
constexpr int kShares = 8;  // threads that share the sum over a block of one product

// Adds this thread's share of the products of rows i <= j of a factor, pair by pair.
template <class T, class acc_t>
__device__ void add_products(const Factor<T, acc_t>& f, int64_t rank, acc_t* sums) {
  constexpr int kInFlight = sizeof(acc_t) == sizeof(double) ? 2 : 8;  // columns read before the first is multiplied
  const T* column = f.data + threadIdx.x * f.length_stride;
  const int64_t step = kThreads * f.length_stride;
  for (int64_t l = threadIdx.x; l < f.length; l += kInFlight * kThreads, column += kInFlight * step) {
    acc_t values[kInFlight][kSmallRank];
#pragma unroll
    for (int i = 0; i < kSmallRank; ++i) {
      const T* at = column + i * f.rank_stride;
#pragma unroll
      for (int k = 0; k < kInFlight; ++k, at += step) {
        values[k][i] = i < rank && l + k * kThreads < f.length ? static_cast<acc_t>(*at) : acc_t(0);
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      int pair = 0;
#pragma unroll
      for (int i = 0; i < kSmallRank; ++i) {
#pragma unroll
        for (int j = i; j < kSmallRank; ++j) sums[pair++] += values[k][i] * values[k][j];
      }
    }
  }
}

// One block.
template <class T, class acc_t>
__global__ void __launch_bounds__(kThreads) small_kernel(const __grid_constant__ Layer<T, acc_t> layer) {
  constexpr int kAtOnce = sizeof(acc_t) == sizeof(double) ? 12 : 24;  // sums that are shared in one round
  __shared__ acc_t of_threads[kAtOnce][kThreads + kShares], shares[2 * kPairs][kShares];
  __shared__ GramSums of_pairs[kPairs], total;
  acc_t sums[2 * kPairs] = {};  // of A, then of B
  add_products(layer.A, layer.rank, sums);
  add_products(layer.B, layer.rank, sums + kPairs);
#pragma unroll
  for (int first = 0; first < 2 * kPairs; first += kAtOnce) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) of_threads[k][threadIdx.x] = sums[first + k];
    __syncthreads();
    const int k = threadIdx.x / kShares, share = threadIdx.x % kShares;
    if (k < kAtOnce) {
      acc_t sum = 0;
#pragma unroll 8
      for (int t = share; t < kThreads; t += kShares) sum += of_threads[k][t];
      shares[first + k][share] = sum;
    }
    __syncthreads();  // the threads' sums are read before the next round overwrites them
  }
  if (threadIdx.x < kPairs) {
    int i = 0, j = threadIdx.x;
    while (j >= kSmallRank - i) j -= kSmallRank - i++;
    j += i;
    const bool exists = j < layer.rank;  // beyond it zeros were multiplied, and infinity times 0 is NaN
    acc_t a = 0, b = 0;
    for (int share = 0; exists && share < kShares; ++share) {
      a += shares[threadIdx.x][share];
      b += shares[kPairs + threadIdx.x][share];
    }
    if (exists) {
      layer.gram_a[i * layer.rank + j] = layer.gram_a[j * layer.rank + i] = a;
      layer.gram_b[i * layer.rank + j] = layer.gram_b[j * layer.rank + i] = b;
    }
    of_pairs[threadIdx.x] = {(i == j ? 1 : 2) * static_cast<double>(a) * static_cast<double>(b),
                             i == j ? static_cast<double>(a) : 0, i == j ? static_cast<double>(b) : 0};
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    GramSums sums{};
    for (const GramSums& pair : of_pairs) {
      sums.square += pair.square;
      sums.trace_a += pair.trace_a;
      sums.trace_b += pair.trace_b;
    }
    total = sums;
  }
  __syncthreads();
  layer.finish(total);
}

// Grid: (pairs of tiles on or above the diagonal, slices, the two factors).
template <class T, class acc_t>
__global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ Layer<T, acc_t> layer) {
  __shared__ acc_t left[kTile][kChunk + 1], right[kTile][kChunk + 1];  // + 1: no bank conflicts
  const Factor<T, acc_t>& f = blockIdx.z == 0 ? layer.A : layer.B;
  const int64_t rank = layer.rank;
  const int tiles = static_cast<int>((rank + kTile - 1) / kTile);
  if (blockIdx.y >= f.slices) return;  // the other factor has more; the whole block: no barrier waits for it

  int tile_i = 0, tile_j = blockIdx.x;
  while (tile_j >= tiles - tile_i) tile_j -= tiles - tile_i++;
  tile_j += tile_i;
  const int64_t row_i = static_cast<int64_t>(tile_i) * kTile, row_j = static_cast<int64_t>(tile_j) * kTile;

  const int64_t begin = blockIdx.y * f.slice, end = min(f.length, begin + f.slice);
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  acc_t sum[2][2] = {};
  for (int64_t start = begin; start < end; start += kChunk) {
    load_chunk(left, f, row_i, rank, start, end);
    load_chunk(right, f, row_j, rank, start, end);
    __syncthreads();
    for (int l = 0; l < kChunk; ++l) {
      for (int a = 0; a < 2; ++a) {
        for (int b = 0; b < 2; ++b) sum[a][b] += left[y + 16 * a][l] * right[x + 16 * b][l];
      }
    }
    __syncthreads();
  }

  acc_t* partial = f.partial + blockIdx.y * rank * rank;
  for (int a = 0; a < 2; ++a) {
    for (int b = 0; b < 2; ++b) {
      const int64_t i = row_i + y + 16 * a, j = row_j + x + 16 * b;
      if (i >= rank || j >= rank) continue;
      partial[i * rank + j] = sum[a][b];
      if (tile_i != tile_j) partial[j * rank + i] = sum[a][b];
    }
  }
}

// Sums the slices of both Gram matrices and contracts them. With few elements, several threads (`parts`) share the
// slices of one; then there is one block.
template <class T, class acc_t>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ Layer<T, acc_t> layer) {
  __shared__ acc_t shares_a[kThreads], shares_b[kThreads];
  const acc_t *partial_a = layer.A.partial, *partial_b = layer.B.partial;
  const int64_t rank = layer.rank, elements = rank * rank;
  const int lanes = layer.lanes;
  const int lane = threadIdx.x % lanes, part = threadIdx.x / lanes, parts = kThreads / lanes;
  double square = 0, trace_a = 0, trace_b = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * lanes; first < elements;
       first += static_cast<int64_t>(layer.blocks) * lanes) {
    const int64_t e = first + lane;
    acc_t a = 0, b = 0;
    if (e < elements) {
      for (int64_t s = part; s < layer.A.slices; s += parts) a += partial_a[s * elements + e];
      for (int64_t s = part; s < layer.B.slices; s += parts) b += partial_b[s * elements + e];
    }
    shares_a[threadIdx.x] = a;
    shares_b[threadIdx.x] = b;
    __syncthreads();
    if (part == 0 && e < elements) {
      for (int k = 1; k < parts; ++k) {
        a += shares_a[k * lanes + lane];
        b += shares_b[k * lanes + lane];
      }
      layer.gram_a[e] = a;
      layer.gram_b[e] = b;
      square += static_cast<double>(a) * static_cast<double>(b);
      if (e / rank == e % rank) {
        trace_a += static_cast<double>(a);
        trace_b += static_cast<double>(b);
      }
    }
    __syncthreads();  // the shares are read before the next round overwrites them
  }
  const GramSums sums{block_sum(square), block_sum(trace_a), block_sum(trace_b)};
  if (layer.blocks == 1) {
    layer.finish(sums);
  } else if (threadIdx.x == 0) {
    layer.block_sums[blockIdx.x] = sums;
  }
}

// One block.
template <class T, class acc_t>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Layer<T, acc_t> layer) {
  const bool inside = static_cast<int>(threadIdx.x) < layer.blocks;
  const GramSums own = inside ? layer.block_sums[threadIdx.x] : GramSums{};
  layer.finish({block_sum(own.square), block_sum(own.trace_a), block_sum(own.trace_b)});
}

}  // namespace
}  // namespace mapsurgery
