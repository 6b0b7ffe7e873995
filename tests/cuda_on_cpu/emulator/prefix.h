// Included before every source of the library: torch's headers, and what stands for CUDA's half of them. The emulated
// GPU's tensors are tensors of the CPU.
#ifndef EMULATOR_PREFIX_H
#define EMULATOR_PREFIX_H

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "emulator.h"

// Before the headers that call them.
#define aoti_torch_empty_strided emulated::empty_strided
#define aoti_torch_copy_ emulated::Counted<aoti_torch_copy_>::call
#define torch_call_dispatcher emulated::call_dispatcher
#define aoti_torch_get_current_cuda_stream emulated::current_stream
#define torch_get_current_cuda_blas_handle emulated::blas_handle

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(int32_t) {}
  ~EmulatedGuard() {}  // as the real one has: a guard is never an unused variable
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedGuard

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) ((void)(call))

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(library, CPU, m, C10_UID)

#endif
