// Checks of the operators' arguments; every message names the offender.
#pragma once

#include <sstream>
#include <string>

#include "common/scales.h"
#include "common/tensor.h"

namespace mapsurgery {

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(t.get_device_index());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         (a.is_cpu() || a.get_device_index() == b.get_device_index());
}

inline void check_floating(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(is_floating(t.scalar_type()), "mapsurgery: ", name,
                  " must be float64, float32, bfloat16 or float16, got ", toString(t.scalar_type()));
}

inline void check_dim(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, "mapsurgery: ", name, " must have ", dim, " dimensions, got shape ", shape(t));
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t size, const char* of) {
  STD_TORCH_CHECK(t.dim() > 0 && t.size(dim < 0 ? t.dim() + dim : dim) == size, "mapsurgery: ", name, " has shape ",
                  shape(t), ", but its dimension ", dim, " must be ", size, " (", of, ")");
}

inline void check_device(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(same_device(t, other), "mapsurgery: ", name, " is on ", device_name(t), ", but ", other_name,
                  " is on ", device_name(other));
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType dtype, const char* of) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "mapsurgery: ", name, " is ", toString(t.scalar_type()), ", but must be ",
                  toString(dtype), " (", of, ")");
}

inline void check_factors(const Tensor& A, const Tensor& B) {
  check_floating("A", A);
  check_dim("A", A, 2);
  check_dim("B", B, 2);
  check_dtype("B", B, A.scalar_type(), "the dtype of A");
  check_size("B", B, 1, A.size(0), "the rank, as rows of A");
  check_device("B", B, "A", A);
}

inline void check_scalar(const char* name, const Tensor& t, const Tensor& A) {
  check_floating(name, t);
  STD_TORCH_CHECK(t.numel() == 1, "mapsurgery: ", name, " must hold one number, got shape ", shape(t));
  check_device(name, t, "A", A);
}

inline void check_scalars(const Tensor& alpha, const Tensor& beta, const Tensor& weight_norm, const Tensor& A) {
  check_scalar("alpha", alpha, A);
  check_scalar("beta", beta, A);
  check_scalar("weight_norm", weight_norm, A);
}

// weight as the matrix (m, K) fits the factors.
inline void check_weight(const Tensor& weight, int64_t m, int64_t K, const Tensor& A, const Tensor& B) {
  check_floating("weight", weight);
  check_device("weight", weight, "A", A);
  check_size("A", A, 1, K, "the weight's columns");
  check_size("B", B, 0, m, "the weight's rows");
}

inline void check_matrix(const Tensor& weight, const Tensor& A, const Tensor& B) {
  check_dim("weight", weight, 2);
  check_weight(weight, weight.size(0), weight.size(1), A, B);
}

inline void check_saved(const Tensor& A, const Tensor& B, const Tensor& scales, const Tensor& gram_a,
                        const Tensor& gram_b) {
  check_factors(A, B);
  const ScalarType acc = accumulate_dtype(A.scalar_type());
  const char* of = "the dtype that A accumulates in";
  check_dtype("scales", scales, acc, of);
  check_dtype("gram_a", gram_a, acc, of);
  check_dtype("gram_b", gram_b, acc, of);
  STD_TORCH_CHECK(scales.dim() == 1 && scales.size(0) == NUM_SCALES && scales.is_contiguous(),
                  "mapsurgery: scales must be a contiguous tensor of shape (", NUM_SCALES, ",), got shape ",
                  shape(scales));
  for (auto [name, gram] : {std::pair{"gram_a", &gram_a}, std::pair{"gram_b", &gram_b}}) {
    check_dim(name, *gram, 2);
    check_size(name, *gram, 0, A.size(0), "the rank");
    check_size(name, *gram, 1, A.size(0), "the rank");
    check_device(name, *gram, "A", A);
  }
  check_device("scales", scales, "A", A);
}

inline void check_input(const Tensor& x, const Tensor& A) {
  check_floating("x", x);
  check_device("x", x, "A", A);
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t m, const Tensor& A) {
  if (!bias) return;
  check_floating("bias", *bias);
  check_dim("bias", *bias, 1);
  check_size("bias", *bias, 0, m, "the weight's rows");
  check_device("bias", *bias, "A", A);
}

inline void check_grad(const Tensor& grad, const Tensor& x) {
  check_dtype("grad", grad, x.scalar_type(), "the dtype of x");
  check_device("grad", grad, "x", x);
}

// An in-place result must not write one element twice.
inline void check_writable(const char* name, const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i) {
    STD_TORCH_CHECK(t.stride(i) != 0 || t.size(i) <= 1, "mapsurgery: ", name, " of shape ", shape(t),
                    " is expanded along dimension ", i, " and cannot be written in place");
  }
}

}  // namespace mapsurgery
