// Exchanging the adapter of a loaded AOTInductor package.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

// Writes the tensors of an adapter (a dictionary, from export_vit.py's adapter_tensors) over the package's constants.
// Throws c10::Error, and changes nothing, unless it is complete and fits: names, shapes and dtypes, the form of the
// adapter (tau, relative) and the norms of the frozen weights.
void swap_adapter(torch::inductor::AOTIModelPackageLoader& loader, const c10::IValue& adapter);
