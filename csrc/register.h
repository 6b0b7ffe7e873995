// The list of the operators that both devices have; cpu/register.cpp and cuda/register.cpp name theirs.
#pragma once

#include <torch/csrc/stable/library.h>

#include "base/errors.h"
#include "ops/effective_weight.h"
#include "ops/lowrank_conv.h"
#include "ops/lowrank_linear.h"
#include "ops/map_scales.h"

namespace mapsurgery {

template <auto kernel>
void register_operator(torch::stable::detail::StableLibrary& m, const char* name) {
  m.impl(name, TORCH_BOX(&InWordsOfTorch<kernel>::call));
}

template <class Device>
void register_operators(torch::stable::detail::StableLibrary& m) {
  register_operator<&map_scales<Device>>(m, "map_scales");
  register_operator<&map_scales_backward<Device>>(m, "map_scales_backward");
  register_operator<&lowrank_linear<Device>>(m, "lowrank_linear");
  register_operator<&lowrank_linear_backward<Device>>(m, "lowrank_linear_backward");
  register_operator<&lowrank_conv<Device>>(m, "lowrank_conv");
  register_operator<&lowrank_conv_backward<Device>>(m, "lowrank_conv_backward");
  register_operator<&effective_weight<Device>>(m, "effective_weight");
  register_operator<&effective_weight_backward<Device>>(m, "effective_weight_backward");
  register_operator<&combine_in_place<Device, Combine::kMerge>>(m, "merge_");
  register_operator<&combine_in_place<Device, Combine::kUnmerge>>(m, "unmerge_");
}

}  // namespace mapsurgery
