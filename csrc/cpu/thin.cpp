#include "cpu/thin.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <type_traits>

#include "cpu/rows.h"
#include "cpu/thin_tiles.h"

namespace mapsurgery {
namespace thin {
namespace {

constexpr int64_t kMostRank = 16;         // above, BLAS packs its operands at little cost
constexpr int64_t kFewestRows = 8;        // below, copying a thin factor costs as much as the product
constexpr int64_t kFewestPositions = 16;  // below, most of a row is left to loops over single numbers
constexpr int64_t kRows = 32;             // rows of a tile: what one loop has read, the next finds in the cache
constexpr int64_t kTileBytes = 1 << 14;   // of a thin factor's tile, which stays in the first-level cache
constexpr int64_t kMostColumns = 512;
constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

template <class T>
Rows<T> rows_of(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0)};
}

template <class T>
Strided<T> strided(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1)};
}

// One matrix of a batch.
template <class T>
Strided<T> matrix(const Tensor& t, int64_t n) {
  return {static_cast<T*>(t.data_ptr()) + n * t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
Rows<T> matrix_rows(const Tensor& t, int64_t n) {
  return {static_cast<T*>(t.data_ptr()) + n * t.stride(0), t.stride(1)};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows are dealt out in chunks that depend on the shape alone, and so does every sum. Each chunk may have a thin sum of
// its own: there are few enough for these to be a fraction of the large matrix.
struct Chunks {
  int64_t rows, size, count, grain;

  explicit Chunks(const Tensor& x) : Chunks(x.size(0), x.size(1)) {}
  Chunks(int64_t rows, int64_t columns)
      : rows(rows),
        size(kRows * ceil_div(std::max({kRows, std::min(4 * kRows, rows / 4), ceil_div(rows, 64)}), kRows)),
        count(ceil_div(rows, size)),
        grain(std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size * columns))) {}

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
  return std::clamp<int64_t>(numbers / std::max<int64_t>(1, rank) / kRows * kRows, kRows, kMostColumns);
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

template <class T>
int64_t tiles_of(const Tensor& x, int64_t rank) {
  return x.size(0) * ceil_div(x.size(2), tile_width<T>(rank));
}

// f(n, index of the tile, first, count) for the tiles of each matrix of x (N, C, L), in parallel.
template <class T, class F>
void for_each_tile(const Tensor& x, int64_t rank, const F& f) {
  const int64_t width = tile_width<T>(rank), per_matrix = ceil_div(x.size(2), width);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, x.size(1) * std::min(width, x.size(2))));
  torch::stable::parallel_for(0, tiles_of<T>(x, rank), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_matrix * width;
      f(i / per_matrix, i, first, std::min(width, x.size(2) - first));
    }
  });
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
  void clear(int64_t count) {
    count_ = count;
    std::fill_n(numbers_.get(), rank_ * count, T(0));
  }
  void store(Rows<T> to) {
    for (int64_t j = 0; j < rank_; ++j) std::copy_n(rows().at(j), count_, to.at(j));
  }
  Rows<T> rows() { return {numbers_.get(), count_}; }
  Rows<const T> read() const { return {numbers_.get(), count_}; }

 private:
  int64_t rank_, count_ = 0;
  std::unique_ptr<T[]> numbers_;
};

// The sums (rank, columns) of the chunks, added up in order.
template <class T>
class Gathered {
 public:
  Gathered(const Tensor& like, const Chunks& chunks, int64_t rank, int64_t columns)
      : chunks_(chunks.count), total_(empty({rank, columns}, like.scalar_type(), like)) {
    if (chunks_ > 1) parts_ = empty({chunks_, rank, columns}, like.scalar_type(), like);
  }

  Rows<T> part(int64_t chunk) const { return chunks_ > 1 ? matrix_rows<T>(parts_, chunk) : rows_of<T>(total_); }

  const Tensor& total() const {
    const int64_t columns = total_.size(1);
    if (chunks_ == 0) std::fill_n(static_cast<T*>(total_.data_ptr()), total_.numel(), T(0));
    if (chunks_ <= 1) return total_;
    torch::stable::parallel_for(0, total_.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        T* row = rows_of<T>(total_).at(j);
        std::copy_n(part(0).at(j), columns, row);
        for (int64_t chunk = 1; chunk < chunks_; ++chunk) combine_row<T>(row, 1, part(chunk).at(j), 1, columns);
      }
    });
    return total_;
  }

 private:
  int64_t chunks_;
  Tensor total_, parts_;
};

// The sum of f(part, first, count), which add to a Gram matrix `part` what a piece of a long dimension gives.
template <class F>
Tensor sum_of_grams(const Tensor& x, int64_t rank, int64_t length, const F& f) {
  const Tensor result = empty({rank, rank}, x.scalar_type(), x);
  dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T part[kMostRank * kMostRank];
    double sum[kMostRank * kMostRank] = {};
    for (int64_t first = 0; first < length; first += kMostColumns) {
      std::fill_n(part, rank * rank, T(0));
      f(Rows<T>{part, rank}, first, std::min(kMostColumns, length - first));
      for (int64_t i = 0; i < rank * rank; ++i) sum[i] += part[i];
    }
    std::copy_n(sum, rank * rank, static_cast<T*>(result.data_ptr()));
  });
  return result;
}

}  // namespace

bool handles(const Tensor& x, int64_t rank) {
  return rank <= kMostRank && x.size(0) >= kFewestRows && x.scalar_type() == accumulate_dtype(x.scalar_type()) &&
         x.stride(1) == 1 && x.stride(0) >= x.size(1);
}

void project(const Tensor& x, const Tensor& p, const Tensor& h) {
  const int64_t rank = p.size(0);
  dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Strided<T> out = strided<T>(h);
    Chunks(x).parallel([&](int64_t, int64_t begin, int64_t end) {
      Tile<T> tile(rank);
      std::fill(out.at(begin, 0), out.at(end, 0), T(0));
      for_columns<T>(x.size(1), rank, [&](int64_t first, int64_t count) {
        tile.load(strided<const T>(p), first, count);
        for_rows(begin, end, [&](int64_t row, int64_t rows) {
          project_tile(rows_of<const T>(x).from(row, first), tile.read(), out.from(row, 0), {rows, rank, count});
        });
      });
    });
  });
}

Tensor gather(const Tensor& x, const Tensor& h) {
  const int64_t rank = h.size(1);
  return dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Chunks chunks(x);
    const Gathered<T> sums(x, chunks, rank, x.size(1));
    chunks.parallel([&](int64_t chunk, int64_t begin, int64_t end) {
      Tile<T> sum(rank);
      for_columns<T>(x.size(1), rank, [&](int64_t first, int64_t count) {
        sum.clear(count);
        for_rows(begin, end, [&](int64_t row, int64_t rows) {
          gather_tile(rows_of<const T>(x).from(row, first), strided<const T>(h).from(row, 0), sum.rows(),
                      {rows, rank, count});
        });
        sum.store(sums.part(chunk).from(0, first));
      });
    });
    return sums.total();
  });
}

void expand_(const Tensor& y, double keep, const Tensor& h, double scale, const Tensor& p) {
  const int64_t rank = p.size(0);
  dispatch_accumulate(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    Chunks(y).parallel([&](int64_t, int64_t begin, int64_t end) {
      Tile<T> tile(rank);
      for_columns<T>(y.size(1), rank, [&](int64_t first, int64_t count) {
        tile.load(strided<const T>(p), first, count);
        for_rows(begin, end, [&](int64_t row, int64_t rows) {
          expand_tile(rows_of<T>(y).from(row, first), static_cast<T>(keep), strided<const T>(h).from(row, 0),
                      static_cast<T>(scale), tile.read(), {rows, rank, count});
        });
      });
    });
  });
}

Tensor project_and_gather(const Tensor& x, const Tensor& p, const Tensor& h, const Tensor& g) {
  const int64_t rank = p.size(0);
  return dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Chunks chunks(x);
    const Gathered<T> sums(x, chunks, rank, x.size(1));
    const Strided<T> out = strided<T>(h);
    chunks.parallel([&](int64_t chunk, int64_t begin, int64_t end) {
      Tile<T> tile(rank), sum(rank);
      std::fill(out.at(begin, 0), out.at(end, 0), T(0));
      for_columns<T>(x.size(1), rank, [&](int64_t first, int64_t count) {
        tile.load(strided<const T>(p), first, count);
        sum.clear(count);
        for_rows(begin, end, [&](int64_t row, int64_t rows) {
          const Rows<const T> block = rows_of<const T>(x).from(row, first);
          project_tile(block, tile.read(), out.from(row, 0), {rows, rank, count});
          gather_tile(block, strided<const T>(g).from(row, 0), sum.rows(), {rows, rank, count});
        });
        sum.store(sums.part(chunk).from(0, first));
      });
    });
    return sums.total();
  });
}

std::tuple<double, Tensor> gather_and_expand_(const Tensor& x, const Tensor& y, double keep, const Tensor& h,
                                              double scale, const Tensor& p) {
  const int64_t rank = p.size(0);
  double dot = 0;
  const Tensor gathered = dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Chunks chunks(x);
    const Gathered<T> sums(x, chunks, rank, x.size(1));
    std::vector<double> dots(chunks.count);
    chunks.parallel([&](int64_t chunk, int64_t begin, int64_t end) {
      Tile<T> tile(rank), sum(rank);
      for_columns<T>(x.size(1), rank, [&](int64_t first, int64_t count) {
        tile.load(strided<const T>(p), first, count);
        sum.clear(count);
        for_rows(begin, end, [&](int64_t row, int64_t rows) {
          const Rows<const T> block = rows_of<const T>(x).from(row, first);
          const Strided<const T> factors = strided<const T>(h).from(row, 0);
          dots[chunk] += dot_expand_tile(block, rows_of<T>(y).from(row, first), static_cast<T>(keep), factors,
                                         static_cast<T>(scale), tile.read(), {rows, rank, count});
          gather_tile(block, factors, sum.rows(), {rows, rank, count});
        });
        sum.store(sums.part(chunk).from(0, first));
      });
    });
    for (double part : dots) dot += part;
    return sums.total();
  });
  return {dot, gathered};
}

bool has_small_gram(const Tensor& x, int64_t rank) {
  return rank <= kMostRank && x.stride(1) == 1 && x.scalar_type() == accumulate_dtype(x.scalar_type());
}

Tensor gram_of_rows(const Tensor& x) {
  return sum_of_grams(x, x.size(0), x.size(1), [&](auto part, int64_t first, int64_t count) {
    using T = std::remove_pointer_t<decltype(part.data)>;
    const Rows<const T> tile = rows_of<const T>(x).from(0, first);
    project_tile(tile, tile, Strided<T>{part.data, part.stride, 1}, {x.size(0), x.size(0), count});
  });
}

Tensor gram_of_columns(const Tensor& x) {
  return sum_of_grams(x, x.size(1), x.size(0), [&](auto part, int64_t first, int64_t count) {
    using T = std::remove_pointer_t<decltype(part.data)>;
    gather_tile(rows_of<const T>(x).from(first), strided<const T>(x).from(first, 0), part,
                {count, x.size(1), x.size(1)});
  });
}

bool handles_each(const Tensor& x, int64_t rank) {
  return rank <= kMostRank && x.size(2) >= kFewestPositions && x.scalar_type() == accumulate_dtype(x.scalar_type()) &&
         x.stride(2) == 1;
}

void multiply_each(const Tensor& x, const Tensor& f, const Tensor& out) {
  const int64_t rank = f.size(0);
  dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Strided<const T> by_channel = strided<const T>(f).transposed();
    for_each_tile<T>(x, rank, [&](int64_t n, int64_t, int64_t first, int64_t count) {
      Tile<T> sum(rank);
      sum.clear(count);
      for_rows(0, x.size(1), [&](int64_t row, int64_t rows) {
        gather_tile(matrix_rows<const T>(x, n).from(row, first), by_channel.from(row, 0), sum.rows(),
                    {rows, rank, count});
      });
      sum.store(matrix_rows<T>(out, n).from(0, first));
    });
  });
}

double expand_each_(const std::optional<Tensor>& x, const Tensor& y, double keep, const Tensor& f, double scale,
                    const Tensor& h) {
  const int64_t rank = f.size(1);
  return dispatch_accumulate(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    std::vector<double> dots(tiles_of<T>(y, rank));
    for_each_tile<T>(y, rank, [&](int64_t n, int64_t index, int64_t first, int64_t count) {
      Tile<T> tile(rank);
      tile.load(matrix<const T>(h, n), first, count);
      for_rows(0, y.size(1), [&](int64_t row, int64_t rows) {
        const Rows<T> block = matrix_rows<T>(y, n).from(row, first);
        const Strided<const T> factors = strided<const T>(f).from(row, 0);
        const Extent extent{rows, rank, count};
        if (x) {
          dots[index] += dot_expand_tile(matrix_rows<const T>(*x, n).from(row, first), block, static_cast<T>(keep),
                                         factors, static_cast<T>(scale), tile.read(), extent);
        } else {
          expand_tile(block, static_cast<T>(keep), factors, static_cast<T>(scale), tile.read(), extent);
        }
      });
    });
    return std::accumulate(dots.begin(), dots.end(), 0.0);
  });
}

Tensor project_all(const Tensor& x, const Tensor& h) {
  const int64_t rank = h.size(1), channels = x.size(1);
  const Tensor result = empty({channels, rank}, x.scalar_type(), x);
  dispatch_accumulate(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Strided<T> out = strided<T>(result);
    Chunks(channels, x.size(0) * x.size(2)).parallel([&](int64_t, int64_t begin, int64_t end) {
      Tile<T> tile(rank);
      std::fill(out.at(begin, 0), out.at(end, 0), T(0));
      for (int64_t n = 0; n < x.size(0); ++n) {
        for_columns<T>(x.size(2), rank, [&](int64_t first, int64_t count) {
          tile.load(matrix<const T>(h, n), first, count);
          for_rows(begin, end, [&](int64_t row, int64_t rows) {
            project_tile(matrix_rows<const T>(x, n).from(row, first), tile.read(), out.from(row, 0),
                         {rows, rank, count});
          });
        });
      }
    });
  });
  return result;
}

}  // namespace thin
}  // namespace mapsurgery
