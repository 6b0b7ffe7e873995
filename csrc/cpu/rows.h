// Vectorised loops over one row of numbers; the building blocks of the CPU kernels.
#pragma once

#include <cstdint>

namespace mapsurgery {

// dst[i] = src[i stride], widened to acc_t.
template <class acc_t, class T>
void load_row(acc_t* dst, const T* src, int64_t stride, int64_t n);

// dst[i stride] = src[i], rounded to T.
template <class acc_t, class T>
void store_row(T* dst, int64_t stride, const acc_t* src, int64_t n);

template <class acc_t>
acc_t dot_row(const acc_t* a, const acc_t* b, int64_t n);

// row = factor row + shift
// sums[i mod 8] += a[i] b[i]; the first of the numbers is at a place i that 8 divides.
void dot_row_by_8(double* sums, const double* a, const double* b, int64_t n);

template <class acc_t>
void affine_row(acc_t* row, acc_t factor, acc_t shift, int64_t n);

// row = factor row + shift[i]
template <class acc_t>
void affine_row(acc_t* row, acc_t factor, const acc_t* shift, int64_t n);

// row = row_factor row + other_factor other
template <class acc_t>
void combine_row(acc_t* row, acc_t row_factor, const acc_t* other, acc_t other_factor, int64_t n);

// row += sum_k factors[k stride] rows[k], k < count
template <class acc_t>
void add_rows(acc_t* row, const acc_t* factors, int64_t stride, const acc_t* rows, int64_t row_stride, int64_t count,
              int64_t n);

}  // namespace mapsurgery
