#include "common/map_linear.h"

#include <torch/csrc/stable/library.h>

#include "cuda/device.h"

STABLE_TORCH_LIBRARY_IMPL(mapsurgery, CUDA, m) {
  m.impl("map_linear", TORCH_BOX(&mapsurgery::map_linear<mapsurgery::Cuda>));
  m.impl("map_linear_given", TORCH_BOX(&mapsurgery::map_linear_given<mapsurgery::Cuda>));
  m.impl("map_linear_backward", TORCH_BOX(&mapsurgery::map_linear_backward<mapsurgery::Cuda>));
}
