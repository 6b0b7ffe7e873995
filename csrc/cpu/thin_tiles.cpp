#include "cpu/thin_tiles.h"

#include "cpu/simd.h"

namespace mapsurgery {
namespace {

// Each block below keeps its sums in registers: of 16, 8 hold sums, the others what is read.

// h[t, j] += <x[t], p[j]> over whole vectors from column `begin`, for R rows and J columns of h. Returns where it
// ended.
template <class V, int R, int J, class T>
MAPSURGERY_INLINE int64_t project_block(Rows<const T> x, Rows<const T> p, Strided<T> h, int64_t begin, int64_t end) {
  typename V::Vector sums[R][J] = {};
  int64_t i = begin;
  for (; i + V::kLanes <= end; i += V::kLanes) {
    typename V::Vector xs[R];
    for (int t = 0; t < R; ++t) V::load(xs[t], x.at(t, i));
    for (int j = 0; j < J; ++j) {
      typename V::Vector row;
      V::load(row, p.at(j, i));
      for (int t = 0; t < R; ++t) sums[t][j] += xs[t] * row;
    }
  }
  if (i == begin) return i;
  for (int t = 0; t < R; ++t) {
    for (int j = 0; j < J; ++j) V::add_lanes(*h.at(t, j), sums[t][j]);
  }
  return i;
}

template <int R, int J, class T>
MAPSURGERY_INLINE void project_whole(Rows<const T> x, Rows<const T> p, Strided<T> h, int64_t columns) {
  const int64_t done = project_block<Simd<T>, R, J>(x, p, h, 0, columns);
  project_block<Scalar<T>, R, J>(x, p, h, done, columns);
}

template <int R, class T>
MAPSURGERY_INLINE void project_rows(Rows<const T> x, Rows<const T> p, Strided<T> h, const Extent& extent) {
  int64_t j = 0;
  for (; j + 4 <= extent.rank; j += 4) {
    project_whole<R, 4>(x, p.from(j), h.from(0, j), extent.columns);
  }
  for (; j < extent.rank; ++j) {
    project_whole<R, 1>(x, p.from(j), h.from(0, j), extent.columns);
  }
}

// d[j] += sum_t h[t, j] x[t] for J rows and C vectors of d.
template <class V, int J, int C, class T>
MAPSURGERY_INLINE void gather_block(Rows<const T> x, Strided<const T> h, Rows<T> d, int64_t rows) {
  typename V::Vector sums[J][C];
  for (int j = 0; j < J; ++j) {
    for (int c = 0; c < C; ++c) V::load(sums[j][c], d.at(j, c * V::kLanes));
  }
  for (int64_t t = 0; t < rows; ++t) {
    typename V::Vector row[C];
    for (int c = 0; c < C; ++c) V::load(row[c], x.at(t, c * V::kLanes));
    for (int j = 0; j < J; ++j) {
      const T factor = *h.at(t, j);
      for (int c = 0; c < C; ++c) sums[j][c] += factor * row[c];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int c = 0; c < C; ++c) V::store(d.at(j, c * V::kLanes), sums[j][c]);
  }
}

template <class V, int C, class T>
MAPSURGERY_INLINE void gather_columns(Rows<const T> x, Strided<const T> h, Rows<T> d, const Extent& extent) {
  int64_t j = 0;
  for (; j + 4 <= extent.rank; j += 4) {
    gather_block<V, 4, C>(x, h.from(0, j), d.from(j), extent.rows);
  }
  for (; j < extent.rank; ++j) {
    gather_block<V, 1, C>(x, h.from(0, j), d.from(j), extent.rows);
  }
}

// y[t] = keep y[t] + scale sum_j h[t, j] p[j] for R rows and C vectors; dot += x * (the old y) where kDot.
template <class V, int R, int C, bool kDot, class T>
MAPSURGERY_INLINE void expand_block(Rows<const T> x, Rows<T> y, T keep, Strided<const T> h, T scale, Rows<const T> p,
                                    int64_t rank, typename V::Vector& dot) {
  typename V::Vector sums[R][C] = {};
  for (int64_t j = 0; j < rank; ++j) {
    typename V::Vector row[C];
    for (int c = 0; c < C; ++c) V::load(row[c], p.at(j, c * V::kLanes));
    for (int t = 0; t < R; ++t) {
      const T factor = *h.at(t, j);
      for (int c = 0; c < C; ++c) sums[t][c] += factor * row[c];
    }
  }
  for (int t = 0; t < R; ++t) {
    for (int c = 0; c < C; ++c) {
      typename V::Vector old = {};
      if (keep != 0 || kDot) V::load(old, y.at(t, c * V::kLanes));
      if constexpr (kDot) {
        typename V::Vector other;
        V::load(other, x.at(t, c * V::kLanes));
        dot += other * old;
      }
      V::store(y.at(t, c * V::kLanes), keep * old + scale * sums[t][c]);
    }
  }
}

template <class V, int C, bool kDot, class T>
MAPSURGERY_INLINE double expand_columns(Rows<const T> x, Rows<T> y, T keep, Strided<const T> h, T scale,
                                        Rows<const T> p, const Extent& extent) {
  typename V::Vector products = {};
  int64_t t = 0;
  for (; t + 2 <= extent.rows; t += 2) {
    expand_block<V, 2, C, kDot>(x.from(t), y.from(t), keep, h.from(t, 0), scale, p, extent.rank, products);
  }
  for (; t < extent.rows; ++t) {
    expand_block<V, 1, C, kDot>(x.from(t), y.from(t), keep, h.from(t, 0), scale, p, extent.rank, products);
  }
  T sum = 0;
  if constexpr (kDot) V::add_lanes(sum, products);
  return sum;
}

template <bool kDot, class T>
MAPSURGERY_INLINE double expand(Rows<const T> x, Rows<T> y, T keep, Strided<const T> h, T scale, Rows<const T> p,
                                const Extent& extent) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  double dot = 0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= extent.columns; i += 4 * kLanes) {
    dot += expand_columns<Simd<T>, 4, kDot>(x.from(0, i), y.from(0, i), keep, h, scale, p.from(0, i), extent);
  }
  for (; i + kLanes <= extent.columns; i += kLanes) {
    dot += expand_columns<Simd<T>, 1, kDot>(x.from(0, i), y.from(0, i), keep, h, scale, p.from(0, i), extent);
  }
  for (; i < extent.columns; ++i) {
    dot += expand_columns<Scalar<T>, 1, kDot>(x.from(0, i), y.from(0, i), keep, h, scale, p.from(0, i), extent);
  }
  return dot;
}

}  // namespace

template <class T>
MAPSURGERY_SIMD void project_tile(Rows<const T> x, Rows<const T> p, Strided<T> h, Extent extent) {
  int64_t t = 0;
  for (; t + 2 <= extent.rows; t += 2) {
    project_rows<2>(x.from(t), p, h.from(t, 0), extent);
  }
  for (; t < extent.rows; ++t) {
    project_rows<1>(x.from(t), p, h.from(t, 0), extent);
  }
}

template <class T>
MAPSURGERY_SIMD void gather_tile(Rows<const T> x, Strided<const T> h, Rows<T> d, Extent extent) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t i = 0;
  for (; i + 2 * kLanes <= extent.columns; i += 2 * kLanes) {
    gather_columns<Simd<T>, 2>(x.from(0, i), h, d.from(0, i), extent);
  }
  for (; i + kLanes <= extent.columns; i += kLanes) {
    gather_columns<Simd<T>, 1>(x.from(0, i), h, d.from(0, i), extent);
  }
  for (; i < extent.columns; ++i) {
    gather_columns<Scalar<T>, 1>(x.from(0, i), h, d.from(0, i), extent);
  }
}

template <class T>
MAPSURGERY_SIMD void expand_tile(Rows<T> y, T keep, Strided<const T> h, T scale, Rows<const T> p, Extent extent) {
  expand<false>(Rows<const T>{y.data, y.stride}, y, keep, h, scale, p, extent);
}

template <class T>
MAPSURGERY_SIMD double dot_expand_tile(Rows<const T> x, Rows<T> y, T keep, Strided<const T> h, T scale, Rows<const T> p,
                                       Extent extent) {
  return expand<true>(x, y, keep, h, scale, p, extent);
}

#define INSTANTIATE(T)                                                                  \
  template void project_tile<T>(Rows<const T>, Rows<const T>, Strided<T>, Extent);      \
  template void gather_tile<T>(Rows<const T>, Strided<const T>, Rows<T>, Extent);       \
  template void expand_tile<T>(Rows<T>, T, Strided<const T>, T, Rows<const T>, Extent); \
  template double dot_expand_tile<T>(Rows<const T>, Rows<T>, T, Strided<const T>, T, Rows<const T>, Extent)

INSTANTIATE(float);
INSTANTIATE(double);

}  // namespace mapsurgery
