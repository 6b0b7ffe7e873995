// lowrank_norm and map_scales, of one layer or many. One launch for small factors, else two up to rank 32 and three
// above; no atomics, and the same bits every time, however many layers share a launch:
//   small_kernel   one block does all for a layer of rank 8 at most;
//   gram_kernel    each block multiplies one tile of one Gram matrix over one slice of the long dimension;
//   reduce_kernel  sums the slices in order, and contracts the two Gram matrices;
//   finish_kernel  adds up what several blocks of reduce_kernel contracted (one block does it itself).

#include <torch/csrc/stable/library.h>

#include "common/many.h"
#include "cuda/device.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace mapsurgery {
namespace {

constexpr int kTile = 32;               // rows and columns of a tile of a Gram matrix
constexpr int kChunk = 64;              // numbers of the long dimension in shared memory at a time
constexpr int64_t kSlice = 2 * kChunk;  // the shortest slice of the long dimension worth a block
constexpr int64_t kMostSlices = 128;
constexpr int64_t kMostGramBlocks = 512;
constexpr unsigned kMostReduceBlocks = 64;

// A factor as (rank, length), A as it is and B transposed, and the partial Gram matrices (slices, rank, rank).
template <class T, class acc_t>
struct Factor {
  const T* data;
  int64_t length, rank_stride, length_stride;
  int64_t slice, slices;
  acc_t* partial;
};

// What becomes of the contraction: the norm alone, or the scales of the layer.
template <class acc_t>
struct Outcome {
  acc_t* norm;  // null: the scales
  acc_t* scales;
  Numbers alpha, beta, weight_norm;
  double tau;
  bool relative;

  __device__ void write(GramSums sums) const {
    if (norm != nullptr) {
      *norm = norm_of<acc_t>(sums.square);
    } else {
      compute_scales(sums, alpha.load<double>(0), beta.load<double>(0), weight_norm.load<double>(0), tau, relative,
                     scales);
    }
  }
};

template <class T, class acc_t>
struct Layer {
  Factor<T, acc_t> A, B;
  int64_t rank;
  acc_t *gram_a, *gram_b;
  GramSums* block_sums;  // one for each block of reduce_kernel
  int lanes, blocks;     // of reduce_kernel
  Outcome<acc_t> outcome;
};

// Travels as a kernel's parameter, so that the host waits for nothing and a CUDA graph can hold it.
template <class T, class acc_t, int kLayers>
struct Layers {
  Layer<T, acc_t> layer[kLayers];
};

constexpr int kLayersOfALaunch = 16;  // what fits into the 4 KB of a kernel's parameters
static_assert(sizeof(Layers<float, float, kLayersOfALaunch>) <= 4096);

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
constexpr int64_t kSmallLength = 24 * 1024;  // of both factors: beyond it, several blocks are quicker than one
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

// One block for each layer.
template <class T, class acc_t, int kLayers>
__global__ void __launch_bounds__(kThreads) small_kernel(const __grid_constant__ Layers<T, acc_t, kLayers> layers) {
  constexpr int kAtOnce = sizeof(acc_t) == sizeof(double) ? 12 : 24;  // sums that are shared in one round
  __shared__ acc_t of_threads[kAtOnce][kThreads + kShares], shares[2 * kPairs][kShares];
  __shared__ GramSums of_pairs[kPairs];
  const Layer<T, acc_t>& layer = layers.layer[blockIdx.x];
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
    acc_t a = 0, b = 0;
    for (int share = 0; share < kShares; ++share) {
      a += shares[threadIdx.x][share];
      b += shares[kPairs + threadIdx.x][share];
    }
    if (j < layer.rank) {
      layer.gram_a[i * layer.rank + j] = layer.gram_a[j * layer.rank + i] = a;
      layer.gram_b[i * layer.rank + j] = layer.gram_b[j * layer.rank + i] = b;
    }
    of_pairs[threadIdx.x] = {(i == j ? 1 : 2) * static_cast<double>(a) * static_cast<double>(b),
                             i == j ? static_cast<double>(a) + static_cast<double>(b) : 0};
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  GramSums total{0, 0};
  for (const GramSums& pair : of_pairs) {
    total.square += pair.square;
    total.trace += pair.trace;
  }
  layer.outcome.write(total);
}

// Grid: (pairs of tiles on or above the diagonal, slices, two factors of each layer).
template <class T, class acc_t, int kLayers>
__global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ Layers<T, acc_t, kLayers> layers) {
  __shared__ acc_t left[kTile][kChunk + 1], right[kTile][kChunk + 1];  // + 1: no bank conflicts
  const Layer<T, acc_t>& layer = layers.layer[blockIdx.z / 2];
  const Factor<T, acc_t>& f = blockIdx.z % 2 == 0 ? layer.A : layer.B;
  const int64_t rank = layer.rank;
  const int tiles = static_cast<int>((rank + kTile - 1) / kTile);
  // The grid is as large as the largest layer needs. The whole block: no barrier waits for it.
  if (blockIdx.y >= f.slices || static_cast<int>(blockIdx.x) >= tiles * (tiles + 1) / 2) return;

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
// slices of one; then there is one block. Grid: (blocks, layers).
template <class T, class acc_t, int kLayers>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ Layers<T, acc_t, kLayers> layers) {
  __shared__ acc_t shares_a[kThreads], shares_b[kThreads];
  const Layer<T, acc_t>& layer = layers.layer[blockIdx.y];
  if (static_cast<int>(blockIdx.x) >= layer.blocks) return;  // the whole block
  const acc_t *partial_a = layer.A.partial, *partial_b = layer.B.partial;
  const int64_t rank = layer.rank, elements = rank * rank;
  const int lanes = layer.lanes;
  const int lane = threadIdx.x % lanes, part = threadIdx.x / lanes, parts = kThreads / lanes;
  double square = 0, trace = 0;
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
      if (e / rank == e % rank) trace += static_cast<double>(a) + static_cast<double>(b);
    }
    __syncthreads();  // the shares are read before the next round overwrites them
  }
  const double square_sum = block_sum(square);
  const double trace_sum = block_sum(trace);
  if (threadIdx.x != 0) return;
  if (layer.blocks == 1) {
    layer.outcome.write({square_sum, trace_sum});
  } else {
    layer.block_sums[blockIdx.x] = {square_sum, trace_sum};
  }
}

// One block for each layer.
template <class T, class acc_t, int kLayers>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Layers<T, acc_t, kLayers> layers) {
  const Layer<T, acc_t>& layer = layers.layer[blockIdx.x];
  if (layer.blocks == 1) return;  // reduce_kernel has written the outcome
  const bool inside = static_cast<int>(threadIdx.x) < layer.blocks;
  const double square = block_sum(inside ? layer.block_sums[threadIdx.x].square : 0);
  const double trace = block_sum(inside ? layer.block_sums[threadIdx.x].trace : 0);
  if (threadIdx.x == 0) layer.outcome.write({square, trace});
}

template <class acc_t>
acc_t* data_of(const Tensor& t) {
  return static_cast<acc_t*>(t.data_ptr());
}

struct Slices {
  int64_t size, count;

  Slices(int64_t length, int64_t tile_pairs) {
    const int64_t most =
        std::max<int64_t>(1, std::min(kMostSlices, kMostGramBlocks / std::max<int64_t>(1, tile_pairs)));
    const int64_t shortest = (length + most - 1) / most;
    size = std::max(kSlice, (shortest + kChunk - 1) / kChunk * kChunk);
    count = (length + size - 1) / size;
  }
};

int64_t pairs_of_tiles(int64_t rank) {
  const int64_t tiles = (rank + kTile - 1) / kTile;
  return tiles * (tiles + 1) / 2;
}

bool is_small(const Tensor& A, const Tensor& B) {
  return A.size(0) <= kSmallRank && A.size(1) + B.size(0) <= kSmallLength;
}

// A layer as the kernels take it, and the memory that they work in.
template <class T>
struct Job {
  using acc_t = accumulate_t<T>;

  Layer<T, acc_t> layer;
  Tensor partial_a, partial_b, block_sums;

  bool is_small() const { return layer.blocks == 0; }

  Job(const Tensor& A, const Tensor& B, const Tensor& gram_a, const Tensor& gram_b, const Outcome<acc_t>& outcome) {
    const int64_t rank = A.size(0), elements = rank * rank, pairs = pairs_of_tiles(rank);
    if (mapsurgery::is_small(A, B)) {
      layer = {{data_of<const T>(A), A.size(1), A.stride(0), A.stride(1), 0, 0, nullptr},
               {data_of<const T>(B), B.size(0), B.stride(1), B.stride(0), 0, 0, nullptr},
               rank,
               data_of<acc_t>(gram_a),
               data_of<acc_t>(gram_b),
               nullptr,
               0,
               0,
               outcome};
      return;
    }
    const Slices slices_a(A.size(1), pairs), slices_b(B.size(0), pairs);
    partial_a = empty({slices_a.count * elements}, gram_a.scalar_type(), A);
    partial_b = empty({slices_b.count * elements}, gram_b.scalar_type(), A);
    int lanes = 1;
    while (lanes < kThreads && lanes < elements) lanes *= 2;
    // Up to rank 32 one block is as quick as several and a further launch.
    const unsigned blocks = elements <= 4 * kThreads ? 1 : blocks_for(elements, kThreads, kMostReduceBlocks);
    block_sums = empty({blocks * 2}, ScalarType::Double, A);
    layer = {{data_of<const T>(A), A.size(1), A.stride(0), A.stride(1), slices_a.size, slices_a.count,
              data_of<acc_t>(partial_a)},
             {data_of<const T>(B), B.size(0), B.stride(1), B.stride(0), slices_b.size, slices_b.count,
              data_of<acc_t>(partial_b)},
             rank,
             data_of<acc_t>(gram_a),
             data_of<acc_t>(gram_b),
             static_cast<GramSums*>(block_sums.data_ptr()),
             lanes,
             static_cast<int>(blocks),
             outcome};
  }
};

// Writes the Gram matrices and outcomes of up to kLayers layers.
template <int kLayers, class T>
void run(const Job<T>* jobs, unsigned count, cudaStream_t stream) {
  using acc_t = accumulate_t<T>;
  Layers<T, acc_t, kLayers> layers{};
  if (jobs[0].is_small()) {
    for (unsigned i = 0; i < count; ++i) layers.layer[i] = jobs[i].layer;
    launch<small_kernel<T, acc_t, kLayers>>(count, kThreads, stream, layers);
    return;
  }
  unsigned pairs = 0, slices = 0, blocks = 1;
  for (unsigned i = 0; i < count; ++i) {
    const Layer<T, acc_t>& layer = layers.layer[i] = jobs[i].layer;
    pairs = std::max(pairs, static_cast<unsigned>(pairs_of_tiles(layer.rank)));
    slices = std::max(slices, static_cast<unsigned>(std::max(layer.A.slices, layer.B.slices)));
    blocks = std::max(blocks, static_cast<unsigned>(layer.blocks));
  }
  if (pairs > 0 && slices > 0) {
    launch<gram_kernel<T, acc_t, kLayers>>(dim3(pairs, slices, 2 * count), kThreads, stream, layers);
  }
  launch<reduce_kernel<T, acc_t, kLayers>>(dim3(blocks, count), kThreads, stream, layers);
  if (blocks > 1) launch<finish_kernel<T, acc_t, kLayers>>(count, kThreads, stream, layers);
}

template <class T>
void run_one(const Tensor& A, const Tensor& B, const Tensor& gram_a, const Tensor& gram_b,
             const Outcome<accumulate_t<T>>& outcome) {
  const Job<T> job(A, B, gram_a, gram_b, outcome);
  run<1>(&job, 1, current_stream(A));
}

// Results of map_scales, to be written.
struct Scales {
  Tensor scales, gram_a, gram_b;

  explicit Scales(const Tensor& A) {
    const ScalarType acc = accumulate_dtype(A.scalar_type());
    const int64_t rank = A.size(0);
    scales = empty({NUM_SCALES}, acc, A);
    gram_a = empty({rank, rank}, acc, A);
    gram_b = empty({rank, rank}, acc, A);
  }

  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {scales, gram_a, gram_b}; }

  template <class acc_t>
  Outcome<acc_t> outcome(const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, double tau,
                         bool relative) const {
    return {nullptr, data_of<acc_t>(scales), Numbers(alpha), Numbers(beta), Numbers(weight_norm), tau, relative};
  }
};

std::tuple<Tensor, Tensor, Tensor> lowrank_norm(const Tensor& A, const Tensor& B) {
  check_factors(A, B);
  Cuda::Guard guard(A);
  const ScalarType acc = accumulate_dtype(A.scalar_type());
  const int64_t rank = A.size(0);
  Tensor norm = empty({1}, acc, A), gram_a = empty({rank, rank}, acc, A), gram_b = empty({rank, rank}, acc, A);
  dispatch_floating(A.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using acc_t = accumulate_t<T>;
    run_one<T>(A, B, gram_a, gram_b, {data_of<acc_t>(norm), nullptr, {}, {}, {}, 0.0, false});
  });
  return {norm, gram_a, gram_b};
}

std::tuple<Tensor, Tensor, Tensor> map_scales(const Tensor& A, const Tensor& B, const Tensor& alpha, const Tensor& beta,
                                              const Tensor& weight_norm, double tau, bool relative) {
  check_factors(A, B);
  check_scalars(alpha, beta, weight_norm, A);
  Cuda::Guard guard(A);
  return Cuda::map_scales(A, B, alpha, beta, weight_norm, tau, relative);
}

Many map_scales_many(const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<Tensor>& alpha,
                     const std::vector<Tensor>& beta, const std::vector<Tensor>& weight_norm,
                     const std::vector<double>& tau, const std::vector<bool>& relative) {
  check_many(A, B, alpha, beta, weight_norm, tau, relative);
  Many results;
  if (A.empty()) return results;
  Cuda::Guard guard(A[0]);
  dispatch_floating(A[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    std::vector<Job<T>> jobs;
    jobs.reserve(A.size());
    for (size_t i = 0; i < A.size(); ++i) {
      const Scales result(A[i]);
      jobs.emplace_back(A[i], B[i], result.gram_a, result.gram_b,
                        result.outcome<accumulate_t<T>>(alpha[i], beta[i], weight_norm[i], tau[i], relative[i]));
      append(results, result.tuple());
    }
    // Layers of one launch run the same kernels.
    const auto rest = std::stable_partition(jobs.begin(), jobs.end(), [](const Job<T>& job) { return job.is_small(); });
    for (auto [first, end] : {std::pair{jobs.begin(), rest}, std::pair{rest, jobs.end()}}) {
      for (; first < end; first += std::min<ptrdiff_t>(kLayersOfALaunch, end - first)) {
        const auto count = static_cast<unsigned>(std::min<ptrdiff_t>(kLayersOfALaunch, end - first));
        run<kLayersOfALaunch>(&*first, count, current_stream(A[0]));
      }
    }
  });
  return results;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> Cuda::map_scales(const Tensor& A, const Tensor& B, const Tensor& alpha,
                                                    const Tensor& beta, const Tensor& weight_norm, double tau,
                                                    bool relative) {
  const Scales result(A);
  dispatch_floating(A.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    run_one<T>(A, B, result.gram_a, result.gram_b,
               result.outcome<accumulate_t<T>>(alpha, beta, weight_norm, tau, relative));
  });
  return result.tuple();
}

}  // namespace mapsurgery

STABLE_TORCH_LIBRARY_IMPL(mapsurgery, CUDA, m) {
  m.impl("lowrank_norm", TORCH_BOX(&mapsurgery::lowrank_norm));
  m.impl("map_scales", TORCH_BOX(&mapsurgery::map_scales));
  m.impl("map_scales_many", TORCH_BOX(&mapsurgery::map_scales_many));
}
