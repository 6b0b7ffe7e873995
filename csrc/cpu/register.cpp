#include "register.h"

#include "cpu/device.h"
#include "ops/fingerprint.h"
#include "ops/squared_norm.h"

STABLE_TORCH_LIBRARY_IMPL(mapsurgery, CPU, m) {
  mapsurgery::register_operators<mapsurgery::Cpu>(m);
  mapsurgery::register_operator<&mapsurgery::squared_norm<mapsurgery::Cpu>>(m, "squared_norm");
  mapsurgery::register_operator<&mapsurgery::fingerprint<mapsurgery::Cpu>>(m, "fingerprint");
}
