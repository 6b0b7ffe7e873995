// The norm ||BA||_F: the Gram matrices are products of cpu/thin or GEMMs of torch's, the r x r contraction is in
// double.

#include "cpu/device.h"

namespace mapsurgery {
namespace {

struct Grams {
  Tensor a;
  Tensor b;
};

Grams grams(const Tensor& A, const Tensor& B) {
  const ScalarType acc = accumulate_dtype(A.scalar_type());
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
  GramSums sums{0, 0};
  for (int64_t i = 0; i < rank * rank; ++i) sums.square += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (int64_t i = 0; i < rank; ++i) {
    sums.trace += static_cast<double>(a[i * rank + i]) + static_cast<double>(b[i * rank + i]);
  }
  return sums;
}

}  // namespace

void Cpu::fill(Scales& scales, const Tensor& A, const Tensor& B, const Tensor& alpha, const Tensor& beta,
               const Tensor& weight_norm, double tau, bool relative) {
  const Grams gram = grams(A, B);
  scales.gram_a = gram.a;
  scales.gram_b = gram.b;
  dispatch_accumulate(gram.a.scalar_type(), [&](auto type) {
    using acc_t = typename decltype(type)::type;
    compute_scales(contract<acc_t>(gram), read(&alpha), read(&beta), read(&weight_norm), tau, relative,
                   scales.out<acc_t>());
  });
}

}  // namespace mapsurgery
