#include "adapter.h"

#include <ATen/ATen.h>

#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Tensors = std::unordered_map<std::string, at::Tensor>;

// Package metadata "adapter:NAME" says that NAME belongs to an adapter: with an empty value it is a constant to write,
// else the values that the adapter must have, because the package was compiled for them.
const std::string PREFIX = "adapter:";

[[noreturn]] void refuse(const std::string& why) {
  throw std::runtime_error("the adapter does not fit this package: " + why);
}

std::string type_of(const at::Tensor& tensor) { return c10::str(tensor.scalar_type(), " ", tensor.sizes()); }

void check_values(const std::string& name, const at::Tensor& found, const std::string& text) {
  std::istringstream words(text);
  const std::vector<double> values{std::istream_iterator<double>(words), std::istream_iterator<double>()};
  const at::Tensor expected = at::tensor(values, at::kDouble);
  if (found.sizes() != expected.sizes() || !at::allclose(found.to(at::kDouble), expected, /*rtol=*/1e-6, /*atol=*/0)) {
    refuse(c10::str(name, " is ", found.flatten(), ", the package was compiled for ", text));
  }
}

at::Tensor checked(const std::string& name, const at::Tensor& found, const at::Tensor& constant) {
  if (found.sizes() != constant.sizes() || found.scalar_type() != constant.scalar_type()) {
    refuse(name + " is " + type_of(found) + ", the package has " + type_of(constant));
  }
  return found.to(constant.device()).contiguous();
}

}  // namespace

void swap_adapter(
    torch::inductor::AOTIModelPackageLoader& loader, const c10::Dict<c10::IValue, c10::IValue>& adapter) {
  const auto constants = loader.get_runner()->extract_constants_map(/*use_inactive=*/false);
  Tensors update;
  size_t known = 0;
  for (const auto& [key, value] : loader.get_metadata()) {
    if (key.rfind(PREFIX, 0) != 0) {
      continue;
    }
    const std::string name = key.substr(PREFIX.size());
    const auto found = adapter.find(name);
    if (found == adapter.end()) {
      refuse(name + " is missing");
    }
    ++known;
    if (value.empty()) {
      update[name] = checked(name, found->value().toTensor(), constants.at(name));
    } else {
      check_values(name, found->value().toTensor(), value);
    }
  }
  if (known != adapter.size()) {
    refuse(c10::str("it has ", adapter.size(), " tensors, the package takes ", known));
  }
  loader.load_constants(update, /*use_inactive=*/false, /*check_full_update=*/false);
}
