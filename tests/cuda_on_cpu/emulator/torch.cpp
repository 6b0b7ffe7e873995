// Launches counted, and stand-ins for functions of torch. Compiled without prefix.h: this file calls the real ones.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "emulator.h"

namespace emulated {
namespace {

struct Launches {
  std::mutex mutex;
  std::map<std::string, int> counts;
  std::string text;
};

Launches& launches() {
  static auto* const one = new Launches;  // never destroyed: a library may run until the process ends
  return *one;
}

}  // namespace

void count(const std::string& name) {
  const std::lock_guard<std::mutex> lock(launches().mutex);
  ++launches().counts[name];
}

void torch_operation(const std::string& name) {
  check_blas_handle();
  const std::string prefix = "aoti_torch_cpu_";
  count("torch " + (name.compare(0, prefix.size(), prefix) == 0 ? name.substr(prefix.size()) : name));
}

AOTITorchError empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                             int32_t device_type, int32_t device_index, AtenTensorHandle* result) {
  const AOTITorchError error = aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, result);
  void* data = nullptr;
  int64_t bytes = 0;
  if (error != 0 || aoti_torch_get_data_ptr(*result, &data) != 0) return error;
  if (aoti_torch_get_storage_size(*result, &bytes) == 0 && bytes > 0) std::memset(data, 0xff, bytes);
  return error;
}

AOTITorchError call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  torch_operation(name);
  return torch_call_dispatcher(name, overload, stack, version);
}

AOTITorchError current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // namespace emulated

// The launches since the last call, a line for each name.
extern "C" __attribute__((visibility("default"))) const char* emulated_launches() {
  emulated::check_blas_handle();
  auto& [mutex, counts, text] = emulated::launches();
  const std::lock_guard<std::mutex> lock(mutex);
  text.clear();
  for (const auto& [name, times] : counts) text += std::to_string(times) + ' ' + name + '\n';
  counts.clear();
  return text.c_str();
}
