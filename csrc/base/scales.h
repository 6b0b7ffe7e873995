// What map_scales computes of the norm, as mapsurgery/ops/operators.py defines them; the same code on CPU and GPU.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MAPSURGERY_HOST_DEVICE __host__ __device__
#else
#define MAPSURGERY_HOST_DEVICE
#endif

namespace mapsurgery {

// What the r x r contraction leaves: ||BA||_F^2 and tr(A A^T) + tr(B^T B).
struct GramSums {
  double square;
  double trace;
};

// Places in `slopes`: d s_w / d alpha, d s_d / d beta, and s_d / p^2, the factor of the norm's own gradient.
enum Slope { SLOPE_ALPHA, SLOPE_BETA, SLOPE_RADIAL, NUM_SLOPES };

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
MAPSURGERY_HOST_DEVICE void compute_scales(GramSums sums, double alpha, double beta, double weight_norm, double tau,
                                           bool relative, ScalesOut<acc_t> out) {
  const double norm = norm_of<acc_t>(sums.square);
  const double w = weight_norm == 0 ? 1 : weight_norm;
  double p = tau * w;
  if (norm != 0) {
    const double ratio = tau * w / norm;
    p = norm * sqrt(1 + ratio * ratio);
  }
  // BA = 0 and tau = 0: a number of the factors' own size, so that the start B = 0 has a finite gradient.
  if (p == 0) p = sums.trace <= 0 ? 0 : sqrt(sums.trace);
  const double inverse = p == 0 ? 0 : 1 / p;
  const double ds_d = (relative ? w : 1) * inverse;
  const double s_d = beta * ds_d;
  *out.s_w = static_cast<acc_t>(1 + (relative ? alpha : alpha / w));
  *out.s_d = static_cast<acc_t>(s_d);
  out.slopes[SLOPE_ALPHA] = static_cast<acc_t>(relative ? 1 : 1 / w);
  out.slopes[SLOPE_BETA] = static_cast<acc_t>(ds_d);
  out.slopes[SLOPE_RADIAL] = static_cast<acc_t>(s_d * inverse * inverse);
}

}  // namespace mapsurgery
