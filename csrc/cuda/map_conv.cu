#include "common/map_conv.h"

#include <torch/csrc/stable/library.h>

#include "cuda/device.h"

STABLE_TORCH_LIBRARY_IMPL(mapsurgery, CUDA, m) {
  m.impl("map_conv", TORCH_BOX(&mapsurgery::map_conv<mapsurgery::Cuda>));
  m.impl("map_conv_given", TORCH_BOX(&mapsurgery::map_conv_given<mapsurgery::Cuda>));
  m.impl("map_conv_backward", TORCH_BOX(&mapsurgery::map_conv_backward<mapsurgery::Cuda>));
}
