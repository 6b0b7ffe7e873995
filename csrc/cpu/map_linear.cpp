#include "common/map_linear.h"

#include <torch/csrc/stable/library.h>

#include "cpu/device.h"

STABLE_TORCH_LIBRARY_IMPL(mapsurgery, CPU, m) {
  m.impl("map_linear", TORCH_BOX(&mapsurgery::map_linear<mapsurgery::Cpu>));
  m.impl("map_linear_backward", TORCH_BOX(&mapsurgery::map_linear_backward<mapsurgery::Cpu>));
}
