// Matrix products whose factors stay on the GPU: out = keep out + factor a b in one pass over out, as torch's own
// products cannot do without the host knowing the factors.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <array>

#include "cuda/device.h"

#ifdef MAPSURGERY_CUBLAS
#include <cublas_v2.h>
#endif

namespace mapsurgery {

#ifdef MAPSURGERY_CUBLAS
namespace {

void check(cublasStatus_t status) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "mapsurgery: cuBLAS: ", cublasGetStatusString(status));
}

// torch's own handle: its stream, workspace and math mode (TF32) are set. Reads factors from the device meanwhile.
class Handle {
 public:
  Handle() {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    handle_ = static_cast<cublasHandle_t>(handle);
    check(cublasGetPointerMode(handle_, &before_));
    check(cublasSetPointerMode(handle_, CUBLAS_POINTER_MODE_DEVICE));
  }
  ~Handle() { cublasSetPointerMode(handle_, before_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  operator cublasHandle_t() const { return handle_; }

 private:
  cublasHandle_t handle_ = nullptr;
  cublasPointerMode_t before_ = CUBLAS_POINTER_MODE_HOST;
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

// A matrix as cuBLAS takes it: by columns `leading` apart, as it is or transposed.
struct Operand {
  Tensor matrix;
  cublasOperation_t operation;
  int64_t leading, batch_stride;

  // Row-major memory of (rows, columns) is column-major memory of its transpose, and it is the transpose of the whole
  // product that is computed: out^T = b^T a^T.
  static bool by_rows(const Tensor& t) { return t.stride(2) == 1 && t.stride(1) >= std::max<int64_t>(1, t.size(2)); }
  static bool by_columns(const Tensor& t) { return t.stride(1) == 1 && t.stride(2) >= std::max<int64_t>(1, t.size(1)); }

  explicit Operand(const Tensor& t) : matrix(by_rows(t) || by_columns(t) ? t : torch::stable::contiguous(t)) {
    const bool rows = by_rows(matrix);
    operation = rows ? CUBLAS_OP_N : CUBLAS_OP_T;
    leading = std::max<int64_t>(1, matrix.stride(rows ? 1 : 2));
    batch_stride = matrix.stride(0);
  }
};

Tensor as_batch(const Tensor& t) { return view(t, {1, t.size(0), t.size(1)}, {0, t.stride(0), t.stride(1)}); }

// out, a, b: (N, rows, columns); out is dense by rows or by columns.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& scales, ScaleIndex keep,
              ScaleIndex factor) {
  if (out.numel() == 0) return;
  if (!Operand::by_rows(out)) {  // out^T = b^T a^T
    const auto flipped = [](const Tensor& t) {
      return view(t, {t.size(0), t.size(2), t.size(1)}, {t.stride(0), t.stride(2), t.stride(1)});
    };
    STD_TORCH_CHECK(Operand::by_columns(out), "mapsurgery: a product can be added to a dense matrix only");
    multiply(flipped(out), flipped(b), flipped(a), scales, keep, factor);
    return;
  }
  const Operand left(a), right(b);
  const bool wide = out.scalar_type() == ScalarType::Double;
  const Tensor factors = cast(scales, wide ? ScalarType::Double : ScalarType::Float);
  const char* numbers = static_cast<const char*>(factors.data_ptr());
  const size_t step = wide ? sizeof(double) : sizeof(float);
  const cudaDataType_t type = data_type(out.scalar_type());
  const Handle handle;
  check(cublasGemmStridedBatchedEx_64(
      handle, right.operation, left.operation, out.size(2), out.size(1), a.size(2), numbers + factor * step,
      right.matrix.data_ptr(), type, right.leading, right.batch_stride, left.matrix.data_ptr(), type, left.leading,
      left.batch_stride, numbers + keep * step, out.data_ptr(), type, out.stride(1), out.stride(0), out.size(0),
      wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
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
namespace {

// out = scales[index] out, for a view of any strides.
void multiply_by(const Tensor& out, const Tensor& scales, ScaleIndex index) {
  if (index == ONE) return;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(out),
                                    torch::stable::detail::from(view(scales, {}, {}, index))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
}

}  // namespace

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
