// lowrank_norm and map_scales, of one layer or many: one launch for small factors, else two up to rank 32 and three
// above, however many layers share a launch.

#include "cuda/lowrank_norm.cuh"

#include <torch/csrc/stable/library.h>

#include "common/many.h"
#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace mapsurgery {
namespace {

constexpr int64_t kSlice = 2 * kChunk;  // the shortest slice of the long dimension worth a block
constexpr int64_t kMostSlices = 128;
constexpr int64_t kMostGramBlocks = 512;
constexpr unsigned kMostReduceBlocks = 64;
constexpr int64_t kSmallLength = 24 * 1024;  // of both factors: beyond it, several blocks are quicker than one

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
