// Matrix products whose factors stay on the GPU: out = keep out + factor a b in one pass over out, as torch's own
// products cannot do without the host knowing the factors.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>

#include "cuda/device.h"

#ifdef MAPSURGERY_CUBLAS
#include <cublas_v2.h>

namespace mapsurgery {
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

// A scalar where and in the dtype that cuBLAS reads it.
class Factor {
 public:
  Factor(Scalar scalar, ScalarType dtype)
      : numbers_(scalar == nullptr ? std::nullopt : std::optional(cast(*scalar, dtype))),
        data_(scalar == nullptr ? Cuda::one(dtype) : numbers_->data_ptr()) {}
  const void* data() const { return data_; }

 private:
  std::optional<Tensor> numbers_;
  const void* data_;
};

// out = keep out + factor a b; out, a, b: (N, rows, columns); out is dense by rows or by columns. a has columns: for
// products of nothing cuBLAS may leave out as it is.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, Scalar keep, Scalar factor) {
  if (out.numel() == 0 || a.size(2) == 0) return;
  if (!Operand::by_rows(out)) {  // out^T = b^T a^T
    const auto flipped = [](const Tensor& t) {
      return view(t, {t.size(0), t.size(2), t.size(1)}, {t.stride(0), t.stride(2), t.stride(1)});
    };
    STD_TORCH_CHECK(Operand::by_columns(out), "mapsurgery: a product can be added to a dense matrix only");
    multiply(flipped(out), flipped(b), flipped(a), keep, factor);
    return;
  }
  const Operand left(a), right(b), result(out);
  const ScalarType dtype = out.scalar_type();
  const bool wide = dtype == ScalarType::Double;
  const Factor first(factor, accumulate_dtype(dtype)), second(keep, accumulate_dtype(dtype));
  const void *alpha = first.data(), *beta = second.data();
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

void Cuda::accumulate_mm_(Tensor& out, const Tensor& a, const Tensor& b, Scalar keep, Scalar factor) {
  multiply(as_batch(out), as_batch(a), as_batch(b), keep, factor);
}

void Cuda::accumulate_bmm_(Tensor& out, const Tensor& a, const Tensor& b, Scalar keep, Scalar factor) {
  multiply(out, a, b, keep, factor);
}

}  // namespace mapsurgery

#else  // without cuBLAS' headers Cuda::takes_scalars is false, and nobody calls

namespace mapsurgery {

void Cuda::accumulate_mm_(Tensor&, const Tensor&, const Tensor&, Scalar, Scalar) {
  STD_TORCH_CHECK(false, "mapsurgery: built without cuBLAS");
}

void Cuda::accumulate_bmm_(Tensor&, const Tensor&, const Tensor&, Scalar, Scalar) {
  STD_TORCH_CHECK(false, "mapsurgery: built without cuBLAS");
}

}  // namespace mapsurgery
#endif
