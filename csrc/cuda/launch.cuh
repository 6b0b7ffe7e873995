// The one place that launches kernels: tests/cuda_on_cpu puts a header of its own in its place.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

namespace mapsurgery {

// Runs the kernel on the stream; the arguments convert to its parameters. Throws what the launch itself runs into.
template <auto kernel, class... Arguments>
void launch(dim3 grid, dim3 block, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, 0, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mapsurgery
