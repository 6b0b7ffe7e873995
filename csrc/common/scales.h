// The scalars of one adapted layer, as mapsurgery/ops/reference.py defines them; the same code on CPU and GPU.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MAPSURGERY_HOST_DEVICE __host__ __device__
#else
#define MAPSURGERY_HOST_DEVICE
#endif

namespace mapsurgery {

// Places in the tensor `scales`.
enum ScaleIndex { S_W, S_D, DS_W, DS_D, RADIAL, NORM, ONE, NUM_SCALES };

// What the r x r contraction leaves: ||BA||_F^2 and tr(A A^T) + tr(B^T B).
struct GramSums {
  double square;
  double trace;
};

// ||BA||_F in the precision that the operators return. Rounding may leave a square below 0.
// Comparisons here are written so that NaN passes through: training that diverged has to be seen.
template <class acc_t>
MAPSURGERY_HOST_DEVICE acc_t norm_of(double square) {
  return square <= 0 ? acc_t(0) : static_cast<acc_t>(sqrt(square));
}

template <class acc_t>
MAPSURGERY_HOST_DEVICE void compute_scales(GramSums sums, double alpha, double beta, double weight_norm, double tau,
                                           bool relative, acc_t* scales) {
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
  const double u_w = relative ? 1 : 1 / w;
  const double ds_d = (relative ? w : 1) * inverse;
  const double s_d = beta * ds_d;
  // A division, not a product with u_w: alpha = w then gives exactly 1, and the start is the base bit for bit.
  scales[S_W] = static_cast<acc_t>(relative ? alpha : alpha / w);
  scales[S_D] = static_cast<acc_t>(s_d);
  scales[DS_W] = static_cast<acc_t>(u_w);
  scales[DS_D] = static_cast<acc_t>(ds_d);
  scales[RADIAL] = static_cast<acc_t>(s_d * inverse * inverse);
  scales[NORM] = static_cast<acc_t>(p);
  scales[ONE] = acc_t(1);  // for products whose factors have to lie on the device
}

}  // namespace mapsurgery
