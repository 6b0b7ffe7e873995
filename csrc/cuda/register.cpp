#include "register.h"

#include "cuda/device.h"

STABLE_TORCH_LIBRARY_IMPL(mapsurgery, CUDA, m) { mapsurgery::register_operators<mapsurgery::Cuda>(m); }
