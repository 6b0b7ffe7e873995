#include "adapter.h"

#include <ATen/ops/allclose.h>
#include <ATen/ops/tensor.h>

#include <iterator>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Tensors = std::unordered_map<std::string, at::Tensor>;

// Package metadata "adapter:NAME" says that NAME belongs to an adapter: with an empty value it is a constant to write,
// else the values that the adapter must have, because the package was compiled for them.
const std::string PREFIX = "adapter:";

std::string type_of(const at::Tensor& tensor) { return c10::str(tensor.scalar_type(), " ", tensor.sizes()); }

void check_values(const std::string& name, const at::Tensor& found, const std::string& text) {
  std::istringstream words(text);
  const std::vector<double> values{std::istream_iterator<double>(words), std::istream_iterator<double>()};
  const at::Tensor expected = at::tensor(values, at::kDouble);
  TORCH_CHECK(
      found.sizes() == expected.sizes() && at::allclose(found.to(at::kDouble), expected, /*rtol=*/1e-6, /*atol=*/0),
      "the adapter does not fit: ", name, " must be ", text, ", which the package was compiled for");
}

at::Tensor checked(const std::string& name, const at::Tensor& found, const at::Tensor& constant) {
  TORCH_CHECK(found.sizes() == constant.sizes() && found.scalar_type() == constant.scalar_type(),
              "the adapter does not fit: ", name, " is ", type_of(found), ", the package has ", type_of(constant));
  return found.to(constant.device()).contiguous();
}

}  // namespace

void swap_adapter(torch::inductor::AOTIModelPackageLoader& loader, const c10::IValue& adapter) {
  TORCH_CHECK(adapter.isGenericDict(), "an adapter is a dictionary of tensors, this is a ", adapter.tagKind());
  const auto tensors = adapter.toGenericDict();
  const auto metadata = loader.get_metadata();
  for (const auto& entry : tensors) {
    const std::string& name = entry.key().toStringRef();
    TORCH_CHECK(metadata.count(PREFIX + name), "the adapter does not fit: the package has no ", name);
  }
  const auto constants = loader.get_runner()->extract_constants_map(/*use_inactive=*/false);
  Tensors update;
  for (const auto& [key, fixed] : metadata) {
    if (key.rfind(PREFIX, 0) != 0) {
      continue;
    }
    const std::string name = key.substr(PREFIX.size());
    const auto found = tensors.find(name);
    TORCH_CHECK(found != tensors.end() && found->value().isTensor(), "the adapter does not fit: it has no tensor ",
                name);
    const at::Tensor& tensor = found->value().toTensor();
    if (fixed.empty()) {
      update[name] = checked(name, tensor, constants.at(name));
    } else {
      check_values(name, tensor, fixed);
    }
  }
  loader.load_constants(update, /*use_inactive=*/false, /*check_full_update=*/false);
}
