#include "cpu/thin/tiles.h"

#include "cpu/simd.h"

namespace mapsurgery {
namespace {

// Each block below keeps in eight of a machine's sixteen registers what it sums up, or what it reads again and again.

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
  project_block<OneLane<T>, R, J>(x, p, h, done, columns);
}

template <int R, class T>
MAPSURGERY_INLINE void project_rows(Rows<const T> x, Rows<const T> p, Strided<T> h, const Extent& extent) {
  int64_t j = 0;
  for (; j + 2 <= extent.rank; j += 2) {
    project_whole<R, 2>(x, p.from(j), h.from(0, j), extent.columns);
  }
  for (; j < extent.rank; ++j) {
    project_whole<R, 1>(x, p.from(j), h.from(0, j), extent.columns);
  }
}

// d[j] += sum_t h[t, j] x[t] for R rows of x and C vectors of each row, which stay in registers.
template <class V, int R, int C, class T>
MAPSURGERY_INLINE void contract_block(Rows<const T> x, Strided<const T> h, Rows<T> d, int64_t rank) {
  typename V::Vector rows[R][C];
  for (int t = 0; t < R; ++t) {
    for (int c = 0; c < C; ++c) V::load(rows[t][c], x.at(t, c * V::kLanes));
  }
  for (int64_t j = 0; j < rank; ++j) {
    typename V::Vector sums[C];
    for (int c = 0; c < C; ++c) V::load(sums[c], d.at(j, c * V::kLanes));
    for (int t = 0; t < R; ++t) {
      const T factor = *h.at(t, j);
      for (int c = 0; c < C; ++c) sums[c] += factor * rows[t][c];
    }
    for (int c = 0; c < C; ++c) V::store(d.at(j, c * V::kLanes), sums[c]);
  }
}

// Along R rows of x, which the processor fetches ahead as it does whatever is read in order.
template <int R, class T>
MAPSURGERY_INLINE void contract_rows(Rows<const T> x, Strided<const T> h, Rows<T> d, const Extent& extent) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t i = 0;
  for (; i + 2 * kLanes <= extent.columns; i += 2 * kLanes) {
    contract_block<Simd<T>, R, 2>(x.from(0, i), h, d.from(0, i), extent.rank);
  }
  for (; i + kLanes <= extent.columns; i += kLanes) {
    contract_block<Simd<T>, R, 1>(x.from(0, i), h, d.from(0, i), extent.rank);
  }
  for (; i < extent.columns; ++i) contract_block<OneLane<T>, R, 1>(x.from(0, i), h, d.from(0, i), extent.rank);
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
      sums[t][c] *= scale;
      if (keep != 0) sums[t][c] += keep * old;
      V::store(y.at(t, c * V::kLanes), sums[t][c]);
    }
  }
}

// Along R rows of y.
template <int R, bool kDot, class T>
MAPSURGERY_INLINE double expand_rows(Rows<const T> x, Rows<T> y, T keep, Strided<const T> h, T scale, Rows<const T> p,
                                     const Extent& extent) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  typename Simd<T>::Vector products = {};
  T sum = 0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= extent.columns; i += 2 * kLanes) {
    expand_block<Simd<T>, R, 2, kDot>(x.from(0, i), y.from(0, i), keep, h, scale, p.from(0, i), extent.rank, products);
  }
  for (; i + kLanes <= extent.columns; i += kLanes) {
    expand_block<Simd<T>, R, 1, kDot>(x.from(0, i), y.from(0, i), keep, h, scale, p.from(0, i), extent.rank, products);
  }
  for (; i < extent.columns; ++i) {
    expand_block<OneLane<T>, R, 1, kDot>(x.from(0, i), y.from(0, i), keep, h, scale, p.from(0, i), extent.rank, sum);
  }
  if constexpr (kDot) Simd<T>::add_lanes(sum, products);
  return sum;
}

template <bool kDot, class T>
MAPSURGERY_INLINE double expand(Rows<const T> x, Rows<T> y, T keep, Strided<const T> h, T scale, Rows<const T> p,
                                const Extent& extent) {
  double dot = 0;
  int64_t t = 0;
  for (; t + 4 <= extent.rows; t += 4) {
    dot += expand_rows<4, kDot>(x.from(t), y.from(t), keep, h.from(t, 0), scale, p, extent);
  }
  for (; t < extent.rows; ++t) {
    dot += expand_rows<1, kDot>(x.from(t), y.from(t), keep, h.from(t, 0), scale, p, extent);
  }
  return dot;
}

}  // namespace

template <class T>
MAPSURGERY_SIMD void project_tile(Rows<const T> x, Rows<const T> p, Strided<T> h, Extent extent) {
  int64_t t = 0;
  for (; t + 4 <= extent.rows; t += 4) {
    project_rows<4>(x.from(t), p, h.from(t, 0), extent);
  }
  for (; t < extent.rows; ++t) {
    project_rows<1>(x.from(t), p, h.from(t, 0), extent);
  }
}

template <class T>
MAPSURGERY_SIMD void contract_tile(Rows<const T> x, Strided<const T> h, Rows<T> d, Extent extent) {
  int64_t t = 0;
  for (; t + 4 <= extent.rows; t += 4) contract_rows<4>(x.from(t), h.from(t, 0), d, extent);
  for (; t < extent.rows; ++t) contract_rows<1>(x.from(t), h.from(t, 0), d, extent);
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
  template void contract_tile<T>(Rows<const T>, Strided<const T>, Rows<T>, Extent);     \
  template void expand_tile<T>(Rows<T>, T, Strided<const T>, T, Rows<const T>, Extent); \
  template double dot_expand_tile<T>(Rows<const T>, Rows<T>, T, Strided<const T>, T, Rows<const T>, Extent)

INSTANTIATE(float);
INSTANTIATE(double);

}  // namespace mapsurgery
