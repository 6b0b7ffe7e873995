#include "cpu/device.h"

namespace mapsurgery {
namespace {

Tensor number(double value, ScalarType dtype, const Tensor& like) {
  Tensor result = empty({1}, dtype, like);
  dispatch_accumulate(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    *static_cast<T*>(result.data_ptr()) = static_cast<T>(value);
  });
  return result;
}

}  // namespace

Gradients Cpu::gradients(const Products<Sum>& products, const Tensor& A, const Tensor& B, Scalar s_d,
                         const Norm& norm) {
  const ScalarType acc = accumulate_dtype(A.scalar_type());
  const auto slope = [&](Slope which) { return norm.empty() ? 1 : read(norm[0], which); };
  Gradients grads;
  if (products.with_x) grads.s_w = number(*products.with_x * slope(SLOPE_ALPHA), acc, A);
  if (!products.with_h) return grads;
  const double c = *products.with_h;
  grads.s_d = number(c * slope(SLOPE_BETA), acc, A);
  if (norm.empty()) {
    grads.A = scaled(products.dA, *s_d, A.scalar_type());
    grads.B = scaled(products.dB, *s_d, B.scalar_type());
    return grads;
  }
  const auto tangent = [&](const Tensor& grad, const Tensor& left, const Tensor& right, double unit) {
    const double radial = dispatch_accumulate(acc, [&](auto type) {
      return static_cast<double>(
          radial_of<typename decltype(type)::type>(c, slope(SLOPE_UPDATE), slope(SLOPE_NORM), unit));
    });
    Tensor out = empty({left.size(0), right.size(1)}, acc, A);
    const bool defined = grad.defined();
    blas(out, defined ? cast(grad, acc) : out, left, right, defined ? read(s_d) : 0, -radial);
    return cast(out, A.scalar_type());
  };
  const auto in_unit = [&](const Tensor& factor, double unit) {
    return unit == 1 ? cast(factor, acc) : scaled(factor, number(1 / unit, acc, A), acc);
  };
  const double unit_a = slope(SLOPE_UNIT_A), unit_b = slope(SLOPE_UNIT_B);
  grads.A = tangent(products.dA, norm[2], in_unit(A, unit_a), unit_a);
  grads.B = tangent(products.dB, in_unit(B, unit_b), norm[1], unit_b);
  return grads;
}

}  // namespace mapsurgery
