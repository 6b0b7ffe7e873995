// In place of csrc/cuda/launch.cuh.
#pragma once

#include "cuda_runtime.h"

namespace mapsurgery {

template <class... Parameters>
constexpr size_t bytes_of_parameters(void (*)(Parameters...)) {
  return (size_t(0) + ... + sizeof(Parameters));
}

template <auto kernel, class... Arguments>
void launch(dim3 grid, dim3 block, cudaStream_t, const Arguments&... arguments) {
  static const std::string name = emulated::name_of<kernel>();
  emulated::run(name, bytes_of_parameters(kernel), grid, block, [&] { kernel(arguments...); });
}

}  // namespace mapsurgery
