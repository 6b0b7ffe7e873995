// The norm ||BA||_F: the Gram matrices are products of cpu/thin or GEMMs of torch's, the r x r contraction is in
// double.

#include "cpu/device.h"

namespace mapsurgery {
namespace {

struct Grams {
  Tensor a;
  Tensor b;
};

Grams grams(const Tensor& A, const Tensor& B, ScalarType acc) {
  const Tensor wide_A = as_contiguous(cast(A, acc)), wide_B = as_contiguous(cast(B, acc));
  const int64_t rank = A.size(0);
  if (thin::has_small_gram(wide_A, rank) && thin::has_small_gram(wide_B, rank)) {
    return {thin::gram_of_rows(wide_A), thin::gram_of_columns(wide_B)};
  }
  return {Cpu::mm(wide_A, transposed(wide_A)), Cpu::mm(transposed(wide_B), wide_B)};
}

template <class acc_t>
GramSums contract(const Grams& grams) {
  const acc_t* a = static_cast<const acc_t*>(grams.a.data_ptr());
  const acc_t* b = static_cast<const acc_t*>(grams.b.data_ptr());
  const int64_t rank = grams.a.size(0);
  GramSums sums{};
  for (int64_t i = 0; i < rank * rank; ++i) sums.square += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (int64_t i = 0; i < rank; ++i) {
    sums.trace_a += static_cast<double>(a[i * rank + i]);
    sums.trace_b += static_cast<double>(b[i * rank + i]);
  }
  return sums;
}

// gram / unit^2 in float
Tensor narrowed(const Tensor& gram, double unit) {
  Tensor out = empty({gram.size(0), gram.size(1)}, ScalarType::Float, gram);
  const double* from = static_cast<const double*>(gram.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  for (int64_t i = 0; i < gram.numel(); ++i) to[i] = static_cast<float>(from[i] / unit / unit);
  return out;
}

double trace_of(const Tensor& factor) { return Cpu::squared_norm(as_contiguous(factor)); }

// Of factors whose squares float cannot hold: by double, which holds them all. Others, B = 0, keep what they have.
GramSums contract_in_double(const Tensor& A, const Tensor& B, GramSums narrow, Grams& gram, Units& units) {
  const double a = units.a = unit_of<float>(trace_of(A)), b = units.b = unit_of<float>(trace_of(B));
  if (a == 1 && b == 1) return narrow;
  const Grams wide = grams(A, B, ScalarType::Double);
  const GramSums sums = contract<double>(wide);
  gram = {narrowed(wide.a, a), narrowed(wide.b, b)};
  return {sums.square / (a * b) / (a * b), sums.trace_a / (a * a), sums.trace_b / (b * b)};
}

}  // namespace

void Cpu::fill(Scales& scales, const Tensor& A, const Tensor& B, const Tensor& alpha, const Tensor& beta,
               const Tensor& weight_norm, double tau, bool relative) {
  const ScalarType acc = accumulate_dtype(A.scalar_type());
  Grams gram = grams(A, B, acc);
  dispatch_accumulate(acc, [&](auto type) {
    using acc_t = typename decltype(type)::type;
    GramSums sums = contract<acc_t>(gram);
    Units units{1, 1};
    const bool whole = has_digits(sums.trace_a) && has_digits(sums.trace_b);
    if (!whole && acc == ScalarType::Float) sums = contract_in_double(A, B, sums, gram, units);
    compute_scales(sums, units, read(&alpha), read(&beta), read(&weight_norm), tau, relative, scales.out<acc_t>());
  });
  scales.gram_a = gram.a;
  scales.gram_b = gram.b;
}

}  // namespace mapsurgery
