// Matrix products whose factors stay on the GPU: out = keep out + factor a b in one pass over out, as torch's own
// products cannot do without the host knowing the factors.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>

#include "cuda/device.h"

#ifdef MAPSURGERY_CUBLAS
#include <cublas_v2.h>
#endif

namespace mapsurgery {
namespace {

// out = scales[index] out, for a view of any strides.
void multiply_by(Tensor out, const Tensor& scales, ScaleIndex index) {
  if (index == ONE || out.numel() == 0) return;
  if (out.is_contiguous()) return Cuda::scale_(out, {scales, index});
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out.get(), Cuda::scaled(out, {scales, index}).get(), 0));
}

}  // namespace

#ifdef MAPSURGERY_CUBLAS
namespace {

void check(cublasStatus_t status) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "mapsurgery: cuBLAS: ", cublasGetStatusString(status));
}

// torch's own handle: its stream, workspace and math mode (TF32) are set. Meanwhile it reads factors from the device,
// and never adds up in half precision: torch may allow that, but its switch cannot be read from here.
class Handle {
 public:
  explicit Handle(bool half) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    handle_ = static_cast<cublasHandle_t>(handle);
    check(cublasGetPointerMode(handle_, &pointers_));
    check(cublasGetMathMode(handle_, &math_));
    if (half) {
      check(cublasSetMathMode(handle_,
                              static_cast<cublasMath_t>(math_ | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
    }
    check(cublasSetPointerMode(handle_, CUBLAS_POINTER_MODE_DEVICE));  // last: torch itself passes host pointers
  }
  ~Handle() {
    cublasSetMathMode(handle_, math_);
    cublasSetPointerMode(handle_, pointers_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  operator cublasHandle_t() const { return handle_; }

 private:
  cublasHandle_t handle_ = nullptr;
  cublasPointerMode_t pointers_ = CUBLAS_POINTER_MODE_HOST;
  cublasMath_t math_ = CUBLAS_DEFAULT_MATH;
};

cudaDataType_t data_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return CUDA_R_64F;
    case ScalarType::BFloat16:
      return CUDA_R_16BF;
    case ScalarType::Half:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// A matrix of a batch as cuBLAS takes it: by columns `leading` apart, as it is or transposed.
struct Operand {
  Tensor matrix;
  cublasOperation_t operation;
  int64_t leading, batch_stride;

  // Row-major memory of (rows, columns) is column-major memory of its transpose, and it is the transpose of the whole
  // product that is computed: out^T = b^T a^T.
  static bool by_rows(const Tensor& t) { return is_dense(t, 1, 2); }
  static bool by_columns(const Tensor& t) { return is_dense(t, 2, 1); }

  explicit Operand(const Tensor& t) : matrix(by_rows(t) || by_columns(t) ? t : torch::stable::contiguous(t)) {
    const bool rows = by_rows(matrix);
    const int64_t outer = rows ? 1 : 2, inner = rows ? 2 : 1;
    operation = rows ? CUBLAS_OP_N : CUBLAS_OP_T;
    leading = matrix.size(outer) > 1 ? matrix.stride(outer) : std::max<int64_t>(1, matrix.size(inner));
    batch_stride = matrix.stride(0);
  }

 private:
  // A dimension of one entry may have any stride: it says nothing, and cuBLAS must not see it.
  static bool is_dense(const Tensor& t, int64_t outer, int64_t inner) {
    return (t.size(inner) <= 1 || t.stride(inner) == 1) &&
           (t.size(outer) <= 1 || t.stride(outer) >= std::max<int64_t>(1, t.size(inner)));
  }
};

Tensor as_batch(const Tensor& t) { return view(t, {1, t.size(0), t.size(1)}, {0, t.stride(0), t.stride(1)}); }

// out, a, b: (N, rows, columns); out is dense by rows or by columns.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep,
              ScaleIndex factor) {
  if (out.numel() == 0) return;
  if (a.size(2) == 0) return multiply_by(out, scales, keep);  // cuBLAS may leave out as it is
  if (!Operand::by_rows(out)) {                               // out^T = b^T a^T
    const auto flipped = [](const Tensor& t) {
      return view(t, {t.size(0), t.size(2), t.size(1)}, {t.stride(0), t.stride(2), t.stride(1)});
    };
    STD_TORCH_CHECK(Operand::by_columns(out), "mapsurgery: a product can be added to a dense matrix only");
    multiply(flipped(out), flipped(b), flipped(a), scales, keep, factor);
    return;
  }
  const Operand left(a), right(b), result(out);
  const ScalarType dtype = out.scalar_type();
  const bool wide = dtype == ScalarType::Double;
  const Tensor factors = cast(scales, wide ? ScalarType::Double : ScalarType::Float);
  const size_t step = wide ? sizeof(double) : sizeof(float);
  const char* numbers = static_cast<const char*>(factors.data_ptr());
  const char *alpha = numbers + factor * step, *beta = numbers + keep * step;
  const cudaDataType_t type = data_type(dtype);
  const cublasComputeType_t compute = wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
  const int64_t N = out.size(0), rows = out.size(1), columns = out.size(2), inner = a.size(2);
  const Handle handle(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half);
  if (N == 1) {  // as torch's own products of two matrices
    check(cublasGemmEx_64(handle, right.operation, left.operation, columns, rows, inner, alpha, right.matrix.data_ptr(),
                          type, right.leading, left.matrix.data_ptr(), type, left.leading, beta, out.data_ptr(), type,
                          result.leading, compute, CUBLAS_GEMM_DEFAULT));
    return;
  }
  check(cublasGemmStridedBatchedEx_64(
      handle, right.operation, left.operation, columns, rows, inner, alpha, right.matrix.data_ptr(), type,
      right.leading, right.batch_stride, left.matrix.data_ptr(), type, left.leading, left.batch_stride, beta,
      out.data_ptr(), type, result.leading, result.batch_stride, N, compute, CUBLAS_GEMM_DEFAULT));
}

}  // namespace

void Cuda::gemm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep,
                 ScaleIndex factor) {
  multiply(as_batch(out), as_batch(a), as_batch(b), scales, keep, factor);
}

void Cuda::accumulate_bmm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep) {
  multiply(out, a, b, scales, keep, S_D);
}

#else  // built without cuBLAS' headers: the factors go into passes of their own

void Cuda::gemm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep,
                 ScaleIndex factor) {
  multiply_by(out, scales, keep);
  addmm(out, out, scaled(a, {scales, factor}), b, 1, 1);
}

void Cuda::accumulate_bmm_(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep) {
  multiply_by(out, scales, keep);
  baddbmm_(out, scaled(a, {scales, S_D}), b, 1, 1);
}

#endif

}  // namespace mapsurgery
