// What the low-rank half of a layer does beside its matrix products, for ranks that fit into registers: one pass over
// an activation instead of two or three, and one launch for all gradients of the factors. The factors are read in their
// own dtype: nothing is cast beforehand, and s_d h, which can overflow float16, is never stored.

#include "cuda/device.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace mapsurgery {
namespace {

constexpr int kLanes = 32, kRows = kThreads / kLanes;  // a block: 32 threads along the columns of each of 8 rows
constexpr int64_t kBlocks = 1024;                      // enough to fill a GPU, and few enough sums to add up again

// Columns of a thread: its part of the factor takes 32 registers.
template <class T, int R>
constexpr int kColumns = 32 * sizeof(float) / sizeof(accumulate_t<T>) / R;

// Rows of a thread in flight: all are read before the first is written.
template <class T, int R>
constexpr int kBatch = sizeof(T) == sizeof(double) ? 1 : 32 / R;

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
  Numbers bias;
  int64_t bias_stride;
  int64_t rows, columns;
  int rank;
  Numbers scales;
  ScaleIndex keep;
  bool reads, writes;  // whether out holds numbers, and whether it gets new ones
  const T *x, *h;      // like out and left; null: no sums
  double* sums;        // those of each block: <x, out>, then <left, h>
};

// aligned: the columns of a thread lie in one access of out and of x, and a row of left in few.
template <class T, int R, bool aligned>
__global__ void __launch_bounds__(kThreads, 2) expand_kernel(const __grid_constant__ Expansion<T> e) {
  using acc_t = accumulate_t<T>;
  constexpr int kWide = kColumns<T, R>, kInFlight = kBatch<T, R>;
  constexpr int kPiece = R < 16 / int(sizeof(T)) ? R : 16 / int(sizeof(T));
  const int lane = threadIdx.x % kLanes, line = threadIdx.x / kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kLanes * kWide;
  // Neighbouring threads read neighbouring numbers, one by one where they cannot read several at once.
  const auto column = [&](int v) { return aligned ? first + lane * kWide + v : first + v * kLanes + lane; };
  const bool inside = column(0) < e.columns;

  acc_t right[R][kWide], bias[kWide];
#pragma unroll
  for (int v = 0; v < kWide; ++v) {
    const bool exists = column(v) < e.columns;
    bias[v] = exists && e.bias.data != nullptr ? e.bias.template load<acc_t>(column(v) * e.bias_stride) : acc_t(0);
#pragma unroll
    for (int j = 0; j < R; ++j)
      right[j][v] = exists && j < e.rank ? e.right.template load<acc_t>(j, column(v)) : acc_t(0);
  }
  const acc_t keep = e.scales.template load<acc_t>(e.keep), s_d = e.scales.template load<acc_t>(S_D);
  const bool sums = e.x != nullptr, keeps = e.reads && keep != 0, updates = s_d != 0;  // a factor of 0 drops infinities

  acc_t with_x = 0, with_h = 0;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRows * kInFlight;
  for (int64_t start = (static_cast<int64_t>(blockIdx.y) * kRows + line) * kInFlight; start < e.rows; start += step) {
    T old[kInFlight][kWide] = {}, other[kInFlight][kWide] = {}, left[kInFlight][R] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t row = start + k;
      if (row >= e.rows) continue;
      const T *out_row = e.out + row * e.columns, *x_row = e.x + row * e.columns, *left_row = e.left + row * e.rank;
      if constexpr (aligned) {
        if (inside && e.reads) load_pack<kWide>(out_row + column(0), old[k]);
        if (inside && sums) load_pack<kWide>(x_row + column(0), other[k]);
#pragma unroll
        for (int j = 0; j < R; j += kPiece) load_pack<kPiece>(left_row + j, left[k] + j);
      } else {
#pragma unroll
        for (int v = 0; v < kWide; ++v) {
          if (column(v) >= e.columns) continue;
          if (e.reads) old[k][v] = out_row[column(v)];
          if (sums) other[k][v] = x_row[column(v)];
        }
#pragma unroll
        for (int j = 0; j < R; ++j) {
          if (j < e.rank) left[k][j] = left_row[j];
        }
      }
      if (sums && blockIdx.x == 0 && lane < e.rank) {
        with_h += static_cast<acc_t>(left_row[lane]) * static_cast<acc_t>(e.h[row * e.rank + lane]);
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t row = start + k;
      if (row >= e.rows) continue;
      Pack<T, kWide> result;
#pragma unroll
      for (int v = 0; v < kWide; ++v) {
        const acc_t before = static_cast<acc_t>(old[k][v]);
        acc_t update = 0;
#pragma unroll
        for (int j = 0; j < R; ++j) update += static_cast<acc_t>(left[k][j]) * right[j][v];
        with_x += static_cast<acc_t>(other[k][v]) * before;
        result.at[v] =
            static_cast<T>((keeps ? keep * before : acc_t(0)) + (updates ? s_d * update : acc_t(0)) + bias[v]);
      }
      T* out_row = e.out + row * e.columns;
      if (!e.writes) continue;
      if constexpr (aligned) {
        if (inside) *reinterpret_cast<Pack<T, kWide>*>(out_row + column(0)) = result;
      } else {
#pragma unroll
        for (int v = 0; v < kWide; ++v) {
          if (column(v) < e.columns) out_row[column(v)] = result.at[v];
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

template <class T, int R>
void launch_expand(const Expansion<T>& e, dim3 grid, cudaStream_t stream) {
  constexpr size_t bytes = kColumns<T, R> * sizeof(T);
  const bool aligned = fits(e.out, e.columns, bytes) && (e.x == nullptr || fits(e.x, e.columns, bytes)) &&
                       e.rank == R && fits(e.left, e.rank, std::min<size_t>(16, R * sizeof(T)));
  if (aligned) {
    launch<expand_kernel<T, R, true>>(grid, kThreads, stream, e);
  } else {
    launch<expand_kernel<T, R, false>>(grid, kThreads, stream, e);
  }
}

// Runs an expansion; where it sums, returns the blocks' sums (blocks, 2).
template <class T>
Tensor expand(Expansion<T> e, const Tensor& like) {
  const int64_t wide = kLanes * (e.rank <= 8 ? kColumns<T, 8> : kColumns<T, 16>);
  const unsigned x = static_cast<unsigned>((e.columns + wide - 1) / wide);
  const dim3 grid(
      x, blocks_for(e.rows, kRows * (e.rank <= 8 ? kBatch<T, 8> : kBatch<T, 16>), std::max<int64_t>(1, kBlocks / x)));
  Tensor sums;
  if (e.x != nullptr) {
    sums = empty({static_cast<int64_t>(grid.x) * grid.y, 2}, ScalarType::Double, like);
    e.sums = static_cast<double*>(sums.data_ptr());
  }
  if (e.rank <= 8) {
    launch_expand<T, 8>(e, grid, current_stream(like));
  } else {
    launch_expand<T, 16>(e, grid, current_stream(like));
  }
  return sums;
}

// Gradients of the factors with what the norm adds, s_d dA - c RADIAL gram_b A and s_d dB - c RADIAL B gram_a, and of
// both magnitudes. c = <dL/dW', BA> is `value`, or the sum of the blocks' second sums; that of alpha is the first.
template <class acc_t>
struct Gradients {
  Matrix dA, dB, A, B;
  Numbers out_A, out_B;  // contiguous
  int64_t K, m;
  int rank;
  const acc_t *gram_a, *gram_b, *scales, *value;
  const double* sums;
  int64_t blocks;
  acc_t *dalpha, *dbeta;  // null: not needed, or known
};

// Each thread takes a column of A, or a row of B.
template <class acc_t, int R>
__global__ void __launch_bounds__(kThreads) gradients_kernel(const __grid_constant__ Gradients<acc_t> g) {
  __shared__ acc_t gram[R * R];
  const int64_t blocks_of_A = (g.K + kThreads - 1) / kThreads;
  const bool of_A = blockIdx.x < blocks_of_A;
  for (int i = threadIdx.x; i < R * R; i += kThreads) {
    const int row = i / R, column = i % R;
    const bool inside = row < g.rank && column < g.rank;
    gram[i] = inside ? (of_A ? g.gram_b : g.gram_a)[row * g.rank + column] : acc_t(0);
  }
  double c = 0;
  if (g.sums != nullptr) {
    double with_x = 0, with_h = 0;
    for (int64_t i = threadIdx.x; i < g.blocks; i += kThreads) {
      with_x += g.sums[2 * i];
      with_h += g.sums[2 * i + 1];
    }
    const double total_x = block_sum(with_x);
    c = block_sum(with_h);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      if (g.dalpha != nullptr) *g.dalpha = static_cast<acc_t>(total_x * static_cast<double>(g.scales[DS_W]));
      *g.dbeta = static_cast<acc_t>(c * static_cast<double>(g.scales[DS_D]));
    }
  } else {
    c = static_cast<double>(*g.value);
  }
  __syncthreads();  // the Gram matrix is there
  const acc_t s_d = g.scales[S_D], radial = static_cast<acc_t>(c) * g.scales[RADIAL];

  const int64_t i = (of_A ? blockIdx.x : blockIdx.x - blocks_of_A) * kThreads + threadIdx.x;
  if (i >= (of_A ? g.K : g.m)) return;
  acc_t own[R];
#pragma unroll
  for (int j = 0; j < R; ++j) {
    own[j] = j < g.rank ? (of_A ? g.A.template load<acc_t>(j, i) : g.B.template load<acc_t>(i, j)) : acc_t(0);
  }
#pragma unroll
  for (int j = 0; j < R; ++j) {
    if (j >= g.rank) break;
    acc_t product = 0;
#pragma unroll
    for (int k = 0; k < R; ++k) product += gram[j * R + k] * own[k];  // the Gram matrices are symmetric
    if (of_A) {
      g.out_A.store(j * g.K + i, s_d * g.dA.template load<acc_t>(j, i) - radial * product);
    } else {
      g.out_B.store(i * g.rank + j, s_d * g.dB.template load<acc_t>(i, j) - radial * product);
    }
  }
}

// c: its value and its product with DS_D, or else the sums of `expand`.
LowRankGrads gradients(const Tensor& dA, const Tensor& dB, const Dot* c, const Tensor* sums, const Saved& saved,
                       bool need_alpha) {
  const Tensor &A = saved.A, &B = saved.B, &scales = saved.scales;
  const ScalarType acc = scales.scalar_type();
  LowRankGrads grads;
  grads.factors = {empty(sizes_of(A), A.scalar_type(), A), empty(sizes_of(B), B.scalar_type(), B),
                   c != nullptr ? c->scaled : empty({1}, acc, scales)};
  if (need_alpha) grads.alpha = empty({1}, acc, scales);
  dispatch_accumulate(acc, [&](auto type) {
    using acc_t = typename decltype(type)::type;
    const auto data = [](const Tensor& t) { return static_cast<acc_t*>(t.data_ptr()); };
    const Gradients<acc_t> g{Matrix(dA),
                             Matrix(dB),
                             Matrix(A),
                             Matrix(B),
                             Numbers(grads.factors.A),
                             Numbers(grads.factors.B),
                             A.size(1),
                             B.size(0),
                             static_cast<int>(A.size(0)),
                             data(saved.gram_a),
                             data(saved.gram_b),
                             data(scales),
                             c != nullptr ? data(c->value) : nullptr,
                             sums != nullptr ? static_cast<const double*>(sums->data_ptr()) : nullptr,
                             sums != nullptr ? sums->size(0) : 0,
                             need_alpha ? data(grads.alpha) : nullptr,
                             data(grads.factors.beta)};
    const auto blocks = [](int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); };
    const unsigned grid = blocks(g.K) + blocks(g.m);
    if (grid == 0) return;
    if (g.rank <= 8) {
      launch<gradients_kernel<acc_t, 8>>(grid, kThreads, current_stream(A), g);
    } else {
      launch<gradients_kernel<acc_t, 16>>(grid, kThreads, current_stream(A), g);
    }
  });
  return grads;
}

bool is_thin(int64_t rank) { return rank >= 1 && rank <= 16; }

}  // namespace

bool Cuda::expands(const Tensor& out, int64_t rank) { return is_thin(rank) && out.numel() > 0 && out.is_contiguous(); }

void Cuda::expand_(const Tensor& out, ScaleIndex keep, bool reads, const Tensor& left, const Tensor& right,
                   const std::optional<Tensor>& bias, const Tensor& scales) {
  const Tensor rows = as_contiguous(left);
  dispatch_floating(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    expand<T>({static_cast<T*>(out.data_ptr()), static_cast<const T*>(rows.data_ptr()), Matrix(right),
               bias ? Numbers(*bias) : Numbers(), bias ? bias->stride(0) : 0, out.size(0), out.size(1),
               static_cast<int>(right.size(0)), Numbers(scales), keep, reads, true, nullptr, nullptr, nullptr},
              out);
  });
}

LowRankGrads Cuda::down_backward_(const Tensor& X, Tensor& GW, const Tensor& GB, const Tensor& H, const Tensor& dB,
                                  const Saved& saved, bool need_x, bool need_factors, bool need_alpha) {
  if (!need_factors || !GW.defined() || !expands(GW, saved.rank())) {
    return down_backward_by_gemm_<Cuda>(X, GW, GB, H, dB, saved, need_x, need_factors, need_alpha);
  }
  const Tensor dA = mm(transposed(GB), X);
  const Tensor x = in_layout_of(X, GW), left = as_contiguous(GB), h = as_contiguous(H);
  const Tensor sums = dispatch_floating(GW.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto data = [](const Tensor& t) { return static_cast<T*>(t.data_ptr()); };
    return expand<T>(
        {data(GW), data(left), Matrix(saved.A), Numbers(), 0, GW.size(0), GW.size(1), static_cast<int>(saved.rank()),
         Numbers(saved.scales), S_W, true, need_x, data(x), data(h), nullptr},
        GW);
  });
  return gradients(dA, dB, nullptr, &sums, saved, need_alpha);
}

FactorGrads Cuda::factor_grads(const Tensor& dA, const Tensor& dB, const Dot& c, const Saved& saved) {
  if (!is_thin(saved.rank())) return factor_grads_by_gemm<Cuda>(dA, dB, c, saved);
  return gradients(dA, dB, &c, nullptr, saved, false).factors;
}

}  // namespace mapsurgery
