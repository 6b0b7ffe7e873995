// Runs an AOTInductor package of a patched, unmerged ViT without Python, with the adapter that it was exported with or
// another. export_vit.py writes the files.
//
// No operator of mapsurgery is named here: its library, linked by CMakeLists.txt, registers them, and the package finds
// them by name.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "adapter.h"

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;

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
    if (option == named.end() && arguments[i].rfind("--", 0) == 0) {
      throw std::invalid_argument("unknown option " + arguments[i]);
    } else if (option == named.end()) {
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

// The result of `work`, whose errors are about this file.
template <class Work>
auto about(const std::string& path, const Work& work) {
  try {
    return work();
  } catch (const c10::Error& error) {
    throw std::runtime_error(path + ": " + error.what_without_backtrace());
  }
}

// What torch.save wrote.
c10::IValue load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return about(path, [&] { return torch::pickle_load(bytes); });
}

at::Tensor load_tensor(const std::string& path) {
  return about(path, [&] { return load(path).toTensor(); });
}

std::unique_ptr<Loader> load_package(const std::string& path, const std::string& device) {
  return about(path, [&] {
    const auto compiled_for = Loader::load_metadata_from_package(path, "model").at("AOTI_DEVICE_KEY");
    TORCH_CHECK(compiled_for == device, "compiled for ", compiled_for, ", not for ", device);
    return std::make_unique<Loader>(path);
  });
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
  const auto loader = load_package(options.model, options.device);
  if (!options.adapter.empty()) {
    about(options.adapter, [&] { swap_adapter(*loader, load(options.adapter)); });
  }
  const at::Tensor input = load_tensor(options.input).to(c10::Device(options.device));
  const at::Tensor logits = loader->run({input}).at(0).cpu();
  print_rows(logits);
  if (!options.expected.empty()) {
    check_logits(logits, load_tensor(options.expected));
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
