// map_scales: one launch for small factors, else two up to rank 32 and three above.

#include "cuda/map_scales.cuh"

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

}  // namespace

void Cuda::fill(Scales& scales, const Tensor& A, const Tensor& B, const Tensor& alpha, const Tensor& beta,
                const Tensor& weight_norm, double tau, bool relative) {
  const ScalarType acc = accumulate_dtype(A.scalar_type());
  const int64_t rank = A.size(0), elements = rank * rank, pairs = pairs_of_tiles(rank);
  scales.gram_a = empty({rank, rank}, acc, A);
  scales.gram_b = empty({rank, rank}, acc, A);
  const cudaStream_t stream = current_stream(A);
  dispatch_floating(A.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using acc_t = accumulate_t<T>;
    Layer<T, acc_t> layer{{data_of<const T>(A), A.size(1), A.stride(0), A.stride(1), 0, 0, nullptr},
                          {data_of<const T>(B), B.size(0), B.stride(1), B.stride(0), 0, 0, nullptr},
                          rank,
                          data_of<acc_t>(scales.gram_a),
                          data_of<acc_t>(scales.gram_b),
                          Numbers(alpha),
                          Numbers(beta),
                          Numbers(weight_norm),
                          tau,
                          relative,
                          scales.out<acc_t>()};
    if (is_small(A, B)) return launch<small_kernel<T, acc_t>>(1, kThreads, stream, layer);

    const Slices slices_a(A.size(1), pairs), slices_b(B.size(0), pairs);
    const Tensor partial_a = empty({slices_a.count * elements}, acc, A);
    const Tensor partial_b = empty({slices_b.count * elements}, acc, A);
    layer.A.slice = slices_a.size, layer.A.slices = slices_a.count, layer.A.partial = data_of<acc_t>(partial_a);
    layer.B.slice = slices_b.size, layer.B.slices = slices_b.count, layer.B.partial = data_of<acc_t>(partial_b);
    layer.lanes = 1;
    while (layer.lanes < kThreads && layer.lanes < elements) layer.lanes *= 2;
    // Up to rank 32 one block is as quick as several and a further launch.
    const unsigned blocks = elements <= 4 * kThreads ? 1 : blocks_for(elements, kThreads, kMostReduceBlocks);
    const Tensor block_sums =
        empty({blocks * static_cast<int64_t>(sizeof(GramSums) / sizeof(double))}, ScalarType::Double, A);
    layer.blocks = static_cast<int>(blocks);
    layer.block_sums = static_cast<GramSums*>(block_sums.data_ptr());
    const auto slices = static_cast<unsigned>(std::max(slices_a.count, slices_b.count));
    if (pairs > 0 && slices > 0) {
      launch<gram_kernel<T, acc_t>>(dim3(static_cast<unsigned>(pairs), slices, 2), kThreads, stream, layer);
    }
    launch<reduce_kernel<T, acc_t>>(blocks, kThreads, stream, layer);
    if (blocks > 1) launch<finish_kernel<T, acc_t>>(1, kThreads, stream, layer);
  });
}

}  // namespace mapsurgery
