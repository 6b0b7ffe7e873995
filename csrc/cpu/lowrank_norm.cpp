// squared_norm, lowrank_norm and map_scales, of one layer or many: the Gram matrices are products of thin.h or GEMMs of
// torch's, the r x r contraction is in double.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "common/many.h"
#include "cpu/device.h"

namespace mapsurgery {
namespace {

struct Grams {
  Tensor a;
  Tensor b;
};

Grams grams(const Tensor& A, const Tensor& B) {
  const ScalarType acc = accumulate_dtype(A.scalar_type());
  const Tensor wide_A = cast(A, acc), wide_B = cast(B, acc);
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

double value_of(const Tensor& scalar) {
  return dispatch_floating(scalar.scalar_type(), [&](auto type) {
    return static_cast<double>(*static_cast<const typename decltype(type)::type*>(scalar.data_ptr()));
  });
}

// Whether the numbers of t fill one piece of memory, in any order of its dimensions.
bool is_dense(const Tensor& t) {
  const Sizes sizes = sizes_of(t), strides = strides_of(t);
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (size_t i : order) {
    if (sizes[i] == 1) continue;
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

Tensor squared_norm(const Tensor& weight) {
  check_floating("weight", weight);
  Tensor result = empty({1}, ScalarType::Double, weight);
  *static_cast<double*>(result.data_ptr()) = Cpu::squared_norm(is_dense(weight) ? weight : as_contiguous(weight));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> lowrank_norm(const Tensor& A, const Tensor& B) {
  check_factors(A, B);
  const Grams gram = grams(A, B);
  Tensor norm = empty({1}, gram.a.scalar_type(), A);
  dispatch_accumulate(norm.scalar_type(), [&](auto type) {
    using acc_t = typename decltype(type)::type;
    *static_cast<acc_t*>(norm.data_ptr()) = norm_of<acc_t>(contract<acc_t>(gram).square);
  });
  return {norm, gram.a, gram.b};
}

std::tuple<Tensor, Tensor, Tensor> map_scales(const Tensor& A, const Tensor& B, const Tensor& alpha, const Tensor& beta,
                                              const Tensor& weight_norm, double tau, bool relative) {
  check_factors(A, B);
  check_scalars(alpha, beta, weight_norm, A);
  return Cpu::map_scales(A, B, alpha, beta, weight_norm, tau, relative);
}

// One after the other: the products of each are threaded by themselves, and have to be those of map_scales bit for bit.
Many map_scales_many(const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<Tensor>& alpha,
                     const std::vector<Tensor>& beta, const std::vector<Tensor>& weight_norm,
                     const std::vector<double>& tau, const std::vector<bool>& relative) {
  check_many(A, B, alpha, beta, weight_norm, tau, relative);
  Many results;
  for (size_t i = 0; i < A.size(); ++i) {
    append(results, Cpu::map_scales(A[i], B[i], alpha[i], beta[i], weight_norm[i], tau[i], relative[i]));
  }
  return results;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> Cpu::map_scales(const Tensor& A, const Tensor& B, const Tensor& alpha,
                                                   const Tensor& beta, const Tensor& weight_norm, double tau,
                                                   bool relative) {
  const Grams gram = grams(A, B);
  Tensor scales = empty({NUM_SCALES}, gram.a.scalar_type(), A);
  dispatch_accumulate(scales.scalar_type(), [&](auto type) {
    using acc_t = typename decltype(type)::type;
    compute_scales(contract<acc_t>(gram), value_of(alpha), value_of(beta), value_of(weight_norm), tau, relative,
                   static_cast<acc_t*>(scales.data_ptr()));
  });
  return {scales, gram.a, gram.b};
}

}  // namespace mapsurgery

STABLE_TORCH_LIBRARY_IMPL(mapsurgery, CPU, m) {
  m.impl("squared_norm", TORCH_BOX(&mapsurgery::squared_norm));
  m.impl("lowrank_norm", TORCH_BOX(&mapsurgery::lowrank_norm));
  m.impl("map_scales", TORCH_BOX(&mapsurgery::map_scales));
  m.impl("map_scales_many", TORCH_BOX(&mapsurgery::map_scales_many));
}
