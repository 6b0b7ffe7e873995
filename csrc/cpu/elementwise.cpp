#include <algorithm>

#include "cpu/device.h"
#include "cpu/rows.h"
#include "ops/fingerprint.h"

namespace mapsurgery {
namespace {

constexpr int64_t kBuffer = 1024;  // numbers widened at a time; stays in the first-level cache
// Numbers per partial sum: fixed, so that a sum does not depend on the number of threads.
constexpr int64_t kPartial = 16 * kBuffer;
constexpr int64_t kGrain = 32 * kBuffer;

// Calls f(begin, count) for pieces of [0, n) of at most kBuffer numbers, in parallel.
template <class F>
void for_pieces(int64_t n, const F& f) {
  const int64_t pieces = (n + kBuffer - 1) / kBuffer;
  torch::stable::parallel_for(0, pieces, kGrain / kBuffer, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * kBuffer, std::min(kBuffer, n - i * kBuffer));
  });
}

// n numbers of src as acc_t: in place where they are that already, else in the buffer.
template <class acc_t, class T>
const acc_t* widened(const T* src, acc_t* buffer, int64_t n) {
  if constexpr (std::is_same_v<acc_t, T>) {
    return src;
  } else {
    load_row(buffer, src, 1, n);
    return buffer;
  }
}

// Replaces n numbers of row by f(numbers as acc_t).
template <class T, class F>
void update(T* row, int64_t n, const F& f) {
  using acc_t = accumulate_t<T>;
  if constexpr (std::is_same_v<acc_t, T>) {
    f(row);
  } else {
    acc_t buffer[kBuffer];
    load_row(buffer, row, 1, n);
    f(buffer);
    store_row(row, 1, buffer, n);
  }
}

template <class T, class U>
double dot_piece(const T* a, const U* b, int64_t n) {
  using acc_t = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<U, double>, double, float>;
  acc_t a_buffer[kBuffer], b_buffer[kBuffer];
  return dot_row(widened(a, a_buffer, n), widened(b, b_buffer, n), n);
}

template <class F>
double sum_pieces(int64_t n, const F& f) {
  std::vector<double> partial((n + kPartial - 1) / kPartial);
  torch::stable::parallel_for(0, partial.size(), kGrain / kPartial, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t stop = std::min(n, (i + 1) * kPartial);
      for (int64_t j = i * kPartial; j < stop; j += kBuffer) partial[i] += f(j, std::min(kBuffer, stop - j));
    }
  });
  double sum = 0;
  for (double p : partial) sum += p;
  return sum;
}

}  // namespace

Cpu::Sum Cpu::squared_norm(const Tensor& t) {
  return dispatch_floating(t.scalar_type(), [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(t.data_ptr());
    return sum_pieces(t.numel(), [&](int64_t i, int64_t n) {
      double buffer[kBuffer];
      const double* row = widened(data + i, buffer, n);
      return dot_row(row, row, n);
    });
  });
}

void Cpu::fingerprint(const Tensor& t, int64_t rows, int64_t columns, const double* weights, double* out) {
  std::fill(out, out + 1 + kSketch, 0.0);
  if (rows == 0 || columns == 0) return;
  // Rows per partial sum: fixed, so that a sum does not depend on the number of threads.
  const int64_t group = std::max<int64_t>(1, kPartial / columns), groups = (rows + group - 1) / group;
  std::vector<double> partial(groups * (1 + kSketch));
  dispatch_floating(t.scalar_type(), [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(t.data_ptr());
    const int64_t grain = std::max<int64_t>(1, kGrain / (group * columns));
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      double buffer[kBuffer];
      for (int64_t g = begin; g < end; ++g) {
        double* sums = &partial[g * (1 + kSketch)];
        for (int64_t i = g * group; i < std::min(rows, (g + 1) * group); ++i) {
          double of_row[kSketch] = {};
          for (int64_t j = 0; j < columns; j += kBuffer) {
            const int64_t n = std::min(kBuffer, columns - j);
            const double* row = widened(data + i * columns + j, buffer, n);
            sums[0] += dot_row(row, row, n);
            dot_row_by_8(of_row, row, weights + j, n);
          }
          for (int64_t s = 0; s < kSketch; ++s) sums[1 + s] += weight_at(i) * of_row[s];
        }
      }
    });
  });
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t s = 0; s < 1 + kSketch; ++s) out[s] += partial[g * (1 + kSketch) + s];
  }
}

Cpu::Sum Cpu::dot(const Tensor& a, const Tensor& b) {
  return dispatch_floating(a.scalar_type(), [&](auto a_type) {
    return dispatch_floating(b.scalar_type(), [&](auto b_type) {
      const auto* a_data = static_cast<const typename decltype(a_type)::type*>(a.data_ptr());
      const auto* b_data = static_cast<const typename decltype(b_type)::type*>(b.data_ptr());
      return sum_pieces(a.numel(), [&](int64_t i, int64_t n) { return dot_piece(a_data + i, b_data + i, n); });
    });
  });
}

Cpu::Sum Cpu::dot_and_combine_(const Tensor& a, Tensor& b, Scalar keep, const Tensor* other, Scalar s_d) {
  const double kept = read(keep), factor = read(s_d);
  return dispatch_floating(b.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using acc_t = accumulate_t<T>;
    const T* a_data = static_cast<const T*>(a.data_ptr());
    const T* other_data = other == nullptr ? nullptr : static_cast<const T*>(other->data_ptr());
    T* b_data = static_cast<T*>(b.data_ptr());
    return sum_pieces(b.numel(), [&](int64_t i, int64_t n) {
      acc_t a_buffer[kBuffer], other_buffer[kBuffer];
      const acc_t* a_row = widened(a_data + i, a_buffer, n);
      double sum = 0;
      update(b_data + i, n, [&](acc_t* b_row) {
        sum = dot_row<acc_t>(a_row, b_row, n);
        if (other_data == nullptr) {
          affine_row(b_row, static_cast<acc_t>(kept), acc_t(0), n);
        } else {
          combine_row(b_row, static_cast<acc_t>(kept), widened(other_data + i, other_buffer, n),
                      static_cast<acc_t>(factor), n);
        }
      });
      return sum;
    });
  });
}

void Cpu::scale_and_bias_(Tensor& t, Scalar scale, const std::optional<Tensor>& bias, int64_t channel_stride) {
  const double factor = read(scale);
  if (factor == 1 && !bias) return;
  dispatch_floating(t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using acc_t = accumulate_t<T>;
    T* data = static_cast<T*>(t.data_ptr());
    const acc_t s = static_cast<acc_t>(factor);
    if (!bias) {
      for_pieces(t.numel(), [&](int64_t i, int64_t n) {
        update(data + i, n, [&](acc_t* row) { affine_row(row, s, acc_t(0), n); });
      });
      return;
    }
    // Runs of numbers that share one bias (channels outer) or take the biases in turn (channels inner).
    const int64_t channels = bias->size(0);
    const Tensor wide = cast(*bias, accumulate_dtype(t.scalar_type()));
    const acc_t* shift = static_cast<const acc_t*>(wide.data_ptr());
    const int64_t run = channel_stride == 1 ? channels : channel_stride;
    const int64_t runs = run > 0 ? t.numel() / run : 0;
    torch::stable::parallel_for(0, runs, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, run)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t r = begin; r < end; ++r) {
                                    for (int64_t i = 0; i < run; i += kBuffer) {
                                      const int64_t n = std::min(kBuffer, run - i);
                                      update(data + r * run + i, n, [&](acc_t* row) {
                                        if (channel_stride == 1) {
                                          affine_row(row, s, shift + i, n);
                                        } else {
                                          affine_row(row, s, shift[r % channels], n);
                                        }
                                      });
                                    }
                                  }
                                });
  });
}

}  // namespace mapsurgery
