// Checks of the operators' arguments; every message names the offender.
#pragma once

#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "base/scales.h"
#include "base/tensor.h"

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

// Of what map_scales returns, or gradients of it.
inline void check_accumulated(const char* name, const Tensor& t, const Tensor& A) {
  check_dtype(name, t, accumulate_dtype(A.scalar_type()), "the dtype that A accumulates in");
  check_device(name, t, "A", A);
}

inline void check_scales(const Tensor& s_w, const Tensor& s_d, const Tensor& A) {
  for (auto [name, scalar] : {std::pair{"s_w", &s_w}, std::pair{"s_d", &s_d}}) {
    check_accumulated(name, *scalar, A);
    check_scalar(name, *scalar, A);
  }
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

// slopes, gram_a and gram_b of map_scales.
inline void check_norm(const std::vector<Tensor>& norm, const Tensor& A) {
  if (norm.empty()) return;
  STD_TORCH_CHECK(norm.size() == 3, "mapsurgery: norm must be slopes, gram_a and gram_b of map_scales, or empty; got ",
                  norm.size(), " tensors");
  const char* names[] = {"slopes", "gram_a", "gram_b"};
  for (int i = 0; i < 3; ++i) {
    check_accumulated(names[i], norm[i], A);
    check_dim(names[i], norm[i], i == 0 ? 1 : 2);
    for (int64_t j = 0; j < norm[i].dim(); ++j) {
      check_size(names[i], norm[i], j, i == 0 ? int64_t(NUM_SLOPES) : A.size(0), i == 0 ? "its numbers" : "the rank");
    }
  }
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
