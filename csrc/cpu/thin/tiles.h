// Products with a matrix of few columns, h (rows, rank), on one tile of a large matrix; the inner loops of
// products.cpp.
//
// BLAS packs both operands of a product before it multiplies: with a rank of 8 the packing takes most of the time.
// These loops read the large matrix once, as it lies in memory, and keep what they sum up in registers.
#pragma once

#include <cstdint>

namespace mapsurgery {

struct Extent {
  int64_t rows, rank, columns;
};

// A matrix of any strides.
template <class T>
struct Strided {
  T* data;
  int64_t row, column;

  T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
  Strided from(int64_t i, int64_t j) const { return {at(i, j), row, column}; }
  Strided transposed() const { return {data, column, row}; }
};

// A matrix whose rows are contiguous, `stride` apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  T* at(int64_t i, int64_t j = 0) const { return data + i * stride + j; }
  Rows from(int64_t i, int64_t j = 0) const { return {at(i, j), stride}; }
};

// h += x p^T, with x (rows, columns) and p (rank, columns).
template <class T>
void project_tile(Rows<const T> x, Rows<const T> p, Strided<T> h, Extent extent);

// d += h^T x, with x (rows, columns) and d (rank, columns).
template <class T>
void contract_tile(Rows<const T> x, Strided<const T> h, Rows<T> d, Extent extent);

// y = keep y + scale h p, with y (rows, columns) and p (rank, columns). What was in y does not matter if keep = 0.
template <class T>
void expand_tile(Rows<T> y, T keep, Strided<const T> h, T scale, Rows<const T> p, Extent extent);

// The same; returns <x, y> for the y that was there before.
template <class T>
double dot_expand_tile(Rows<const T> x, Rows<T> y, T keep, Strided<const T> h, T scale, Rows<const T> p, Extent extent);

}  // namespace mapsurgery
