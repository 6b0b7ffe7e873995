#include "cpu/thin/products.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>

#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/thin/tiles.h"

namespace mapsurgery {
namespace thin {
namespace {

constexpr int64_t kMostRank = 16;         // above, BLAS packs its operands at little cost
constexpr int64_t kFewestRows = 8;        // below, copying a thin factor costs as much as the product
constexpr int64_t kFewestPositions = 16;  // below, most of a row is left to loops over single numbers
constexpr int64_t kRows = 32;             // rows of a block: what one loop has read, the next finds in the cache
constexpr int64_t kTileBytes = 1 << 14;   // of a thin factor's tile, which stays in the first-level cache
constexpr int64_t kMostColumns = 512;     // of a tile, a multiple of kColumnStep
constexpr int64_t kColumnStep = 32;
constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

// Pointers are taken before threads start: torch may have to copy a tensor that shares its memory lazily.
template <class T>
T* pointer(const Tensor& t) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(t.const_data_ptr());
  } else {
    return static_cast<T*>(t.mutable_data_ptr());
  }
}

template <class T>
Rows<T> rows_of(const Tensor& t) {
  return {pointer<T>(t), t.stride(0)};
}

template <class T>
Strided<T> strided(const Tensor& t) {
  return {pointer<T>(t), t.stride(0), t.stride(1)};
}

// The matrices of a batch with contiguous rows.
template <class T>
struct Batch {
  T* data;
  int64_t step, stride;

  explicit Batch(const Tensor& t) : data(pointer<T>(t)), step(t.stride(0)), stride(t.stride(1)) {}
  Rows<T> operator[](int64_t n) const { return {data + n * step, stride}; }
};

template <class T>
T narrowed(double value) {
  STD_TORCH_CHECK(!std::isfinite(value) || std::abs(value) <= std::numeric_limits<T>::max(), "mapsurgery: a scale of ",
                  value, " is too large for the dtype of the input: ||BA||_F is nearly 0 beside beta");
  return static_cast<T>(value);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows are dealt out in chunks that depend on the shape alone, and so does every sum. Each chunk may have a thin sum of
// its own: there are few enough for these to be a fraction of the large matrix.
struct Chunks {
  int64_t rows, size, count, grain;

  Chunks(int64_t rows, int64_t columns)
      : rows(rows),
        size(kRows * ceil_div(std::max({kRows, std::min(4 * kRows, rows / 4), ceil_div(rows, 64)}), kRows)),
        count(ceil_div(rows, size)),
        grain(std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size * columns))) {}

  // f(chunk, first row, end of its rows)
  template <class F>
  void parallel(const F& f) const {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, i * size, std::min(rows, (i + 1) * size));
    });
  }
};

// Columns that a tile of a thin factor of this rank has.
template <class T>
int64_t tile_width(int64_t rank) {
  const int64_t numbers = kTileBytes / static_cast<int64_t>(sizeof(T));
  return std::clamp<int64_t>(numbers / rank / kColumnStep * kColumnStep, kColumnStep, kMostColumns);
}

// f(first, count) tile by tile.
template <class T, class F>
void for_columns(int64_t columns, int64_t rank, const F& f) {
  const int64_t width = tile_width<T>(rank);
  for (int64_t first = 0; first < columns; first += width) f(first, std::min(width, columns - first));
}

// f(row, rows) block by block.
template <class F>
void for_rows(int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end; row += kRows) f(row, std::min(kRows, end - row));
}

// Columns [first, first + count) of a thin factor, its rows one after the other: rows that lie a power of two apart
// would push each other out of the cache.
template <class T>
class Tile {
 public:
  explicit Tile(int64_t rank) : rank_(rank), numbers_(new T[rank * tile_width<T>(rank)]) {}

  void load(Strided<const T> p, int64_t first, int64_t count) {
    count_ = count;
    for (int64_t j = 0; j < rank_; ++j) load_row(rows().at(j), p.at(j, first), p.column, count);
  }
  void load(Rows<const T> p, int64_t first, int64_t count) {
    load(Strided<const T>{p.data, p.stride, 1}, first, count);
  }
  void clear(int64_t count) {
    count_ = count;
    std::fill_n(numbers_.get(), rank_ * count, T(0));
  }
  void store(Rows<T> to) {
    for (int64_t j = 0; j < rank_; ++j) std::copy_n(rows().at(j), count_, to.at(j));
  }
  Rows<T> rows() { return {numbers_.get(), count_}; }
  Rows<const T> const_rows() const { return {numbers_.get(), count_}; }

 private:
  int64_t rank_, count_ = 0;
  std::unique_ptr<T[]> numbers_;
};

// Where a thread is in a matrix: a chunk of its rows, and a tile of its columns, with the tiles of two thin matrices.
template <class T>
struct Place {
  int64_t chunk, first = 0, count = 0;
  Tile<T> factor, sum;

  Place(int64_t chunk, int64_t rank) : chunk(chunk), factor(rank), sum(rank) {}
};

// Over a matrix, chunk by chunk of its rows and in parallel; within a chunk tile by tile of the columns, and within a
// tile block by block of the rows: enter(place), visit(place, row, extent) for each block, leave(place).
template <class T, class Enter, class Visit, class Leave>
void sweep(const Chunks& chunks, int64_t columns, int64_t rank, const Enter& enter, const Visit& visit,
           const Leave& leave) {
  chunks.parallel([&](int64_t chunk, int64_t begin, int64_t end) {
    Place<T> place(chunk, rank);
    for_columns<T>(columns, rank, [&](int64_t first, int64_t count) {
      place.first = first;
      place.count = count;
      enter(place);
      for_rows(begin, end, [&](int64_t row, int64_t rows) { visit(place, row, Extent{rows, rank, count}); });
      leave(place);
    });
  });
}

constexpr auto nothing_left = [](auto&) {};

// Thin sums (rank, columns), one of each chunk, which are added up in order.
template <class T>
class Sums {
 public:
  Sums(const Tensor& like, int64_t chunks, int64_t rank, int64_t columns)
      : chunks_(chunks),
        total_(empty({rank, columns}, like.scalar_type(), like)),
        parts_(chunks > 1 ? empty({chunks, rank, columns}, like.scalar_type(), like)
                          : view(total_, {1, rank, columns}, {rank * columns, columns, 1})),
        part_of_(parts_) {}

  void store(Place<T>& place) const { place.sum.store(part_of_[place.chunk].from(0, place.first)); }

  const Tensor& total() const {
    if (chunks_ == 1) return total_;
    const int64_t columns = total_.size(1);
    const Rows<T> total = rows_of<T>(total_);
    torch::stable::parallel_for(0, total_.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        std::copy_n(part_of_[0].at(j), columns, total.at(j));
        for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
          combine_row<T>(total.at(j), 1, part_of_[chunk].at(j), 1, columns);
        }
      }
    });
    return total_;
  }

 private:
  int64_t chunks_;
  Tensor total_, parts_;
  Batch<T> part_of_;
};

bool is_float_or_double(const Tensor& t) { return t.scalar_type() == accumulate_dtype(t.scalar_type()); }

bool is_thin(int64_t rank) { return kOwnVectors && 0 < rank && rank <= kMostRank; }

}  // namespace

bool handles(const Tensor& x, int64_t rank) {
  return is_thin(rank) && is_float_or_double(x) && x.size(0) >= kFewestRows && x.stride(1) == 1 &&
         x.stride(0) >= x.size(1);
}

void project(const Tensor& x, const Tensor& p, const Tensor& h) {
  dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Rows<const T> X = rows_of<const T>(x);
    const Strided<const T> P = strided<const T>(p);
    const Strided<T> H = strided<T>(h);
    std::fill_n(H.data, h.numel(), T(0));
    sweep<T>(
        Chunks(x.size(0), x.size(1)), x.size(1), p.size(0),
        [&](Place<T>& at) { at.factor.load(P, at.first, at.count); },
        [&](Place<T>& at, int64_t row, Extent extent) {
          project_tile(X.from(row, at.first), at.factor.const_rows(), H.from(row, 0), extent);
        },
        nothing_left);
  });
}

Tensor contract(const Tensor& x, const Tensor& h) {
  return dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t rank = h.size(1), columns = x.size(1);
    const Chunks chunks(x.size(0), columns);
    const Sums<T> sums(x, chunks.count, rank, columns);
    const Rows<const T> X = rows_of<const T>(x);
    const Strided<const T> H = strided<const T>(h);
    sweep<T>(
        chunks, columns, rank, [&](Place<T>& at) { at.sum.clear(at.count); },
        [&](Place<T>& at, int64_t row, Extent extent) {
          contract_tile(X.from(row, at.first), H.from(row, 0), at.sum.rows(), extent);
        },
        [&](Place<T>& at) { sums.store(at); });
    return sums.total();
  });
}

void expand_(const Tensor& y, double keep, const Tensor& h, double scale, const Tensor& p) {
  dispatch_accumulate(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T kept = narrowed<T>(keep), scaled = narrowed<T>(scale);
    const Rows<T> Y = rows_of<T>(y);
    const Strided<const T> H = strided<const T>(h), P = strided<const T>(p);
    sweep<T>(
        Chunks(y.size(0), y.size(1)), y.size(1), p.size(0),
        [&](Place<T>& at) { at.factor.load(P, at.first, at.count); },
        [&](Place<T>& at, int64_t row, Extent extent) {
          expand_tile(Y.from(row, at.first), kept, H.from(row, 0), scaled, at.factor.const_rows(), extent);
        },
        nothing_left);
  });
}

Tensor project_and_contract(const Tensor& x, const Tensor& p, const Tensor& h, const Tensor& g) {
  return dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t rank = p.size(0), columns = x.size(1);
    const Chunks chunks(x.size(0), columns);
    const Sums<T> sums(x, chunks.count, rank, columns);
    const Rows<const T> X = rows_of<const T>(x);
    const Strided<const T> P = strided<const T>(p), G = strided<const T>(g);
    const Strided<T> H = strided<T>(h);
    std::fill_n(H.data, h.numel(), T(0));
    sweep<T>(
        chunks, columns, rank,
        [&](Place<T>& at) {
          at.factor.load(P, at.first, at.count);
          at.sum.clear(at.count);
        },
        [&](Place<T>& at, int64_t row, Extent extent) {
          const Rows<const T> block = X.from(row, at.first);
          project_tile(block, at.factor.const_rows(), H.from(row, 0), extent);
          contract_tile(block, G.from(row, 0), at.sum.rows(), extent);
        },
        [&](Place<T>& at) { sums.store(at); });
    return sums.total();
  });
}

std::tuple<double, Tensor> contract_and_expand_(const Tensor& x, const Tensor& y, double keep, const Tensor& h,
                                                double scale, const Tensor& p) {
  return dispatch_accumulate(x.scalar_type(), [&](auto type) -> std::tuple<double, Tensor> {
    using T = typename decltype(type)::type;
    const T kept = narrowed<T>(keep), scaled = narrowed<T>(scale);
    const int64_t rank = p.size(0), columns = x.size(1);
    const Chunks chunks(x.size(0), columns);
    const Sums<T> sums(x, chunks.count, rank, columns);
    std::vector<double> dots(chunks.count);
    const Rows<const T> X = rows_of<const T>(x);
    const Rows<T> Y = rows_of<T>(y);
    const Strided<const T> H = strided<const T>(h), P = strided<const T>(p);
    sweep<T>(
        chunks, columns, rank,
        [&](Place<T>& at) {
          at.factor.load(P, at.first, at.count);
          at.sum.clear(at.count);
        },
        [&](Place<T>& at, int64_t row, Extent extent) {
          const Rows<const T> block = X.from(row, at.first);
          const Strided<const T> factors = H.from(row, 0);
          dots[at.chunk] +=
              dot_expand_tile(block, Y.from(row, at.first), kept, factors, scaled, at.factor.const_rows(), extent);
          contract_tile(block, factors, at.sum.rows(), extent);
        },
        [&](Place<T>& at) { sums.store(at); });
    return {std::accumulate(dots.begin(), dots.end(), 0.0), sums.total()};
  });
}

// ---- batches

namespace {

template <class T>
int64_t tiles_of(const Tensor& x, int64_t rank) {
  return x.size(0) * ceil_div(x.size(2), tile_width<T>(rank));
}

// f(n, index of the tile, first, count, a tile to use) for the tiles of each matrix of x (N, C, L), in parallel.
template <class T, class F>
void for_each_tile(const Tensor& x, int64_t rank, const F& f) {
  const int64_t width = tile_width<T>(rank), length = x.size(2), per_matrix = ceil_div(length, width);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, x.size(1) * std::min(width, length)));
  torch::stable::parallel_for(0, tiles_of<T>(x, rank), grain, [&](int64_t begin, int64_t end) {
    Tile<T> tile(rank);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_matrix * width;
      f(i / per_matrix, i, first, std::min(width, length - first), tile);
    }
  });
}

}  // namespace

bool handles_each(const Tensor& x, int64_t rank) {
  return is_thin(rank) && is_float_or_double(x) && x.size(2) >= kFewestPositions && x.stride(2) == 1;
}

void multiply_each(const Tensor& x, const Tensor& f, const Tensor& out) {
  dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t rank = f.size(0), channels = x.size(1);
    const Batch<const T> X(x);
    const Batch<T> Out(out);
    const Strided<const T> by_channel = strided<const T>(f).transposed();
    for_each_tile<T>(x, rank, [&](int64_t n, int64_t, int64_t first, int64_t count, Tile<T>& sum) {
      sum.clear(count);
      for_rows(0, channels, [&](int64_t row, int64_t rows) {
        contract_tile(X[n].from(row, first), by_channel.from(row, 0), sum.rows(), {rows, rank, count});
      });
      sum.store(Out[n].from(0, first));
    });
  });
}

double expand_each_(const std::optional<Tensor>& x, const Tensor& y, double keep, const Tensor& f, double scale,
                    const Tensor& h) {
  return dispatch_accumulate(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T kept = narrowed<T>(keep), scaled = narrowed<T>(scale);
    const int64_t rank = f.size(1), channels = y.size(1);
    const Batch<const T> X(x ? *x : y), H(h);
    const Batch<T> Y(y);
    const Strided<const T> F = strided<const T>(f);
    std::vector<double> dots(tiles_of<T>(y, rank));
    for_each_tile<T>(y, rank, [&](int64_t n, int64_t index, int64_t first, int64_t count, Tile<T>& tile) {
      tile.load(H[n], first, count);
      for_rows(0, channels, [&](int64_t row, int64_t rows) {
        const Rows<T> block = Y[n].from(row, first);
        const Extent extent{rows, rank, count};
        if (x) {
          dots[index] +=
              dot_expand_tile(X[n].from(row, first), block, kept, F.from(row, 0), scaled, tile.const_rows(), extent);
        } else {
          expand_tile(block, kept, F.from(row, 0), scaled, tile.const_rows(), extent);
        }
      });
    });
    return std::accumulate(dots.begin(), dots.end(), 0.0);
  });
}

Tensor project_all(const Tensor& x, const Tensor& h) {
  const int64_t N = x.size(0), channels = x.size(1), length = x.size(2), rank = h.size(1);
  const Tensor result = empty({channels, rank}, x.scalar_type(), x);
  dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Batch<const T> X(x), H(h);
    const Strided<T> out = strided<T>(result);
    std::fill_n(out.data, result.numel(), T(0));
    Chunks(channels, N * length).parallel([&](int64_t, int64_t begin, int64_t end) {
      Tile<T> tile(rank);
      for (int64_t n = 0; n < N; ++n) {
        for_columns<T>(length, rank, [&](int64_t first, int64_t count) {
          tile.load(H[n], first, count);
          for_rows(begin, end, [&](int64_t row, int64_t rows) {
            project_tile(X[n].from(row, first), tile.const_rows(), out.from(row, 0), {rows, rank, count});
          });
        });
      }
    });
  });
  return result;
}

// ---- Gram matrices

namespace {

// The sum of f(part, first, count), which add to a Gram matrix `part` what a piece of a long dimension gives.
template <class T, class F>
Tensor sum_of_grams(const Tensor& x, int64_t rank, int64_t length, const F& f) {
  const Tensor result = empty({rank, rank}, x.scalar_type(), x);
  T part[kMostRank * kMostRank];
  double sum[kMostRank * kMostRank] = {};
  for (int64_t first = 0; first < length; first += kMostColumns) {
    std::fill_n(part, rank * rank, T(0));
    f(Rows<T>{part, rank}, first, std::min(kMostColumns, length - first));
    for (int64_t i = 0; i < rank * rank; ++i) sum[i] += part[i];
  }
  std::copy_n(sum, rank * rank, pointer<T>(result));
  return result;
}

}  // namespace

bool has_small_gram(const Tensor& x, int64_t rank) {
  return is_thin(rank) && is_float_or_double(x) && x.stride(1) == 1;
}

Tensor gram_of_rows(const Tensor& x) {
  return dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t rank = x.size(0);
    const Rows<const T> X = rows_of<const T>(x);
    return sum_of_grams<T>(x, rank, x.size(1), [&](Rows<T> part, int64_t first, int64_t count) {
      project_tile(X.from(0, first), X.from(0, first), Strided<T>{part.data, part.stride, 1}, {rank, rank, count});
    });
  });
}

Tensor gram_of_columns(const Tensor& x) {
  return dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t rank = x.size(1);
    const Rows<const T> X = rows_of<const T>(x);
    return sum_of_grams<T>(x, rank, x.size(0), [&](Rows<T> part, int64_t first, int64_t count) {
      const Rows<const T> piece = X.from(first);
      contract_tile(piece, Strided<const T>{piece.data, piece.stride, 1}, part, {count, rank, rank});
    });
  });
}

}  // namespace thin
}  // namespace mapsurgery
