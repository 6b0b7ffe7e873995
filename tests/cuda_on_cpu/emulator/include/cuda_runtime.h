// What the project's kernels use of CUDA's own header.
#pragma once

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() emulated::barrier(__FILE__, __LINE__)
#define threadIdx (emulated::current->index)
#define blockIdx (emulated::current->block)
#define blockDim (emulated::current->of_block)
#define gridDim (emulated::current->of_grid)

// Fibers of a block share the thread-local memory of the thread that they run on, which is poisoned before each block.
// The sanitizers watch the bounds of other variables alone.
#if defined(EMULATOR_THREADS) || defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

using cudaStream_t = void*;

// Variables of the device are variables of the CPU.
enum cudaError_t { cudaSuccess = 0 };
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
