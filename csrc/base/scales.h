// What map_scales computes of the norm, as mapsurgery/ops/operators.py defines them; the same code on CPU and GPU.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define MAPSURGERY_HOST_DEVICE __host__ __device__
#else
#define MAPSURGERY_HOST_DEVICE
#endif

namespace mapsurgery {

// What the r x r contraction leaves: ||BA||_F^2, tr(A A^T) and tr(B^T B).
struct GramSums {
  double square, trace_a, trace_b;
};

// What the factors are measured in: A = a A' and B = b B'. All sums and Gram matrices are those of A' and B', so that
// none of them leaves the range of the dtype. 1 where the factors' own squares do not.
struct Units {
  double a, b;
};

// Whether a Gram matrix of this trace has its digits: nothing has overflowed, nor vanished beside it.
MAPSURGERY_HOST_DEVICE inline bool has_digits(double trace) { return trace >= 0x1p-80 && trace <= 0x1p100; }

// The unit of a factor with this trace: its length.
template <class acc_t>
MAPSURGERY_HOST_DEVICE double unit_of(double trace) {
  if (trace == 0 || has_digits(trace)) return 1;
  constexpr double smallest = std::numeric_limits<acc_t>::min();
  const double length = sqrt(trace);
  return length < smallest ? smallest : length;  // 1 / unit is a number, too
}

// Places in `slopes`: d s_w / d alpha, d s_d / d beta, and of what the norm's own gradient is made: s_d, the norm
// p and both units.
enum Slope { SLOPE_ALPHA, SLOPE_BETA, SLOPE_UPDATE, SLOPE_NORM, SLOPE_UNIT_A, SLOPE_UNIT_B, NUM_SLOPES };

// Where the results are written.
template <class acc_t>
struct ScalesOut {
  acc_t *s_w, *s_d, *slopes;
};

// ||BA||_F in the precision that the operators return. Rounding may leave a square below 0.
// Comparisons here are written so that NaN passes through: training that diverged has to be seen.
template <class acc_t>
MAPSURGERY_HOST_DEVICE acc_t norm_of(double square) {
  return square <= 0 ? acc_t(0) : static_cast<acc_t>(sqrt(square));
}

template <class acc_t>
MAPSURGERY_HOST_DEVICE void compute_scales(GramSums sums, Units units, double alpha, double beta, double weight_norm,
                                           double tau, bool relative, ScalesOut<acc_t> out) {
  const double norm = norm_of<acc_t>(sums.square);
  const double w = weight_norm == 0 ? 1 : weight_norm;
  const double unit_w = w / units.a / units.b;
  double p = tau * unit_w;
  if (norm != 0) {
    const double ratio = p / norm;
    p = norm * sqrt(1 + ratio * ratio);
  }
  // BA = 0 and tau = 0: a number of the factors' own size, so that the start B = 0 has a finite gradient.
  if (p == 0) {
    const double a = sqrt(sums.trace_a) / units.b, b = sqrt(sums.trace_b) / units.a;
    p = sums.trace_a + sums.trace_b <= 0 ? 0 : sqrt(a * a + b * b);
  }
  const double inverse = p == 0 ? 0 : (relative ? unit_w : 1 / units.a / units.b) / p;
  // Too small for the dtype: that has to be seen, W' would silently be the base.
  constexpr double smallest = std::numeric_limits<acc_t>::min();
  const double s_d = p != 0 && !(inverse >= smallest) ? nan("") : beta * inverse;
  *out.s_w = static_cast<acc_t>(1 + (relative ? alpha : alpha / w));
  *out.s_d = static_cast<acc_t>(s_d);
  out.slopes[SLOPE_ALPHA] = static_cast<acc_t>(relative ? 1 : 1 / w);
  out.slopes[SLOPE_BETA] = static_cast<acc_t>(inverse);
  out.slopes[SLOPE_UPDATE] = static_cast<acc_t>(s_d);
  out.slopes[SLOPE_NORM] = static_cast<acc_t>(p);
  out.slopes[SLOPE_UNIT_A] = static_cast<acc_t>(units.a);
  out.slopes[SLOPE_UNIT_B] = static_cast<acc_t>(units.b);
}

// What the norm adds to the gradients, -(c s_d / p^2) (B^T B) A and -(c s_d / p^2) B (A A^T) with c = <dL/dW', BA>, is
// -radial (gram_b A'), with `radial` of A = unit A', and likewise of B.
template <class acc_t>
MAPSURGERY_HOST_DEVICE acc_t radial_of(double c, double s_d, double p, double unit) {
  return p == 0 ? acc_t(0) : static_cast<acc_t>(c / p * s_d / p / unit);
}

}  // namespace mapsurgery
