// Runs an AOTInductor package of a patched, unmerged ViT without Python, with the adapter that it was exported with or
// another. export_vit.py writes the files.
//
// No operator of mapsurgery is named here: its library, linked by CMakeLists.txt, registers them, and the package finds
// them by name.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "adapter.h"

namespace {

constexpr const char* USAGE =
    "usage: vit MODEL.pt2 INPUT.pt [--device cpu|cuda] [--adapter ADAPTER.pt] [--expected LOGITS.pt]";

struct Options {
  std::string model, input, adapter, expected, device = "cpu";
};

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  const std::unordered_map<std::string, std::string*> named = {
      {"--device", &options.device}, {"--adapter", &options.adapter}, {"--expected", &options.expected}};
  std::vector<std::string> files;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto option = named.find(arguments[i]);
    if (option == named.end()) {
      files.push_back(arguments[i]);
    } else if (++i < arguments.size()) {
      *option->second = arguments[i];
    } else {
      throw std::invalid_argument(option->first + " needs a value");
    }
  }
  if (files.size() != 2) {
    throw std::invalid_argument("two files are needed, got " + std::to_string(files.size()));
  }
  if (options.device != "cpu" && options.device != "cuda") {
    throw std::invalid_argument("--device is cpu or cuda, got " + options.device);
  }
  options.model = files[0];
  options.input = files[1];
  return options;
}

// What torch.save wrote.
c10::IValue load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  return torch::pickle_load({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
}

void print_rows(const at::Tensor& logits) {
  std::cout << std::setprecision(9);
  for (int64_t row = 0; row < logits.size(0); ++row) {
    for (int64_t column = 0; column < logits.size(1); ++column) {
      std::cout << (column ? " " : "") << logits[row][column].item<float>();
    }
    std::cout << '\n';
  }
}

void check_logits(const at::Tensor& logits, const at::Tensor& expected) {
  const auto deviation = (logits - expected).abs().max().item<float>();
  std::cerr << "largest deviation from Python: " << deviation << '\n';
  if (!at::allclose(logits, expected, /*rtol=*/1e-3, /*atol=*/1e-4)) {
    throw std::runtime_error("the logits are not those of Python");
  }
}

void run(const Options& options) {
  const auto metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(options.model, "model");
  const std::string& compiled_for = metadata.at("AOTI_DEVICE_KEY");
  if (compiled_for != options.device) {
    throw std::runtime_error(options.model + " was compiled for " + compiled_for + ", not for " + options.device);
  }
  torch::inductor::AOTIModelPackageLoader loader(options.model);
  if (!options.adapter.empty()) {
    swap_adapter(loader, load(options.adapter).toGenericDict());
  }
  const at::Tensor input = load(options.input).toTensor().to(c10::Device(options.device));
  const at::Tensor logits = loader.run({input}).at(0).cpu();
  print_rows(logits);
  if (!options.expected.empty()) {
    check_logits(logits, load(options.expected).toTensor());
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run(parse({arguments + 1, arguments + count}));
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << '\n' << USAGE << '\n';
    return 2;
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
