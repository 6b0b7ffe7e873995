// Products of a large matrix with thin ones, of `rank` columns or rows: the low-rank half of an adapted layer on the
// CPU.
//
// Each function goes once over the large matrix, in float or double. The result does not depend on the number of
// threads.
#pragma once

#include <optional>
#include <tuple>

#include "base/tensor.h"

namespace mapsurgery {
namespace thin {

// A matrix with contiguous rows ------------------------------------------------------------------------------------

// Whether these functions take a matrix x (T, n) beside thin ones of this rank, and beat BLAS at it.
bool handles(const Tensor& x, int64_t rank);

// h = x p^T; p (r, n) of any strides, h (T, r) contiguous.
void project(const Tensor& x, const Tensor& p, const Tensor& h);

// h^T x (r, n); h (T, r) of any strides.
Tensor contract(const Tensor& x, const Tensor& h);

// y = keep y + scale h p; y (T, n), h (T, r) and p (r, n) of any strides.
void expand_(const Tensor& y, double keep, const Tensor& h, double scale, const Tensor& p);

// h = x p^T and, returned, g^T x (r, n); shapes as above.
Tensor project_and_contract(const Tensor& x, const Tensor& p, const Tensor& h, const Tensor& g);

// <x, y> and h^T x (r, n), and y = keep y + scale h p on the way; x, y (T, n).
std::tuple<double, Tensor> contract_and_expand_(const Tensor& x, const Tensor& y, double keep, const Tensor& h,
                                                double scale, const Tensor& p);

// A batch of matrices (N, C, L) with contiguous rows: activations, channels first ----------------------------------

bool handles_each(const Tensor& x, int64_t rank);

// out[n] = f x[n]; f (r, C) of any strides, out (N, r, L) with contiguous rows.
void multiply_each(const Tensor& x, const Tensor& f, const Tensor& out);

// y[n] = keep y[n] + scale f h[n]; y (N, C, L), f (C, r) of any strides, h (N, r, L). Returns <x, y> of the y that was
// there before, where an x of the shape of y is given, with contiguous rows.
double expand_each_(const std::optional<Tensor>& x, const Tensor& y, double keep, const Tensor& f, double scale,
                    const Tensor& h);

// sum_n x[n] h[n]^T (C, r); x (N, C, L), h (N, r, L).
Tensor project_all(const Tensor& x, const Tensor& h);

// Thin factors themselves --------------------------------------------------------------------------------------------

// Whether these functions take x, (r, n) or (n, r).
bool has_small_gram(const Tensor& x, int64_t rank);

// x x^T and x^T x (r, r). Pieces of x are added up in double, as it may be long.
Tensor gram_of_rows(const Tensor& x);
Tensor gram_of_columns(const Tensor& x);

}  // namespace thin
}  // namespace mapsurgery
