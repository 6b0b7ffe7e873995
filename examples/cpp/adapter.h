// Exchanging the adapter of a loaded AOTInductor package.
#pragma once

#include <ATen/core/Dict.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

// Writes the tensors of an adapter (name -> tensor, from export_vit.py's adapter_tensors) over the package's constants.
// Throws std::runtime_error, and changes nothing, unless it is complete and fits: names, shapes and dtypes, the form of
// the adapter (tau, relative) and the norms of the frozen weights.
void swap_adapter(
    torch::inductor::AOTIModelPackageLoader& loader, const c10::Dict<c10::IValue, c10::IValue>& adapter);
