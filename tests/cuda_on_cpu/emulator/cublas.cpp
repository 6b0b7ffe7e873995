// The products of cuBLAS by plain loops. Arguments that the real one refuses are refused; its handle is torch's, and
// the library has to leave it as it was.
#include <cublas_v2.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "emulator.h"

struct EmulatedBlas {
  cublasPointerMode_t pointers = CUBLAS_POINTER_MODE_HOST;
  cublasMath_t math = CUBLAS_DEFAULT_MATH;
};

namespace emulated {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

EmulatedBlas& blas() {
  static EmulatedBlas one;
  return one;
}

struct Matrix {
  const void* data;
  cudaDataType type;
  int64_t leading;
  long long stride;
};

// C = alpha op(A) op(B) + beta C, by columns.
template <class T, class acc_t>
void multiply(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, acc_t alpha, const T* A, int64_t lda,
              const T* B, int64_t ldb, acc_t beta, T* C, int64_t ldc) {
  std::vector<acc_t> column(m);
  for (int64_t j = 0; j < n; ++j) {
    std::fill(column.begin(), column.end(), acc_t(0));
    for (int64_t l = 0; l < k; ++l) {
      const acc_t b = static_cast<acc_t>(transpose_b ? B[j + l * ldb] : B[l + j * ldb]);
      const T* a = transpose_a ? A + l : A + l * lda;
      const int64_t step = transpose_a ? lda : 1;
      for (int64_t i = 0; i < m; ++i) column[i] += static_cast<acc_t>(a[i * step]) * b;
    }
    for (int64_t i = 0; i < m; ++i) {
      T& c = C[i + j * ldc];
      // As BLAS: what is multiplied by 0 is not read.
      c = static_cast<T>(alpha * column[i] + (beta == acc_t(0) ? acc_t(0) : beta * static_cast<acc_t>(c)));
    }
  }
}

cublasStatus_t gemm(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int64_t m, int64_t n,
                    int64_t k, const void* alpha, const Matrix& A, const Matrix& B, const void* beta, const Matrix& C,
                    int64_t batch, cublasComputeType_t compute) {
  if (handle->pointers != CUBLAS_POINTER_MODE_DEVICE) {
    throw std::runtime_error(
        "emulated cuBLAS: the factors lie on the device, but the pointer mode is that of the host");
  }
  const bool half = A.type == CUDA_R_16F || A.type == CUDA_R_16BF;
  if (half && (handle->math & CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION) == 0) {
    throw std::runtime_error("emulated cuBLAS: the product may add up in half precision, whatever torch allows");
  }
  const auto leads = [](int64_t leading, int64_t rows) { return leading >= std::max<int64_t>(1, rows); };
  if (m < 0 || n < 0 || k < 0 || batch < 0 || !leads(A.leading, transa == CUBLAS_OP_N ? m : k) ||
      !leads(B.leading, transb == CUBLAS_OP_N ? k : n) || !leads(C.leading, m)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const bool wide = compute == CUBLAS_COMPUTE_64F || compute == CUBLAS_COMPUTE_64F_PEDANTIC;
  if (A.type != B.type || A.type != C.type || (A.type == CUDA_R_64F) != wide) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (k == 0) return CUBLAS_STATUS_SUCCESS;  // a trap of the real one: C is not scaled either
  const auto run = [&](auto type, auto acc) {
    using T = decltype(type);
    using acc_t = decltype(acc);
    for (int64_t i = 0; i < batch; ++i) {
      multiply<T, acc_t>(transa != CUBLAS_OP_N, transb != CUBLAS_OP_N, m, n, k, *static_cast<const acc_t*>(alpha),
                         static_cast<const T*>(A.data) + i * A.stride, A.leading,
                         static_cast<const T*>(B.data) + i * B.stride, B.leading, *static_cast<const acc_t*>(beta),
                         static_cast<T*>(const_cast<void*>(C.data)) + i * C.stride, C.leading);
    }
  };
  switch (A.type) {
    case CUDA_R_32F:
      run(float(), float());
      break;
    case CUDA_R_64F:
      run(double(), double());
      break;
    case CUDA_R_16F:
      run(Half(), float());
      break;
    case CUDA_R_16BF:
      run(BFloat16(), float());
      break;
  }
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

void check_blas_handle() {
  if (blas().pointers != CUBLAS_POINTER_MODE_HOST || blas().math != CUBLAS_DEFAULT_MATH) {
    throw std::runtime_error("emulated cuBLAS: the modes of torch's handle were not restored");
  }
}

AOTITorchError blas_handle(void** handle) {
  check_blas_handle();
  *handle = &blas();
  return 0;
}

}  // namespace emulated

extern "C" {

const char* cublasGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_NOT_SUPPORTED";
}

cublasStatus_t cublasGetPointerMode(cublasHandle_t handle, cublasPointerMode_t* mode) {
  *mode = handle->pointers;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode(cublasHandle_t handle, cublasPointerMode_t mode) {
  handle->pointers = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
  *mode = handle->math;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  handle->math = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx_64(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int64_t m,
                               int64_t n, int64_t k, const void* alpha, const void* A, cudaDataType Atype, int64_t lda,
                               const void* B, cudaDataType Btype, int64_t ldb, const void* beta, void* C,
                               cudaDataType Ctype, int64_t ldc, cublasComputeType_t computeType, cublasGemmAlgo_t) {
  emulated::count("cublasGemmEx");
  return emulated::gemm(handle, transa, transb, m, n, k, alpha, {A, Atype, lda, 0}, {B, Btype, ldb, 0}, beta,
                        {C, Ctype, ldc, 0}, 1, computeType);
}

cublasStatus_t cublasGemmStridedBatchedEx_64(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                             int64_t m, int64_t n, int64_t k, const void* alpha, const void* A,
                                             cudaDataType Atype, int64_t lda, long long int strideA, const void* B,
                                             cudaDataType Btype, int64_t ldb, long long int strideB, const void* beta,
                                             void* C, cudaDataType Ctype, int64_t ldc, long long int strideC,
                                             int64_t batchCount, cublasComputeType_t computeType, cublasGemmAlgo_t) {
  emulated::count("cublasGemmStridedBatchedEx");
  return emulated::gemm(handle, transa, transb, m, n, k, alpha, {A, Atype, lda, strideA}, {B, Btype, ldb, strideB},
                        beta, {C, Ctype, ldc, strideC}, batchCount, computeType);
}
}
