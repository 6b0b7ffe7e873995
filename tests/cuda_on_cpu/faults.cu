// Kernels and calls with faults that the emulator has to catch, each beside one without; see test_cuda_on_cpu.py. They
// are built with the emulator, never with the library.
#include <cublas_v2.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace {

using mapsurgery::launch;

constexpr int kThreads = 64;

template <bool with_barrier>
__global__ void reverse_kernel(float* numbers) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = numbers[threadIdx.x];
  if (with_barrier) __syncthreads();
  numbers[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// Whether each number is that of its place from behind.
template <bool with_barrier>
void reverse() {
  std::vector<float> numbers(kThreads);
  for (int i = 0; i < kThreads; ++i) numbers[i] = static_cast<float>(i);
  launch<reverse_kernel<with_barrier>>(1, kThreads, nullptr, numbers.data());
  for (int i = 0; i < kThreads; ++i) {
    if (numbers[i] != static_cast<float>(kThreads - 1 - i)) {
      throw std::runtime_error("number " + std::to_string(i) + " is " + std::to_string(numbers[i]));
    }
  }
}

__global__ void leaving_kernel(unsigned leave) {
  if (threadIdx.x < leave) return;
  __syncthreads();
}

__global__ void parting_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Each block counts on from what the one before it wrote.
__global__ void chain_kernel(int* numbers) {
  if (threadIdx.x == 0) numbers[blockIdx.x] = blockIdx.x == 0 ? 1 : numbers[blockIdx.x - 1] + 1;
}

void chain() {
  std::vector<int> numbers(5);
  launch<chain_kernel>(5, kThreads, nullptr, numbers.data());
  if (numbers.back() != 5) throw std::runtime_error("the last of the blocks counted " + std::to_string(numbers.back()));
}

__global__ void index_kernel(int past_the_end) {
  __shared__ float shared[kThreads];
  float* const numbers = shared;
  numbers[threadIdx.x + past_the_end] = 0;
}

struct Large {
  char bytes[4097];
};
__global__ void large_kernel(Large) {}

class Product {
 public:
  explicit Product(bool restore = true, cublasPointerMode_t mode = CUBLAS_POINTER_MODE_DEVICE) : restore_(restore) {
    void* handle = nullptr;
    emulated::blas_handle(&handle);
    handle_ = static_cast<cublasHandle_t>(handle);
    cublasSetPointerMode(handle_, mode);
  }
  ~Product() {
    if (restore_) restore();
  }
  void restore() { cublasSetPointerMode(handle_, CUBLAS_POINTER_MODE_HOST); }

  // 2 x k by k x 2 ones; the top left number of C, which was 1.
  float of_ones(int64_t k, int64_t leading = 2, cudaDataType_t type = CUDA_R_32F) {
    const std::vector<float> a(64, 1), b(64, 1);
    std::vector<float> c(4, 1);
    const float alpha = 1, beta = 2;
    const cublasStatus_t status =
        cublasGemmEx_64(handle_, CUBLAS_OP_N, CUBLAS_OP_T, 2, 2, k, &alpha, a.data(), type, leading, b.data(), type, 2,
                        &beta, c.data(), type, 2, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS) throw std::runtime_error(cublasGetStatusString(status));
    return c[0];
  }

 private:
  bool restore_;
  cublasHandle_t handle_;
};

void expect(float got, float want) {
  if (got != want) throw std::runtime_error("got " + std::to_string(got) + ", not " + std::to_string(want));
}

void unrestored_modes() {
  Product product(false);
  try {
    Product next;
  } catch (...) {
    product.restore();
    throw;
  }
  product.restore();
}

void run(const std::string& name) {
  if (name == "barrier") return reverse<true>();
  if (name == "missing barrier") return reverse<false>();
  if (name == "all wait") return launch<leaving_kernel>(1, kThreads, nullptr, 0);
  if (name == "some leave") return launch<leaving_kernel>(1, kThreads, nullptr, 3);
  if (name == "different barriers") return launch<parting_kernel>(1, kThreads, nullptr);
  if (name == "order of blocks") return chain();
  if (name == "index") return launch<index_kernel>(1, kThreads, nullptr, 0);
  if (name == "index out of bounds") return launch<index_kernel>(1, kThreads, nullptr, 1);
  if (name == "empty grid") return launch<leaving_kernel>(0, kThreads, nullptr, 0);
  if (name == "high grid") return launch<leaving_kernel>(dim3(1, 65536), kThreads, nullptr, 0);
  if (name == "large block") return launch<leaving_kernel>(1, dim3(32, 33), nullptr, 0);
  if (name == "large parameters") return launch<large_kernel>(1, kThreads, nullptr, Large());
  if (name == "product") return expect(Product().of_ones(3), 5);
  if (name == "leading dimension") return expect(Product().of_ones(3, 1), 5);
  if (name == "factors on the host") return expect(Product(true, CUBLAS_POINTER_MODE_HOST).of_ones(3), 5);
  if (name == "sums in half precision") return expect(Product().of_ones(3, 2, CUDA_R_16BF), 5);
  if (name == "modes not restored") return unrestored_modes();
  if (name == "nothing to add up") return expect(Product().of_ones(0), 2);
  throw std::runtime_error("no fault has this name");
}

}  // namespace

// What is wrong with the case of this name, or an empty text.
extern "C" __attribute__((visibility("default"))) const char* fault(const char* name) {
  static std::string text;
  text.clear();
  try {
    run(name);
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
int main(int, char** arguments) { return *fault(arguments[1]) != '\0'; }
#endif
